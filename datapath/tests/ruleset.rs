//! Rules of the guard and of source NAT in the real kernel, and what tells that somebody
//! changed them, each test in a network namespace of its own.
//!
//! What the rules do to packets is told by the kernel suite (`tests/`), for that needs IPVS.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

#[path = "support/nft.rs"]
mod program;
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use ferrule_datapath::filter::{
    Element, Elements, RulesetError, TableState, counters, generation, load, remove, table,
};
use ferrule_model::network::{DetectLocal, Networks, Policy};
use ferrule_model::source_nat::{OwnAddress, SourceNat};
use ferrule_netlink::{Protocol as Netlink, Socket};
use ipnetwork::IpNetwork;

use self::program::{TABLE, nft, program, state};
use self::support::in_namespace;

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

fn network(text: &str) -> IpNetwork {
    text.parse().unwrap()
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

/// Each way to tell clients within the cluster, with and without networks of a family.
#[test]
fn clients_from_beyond_the_cluster_are_told_in_every_way() {
    in_namespace(|| async {
        let cases = [
            (
                DetectLocal::ClusterCidr,
                "ip saddr != 10.244.0.0/16 fib saddr type != local",
                None,
            ),
            (
                DetectLocal::NodeCidr,
                "ip saddr != 10.244.1.0/24 fib saddr type != local",
                None,
            ),
            (
                DetectLocal::BridgeInterface("cni0".to_owned()),
                r#"iifname != "cni0" ip daddr @vips4 ct state new meta mark set 0xfd000000"#,
                Some(r#"iifname "cni0" meta mark set ip daddr"#),
            ),
            (
                DetectLocal::InterfaceNamePrefix("cali".to_owned()),
                r#"iifname != "cali*" ip6 daddr @vips6 ct state new meta mark set 0xfd000000"#,
                Some(r#"iifname "cali*" meta mark set ip6 daddr"#),
            ),
        ];
        for (detect_local, expected, within) in cases {
            let policy = Policy {
                cluster_cidrs: vec![network("10.244.0.0/16")],
                detect_local: Some(detect_local),
                ..Policy::default()
            };
            let networks = Networks {
                pods: [network("10.244.0.0/16")].into(),
                node_pods: [network("10.244.1.0/24")].into(),
                services: [network("10.96.0.0/12"), network("fd00:96::/112")].into(),
                ..Networks::default()
            };
            let nat = SourceNat::new(&policy, networks, &[], None);
            load(program(), TABLE, Some(&nat), &[]).await.unwrap();
            let rules = nft(&["list", "table", "inet", TABLE]);
            assert!(rules.contains(expected), "{expected}\n{rules}");
            // Pods by their device get what pods by their network get.
            if let Some(within) = within {
                assert!(rules.contains(within), "{within}\n{rules}");
            }
            let by_device = rules.matches(r#"iifname "c"#).count();
            assert_eq!(by_device, if within.is_some() { 2 } else { 0 }, "{rules}");
        }
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
                "admit-local",
                "admit-remote",
                "guard-forward",
                "guard-local",
                "guard-remote",
                "mark-internal",
                "replace-source",
                "solicitations",
                "source-nat",
                "unallocated",
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
        let vips = ["10.96.0.10", "fd00:96::a"].map(|ip| Element::Vip(ip.parse().unwrap()));
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
fn cluster_addresses_of_other_proxies_are_not_refused() {
    in_namespace(|| async {
        let mut nat = SourceNat::default();
        nat.networks.services = ["10.96.0.0/16", "fd00:96::/112"].map(network).into();
        let listed = || nft(&["list", "chain", "inet", TABLE, "unallocated"]);
        load(program(), TABLE, Some(&nat), &[]).await.unwrap();
        assert!(!listed().contains("!="), "{}", listed());
        let left = ["10.96.0.11", "10.96.0.12", "fd00:96::b"];
        nat.left_to_others = left.map(|ip| ip.parse().unwrap()).into();
        load(program(), TABLE, Some(&nat), &[]).await.unwrap();
        let text = listed();
        assert!(
            text.contains("ip daddr != { 10.96.0.11, 10.96.0.12 }"),
            "{text}"
        );
        assert!(
            text.contains("ip6 daddr != fd00:96::b")
                || text.contains("ip6 daddr != { fd00:96::b }"),
            "{text}"
        );
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
