//! Kernel settings: what the agent will set, and whether it can.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rustix::fs::{Access, access};

use super::{Finding, Outcome};

const FORWARDING: &str = "forwarding";
const IPV6: &str = "IPv6";
const REVERSE_PATH: &str = "reverse path filter";

/// The routes of IPv4, as this process's network namespace has them.
const ROUTES: &str = "/proc/net/route";

/// What lets packets of pods pass, by family.
const KEYS: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Whether IPv6 is there, nothing drops what comes in by another way, and forwarding is on or can be turned on.
pub(super) fn check(root: &Path) -> Vec<Finding> {
    let mut findings = vec![ipv6(root), forwarding(root)];
    findings.extend(reverse_path_filter(root));
    findings
}

/// A filter that drops calls. It is told and left as it is: on a node with several networks it may
/// be there for what comes in by them, and kube-proxy does not touch it, either.
pub(super) fn reverse_path_filter(root: &Path) -> Option<Finding> {
    let routes = fs::read_to_string(ROUTES).unwrap_or_default();
    reverse_path(root, &ways_out(&routes))
}

/// Devices that default routes of IPv4 lead out by, from the kernel's table of routes.
fn ways_out(routes: &str) -> BTreeSet<&str> {
    let lines = routes.lines().map(|line| line.split_whitespace());
    let fields = lines.filter_map(|mut line| {
        let (device, to) = (line.next()?, line.next()?);
        let mask = line.nth(5)?;
        (to == "00000000" && mask == "00000000").then_some(device)
    });
    fields.collect()
}

/// With several ways out, a client's request may come in by another device than its answer would
/// leave by.
fn reverse_path(root: &Path, ways_out: &BTreeSet<&str>) -> Option<Finding> {
    let read = |device: &str| -> u8 {
        let path = root.join(format!("net/ipv4/conf/{device}/rp_filter"));
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    };
    let all = read("all");
    let strict: Vec<&str> = ways_out
        .iter()
        .copied()
        .filter(|device| read(device).max(all) == 1)
        .collect();
    if ways_out.len() < 2 || strict.is_empty() {
        return None;
    }
    Some(Finding::new(
        REVERSE_PATH,
        Outcome::Warning,
        format!(
            "this node has several default routes, and what comes in by {} is dropped unless the \
             answer leaves there, too (rp_filter is 1): so are calls of node ports and balancers",
            strict.join(", ")
        ),
        "set net.ipv4.conf.DEVICE.rp_filter to 2, unless each network has a way back of its own",
    ))
}

fn ipv6(root: &Path) -> Finding {
    let off = match fs::read_to_string(root.join("net/ipv6/conf/all/disable_ipv6")) {
        Err(_) => "this kernel has no IPv6, or it was turned off at boot",
        Ok(text) if text.trim() == "1" => {
            "IPv6 is turned off (net.ipv6.conf.all.disable_ipv6 is 1)"
        }
        Ok(_) => return Finding::ok(IPV6, "on"),
    };
    Finding::new(
        IPV6,
        Outcome::Warning,
        format!("{off}: addresses of that family cannot be served"),
        "turn it on, unless the cluster is for IPv4 alone",
    )
}

fn forwarding(root: &Path) -> Finding {
    let mut on = true;
    for key in KEYS {
        let path = root.join(key);
        match fs::read_to_string(&path) {
            Ok(text) if text.trim() == "1" => continue,
            Ok(_) => on = false,
            // No IPv6; that has a check of its own.
            Err(_) if key.contains("ipv6") => continue,
            Err(error) => {
                return Finding::new(
                    FORWARDING,
                    Outcome::Failed,
                    format!("{} cannot be read: {error}", path.display()),
                    "mount /proc where the agent runs",
                );
            }
        }
        if let Err(errno) = access(&path, Access::WRITE_OK) {
            return Finding::new(
                FORWARDING,
                Outcome::Failed,
                format!(
                    "{} is off and cannot be written ({errno}): pods cannot reach beyond this node",
                    path.display()
                ),
                format!(
                    "set {} to 1 by hand, or run as root with /proc/sys writable",
                    key.replace('/', ".")
                ),
            );
        }
    }
    Finding::ok(FORWARDING, if on { "on" } else { "`run` will turn it on" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarding_is_on_or_can_be_turned_on() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(forwarding(root).result, Outcome::Failed);
        assert_eq!(ipv6(root).result, Outcome::Warning);
        for (key, value) in [
            (KEYS[0], "1\n"),
            (KEYS[1], "1\n"),
            ("net/ipv6/conf/all/disable_ipv6", "0\n"),
        ] {
            let path = root.join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        assert_eq!(forwarding(root), Finding::ok(FORWARDING, "on"));
        assert_eq!(ipv6(root).result, Outcome::Ok);
        fs::write(root.join(KEYS[1]), "0\n").unwrap();
        assert_eq!(forwarding(root).result, Outcome::Ok);
        assert_eq!(
            fs::read_to_string(root.join(KEYS[1])).unwrap(),
            "0\n",
            "not touched"
        );
        fs::write(root.join("net/ipv6/conf/all/disable_ipv6"), "1\n").unwrap();
        assert_eq!(ipv6(root).result, Outcome::Warning);
    }

    #[test]
    fn a_strict_filter_matters_with_several_ways_out() {
        const ROUTES: &str = "\
Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth1\t00000000\t0102A8C0\t0003\t0\t0\t200\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0
";
        let ways = ways_out(ROUTES);
        assert_eq!(ways, BTreeSet::from(["eth0", "eth1"]));
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let put = |device: &str, value: &str| {
            let path = root.join(format!("net/ipv4/conf/{device}/rp_filter"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        put("all", "0\n");
        put("eth0", "1\n");
        put("eth1", "2\n");
        let found = reverse_path(root, &ways).unwrap();
        assert!(found.found.contains("comes in by eth0 is"), "{found:?}");
        assert_eq!(reverse_path(root, &BTreeSet::from(["eth0"])), None);
        put("all", "2\n");
        assert_eq!(reverse_path(root, &ways), None, "the larger one holds");
    }
}
