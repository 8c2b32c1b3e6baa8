//! Routes and addresses in the real kernel, each test in a network namespace of its own.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

#[path = "support/ip.rs"]
mod program;
mod support;

use std::collections::BTreeSet;
use std::net::IpAddr;

use self::program::ip;
use self::support::in_namespace;
use ferrule_datapath::Error;
use ferrule_datapath::news::{News, Watch};
use ferrule_datapath::routes::{NodeRoute, RouteTable, Routes};

/// A device `eth0` with 192.0.2.1/24 and `2001:db8::1/64`, up, and its other end `peer`.
fn machine() {
    ip("link add eth0 type veth peer name peer");
    ip("link set eth0 up");
    ip("link set peer up");
    ip("address add 192.0.2.1/24 dev eth0");
    ip("address add 2001:db8::1/64 dev eth0 nodad");
}

fn to(destination: &str, gateway: &str) -> NodeRoute {
    NodeRoute {
        destination: destination.parse().unwrap(),
        gateway: gateway.parse().unwrap(),
    }
}

fn all_ok(results: &[Result<(), Error>]) -> bool {
    results.iter().all(Result::is_ok)
}

#[test]
fn routes_come_and_go_in_both_families() {
    in_namespace(|| async {
        let routes = Routes::open().unwrap();
        assert_eq!(routes.list().await.unwrap(), RouteTable::default());
        machine();
        let all = [
            to("10.1.2.0/24", "192.0.2.2"),
            to("10.1.3.0/24", "192.0.2.3"),
            to("10.1.4.0/24", "2001:db8::4"),
            to("fd00:1:2::/64", "2001:db8::2"),
            to("fd00:1:3::/64", "2001:db8::2"),
        ];
        assert!(all_ok(&routes.add(&all).await));
        let listed = routes.list().await.unwrap();
        assert_eq!(listed.ours, BTreeSet::from(all));
        let text = ip("-4 route show 10.1.2.0/24");
        assert!(
            text.starts_with("10.1.2.0/24 via 192.0.2.2 dev eth0 proto 101"),
            "{text}"
        );
        let text = ip("-6 route show fd00:1:3::/64");
        assert!(
            text.starts_with("fd00:1:3::/64 via 2001:db8::2 dev eth0 proto 101"),
            "{text}"
        );
        // To add what is there counts as done, whatever the bits behind the prefix.
        assert!(all_ok(&routes.add(&all).await));
        let same = [
            to("10.1.2.9/24", "192.0.2.2"),
            to("fd00:1:2::9/64", "2001:db8::2"),
        ];
        assert!(all_ok(&routes.add(&same).await));
        assert_eq!(routes.list().await.unwrap(), listed);
        // Not by another way: neither added beside nor removed in its place.
        let elsewhere = [
            to("10.1.2.0/24", "192.0.2.9"),
            to("fd00:1:2::/64", "2001:db8::9"),
        ];
        for result in routes.add(&elsewhere).await {
            assert!(result.unwrap_err().already_exists());
        }
        assert!(all_ok(&routes.remove(&elsewhere).await));
        assert_eq!(routes.list().await.unwrap(), listed);
        // One without a way to its gateway does not keep the others.
        let mixed = [
            to("10.1.5.0/24", "198.51.100.1"),
            to("10.1.6.0/24", "192.0.2.6"),
        ];
        let results = routes.add(&mixed).await;
        assert!(results[0].is_err() && results[1].is_ok(), "{results:?}");
        assert!(all_ok(&routes.remove(&mixed).await));
        // To remove what is gone counts as done.
        assert!(all_ok(&routes.remove(&all[..2]).await));
        assert!(all_ok(&routes.remove(&all).await));
        let left = routes.list().await.unwrap();
        assert!(left.ours.is_empty());
        assert_eq!(left.foreign, listed.foreign);
    });
}

#[test]
fn what_others_route_is_told_and_stays() {
    in_namespace(|| async {
        let routes = Routes::open().unwrap();
        machine();
        ip("route add default via 192.0.2.254");
        ip("route add 10.1.2.0/24 via 192.0.2.9 proto bgp");
        ip("route add fd00:1:2::/64 via 2001:db8::9 proto bgp");
        ip("route add 10.1.3.0/24 via 192.0.2.9 proto static metric 100");
        ip("route add fd00:1:3::/64 via 2001:db8::9 proto static metric 100");
        ip("route add 10.1.3.0/24 via 192.0.2.8 proto dhcp metric 200");
        ip("route add 10.1.4.0/24 proto 188 nexthop via 192.0.2.7 nexthop via 192.0.2.8");
        ip("route add fd00:1:4::/64 proto 188 nexthop via 2001:db8::7 nexthop via 2001:db8::8");
        // None of these: another table, another type, a pod of this node.
        ip("route add 10.1.5.0/24 via 192.0.2.9 table 77");
        ip("route add blackhole 10.1.6.0/24");
        ip("route add 10.1.7.7/32 dev eth0 proto 101");
        ip("route add fd00:1:7::7/128 dev eth0 proto 101");
        let foreign = routes.list().await.unwrap();
        assert_eq!(foreign.ours, BTreeSet::new());
        let mut words: Vec<String> = foreign
            .foreign
            .iter()
            .filter(|(prefix, _)| !prefix.to_string().starts_with("fe80"))
            .map(|(prefix, words)| format!("{prefix} {words}"))
            .collect();
        words.sort();
        assert_eq!(
            words,
            [
                "10.1.2.0/24 proto 186 via 192.0.2.9 dev eth0",
                "10.1.3.0/24 proto static via 192.0.2.9 dev eth0; proto dhcp via 192.0.2.8 dev eth0",
                "10.1.4.0/24 proto 188 via 192.0.2.7 dev eth0 via 192.0.2.8 dev eth0",
                "192.0.2.0/24 proto kernel dev eth0",
                "2001:db8::/64 proto kernel dev eth0",
                "fd00:1:2::/64 proto 186 via 2001:db8::9 dev eth0",
                "fd00:1:3::/64 proto static via 2001:db8::9 dev eth0",
                "fd00:1:4::/64 proto 188 via 2001:db8::7 dev eth0 via 2001:db8::8 dev eth0",
            ]
        );
        // Another's route in the same place, even by the same way, is no success of ours.
        let taken = [
            to("10.1.2.0/24", "192.0.2.9"),
            to("fd00:1:2::/64", "2001:db8::9"),
        ];
        for result in routes.add(&taken).await {
            assert!(result.unwrap_err().already_exists());
        }
        // With another metric both stand side by side.
        let beside = [
            to("10.1.3.0/24", "192.0.2.9"),
            to("fd00:1:3::/64", "2001:db8::9"),
        ];
        assert!(all_ok(&routes.add(&beside).await));
        assert_eq!(routes.list().await.unwrap().ours, BTreeSet::from(beside));
        assert!(all_ok(&routes.remove(&beside).await));
        // Ours are gone: a second time finds only what is another's.
        assert!(all_ok(&routes.remove(&beside).await));
        assert!(all_ok(&routes.remove(&taken).await));
        let hops = [
            to("10.1.4.0/24", "192.0.2.7"),
            to("fd00:1:4::/64", "2001:db8::7"),
        ];
        assert!(all_ok(&routes.remove(&hops).await));
        assert_eq!(routes.list().await.unwrap(), foreign);
        assert!(ip("route show 10.1.7.7/32").contains("proto 101"));
    });
}

#[test]
fn addresses_are_those_by_which_others_reach_the_machine() {
    in_namespace(|| async {
        let routes = Routes::open().unwrap();
        machine();
        ip("link set lo up");
        ip("address add 198.51.100.7/32 dev lo");
        ip("address add 192.0.2.0/32 dev eth0");
        ip("address add 10.0.0.1 peer 10.0.0.2/32 dev eth0");
        ip("address add 169.254.1.1/16 dev eth0");
        ip("address add 10.9.9.9/32 dev eth0 scope host");
        ip("address add 203.0.113.5/28 dev peer");
        ip("address add 2001:db8:5::1 peer 2001:db8:5::2/128 dev peer nodad");
        let addresses = routes.addresses().await.unwrap();
        let texts: Vec<String> = addresses
            .iter()
            .map(|a| format!("{}/{} {}", a.ip, a.prefix, a.device))
            .collect();
        // The other end of a veth pair is made first.
        assert_eq!(
            texts,
            [
                "198.51.100.7/32 lo",
                "203.0.113.5/28 peer",
                "2001:db8:5::1/128 peer",
                "10.0.0.1/32 eth0",
                "192.0.2.0/32 eth0",
                "192.0.2.1/24 eth0",
                "2001:db8::1/64 eth0",
            ]
        );
        assert!(addresses[1].index < addresses[3].index);
        let index = ip("-o link show eth0");
        assert!(
            index.starts_with(&format!("{}:", addresses[3].index)),
            "{index}"
        );
    });
}

/// The kernel asks whether another machine has the address, and one has.
#[test]
fn an_address_that_another_has_is_none_of_the_machine() {
    in_namespace(|| async {
        let routes = Routes::open().unwrap();
        ip("link add eth0 type veth peer name peer");
        ip("link set peer up");
        ip("link set eth0 up");
        ip("address add 2001:db8::7/64 dev peer nodad");
        ip("address add 2001:db8::7/64 dev eth0");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !ip("-6 address show dev eth0").contains("dadfailed") {
            assert!(std::time::Instant::now() < deadline, "nobody objected");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let addresses = routes.addresses().await.unwrap();
        let devices: Vec<_> = addresses.iter().map(|a| a.device.as_str()).collect();
        assert_eq!(devices, ["peer"]);
    });
}

#[test]
fn a_gateway_changes_in_place() {
    in_namespace(|| async {
        let routes = Routes::open().unwrap();
        machine();
        let before = [
            to("10.1.2.0/24", "192.0.2.2"),
            to("fd00:1:2::/64", "2001:db8::2"),
        ];
        let after = [
            to("10.1.2.0/24", "192.0.2.9"),
            to("fd00:1:2::/64", "2001:db8::9"),
        ];
        assert!(all_ok(&routes.add(&before).await));
        assert!(all_ok(&routes.replace(&after).await));
        assert_eq!(routes.list().await.unwrap().ours, BTreeSet::from(after));
    });
}

/// Hears of a link, its addresses and routes, and tells our routes from others'.
#[test]
fn what_happens_is_heard() {
    in_namespace(|| async {
        let mut watch = Watch::open().unwrap();
        machine();
        let routes = Routes::open().unwrap();
        let ours = [
            to("10.1.2.0/24", "192.0.2.2"),
            to("fd00:1:2::/64", "2001:db8::2"),
        ];
        assert!(all_ok(&routes.add(&ours).await));
        assert!(all_ok(&routes.remove(&ours[..1]).await));
        ip("route add 10.9.0.0/16 via 192.0.2.5");
        ip("route add default via 192.0.2.5");
        ip("link delete eth0");
        let mut heard = Vec::new();
        let over = |news: &News| matches!(news, News::Link { name: Some(name), gone: true, .. } if name == "eth0");
        while !heard.iter().any(over) {
            let more = tokio::time::timeout(std::time::Duration::from_secs(10), watch.next());
            heard.extend(more.await.expect("news").unwrap());
        }
        let route = |destination: &str, ours, present| News::Route {
            destination: destination.parse().unwrap(),
            ours,
            present,
        };
        for expected in [
            route("10.1.2.0/24", Some(ours[0]), true),
            route("10.1.2.0/24", Some(ours[0]), false),
            route("fd00:1:2::/64", Some(ours[1]), true),
            route("10.9.0.0/16", None, true),
        ] {
            assert!(heard.contains(&expected), "{expected:?} in {heard:#?}");
        }
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        assert!(heard.iter().any(|news| matches!(
            news,
            News::Address { ip: Some(ip), present: true, .. } if *ip == address
        )));
        let default = |news: &&News| matches!(news, News::Route { destination, .. } if destination.prefix() == 0);
        assert_eq!(heard.iter().find(default), None);
    });
}
