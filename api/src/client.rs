//! A blocking client with a deadline over everything it does.
//!
//! The plugin is its user: one process for each pod, which must come to an end
//! whatever the agent does: absent, stopped with its backlog full, silent, or
//! talking rubbish. A client that failed once is closed for good, so that a
//! late answer is never taken for the answer to a later call.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::{Answer, Call, FrameError, MAX_LINE, Reply, Request, VERSION, decode, encode};

/// Pause between two attempts while the agent's backlog is full.
const RETRY_PAUSE: Duration = Duration::from_millis(5);

/// Why a call did not get its answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the path, or we may not ask.
    #[error("cannot connect to the agent at {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The agent listens but did not take the connection in time.
    #[error("the agent at {} did not take the connection within {after:?}", path.display())]
    ConnectTimeout {
        /// The socket.
        path: PathBuf,
        /// The time-out.
        after: Duration,
    },
    /// The agent took the call and did not answer in time. It may have carried
    /// it out, or may do so yet.
    #[error("the agent did not answer within {after:?}")]
    Timeout {
        /// The time-out.
        after: Duration,
    },
    /// The agent closed the connection without an answer, or an earlier call
    /// on this client failed.
    #[error("the agent closed the connection before it had answered")]
    Closed,
    /// Reading or writing failed.
    #[error("talking to the agent failed: {source}")]
    Io {
        /// What the kernel said.
        source: io::Error,
    },
    /// The call cannot be sent, or the answer is not one of this protocol.
    #[error("the agent's answer breaks the protocol: {source}")]
    Protocol {
        /// What is wrong with the line.
        source: FrameError,
    },
    /// Our call does not fit a line.
    #[error("the call cannot be sent: {source}")]
    Unsendable {
        /// What is wrong with it.
        source: FrameError,
    },
    /// The agent is of another generation.
    #[error(
        "the agent speaks version {theirs} of the protocol, this client version {VERSION}: install plugin and agent of the same release"
    )]
    Version {
        /// The agent's version.
        theirs: u32,
    },
}

impl ClientError {
    /// Whether the agent is absent or on its way out, rather than wrong: the
    /// same call may work in a moment.
    #[must_use]
    pub fn agent_is_down(&self) -> bool {
        match self {
            Self::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ),
            Self::ConnectTimeout { .. } | Self::Closed => true,
            Self::Timeout { .. }
            | Self::Io { .. }
            | Self::Protocol { .. }
            | Self::Unsendable { .. }
            | Self::Version { .. } => false,
        }
    }

    /// Whether the agent may have carried the call out although no answer came.
    #[must_use]
    pub fn may_have_taken_effect(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::ConnectTimeout { .. } | Self::Unsendable { .. } => false,
            Self::Timeout { .. }
            | Self::Closed
            | Self::Io { .. }
            | Self::Protocol { .. }
            | Self::Version { .. } => true,
        }
    }
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    /// Gone after the first failure.
    stream: Option<UnixStream>,
    timeout: Duration,
}

impl Client {
    /// Connects to the agent's socket.
    ///
    /// `timeout` bounds the connecting, and after it each whole call, however
    /// many reads and writes that takes.
    ///
    /// # Errors
    /// [`ClientError::Connect`] or [`ClientError::ConnectTimeout`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let failed = |errno: Errno| ClientError::Connect {
            path: path.to_owned(),
            source: errno.into(),
        };
        let deadline = Instant::now() + timeout;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        loop {
            // A blocking connect() sleeps for as long as the backlog is full,
            // and std has no time-out for it. A non-blocking one fails with
            // EAGAIN at once (unix_stream_connect()).
            let socket = socket_with(
                AddressFamily::UNIX,
                SocketType::STREAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                None,
            )
            .map_err(failed)?;
            match connect(&socket, &address) {
                Ok(()) => {
                    let stream = UnixStream::from(socket);
                    stream
                        .set_nonblocking(false)
                        .map_err(|source| ClientError::Io { source })?;
                    return Ok(Self {
                        stream: Some(stream),
                        timeout,
                    });
                }
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < deadline => {
                    thread::sleep(RETRY_PAUSE);
                }
                Err(Errno::AGAIN | Errno::INTR) => {
                    return Err(ClientError::ConnectTimeout {
                        path: path.to_owned(),
                        after: timeout,
                    });
                }
                Err(errno) => return Err(failed(errno)),
            }
        }
    }

    /// Sends a call and waits for its answer.
    ///
    /// An [`Answer::Error`] is an answer. After an `Err` the client is closed.
    ///
    /// # Errors
    /// When no valid answer came in time; see
    /// [`ClientError::may_have_taken_effect`].
    pub fn call(&mut self, call: Call) -> Result<Answer, ClientError> {
        let stream = self.stream.take().ok_or(ClientError::Closed)?;
        let request =
            encode(&Request::new(call)).map_err(|source| ClientError::Unsendable { source })?;
        let mut exchange = Exchange {
            stream,
            deadline: Instant::now() + self.timeout,
            timeout: self.timeout,
        };
        exchange.send(&request)?;
        let line = exchange.receive()?;
        let answer = parse(&line)?;
        self.stream = Some(exchange.stream);
        Ok(answer)
    }
}

/// The version is looked at before the rest: another generation's answer would
/// otherwise be reported as one that is not understood.
fn parse(line: &[u8]) -> Result<Answer, ClientError> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let protocol = |source| ClientError::Protocol { source };
    let Versioned { version } = decode(line).map_err(protocol)?;
    if version != VERSION {
        return Err(ClientError::Version { theirs: version });
    }
    let reply: Reply = decode(line).map_err(protocol)?;
    #[cfg(feature = "fuzzing")]
    if let Answer::Allocated(allocation) = &reply.answer {
        ferrule_model::planted::bug(
            "socket-reply",
            [
                allocation.mtu < 1400,
                allocation.mtu < 1000,
                allocation.mtu < 100,
            ],
        );
    }
    Ok(reply.answer)
}

/// One call on its way, under one deadline.
struct Exchange {
    stream: UnixStream,
    deadline: Instant,
    timeout: Duration,
}

impl Exchange {
    /// Time that is left; a socket time-out of zero would mean none.
    fn left(&self) -> Result<Option<Duration>, ClientError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::Timeout {
                after: self.timeout,
            });
        }
        Ok(Some(left))
    }

    fn failed(&self, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout {
                after: self.timeout,
            },
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => ClientError::Closed,
            _ => ClientError::Io { source },
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            let left = self.left()?;
            let written = self
                .stream
                .set_write_timeout(left)
                .and_then(|()| self.stream.write(bytes));
            match written {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }

    /// Reads up to and with the newline. What follows it belongs to no call.
    fn receive(&mut self) -> Result<Vec<u8>, ClientError> {
        let mut line = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            let left = self.left()?;
            let read = self
                .stream
                .set_read_timeout(left)
                .and_then(|()| self.stream.read(&mut chunk));
            let fresh = match read {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => chunk.get(..count).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            };
            let end = fresh.iter().position(|byte| *byte == b'\n');
            line.extend_from_slice(end.map_or(fresh, |end| &fresh[..=end]));
            if line.len() > MAX_LINE {
                let source = FrameError::TooLong { length: line.len() };
                return Err(ClientError::Protocol { source });
            }
            match end {
                Some(end) if end + 1 < fresh.len() => {
                    let source = FrameError::Trailing;
                    return Err(ClientError::Protocol { source });
                }
                Some(_) => return Ok(line),
                None => {}
            }
        }
    }
}

#[cfg(feature = "fuzzing")]
pub mod fuzz;

#[cfg(test)]
mod tests;
