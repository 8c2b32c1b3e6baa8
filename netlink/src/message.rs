//! A netlink message as a type and bytes.

use std::convert::Infallible;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

/// The kernel's `NLMSG_ALIGNTO`.
const ALIGN: usize = 4;

/// A message without its netlink header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawMessage {
    /// `nlmsg_type`.
    pub message_type: u16,
    /// Everything behind the netlink header.
    pub body: Vec<u8>,
}

impl RawMessage {
    /// A message to be sent; the body is padded to the kernel's alignment.
    #[must_use]
    pub fn new(message_type: u16, mut body: Vec<u8>) -> Self {
        body.resize(body.len().next_multiple_of(ALIGN), 0);
        Self { message_type, body }
    }
}

impl NetlinkSerializable for RawMessage {
    fn message_type(&self) -> u16 {
        self.message_type
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for RawMessage {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self {
            message_type: header.message_type,
            body: payload.to_vec(),
        })
    }
}
