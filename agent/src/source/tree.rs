//! What is below a folder: files that may be manifests, and other folders.
//!
//! Symbolic links are followed, never in circles. Nothing is opened here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A file that was written less than this ago may still be half of itself.
pub(crate) const SETTLE: Duration = Duration::from_millis(50);

/// What tells a changed file from an unchanged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    pub(super) size: u64,
    inode: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            size: metadata.len(),
            inode: metadata.ino(),
        }
    }

    /// Whether the file was written so lately that its writer may not be done. A
    /// time in the future (somebody set the clock back) is no reason to wait.
    pub(super) fn is_fresh(&self) -> bool {
        let (seconds, nanoseconds) = self.modified;
        let modified = u64::try_from(seconds)
            .map(Duration::from_secs)
            .unwrap_or_default()
            + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or_default());
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH + modified)
            .is_ok_and(|age| age < SETTLE)
    }
}

/// What is below a folder.
#[derive(Debug, Default)]
pub(super) struct Tree {
    /// The folder itself and those below it.
    folders: Vec<PathBuf>,
    /// Manifests, by path.
    pub(super) manifests: BTreeMap<PathBuf, Stamp>,
    /// What has a manifest's name and is no file, and what it is.
    pub(super) no_files: BTreeMap<PathBuf, &'static str>,
    /// Folders below it that cannot be listed, and why.
    pub(super) closed: BTreeMap<PathBuf, io::Error>,
}

/// The folder and those below it, each once however many symbolic links lead to it.
///
/// # Errors
/// When `root` or one below it cannot be listed.
pub(crate) fn folders(root: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(Tree::below(root)?.open()?.folders)
}

impl Tree {
    /// # Errors
    /// When `root` itself cannot be listed.
    pub(super) fn below(root: &Path) -> io::Result<Self> {
        let mut known = BTreeSet::new();
        let mut tree = Self::default();
        // In the order of paths: by which of several links a folder is entered must not
        // depend on the order in which a file system lists them.
        let mut waiting = BTreeSet::from([root.to_owned()]);
        while let Some(folder) = waiting.pop_first() {
            match tree.take(&folder, &mut known, &mut waiting) {
                Ok(()) => {}
                Err(error) if folder == root => return Err(error),
                Err(error) => {
                    tree.closed.insert(folder, error);
                }
            }
        }
        Ok(tree)
    }

    /// A single file, whatever it is called.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub(super) fn of_file(path: &Path) -> io::Result<Self> {
        let mut tree = Self::default();
        tree.take_file(path.to_owned())?;
        Ok(tree)
    }

    /// A link that leads nowhere has the stamp of the link: it is a manifest that
    /// cannot be read, and not one that was removed.
    fn take_file(&mut self, path: PathBuf) -> io::Result<()> {
        match fs::metadata(&path).or_else(|_| fs::symlink_metadata(&path)) {
            Ok(metadata) if metadata.is_file() || metadata.is_symlink() => {
                self.manifests.insert(path, Stamp::of(&metadata));
            }
            Ok(metadata) => {
                self.no_files.insert(path, what_it_is(metadata.file_type()));
            }
            // It is gone since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn take(
        &mut self,
        folder: &Path,
        known: &mut BTreeSet<(u64, u64)>,
        waiting: &mut BTreeSet<PathBuf>,
    ) -> io::Result<()> {
        let metadata = fs::metadata(folder)?;
        if !known.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        for path in visible(folder)? {
            if path.is_dir() {
                waiting.insert(path);
            } else if is_manifest(&path) {
                self.take_file(path)?;
            }
        }
        self.folders.push(folder.to_owned());
        Ok(())
    }

    /// The tree, if everything in it could be listed.
    pub(super) fn open(self) -> io::Result<Self> {
        match self.closed.iter().next() {
            None => Ok(self),
            Some((path, error)) => Err(io::Error::new(
                error.kind(),
                format!("subfolder {}: {error}", path.display()),
            )),
        }
    }
}

/// What is in a folder, less what editors and kubelet keep to themselves:
/// names that begin with a dot (`..data` of a mounted `ConfigMap`).
fn visible(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

/// What is no file must not be opened: who opens a FIFO waits for its writer, and
/// some devices act on it.
fn what_it_is(kind: FileType) -> &'static str {
    if kind.is_fifo() {
        "is a FIFO and no file"
    } else if kind.is_socket() {
        "is a socket and no file"
    } else {
        "is a device and no file"
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| {
        ["yaml", "yml", "json"]
            .iter()
            .any(|known| extension.eq_ignore_ascii_case(known))
    })
}
