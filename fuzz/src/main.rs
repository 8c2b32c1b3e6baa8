//! Every fuzz target in one program, since linking each takes longer than running it.
//!
//! `FUZZ_TARGET` names the one to run, `FUZZ_PLANTED` wakes the bug planted for
//! it. Arguments are those of libFuzzer. `tests/fuzz` runs this.

#![no_main]

mod json;
mod memory;

use std::sync::OnceLock;

use ferrule_agent::fuzz as agent;
use ferrule_cni::fuzz as cni;
use ferrule_datapath::{filter, ipvs, routes};
use ferrule_model::address::Family;
use ferrule_model::planted;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

type Target = fn(&[u8]);

/// Every target by its name, which is that of its folder in `corpus`.
const TARGETS: [(&str, Target); 10] = [
    ("cni-config", cni::configuration),
    ("cni-environment", cni::environment),
    ("socket-request", agent::request),
    ("socket-reply", reply),
    ("manifest", manifest),
    ("watch-frame", agent::watch),
    ("list-page", agent::list),
    ("netlink-ipvs", ipvs_answer),
    ("netlink-route", route_answer),
    ("netlink-nft", nft_answer),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fuzz_target!(
    init: {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let target = TARGETS.iter().find(|(known, _)| *known == name);
        let Some((_, target)) = target else {
            for (name, _) in TARGETS {
                println!("{name}");
            }
            std::process::exit(i32::from(!name.is_empty()));
        };
        let _set_once = TARGET.set(*target);
        if std::env::var_os("FUZZ_PLANTED").is_some() {
            planted::wake();
        }
    },
    |data: &[u8]| {
        if let Some(target) = TARGET.get() {
            memory::bounded(data.len(), || target(data));
        }
    }
);

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    // Three times out of four, so that what is no JSON is tried as well.
    let made = (seed % 4 != 0)
        .then(|| json::mutate(data, size, max_size, seed))
        .flatten();
    made.unwrap_or_else(|| fuzzer_mutate(data, size, max_size))
});

/// What the agent answered; what is read, written and read again is the same.
fn reply(bytes: &[u8]) {
    let Ok(answer) = ferrule_api::fuzz::answer(bytes) else {
        return;
    };
    let Ok(line) = ferrule_api::encode(&ferrule_api::Reply::new(answer.clone())) else {
        // Floats and escapes may be written longer than they came.
        assert!(bytes.len() > ferrule_api::MAX_LINE / 8);
        return;
    };
    let again = ferrule_api::fuzz::answer(&line).expect("what was written");
    assert_eq!(again, answer);
}

fn manifest(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        agent::manifest(text);
    }
}

/// The first byte says what was asked for.
fn ipvs_answer(bytes: &[u8]) {
    let Some((asked, attributes)) = bytes.split_first() else {
        return;
    };
    match asked % 4 {
        0 => ipvs::fuzz::service(attributes),
        1 => ipvs::fuzz::server(attributes, Family::IPv4),
        2 => ipvs::fuzz::server(attributes, Family::IPv6),
        _ => ipvs::fuzz::facts(attributes),
    }
}

/// A datagram with its netlink headers, as a monitor hears it and as an answer.
fn route_answer(bytes: &[u8]) {
    let _refused = ferrule_netlink::fuzz::news(bytes);
    if let Ok(Some(message)) = ferrule_netlink::fuzz::answer(bytes) {
        cni::link(message.message_type, &message.body);
        agent::link(message.message_type, &message.body);
        routes::fuzz::answer(message.message_type, &message.body);
    }
}

/// The first byte says what was asked for.
fn nft_answer(bytes: &[u8]) {
    let Some((asked, body)) = bytes.split_first() else {
        return;
    };
    match asked {
        0..8 => filter::fuzz::elements(*asked, body),
        _ => filter::fuzz::table(body),
    }
}
