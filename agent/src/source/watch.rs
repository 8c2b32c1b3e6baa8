//! Watches a folder of manifests and tells what changes.
//!
//! The kernel's notices only say *that* something happened; what happened is
//! found by comparing the folder with what was told before. So a lost or
//! merged notice loses nothing, and a scan every [`RESCAN`] catches what no
//! notice reports (network file systems).

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::Update;
use super::folder::{Folder, SETTLE};

/// Time between two scans when nothing is noticed.
const RESCAN: Duration = Duration::from_secs(30);

/// How long after a failed scan the next one comes.
const RETRY: Duration = Duration::from_secs(1);

/// Room for notices that were not read yet, in bytes.
const NOTICES: usize = 16 * 1024;

/// Watches `root` until the receiver of the updates is gone.
pub(crate) async fn run(root: PathBuf, updates: mpsc::Sender<Update>) {
    let mut folder = Folder::new(root.clone());
    let mut told_complete = false;
    let mut seen = Instant::now();
    loop {
        // The watch is set up before the scan: what changes in between is noticed.
        let watch = Watch::new(&root);
        let pause = match folder.scan() {
            Ok(scan) => {
                let complete = folder.is_complete();
                if !scan.events.is_empty() || complete != told_complete {
                    let update = Update {
                        events: scan.events,
                        complete,
                        seen,
                    };
                    if updates.send(update).await.is_err() {
                        return;
                    }
                    told_complete = complete;
                }
                if scan.unsettled { SETTLE } else { RESCAN }
            }
            Err(error) => {
                warn!(folder = %root.display(), %error, "cannot list the manifests; what was read before stays");
                RETRY
            }
        };
        match watch {
            Ok(mut watch) => watch.changed(pause).await,
            Err(error) => {
                warn!(folder = %root.display(), error = format!("{error:#}"), "cannot watch, scanning every second instead");
                sleep(pause.min(RETRY)).await;
            }
        }
        seen = Instant::now();
        if updates.is_closed() {
            return;
        }
    }
}

/// Notices of changes in a folder and its subfolders.
struct Watch {
    notices: EventStream<Vec<u8>>,
}

impl Watch {
    fn new(root: &Path) -> anyhow::Result<Self> {
        let inotify = Inotify::init().context("inotify_init")?;
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            inotify
                .watches()
                .add(
                    &folder,
                    WatchMask::CLOSE_WRITE
                        | WatchMask::CREATE
                        | WatchMask::DELETE
                        | WatchMask::MODIFY
                        | WatchMask::MOVED_FROM
                        | WatchMask::MOVED_TO
                        | WatchMask::ATTRIB
                        | WatchMask::DELETE_SELF
                        | WatchMask::MOVE_SELF,
                )
                .with_context(|| format!("inotify_add_watch {}", folder.display()))?;
            let entries = std::fs::read_dir(&folder)?;
            let subfolders = entries.flatten().map(|entry| entry.path());
            folders.extend(subfolders.filter(|path| path.is_dir() && !is_hidden(path)));
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

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}
