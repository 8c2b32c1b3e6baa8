//! Router advertisements in the real kernel, in a network namespace of its own.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

#[path = "support/ip.rs"]
mod program;
mod support;

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::sockopt::{set_ipv6_multicast_hops, set_ipv6_unicast_hops};
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};
use tokio::time::sleep;

use self::program::ip;
use self::support::in_namespace;
use ferrule_datapath::{Sysctls, ensure_forwarding};

/// A router advertisement: a hop limit of 64, a router for half an hour.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Sends one on a device.
fn advertise(device: &str) {
    let index: u32 = ip(&format!("-o link show {device}"))
        .split(':')
        .next()
        .and_then(|index| index.parse().ok())
        .unwrap();
    let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6)).unwrap();
    // Neighbour discovery refuses what a router has passed on.
    set_ipv6_multicast_hops(&socket, 255).unwrap();
    set_ipv6_unicast_hops(&socket, Some(255)).unwrap();
    let to = SocketAddrV6::new(ALL_NODES, 0, 0, index);
    sendto(&socket, &ADVERTISEMENT, SendFlags::empty(), &to).unwrap();
}

/// Whether a default route comes by a device while its other end advertises one.
async fn learns(device: &str, router: &str) -> bool {
    for _ in 0..20 {
        advertise(router);
        sleep(Duration::from_millis(50)).await;
        if ip(&format!("-6 route show default dev {device}")).contains("proto ra") {
            return true;
        }
    }
    false
}

#[test]
fn a_first_advertisement_after_forwarding_was_turned_on_is_taken() {
    in_namespace(|| async {
        let folder = tempfile::tempdir().unwrap();
        let sysctls = Sysctls {
            root: PathBuf::from("/proc/sys"),
            record: Some(folder.path().join("sysctls.json")),
        };
        for (device, router) in [("out0", "router"), ("inside0", "pod")] {
            ip(&format!("link add {device} type veth peer name {router}"));
            for end in [device, router] {
                ip(&format!("link set {end} up"));
                // No waiting for duplicates.
                ip(&format!("address flush dev {end} scope link"));
            }
            ip(&format!("address add fe80::1/64 dev {router} nodad"));
            ip(&format!("address add fe80::2/64 dev {device} nodad"));
        }
        ip("address add 192.0.2.1/24 dev out0");
        ip("route add default via 192.0.2.254 dev out0");
        ensure_forwarding(&sysctls).unwrap();
        assert!(learns("out0", "router").await);
        assert!(
            !learns("inside0", "pod").await,
            "nobody gives this node a way out there"
        );
        // A second pass finds nothing to do.
        let changed = sysctls.changed().unwrap();
        ensure_forwarding(&sysctls).unwrap();
        assert_eq!(sysctls.changed().unwrap(), changed);
    });
}
