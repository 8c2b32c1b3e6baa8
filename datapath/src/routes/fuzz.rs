//! A way in for the fuzz targets (`fuzz/`): a routing table that holds anything.

use std::collections::BTreeMap;

use ferrule_netlink::{RawMessage, route};
use netlink_packet_route::RouteNetlinkMessage;

use super::{destination, device, hops, in_words, machine_address, message, our_routes};

/// A message about a link, an address or a route.
///
/// # Panics
/// Where something is wrong with what is made of it.
pub fn answer(message_type: u16, body: &[u8]) {
    let raw = RawMessage {
        message_type,
        body: body.to_vec(),
    };
    let devices: BTreeMap<u32, String> = device(&raw).into_iter().collect();
    match route::decode(&raw) {
        Ok(RouteNetlinkMessage::NewAddress(address)) => {
            let _refused = machine_address(&address, &devices);
        }
        Ok(RouteNetlinkMessage::NewRoute(found)) => {
            let _words = in_words(found.header.protocol, &hops(&found), &devices);
            let Ok(Some(destination)) = destination(&found) else {
                return;
            };
            // A route that we know for ours is removed by a message that says the same.
            for ours in our_routes(&found, destination) {
                let ours = super::canonical(&ours);
                let written = message(&ours);
                let read = super::destination(&written);
                assert_eq!(read.ok().flatten(), Some(ours.destination));
                let again: Vec<_> = our_routes(&written, ours.destination).collect();
                assert_eq!(again, [ours]);
            }
        }
        _ => {}
    }
}
