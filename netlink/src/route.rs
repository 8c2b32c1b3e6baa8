//! Links, addresses, routes and neighbours: from and to `netlink-packet-route`.

use netlink_packet_core::{NetlinkDeserializable as _, NetlinkHeader, NetlinkSerializable as _};
use netlink_packet_route::RouteNetlinkMessage;

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
