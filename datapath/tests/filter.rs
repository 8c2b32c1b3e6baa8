//! The guard's table in the real kernel, each test in a network namespace of its own.
//!
//! What the rules do to packets is told by the kernel suite (`tests/`), for that needs IPVS.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

mod support;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::process::Command;

use ferrule_datapath::filter::{
    Element, Elements, RulesetError, Strange, TableState, counters, generation, load, load_anew,
    remove, table,
};
use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::network::{Networks, Policy};
use ferrule_model::source_nat::{OwnAddress, SourceNat};
use ferrule_netlink::{Protocol as Netlink, Socket};
use serde_json::Value;

use self::support::in_namespace;

const TABLE: &str = "guard-test";

fn program() -> &'static Path {
    Path::new("nft")
}

fn nft(arguments: &[&str]) -> String {
    let output = Command::new("nft").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Keys of a set, as the program reads them.
fn keys(set: &str) -> BTreeSet<String> {
    let text = nft(&["-j", "-n", "list", "set", "inet", TABLE, set]);
    let value: Value = serde_json::from_str(&text).unwrap();
    let set = &value["nftables"][1]["set"];
    let elements = set["elem"].as_array().cloned().unwrap_or_default();
    elements.iter().map(Value::to_string).collect()
}

fn frontend(ip: &str, port: u16, protocol: Protocol) -> Element {
    Element::Frontend(FrontendAddr::new(ip.parse().unwrap(), port, protocol))
}

fn vip(ip: &str) -> Element {
    Element::Vip(ip.parse().unwrap())
}

fn texts<const N: usize>(texts: [&str; N]) -> BTreeSet<String> {
    texts.map(str::to_owned).into()
}

#[test]
fn elements_are_what_the_program_reads() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let all = [
            vip("10.96.0.10"),
            vip("fd00:96::a"),
            frontend("10.96.0.10", 53, Protocol::Udp),
            frontend("10.96.0.10", 53, Protocol::Tcp),
            frontend("fd00:96::a", 443, Protocol::Sctp),
        ];
        assert!(elements.add(&all).await.iter().all(Result::is_ok));
        assert_eq!(keys("vips4"), texts([r#""10.96.0.10""#]));
        assert_eq!(keys("vips6"), texts([r#""fd00:96::a""#]));
        assert_eq!(
            keys("frontends4"),
            texts([
                r#"{"concat":["10.96.0.10",17,53]}"#,
                r#"{"concat":["10.96.0.10",6,53]}"#
            ])
        );
        assert_eq!(
            keys("frontends6"),
            texts([r#"{"concat":["fd00:96::a",132,443]}"#])
        );
        let listed: BTreeSet<Element> = elements.list().await.unwrap().into_iter().collect();
        assert_eq!(listed, BTreeSet::from(all));
        // To add what is there and to remove what is gone counts as done.
        assert!(elements.add(&all).await.iter().all(Result::is_ok));
        assert!(elements.remove(&all[..2]).await.iter().all(Result::is_ok));
        assert!(elements.remove(&all).await.iter().all(Result::is_ok));
        assert_eq!(elements.list().await.unwrap(), vec![]);
    });
}

#[test]
fn a_second_load_keeps_elements_and_puts_rules_right() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let before = [vip("10.96.0.10"), frontend("10.96.0.10", 80, Protocol::Tcp)];
        assert!(elements.add(&before).await.iter().all(Result::is_ok));
        let rules = || nft(&["-s", "list", "table", "inet", TABLE]);
        let good = rules();
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert_eq!(rules(), good);
        nft(&["flush", "chain", "inet", TABLE, "guard-local"]);
        nft(&["insert", "rule", "inet", TABLE, "guard-remote", "accept"]);
        assert_ne!(rules(), good);
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert_eq!(rules(), good);
    });
}

/// Who does not know yet whose source to replace leaves the rules as they are, and
/// puts the guard right all the same.
#[test]
fn rules_of_source_nat_can_be_kept() {
    in_namespace(|| async {
        let own = [OwnAddress {
            ip: "192.0.2.1".parse().unwrap(),
            link: "192.0.2.0/24".parse().unwrap(),
            device: "eth0".to_owned(),
        }];
        let nat = SourceNat::new(&Policy::default(), Networks::default(), &own, None);
        load(program(), TABLE, Some(&nat), &[]).await.unwrap();
        let good = state().await.unwrap();
        nft(&[&format!("flush chain inet {TABLE} guard-remote")]);
        assert_ne!(state().await.unwrap(), good);
        load(program(), TABLE, None, &[]).await.unwrap();
        assert_eq!(state().await.unwrap(), good);
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert_ne!(state().await.unwrap(), good);
    });
}

/// Elements that the kernel takes and we never make: they are seen, hide none of
/// ours, and can be removed.
#[test]
fn strange_elements_are_told_apart_and_removed() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let ours = [
            vip("10.96.0.10"),
            frontend("10.96.0.10", 80, Protocol::Tcp),
            Element::Hairpin("10.244.1.2".parse().unwrap()),
        ];
        assert!(elements.add(&ours).await.iter().all(Result::is_ok));
        for (set, element) in [
            ("vips4", "*"),
            ("vips6", "*"),
            ("frontends4", "10.96.0.10 . icmp . 80"),
            ("external6", "fd00::1 . esp . 80"),
            ("hairpins4", "10.244.1.2 . 10.244.1.3"),
        ] {
            nft(&[&format!("add element inet {TABLE} {set} {{ {element} }}")]);
        }
        let (found, strange) = elements.list_all().await.unwrap();
        assert_eq!(BTreeSet::from_iter(found), BTreeSet::from(ours));
        let sets: Vec<&str> = strange.iter().map(Strange::set).collect();
        assert_eq!(
            sets,
            ["vips4", "vips6", "frontends4", "external6", "hairpins4"]
        );
        elements.remove_strange(&strange).await.unwrap();
        elements.remove_strange(&strange).await.unwrap();
        let (found, strange) = elements.list_all().await.unwrap();
        assert_eq!(BTreeSet::from_iter(found), BTreeSet::from(ours));
        assert_eq!(strange, []);
    });
}

/// What cannot be put right in its place: the table is made anew with its elements.
#[test]
fn a_table_beyond_repair_is_made_anew() {
    in_namespace(|| async {
        for damage in [
            "flush chain inet guard-test guard-remote; delete chain inet guard-test guard-remote; \
             add chain inet guard-test guard-remote",
            "add chain inet guard-test their.chain",
            "add chain inet guard-test theirs; \
             add map inet guard-test m { type ipv4_addr : verdict; }; \
             add element inet guard-test m { 192.0.2.1 : jump theirs }",
        ] {
            let nat = SourceNat::default();
            load(program(), TABLE, Some(&nat), &[]).await.unwrap();
            let elements = Elements::open(TABLE).unwrap();
            let ours = [
                vip("10.96.0.10"),
                vip("fd00:96::a"),
                frontend("fd00:96::a", 443, Protocol::Sctp),
                frontend("10.96.0.10", 80, Protocol::Tcp),
                Element::External(FrontendAddr::new(
                    "192.0.2.1".parse().unwrap(),
                    30_080,
                    Protocol::Udp,
                )),
                Element::Preserved(FrontendAddr::new(
                    "2001:db8::1".parse().unwrap(),
                    8080,
                    Protocol::Tcp,
                )),
                Element::Hairpin("10.244.1.2".parse().unwrap()),
            ];
            assert!(elements.add(&ours).await.iter().all(Result::is_ok));
            let good = state().await.unwrap();
            nft(&[damage]);
            let damaged = state().await.unwrap();
            assert_ne!(damaged.fingerprint, good.fingerprint, "{damage}");
            let refused = load(program(), TABLE, Some(&nat), &damaged.chains).await;
            assert!(refused.is_err(), "{damage}: needs no new table");
            let listed = elements.list().await.unwrap();
            load_anew(program(), TABLE, &nat, &listed).await.unwrap();
            assert_eq!(state().await.unwrap(), good, "{damage}");
            let listed = elements.list().await.unwrap();
            assert_eq!(BTreeSet::from_iter(listed), BTreeSet::from(ours));
        }
    });
}

async fn state() -> Option<TableState> {
    let socket = Socket::open(Netlink::Netfilter).unwrap();
    table(&socket, TABLE).await.unwrap()
}

/// A device may have nearly any name; what the program would misread is left out.
#[test]
fn names_of_devices_are_read_as_they_are() {
    in_namespace(|| async {
        let own = ["a\"b", "x*", "a\\b", "eth0", "q{;"].map(|device| OwnAddress {
            ip: "192.0.2.1".parse().unwrap(),
            link: "192.0.2.0/24".parse().unwrap(),
            device: device.to_owned(),
        });
        let nat = SourceNat::new(&Policy::default(), Networks::default(), &own, None);
        load(program(), TABLE, Some(&nat), &[]).await.unwrap();
        let rules = nft(&["list", "chain", "inet", TABLE, "replace-source"]);
        // The kernel lists a set in its own order.
        for said in [
            r#"oifname { "eth0", "q{;" }"#,
            r#"oifname { "q{;", "eth0" }"#,
        ] {
            if rules.contains(said) {
                return;
            }
        }
        panic!("{rules}");
    });
}

#[test]
fn only_our_table_goes() {
    in_namespace(|| async {
        nft(&[
            "add table inet foreign { set vips4 { type ipv4_addr; elements = { 10.96.0.10 }; }; }",
        ]);
        let foreign = nft(&["list", "ruleset"]);
        let elements = Elements::open(TABLE).unwrap();
        assert!(elements.list().await.unwrap_err().is_not_found());
        let results = elements.add(&[vip("10.96.0.10")]).await;
        assert!(results[0].as_ref().unwrap_err().is_not_found());
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert!(elements.add(&[vip("10.96.0.11")]).await[0].is_ok());
        remove(program(), TABLE).await.unwrap();
        assert_eq!(nft(&["list", "ruleset"]), foreign);
        // What is gone may be removed again.
        remove(program(), TABLE).await.unwrap();
        assert_eq!(nft(&["list", "ruleset"]), foreign);
    });
}

/// More than fit into one datagram where send buffers have their usual size.
#[test]
fn as_many_as_a_large_cluster_has() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let all: Vec<Element> = (0..30_000_u16)
            .map(|number| {
                let ip = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number);
                Element::Frontend(FrontendAddr::new(IpAddr::V6(ip), 80, Protocol::Tcp))
            })
            .collect();
        let results = elements.add(&all).await;
        assert_eq!(results.len(), all.len());
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(elements.list().await.unwrap().len(), all.len());
        // Some are gone already, somewhere in the middle.
        assert!(
            elements
                .remove(&all[5000..5003])
                .await
                .iter()
                .all(Result::is_ok)
        );
        let results = elements.remove(&all[4000..]).await;
        assert_eq!(results.len(), all.len() - 4000);
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(elements.list().await.unwrap().len(), 4000);
    });
}

#[test]
fn a_name_says_no_more_than_a_name() {
    in_namespace(|| async {
        let long = "a".repeat(256);
        for name in ["", "a b", "a; flush ruleset", "1a", "a\n", "{", &long] {
            let nat = SourceNat::default();
            for result in [
                load(program(), name, Some(&nat), &[]).await,
                remove(program(), name).await,
            ] {
                let error = result.unwrap_err();
                assert!(matches!(error, RulesetError::Name(_)), "{name:?}: {error}");
            }
        }
        // A word of the language is no name: the program says so.
        let error = load(program(), "ip6", Some(&SourceNat::default()), &[])
            .await
            .unwrap_err();
        assert!(matches!(error, RulesetError::Refused { .. }), "{error}");
        let error = load(
            Path::new("/no/such/program"),
            TABLE,
            Some(&SourceNat::default()),
            &[],
        )
        .await
        .unwrap_err();
        assert!(error.to_string().contains("install nftables"), "{error}");
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}

async fn seen(socket: &Socket) -> TableState {
    table(socket, TABLE).await.unwrap().expect("the table")
}

#[test]
fn the_fingerprint_stays_while_nobody_meddles() {
    in_namespace(|| async {
        let socket = Socket::open(Netlink::Netfilter).unwrap();
        assert_eq!(table(&socket, TABLE).await.unwrap(), None);
        let empty = generation(&socket).await.unwrap();
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let loaded = generation(&socket).await.unwrap();
        assert_ne!(loaded, empty);
        let good = seen(&socket).await;
        assert_eq!(
            good.chains,
            [
                "guard-local",
                "guard-remote",
                "replace-source",
                "source-nat",
                "vip-without-service"
            ]
        );
        assert_eq!(seen(&socket).await, good);
        assert_eq!(generation(&socket).await.unwrap(), loaded);
        // Loaded again, more than once: rules get other handles.
        for _ in 0..3 {
            load(program(), TABLE, Some(&SourceNat::default()), &[])
                .await
                .unwrap();
            assert_eq!(seen(&socket).await, good);
        }
        assert_ne!(generation(&socket).await.unwrap(), loaded);
        // Elements of the named sets are no part of it.
        let elements = Elements::open(TABLE).unwrap();
        let vips = [vip("10.96.0.10"), vip("fd00:96::a")];
        assert!(elements.add(&vips).await.iter().all(Result::is_ok));
        assert_eq!(seen(&socket).await, good);
        // Nor is what others have, be its names the same.
        nft(&["add table ip guard-test { chain guard-local { accept; }; set x { type mark; }; }"]);
        nft(&["add table inet other { chain guard-local { accept; }; set x { type mark; }; }"]);
        assert_eq!(seen(&socket).await, good);
        // Removed, with the others there, and loaded into the void.
        remove(program(), TABLE).await.unwrap();
        assert_eq!(table(&socket, TABLE).await.unwrap(), None);
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert_eq!(seen(&socket).await, good);
        // The first anonymous set is another's, so that ours gets another name, and keeps it.
        let sets = || nft(&["--debug=netlink", "list", "table", "inet", TABLE]);
        assert!(sets().contains("__set0"));
        remove(program(), TABLE).await.unwrap();
        nft(&["add table inet guard-test { chain foreign { tcp dport { 1, 2 } accept; }; }"]);
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        assert_ne!(seen(&socket).await, good);
        nft(&["flush chain inet guard-test foreign; delete chain inet guard-test foreign"]);
        assert!(sets().contains("__set1") && !sets().contains("__set0"));
        assert_eq!(seen(&socket).await, good);
    });
}

#[test]
fn the_fingerprint_tells_every_change() {
    const CHANGES: [&str; 12] = [
        "add rule inet guard-test guard-remote accept",
        "insert rule inet guard-test guard-remote accept",
        "insert rule inet guard-test guard-remote meta l4proto { tcp, udp } accept",
        "insert rule inet guard-test guard-remote meta l4proto { tcp, sctp } accept",
        "insert rule inet guard-test guard-remote meta l4proto vmap { tcp : accept, udp : drop }",
        "insert rule inet guard-test guard-remote meta l4proto vmap { tcp : drop, udp : accept }",
        "flush chain inet guard-test guard-local",
        "add chain inet guard-test foreign",
        "add set inet guard-test foreign { type mark; }",
        "add chain inet guard-test guard-local { policy drop; }",
        "add table inet guard-test { flags dormant; }",
        "add counter inet guard-test foreign; \
         add rule inet guard-test guard-local counter name foreign",
    ];
    in_namespace(|| async {
        let socket = Socket::open(Netlink::Netfilter).unwrap();
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let good = seen(&socket).await;
        let mut all = BTreeSet::from([good.fingerprint]);
        for change in CHANGES {
            nft(&[change]);
            let changed = seen(&socket).await;
            assert!(all.insert(changed.fingerprint), "{change}");
            let foreign = changed.chains.iter().any(|chain| chain == "foreign");
            assert_eq!(foreign, change.contains("chain inet guard-test foreign"));
            remove(program(), TABLE).await.unwrap();
            load(program(), TABLE, Some(&SourceNat::default()), &[])
                .await
                .unwrap();
            assert_eq!(seen(&socket).await, good, "after {change}");
        }
        // The same rules in another order.
        let rules = ["tcp dport 1 accept", "tcp dport 2 accept"];
        for order in [[0, 1], [1, 0]] {
            nft(&["flush", "chain", "inet", TABLE, "guard-local"]);
            for rule in order {
                nft(&["add", "rule", "inet", TABLE, "guard-local", rules[rule]]);
            }
            assert!(all.insert(seen(&socket).await.fingerprint), "{order:?}");
        }
    });
}

/// Sends datagrams to the loopback device, which is set up for that.
fn send_datagrams(count: usize) {
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.unwrap().success());
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..count {
        socket.send_to(&[0; 12], "127.0.0.1:9").unwrap();
    }
}

#[test]
fn counters_count_and_leave_the_fingerprint() {
    in_namespace(|| async {
        let socket = Socket::open(Netlink::Netfilter).unwrap();
        assert!(counters(&socket, TABLE).await.unwrap().is_empty());
        nft(&[concat!(
            "add table inet guard-test { ",
            "counter seen { }; counter unused { packets 3 bytes 4 }; quota cap { over 1 mbytes }; ",
            "chain in { type filter hook input priority 0; ",
            "udp dport 9 counter name seen; udp dport { 9, 10 } counter; }; }"
        )]);
        nft(&["add table inet other { counter seen { packets 8 bytes 9 }; }"]);
        nft(&["add table ip guard-test { counter third { packets 8 bytes 9 }; }"]);
        let before = seen(&socket).await;
        send_datagrams(5);
        let counted = counters(&socket, TABLE).await.unwrap();
        let counted: Vec<_> = counted.iter().map(|(n, c)| (n.as_str(), *c)).collect();
        // 12 bytes with the headers of UDP and IPv4.
        assert_eq!(counted, [("seen", (5, 5 * 40)), ("unused", (3, 4))]);
        assert_eq!(seen(&socket).await, before);
    });
}

#[test]
fn source_nat_of_every_kind_loads_and_foreign_chains_go() {
    in_namespace(|| async {
        let networks = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
        let mut nat = SourceNat::new(
            &Policy::default(),
            Networks {
                // One within another, as a configured network and a Node's may be.
                pods: networks(&["10.244.0.0/16", "10.244.1.0/24", "fd00:10:244::/48"]),
                node_pods: networks(&["10.244.1.0/24", "fd00:10:244:1::/64"]),
                non_masquerade: networks(&["10.244.0.0/16", "169.254.0.0/16", "fe80::/10"]),
                services: networks(&["10.96.0.0/12"]),
            },
            &[
                ("192.0.2.1", "192.0.2.0/24"),
                ("2001:db8::1", "2001:db8::/64"),
            ]
            .map(|(ip, link)| OwnAddress {
                ip: ip.parse().unwrap(),
                link: link.parse().unwrap(),
                device: "uplink".to_owned(),
            }),
            None,
        );
        for all in [false, true] {
            nat.masquerade_all = all;
            load(program(), TABLE, Some(&nat), &[]).await.unwrap();
            let text = nft(&["list", "chain", "inet", TABLE, "source-nat"]);
            assert_eq!(
                text.contains("counter name \"masqueradeAll\""),
                all,
                "{text}"
            );
        }
        let socket = Socket::open(Netlink::Netfilter).unwrap();
        let good = table(&socket, TABLE).await.unwrap().unwrap();
        nft(&["add", "chain", "inet", TABLE, "theirs"]);
        nft(&["add", "chain", "inet", TABLE, "theirs-too"]);
        nft(&["add", "rule", "inet", TABLE, "theirs", "jump", "theirs-too"]);
        nft(&["add", "rule", "inet", TABLE, "source-nat", "accept"]);
        let bad = table(&socket, TABLE).await.unwrap().unwrap();
        assert_ne!(bad.fingerprint, good.fingerprint);
        load(program(), TABLE, Some(&nat), &bad.chains)
            .await
            .unwrap();
        assert_eq!(table(&socket, TABLE).await.unwrap(), Some(good));
    });
}
