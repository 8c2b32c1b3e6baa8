//! Kernel settings that pods and services need.

mod record;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use ferrule_model::ownership::is_of_a_pod;

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
    // Without IPv6 there are none.
    let routes = fs::read_to_string(ROUTES).unwrap_or_default();
    keep_router_advertisements(sysctls, &routes)?;
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

/// The kernel's routes of IPv6, as this thread's network namespace has them.
const ROUTES: &str = "/proc/thread-self/net/ipv6_route";

/// `RTF_ADDRCONF`: learnt from a router advertisement.
const LEARNT: u32 = 0x0004_0000;

/// Turning forwarding on drops default routes that were learnt from router
/// advertisements, unless their device says that it wants them all the same. No other device
/// is told so: whoever sends on it could give this node a route.
fn keep_router_advertisements(sysctls: &Sysctls, routes: &str) -> Result<(), SysctlError> {
    for name in learnt_by(routes) {
        let key = format!("net/ipv6/conf/{name}/accept_ra");
        let path = sysctls.root.join(&key);
        if fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
            let value = "2";
            sysctls.write(&key, value).map_err(|source| SysctlError {
                path,
                value,
                source,
            })?;
        }
    }
    Ok(())
}

/// Devices with a default route that was learnt.
fn learnt_by(routes: &str) -> BTreeSet<&str> {
    let lines = routes.lines().map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields
    });
    let devices = lines.filter_map(|fields| {
        // Destination, its prefix, source, its prefix, gateway, metric, two counts, flags, device.
        let [to, "00", _, _, _, _, _, _, flags, device] = fields[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let is_default = to.bytes().all(|digit| digit == b'0');
        (is_default && flags & LEARNT != 0 && !is_of_a_pod(device)).then_some(device)
    });
    devices.collect()
}

#[cfg(test)]
mod tests {
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
    fn what_differs_is_written_and_learnt_routes_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (key, _, _) in FORWARDING.iter().chain(&SERVICES) {
            put(root, key, "0\n");
        }
        put(root, "net/ipv4/vs/conntrack", "1\n");
        for device in ["eth0", "eth2", "default"] {
            put(root, &format!("net/ipv6/conf/{device}/accept_ra"), "1\n");
        }
        put(root, "net/ipv6/conf/eth1/accept_ra", "0\n");
        let sysctls = Sysctls {
            root: root.to_owned(),
            record: None,
        };
        let line = |flags: &str, device: &str| {
            let zero = "0".repeat(32);
            format!(
                "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 {flags} {device}\n"
            )
        };
        let routes = [
            line("00450003", "eth0"),
            line("00450003", "eth1"),
            line("00000003", "eth2"),
            line("00450003", "fer0123456789ab"),
        ];
        let routes = routes.concat();
        assert_eq!(learnt_by(&routes), BTreeSet::from(["eth0", "eth1"]));
        keep_router_advertisements(&sysctls, &routes).unwrap();
        ensure_forwarding(&sysctls).unwrap();
        ensure_services(&sysctls).unwrap();
        assert_eq!(get(root, "net/ipv4/ip_forward"), "1");
        assert_eq!(get(root, "net/ipv4/vs/expire_nodest_conn"), "1");
        assert_eq!(get(root, "net/ipv4/vs/conntrack"), "1\n", "not touched");
        assert_eq!(get(root, "net/ipv6/conf/eth0/accept_ra"), "2");
        for (device, value) in [("eth1", "0\n"), ("eth2", "1\n"), ("default", "1\n")] {
            let key = format!("net/ipv6/conf/{device}/accept_ra");
            assert_eq!(get(root, &key), value, "{device}");
        }
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
