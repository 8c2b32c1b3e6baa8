//! Generic netlink: families are found by name, commands carry a short header.

use netlink_packet_core::{DefaultNla, Emitable as _, Nla, NlasIterator};
use rustix::io::Errno;

use crate::{Error, RawMessage, Socket};

/// Family of `nlctrl`, the family that knows the others (`GENL_ID_CTRL`).
const CONTROL_FAMILY: u16 = 0x10;
const CONTROL_VERSION: u8 = 2;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_ATTRIBUTE_ID: u16 = 1;
const CONTROL_ATTRIBUTE_NAME: u16 = 2;

/// Length of `struct genlmsghdr`.
const HEADER: usize = 4;

/// A generic netlink command with its attributes.
#[must_use]
pub fn command<N: Nla>(family: u16, command: u8, version: u8, attributes: &[N]) -> RawMessage {
    let mut body = vec![0; HEADER + attributes.buffer_len()];
    body[0] = command;
    body[1] = version;
    attributes.emit(&mut body[HEADER..]);
    RawMessage::new(family, body)
}

/// Command and attributes of a message that was received.
///
/// # Errors
/// [`Error::Decode`] when it is shorter than its header.
pub fn parts(message: &RawMessage) -> Result<(u8, &[u8]), Error> {
    match (message.body.first(), message.body.get(HEADER..)) {
        (Some(command), Some(attributes)) => Ok((*command, attributes)),
        _ => Err(Error::Decode(format!(
            "{} bytes are too short for a generic netlink message",
            message.body.len()
        ))),
    }
}

/// The number of a family. Asking makes the kernel load its module, where it may.
///
/// # Errors
/// [`Error::is_not_found`] when there is no such family.
pub async fn family(socket: &Socket, name: &str) -> Result<u16, Error> {
    let mut text = name.as_bytes().to_vec();
    text.push(0);
    let question = command(
        CONTROL_FAMILY,
        CONTROL_GET_FAMILY,
        CONTROL_VERSION,
        &[DefaultNla::new(CONTROL_ATTRIBUTE_NAME, text)],
    );
    for answer in socket.request(question, 0).await? {
        let (_, attributes) = parts(&answer)?;
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            if attribute.kind() == CONTROL_ATTRIBUTE_ID {
                let bytes = attribute.value().try_into();
                return bytes.map(u16::from_ne_bytes).map_err(|_| {
                    Error::Decode(format!("the number of family {name} is no 16-bit number"))
                });
            }
        }
    }
    Err(Error::Refused {
        errno: Errno::NOENT,
        reason: Some(format!("no generic netlink family {name}")),
    })
}
