//! Bindings of VIPs in the real kernel, each test in a network namespace of its own. What
//! needs dummy devices is in the kernel suite.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

#[path = "support/ip.rs"]
mod program;
mod support;

use std::net::IpAddr;

use self::program::ip;
use self::support::in_namespace;
use ferrule_datapath::Error;
use ferrule_datapath::bindings::{Bindings, Bound};
use ferrule_datapath::news::{News, Watch};
use ferrule_datapath::routes::Routes;
use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::names::IfName;

/// A device `eth0` with an address of each family, up, as is the loopback device.
fn machine() {
    ip("link set lo up");
    ip("link add eth0 type veth peer name peer");
    ip("link set eth0 up");
    ip("link set peer up");
    ip("address add 192.0.2.1/24 dev eth0");
    ip("address add 192.0.2.9/24 dev eth0");
    ip("address add 2001:db8::1/64 dev eth0 nodad");
    ip("address add 2001:db8::9/64 dev eth0 nodad");
    wait_for_route("2001:db8::1");
    wait_for_route("2001:db8::9");
}

/// The kernel makes the local route to an address of IPv6 a moment after the address.
fn wait_for_route(to: &str) {
    let there = || ip(LOCAL[1]).contains(&format!("local {to} "));
    let mut looks = 0..500;
    while !there() && looks.next().is_some() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(there(), "no local route to {to}");
}

fn name(text: &str) -> IfName {
    IfName::try_from(text.to_owned()).unwrap()
}

async fn bindings() -> Bindings {
    Bindings::open(&name("kube-ipvs0"), &VipBinding::Route)
        .await
        .unwrap()
}

fn route(vip: &str, source: Option<&str>) -> Bound {
    let vip: IpAddr = vip.parse().unwrap();
    let source = source.map(|source| source.parse().unwrap());
    (vip, Binding::Route { source })
}

fn alias(vip: &str, device: &str) -> Bound {
    let device = name(device);
    (vip.parse().unwrap(), Binding::Alias { device })
}

fn all_ok(results: &[Result<(), Error>]) -> bool {
    results.iter().all(Result::is_ok)
}

async fn listed(bindings: &Bindings) -> Vec<Bound> {
    bindings.list().await.unwrap().into_iter().collect()
}

const LOCAL: [&str; 2] = ["-4 route show table local", "-6 route show table local"];

/// Source and nothing else of the way to a VIP.
fn source_to(vip: &str) -> String {
    let way = ip(&format!("-o route get {vip}"));
    let mut words = way.split_whitespace();
    words.find(|word| *word == "src").unwrap();
    words.next().unwrap().to_owned()
}

#[test]
fn routes_give_the_nodes_processes_a_source() {
    in_namespace(|| async {
        machine();
        let before = LOCAL.map(ip);
        let bindings = bindings().await;
        assert_eq!(bindings.device_index(), None, "no device was made");
        let all = [
            route("10.96.0.1", Some("192.0.2.9")),
            route("10.96.0.2", None),
            route("fd00:10:96::1", Some("2001:db8::9")),
            route("fd00:10:96::2", None),
        ];
        for _ in 0..2 {
            assert!(all_ok(&bindings.bind(&all).await));
            assert_eq!(listed(&bindings).await, all);
        }
        assert_eq!(source_to("10.96.0.1"), "192.0.2.9");
        assert_eq!(source_to("fd00:10:96::1"), "2001:db8::9");
        // Without a known address the VIP is as good as it was as an address.
        assert_eq!(source_to("10.96.0.2"), "10.96.0.2");
        for _ in 0..2 {
            assert!(all_ok(&bindings.unbind(&all).await));
        }
        assert_eq!(listed(&bindings).await, []);
        assert_eq!(LOCAL.map(ip), before);
    });
}

#[test]
fn another_source_leaves_no_moment_without_a_route() {
    in_namespace(|| async {
        machine();
        let bindings = bindings().await;
        let old = [
            route("10.96.0.1", Some("192.0.2.9")),
            route("fd00:10:96::1", Some("2001:db8::9")),
        ];
        let new = [
            route("10.96.0.1", Some("192.0.2.1")),
            route("fd00:10:96::1", Some("2001:db8::1")),
        ];
        assert!(all_ok(&bindings.bind(&old).await));
        assert!(all_ok(&bindings.bind(&new).await));
        // IPv4 has both, the new one first; in IPv6 it took the other's place.
        let all = [new[0].clone(), old[0].clone(), new[1].clone()];
        assert_eq!(listed(&bindings).await, all);
        assert_eq!(source_to("10.96.0.1"), "192.0.2.1");
        assert_eq!(source_to("fd00:10:96::1"), "2001:db8::1");
        assert!(all_ok(&bindings.unbind(&old[..1]).await));
        assert_eq!(listed(&bindings).await, new);
    });
}

#[test]
fn a_source_that_the_machine_has_not_is_refused() {
    in_namespace(|| async {
        machine();
        let bindings = bindings().await;
        let wanted = [
            route("10.96.0.1", Some("203.0.113.9")),
            route("fd00:10:96::1", Some("2001:db8:9::9")),
            route("10.96.0.2", Some("192.0.2.1")),
        ];
        let results = bindings.bind(&wanted).await;
        assert_eq!(
            results.iter().map(Result::is_ok).collect::<Vec<_>>(),
            [false, false, true]
        );
        assert_eq!(listed(&bindings).await, wanted[2..]);
    });
}

/// A local route or an address that another made for a VIP is neither ours nor touched.
#[test]
fn what_others_made_for_a_vip_stays() {
    in_namespace(|| async {
        machine();
        ip("link add eth1 type veth peer name peer1");
        ip("route add local 10.96.0.1 dev lo table local proto static src 192.0.2.9");
        ip("route add local fd00:10:96::1 dev lo table local proto static");
        ip("route add local 10.96.0.3 dev eth0 table local proto 101");
        ip("address add 10.96.0.2/32 dev eth0");
        ip("address add fd00:10:96::2/128 dev eth0 nodad");
        wait_for_route("fd00:10:96::2");
        let everything = || (LOCAL.map(ip), ip("address show dev eth0"));
        let before = everything();
        let bindings = bindings().await;
        assert_eq!(listed(&bindings).await, []);
        let ours = [
            route("10.96.0.1", Some("192.0.2.1")),
            route("fd00:10:96::1", Some("2001:db8::1")),
            alias("10.96.0.2", "eth1"),
            alias("fd00:10:96::2", "eth1"),
        ];
        assert!(all_ok(&bindings.bind(&ours).await));
        assert!(all_ok(&bindings.unbind(&ours).await));
        // To undo what is not there, but another's is.
        let theirs = [
            route("10.96.0.1", Some("192.0.2.9")),
            route("fd00:10:96::1", None),
            route("10.96.0.3", None),
            alias("10.96.0.2", "eth0"),
            alias("fd00:10:96::2", "eth0"),
        ];
        assert!(all_ok(&bindings.unbind(&theirs).await));
        assert_eq!(everything(), before);
    });
}

#[test]
fn aliases_are_told_from_addresses_and_are_nobodys_source() {
    in_namespace(|| async {
        machine();
        let bindings = bindings().await;
        let before = ip("address show dev eth0");
        let machine_before = Routes::open().unwrap().addresses().await.unwrap();
        let all = [alias("10.96.0.1", "eth0"), alias("fd00:10:96::1", "eth0")];
        for _ in 0..2 {
            assert!(all_ok(&bindings.bind(&all).await));
            assert_eq!(listed(&bindings).await, all);
        }
        // They are no addresses of the node by which others know it.
        let machine_after = Routes::open().unwrap().addresses().await.unwrap();
        assert_eq!(machine_after, machine_before);
        // Whatever leaves, also where no address of the link is any better, has another source.
        ip("route add 198.51.100.1/32 dev eth0 scope link");
        ip("route add 198.51.100.2/32 via 192.0.2.2");
        ip("-6 route add 2001:db8:9::/64 dev eth0");
        for (to, source) in [
            ("198.51.100.1", "192.0.2.1"),
            ("198.51.100.2", "192.0.2.1"),
            ("192.0.2.7", "192.0.2.1"),
        ] {
            assert_eq!(source_to(to), source, "{to}");
        }
        assert!(source_to("2001:db8:9::7").starts_with("2001:db8::"));
        // The nearest by prefix, were it not deprecated.
        ip("-6 route add fd00:10:96:1::/64 dev eth0");
        assert!(source_to("fd00:10:96:1::7").starts_with("2001:db8::"));
        assert!(
            !ip("-6 route show").contains("fd00:10:96::1"),
            "no route of its own"
        );
        for _ in 0..2 {
            assert!(all_ok(&bindings.unbind(&all).await));
        }
        assert_eq!(listed(&bindings).await, []);
        assert_eq!(ip("address show dev eth0"), before);
    });
}

#[test]
fn a_device_that_is_not_there_is_named() {
    in_namespace(|| async {
        machine();
        let bindings = bindings().await;
        let wanted = [
            alias("10.96.0.1", "eth7"),
            alias("10.96.0.2", "eth0"),
            route("10.96.0.3", None),
        ];
        let results = bindings.bind(&wanted).await;
        assert!(
            results[0]
                .as_ref()
                .unwrap_err()
                .to_string()
                .contains("eth7")
        );
        assert!(all_ok(&results[1..]));
        assert_eq!(listed(&bindings).await, wanted[1..]);
    });
}

/// News of what binds VIPs name it, so that what another undid is noticed.
#[test]
fn news_of_bindings_name_them() {
    in_namespace(|| async {
        machine();
        let bindings = bindings().await;
        let mut watch = Watch::open().unwrap();
        let all = [
            route("10.96.0.1", Some("192.0.2.1")),
            route("fd00:10:96::1", Some("2001:db8::1")),
            alias("10.96.0.2", "eth0"),
            alias("fd00:10:96::2", "eth0"),
        ];
        assert!(all_ok(&bindings.bind(&all).await));
        ip("route del local 10.96.0.1 dev lo table local");
        ip("-6 route del local fd00:10:96::1 dev lo table local");
        ip("address del 10.96.0.2/32 dev eth0");
        ip("address del fd00:10:96::2/128 dev eth0");
        ip("route add local 10.96.0.9 dev lo table local proto static");
        ip("link add last type veth peer name last1");
        let mut heard = Vec::new();
        loop {
            let news = watch.next().await.unwrap();
            let last =
                |news: &News| matches!(news, News::Link { name: Some(name), .. } if name == "last");
            let over = news.iter().any(last);
            heard.extend(news);
            if over {
                break;
            }
        }
        let theirs: IpAddr = "10.96.0.9".parse().unwrap();
        assert!(
            !heard
                .iter()
                .any(|news| matches!(news, News::VipRoute { ip, .. } if *ip == theirs)),
            "{heard:?}"
        );
        for wanted in [true, false] {
            for (vip, _) in &all[..2] {
                assert!(
                    heard.iter().any(|news| matches!(
                        news, News::VipRoute { ip, present, .. } if ip == vip && *present == wanted
                    )),
                    "{vip} {wanted} {heard:?}"
                );
            }
            for (vip, _) in &all[2..] {
                assert!(
                    heard.iter().any(|news| matches!(
                        news, News::Address { ip: Some(ip), present, alias: true, .. }
                            if ip == vip && *present == wanted
                    )),
                    "{vip} {wanted} {heard:?}"
                );
            }
        }
    });
}
