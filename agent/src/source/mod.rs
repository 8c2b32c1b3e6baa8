//! Where facts about the cluster come from.
//!
//! A source tells [`Update`]s over a bounded channel: first everything it has,
//! then what changes. It keeps the last good state of an object that it cannot
//! read any longer, and never tells that something is gone unless it is.

pub(crate) mod combine;
pub(crate) mod document;
pub(crate) mod findings;
pub(crate) mod folder;
pub(crate) mod kubernetes;
mod tree;
pub(crate) mod watch;
mod yaml;

use std::path::PathBuf;
use std::time::Instant;

use ferrule_model::cluster::Event;
use ferrule_model::plan::ConditionRow;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::kubernetes::{Credentials, Servers};

/// Updates that wait to be taken; a source that is faster waits.
const UPDATES: usize = 16;

/// Where an agent has its facts from: manifests, a cluster, or both.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    /// Folder of manifests.
    pub(crate) manifests: Option<PathBuf>,
    /// How to log in to a cluster.
    pub(crate) credentials: Option<Credentials>,
    /// URLs of its API servers, if not the one that comes with the credentials.
    pub(crate) api_servers: Vec<String>,
}

impl Sources {
    /// Begins to follow them.
    ///
    /// # Errors
    /// When the cluster cannot be followed whatever happens, with a remedy.
    pub(crate) async fn follow(self) -> Result<Followed, String> {
        let folder = |root: PathBuf| {
            let name = format!("manifests in {}", root.display());
            let (sender, updates) = mpsc::channel(UPDATES);
            (name, updates, tokio::spawn(watch::run(root, sender)))
        };
        let Some(credentials) = self.credentials else {
            let root = self.manifests.ok_or("neither manifests nor a cluster")?;
            let (name, updates, task) = folder(root);
            return Ok(Followed {
                name,
                updates,
                task,
                servers: None,
            });
        };
        let servers = Servers::open(&credentials, &self.api_servers).await?;
        let name = format!("Kubernetes API {}", servers.addresses());
        let (sender, updates) = mpsc::channel(UPDATES);
        let task = tokio::spawn(kubernetes::run(servers.clone(), sender));
        let servers = Some(servers);
        let Some(root) = self.manifests else {
            return Ok(Followed {
                name,
                updates,
                task,
                servers,
            });
        };
        let (static_name, static_updates, static_task) = folder(root);
        let (sender, both) = mpsc::channel(UPDATES);
        let combine = combine::run(static_updates, updates, sender);
        let task = tokio::spawn(async move {
            tokio::select! {
                () = combine => {}
                _ended = task => {}
                _ended = static_task => {}
            }
        });
        Ok(Followed {
            name: format!("{name} and {static_name}"),
            updates: both,
            task,
            servers,
        })
    }
}

/// Sources that are followed.
pub(crate) struct Followed {
    /// Their name in words.
    pub(crate) name: String,
    /// What they tell.
    pub(crate) updates: mpsc::Receiver<Update>,
    /// Ends when one of them does.
    pub(crate) task: JoinHandle<()>,
    /// The cluster's API servers, if one of them is a cluster.
    pub(crate) servers: Option<Servers>,
}

/// What a source tells at a time.
#[derive(Debug)]
pub(crate) struct Update {
    /// Changes, in order.
    pub(crate) events: Vec<Event>,
    /// Whether everything that the source holds has been told without a doubt.
    /// Before that nothing may be removed from the kernel.
    pub(crate) complete: bool,
    /// What is wrong with the source now, if that is news.
    pub(crate) report: Option<Report>,
    /// When the change was noticed.
    pub(crate) seen: Instant,
}

/// What is wrong with a source as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// What keeps it from telling everything as it is.
    pub(crate) troubles: Vec<Trouble>,
    /// Objects that count only in part, or not at all.
    pub(crate) conditions: Vec<ConditionRow>,
}

/// One thing that is wrong, in words for people.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Trouble {
    /// What it is about.
    pub(crate) object: String,
    /// What is wrong.
    pub(crate) problem: String,
    /// What to do.
    pub(crate) remedy: String,
    /// Since when, in seconds since 1970; `None`: since it was first told in these words.
    pub(crate) since: Option<u64>,
}
