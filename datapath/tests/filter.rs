//! The guard's table in the real kernel, each test in a network namespace of its own.
//!
//! What the rules do to packets is told by the kernel suite (`tests/`), for that needs IPVS.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::process::Command;

use ferrule_datapath::filter::{Element, Elements, RulesetError, load, remove};
use ferrule_model::address::{FrontendAddr, Protocol};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;

const TABLE: &str = "guard-test";

fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes; no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}

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
        load(program(), TABLE).await.unwrap();
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
        load(program(), TABLE).await.unwrap();
        let elements = Elements::open(TABLE).unwrap();
        let before = [vip("10.96.0.10"), frontend("10.96.0.10", 80, Protocol::Tcp)];
        assert!(elements.add(&before).await.iter().all(Result::is_ok));
        let rules = || nft(&["-s", "list", "table", "inet", TABLE]);
        let good = rules();
        load(program(), TABLE).await.unwrap();
        assert_eq!(rules(), good);
        nft(&["flush", "chain", "inet", TABLE, "guard-local"]);
        nft(&["insert", "rule", "inet", TABLE, "guard-remote", "accept"]);
        assert_ne!(rules(), good);
        load(program(), TABLE).await.unwrap();
        assert_eq!(rules(), good);
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
        load(program(), TABLE).await.unwrap();
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
        load(program(), TABLE).await.unwrap();
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
            for result in [load(program(), name).await, remove(program(), name).await] {
                let error = result.unwrap_err();
                assert!(matches!(error, RulesetError::Name(_)), "{name:?}: {error}");
            }
        }
        // A word of the language is no name: the program says so.
        let error = load(program(), "ip6").await.unwrap_err();
        assert!(matches!(error, RulesetError::Refused { .. }), "{error}");
        let error = load(Path::new("/no/such/program"), TABLE)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("install nftables"), "{error}");
        assert_eq!(nft(&["list", "ruleset"]), "");
    });
}
