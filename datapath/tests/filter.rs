//! Elements of the guard's sets in the real kernel, each test in a network namespace of its own.
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
use std::net::{IpAddr, Ipv6Addr};

use ferrule_datapath::filter::{Element, Elements, Strange, Swap, load, load_anew, remove};
use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::change::Restriction;
use ferrule_model::ownership::MARK_BASE;
use ferrule_model::source_nat::SourceNat;
use ipnetwork::IpNetwork;
use serde_json::Value;

use self::program::{TABLE, nft, program, state};
use self::support::in_namespace;

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

fn balancer(ip: &str) -> FrontendAddr {
    FrontendAddr::new(ip.parse().unwrap(), 443, Protocol::Tcp)
}

fn network(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn restriction(dismiss: &[&str], admit: &[&str], limit: Option<bool>) -> Restriction {
    let networks = |texts: &[&str]| texts.iter().map(|text| network(text)).collect();
    Restriction {
        admit: networks(admit),
        dismiss: networks(dismiss),
        limit,
    }
}

/// The other table of ours: without it, or with another rule, something is missing.
#[test]
fn who_asks_for_a_vip_by_arp_is_not_answered() {
    in_namespace(|| async {
        let nat = SourceNat::default();
        load(program(), TABLE, Some(&nat), &[]).await.unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let silent = Element::Silent("10.96.0.10".parse().unwrap());
        assert!(elements.add(&[silent]).await[0].is_ok());
        let good = state().await.unwrap();
        let rules = nft(&["list", "table", "arp", TABLE]);
        assert!(rules.contains("arp daddr ip @silent4 drop"), "{rules}");
        assert!(rules.contains("elements = { 10.96.0.10 }"), "{rules}");
        for damage in [
            "delete table arp guard-test",
            "flush chain arp guard-test silence",
            "insert rule arp guard-test silence accept",
        ] {
            nft(&[damage]);
            assert_ne!(state().await.unwrap(), good, "{damage}");
            load(program(), TABLE, Some(&nat), &[]).await.unwrap();
            assert_eq!(state().await.unwrap(), good, "{damage}");
        }
        // What went with the table is seen to be gone.
        assert_eq!(elements.list().await.unwrap(), []);
        remove(program(), TABLE).await.unwrap();
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}

/// Networks in the place of others that they lie within, or that lie within them: the
/// kernel refuses both at once.
#[test]
fn who_is_admitted_changes_in_one_step() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let (v4, v6) = (balancer("203.0.113.7"), balancer("2001:db8::7"));
        for (how4, how6, expected) in [
            (
                restriction(&[], &["10.0.0.0/8", "192.0.2.1/32"], Some(true)),
                restriction(&[], &["2001:db8:1::/48"], Some(true)),
                vec!["10.0.0.0/8", "192.0.2.1/32", "2001:db8:1::/48"],
            ),
            (
                restriction(&["10.0.0.0/8"], &["10.1.0.0/16", "10.2.0.0/16"], None),
                restriction(&["2001:db8:1::/48"], &["2001:db8::/32"], None),
                vec![
                    "10.1.0.0/16",
                    "10.2.0.0/16",
                    "192.0.2.1/32",
                    "2001:db8::/32",
                ],
            ),
            (
                restriction(&["10.1.0.0/16", "10.2.0.0/16"], &["10.0.0.0/8"], None),
                restriction(&["2001:db8::/32"], &[], Some(false)),
                vec!["10.0.0.0/8", "192.0.2.1/32"],
            ),
        ] {
            let swaps = [Swap::of(v4, &how4), Swap::of(v6, &how6)];
            let results = elements.swap(&swaps).await;
            assert!(results.iter().all(Result::is_ok), "{results:?}");
            let listed = elements.list().await.unwrap().into_iter();
            let mut admitted = Vec::new();
            for element in listed {
                if let Element::Admitted(_, network) = element {
                    admitted.push(network.to_string());
                }
            }
            admitted.sort();
            assert_eq!(admitted, expected);
        }
        // What is not as it is believed to be is an error, and nothing is done.
        let before = elements.list().await.unwrap();
        let wrong = restriction(&["172.16.0.0/12"], &["198.51.100.0/24"], None);
        let result = elements.swap(&[Swap::of(v4, &wrong)]).await;
        assert!(result[0].as_ref().unwrap_err().is_not_found(), "{result:?}");
        let overlapping = restriction(&[], &["10.7.0.0/16"], None);
        assert!(elements.swap(&[Swap::of(v4, &overlapping)]).await[0].is_err());
        assert_eq!(elements.list().await.unwrap(), before);
    });
}

#[test]
fn a_mark_takes_the_place_of_another() {
    in_namespace(|| async {
        load(program(), TABLE, Some(&SourceNat::default()), &[])
            .await
            .unwrap();
        let elements = Elements::open(TABLE).unwrap();
        for addr in [balancer("203.0.113.7"), balancer("2001:db8::7")] {
            let (first, second) = (MARK_BASE | 0x0012_3456, MARK_BASE | 7);
            for (from, to) in [
                (None, Some(first)),
                (Some(first), Some(second)),
                (Some(second), None),
            ] {
                let results = elements.swap(&[Swap::mark(addr, from, to)]).await;
                assert!(results[0].is_ok(), "{results:?}");
                let expected = to.map(|mark| Element::Marked(addr, mark));
                let listed = elements.list().await.unwrap();
                assert_eq!(listed, Vec::from_iter(expected));
            }
        }
        // As the program reads it.
        let addr = balancer("203.0.113.7");
        elements
            .swap(&[Swap::mark(addr, None, Some(MARK_BASE | 7))])
            .await;
        let map = nft(&["-n", "list", "map", "inet", TABLE, "marks4"]);
        assert!(map.contains("203.0.113.7 . 6 . 443 : 0xfe000007"), "{map}");
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
            ("admitted4", "10.0.0.1-10.0.0.7 . 203.0.113.7 . tcp . 443"),
            ("admitted6", "2001:db8::/32 . 2001:db8::7 . tcp . 1-443"),
            ("marks4", "203.0.113.7 . tcp . 443 : 0x4000"),
        ] {
            nft(&[&format!("add element inet {TABLE} {set} {{ {element} }}")]);
        }
        let (found, strange) = elements.list_all().await.unwrap();
        assert_eq!(BTreeSet::from_iter(found), BTreeSet::from(ours));
        let sets: Vec<&str> = strange.iter().map(Strange::set).collect();
        assert_eq!(
            sets,
            [
                "vips4",
                "vips6",
                "frontends4",
                "external6",
                "admitted4",
                "admitted6",
                "marks4",
                "hairpins4"
            ]
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
                Element::Limited(balancer("203.0.113.7")),
                Element::Admitted(balancer("203.0.113.7"), network("198.51.100.0/24")),
                Element::Admitted(balancer("2001:db8::7"), network("2001:db8:1::/48")),
                Element::Dropped(balancer("2001:db8::7")),
                Element::Marked(balancer("203.0.113.7"), MARK_BASE | 1),
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
