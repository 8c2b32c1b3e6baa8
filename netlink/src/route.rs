//! Links, addresses, routes and neighbours: from and to `netlink-packet-route`.

use std::net::IpAddr;

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader, NetlinkSerializable as _};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::{Error, RawMessage};

/// A routing message to be sent.
#[must_use]
#[expect(
    clippy::needless_pass_by_value,
    reason = "callers build a message to send it; taking it lets them write it in place"
)]
pub fn encode(message: RouteNetlinkMessage) -> RawMessage {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    RawMessage::new(message.message_type(), body)
}

/// A routing message that was received.
///
/// # Errors
/// [`Error::Decode`].
pub fn decode(message: &RawMessage) -> Result<RouteNetlinkMessage, Error> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.message_type;
    RouteNetlinkMessage::deserialize(&header, &message.body)
        .map_err(|error| Error::Decode(error.to_string()))
}

/// A unicast route of the main table out of the interface `index`; without a
/// gateway, what it leads to is on the link itself.
#[must_use]
pub fn out_of(
    index: u32,
    (destination, length): (IpAddr, u8),
    gateway: Option<IpAddr>,
    protocol: RouteProtocol,
) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match destination {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = length;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = protocol;
    message.header.kind = RouteType::Unicast;
    message.header.scope = match gateway {
        None => RouteScope::Link,
        Some(_) => RouteScope::Universe,
    };
    message.attributes = vec![RouteAttribute::Oif(index)];
    if length > 0 {
        message
            .attributes
            .push(RouteAttribute::Destination(destination.into()));
    }
    if let Some(gateway) = gateway {
        message
            .attributes
            .push(RouteAttribute::Gateway(gateway.into()));
    }
    message
}
