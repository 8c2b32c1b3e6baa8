//! The state folder and what lies in it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use ferrule_api::queue;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::folder::{self, Place};
use super::{Finding, Outcome};
use crate::leases::file::{self, remedy};
use crate::lock;

const FOLDER: &str = "state folder";
const FILE: &str = "lease file";

/// The lease file's name in the folder.
pub(crate) const LEASE_FILE: &str = "leases.redb";

/// With less than this left, leases soon cannot be written.
const LITTLE: u64 = 16 * 1024 * 1024;

/// What is written to find out whether writing works.
const PROBE: [u8; 4096] = [0x5a; 4096];

/// Whether leases can be kept there. A disk that is full or read-only is a warning
/// for `run`, which goes on without new leases and heals when it is over.
pub(super) fn folder(path: &Path) -> Finding {
    let refused = |place: &Path, error: &io::Error| {
        let may_pass = matches!(
            Errno::from_io_error(error),
            Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS)
        );
        let result = if may_pass && path.is_dir() {
            Outcome::Warning
        } else {
            Outcome::Failed
        };
        Finding::new(
            FOLDER,
            result,
            format!("{} cannot be written to: {error}", place.display()),
            remedy(error),
        )
    };
    let place = match folder::find(path) {
        Ok(place) => place,
        Err((place, error)) => return refused(&place, &error),
    };
    let space = folder::free(path);
    let words = space.map_or_else(String::new, |bytes| {
        format!(", {} MiB free", bytes / (1024 * 1024))
    });
    match place {
        Place::WillBeMade(parent) => Finding::ok(
            FOLDER,
            format!(
                "{} will be made in {}{words}",
                path.display(),
                parent.display()
            ),
        ),
        Place::There => {
            if let Err(error) = probe(path) {
                return refused(path, &error);
            }
            let found = format!("{} can be written to{words}", path.display());
            if space.is_some_and(|bytes| bytes < LITTLE) {
                let words = "free some space there: without any, no pod can be started";
                Finding::new(FOLDER, Outcome::Warning, found, words)
            } else {
                Finding::ok(FOLDER, found)
            }
        }
    }
}

/// Writes a file that has no name, or had one for a moment.
fn probe(folder: &Path) -> io::Result<()> {
    let nameless = OpenOptions::new()
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::TMPFILE.bits().cast_signed())
        .open(folder);
    match nameless {
        Ok(file) => write(file),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::OPNOTSUPP) => {
            let path = folder.join(format!(".check.{}", std::process::id()));
            let written = File::create_new(&path).and_then(write);
            let removed = fs::remove_file(&path);
            written.and(removed)
        }
        Err(error) => Err(error),
    }
}

fn write(mut file: File) -> io::Result<()> {
    file.write_all(&PROBE)?;
    file.sync_all()
}

/// What the lease file and the queue hold.
pub(super) fn lease_file(folder: &Path) -> Vec<Finding> {
    let path = folder.join(LEASE_FILE);
    let held = lock::is_held(folder);
    let mut findings = Vec::new();
    findings.push(if held {
        // It is being written: what is read of it need not fit together.
        let found = format!(
            "{} is open in an agent that runs, which answers for it",
            path.display()
        );
        Finding::ok(FILE, found)
    } else {
        match file::read(&path) {
            Ok(None) => Finding::ok(FILE, format!("{} will be made", path.display())),
            Ok(Some(contents)) => Finding::ok(
                FILE,
                format!(
                    "{} is sound: version {}, leases: {}",
                    path.display(),
                    contents.version,
                    contents.leases.len()
                ),
            ),
            Err(error) => Finding::of_error(FILE, Outcome::Failed, &error.to_string()),
        }
    });
    match queue::list(folder) {
        Ok(waiting) if waiting.is_empty() || held => {}
        Ok(waiting) => findings.push(Finding::ok(
            "queue of releases",
            format!("{} wait for an agent", waiting.len()),
        )),
        Err(error) => findings.push(Finding::new(
            "queue of releases",
            Outcome::Failed,
            error.to_string(),
            "run as root",
        )),
    }
    findings
}
