//! News of links, addresses and routes, as the kernel sends them to everybody.
//!
//! A [`Monitor`] is a socket of its own: news must not be mixed with the answers
//! that a [`Socket`](crate::Socket) waits for, and a burst of them must not
//! overrun its buffer. It asks for nothing. Who follows the kernel opens the
//! monitor first, then dumps what is there, then reads the news: so nothing
//! falls in between.

use std::io;

use netlink_packet_core::NetlinkBuffer;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::socket::{BUFFER, size_buffers};
use crate::{Error, RawMessage, route};

/// Datagrams read at a time; the kernel puts one piece of news into each. It
/// bounds how long a flood keeps the caller from its other work.
const MAX_DATAGRAMS: usize = 1024;

/// The kernel's `NLMSG_ALIGNTO`.
const ALIGN: usize = 4;

/// `RTNLGRP_LINK`, `…_IPV4_IFADDR`, `…_IPV4_ROUTE`, `…_IPV6_IFADDR`, `…_IPV6_ROUTE`
/// of `linux/rtnetlink.h`.
const GROUPS: [u32; 5] = [1, 5, 7, 9, 11];

/// `RTM_NEW…` and `RTM_DEL…` of links, addresses and routes.
const KNOWN: [u16; 6] = [16, 17, 20, 21, 24, 25];

/// What the monitor waits for. An overrun is an error of the socket, and nothing
/// need be there to read with it: the kernel notes it after it found the buffer
/// full, and the reader may have emptied it in between.
const NEWS: Interest = Interest::READABLE.add(Interest::ERROR);

/// A socket that hears of changes to links, addresses and routes.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<Socket>,
}

impl Monitor {
    /// Listens in the calling thread's network namespace. Must be called within
    /// a tokio runtime. What changes from now on is heard.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        Self::open_with_buffer(BUFFER)
    }

    fn open_with_buffer(bytes: usize) -> Result<Self, Error> {
        let failed = |error: io::Error| Error::Open(errno(&error));
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.set_non_blocking(true).map_err(failed)?;
        size_buffers(&socket, bytes);
        let groups = GROUPS.iter().fold(0, |mask, group| mask | 1 << (group - 1));
        socket.bind(&SocketAddr::new(0, groups)).map_err(failed)?;
        // SAFETY: the descriptor belongs to `socket`, which the AsyncFd owns. It is closed when
        // that is dropped, not before, and nothing here exchanges it for another.
        let socket = unsafe { AsyncFd::register_with_interest(socket, NEWS) };
        let socket = socket.map_err(|refused| failed(refused.into_parts().1))?;
        Ok(Self { socket })
    }

    /// Waits for news and returns what has come, in the order of the changes: at
    /// least one message, at most about a thousand.
    ///
    /// A call that is dropped before it is ready has taken nothing, so it may
    /// stand in `tokio::select!`.
    ///
    /// # Errors
    /// [`Error::Overrun`] when the kernel dropped news because they came faster
    /// than they were read, [`Error::Decode`] when some make no sense. What was
    /// read together with them is given up as well: dump everything anew. The
    /// monitor works on after either.
    pub async fn next(&mut self) -> Result<Vec<RouteNetlinkMessage>, Error> {
        loop {
            let mut ready = self.socket.ready_mut(NEWS).await.map_err(failed)?;
            // From here on nothing is awaited until what was read is returned.
            let mut news = Vec::new();
            for _ in 0..MAX_DATAGRAMS {
                match ready.try_io(|socket| socket.get_ref().recv_from_full()) {
                    Ok(Ok((datagram, sender))) if sender.port_number() == 0 => {
                        read(&datagram, &mut news)?;
                    }
                    // From a process: the kernel alone is believed.
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(Err(error)) => return Err(failed(error)),
                    Err(_nothing_more) => break,
                }
            }
            if !news.is_empty() {
                return Ok(news);
            }
        }
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the shape that map_err wants"
)]
fn failed(error: io::Error) -> Error {
    match errno(&error) {
        Errno::NOBUFS => Error::Overrun,
        errno => Error::Refused {
            errno,
            reason: None,
        },
    }
}

/// Decodes the messages of a datagram. Types that are none of ours are left out.
pub(crate) fn read(datagram: &[u8], news: &mut Vec<RouteNetlinkMessage>) -> Result<(), Error> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkBuffer::new_checked(rest)?;
        if KNOWN.contains(&message.message_type()) {
            news.push(route::decode(&RawMessage {
                message_type: message.message_type(),
                body: message.payload().to_vec(),
            })?);
        }
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        // The last message need not be padded.
        rest = length
            .checked_next_multiple_of(ALIGN)
            .and_then(|length| rest.get(length..))
            .unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};
    use std::time::Duration;

    use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::address::{AddressAttribute, AddressMessage};
    use rustix::thread::{UnshareFlags, unshare_unsafe};

    use super::*;
    use crate::Protocol;

    /// An address of the loopback device, whose index is 1 in every namespace.
    fn address(number: u32) -> AddressMessage {
        let ip = IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number));
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.prefix_len = 32;
        message.header.index = 1;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        message
    }

    fn add(numbers: std::ops::Range<u32>) -> Vec<(RawMessage, u16)> {
        numbers
            .map(|number| {
                let message = RouteNetlinkMessage::NewAddress(address(number));
                (route::encode(message), NLM_F_CREATE | NLM_F_EXCL)
            })
            .collect()
    }

    /// Length, type, flags, sequence number, port number.
    fn header(length: u32, message_type: u16) -> Vec<u8> {
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(message_type.to_ne_bytes());
        bytes.resize(16, 0);
        bytes
    }

    #[test]
    fn an_overrun_is_said_so_and_the_monitor_works_on() {
        let thread = std::thread::spawn(|| {
            // SAFETY: only this thread's network namespace changes; no file descriptors are unshared.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let socket = crate::Socket::open(Protocol::Route).unwrap();
                let mut monitor = Monitor::open_with_buffer(1024).unwrap();
                let results = socket.batch(add(1..101)).await;
                assert!(results.iter().all(Result::is_ok));
                let wait = Duration::from_secs(5);
                let error = tokio::time::timeout(wait, monitor.next()).await.unwrap();
                assert!(matches!(error, Err(Error::Overrun)), "{error:?}");
                // What was queued before the loss, then nothing.
                let quiet = Duration::from_millis(50);
                while let Ok(news) = tokio::time::timeout(quiet, monitor.next()).await {
                    assert!(news.unwrap().len() < 100);
                }
                let results = socket.batch(add(101..102)).await;
                assert!(results.iter().all(Result::is_ok));
                let news = tokio::time::timeout(wait, monitor.next()).await.unwrap();
                assert!(!news.unwrap().is_empty());
            });
        });
        thread.join().unwrap();
    }

    #[test]
    fn what_is_unknown_is_left_out_and_what_is_malformed_is_an_error() {
        let good = RouteNetlinkMessage::NewAddress(address(1));
        let body = route::encode(good.clone()).body;
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut datagram = header(20, 9999);
        datagram.extend([1, 2, 3, 4]);
        let unknown = datagram.len();
        datagram.extend(header(length, 20));
        datagram.extend(&body);
        let mut news = Vec::new();
        read(&datagram, &mut news).unwrap();
        assert_eq!(news, [good]);
        for cut in 1..datagram.len() {
            let whole = cut == unknown;
            assert_eq!(
                read(&datagram[..cut], &mut Vec::new()).is_ok(),
                whole,
                "{cut}"
            );
        }
        for length in [0, 15, u32::MAX] {
            assert!(read(&header(length, 9999), &mut Vec::new()).is_err());
        }
        assert!(read(&header(16, 20), &mut Vec::new()).is_err());
    }
}
