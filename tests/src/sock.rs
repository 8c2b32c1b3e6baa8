//! Servers that say who they are and whom they saw, and clients that tell
//! answered, refused, unreachable and silent apart.
//!
//! The protocol is a line each way: the client sends a word that occurs once in
//! the test, the server answers with its name and the address the client came
//! from. A server also keeps what it saw, because a datagram that reached it
//! counts even where the answer cannot find its way back.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::event::{PollFd, PollFlags, poll};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// How long a client waits for an answer that should come.
pub const ANSWER: Duration = Duration::from_secs(20);

/// How long a client waits where no answer is the answer. A machine ten times
/// slower than usual answers long before.
pub const SILENCE: Duration = Duration::from_secs(4);

/// Time after which a datagram is sent again: it may be lost, a stream is not.
const RESEND: Duration = Duration::from_millis(1500);

/// A transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP, one association to a socket. Its ends name all of their addresses unless
    /// bound to one, and a NAT knows nothing of those.
    Sctp,
}

/// Those that every kernel has.
pub const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

/// The wildcard address of each family.
pub const WILDCARDS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A server answered.
    Answered {
        /// Its name.
        by: String,
        /// Where it saw the client come from.
        saw: SocketAddr,
    },
    /// A reset, or "port unreachable".
    Refused,
    /// No route, prohibited, or stopped by the client's own kernel.
    Unreachable,
    /// Nothing came back.
    TimedOut,
}

/// What a server got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The word that the client sent.
    pub word: String,
    /// Where it came from.
    pub from: SocketAddr,
}

/// A server in a namespace. Dropping it closes its sockets.
#[derive(Debug)]
pub struct Server {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
}

enum Listener {
    Tcp(TcpListener, Vec<Stream>),
    Udp(UdpSocket),
}

struct Stream {
    socket: TcpStream,
    from: SocketAddr,
    line: Vec<u8>,
}

impl Server {
    /// Starts a server named `name`. A wildcard address stands for its own family only.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn start(
        namespace: &Netns,
        name: &str,
        transport: Transport,
        address: SocketAddr,
    ) -> anyhow::Result<Self> {
        let mut listener = namespace.run(|| listen(transport, address))?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (stop, stopped) = UnixStream::pair()?;
        let name = name.to_owned();
        let log = Arc::clone(&seen);
        // The sockets belong to the namespace, their thread need not.
        let thread = thread::spawn(move || serve(&mut listener, &stopped, &name, &log));
        Ok(Self {
            seen,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Starts one for each transport and family on a port.
    ///
    /// # Errors
    /// When one of the four cannot be bound.
    pub fn everywhere(namespace: &Netns, name: &str, port: u16) -> anyhow::Result<Vec<Self>> {
        Self::at(
            namespace,
            name,
            &WILDCARDS.map(|ip| SocketAddr::new(ip, port)),
        )
    }

    /// Starts one for each transport at each of some addresses. On a wildcard
    /// address, a host with several does not always send a datagram back from
    /// the one that was asked.
    ///
    /// # Errors
    /// When one of them cannot be bound.
    pub fn at(
        namespace: &Netns,
        name: &str,
        addresses: &[SocketAddr],
    ) -> anyhow::Result<Vec<Self>> {
        let mut servers = Vec::new();
        for transport in TRANSPORTS {
            for address in addresses {
                servers.push(Self::start(namespace, name, transport, *address)?);
            }
        }
        Ok(servers)
    }

    /// What it got until now.
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.seen).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _what_it_died_of_shows_in_the_test = thread.join();
        }
    }
}

fn new_socket(transport: Transport, address: SocketAddr) -> io::Result<Socket> {
    let (kind, protocol) = match transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
        Transport::Sctp => (Type::STREAM, Protocol::SCTP),
    };
    Socket::new(Domain::for_address(address), kind, Some(protocol))
}

/// A socket that may call `to`, from an address or a port of its own if one is
/// wanted. Several may share the port, to several targets.
fn client_socket(transport: Transport, to: SocketAddr, from: Origin) -> io::Result<Socket> {
    let socket = new_socket(transport, to)?;
    if transport == Transport::Sctp {
        hear_of_errors(&socket, to)?;
    }
    if from.port.is_some() || from.ip.is_some() {
        let any = match to {
            SocketAddr::V4(_) => WILDCARDS[0],
            SocketAddr::V6(_) => WILDCARDS[1],
        };
        let ip = from.ip.unwrap_or(any);
        socket.set_reuse_address(from.port.is_some())?;
        socket.bind(&SocketAddr::new(ip, from.port.unwrap_or(0)).into())?;
    }
    Ok(socket)
}

/// Makes "port unreachable" an error of the socket, which it is for TCP and UDP
/// anyway: SCTP goes on sending unless asked (`sctp_v4_err` of the kernel).
fn hear_of_errors(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let (level, option) = match to {
        SocketAddr::V4(_) => (libc::SOL_IP, libc::IP_RECVERR),
        SocketAddr::V6(_) => (libc::SOL_IPV6, libc::IPV6_RECVERR),
    };
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, and the kernel reads an integer that outlives the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&on).cast(),
            length,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// From where a client calls, as far as it chooses.
#[derive(Clone, Copy, Debug, Default)]
struct Origin {
    ip: Option<IpAddr>,
    port: Option<u16>,
}

fn listen(transport: Transport, address: SocketAddr) -> anyhow::Result<Listener> {
    let socket = new_socket(transport, address)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if transport == Transport::Tcp {
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket
        .bind(&address.into())
        .with_context(|| format!("bind {address}"))?;
    Ok(match transport {
        Transport::Tcp | Transport::Sctp => {
            socket.listen(128)?;
            Listener::Tcp(socket.into(), Vec::new())
        }
        Transport::Udp => Listener::Udp(socket.into()),
    })
}

fn serve(
    listener: &mut Listener,
    stopped: &UnixStream,
    name: &str,
    log: &Mutex<Vec<Seen>>,
) -> anyhow::Result<()> {
    loop {
        let readable = wait_readable(listener, stopped)?;
        if readable.first() == Some(&true) {
            return Ok(());
        }
        match listener {
            Listener::Tcp(socket, streams) => {
                if let Ok((socket, from)) = socket.accept() {
                    socket.set_nonblocking(true)?;
                    streams.push(Stream {
                        socket,
                        from,
                        line: Vec::new(),
                    });
                }
                streams.retain_mut(|stream| answer_stream(stream, name, log).is_ok());
            }
            Listener::Udp(socket) => {
                let mut datagram = [0; 512];
                if let Ok((length, from)) = socket.recv_from(&mut datagram) {
                    let reply = note(&datagram[..length], from, name, log);
                    let _nobody_waits_any_more = socket.send_to(reply.as_bytes(), from);
                }
            }
        }
    }
}

/// Blocks until something can be read: the wish to stop, the listener, a stream, in this order.
fn wait_readable(listener: &Listener, stopped: &UnixStream) -> io::Result<Vec<bool>> {
    let mut fds = vec![PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN)];
    match listener {
        Listener::Tcp(socket, streams) => {
            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN));
            for stream in streams {
                fds.push(PollFd::from_borrowed_fd(
                    stream.socket.as_fd(),
                    PollFlags::IN,
                ));
            }
        }
        Listener::Udp(socket) => {
            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN));
        }
    }
    poll(&mut fds, None)?;
    Ok(fds.iter().map(|fd| !fd.revents().is_empty()).collect())
}

/// Answers every whole line of a stream; an error means that it is over.
fn answer_stream(stream: &mut Stream, name: &str, log: &Mutex<Vec<Seen>>) -> io::Result<()> {
    let mut bytes = [0; 512];
    loop {
        match stream.socket.read(&mut bytes) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => stream.line.extend_from_slice(&bytes[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
        while let Some(end) = stream.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = stream.line.drain(..=end).collect();
            let reply = note(&line, stream.from, name, log);
            stream.socket.write_all(reply.as_bytes())?;
        }
    }
}

fn note(line: &[u8], from: SocketAddr, name: &str, log: &Mutex<Vec<Seen>>) -> String {
    let word = String::from_utf8_lossy(line).trim().to_owned();
    lock(log).push(Seen { word, from });
    format!("{name} {from}\n")
}

/// A request that is sent once, from the namespace it is sent in.
#[derive(Clone, Debug)]
pub struct Request {
    /// How.
    pub transport: Transport,
    /// Where to.
    pub to: SocketAddr,
    /// What; servers remember it.
    pub word: String,
    /// The address it is sent from; the kernel's choice if there is none.
    pub local_ip: Option<IpAddr>,
    /// The port it is sent from; the kernel's choice if there is none.
    pub local_port: Option<u16>,
}

impl Request {
    /// A request with a word that no other of this run has.
    #[must_use]
    pub fn new(transport: Transport, to: SocketAddr) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            transport,
            to,
            word: format!("word-{number}"),
            local_ip: None,
            local_port: None,
        }
    }

    /// The same from an address of the client's choice.
    #[must_use]
    pub fn bound_to_ip(mut self, ip: Option<IpAddr>) -> Self {
        self.local_ip = ip;
        self
    }

    fn origin(&self) -> Origin {
        Origin {
            ip: self.local_ip,
            port: self.local_port,
        }
    }

    /// The same from a port of the client's choice. It may be sent to each
    /// target once: TCP keeps the pair of addresses for a minute after its end.
    #[must_use]
    pub fn bound_to(mut self, port: Option<u16>) -> Self {
        self.local_port = port;
        self
    }

    /// Sends it from a namespace and waits for what becomes of it.
    ///
    /// # Errors
    /// When the machine is at fault, not the network.
    pub fn send(&self, from: &Netns, limit: Duration) -> anyhow::Result<Outcome> {
        from.run(|| self.send_here(limit))
    }

    /// Sends it from the calling thread's namespace.
    pub(crate) fn send_here(&self, limit: Duration) -> anyhow::Result<Outcome> {
        match self.transport {
            Transport::Tcp | Transport::Sctp => {
                match Connection::open_here(self.transport, self.to, self.origin(), limit) {
                    Ok(mut connection) => connection.ask(&self.word, limit),
                    Err(error) => outcome_of(error),
                }
            }
            Transport::Udp => self.send_datagram(limit).or_else(outcome_of),
        }
    }

    fn send_datagram(&self, limit: Duration) -> io::Result<Outcome> {
        let socket: UdpSocket = client_socket(self.transport, self.to, self.origin())?.into();
        // Connected, so that ICMP errors come back as errors.
        socket.connect(self.to)?;
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Outcome::TimedOut);
            }
            socket.set_read_timeout(Some(left.min(RESEND)))?;
            if let Err(error) = socket.send(format!("{}\n", self.word).as_bytes()) {
                // Where a filter of the client's own output rejects, sending fails
                // as where it drops; only then is there an ICMP error as well.
                return Err(socket.take_error()?.unwrap_or(error));
            }
            let mut datagram = [0; 512];
            match socket.recv(&mut datagram) {
                Ok(length) => return parse_answer(&datagram[..length]),
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Sends many requests from one namespace at the same time; outcomes come in their order.
///
/// # Errors
/// When the machine is at fault, not the network.
pub fn send_all(
    from: &Netns,
    requests: &[Request],
    limit: Duration,
) -> anyhow::Result<Vec<Outcome>> {
    thread::scope(|scope| {
        let threads: Vec<_> = requests
            .iter()
            .map(|request| scope.spawn(move || request.send(from, limit)))
            .collect();
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(_) => bail!("a client panicked"),
            })
            .collect()
    })
}

/// A TCP connection, or SCTP association, that stays open between questions.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
}

impl Connection {
    /// Connects from a namespace.
    ///
    /// # Errors
    /// When it is refused or takes too long.
    pub fn open(from: &Netns, to: SocketAddr) -> anyhow::Result<Self> {
        from.run(|| Self::open_from_here(to))
    }

    /// Connects from the calling thread's namespace.
    pub(crate) fn open_from_here(to: SocketAddr) -> anyhow::Result<Self> {
        Self::open_here(Transport::Tcp, to, Origin::default(), ANSWER)
            .with_context(|| format!("connect to {to}"))
    }

    fn open_here(
        transport: Transport,
        to: SocketAddr,
        from: Origin,
        limit: Duration,
    ) -> io::Result<Self> {
        let mut socket = client_socket(transport, to, from)?;
        if let Err(error) = socket.connect_timeout(&to.into(), limit) {
            // Now and then the kernel says that it failed, and not why.
            if error.raw_os_error().is_some() || error.kind() == ErrorKind::TimedOut {
                return Err(error);
            }
            socket = client_socket(transport, to, from)?;
            socket.connect_timeout(&to.into(), limit)?;
        }
        let stream = TcpStream::from(socket);
        if transport == Transport::Tcp {
            stream.set_nodelay(true)?;
        }
        Ok(Self { stream })
    }

    /// Sends a word and waits for the answer.
    ///
    /// # Errors
    /// When the machine is at fault, not the network.
    pub fn ask(&mut self, word: &str, limit: Duration) -> anyhow::Result<Outcome> {
        self.exchange(word, limit).or_else(outcome_of)
    }

    fn exchange(&mut self, word: &str, limit: Duration) -> io::Result<Outcome> {
        self.stream.set_read_timeout(Some(limit))?;
        self.stream.write_all(format!("{word}\n").as_bytes())?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while answer.last() != Some(&b'\n') {
            if self.stream.read(&mut byte)? == 0 {
                return Err(ErrorKind::ConnectionReset.into());
            }
            answer.push(byte[0]);
        }
        parse_answer(&answer)
    }
}

fn parse_answer(answer: &[u8]) -> io::Result<Outcome> {
    let text = String::from_utf8_lossy(answer);
    text.trim()
        .split_once(' ')
        .and_then(|(by, saw)| {
            Some(Outcome::Answered {
                by: by.to_owned(),
                saw: saw.parse().ok()?,
            })
        })
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("answer {text:?}")))
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn outcome_of(error: io::Error) -> anyhow::Result<Outcome> {
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            Ok(Outcome::Refused)
        }
        // EPERM is what a sender gets whose packet its own output filter drops.
        ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable
        | ErrorKind::PermissionDenied => Ok(Outcome::Unreachable),
        _ if is_timeout(&error) => Ok(Outcome::TimedOut),
        _ => Err(error.into()),
    }
}

fn lock(log: &Mutex<Vec<Seen>>) -> MutexGuard<'_, Vec<Seen>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
