//! Kernel settings that pods and services need.

mod advertisements;
mod record;

use std::io;
use std::path::PathBuf;

use self::advertisements::Machine;
pub(crate) use self::record::TIMEOUTS;
pub use self::record::{Changed, Sysctls};

/// A setting that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("sysctl {path}: {source}; set it to {value} by hand", path = path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: &'static str,
    source: io::Error,
}

/// A setting: key, value, and whether the kernel may lack it.
type Setting = (&'static str, &'static str, bool);

/// What pods need: their packets pass through the node. IPv6 may not be compiled in, or be
/// disabled at boot.
const FORWARDING: [Setting; 3] = [
    ("net/ipv4/ip_forward", "1", false),
    // A pod that calls itself through a Service needs no advice about a shorter way. A device
    // sends redirects if this one or its own says so; the plugin sets those of pods' veths.
    ("net/ipv4/conf/all/send_redirects", "0", false),
    ("net/ipv6/conf/all/forwarding", "1", true),
];

/// What services need.
const SERVICES: [Setting; 3] = [
    // IPVS's connections are known to conntrack.
    ("net/ipv4/vs/conntrack", "1", false),
    // A connection to a real server that is gone ends at its next packet.
    ("net/ipv4/vs/expire_nodest_conn", "1", false),
    // A persistence template of a real server of weight 0 does not count.
    ("net/ipv4/vs/expire_quiescent_template", "1", false),
];

/// Whether pods have no way out of the node without this setting.
pub(crate) fn is_for_pods(key: &str) -> bool {
    let mut settings = FORWARDING.iter();
    settings.any(|(of_pods, ..)| *of_pods == key) || key.ends_with("/accept_ra")
}

/// Lets packets of pods pass through the node of the calling thread's network
/// namespace; writes only what differs.
///
/// # Errors
/// The first setting that cannot be made.
pub fn ensure_forwarding(sysctls: &Sysctls) -> Result<(), SysctlError> {
    advertisements::keep(sysctls, &Machine::read())?;
    ensure(sysctls, &FORWARDING)
}

/// Makes the settings that services need; writes only what differs.
pub(crate) fn ensure_services(sysctls: &Sysctls) -> Result<(), SysctlError> {
    ensure(sysctls, &SERVICES)
}

fn ensure(sysctls: &Sysctls, settings: &[Setting]) -> Result<(), SysctlError> {
    for (key, value, optional) in settings {
        match sysctls.write(key, value) {
            Ok(_) => {}
            Err(error) if *optional && error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(SysctlError {
                    path: sysctls.root.join(key),
                    value,
                    source,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

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
    fn what_differs_is_written() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (key, _, _) in FORWARDING.iter().chain(&SERVICES) {
            put(root, key, "0\n");
        }
        put(root, "net/ipv4/vs/conntrack", "1\n");
        let sysctls = Sysctls {
            root: root.to_owned(),
            record: None,
        };
        ensure_forwarding(&sysctls).unwrap();
        ensure_services(&sysctls).unwrap();
        assert_eq!(get(root, "net/ipv4/ip_forward"), "1");
        assert_eq!(get(root, "net/ipv4/vs/expire_nodest_conn"), "1");
        assert_eq!(get(root, "net/ipv4/vs/conntrack"), "1\n", "not touched");
        fs::remove_dir_all(root.join("net/ipv6")).unwrap();
        ensure_forwarding(&sysctls).unwrap();
        fs::remove_file(root.join("net/ipv4/vs/conntrack")).unwrap();
        let error = ensure_services(&sysctls).unwrap_err().to_string();
        assert!(
            error.contains("vs/conntrack") && error.contains("by hand"),
            "{error}"
        );
    }
}
