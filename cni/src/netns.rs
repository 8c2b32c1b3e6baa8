//! Into a pod's network namespace and back.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use crate::failure::{Code, Failure};

/// `O_NONBLOCK`.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();

/// The calling thread's own namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// Why a namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetnsError {
    #[error(
        "network namespace {} (CNI_NETNS) does not exist: the container is gone", path.display()
    )]
    Gone { path: PathBuf },
    #[error(
        "cannot open network namespace {} (CNI_NETNS): {source}; it must be the path of one", path.display()
    )]
    Open { path: PathBuf, source: io::Error },
    #[error(
        "network namespace {} (CNI_NETNS) is the node's own: a pod of the host's network gets no interface", path.display()
    )]
    Host { path: PathBuf },
    #[error(
        "cannot enter network namespace {} (CNI_NETNS): {source}; it must be the path of one", path.display()
    )]
    Enter { path: PathBuf, source: io::Error },
    #[error("cannot look at the node's own network namespace: {source}")]
    Own { source: io::Error },
    #[error("cannot return to the node's network namespace: {source}")]
    Return { source: io::Error },
}

impl From<NetnsError> for Failure {
    fn from(error: NetnsError) -> Self {
        let code = match &error {
            NetnsError::Gone { .. } => Code::UnknownContainer,
            NetnsError::Host { .. } | NetnsError::Enter { .. } => Code::InvalidEnvironment,
            NetnsError::Open { .. } | NetnsError::Own { .. } | NetnsError::Return { .. } => {
                Code::Io
            }
        };
        Self::new(code, error.to_string())
    }
}

/// A pod's network namespace, and the way back to the host's.
#[derive(Debug)]
pub(crate) struct Netns {
    path: PathBuf,
    pod: File,
    host: File,
}

impl Netns {
    /// Opens the namespace at `path`, which must not be the one we are in.
    pub(crate) fn open(path: &Path) -> Result<Self, NetnsError> {
        let open_failed = |source| NetnsError::Open {
            path: path.to_owned(),
            source,
        };
        let own_failed = |source| NetnsError::Own { source };
        // Who names a pipe in its place must not keep us waiting for the other end.
        let mut options = File::options();
        options.read(true).custom_flags(NONBLOCK);
        let pod = options.open(path).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                NetnsError::Gone {
                    path: path.to_owned(),
                }
            } else {
                open_failed(source)
            }
        })?;
        let host = File::open(OWN).map_err(own_failed)?;
        let pod_id = pod.metadata().map_err(open_failed)?;
        let host_id = host.metadata().map_err(own_failed)?;
        if (pod_id.dev(), pod_id.ino()) == (host_id.dev(), host_id.ino()) {
            return Err(NetnsError::Host {
                path: path.to_owned(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            pod,
            host,
        })
    }

    /// For `IFLA_NET_NS_FD`; valid while `self` lives.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.pod.as_raw_fd()
    }

    /// Does `work` with the calling thread inside the pod's namespace.
    ///
    /// Sockets opened there stay there; `/proc/sys/net` is the pod's. A file
    /// that is no network namespace is found out here: `setns()` refuses it.
    pub(crate) fn inside<T>(&self, work: impl FnOnce() -> T) -> Result<T, NetnsError> {
        enter(self.pod.as_fd()).map_err(|source| NetnsError::Enter {
            path: self.path.clone(),
            source,
        })?;
        let done = work();
        // A panic in `work` ends the process, so this is the one way out.
        enter(self.host.as_fd()).map_err(|source| NetnsError::Return { source })?;
        Ok(done)
    }
}

fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    move_into_thread_name_spaces(namespace, ThreadNameSpaceType::NETWORK).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn a_pipe_in_place_of_a_namespace_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let entered = Netns::open(&path).and_then(|netns| netns.inside(|| ()));
        let error = entered.unwrap_err();
        let said = error.to_string();
        assert!(
            said.contains("cannot enter") && said.contains("CNI_NETNS"),
            "{said}"
        );
    }
}
