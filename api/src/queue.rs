//! Releases that wait on disk for the agent.
//!
//! A DEL must succeed with the agent down (invariant 8), so the plugin leaves
//! a file for each attachment that ended: [`RELEASE_QUEUE`] below the state
//! folder, one JSON object, its name derived from the attachment. A file is
//! there whole or not at all.
//!
//! How the two sides keep out of each other's way: the agent takes its lock
//! over the leases, looks whether the file still exists, ends the lease, makes
//! that durable, calls [`remove`], and lets go of the lock. An ADD that uses
//! an attachment anew calls [`withdraw`] *before* it asks the agent for a
//! lease; so the agent either ended the old lease before it gave the new one,
//! or does not find the file any more.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ferrule_model::names::Attachment;
use ferrule_model::ownership;

use crate::RELEASE_QUEUE;

/// Most entries that one [`list`] returns. More wait for the next call.
pub const MAX_LISTED: usize = 4096;

/// Longest file that is read, in bytes; a valid one is far shorter.
const MAX_FILE: u64 = 4096;

/// A temporary file this old was left by a plugin that was killed.
const STALE: Duration = Duration::from_hours(1);

/// Why the queue could not be written or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct QueueError {
    /// What was tried.
    action: &'static str,
    /// On what.
    path: PathBuf,
    /// What the kernel said.
    source: io::Error,
}

impl QueueError {
    /// For `map_err`.
    fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self {
            action,
            path,
            source,
        }
    }
}

fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join(RELEASE_QUEUE)
}

fn file_name(attachment: &Attachment) -> String {
    format!("{}.json", ownership::host_veth_name(attachment))
}

/// Leaves a release for the agent; durable when this returns.
///
/// Pushing the same attachment twice leaves one file. The folder is made with
/// mode 0700 if it is missing.
///
/// # Errors
/// When anything could not be written; the release is then *not* queued.
pub fn push(state_dir: &Path, attachment: &Attachment) -> Result<PathBuf, QueueError> {
    let folder = folder(state_dir);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&folder)
        .map_err(QueueError::at("make the folder", &folder))?;
    let path = folder.join(file_name(attachment));
    // Two DELs of one attachment may run at the same time, so the name has the
    // process in it; the last to rename wins, with the same content.
    let temporary = folder.join(format!(
        ".{}.{}.tmp",
        ownership::host_veth_name(attachment),
        std::process::id()
    ));
    let written = write_durably(&temporary, &path, &folder, attachment);
    if written.is_err() {
        // Best effort: list() sweeps what stays.
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| path)
}

/// Temporary file, fsync, rename, fsync of the folder: a power cut leaves the
/// whole file or none.
fn write_durably(
    temporary: &Path,
    path: &Path,
    folder: &Path,
    attachment: &Attachment,
) -> Result<(), QueueError> {
    let json = serde_json::to_vec(attachment)
        .map_err(io::Error::from)
        .map_err(QueueError::at("write as JSON", path))?;
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(temporary)?;
        file.write_all(&json)?;
        file.sync_all()
    };
    write().map_err(QueueError::at("write", temporary))?;
    fs::rename(temporary, path).map_err(QueueError::at("rename into place", path))?;
    sync_folder(folder).map_err(QueueError::at("sync the folder", folder))
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Releases that wait, at most [`MAX_LISTED`] of them, in no order.
///
/// A file that is no release (garbage, too long, not named after its content)
/// is passed over and stays for a person to look at. Temporary files older
/// than an hour are removed.
///
/// # Errors
/// When the folder cannot be read. A folder that does not exist is empty.
pub fn list(state_dir: &Path) -> Result<Vec<(PathBuf, Attachment)>, QueueError> {
    let folder = folder(state_dir);
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(QueueError::at("read the folder", &folder)(error)),
    };
    let mut waiting = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(QueueError::at("read the folder", &folder))?
            .path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("json") => waiting.extend(read(&path).map(|attachment| (path, attachment))),
            Some("tmp") => sweep(&path),
            _ => {}
        }
        if waiting.len() == MAX_LISTED {
            break;
        }
    }
    Ok(waiting)
}

/// The attachment in a file, if the file is one of ours and whole.
fn read(path: &Path) -> Option<Attachment> {
    // Neither a link that leads elsewhere nor a pipe that never ends.
    if !fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_FILE)
        .read_to_end(&mut text)
        .ok()?;
    let attachment: Attachment = serde_json::from_slice(&text).ok()?;
    (path.file_name()?.to_str()? == file_name(&attachment)).then_some(attachment)
}

fn sweep(path: &Path) {
    let old = fs::symlink_metadata(path)
        .and_then(|metadata| metadata.modified())
        .is_ok_and(|modified| {
            SystemTime::now()
                .duration_since(modified)
                .is_ok_and(|age| age > STALE)
        });
    if old {
        // Best effort: the next call tries again.
        let _ = fs::remove_file(path);
    }
}

/// Takes a release out of the queue, once it has been carried out durably.
///
/// The folder is not synced: a file that comes back after a power cut asks for
/// a release that is already done, unless its attachment was used again in
/// between, which [`withdraw`] guards against with a sync.
///
/// # Errors
/// When the file exists and cannot be removed. A file that is gone is fine.
pub fn remove(path: &Path) -> Result<(), QueueError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(QueueError::at("remove", path)(error)),
    }
}

/// Takes an attachment's release back, because the attachment is used again.
///
/// To be called before a new lease is asked for. Costs one failed `unlink()`
/// when nothing waits, which is nearly always.
///
/// # Errors
/// When the file exists and cannot be removed durably.
pub fn withdraw(state_dir: &Path, attachment: &Attachment) -> Result<(), QueueError> {
    let folder = folder(state_dir);
    let path = folder.join(file_name(attachment));
    match fs::remove_file(&path) {
        Ok(()) => sync_folder(&folder).map_err(QueueError::at("sync the folder", &folder)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(QueueError::at("remove", &path)(error)),
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
    fn what_is_pushed_is_listed_until_removed() {
        let state = tempfile::tempdir().unwrap();
        assert!(list(state.path()).unwrap().is_empty());
        let path = push(state.path(), &attachment("a")).unwrap();
        assert_eq!(push(state.path(), &attachment("a")).unwrap(), path);
        push(state.path(), &attachment("b")).unwrap();
        let mut waiting = list(state.path()).unwrap();
        waiting.sort();
        let mut containers: Vec<_> = waiting
            .iter()
            .map(|(_, attachment)| attachment.container_id.as_str())
            .collect();
        containers.sort_unstable();
        assert_eq!(containers, ["a", "b"]);
        let mode = fs::metadata(path.parent().unwrap())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        remove(&path).unwrap();
        remove(&path).unwrap();
        withdraw(state.path(), &attachment("b")).unwrap();
        withdraw(state.path(), &attachment("b")).unwrap();
        assert!(list(state.path()).unwrap().is_empty());
        // No temporary file stays either.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn garbage_is_passed_over() {
        let state = tempfile::tempdir().unwrap();
        let good = push(state.path(), &attachment("a")).unwrap();
        let folder = good.parent().unwrap();
        fs::write(folder.join("x.json"), b"\xff").unwrap();
        fs::write(folder.join("empty.json"), b"").unwrap();
        fs::write(folder.join("long.json"), vec![b' '; 1 << 20]).unwrap();
        // A valid attachment under a name that is not its own.
        fs::copy(&good, folder.join("other.json")).unwrap();
        fs::create_dir(folder.join("folder.json")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", folder.join("link.json")).unwrap();
        fs::write(folder.join(".fresh.1.tmp"), b"").unwrap();
        let leftover = folder.join(".stale.1.tmp");
        let old = SystemTime::now() - 2 * STALE;
        File::create(&leftover).unwrap().set_modified(old).unwrap();
        assert_eq!(
            list(state.path()).unwrap(),
            [(good.clone(), attachment("a"))]
        );
        assert!(!leftover.exists());
        assert!(folder.join(".fresh.1.tmp").exists());
    }

    #[test]
    fn a_queue_that_cannot_be_written_says_so() {
        let state = tempfile::tempdir().unwrap();
        let file = state.path().join("file");
        fs::write(&file, "").unwrap();
        let error = push(&file, &attachment("a")).unwrap_err();
        assert!(error.to_string().contains("releases"), "{error}");
        assert!(list(&file).is_err());
    }
}
