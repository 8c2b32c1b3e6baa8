//! A way in for the fuzz targets (`fuzz/`): a kernel that sends anything.

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;

use crate::{Error, RawMessage, monitor, socket};

/// A datagram of news.
///
/// # Errors
/// [`Error::Decode`].
pub fn news(datagram: &[u8]) -> Result<Vec<RouteNetlinkMessage>, Error> {
    let mut news = Vec::new();
    monitor::read(datagram, &mut news)?;
    Ok(news)
}

/// A message with its netlink header, as it comes to whoever waits for an answer.
///
/// # Errors
/// [`Error::Decode`], or what the message refuses.
pub fn answer(bytes: &[u8]) -> Result<Option<RawMessage>, Error> {
    // `netlink-proto` looks at the length before it decodes.
    NetlinkBuffer::new_checked(bytes)?;
    let message = NetlinkMessage::<RawMessage>::deserialize(bytes)?;
    match message.payload {
        NetlinkPayload::InnerMessage(inner) => Ok(Some(inner)),
        NetlinkPayload::Error(error) => socket::result(&error, message.header.flags).map(|()| None),
        _ => Ok(None),
    }
}
