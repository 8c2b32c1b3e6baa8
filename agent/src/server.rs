//! The Unix socket: who may connect, how long and how much they may say.
//!
//! Everything that arrives here is untrusted. A connection that is too slow,
//! too long or makes no sense is answered with an error that says so where it
//! still can be, and closed; it never holds up another one.

mod request;

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ferrule_api::{Answer, Call, CallError, ErrorCode, MAX_LINE, Reply};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::Mode;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use self::request::{bad_request, parse};
use crate::check::socket::{self, Place};
use crate::desk::Desk;

/// Connections that are served at the same time; kubelet starts hundreds of pods at once. Far fewer
/// than the usual limit of 1,024 descriptors, of which the agent needs some for itself.
const MAX_CONNECTIONS: usize = 512;

/// How long a client may take for a line, and for taking the answer.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// A socket that is bound; its file goes with it.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Binds the socket with mode 0600. A socket that a dead agent left is replaced.
    ///
    /// # Errors
    /// When another agent answers there, or the path cannot be used.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        socket::judge(path)?;
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(folder)
                .with_context(|| format!("cannot make folder {}", folder.display()))?;
        }
        if socket::judge(path)? == Place::Left {
            fs::remove_file(path).with_context(|| format!("cannot replace {}", path.display()))?;
        }
        // The mode is right from the first moment on, not after a chmod.
        let before = rustix::process::umask(Mode::from_raw_mode(0o177));
        let bound = UnixListener::bind(path);
        rustix::process::umask(before);
        Ok(Self {
            listener: bound.with_context(|| format!("cannot listen on {}", path.display()))?,
            path: path.to_owned(),
        })
    }

    /// Serves until it is dropped.
    pub(crate) async fn serve(&self, desk: Arc<Desk>) {
        info!(socket = %self.path.display(), "listening");
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let desk = Arc::clone(&desk);
                    tokio::spawn(async move {
                        if let Err(error) = connection(stream, &desk).await {
                            debug!(error = format!("{error:#}"), "connection ended");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely; others give theirs back meanwhile.
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone_already = fs::remove_file(&self.path);
    }
}

async fn connection(stream: UnixStream, desk: &Desk) -> anyhow::Result<()> {
    let peer = stream.peer_cred().context("SO_PEERCRED")?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != 0 && peer.uid() != own {
        warn!(
            uid = peer.uid(),
            pid = peer.pid(),
            "connection refused: not root"
        );
        desk.note_refused_connection();
        return Ok(());
    }
    let client = Arc::new(Connected::new(&stream)?);
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let mut line = Vec::new();
        let request = match timeout(LINE_TIMEOUT, read_line(&mut read, &mut line)).await {
            // Whoever says nothing asked for nothing.
            Err(_) if line.is_empty() => bail!("no request within {LINE_TIMEOUT:?}"),
            Err(_) => Err(bad_request(format!(
                "a request is sent within {LINE_TIMEOUT:?}; got {} bytes without a newline",
                line.len()
            ))),
            Ok(end) => {
                end?;
                if line.is_empty() {
                    return Ok(());
                }
                parse(&line)
            }
        };
        let (answer, go_on) = match request {
            Ok(request) => match request.call {
                // Who has gone has queued the release, and an ADD may have come since.
                Call::Release { attachment } => {
                    let client = Arc::clone(&client);
                    let answer = desk.release(attachment, move || client.is_there());
                    (answer.await, true)
                }
                call => (desk.call(call).await, true),
            },
            Err(error) => {
                desk.note_bad_request();
                (Answer::Error(error), false)
            }
        };
        let reply = ferrule_api::encode(&Reply::new(answer)).or_else(|error| {
            warn!(%error, "an answer does not fit a line");
            ferrule_api::encode(&Reply::new(Answer::Error(CallError {
                code: ErrorCode::Internal,
                message: error.to_string(),
            })))
        })?;
        timeout(LINE_TIMEOUT, write.write_all(&reply)).await??;
        if !go_on {
            return Ok(());
        }
    }
}

/// The other end of a connection.
#[derive(Debug)]
struct Connected(OwnedFd);

impl Connected {
    fn new(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self(stream.as_fd().try_clone_to_owned()?))
    }

    /// Whether it has not been closed. One that only says no more is still there.
    fn is_there(&self) -> bool {
        let mut polled = [PollFd::new(&self.0, PollFlags::empty())];
        let now = Timespec::default();
        // A hang-up is told unasked.
        match rustix::event::poll(&mut polled, Some(&now)) {
            Ok(_) => !polled[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR),
            Err(_) => false,
        }
    }
}

/// Reads one line, which stays empty at the end. One that is too long comes without its
/// newline; what came before a time-out stays in it.
async fn read_line(
    read: &mut BufReader<tokio::net::unix::OwnedReadHalf>,
    line: &mut Vec<u8>,
) -> io::Result<usize> {
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    read.take(limit).read_until(b'\n', line).await
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, Write as _};
    use std::os::unix::fs::PermissionsExt as _;
    use std::panic::AssertUnwindSafe;

    use ferrule_api::{Allocation, Client, Lease, Wanted};
    use ferrule_model::ipam::PodRange;
    use ferrule_model::names::{Attachment, ContainerId, IfName};
    use tempfile::TempDir;

    use super::*;
    use crate::leases::Leases;
    use crate::pods::Pods;
    use crate::reconcile::Asker;

    struct Fixture {
        dir: TempDir,
        desk: Arc<Desk>,
        runtime: tokio::runtime::Runtime,
    }

    impl Fixture {
        /// A server with a range of one family.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let leases = Leases::open(&dir.path().join("leases.redb")).unwrap();
            leases.set_ranges(vec![PodRange::parse("10.1.0.0/29").unwrap()]);
            let pods = Arc::new(Pods::new(leases, dir.path().to_owned(), 1400));
            pods.note_look(Ok(()));
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let path = dir.path().join("agent.sock");
            let server = runtime.block_on(async { Server::bind(&path).unwrap() });
            let (queries, _nobody_answers) = tokio::sync::mpsc::channel(1);
            let sysctls = ferrule_datapath::Sysctls {
                root: "/proc/sys".into(),
                record: None,
            };
            let desk = Arc::new(Desk::new(pods, Asker::new(queries), sysctls));
            let of_server = Arc::clone(&desk);
            runtime.spawn(async move { server.serve(of_server).await });
            Self { dir, desk, runtime }
        }

        fn socket(&self) -> PathBuf {
            self.dir.path().join("agent.sock")
        }

        fn call(&self, call: Call) -> Answer {
            let mut client = Client::connect(&self.socket(), LINE_TIMEOUT).unwrap();
            client.call(call).unwrap()
        }

        /// Sends bytes and returns the line that comes back, if one does.
        fn raw(&self, bytes: &[u8]) -> String {
            let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
            stream.write_all(bytes).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut line = String::new();
            std::io::BufReader::new(stream)
                .read_line(&mut line)
                .unwrap();
            line
        }
    }

    fn attachment(container: &str) -> Attachment {
        Attachment {
            container_id: ContainerId::try_from(container.to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        }
    }

    #[test]
    fn leases_are_given_and_taken_back() {
        let f = Fixture::new();
        let mode = fs::metadata(f.socket()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let ask = |container| Call::Allocate(Box::new(Wanted::new(attachment(container))));
        let Answer::Allocated(first) = f.call(ask("a")) else {
            panic!("no lease");
        };
        assert_eq!(first.mtu, 1400);
        assert_eq!(first.addresses[0].to_string(), "10.1.0.2/32");
        let again = Allocation {
            renewed: true,
            ..first
        };
        assert_eq!(f.call(ask("a")), Answer::Allocated(again));
        let release = Call::Release {
            attachment: attachment("a"),
        };
        assert_eq!(f.call(release.clone()), Answer::Released);
        assert_eq!(f.call(release), Answer::Released, "twice is fine");
        for container in ["b", "c", "d", "e", "f"] {
            assert!(matches!(f.call(ask(container)), Answer::Allocated(_)));
        }
        let Answer::Error(error) = f.call(ask("g")) else {
            panic!("a lease out of nothing");
        };
        assert_eq!(error.code, ErrorCode::PoolExhausted);
        assert!(error.message.contains("10.1.0.0/29"), "{error}");
    }

    #[test]
    fn garbage_is_answered_with_an_error_that_names_it() {
        let f = Fixture::new();
        let long = vec![b'x'; MAX_LINE * 2];
        let cases: [(&[u8], &str); 9] = [
            (b"{\"version\":2,\"call\":\"later\"}\n", "version 2"),
            (b"\n", "badRequest"),
            (b"GET / HTTP/1.1\r\n", "badRequest"),
            (b"{\"version\":1,\"call\":\"nonsense\"}\n", "nonsense"),
            (b"{\"version\":99,\"call\":\"release\",\"attachment\":{\"container_id\":\"a\",\"interface\":\"eth0\"}}\n", "version 99"),
            (b"{\"version\":1,\"call\":\"release\",\"attachment\":{\"container_id\":\"../a\",\"interface\":\"eth0\"}}\n", "../a"),
            (b"{\"version\":1,\"call\":\"trace\",\"from\":\"10.0.0.1\",\"to\":\"10.96.0.1\"}\n", "to: "),
            (b"{\"version\":1,\"call\":\"trace\",\"from\":\"fd00::1\",\"to\":\"10.96.0.1:1/tcp\",\"live\":true}\n", "one family"),
            (b"{\"version\":1", "newline"),
        ];
        for (bytes, words) in cases {
            let answer = f.raw(bytes);
            assert!(
                answer.contains("badRequest") && answer.contains(words),
                "{answer}"
            );
        }
        let _reset_while_it_writes_is_fine =
            std::panic::catch_unwind(AssertUnwindSafe(|| f.raw(&long)));
        assert_eq!(f.raw(b""), "", "saying nothing is no request");
        // After all of that it still serves.
        let release = Call::Release {
            attachment: attachment("a"),
        };
        assert_eq!(f.call(release), Answer::Released);
    }

    #[test]
    fn a_lease_is_told_with_its_ports_and_none_as_none() {
        let f = Fixture::new();
        let lease = || {
            f.call(Call::Lease {
                attachment: attachment("a"),
            })
        };
        assert_eq!(lease(), Answer::Lease(Lease::default()));
        let port = r#"{"hostPort":8080,"containerPort":80}"#;
        let ports = vec![serde_json::from_str(port).unwrap()];
        let wanted = Wanted {
            ports: ports.clone(),
            ..Wanted::new(attachment("a"))
        };
        // Past the desk, which would wait for a kernel to serve the port.
        f.desk
            .pods()
            .leases()
            .allocate(&wanted, crate::clock::Moment::now())
            .unwrap();
        let addresses = vec!["10.1.0.2/32".parse().unwrap()];
        assert_eq!(lease(), Answer::Lease(Lease { addresses, ports }));
        let line = f.raw(
            b"{\"version\":1,\"call\":\"lease\",\"attachment\":{\"container_id\":\"b\",\"interface\":\"eth0\"}}\n",
        );
        assert_eq!(
            line,
            "{\"version\":1,\"answer\":\"lease\",\"addresses\":[]}\n"
        );
    }

    /// An ADD that is asked for once more must not end the lease by which its pod lives.
    #[test]
    fn host_ports_that_cannot_be_had_end_a_new_lease_alone() {
        let f = Fixture::new();
        let wanted = |who, port: u16| {
            let port = format!(r#"{{"hostPort":{port},"containerPort":80}}"#);
            Wanted {
                ports: vec![serde_json::from_str(&port).unwrap()],
                ..Wanted::new(attachment(who))
            }
        };
        let leases = f.desk.pods().leases();
        let now = crate::clock::Moment::now;
        leases.allocate(&wanted("old", 8080), now()).unwrap();
        // Nobody brings host ports into the kernel here.
        for (who, port) in [("old", 8080), ("new", 8081)] {
            let answer = f.call(Call::Allocate(Box::new(wanted(who, port))));
            assert!(matches!(answer, Answer::Error(_)), "{who}: {answer:?}");
        }
        assert!(leases.find(&attachment("old")).unwrap().is_some());
        assert_eq!(leases.count(), 1);
    }

    /// A release whose client has gone is not carried out: the client has queued it,
    /// and its attachment may be in use again.
    #[test]
    fn a_release_of_who_has_gone_ends_nothing() {
        let f = Fixture::new();
        let wanted = Wanted::new(attachment("a"));
        assert!(matches!(
            f.call(Call::Allocate(Box::new(wanted))),
            Answer::Allocated(_)
        ));
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let client = {
            let _inside = f.runtime.enter();
            Connected::new(&UnixStream::from_std(ours).unwrap()).unwrap()
        };
        assert!(client.is_there());
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(client.is_there(), "it still waits for the answer");
        drop(theirs);
        assert!(!client.is_there());
        let release = |there| f.desk.release(attachment("a"), move || there);
        assert_eq!(f.runtime.block_on(release(false)), Answer::Released);
        assert_eq!(f.desk.leases(), 1);
        assert_eq!(f.runtime.block_on(release(true)), Answer::Released);
        assert_eq!(f.desk.leases(), 0);
    }

    /// Half a line and then nothing is answered and counted; saying nothing at all is neither.
    #[test]
    fn who_is_too_slow_is_told_so() {
        let f = Fixture::new();
        let connect = || {
            let stream = std::os::unix::net::UnixStream::connect(f.socket()).unwrap();
            stream.set_read_timeout(Some(LINE_TIMEOUT * 2)).unwrap();
            stream
        };
        let (silent, mut slow) = (connect(), connect());
        slow.write_all(b"{\"version\"").unwrap();
        let said = |stream| std::io::read_to_string(stream).unwrap();
        let answer = said(slow);
        assert!(
            answer.contains("badRequest") && answer.contains("10 bytes without a newline"),
            "{answer}"
        );
        assert_eq!(said(silent), "");
    }

    #[test]
    fn a_socket_that_is_in_use_is_not_taken() {
        let f = Fixture::new();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let error = Server::bind(&f.socket()).unwrap_err().to_string();
        assert!(error.contains("another agent listens"), "{error}");
        // What a killed agent left is replaced.
        let left = f.dir.path().join("left.sock");
        drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
        assert!(left.exists());
        Server::bind(&left).unwrap();
    }
}
