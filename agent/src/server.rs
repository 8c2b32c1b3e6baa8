//! The Unix socket: who may connect, how long and how much they may say.
//!
//! Everything that arrives here is untrusted. A connection that is too slow,
//! too long or makes no sense is answered with an error that says so where it
//! still can be, and closed; it never holds up another one.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ferrule_api::{Answer, CallError, ErrorCode, MAX_LINE, Reply, Request, VERSION};
use rustix::fs::Mode;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::pods::Pods;

/// Connections that are served at the same time; kubelet starts hundreds of pods at once.
const MAX_CONNECTIONS: usize = 1024;

/// How long a client may take for a line, and for taking the answer.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// A socket that is bound; its file goes with it.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Binds the socket with mode 0600. A file that a dead agent left is replaced.
    ///
    /// # Errors
    /// When another agent answers there, or the path cannot be used.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(folder)
                .with_context(|| format!("cannot make folder {}", folder.display()))?;
        }
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => bail!(
                "another agent listens on {}; stop it, or give this one another --socket",
                path.display()
            ),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path)
                    .with_context(|| format!("cannot replace {}", path.display()))?;
            }
            Err(_) => {}
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
    pub(crate) async fn serve(&self, pods: Arc<Pods>) {
        info!(socket = %self.path.display(), "listening");
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let pods = Arc::clone(&pods);
                    tokio::spawn(async move {
                        if let Err(error) = connection(stream, &pods).await {
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

async fn connection(stream: UnixStream, pods: &Arc<Pods>) -> anyhow::Result<()> {
    let peer = stream.peer_cred().context("SO_PEERCRED")?;
    let own = rustix::process::geteuid().as_raw();
    if peer.uid() != 0 && peer.uid() != own {
        warn!(uid = peer.uid(), pid = peer.pid(), "connection refused: not root");
        return Ok(());
    }
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let line = match timeout(LINE_TIMEOUT, read_line(&mut read)).await {
            Ok(line) => line?,
            Err(_) => bail!("no request within {LINE_TIMEOUT:?}"),
        };
        let Some(line) = line else {
            return Ok(());
        };
        let (answer, go_on) = match parse(&line) {
            Ok(request) => (Arc::clone(pods).call(request.call).await, true),
            Err(error) => (Answer::Error(error), false),
        };
        let reply = ferrule_api::encode(&Reply::new(answer))?;
        timeout(LINE_TIMEOUT, write.write_all(&reply)).await??;
        if !go_on {
            return Ok(());
        }
    }
}

/// One line, or `None` at the end. A line that is too long comes without its newline.
async fn read_line(
    read: &mut BufReader<tokio::net::unix::OwnedReadHalf>,
) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let limit = u64::try_from(MAX_LINE).unwrap_or(u64::MAX);
    let count = read.take(limit).read_until(b'\n', &mut line).await?;
    Ok((count > 0).then_some(line))
}

fn parse(line: &[u8]) -> Result<Request, CallError> {
    let bad = |message: String| CallError {
        code: ErrorCode::BadRequest,
        message,
    };
    if line.last() != Some(&b'\n') {
        return Err(bad(format!(
            "a request is one line of at most {MAX_LINE} bytes that ends with a newline; got {} bytes without one",
            line.len()
        )));
    }
    let request: Request = ferrule_api::decode(line).map_err(|error| bad(error.to_string()))?;
    if request.version != VERSION {
        return Err(bad(format!(
            "version {} of the protocol is not spoken here, only {VERSION}; install plugin and agent of one release",
            request.version
        )));
    }
    Ok(request)
}
