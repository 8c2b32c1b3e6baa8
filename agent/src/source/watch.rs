//! Watches a folder of manifests and tells what changes.
//!
//! The kernel's notices only say *that* something happened; what happened is
//! found by comparing the folder with what was told before. So a lost or
//! merged notice loses nothing, and a scan every [`RESCAN`] catches what no
//! notice reports (network file systems).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use ferrule_model::condition::Reason;
use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use super::Update;
use super::findings::Findings;
use super::folder::Folder;
use super::tree::{self, SETTLE};

/// Time between two scans when nothing is noticed.
const RESCAN: Duration = Duration::from_secs(30);

/// How long after a failed scan the next one comes.
const RETRY: Duration = Duration::from_secs(1);

/// Room for notices that were not read yet, in bytes.
const NOTICES: usize = 16 * 1024;

/// Notices that can mean a change of what manifests say.
const WHAT_MATTERS: WatchMask = WatchMask::CLOSE_WRITE
    .union(WatchMask::CREATE)
    .union(WatchMask::DELETE)
    .union(WatchMask::MODIFY)
    .union(WatchMask::MOVED_FROM)
    .union(WatchMask::MOVED_TO)
    .union(WatchMask::ATTRIB)
    .union(WatchMask::DELETE_SELF)
    .union(WatchMask::MOVE_SELF);

/// Watches `root` until the receiver of the updates is gone.
pub(crate) async fn run(root: PathBuf, updates: mpsc::Sender<Update>) {
    let mut folder = Folder::new(root.clone());
    let mut told_complete = false;
    let mut told = None;
    let mut seen = Instant::now();
    let mut problem = Problem::default();
    while !updates.is_closed() {
        // The watch is set up before the scan: what changes in between is noticed.
        // Both wait for the disk, which may be a slow one.
        let (watch, scan) = block_in_place(|| (Watch::new(&root), folder.scan()));
        let watch_error = watch.as_ref().err().map(|error| {
            format!("cannot be watched, it is looked at every second instead: {error:#}")
        });
        let (events, wrong, pause) = match scan {
            Ok(scan) if scan.unsettled => (scan.events, watch_error, SETTLE),
            Ok(scan) => (scan.events, watch_error, RESCAN),
            Err(error) => {
                let wrong = format!("cannot be listed, what was read before stays: {error}");
                (Vec::new(), Some(wrong), RETRY)
            }
        };
        problem.say(&root, wrong.as_deref());
        let complete = folder.is_complete();
        let findings = Findings {
            folder: wrong,
            ..folder.findings()
        };
        let news = told.as_ref() != Some(&findings);
        say_repeated(&findings, told.as_ref());
        if !events.is_empty() || complete != told_complete || news {
            let update = Update {
                events,
                complete,
                report: news.then(|| findings.report(&root)),
                seen,
            };
            if updates.send(update).await.is_err() {
                return;
            }
            told_complete = complete;
            told = Some(findings);
        }
        match watch {
            Ok(mut watch) => watch.changed(pause).await,
            Err(_) => sleep(pause.min(RETRY)).await,
        }
        seen = Instant::now();
    }
}

/// Objects that are defined more than once, each said when that begins.
fn say_repeated(findings: &Findings, told: Option<&Findings>) {
    let known = |repeated| told.is_some_and(|told: &Findings| told.repeated.contains(repeated));
    for repeated in findings.repeated.iter().filter(|repeated| !known(repeated)) {
        let (object, file) = repeated;
        let reason = Reason::DuplicateObject;
        match file {
            Some(file) => {
                warn!(%object, %reason, file = %file.display(), "is defined more than once, the definition in this file counts; remove the others");
            }
            None => {
                warn!(%object, %reason, "is defined more than once, and no definition can be read; remove all but one");
            }
        }
    }
}

/// What is wrong with the folder, said once and not every second.
#[derive(Default)]
struct Problem(Option<String>);

impl Problem {
    fn say(&mut self, folder: &Path, problem: Option<&str>) {
        if self.0.as_deref() == problem {
            return;
        }
        if let Some(words) = problem {
            warn!(folder = %folder.display(), "the folder of manifests {words}");
        } else {
            info!(folder = %folder.display(), "the folder of manifests is watched again");
        }
        self.0 = problem.map(str::to_owned);
    }
}

/// Notices of changes in a folder and its subfolders.
struct Watch {
    notices: EventStream<Vec<u8>>,
}

impl Watch {
    fn new(root: &Path) -> anyhow::Result<Self> {
        let inotify = Inotify::init().context("inotify_init")?;
        for folder in tree::folders(root)? {
            inotify
                .watches()
                .add(&folder, WHAT_MATTERS)
                .with_context(|| format!("inotify_add_watch {}", folder.display()))?;
        }
        let notices = inotify.into_event_stream(vec![0; NOTICES])?;
        Ok(Self { notices })
    }

    /// Returns when something happened and it has been quiet since for a
    /// moment, or after `longest`.
    async fn changed(&mut self, longest: Duration) {
        if timeout(longest, self.notices.next()).await.is_err() {
            return;
        }
        debug!("the folder of manifests changed");
        // A burst of notices (an editor, a copy of many files) is one change;
        // one that does not end is looked at all the same.
        let patience = Instant::now() + SETTLE * 4;
        while Instant::now() < patience {
            if timeout(SETTLE, self.notices.next()).await.is_err() {
                return;
            }
        }
    }
}
