//! Requests, batches, dumps and transactions over one socket.

use std::future::ready;
use std::time::Duration;

use futures_channel::mpsc::UnboundedReceiver;
use futures_util::stream::{self, PollNext, Stream, StreamExt as _};
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
pub(crate) const BUFFER: usize = 4 * 1024 * 1024;

/// `NLMSGERR_ATTR_MSG` of `linux/netlink.h`.
const ERROR_ATTRIBUTE_MESSAGE: u16 = 1;

/// `NLM_F_ACK_TLVS` of `linux/netlink.h`: attributes follow the error.
const ERROR_HAS_ATTRIBUTES: u16 = 0x200;

/// `MAX_ERRNO` of `linux/err.h`.
const MAX_ERRNO: i32 = 4095;

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

/// The right to use a socket, with what that takes.
#[derive(Debug)]
struct Turn {
    /// Messages that belong to no request: late answers, errors about a whole
    /// transaction, and the news that answers were lost.
    strays: UnboundedReceiver<(Message, SocketAddr)>,
    /// How many messages were handed to the connection. It numbers them from 1
    /// on in that order, so this is the sequence number of the last.
    sent: u32,
}

/// What can come while a request is out.
enum Event {
    /// An answer to it.
    Answer(Message),
    /// Something that belongs to no request.
    Stray(Message),
    /// No more answers come, be it that all did or that the socket was closed.
    End,
}

impl Turn {
    /// Forgets what came too late for its request.
    fn begin(&mut self) {
        while self.strays.try_recv().is_ok() {}
    }

    /// The answers `received` to a request, with the strays among them. What was
    /// answered comes before the news that other answers were lost.
    fn events<'a>(
        &'a mut self,
        received: impl Stream<Item = Message> + 'a,
    ) -> impl Stream<Item = Event> + 'a {
        let answers = received
            .map(Event::Answer)
            .chain(stream::once(ready(Event::End)));
        let strays = self.strays.by_ref().map(|(stray, _)| Event::Stray(stray));
        stream::select_with_strategy(answers, strays, |(): &mut ()| PollNext::Left)
    }

    /// Sequence number of the message that is sent next.
    fn next_number(&self) -> u32 {
        self.sent.wrapping_add(1)
    }

    /// Whether answers were lost of which the end arrived all the same.
    fn lost_answers(&mut self) -> bool {
        std::iter::from_fn(|| self.strays.try_recv().ok())
            .any(|(stray, _)| matches!(stray.payload, NetlinkPayload::Overrun(_)))
    }
}

/// A netlink socket. One operation at a time: the others wait for it.
#[derive(Debug)]
pub struct Socket {
    handle: ConnectionHandle<RawMessage>,
    turn: Mutex<Turn>,
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
        Self::open_with_buffers(protocol, BUFFER)
    }

    fn open_with_buffers(protocol: Protocol, bytes: usize) -> Result<Self, Error> {
        let failed =
            |error: std::io::Error| Error::Open(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        let (mut connection, handle, strays) =
            netlink_proto::new_connection::<RawMessage>(protocol.number()).map_err(failed)?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let socket = connection.socket_mut().socket_mut();
        // What follows makes errors and bursts easier to live with; without it all works the same.
        let _best_effort = socket.set_ext_ack(true);
        let _best_effort = socket.set_cap_ack(true);
        let _best_effort = socket.set_netlink_get_strict_chk(true);
        size_buffers(socket, bytes);
        Ok(Self {
            handle,
            turn: Mutex::new(Turn { strays, sent: 0 }),
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
        let mut turn = self.turn.lock().await;
        turn.begin();
        timeout(self.timeout, self.request_once(&mut turn, message, flags))
            .await
            .unwrap_or(Err(Error::Timeout(self.timeout)))
    }

    async fn request_once(
        &self,
        turn: &mut Turn,
        message: RawMessage,
        flags: u16,
    ) -> Result<Vec<RawMessage>, Error> {
        let received = self.send(turn, vec![acknowledged((message, flags))])?;
        let mut answers = Vec::new();
        {
            let mut events = std::pin::pin!(turn.events(received));
            loop {
                match events.next().await {
                    Some(Event::Answer(answer)) => match answer.payload {
                        NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                        NetlinkPayload::Error(error) => {
                            result(&error, answer.header.flags)?;
                            break;
                        }
                        NetlinkPayload::Done(_) => break,
                        _ => {}
                    },
                    Some(Event::Stray(stray)) => overrun(&stray)?,
                    Some(Event::End) | None => return Err(Error::Closed),
                }
            }
        }
        if turn.lost_answers() {
            return Err(Error::Overrun);
        }
        Ok(answers)
    }

    /// Hands messages to the connection, which sends them as one datagram.
    fn send(
        &self,
        turn: &mut Turn,
        messages: Vec<(Message, ReplyExpectation)>,
    ) -> Result<impl Stream<Item = Message> + use<>, Error> {
        let count = u32::try_from(messages.len()).unwrap_or(u32::MAX);
        turn.sent = turn.sent.wrapping_add(count);
        self.handle
            .request_batch_with_expectation(messages, kernel())
            .map_err(|_| Error::Closed)
    }

    /// Sends messages, at most [`MAX_BATCH`] at a time, each acknowledged. The
    /// i-th result is that of the i-th message. One that fails does not keep
    /// the kernel from taking the next.
    pub async fn batch(&self, messages: Vec<(RawMessage, u16)>) -> Vec<Result<(), Error>> {
        self.batch_heard(messages, |_, _| {}).await
    }

    /// Sends requests in the same way. The i-th result has the answers to the i-th.
    pub async fn requests(
        &self,
        messages: Vec<(RawMessage, u16)>,
    ) -> Vec<Result<Vec<RawMessage>, Error>> {
        let mut answers = vec![Vec::new(); messages.len()];
        let results = self
            .batch_heard(messages, |place, answer| {
                if let Some(answers) = answers.get_mut(place) {
                    answers.push(answer);
                }
            })
            .await;
        let both = results.into_iter().zip(answers);
        both.map(|(result, answers)| result.map(|()| answers))
            .collect()
    }

    /// [`Socket::batch`]; `hear` gets what is answered to the message at a place.
    async fn batch_heard(
        &self,
        messages: Vec<(RawMessage, u16)>,
        mut hear: impl FnMut(usize, RawMessage),
    ) -> Vec<Result<(), Error>> {
        let mut turn = self.turn.lock().await;
        turn.begin();
        let mut results = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter();
        loop {
            let chunk: Vec<_> = messages
                .by_ref()
                .take(MAX_BATCH)
                .map(acknowledged)
                .collect();
            if chunk.is_empty() {
                return results;
            }
            let mut answered = vec![None; chunk.len()];
            let first = turn.next_number();
            let before = results.len();
            let exchange =
                self.exchange(&mut turn, chunk, first, &mut answered, |place, answer| {
                    hear(before + place, answer);
                });
            let outcome = timeout(self.timeout, exchange)
                .await
                .unwrap_or(Err(Error::Timeout(self.timeout)));
            let Err(error) = outcome else {
                results.extend(answered.into_iter().flatten());
                continue;
            };
            // What is not acknowledged is unknown, and what comes behind is not sent.
            let unknown = || Err(error.clone());
            let answered = answered.into_iter();
            results.extend(answered.map(|result| result.unwrap_or_else(unknown)));
            results.extend(messages.map(|_| unknown()));
            return results;
        }
    }

    /// Asks for everything of a kind. What is returned is complete.
    ///
    /// # Errors
    /// [`Error`]. A dump that changes interrupt is begun anew a few times first.
    pub async fn dump(&self, message: RawMessage) -> Result<Vec<RawMessage>, Error> {
        let mut turn = self.turn.lock().await;
        turn.begin();
        for _ in 0..DUMP_ATTEMPTS {
            let attempt = self.dump_once(&mut turn, message.clone());
            let attempt = timeout(self.timeout, attempt)
                .await
                .unwrap_or(Err(Error::Timeout(self.timeout)))?;
            if let Some(messages) = attempt {
                return Ok(messages);
            }
        }
        Err(Error::Interrupted(DUMP_ATTEMPTS))
    }

    /// `None` when it was interrupted.
    async fn dump_once(
        &self,
        turn: &mut Turn,
        message: RawMessage,
    ) -> Result<Option<Vec<RawMessage>>, Error> {
        let message = framed(message, NLM_F_REQUEST | NLM_F_DUMP);
        let received = self.send(turn, vec![(message, ReplyExpectation::Expected)])?;
        let mut messages = Vec::new();
        let mut interrupted = false;
        {
            let mut events = std::pin::pin!(turn.events(received));
            loop {
                let answer = match events.next().await {
                    Some(Event::Answer(answer)) => answer,
                    Some(Event::Stray(stray)) => {
                        overrun(&stray)?;
                        continue;
                    }
                    Some(Event::End) | None => return Err(Error::Closed),
                };
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => messages.push(inner),
                    NetlinkPayload::Done(done) if done.code < 0 => return Err(refused(done.code)),
                    NetlinkPayload::Done(_) => break,
                    NetlinkPayload::Error(error) => result(&error, answer.header.flags)?,
                    _ => {}
                }
            }
        }
        if turn.lost_answers() {
            return Err(Error::Overrun);
        }
        Ok((!interrupted).then_some(messages))
    }

    /// Carries out nftables messages as one transaction: all of them or none.
    ///
    /// # Errors
    /// The first refusal; nothing was changed then, unless the error leaves doubt.
    pub async fn transaction(&self, messages: Vec<(RawMessage, u16)>) -> Result<(), Error> {
        self.transaction_each(messages).await?.into_iter().collect()
    }

    /// The same, and says of each message what the kernel thinks of it, for it
    /// goes on after one that it refuses: the i-th result is that of the i-th
    /// message. When any is an error, nothing was changed.
    ///
    /// # Errors
    /// Of the transaction as a whole; nothing was changed, unless it leaves doubt.
    pub async fn transaction_each(
        &self,
        messages: Vec<(RawMessage, u16)>,
    ) -> Result<Vec<Result<(), Error>>, Error> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let mut results = vec![None; messages.len()];
        // Kernels before 6.10 never acknowledge begin and end.
        let quiet = |message| {
            let message = framed(message, NLM_F_REQUEST);
            std::iter::once((message, ReplyExpectation::NotExpected))
        };
        let batch = quiet(batch_mark(BATCH_BEGIN))
            .chain(messages.into_iter().map(acknowledged))
            .chain(quiet(batch_mark(BATCH_END)))
            .collect();
        let mut turn = self.turn.lock().await;
        turn.begin();
        let first = turn.next_number().wrapping_add(1);
        timeout(
            self.timeout,
            self.exchange(&mut turn, batch, first, &mut results, |_, _| {}),
        )
        .await
        .unwrap_or(Err(Error::Timeout(self.timeout)))?;
        Ok(results.into_iter().flatten().collect())
    }

    /// Sends messages as one datagram and fills in `results`, the first of which
    /// is that of the message with the number `first`. Returns without an error
    /// when all are there; `hear` gets what else is answered, by its place.
    async fn exchange(
        &self,
        turn: &mut Turn,
        messages: Vec<(Message, ReplyExpectation)>,
        first: u32,
        results: &mut [Option<Result<(), Error>>],
        mut hear: impl FnMut(usize, RawMessage),
    ) -> Result<(), Error> {
        let mut missing = results.len();
        let received = self.send(turn, messages)?;
        let mut events = std::pin::pin!(turn.events(received));
        while missing > 0 {
            match events.next().await {
                Some(Event::Answer(answer)) => {
                    // By its number: an answer that was lost must not shift the others.
                    let place = answer.header.sequence_number.wrapping_sub(first);
                    let place = usize::try_from(place).unwrap_or(usize::MAX);
                    match answer.payload {
                        NetlinkPayload::Error(error) => {
                            if let Some(slot) = results.get_mut(place) {
                                missing -= usize::from(slot.is_none());
                                *slot = Some(result(&error, answer.header.flags));
                            }
                        }
                        NetlinkPayload::InnerMessage(inner) => hear(place, inner),
                        _ => {}
                    }
                }
                Some(Event::Stray(stray)) => {
                    overrun(&stray)?;
                    // What concerns a transaction as a whole is answered to its begin.
                    if let NetlinkPayload::Error(error) = stray.payload {
                        result(&error, stray.header.flags)?;
                    }
                }
                Some(Event::End) | None => return Err(Error::Closed),
            }
        }
        Ok(())
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

fn acknowledged((message, flags): (RawMessage, u16)) -> (Message, ReplyExpectation) {
    let message = framed(message, flags | NLM_F_REQUEST | NLM_F_ACK);
    (message, ReplyExpectation::Expected)
}

/// `struct nfgenmsg` {family: unspecified, version 0, resource: subsystem}.
fn batch_mark(message_type: u16) -> RawMessage {
    let subsystem = SUBSYSTEM_NFTABLES.to_be_bytes();
    RawMessage::new(message_type, vec![0, 0, subsystem[0], subsystem[1]])
}

/// The connection reports a lost answer as a message that belongs to no
/// request, for nobody can say whose it was.
fn overrun(stray: &Message) -> Result<(), Error> {
    match stray.payload {
        NetlinkPayload::Overrun(_) => Err(Error::Overrun),
        _ => Ok(()),
    }
}

pub(crate) fn size_buffers(socket: &netlink_sys::Socket, bytes: usize) {
    use rustix::net::sockopt;
    // The forced variants need CAP_NET_ADMIN and go beyond the limits of net.core, which are
    // 208 kB as distributions have them.
    if sockopt::set_socket_recv_buffer_size_force(socket, bytes).is_err() {
        let _best_effort = sockopt::set_socket_recv_buffer_size(socket, bytes);
    }
    if sockopt::set_socket_send_buffer_size_force(socket, bytes).is_err() {
        let _best_effort = sockopt::set_socket_send_buffer_size(socket, bytes);
    }
}

pub(crate) fn result(error: &ErrorMessage, flags: u16) -> Result<(), Error> {
    let Some(code) = error.code else {
        return Ok(());
    };
    let errno = match refused(code.get()) {
        Error::Refused { errno, .. } => errno,
        other => return Err(other),
    };
    let reason = (flags & ERROR_HAS_ATTRIBUTES != 0)
        .then(|| kernel_words(&error.header))
        .flatten();
    Err(Error::Refused { errno, reason })
}

/// The kernel's numbers are negative and at least -4095 (`MAX_ERRNO`); rustix takes no others.
fn refused(code: i32) -> Error {
    if !(-MAX_ERRNO..0).contains(&code) {
        return Error::Decode(format!("{code} is no error number"));
    }
    Error::Refused {
        errno: Errno::from_raw_os_error(-code),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_number_that_none_can_be_is_no_refusal() {
        for code in [i32::MIN, -MAX_ERRNO - 1, 1, i32::MAX] {
            let mut error = ErrorMessage::default();
            error.code = std::num::NonZeroI32::new(code);
            let said = result(&error, 0).unwrap_err();
            assert!(matches!(said, Error::Decode(_)), "{code}: {said}");
        }
        assert_eq!(
            refused(-MAX_ERRNO).errno().map(Errno::raw_os_error),
            Some(MAX_ERRNO)
        );
        assert_eq!(refused(-2).errno(), Some(Errno::NOENT));
    }

    /// `RTM_DELADDR` of an address: of a device that does not exist for odd
    /// numbers, with nothing else said for even ones. Refused in two ways, and
    /// nothing is changed.
    fn refused_either_way(number: u8) -> RawMessage {
        const RTM_DELADDR: u16 = 21;
        let index: u32 = if number % 2 == 1 { 4711 } else { 1 };
        let mut body = vec![2, 32, 0, 0];
        body.extend(index.to_ne_bytes());
        // IFA_LOCAL 203.0.113.1
        body.extend([8, 0, 2, 0, 203, 0, 113, 1]);
        RawMessage::new(RTM_DELADDR, body)
    }

    #[test]
    fn lost_answers_are_said_so_at_once_and_never_given_to_another() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut socket = Socket::open_with_buffers(Protocol::Route, 1024).unwrap();
            socket.set_timeout(Duration::from_secs(5));
            // The send buffer must take the batch; the answers must not fit.
            let batch: Vec<_> = (0..100).map(|n| (refused_either_way(n), 0)).collect();
            let start = std::time::Instant::now();
            let results = socket.batch(batch).await;
            assert_eq!(results.len(), 100);
            let lost = results
                .iter()
                .filter(|r| matches!(r, Err(Error::Overrun)))
                .count();
            for (index, result) in results.iter().enumerate() {
                let error = result.as_ref().unwrap_err();
                let expected = if index % 2 == 1 {
                    Errno::NODEV
                } else {
                    Errno::ADDRNOTAVAIL
                };
                assert!(
                    error.errno() == Some(expected) || matches!(error, Error::Overrun),
                    "{index}: {error}"
                );
            }
            assert!(lost > 0, "the buffer was large enough: {results:?}");
            assert!(start.elapsed() < Duration::from_secs(5), "waited in vain");
            // The socket works on.
            let error = socket.request(refused_either_way(1), 0).await.unwrap_err();
            assert_eq!(error.errno(), Some(Errno::NODEV));
        });
    }
}
