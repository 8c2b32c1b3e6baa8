//! Kernel settings that services need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::info;

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("sysctl {path}: {source}; set it to {value} by hand", path = path.display())]
pub(crate) struct SysctlError {
    path: PathBuf,
    value: &'static str,
    source: io::Error,
}

/// Setting, value, and whether the kernel may lack it.
const SETTINGS: [(&str, &str, bool); 5] = [
    // Packets of pods pass through the node.
    ("net/ipv4/ip_forward", "1", false),
    // Absent where IPv6 is not compiled in or disabled at boot.
    ("net/ipv6/conf/all/forwarding", "1", true),
    // IPVS's connections are known to conntrack.
    ("net/ipv4/vs/conntrack", "1", false),
    // A connection to a real server that is gone ends at its next packet.
    ("net/ipv4/vs/expire_nodest_conn", "1", false),
    // A persistence template of a real server of weight 0 does not count.
    ("net/ipv4/vs/expire_quiescent_template", "1", false),
];

/// Makes the settings as services need them; writes only where they differ.
pub(crate) fn ensure(root: &Path) -> Result<(), SysctlError> {
    keep_router_advertisements(root)?;
    for (key, value, optional) in SETTINGS {
        let path = root.join(key);
        match write_if_different(&path, value) {
            Ok(()) => {}
            Err(error) if optional && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(SysctlError {
                    path,
                    value,
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Turning forwarding on drops default routes that were learnt from router
/// advertisements, unless a device says that it wants them all the same.
fn keep_router_advertisements(root: &Path) -> Result<(), SysctlError> {
    let devices = root.join("net/ipv6/conf");
    let Ok(entries) = fs::read_dir(&devices) else {
        // No IPv6 here.
        return Ok(());
    };
    for path in entries
        .flatten()
        .map(|entry| entry.path().join("accept_ra"))
    {
        if fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
            let value = "2";
            write_if_different(&path, value).map_err(|source| SysctlError {
                path,
                value,
                source,
            })?;
        }
    }
    Ok(())
}

fn write_if_different(path: &Path, value: &str) -> io::Result<()> {
    let before = fs::read_to_string(path)?;
    if before.trim() == value {
        return Ok(());
    }
    fs::write(path, value)?;
    info!(sysctl = %path.display(), before = before.trim(), value, "set");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, key: &str, value: &str) {
        let path = root.join(key);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, value).unwrap();
    }

    fn get(root: &Path, key: &str) -> String {
        fs::read_to_string(root.join(key)).unwrap()
    }

    #[test]
    fn what_differs_is_written_and_learnt_routes_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (key, _, _) in SETTINGS {
            put(root, key, "0\n");
        }
        put(root, "net/ipv4/vs/conntrack", "1\n");
        put(root, "net/ipv6/conf/eth0/accept_ra", "1\n");
        put(root, "net/ipv6/conf/eth1/accept_ra", "0\n");
        ensure(root).unwrap();
        assert_eq!(get(root, "net/ipv4/ip_forward"), "1");
        assert_eq!(get(root, "net/ipv4/vs/conntrack"), "1\n", "not touched");
        assert_eq!(get(root, "net/ipv6/conf/eth0/accept_ra"), "2");
        assert_eq!(get(root, "net/ipv6/conf/eth1/accept_ra"), "0\n");
        fs::remove_dir_all(root.join("net/ipv6")).unwrap();
        ensure(root).unwrap();
        fs::remove_file(root.join("net/ipv4/vs/conntrack")).unwrap();
        let error = ensure(root).unwrap_err().to_string();
        assert!(
            error.contains("vs/conntrack") && error.contains("by hand"),
            "{error}"
        );
    }
}
