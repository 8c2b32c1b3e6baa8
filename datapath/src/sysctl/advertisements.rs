//! Router advertisements on a node that forwards.
//!
//! With forwarding of IPv6 on the kernel drops default routes that were learnt from router
//! advertisements, and learns none, unless the device says that it wants them all the same:
//! `accept_ra` 2 in place of 1. Only the ways out of the node are told so: whoever sends on a
//! device that takes them can give this node a route.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ferrule_model::ownership::is_of_a_pod;

use super::{SysctlError, Sysctls};

/// The kernel's routes, as this thread's network namespace has them.
const ROUTES: [&str; 2] = [
    "/proc/thread-self/net/route",
    "/proc/thread-self/net/ipv6_route",
];

/// What the kernel tells of devices.
const DEVICES: &str = "/sys/class/net";

/// `RTF_ADDRCONF`: learnt from a router advertisement.
const LEARNT: u32 = 0x0004_0000;

/// How deep devices are stacked at most (`MAX_NEST_DEV`).
const DEPTH: usize = 8;

/// Forwarding of IPv6: of every device, and what a new one begins with.
const FORWARDING: &str = "net/ipv6/conf/all/forwarding";

/// The machine's routes, and where its devices are.
pub(super) struct Machine {
    routes4: String,
    routes6: String,
    devices: PathBuf,
}

impl Machine {
    /// That of the calling thread's network namespace. Without a family it has no routes.
    pub(super) fn read() -> Self {
        let [routes4, routes6] = ROUTES.map(|path| fs::read_to_string(path).unwrap_or_default());
        Self {
            routes4,
            routes6,
            devices: PathBuf::from(DEVICES),
        }
    }

    /// Devices with a default route.
    fn routed(&self) -> BTreeSet<&str> {
        let of_ipv6 = default_routes6(&self.routes6).map(|(device, _)| device);
        default_routes4(&self.routes4).chain(of_ipv6).collect()
    }

    /// Whether a device is hardware or built on that.
    fn is_hardware(&self, device: &str, depth: usize) -> bool {
        let folder = self.devices.join(device);
        if folder.join("device").exists() {
            return true;
        }
        depth > 0
            && lower(&folder)
                .iter()
                .any(|one| self.is_hardware(one, depth - 1))
    }

    /// Devices with a default route that was learnt.
    fn learnt_by(&self) -> BTreeSet<&str> {
        let learnt = default_routes6(&self.routes6).filter(|(_, flags)| flags & LEARNT != 0);
        learnt.map(|(device, _)| device).collect()
    }
}

/// Devices below a bond, a bridge, a VLAN.
fn lower(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| name.strip_prefix("lower_").map(str::to_owned))
        .collect()
}

/// Devices with a default route of IPv4.
fn default_routes4(routes: &str) -> impl Iterator<Item = &str> {
    let lines = routes.lines().map(|line| line.split_whitespace());
    lines.filter_map(|mut line| {
        let (device, to) = (line.next()?, line.next()?);
        let mask = line.nth(5)?;
        (to == "00000000" && mask == "00000000").then_some(device)
    })
}

/// Likewise of IPv6, with the route's flags. The loopback device has those that lead nowhere.
fn default_routes6(routes: &str) -> impl Iterator<Item = (&str, u32)> {
    let lines = routes.lines().map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields
    });
    lines.filter_map(|fields| {
        // Destination, its prefix, source, its prefix, gateway, metric, two counts, flags, device.
        let [to, "00", _, _, _, _, _, _, flags, device] = fields[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let is_default = to.bytes().all(|digit| digit == b'0');
        (is_default && device != "lo").then_some((device, flags))
    })
}

/// Before forwarding is turned on, and again for devices that came later: they begin with
/// forwarding on, because we turned it on.
pub(super) fn keep(sysctls: &Sysctls, machine: &Machine) -> Result<(), SysctlError> {
    let learnt = machine.learnt_by();
    let read = |key: &str| fs::read_to_string(sysctls.root.join(key)).unwrap_or_default();
    let was_off = || {
        let recorded = sysctls.first(FORWARDING);
        recorded.unwrap_or_else(|| read(FORWARDING).trim().to_owned()) == "0"
    };
    // A device leads out of the node that is hardware, built on that, or has a default route.
    // Others are between this node and its pods or virtual machines. One that forwarded before
    // we came took none with 1.
    let forwarded = |name: &str| {
        let key = format!("net/ipv6/conf/{name}/forwarding");
        let recorded = sysctls.first(&key);
        recorded.unwrap_or_else(|| match read(FORWARDING).trim() {
            "0" => read(&key).trim().to_owned(),
            _ => "0".to_owned(),
        }) != "0"
    };
    let was_off = was_off();
    let routed = machine.routed();
    for name in devices(&sysctls.root) {
        let key = format!("net/ipv6/conf/{name}/accept_ra");
        if read(&key).trim() != "1" {
            continue;
        }
        let leads_out = || routed.contains(&*name) || machine.is_hardware(&name, DEPTH);
        let took = || was_off && leads_out() && !forwarded(&name);
        if learnt.contains(name.as_str()) || took() {
            let value = "2";
            match sysctls.write(&key, value) {
                // The device went.
                Err(source) if source.kind() == io::ErrorKind::NotFound => {}
                written => {
                    written.map_err(|source| SysctlError {
                        path: sysctls.root.join(&key),
                        value,
                        source,
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// Devices with settings of IPv6 that are not pods'. What all have, and what new ones begin with,
/// stays as it is: pods' devices begin with that, too.
fn devices(root: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(root.join("net/ipv6/conf"));
    let names = entries.into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter(|name| !matches!(name.as_str(), "all" | "default" | "lo") && !is_of_a_pod(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place {
        _folder: tempfile::TempDir,
        sysctls: Sysctls,
        machine: Machine,
    }

    impl Place {
        /// Devices `eth0` of hardware, `bond0` on it, `wg0` with a default route, `veth0`, a
        /// pod's, and `fwd0`, which forwards on its own.
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let place = Self {
                sysctls: Sysctls {
                    root: folder.path().join("sys"),
                    record: Some(folder.path().join("sysctls.json")),
                },
                machine: Machine {
                    routes4: "Iface Destination Gateway Flags RefCnt Use Metric Mask\n\
                              wg0 00000000 00000000 0001 0 0 0 00000000 0 0 0\n\
                              tun0 00000000 00000000 0001 0 0 0 00000080 0 0 0\n"
                        .to_owned(),
                    routes6: String::new(),
                    devices: folder.path().join("class"),
                },
                _folder: folder,
            };
            for name in [
                "eth0",
                "bond0",
                "wg0",
                "tun0",
                "veth0",
                "fer0123456789ab",
                "fwd0",
                "lo",
                "default",
            ] {
                place.add(name);
            }
            for folder in [
                "eth0/device",
                "bond0/lower_eth0",
                "fwd0/device",
                "fer0123456789ab/device",
            ] {
                fs::create_dir_all(place.machine.devices.join(folder)).unwrap();
            }
            place.put("kernel/random/boot_id", "boot");
            place.put("net/ipv6/conf/fwd0/forwarding", "1");
            place.put(FORWARDING, "0");
            place
        }

        fn add(&self, name: &str) {
            self.put(&format!("net/ipv6/conf/{name}/accept_ra"), "1");
            self.put(&format!("net/ipv6/conf/{name}/forwarding"), "0");
        }

        fn put(&self, key: &str, value: &str) {
            let path = self.sysctls.root.join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }

        /// Devices that take advertisements in any case.
        fn keep(&self) -> Vec<String> {
            keep(&self.sysctls, &self.machine).unwrap();
            let all = fs::read_dir(self.sysctls.root.join("net/ipv6/conf")).unwrap();
            let mut names: Vec<String> = all
                .map(|entry| entry.unwrap())
                .filter(|entry| {
                    let value = fs::read_to_string(entry.path().join("accept_ra"));
                    value.is_ok_and(|value| value.trim() == "2")
                })
                .map(|entry| entry.file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        }

        /// As the kernel does it.
        fn forward(&self) {
            self.sysctls.write(FORWARDING, "1").unwrap();
            for name in devices(&self.sysctls.root) {
                self.put(&format!("net/ipv6/conf/{name}/forwarding"), "1");
            }
        }
    }

    #[test]
    fn ways_out_go_on_to_take_advertisements() {
        let place = Place::new();
        assert_eq!(place.keep(), ["bond0", "eth0", "wg0"]);
        place.forward();
        assert_eq!(place.keep(), ["bond0", "eth0", "wg0"]);
        // One that comes later begins with forwarding on.
        place.add("eth1");
        fs::create_dir_all(place.machine.devices.join("eth1/device")).unwrap();
        place.put("net/ipv6/conf/eth1/forwarding", "1");
        place.add("veth1");
        place.put("net/ipv6/conf/veth1/forwarding", "1");
        assert_eq!(place.keep(), ["bond0", "eth0", "eth1", "wg0"]);
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        for device in ["eth0", "eth1"] {
            let key = format!("net/ipv6/conf/{device}/accept_ra");
            let value = fs::read_to_string(place.sysctls.root.join(key)).unwrap();
            assert_eq!(value.trim(), "1", "{device}");
        }
    }

    #[test]
    fn a_node_that_forwarded_before_stays_as_it_was() {
        let mut place = Place::new();
        place.put(FORWARDING, "1");
        assert_eq!(place.keep(), Vec::<String>::new());
        // But for a default route that it has learnt all the same.
        let line = |flags: &str, device: &str| {
            let zero = "0".repeat(32);
            format!(
                "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 00000001 00000000 {flags} {device}\n"
            )
        };
        let routes = [
            line("00450003", "eth0"),
            line("00000003", "wg0"),
            line("00450003", "fer0123456789ab"),
        ];
        place.machine.routes6 = routes.concat();
        assert_eq!(place.keep(), ["eth0"]);
    }

    #[test]
    fn whoever_refuses_advertisements_goes_on_to() {
        let place = Place::new();
        place.put("net/ipv6/conf/eth0/accept_ra", "0");
        assert_eq!(place.keep(), ["bond0", "wg0"]);
    }
}
