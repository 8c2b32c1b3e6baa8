//! Kernel settings: what the agent will set, and whether it can.

use std::fs;
use std::path::Path;

use rustix::fs::{Access, access};

use super::{Finding, Outcome};

const FORWARDING: &str = "forwarding";
const IPV6: &str = "IPv6";

/// What lets packets of pods pass, by family.
const KEYS: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// Whether IPv6 is there, and forwarding is on or can be turned on.
pub(super) fn check(root: &Path) -> Vec<Finding> {
    vec![ipv6(root), forwarding(root)]
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
}
