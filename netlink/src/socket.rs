//! Requests, batches, dumps and transactions over one socket.

use std::time::Duration;

use futures_channel::mpsc::UnboundedReceiver;
use futures_util::StreamExt as _;
use futures_util::stream;
use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_proto::{ConnectionHandle, ReplyExpectation, sys::SocketAddr};
use netlink_sys::AsyncSocket as _;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};
use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::{Error, RawMessage};

/// Messages sent at a time. The acknowledgements of much larger batches overrun
/// the receive buffer, and what is lost is waited for in vain.
pub const MAX_BATCH: usize = 128;

/// How long the kernel may take for a request, a batch or a dump.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How often a dump is begun anew when what is dumped changes meanwhile.
const DUMP_ATTEMPTS: u32 = 5;

/// Receive and send buffer, in bytes, where we may raise them.
const BUFFER: usize = 4 * 1024 * 1024;

/// `NLMSGERR_ATTR_MSG` of `linux/netlink.h`.
const ERROR_ATTRIBUTE_MESSAGE: u16 = 1;

/// `NLM_F_ACK_TLVS` of `linux/netlink.h`: attributes follow the error.
const ERROR_HAS_ATTRIBUTES: u16 = 0x200;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// `NFNL_MSG_BATCH_BEGIN` and `…_END` of `linux/netfilter/nfnetlink.h`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM_NFTABLES: u16 = 10;

/// Which part of the kernel a socket talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours.
    Route,
    /// Families by name, IPVS among them.
    Generic,
    /// nftables and connection tracking.
    Netfilter,
}

impl Protocol {
    fn number(self) -> isize {
        match self {
            Self::Route => NETLINK_ROUTE,
            Self::Generic => NETLINK_GENERIC,
            Self::Netfilter => NETLINK_NETFILTER,
        }
    }
}

type Message = NetlinkMessage<RawMessage>;

/// Messages that belong to no request: late answers, and errors about a whole transaction.
type Unsolicited = UnboundedReceiver<(Message, SocketAddr)>;

/// A netlink socket. One operation at a time: the others wait for it.
#[derive(Debug)]
pub struct Socket {
    handle: ConnectionHandle<RawMessage>,
    /// Holding it is the right to use the socket.
    unsolicited: Mutex<Unsolicited>,
    connection: JoinHandle<()>,
    timeout: Duration,
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace. Must be called
    /// within a tokio runtime, which may be of a single thread.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(protocol: Protocol) -> Result<Self, Error> {
        let failed =
            |error: std::io::Error| Error::Open(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        let (mut connection, handle, unsolicited) =
            netlink_proto::new_connection::<RawMessage>(protocol.number()).map_err(failed)?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let socket = connection.socket_mut().socket_mut();
        // What follows makes errors and bursts easier to live with; without it all works the same.
        let _best_effort = socket.set_ext_ack(true);
        let _best_effort = socket.set_cap_ack(true);
        let _best_effort = socket.set_netlink_get_strict_chk(true);
        raise_buffers(socket);
        Ok(Self {
            handle,
            unsolicited: Mutex::new(unsolicited),
            connection: tokio::spawn(connection),
            timeout: TIMEOUT,
        })
    }

    /// Sets how long each operation may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends one request, acknowledged, and returns the answers before the acknowledgement.
    ///
    /// # Errors
    /// [`Error`]; [`Error::leaves_doubt`] says whether it may have taken effect.
    pub async fn request(&self, message: RawMessage, flags: u16) -> Result<Vec<RawMessage>, Error> {
        let mut unsolicited = self.unsolicited.lock().await;
        drain(&mut unsolicited);
        let mut answers = Vec::new();
        let exchange = async {
            let sent = self
                .handle
                .request(framed(message, flags | NLM_F_REQUEST | NLM_F_ACK), kernel())
                .map_err(|_| Error::Closed)?;
            let mut received = std::pin::pin!(sent);
            while let Some(message) = received.next().await {
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    NetlinkPayload::Error(error) => return result(&error, message.header.flags),
                    NetlinkPayload::Overrun(_) => return Err(Error::Overrun),
                    NetlinkPayload::Done(_) => return Ok(()),
                    _ => {}
                }
            }
            Err(Error::Closed)
        };
        match timeout(self.timeout, exchange).await {
            Ok(result) => result.map(|()| answers),
            Err(_elapsed) => Err(Error::Timeout(self.timeout)),
        }
    }

    /// Sends messages, at most [`MAX_BATCH`] at a time, each acknowledged. The
    /// i-th result is that of the i-th message. One that fails does not keep
    /// the kernel from taking the next.
    pub async fn batch(&self, messages: Vec<(RawMessage, u16)>) -> Vec<Result<(), Error>> {
        let mut unsolicited = self.unsolicited.lock().await;
        drain(&mut unsolicited);
        let mut results = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter();
        loop {
            let chunk: Vec<_> = messages
                .by_ref()
                .take(MAX_BATCH)
                .map(|(message, flags)| framed(message, flags | NLM_F_REQUEST | NLM_F_ACK))
                .collect();
            if chunk.is_empty() {
                return results;
            }
            let all = results.len() + chunk.len();
            if let Err(error) = self.batch_chunk(chunk, &mut results).await {
                // What is not acknowledged is unknown, and so is what was never sent then.
                results.resize(all, Err(error.clone()));
                results.extend(messages.map(|_| Err(error.clone())));
                return results;
            }
        }
    }

    async fn batch_chunk(
        &self,
        chunk: Vec<Message>,
        results: &mut Vec<Result<(), Error>>,
    ) -> Result<(), Error> {
        let all = results.len() + chunk.len();
        let exchange = async {
            let sent = self
                .handle
                .request_batch(chunk, kernel())
                .map_err(|_| Error::Closed)?;
            let mut received = std::pin::pin!(sent);
            // The kernel takes the messages in order, and so come the acknowledgements.
            while results.len() < all {
                let message = received.next().await.ok_or(Error::Closed)?;
                match message.payload {
                    NetlinkPayload::Error(error) => {
                        results.push(result(&error, message.header.flags));
                    }
                    NetlinkPayload::Overrun(_) => return Err(Error::Overrun),
                    _ => {}
                }
            }
            Ok(())
        };
        timeout(self.timeout, exchange)
            .await
            .unwrap_or(Err(Error::Timeout(self.timeout)))
    }

    /// Asks for everything of a kind. What is returned is complete.
    ///
    /// # Errors
    /// [`Error`]. A dump that changes interrupt is begun anew a few times first.
    pub async fn dump(&self, message: RawMessage) -> Result<Vec<RawMessage>, Error> {
        let mut unsolicited = self.unsolicited.lock().await;
        drain(&mut unsolicited);
        for _ in 0..DUMP_ATTEMPTS {
            let attempt = timeout(self.timeout, self.dump_once(message.clone()))
                .await
                .unwrap_or(Err(Error::Timeout(self.timeout)))?;
            if let Some(messages) = attempt {
                return Ok(messages);
            }
        }
        Err(Error::Interrupted(DUMP_ATTEMPTS))
    }

    /// `None` when it was interrupted.
    async fn dump_once(&self, message: RawMessage) -> Result<Option<Vec<RawMessage>>, Error> {
        let sent = self
            .handle
            .request(framed(message, NLM_F_REQUEST | NLM_F_DUMP), kernel())
            .map_err(|_| Error::Closed)?;
        let mut received = std::pin::pin!(sent);
        let mut messages = Vec::new();
        let mut interrupted = false;
        while let Some(message) = received.next().await {
            interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => messages.push(inner),
                NetlinkPayload::Done(done) if done.code < 0 => return Err(refused(done.code)),
                NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(messages)),
                NetlinkPayload::Error(error) => {
                    result(&error, message.header.flags)?;
                }
                NetlinkPayload::Overrun(_) => return Err(Error::Overrun),
                _ => {}
            }
        }
        Err(Error::Closed)
    }

    /// Carries out nftables messages as one transaction: all of them or none.
    ///
    /// # Errors
    /// The first refusal; nothing was changed then, unless the error leaves doubt.
    pub async fn transaction(&self, messages: Vec<(RawMessage, u16)>) -> Result<(), Error> {
        let mut unsolicited = self.unsolicited.lock().await;
        drain(&mut unsolicited);
        let count = messages.len();
        if count == 0 {
            return Ok(());
        }
        // Kernels before 6.10 never acknowledge begin and end.
        let quiet = |message| {
            (
                framed(message, NLM_F_REQUEST),
                ReplyExpectation::NotExpected,
            )
        };
        let batch = std::iter::once(quiet(batch_mark(BATCH_BEGIN)))
            .chain(messages.into_iter().map(|(message, flags)| {
                let flags = flags | NLM_F_REQUEST | NLM_F_ACK;
                (framed(message, flags), ReplyExpectation::Expected)
            }))
            .chain(std::iter::once(quiet(batch_mark(BATCH_END))));
        let exchange = async {
            let sent = self
                .handle
                .request_batch_with_expectation(batch, kernel())
                .map_err(|_| Error::Closed)?;
            // What concerns the transaction as a whole is answered to its begin.
            let whole = unsolicited.by_ref().map(|(message, _)| (message, false));
            let mut received =
                std::pin::pin!(stream::select(sent.map(|message| (message, true)), whole));
            let mut outcome = Ok(());
            let mut answered = 0;
            while answered < count {
                let (message, own) = received.next().await.ok_or(Error::Closed)?;
                match message.payload {
                    NetlinkPayload::Error(error) => {
                        let result = result(&error, message.header.flags);
                        if own {
                            answered += 1;
                        } else if result.is_err() {
                            return result;
                        }
                        outcome = outcome.and(result);
                    }
                    NetlinkPayload::Overrun(_) => return Err(Error::Overrun),
                    _ => {}
                }
            }
            outcome
        };
        timeout(self.timeout, exchange)
            .await
            .unwrap_or(Err(Error::Timeout(self.timeout)))
    }
}

/// The kernel's address.
fn kernel() -> SocketAddr {
    SocketAddr::new(0, 0)
}

fn framed(message: RawMessage, flags: u16) -> Message {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message))
}

/// `struct nfgenmsg` {family: unspecified, version 0, resource: subsystem}.
fn batch_mark(message_type: u16) -> RawMessage {
    let subsystem = SUBSYSTEM_NFTABLES.to_be_bytes();
    RawMessage::new(message_type, vec![0, 0, subsystem[0], subsystem[1]])
}

/// Forgets what came too late for its request.
fn drain(unsolicited: &mut Unsolicited) {
    while unsolicited.try_recv().is_ok() {}
}

fn raise_buffers(socket: &netlink_sys::Socket) {
    use rustix::net::sockopt;
    // The forced variants need CAP_NET_ADMIN and go beyond the limits of net.core.
    if sockopt::set_socket_recv_buffer_size_force(socket, BUFFER).is_err() {
        let _best_effort = sockopt::set_socket_recv_buffer_size(socket, BUFFER);
    }
    let _best_effort = sockopt::set_socket_send_buffer_size(socket, BUFFER);
}

fn result(error: &ErrorMessage, flags: u16) -> Result<(), Error> {
    let Some(code) = error.code else {
        return Ok(());
    };
    let Error::Refused { errno, .. } = refused(code.get()) else {
        return Err(refused(code.get()));
    };
    let reason = (flags & ERROR_HAS_ATTRIBUTES != 0)
        .then(|| kernel_words(&error.header))
        .flatten();
    Err(Error::Refused { errno, reason })
}

fn refused(code: i32) -> Error {
    Error::Refused {
        errno: Errno::from_raw_os_error(code.saturating_neg()),
        reason: None,
    }
}

/// The text among the attributes that follow the refused request's header.
fn kernel_words(payload: &[u8]) -> Option<String> {
    let attributes = payload.get(HEADER..)?;
    let attribute = NlasIterator::new(attributes)
        .flatten()
        .find(|attribute| attribute.kind() == ERROR_ATTRIBUTE_MESSAGE)?;
    let text = attribute.value().split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}
