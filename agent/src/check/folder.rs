//! Whether something can be made in a folder that may not exist yet.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access, statvfs};

/// Where a folder is, or will be.
#[derive(Debug)]
pub(super) enum Place {
    /// It exists.
    There,
    /// It will be made in this one.
    WillBeMade(PathBuf),
}

/// Finds a folder, or the one that it can be made in.
///
/// # Errors
/// What is in the way, and where.
pub(super) fn find(path: &Path) -> Result<Place, (PathBuf, io::Error)> {
    let at = |path: &Path, error: io::Error| (path.to_owned(), error);
    for ancestor in path.ancestors() {
        let ancestor = if ancestor.as_os_str().is_empty() {
            Path::new(".")
        } else {
            ancestor
        };
        match std::fs::metadata(ancestor) {
            Ok(metadata) if !metadata.is_dir() => {
                return Err(at(ancestor, rustix::io::Errno::NOTDIR.into()));
            }
            Ok(_) => {
                let rights = Access::WRITE_OK | Access::EXEC_OK;
                access(ancestor, rights).map_err(|errno| at(ancestor, errno.into()))?;
                return Ok(if ancestor == path {
                    Place::There
                } else {
                    Place::WillBeMade(ancestor.to_owned())
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(ancestor, error)),
        }
    }
    Err(at(path, io::ErrorKind::NotFound.into()))
}

/// Bytes that we may still write there, if that can be told.
pub(super) fn free(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|ancestor| ancestor.exists())?;
    let numbers = statvfs(existing).ok()?;
    // What has no blocks has no limit.
    (numbers.f_blocks > 0).then(|| numbers.f_bavail.saturating_mul(numbers.f_frsize))
}
