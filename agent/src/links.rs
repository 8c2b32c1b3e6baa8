//! Counters of pods' interfaces, as the host's end of each veth has them.

use std::collections::BTreeMap;

use ferrule_model::ownership::HOST_VETH_PREFIX;
use ferrule_netlink::{Error, Protocol, Socket, route};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

/// What passed through an interface, seen from the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) packets_in: u64,
    pub(crate) packets_out: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

/// Counters by the name of the host's end.
///
/// # Errors
/// [`Error`]; what is returned is complete.
pub(crate) async fn counters() -> Result<BTreeMap<String, Counters>, Error> {
    let socket = Socket::open(Protocol::Route)?;
    let question = route::encode(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    let mut found = BTreeMap::new();
    for answer in socket.dump(question).await? {
        // A device of a kind that cannot be decoded is none of ours.
        let Ok(RouteNetlinkMessage::NewLink(link)) = route::decode(&answer) else {
            continue;
        };
        let mut name = None;
        let mut counters = Counters::default();
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(text) if text.starts_with(HOST_VETH_PREFIX) => {
                    name = Some(text);
                }
                // What the host's end received is what the pod sent.
                LinkAttribute::Stats64(stats) => {
                    counters = Counters {
                        packets_in: stats.tx_packets,
                        packets_out: stats.rx_packets,
                        bytes_in: stats.tx_bytes,
                        bytes_out: stats.rx_bytes,
                    };
                }
                _ => {}
            }
        }
        if let Some(name) = name {
            found.insert(name, counters);
        }
    }
    Ok(found)
}
