//! The path of the agent's socket.
//!
//! [`judge`] is for the check and for the server alike: what it allows to be
//! replaced is a socket that nobody listens on, and nothing else.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use super::folder;
use super::{Finding, Outcome};
use crate::lock;

const CHECK: &str = "socket";

/// Bytes that an address has room for, without the one that ends it (`sockaddr_un`).
const LONGEST: usize = 107;

/// What stands at the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing.
    Free,
    /// The socket of an agent that is gone.
    Left,
}

/// Why the agent cannot listen at a path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// The path is too long.
    #[error(
        "socket path {} has {} bytes, and the kernel takes {LONGEST}; give a shorter --socket",
        path.display(), path.as_os_str().len()
    )]
    Long {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error(
        "socket path {} is {what}, which was left as it is; move it aside, or give another --socket",
        path.display()
    )]
    Taken {
        /// The path.
        path: PathBuf,
        /// What stands there.
        what: &'static str,
    },
    /// An agent is there.
    #[error(
        "another agent listens on {}; stop it, or give this one another --socket",
        path.display()
    )]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// Nothing can be made there.
    #[error(
        "socket path {}: folder {} cannot be written to: {source}; run the agent as root, or give \
         another --socket",
        path.display(), folder.display()
    )]
    Folder {
        /// The path.
        path: PathBuf,
        /// The folder in question.
        folder: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It cannot be looked at.
    #[error(
        "socket path {}: {source}; run the agent as root, or give another --socket",
        path.display()
    )]
    Unseen {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What stands at a path that an agent is to listen at. Changes nothing.
///
/// # Errors
/// [`SocketError`], when it cannot.
pub(crate) fn judge(path: &Path) -> Result<Place, SocketError> {
    let owned = || path.to_owned();
    if path.as_os_str().as_bytes().len() > LONGEST {
        return Err(SocketError::Long { path: owned() });
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    if let Err((folder, source)) = folder::find(parent) {
        return Err(SocketError::Folder {
            path: owned(),
            folder,
            source,
        });
    }
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Place::Free),
        Err(source) => {
            return Err(SocketError::Unseen {
                path: owned(),
                source,
            });
        }
    };
    // To connect to a file that is no socket is refused just as to one that nobody listens on.
    if !kind.is_socket() {
        let what = if kind.is_dir() {
            "a folder"
        } else if kind.is_symlink() {
            "a symbolic link"
        } else {
            "a file that is no socket"
        };
        return Err(SocketError::Taken {
            path: owned(),
            what,
        });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::Live { path: owned() }),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused => Ok(Place::Left),
            io::ErrorKind::NotFound => Ok(Place::Free),
            _ => Err(SocketError::Unseen {
                path: owned(),
                source: error,
            }),
        },
    }
}

/// For an agent that is to listen there.
pub(super) fn check(path: &Path) -> Finding {
    finding(judge(path), path)
}

/// Likewise, with patience for an agent that was killed a moment ago: a child of it
/// that is about to become another program listens as well until then.
pub(super) fn check_patiently(path: &Path) -> Finding {
    let patience = Instant::now() + lock::PATIENCE;
    loop {
        match judge(path) {
            Err(SocketError::Live { .. }) if Instant::now() < patience => {
                thread::sleep(lock::RETRY);
            }
            judged => return finding(judged, path),
        }
    }
}

fn finding(judged: Result<Place, SocketError>, path: &Path) -> Finding {
    match judged {
        Ok(Place::Free) => Finding::ok(CHECK, format!("{} is free", path.display())),
        Ok(Place::Left) => Finding::ok(
            CHECK,
            format!("{} was left by an agent that is gone", path.display()),
        ),
        Err(error) => Finding::of_error(CHECK, Outcome::Failed, &error.to_string()),
    }
}

/// For who asks while an agent may run: that one listens is good news then.
pub(super) fn check_beside_an_agent(path: &Path) -> Finding {
    match judge(path) {
        Err(SocketError::Live { path }) => {
            Finding::ok(CHECK, format!("an agent listens on {}", path.display()))
        }
        _ => check(path),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_socket_that_nobody_listens_on_may_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        assert_eq!(judge(&path).unwrap(), Place::Free);
        assert_eq!(
            judge(&dir.path().join("a/b/agent.sock")).unwrap(),
            Place::Free
        );
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(judge(&path), Err(SocketError::Live { .. })));
        assert_eq!(check(&path).result, Outcome::Failed);
        assert_eq!(check_beside_an_agent(&path).result, Outcome::Ok);
        drop(listener);
        assert_eq!(judge(&path).unwrap(), Place::Left);
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        let error = judge(&file).unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        let error = judge(dir.path()).unwrap_err().to_string();
        assert!(error.contains("is a folder"), "{error}");
        let error = judge(&file.join("agent.sock")).unwrap_err().to_string();
        assert!(error.contains("cannot be written to"), "{error}");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(judge(&link).is_err());
    }

    #[test]
    fn a_path_that_is_too_long_is_measured() {
        let fits = Path::new("/tmp").join("x".repeat(LONGEST - 5));
        assert_eq!(judge(&fits).unwrap(), Place::Free);
        let error = judge(&Path::new("/tmp").join("x".repeat(LONGEST - 4)));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("108 bytes") && error.contains("107"),
            "{error}"
        );
    }
}
