//! What only one agent at a time may have.
//!
//! The state folder is locked as a whole, by a lock that the kernel takes away
//! with the process. What lies in the kernel (nftables table, VIP device) has no
//! file to lock: there, a name among the abstract Unix sockets stands for it,
//! which belong to a network namespace as these things do. Anybody in the
//! namespace may take such a name, so who holds it counts only if it is root or
//! the same user as we are.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tracing::warn;

use crate::leases::file::remedy;

/// How long the lock of an agent that is gone may outlive it: in a child that was
/// about to become another program.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Pause between two tries.
pub(crate) const RETRY: Duration = Duration::from_millis(50);

/// Why something cannot be had. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// The folder is not there, or not ours to open.
    #[error("state folder {}: cannot open it: {source}; {}", path.display(), remedy(source))]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another agent has the folder.
    #[error(
        "state folder {} is in use by another ferrule-agent; stop that one, or give this one \
         another --state-dir",
        path.display()
    )]
    FolderHeld {
        /// The folder.
        path: PathBuf,
    },
    /// Another agent has the table or device.
    #[error(
        "{what} {name} of this network namespace is in use by another ferrule-agent, process {pid}; \
         stop that one, or give this one another {option}"
    )]
    NameHeld {
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
        /// Who has it.
        pid: i32,
        /// The setting.
        option: &'static str,
    },
    /// The kernel refused.
    #[error(
        "cannot mark {what} {name} as in use: {source}; stop other agents of this node by hand"
    )]
    Name {
        /// What it names.
        what: &'static str,
        /// The name.
        name: String,
        /// Why not.
        source: io::Error,
    },
}

/// Locks a folder until the file is dropped.
///
/// # Errors
/// [`LockError`], after ten seconds where another has it.
pub(crate) fn folder(path: &Path) -> Result<File, LockError> {
    let failed = |source| LockError::Folder {
        path: path.to_owned(),
        source,
    };
    let folder = File::open(path).map_err(failed)?;
    let patience = Instant::now() + PATIENCE;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(folder),
            Err(Errno::WOULDBLOCK) if Instant::now() < patience => thread::sleep(RETRY),
            Err(Errno::WOULDBLOCK) => {
                return Err(LockError::FolderHeld {
                    path: path.to_owned(),
                });
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// Whether a process has locked the folder; nothing is changed for longer than a moment.
pub(crate) fn is_held(path: &Path) -> bool {
    let Ok(folder) = File::open(path) else {
        return false;
    };
    flock(&folder, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

/// Something in the kernel that only one agent of a network namespace may own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owned<'a> {
    what: &'static str,
    option: &'static str,
    name: &'a str,
}

impl<'a> Owned<'a> {
    /// The nftables table.
    pub(crate) fn table(name: &'a str) -> Self {
        Self {
            what: "nftables table",
            option: "--nft-table",
            name,
        }
    }

    /// The VIP device.
    pub(crate) fn device(name: &'a str) -> Self {
        Self {
            what: "VIP device",
            option: "--vip-device",
            name,
        }
    }

    /// Long names are cut: an address has room for 107 bytes.
    fn address(self) -> Vec<u8> {
        let mut text = format!("ferrule-agent/{}/{}", self.option, self.name).into_bytes();
        text.truncate(107);
        text
    }

    /// Takes it for as long as the listener lives, which is to be given to
    /// [`turn_away`]. `None` where a stranger has the name: then nothing is known.
    ///
    /// # Errors
    /// [`LockError`], after ten seconds where another agent has it.
    pub(crate) fn take(self) -> Result<Option<UnixListener>, LockError> {
        let failed = |source| LockError::Name {
            what: self.what,
            name: self.name.to_owned(),
            source,
        };
        let address = SocketAddr::from_abstract_name(self.address()).map_err(failed)?;
        let patience = Instant::now() + PATIENCE;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(listener) => return Ok(Some(listener)),
                Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    return Err(failed(error));
                }
                Err(_) if Instant::now() < patience => thread::sleep(RETRY),
                Err(_) => break,
            }
        }
        match self.holder() {
            Some(holder) if is_one_of_us(holder) => Err(LockError::NameHeld {
                what: self.what,
                name: self.name.to_owned(),
                pid: holder.pid,
                option: self.option,
            }),
            holder => {
                warn!(
                    name = self.name,
                    uid = holder.map(|holder| holder.uid),
                    "a stranger's socket stands where an agent says that it owns the {}; \
                     whether a second agent runs cannot be told",
                    self.what
                );
                Ok(None)
            }
        }
    }

    /// The agent that has it at present.
    pub(crate) fn agent(self) -> Option<i32> {
        let holder = self.holder().filter(|holder| is_one_of_us(*holder))?;
        Some(holder.pid)
    }

    /// Who listens under the name; never waits.
    fn holder(self) -> Option<libc::ucred> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
        let address = SocketAddrUnix::new_abstract_name(&self.address()).ok()?;
        connect(&socket, &address).ok()?;
        credentials(&socket)
    }
}

fn is_one_of_us(holder: libc::ucred) -> bool {
    holder.uid == 0 || holder.uid == rustix::process::geteuid().as_raw()
}

/// Who listened at the other end; process 0 is one that we cannot see. (`rustix` has no
/// word for that one.)
fn credentials(socket: &OwnedFd) -> Option<libc::ucred> {
    let mut found = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut size = libc::socklen_t::try_from(size_of_val(&found)).ok()?;
    // SAFETY: the kernel writes at most `size` bytes into a struct of that size, which is valid
    // whatever its bytes are.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut found).cast(),
            &raw mut size,
        )
    };
    (outcome == 0).then_some(found)
}

/// Keeps what was taken, and takes those off the line who only wanted to know
/// whether it is. For as long as it runs.
pub(crate) async fn turn_away(listener: UnixListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    loop {
        if listener.accept().await.is_err() {
            tokio::time::sleep(RETRY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_one_agents() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_held(dir.path()));
        let held = folder(dir.path()).unwrap();
        assert!(is_held(dir.path()));
        drop(held);
        assert!(!is_held(dir.path()));
        let error = folder(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("none"), "{error}");
    }

    #[test]
    fn a_table_is_one_agents() {
        let name = format!("test-{}", std::process::id());
        let table = Owned::table(&name);
        assert_eq!(table.agent(), None);
        let held = table.take().unwrap().unwrap();
        assert_eq!(table.agent(), i32::try_from(std::process::id()).ok());
        assert_eq!(Owned::device(&name).agent(), None, "another kind");
        let error = table.take().unwrap_err().to_string();
        assert!(
            error.contains(&name) && error.contains("--nft-table"),
            "{error}"
        );
        drop(held);
        assert_eq!(table.agent(), None);
    }
}
