//! One plugin at a time on an attachment.
//!
//! Runtimes see to it themselves, but one that is killed leaves its plugin
//! behind and starts another when it is back. Two ADDs at once, or a DEL beside
//! an ADD, would take away what the other has just made and leave an interface
//! whose address is free for the next pod. So each holds a lock from its first
//! look to its last step, the undoing included.
//!
//! The lock is a `flock()` on a file that only our own user can open, so that no
//! stranger holds it up, and the kernel takes it away with the process. The file
//! stands beside the agent's socket, where nothing outlives a boot, and is
//! removed by whoever holds it: what is locked counts only while it still has
//! its name. Nothing is ever written into it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use ferrule_model::names::Attachment;
use ferrule_model::ownership;
use rustix::fs::{FlockOperation, Mode, OFlags, Stat, flock, fstat, major, minor, open};
use rustix::io::Errno;

use crate::failure::{Code, Failure};

/// Folder beside the agent's socket in which the locks are.
const FOLDER: &str = "locks";

/// How long ADD and DEL wait: longer than the agent may take for one call. The
/// runtime tries again after that.
pub(crate) const PATIENCE: Duration = Duration::from_secs(25);

/// For whoever does not wait.
pub(crate) const NOT_AT_ALL: Duration = Duration::ZERO;

/// Pause between two tries.
const RETRY: Duration = Duration::from_millis(5);

/// Why an attachment is not locked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Another is at work on it.
    #[error(
        "another ferrule{} is at work on {attachment}, and was for {waited:?}: the runtime has to try again; if it does not end, end that process (lock {})", process(*holder), path.display()
    )]
    Held {
        attachment: Box<Attachment>,
        path: PathBuf,
        holder: Option<u32>,
        waited: Duration,
    },
    /// There is no agent yet, so nobody has leased anything.
    #[error(
        "folder {} of the agent's socket does not exist: no ferrule-agent has run on this node since it was booted; the pod is started again when one does", path.display()
    )]
    NoAgent { path: PathBuf },
    /// A stranger could hold what is in there.
    #[error(
        "{} is no folder that only user {user} can write to: remove it, and ferrule makes it anew", path.display()
    )]
    Foreign { path: PathBuf, user: u32 },
    /// The file system refuses.
    #[error(
        "cannot lock {attachment}: {} cannot be used: {source}; is its file system full or read-only?", path.display()
    )]
    Unusable {
        attachment: Box<Attachment>,
        path: PathBuf,
        source: io::Error,
    },
}

/// Who it is, if that is known.
fn process(holder: Option<u32>) -> String {
    holder.map_or_else(String::new, |pid| format!(", process {pid},"))
}

impl From<LockError> for Failure {
    fn from(error: LockError) -> Self {
        let code = match &error {
            LockError::Held { .. } | LockError::NoAgent { .. } => Code::TryAgainLater,
            LockError::Foreign { .. } | LockError::Unusable { .. } => Code::Io,
        };
        Self::new(code, error.to_string())
    }
}

/// An attachment that is locked for as long as this lives.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    /// Closed after the file was removed: who finds it then finds no lock.
    _file: OwnedFd,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // One that stays is taken over by the next on this attachment.
        let _ = fs::remove_file(&self.path);
    }
}

/// Locks an attachment. `socket` is the agent's.
///
/// # Errors
/// [`LockError`], where another has it after `patience`.
pub(crate) fn take(
    socket: &Path,
    attachment: &Attachment,
    patience: Duration,
) -> Result<Lock, LockError> {
    let unusable = |path: &Path, source: io::Error| LockError::Unusable {
        attachment: Box::new(attachment.clone()),
        path: path.to_owned(),
        source,
    };
    let beside = socket.parent().unwrap_or(Path::new("/"));
    let folder = beside.join(FOLDER);
    if let Err(error) = make(&folder) {
        return Err(match error.kind() {
            io::ErrorKind::NotFound => LockError::NoAgent {
                path: beside.to_owned(),
            },
            _ => unusable(&folder, error),
        });
    }
    if !is_ours(&folder).map_err(|error| unusable(&folder, error))? {
        return Err(LockError::Foreign {
            path: folder,
            user: own_user(),
        });
    }
    let path = folder.join(ownership::host_veth_name(attachment).as_str());
    let deadline = Instant::now() + patience;
    loop {
        let file = open_file(&path).map_err(|errno| unusable(&path, errno.into()))?;
        let tried = flock(&file, FlockOperation::NonBlockingLockExclusive);
        match tried {
            Ok(()) if is_named(&file, &path) => return Ok(Lock { path, _file: file }),
            // Who had it has removed it.
            Ok(()) | Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(errno) => return Err(unusable(&path, errno.into())),
        }
        if Instant::now() >= deadline {
            return Err(LockError::Held {
                attachment: Box::new(attachment.clone()),
                holder: holder(&file),
                path,
                waited: patience,
            });
        }
        if tried.is_err() {
            thread::sleep(RETRY);
        }
    }
}

fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes the folder, if it is not there; never the agent's own.
fn make(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Whether it is a folder in which no other user makes files.
fn is_ours(folder: &Path) -> io::Result<bool> {
    let metadata = fs::symlink_metadata(folder)?;
    Ok(metadata.is_dir() && metadata.uid() == own_user() && metadata.mode() & 0o022 == 0)
}

fn open_file(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    open(path, flags, Mode::RUSR | Mode::WUSR)
}

/// Whether a file still stands at the path at which it was opened.
fn is_named(file: impl AsFd, path: &Path) -> bool {
    let opened = fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
    let named = fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()));
    matches!((opened, named), (Ok(opened), Ok(named)) if opened == named)
}

/// The process that has locked a file, as far as `/proc/locks` tells.
fn holder(file: impl AsFd) -> Option<u32> {
    let stat = fstat(file).ok()?;
    let all = fs::read_to_string("/proc/locks").ok()?;
    all.lines().find_map(|line| holder_in(line, &stat))
}

/// `1: FLOCK  ADVISORY  WRITE 1234 00:1a:5678 0 EOF`
fn holder_in(line: &str, stat: &Stat) -> Option<u32> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let place = format!(
        "{:02x}:{:02x}:{}",
        major(stat.st_dev),
        minor(stat.st_dev),
        stat.st_ino
    );
    match words.as_slice() {
        [_, "FLOCK", _, _, process, at, ..] if *at == place => process.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use ferrule_model::names::{ContainerId, IfName};

    use super::*;

    fn attachment(container: &str) -> Attachment {
        Attachment {
            container_id: ContainerId::try_from(container.to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        }
    }

    #[test]
    fn one_at_a_time_and_nothing_stays() {
        let run = tempfile::tempdir().unwrap();
        let socket = run.path().join("agent.sock");
        let lock = take(&socket, &attachment("a"), NOT_AT_ALL).unwrap();
        // Another attachment does not wait.
        drop(take(&socket, &attachment("b"), NOT_AT_ALL).unwrap());
        let wait = || take(&socket, &attachment("a"), Duration::from_millis(30)).unwrap_err();
        let us = format!("process {}, is at work on a/eth0", std::process::id());
        // While others lock and unlock, the kernel's list may leave one out.
        let said = |error: &LockError| error.to_string().contains(&us);
        assert!((0..100).any(|_| said(&wait())), "{}", wait());
        assert_eq!(Failure::from(wait()).code(), Code::TryAgainLater);
        drop(lock);
        drop(take(&socket, &attachment("a"), NOT_AT_ALL).unwrap());
        let folder = run.path().join(FOLDER);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        let mode = fs::metadata(&folder).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn what_a_killed_one_left_holds_nobody_up() {
        let run = tempfile::tempdir().unwrap();
        let socket = run.path().join("agent.sock");
        let lock = take(&socket, &attachment("a"), NOT_AT_ALL).unwrap();
        let path = lock.path.clone();
        drop(lock);
        fs::write(&path, "").unwrap();
        drop(take(&socket, &attachment("a"), NOT_AT_ALL).unwrap());
        assert!(!path.exists());
    }

    /// Without the look at the name, who has waited would lock a file that the
    /// next does not find.
    #[test]
    fn eight_at_once_are_never_two_inside() {
        let run = tempfile::tempdir().unwrap();
        let socket = run.path().join("agent.sock");
        let inside = std::sync::atomic::AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _lock = take(&socket, &attachment("a"), PATIENCE).unwrap();
                        let before = inside.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        assert_eq!(before, 0);
                        thread::yield_now();
                        inside.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let run = tempfile::tempdir().unwrap();
        let socket = run.path().join("agent.sock");
        let folder = run.path().join(FOLDER);
        let refused = || take(&socket, &attachment("a"), NOT_AT_ALL).unwrap_err();
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(refused(), LockError::Foreign { .. }));
        fs::remove_dir(&folder).unwrap();
        std::os::unix::fs::symlink("/root", &folder).unwrap();
        assert!(matches!(refused(), LockError::Foreign { .. }));
        fs::remove_file(&folder).unwrap();
        let _lock = take(&socket, &attachment("a"), NOT_AT_ALL).unwrap();
        // Nor does it follow a link instead of a lock.
        let lock = ownership::host_veth_name(&attachment("b"));
        std::os::unix::fs::symlink("/etc/none", folder.join(lock.as_str())).unwrap();
        let error = take(&socket, &attachment("b"), NOT_AT_ALL).unwrap_err();
        assert!(matches!(error, LockError::Unusable { .. }), "{error}");
    }

    #[test]
    fn without_an_agent_there_is_nothing_to_lock() {
        let socket = Path::new("/run/ferrule-never-was/agent.sock");
        let error = take(socket, &attachment("a"), NOT_AT_ALL).unwrap_err();
        assert!(matches!(error, LockError::NoAgent { .. }), "{error}");
        assert_eq!(Failure::from(error).code(), Code::TryAgainLater);
    }
}
