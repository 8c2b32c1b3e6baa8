//! A way in for the fuzz targets (`fuzz/`), which build this crate as a library.
//!
//! Every function takes what a fuzzer made up. It panics where something holds
//! that must not, and does nothing else.

#![allow(
    dead_code,
    clippy::expect_used,
    reason = "the callers are in another workspace; what panics here is a finding"
)]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use ferrule_api::{Call, Request, Wanted};
use ferrule_model::names::{Attachment, ContainerId, IfName};
use ferrule_model::ownership;
use ferrule_netlink::{RawMessage, route};
use netlink_packet_route::RouteNetlinkMessage;

use crate::check;
use crate::config::{self, Config};
use crate::environment::Environment;
use crate::failure::Failure;
use crate::kernel::Link;
use crate::ports;
use crate::report::Before;
use crate::version;
use crate::wishes::Wishes;

/// Most bytes of an error's text: a runtime writes it into logs and into events.
const MAX_MESSAGE: usize = 2048;

/// The network configuration, `prevResult` in it, and VERSION.
///
/// # Panics
/// Where something is wrong with the plugin.
pub fn configuration(input: &[u8]) {
    let Ok(input) = config::read_input(input) else {
        return;
    };
    let reply = version::reply(&input);
    assert!(reply["supportedVersions"].is_array(), "{reply}");
    let config = match Config::parse(&input) {
        Ok(config) => config,
        Err(failure) => return told(&failure, &input),
    };
    assert_eq!(config.version, Config::version_of(&input));
    assert!(config.agent_socket.is_absolute() && config.state_dir.is_absolute());
    for failure in fields_of_one_verb(&config) {
        told(&failure, &input);
    }
    if let Err(failure) = Before::read(config.version, config.previous.as_ref()) {
        told(&failure, &input);
    }
    match check::previous(&config) {
        Ok(previous) => {
            let attachment = attachment();
            let _looked_up = previous.mac(attachment.interface.as_str(), true);
            let addresses = previous.addresses(&attachment);
            assert!(addresses.count() <= input.len());
        }
        Err(failure) => told(&failure, &input),
    }
}

/// What single verbs read of a configuration, and what they complain about.
fn fields_of_one_verb(config: &Config) -> Vec<Failure> {
    let nothing = Environment(|_: &'static str| None);
    let mut failures = Vec::new();
    match config.mtu() {
        Ok(mtu) => assert!(mtu.is_none_or(|mtu| (68..=65535).contains(&mtu))),
        Err(failure) => failures.push(failure),
    }
    match Wishes::read(config, &nothing) {
        Ok(wishes) => {
            let ipv6 = wishes.ips.iter().filter(|ip| ip.is_ipv6()).count();
            assert!(ipv6 <= 1 && wishes.ips.len() - ipv6 <= 1, "{wishes:?}");
        }
        Err(failure) => failures.push(failure),
    }
    failures.extend(config.network().err());
    failures.extend(config.valid_attachments().err());
    failures.extend(config.bandwidth.limits(1500).err().map(Failure::from));
    match ports::read(config.port_mappings.as_ref()) {
        Ok(ports) => assert!(ports.iter().all(|port| port.host_port > 0)),
        Err(failure) => failures.push(failure),
    }
    failures
}

/// The variables, as `NAME=VALUE` with a zero byte between two.
///
/// # Panics
/// Where something is wrong with the plugin.
pub fn environment(input: &[u8]) {
    let environment = Environment(|name: &'static str| {
        let found = input.split(|byte| *byte == 0).find_map(|pair| {
            let value = pair.strip_prefix(name.as_bytes())?;
            value.strip_prefix(b"=")
        });
        found.map(|value| OsString::from_vec(value.to_vec()))
    });
    let heard = |error| told(&Failure::from(error), b"");
    let _verb = environment.command().map_err(heard);
    if let Ok(netns) = environment.netns().map_err(heard) {
        assert!(netns.is_absolute());
    }
    let pod = environment.pod().map_err(heard);
    let attachment = environment.attachment().map_err(heard);
    let (Ok(attachment), Ok(pod)) = (attachment, pod) else {
        return;
    };
    // What the plugin takes for a call must be one to the agent.
    let request = Request::new(Call::Allocate(Box::new(Wanted {
        pod,
        ..Wanted::new(attachment.clone())
    })));
    let line = ferrule_api::encode(&request).expect("a line");
    let read: Request = ferrule_api::decode(&line).expect("what was written");
    assert_eq!(read, request);
    let name = ownership::host_veth_name(&attachment);
    assert!(IfName::try_from(name.to_string()).is_ok());
}

/// A routing message: what the plugin makes of a link.
///
/// # Panics
/// Where something is wrong with the plugin.
pub fn link(message_type: u16, body: &[u8]) {
    let message = RawMessage {
        message_type,
        body: body.to_vec(),
    };
    if let Ok(RouteNetlinkMessage::NewLink(link)) = route::decode(&message) {
        let link = Link::parse(&link);
        let _ours = link.is_of(&attachment());
        let _owner = link.read_alias();
    }
}

fn attachment() -> Attachment {
    Attachment {
        container_id: ContainerId::try_from("abc".to_owned()).expect("an ID"),
        interface: IfName::try_from("eth0".to_owned()).expect("a name"),
    }
}

/// An error is an object of the specification, and no longer than a person reads.
fn told(failure: &Failure, input: &[u8]) {
    let reply = failure.reply(Config::version_of(input));
    assert!(reply["code"].as_u64().is_some_and(|code| code > 0));
    let words = reply["msg"].as_str().unwrap_or_default().len();
    assert!(
        (1..=MAX_MESSAGE).contains(&words),
        "a message of {words} bytes"
    );
}
