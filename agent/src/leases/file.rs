//! The lease file: found, judged, made and opened.
//!
//! Opening a redb file writes to it, and repairs what it takes for the traces of
//! a crash. So a file is judged before on a copy in memory, where every checksum
//! is verified: one that is damaged, or of a newer Ferrule, stays as it is, byte
//! for byte. A new file is made beside its place and renamed into it, so that a
//! disk that fills up meanwhile leaves no half of one.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use redb::backends::InMemoryBackend;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase as _, ReadableTable as _, StorageBackend,
    TableDefinition, TableError,
};
use rustix::io::Errno;

use super::{LEASES, RELEASED};

/// What is known about the file itself.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

/// Key of the file's version in [`META`]; a file without one has version 1.
const VERSION_KEY: &str = "version";

/// The version that we write. It grows when an older agent could not keep what
/// the file says: such an agent must refuse it.
const VERSION: u64 = 1;

/// How a file of redb begins.
const MAGIC: &[u8; 9] = b"redb\x1a\x0a\xa9\x0d\x0a";

/// Where both commit slots have the version of their format, and the newest that
/// this release of redb reads.
const FORMAT_OFFSETS: [usize; 2] = [64, 192];
const FORMAT: u8 = 3;

/// No lease file grows so large; reading more could take all memory.
const MAX_SIZE: u64 = 256 * 1024 * 1024;

/// Most memory that is kept of the file.
const CACHE: usize = 8 * 1024 * 1024;

/// How long the lock of an agent that is gone may outlive it.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
pub(super) const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Why the file cannot serve. Each says that, and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// The disk, or permissions.
    #[error("lease file {}: cannot {action}: {source}; {}", path.display(), remedy(source))]
    Disk {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What stands in it makes no sense.
    #[error(
        "lease file {} is damaged ({words}) and was left as it is; pods that run keep their network, \
         but which addresses are taken is not known: drain the node, move the file aside and start \
         the agent again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        words: String,
    },
    /// A later release wrote it.
    #[error(
        "lease file {} has {what} {version}, and this agent ({}) knows up to {known}; it was left as \
         it is: install the release of Ferrule that wrote it, or drain the node, move the file aside \
         and start the agent again",
        path.display(), env!("CARGO_PKG_VERSION")
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Which of its versions.
        what: &'static str,
        /// That version.
        version: u64,
        /// The newest one that we know.
        known: u64,
    },
    /// Another process has it open.
    #[error(
        "lease file {} is in use by another ferrule-agent; stop that one, or give this one another \
         --state-dir",
        path.display()
    )]
    Held {
        /// The file.
        path: PathBuf,
    },
}

impl FileError {
    /// Whether it may be over by itself: space is freed, a file system mounted anew.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Disk { source, .. } => is_full_or_read_only(source),
            Self::Damaged { .. } | Self::Newer { .. } | Self::Held { .. } => false,
        }
    }
}

fn is_full_or_read_only(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS))
}

/// What to do about a disk that refuses.
pub(crate) fn remedy(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => {
            "the disk is full: free some space there, it goes on by itself then"
        }
        Some(Errno::ROFS) => {
            "its file system is read-only: mount it for writing, or give another --state-dir"
        }
        Some(Errno::ACCESS | Errno::PERM) => {
            "run the agent as root, or give it a --state-dir of its own"
        }
        Some(Errno::ISDIR | Errno::NOTDIR) => "move aside what is in its place",
        Some(Errno::IO) => "the disk is failing: see the kernel's log",
        _ => "look at the disk and at the folder's permissions",
    }
}

/// What stands in a file.
#[derive(Debug, Default)]
pub(crate) struct Contents {
    /// Attachment and record of each lease, as JSON.
    pub(crate) leases: Vec<(String, String)>,
    /// Number and address of each release.
    pub(crate) released: Vec<(u64, String)>,
    /// Version of the file.
    pub(crate) version: u64,
}

/// Reads and judges a file without changing it; `None` when there is none. Who
/// does not hold the lock of the folder may see one that is being written.
///
/// # Errors
/// [`FileError`].
pub(crate) fn read(path: &Path) -> Result<Option<Contents>, FileError> {
    let disk = |action| {
        move |source| FileError::Disk {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let damaged = |words: String| FileError::Damaged {
        path: path.to_owned(),
        words,
    };
    // Before it is opened: a pipe in its place would keep us waiting for a writer.
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(disk("open it")(error)),
    };
    if metadata.is_dir() {
        return Err(disk("open it")(Errno::ISDIR.into()));
    }
    if !metadata.is_file() {
        let words = "it is a pipe, a socket or a device";
        return Err(disk("open it")(io::Error::other(words)));
    }
    let mut file = File::open(path).map_err(disk("open it"))?;
    if metadata.len() > MAX_SIZE {
        return Err(damaged(format!("it has {} bytes", metadata.len())));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(disk("read it"))?;
    check_head(&bytes).map_err(|problem| match problem {
        Head::Foreign(words) => damaged(words.to_owned()),
        Head::Newer(version) => FileError::Newer {
            path: path.to_owned(),
            what: "storage format",
            version: version.into(),
            known: FORMAT.into(),
        },
    })?;
    let contents = in_memory(&bytes).map_err(|error| damaged(error.to_string()))?;
    if contents.version > VERSION {
        return Err(FileError::Newer {
            path: path.to_owned(),
            what: "version",
            version: contents.version,
            known: VERSION,
        });
    }
    Ok(Some(contents))
}

/// What is wrong with the first bytes.
#[derive(Debug, PartialEq, Eq)]
enum Head {
    Foreign(&'static str),
    Newer(u8),
}

fn check_head(bytes: &[u8]) -> Result<(), Head> {
    if bytes.is_empty() {
        return Err(Head::Foreign("it is empty"));
    }
    if !bytes.starts_with(MAGIC) {
        return Err(Head::Foreign("it does not begin as a lease file does"));
    }
    // A format of the future has both slots in it; one alone is a flipped bit.
    match FORMAT_OFFSETS.map(|offset| bytes.get(offset).copied()) {
        [Some(one), Some(other)] if one == other && one > FORMAT => Err(Head::Newer(one)),
        [Some(_), Some(_)] => Ok(()),
        _ => Err(Head::Foreign("it is cut off")),
    }
}

/// Verifies every checksum, and repairs after a crash, in a copy.
fn in_memory(bytes: &[u8]) -> Result<Contents, redb::Error> {
    let memory = InMemoryBackend::new();
    let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    memory.set_len(length)?;
    memory.write(0, bytes)?;
    let database = Builder::new()
        .set_cache_size(CACHE)
        .set_check_integrity_on_open(true)
        .create_with_backend(memory)?;
    contents(&database)
}

fn contents(database: &Database) -> Result<Contents, redb::Error> {
    let read = database.begin_read()?;
    let mut contents = Contents {
        version: 1,
        ..Contents::default()
    };
    if let Some(meta) = existing(read.open_table(META))?
        && let Some(version) = meta.get(VERSION_KEY)?
    {
        contents.version = version.value();
    }
    if contents.version > VERSION {
        // What stands in its tables is not ours to read.
        return Ok(contents);
    }
    if let Some(table) = existing(read.open_table(LEASES))? {
        for entry in table.iter()? {
            let (key, value) = entry?;
            let entry = (key.value().to_owned(), value.value().to_owned());
            contents.leases.push(entry);
        }
    }
    if let Some(table) = existing(read.open_table(RELEASED))? {
        for entry in table.iter()? {
            let (order, ip) = entry?;
            contents
                .released
                .push((order.value(), ip.value().to_owned()));
        }
    }
    Ok(contents)
}

fn existing<T>(table: Result<T, TableError>) -> Result<Option<T>, redb::Error> {
    match table {
        Ok(table) => Ok(Some(table)),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens a file that was judged to be sound, or makes one where there is none.
///
/// # Errors
/// [`FileError`]; where there was no file, there still is none.
pub(crate) fn open(path: &Path) -> Result<Database, FileError> {
    if !path.exists() {
        make(path)?;
    }
    let patience = Instant::now() + LOCK_PATIENCE;
    loop {
        match Builder::new().set_cache_size(CACHE).open(path) {
            // An agent that was killed a moment ago may have left a child that still has
            // the lock: one that was about to become another program.
            Err(DatabaseError::DatabaseAlreadyOpen) if Instant::now() < patience => {
                std::thread::sleep(LOCK_RETRY);
            }
            Ok(database) => {
                // What an older agent made lacks them.
                return match has_tables(&database) {
                    Ok(true) => Ok(database),
                    Ok(false) => make_tables(&database)
                        .map(|()| database)
                        .map_err(|error| of_redb(path, "write to it", error)),
                    Err(error) => Err(of_redb(path, "read it", error)),
                };
            }
            Err(error) => return Err(of_redb(path, "open it", error.into())),
        }
    }
}

/// Makes a file of its own name, whole or not at all.
fn make(path: &Path) -> Result<(), FileError> {
    let draft = path.with_extension("redb.new");
    let made = make_draft(&draft)
        .map_err(|error| of_redb(path, "make it", error))
        .and_then(|()| put(&draft, path).map_err(|error| of_redb(path, "make it", error.into())));
    if made.is_err() {
        // Nobody has seen it; the next start removes it as well.
        let _gone = fs::remove_file(&draft);
    }
    made
}

fn make_draft(draft: &Path) -> Result<(), redb::Error> {
    // Left by an agent that was killed here; who holds the folder's lock is the only one.
    match fs::remove_file(draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let database = Builder::new().set_cache_size(CACHE).create(draft)?;
    make_tables(&database)?;
    database.close()?;
    File::open(draft)?.sync_all()?;
    Ok(())
}

fn put(draft: &Path, path: &Path) -> io::Result<()> {
    fs::rename(draft, path)?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder)?.sync_all()
}

fn has_tables(database: &Database) -> Result<bool, redb::Error> {
    let read = database.begin_read()?;
    let leases = existing(read.open_table(LEASES))?.is_some();
    let released = existing(read.open_table(RELEASED))?.is_some();
    let versioned = match existing(read.open_table(META))? {
        Some(meta) => meta.get(VERSION_KEY)?.is_some(),
        None => false,
    };
    Ok(leases && released && versioned)
}

fn make_tables(database: &Database) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    write.open_table(LEASES)?;
    write.open_table(RELEASED)?;
    write.open_table(META)?.insert(VERSION_KEY, VERSION)?;
    write.commit()?;
    Ok(())
}

fn of_redb(path: &Path, action: &'static str, error: redb::Error) -> FileError {
    let path = path.to_owned();
    match error {
        redb::Error::Io(source) => FileError::Disk {
            path,
            action,
            source,
        },
        redb::Error::DatabaseAlreadyOpen => FileError::Held { path },
        other => FileError::Damaged {
            path,
            words: other.to_string(),
        },
    }
}

#[cfg(test)]
mod tests;
