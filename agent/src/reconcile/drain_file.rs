//! What is known of backends that leave, on disk: how long ago each went out of the slices,
//! where it was, and whether its pod was being ended. The kernel keeps the backends through a
//! restart of the agent, and nobody else this.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferrule_model::drain::{Drains, Recalled, Server};
use serde::{Deserialize, Serialize};

use crate::clock::Moment;
use crate::plain_file;

/// The file in the state folder.
const FILE: &str = "drains.json";

/// Backends that are kept; what is beyond has its bound anew after a restart.
const MOST: usize = 10_000;

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    /// Seconds of boot time at which it was first seen to be in no slice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    left: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    #[serde(default)]
    terminating: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    boot: String,
    drains: BTreeMap<String, Kept>,
}

/// The file, and what was last written to it.
#[derive(Debug)]
pub(super) struct DrainFile {
    path: PathBuf,
    written: BTreeMap<String, Kept>,
}

fn name((key, backend): &Server) -> String {
    format!("{key} {backend}")
}

impl DrainFile {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            path: folder.join(FILE),
            written: BTreeMap::new(),
        }
    }

    /// What a former agent of this boot knew of backends that leave; `None` for others.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub(super) fn recall(&mut self) -> io::Result<impl Fn(&Server) -> Option<Recalled> + use<>> {
        let content = match plain_file::check(&self.path).and_then(|()| std::fs::read(&self.path)) {
            Ok(text) => serde_json::from_slice(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(error) => return Err(error),
        };
        self.written.clone_from(&content.drains);
        let (now, instant) = (Moment::now(), Instant::now());
        let same_boot = content.boot == now.boot;
        Ok(move |server: &Server| {
            let kept = content.drains.get(&name(server)).filter(|_| same_boot)?;
            let ago = |left: u64| Duration::from_secs(now.seconds.saturating_sub(left));
            Some(Recalled {
                left: kept.left.and_then(|left| instant.checked_sub(ago(left))),
                node: kept.node.clone(),
                terminating: kept.terminating,
            })
        })
    }

    /// Keeps what is known now, if that is news.
    ///
    /// # Errors
    /// When the file cannot be written; it stays as it was.
    pub(super) fn keep(&mut self, drains: &Drains) -> io::Result<()> {
        if self.written.is_empty() && drains.is_empty() {
            return Ok(());
        }
        let now = Moment::now();
        let known = drains.live().filter_map(|(server, drain)| {
            let kept = Kept {
                left: drain
                    .left
                    .map(|left| now.seconds.saturating_sub(left.elapsed().as_secs())),
                node: drain.node.clone(),
                terminating: drain.terminating,
            };
            let says = kept.left.is_some() || kept.node.is_some() || kept.terminating;
            says.then(|| (name(server), kept))
        });
        let known: BTreeMap<String, Kept> = known.take(MOST).collect();
        // The second at which something was may come out one off.
        let alike = |a: &Kept, b: &Kept| {
            let left = match (a.left, b.left) {
                (Some(a), Some(b)) => a.abs_diff(b) <= 1,
                (a, b) => a == b,
            };
            left && a.node == b.node && a.terminating == b.terminating
        };
        let same = known.len() == self.written.len()
            && known
                .iter()
                .zip(&self.written)
                .all(|((a, kept), (b, former))| a == b && alike(kept, former));
        if same {
            return Ok(());
        }
        if known.is_empty() {
            match std::fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        } else {
            let content = Content {
                boot: now.boot,
                drains: known.clone(),
            };
            replace(&self.path, &serde_json::to_vec(&content)?)?;
        }
        self.written = known;
        Ok(())
    }
}

/// Another content at once: a reader sees the one or the other.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, content)?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};

    use super::*;

    fn server() -> Server {
        let addr = FrontendAddr::new(IpAddr::from([10, 96, 0, 1]), 80, Protocol::Tcp);
        let backend = BackendAddr::new(IpAddr::from([10, 1, 0, 2]), 8080);
        (addr.into(), backend)
    }

    fn write(file: &DrainFile, boot: &str, left: u64) {
        let kept = Kept {
            left: Some(left),
            node: Some("n1".to_owned()),
            terminating: true,
        };
        let content = Content {
            boot: boot.to_owned(),
            drains: [(name(&server()), kept)].into(),
        };
        std::fs::write(&file.path, serde_json::to_vec(&content).unwrap()).unwrap();
    }

    #[test]
    fn what_a_former_agent_knew_is_known_again_in_the_same_boot() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = DrainFile::new(folder.path());
        assert!(
            file.recall().unwrap()(&server()).is_none(),
            "there is no file"
        );
        let now = Moment::now();
        write(&file, &now.boot, now.seconds.saturating_sub(5));
        let recalled = file.recall().unwrap()(&server()).unwrap();
        assert_eq!(recalled.node.as_deref(), Some("n1"));
        assert!(recalled.terminating);
        let ago = recalled.left.unwrap().elapsed();
        assert!((4..60).contains(&ago.as_secs()), "{ago:?}");
        let (key, _) = server();
        let other = BackendAddr::new(IpAddr::from([10, 1, 0, 3]), 8080);
        assert!(file.recall().unwrap()(&(key, other)).is_none());
        write(&file, "another", 5);
        assert!(file.recall().unwrap()(&server()).is_none());
    }

    #[test]
    fn nothing_to_keep_leaves_no_file_and_a_damaged_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = DrainFile::new(folder.path());
        std::fs::write(&file.path, "{").unwrap();
        assert!(file.recall().is_err());
        write(&file, "another", 5);
        assert!(file.recall().is_ok());
        file.keep(&Drains::default()).unwrap();
        assert!(!file.path.exists());
    }
}
