//! Ports that the kernel may choose for connections of the node's own processes.
//!
//! IPVS takes whatever arrives for a frontend at an address of the node: also the
//! answer to a process that calls from that very port. Node ports lie outside of
//! the kernel's range; a host port may lie within. Only asked here, never changed.

use std::fs;
use std::path::Path;

/// Whether the kernel may choose `port` as the source of a connection. `root` is
/// where `/proc/sys` is; what cannot be read is no reason to say so.
#[must_use]
pub fn may_be_chosen(root: &Path, port: u16) -> bool {
    let read = |name: &str| fs::read_to_string(root.join("net/ipv4").join(name));
    let (Ok(range), Ok(reserved)) = (read("ip_local_port_range"), read("ip_local_reserved_ports"))
    else {
        return false;
    };
    let mut ends = range.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(first)), Some(Ok(last))) = (ends.next(), ends.next()) else {
        return false;
    };
    (first..=last).contains(&port) && !is_listed(&reserved, port)
}

/// Whether a port is in a list such as `30000-32767,40000`.
fn is_listed(ports: &str, port: u16) -> bool {
    ports.trim().split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<u16>(), last.parse::<u16>()) {
            (Ok(first), Ok(last)) => (first..=last).contains(&port),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_not_chosen() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!may_be_chosen(dir.path(), 40_000), "nothing is known");
        let folder = dir.path().join("net/ipv4");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("ip_local_port_range"), "32768\t60999\n").unwrap();
        for (reserved, chosen) in [
            ("\n", [32_768, 40_000, 60_999].as_slice()),
            ("40000\n", &[32_768, 60_999]),
            ("32768-50000,60999\n", &[]),
        ] {
            fs::write(folder.join("ip_local_reserved_ports"), reserved).unwrap();
            let all = [80, 32_767, 32_768, 40_000, 60_999, 61_000];
            let found = all
                .into_iter()
                .filter(|port| may_be_chosen(dir.path(), *port));
            assert_eq!(found.collect::<Vec<u16>>(), chosen, "{reserved:?}");
        }
    }
}
