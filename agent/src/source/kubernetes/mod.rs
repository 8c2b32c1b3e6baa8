//! The cluster as its API servers tell it.
//!
//! Each kind of object has a [`Reflector`] of its own. What they tell goes on at
//! once; the source is complete when every kind was listed whole.

mod credentials;
mod failure;
mod reflector;
mod servers;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;

use ferrule_model::kube::{Kind, ObjectKey};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{info, warn};

pub(crate) use self::credentials::{Credentials, ServiceAccount};
pub(crate) use self::failure::{Cause, Failure, chain};
use self::reflector::{Away, News, Reflector, State};
pub(crate) use self::servers::Servers;
use super::{Report, Trouble, Update};

/// The kinds that are followed.
const KINDS: [Kind; 4] = [
    Kind::Node,
    Kind::ServiceCidr,
    Kind::Service,
    Kind::EndpointSlice,
];

/// News that wait to be taken; a reflector that is faster waits.
const NEWS: usize = 8;

/// Objects of a kind that cannot be read and are named one by one.
const NAMED: usize = 50;

/// Follows the cluster until the receiver of the updates is gone.
pub(crate) async fn run(servers: Servers, updates: mpsc::Sender<Update>) {
    let (sender, mut news) = mpsc::channel(NEWS);
    let mut reflectors = JoinSet::new();
    for kind in KINDS {
        reflectors.spawn(Reflector::new(kind, servers.clone(), sender.clone()).run());
    }
    drop(sender);
    let mut states: BTreeMap<Kind, State> = BTreeMap::new();
    let mut told = Report::default();
    let mut complete = false;
    loop {
        let next = tokio::select! {
            next = news.recv() => next,
            () = updates.closed() => None,
        };
        let Some(News {
            kind,
            events,
            state,
            seen,
        }) = next
        else {
            return;
        };
        say(kind, states.get(&kind), &state);
        states.insert(kind, state);
        let listed = |kind: &Kind| states.get(kind).is_some_and(|state| state.listed);
        let now_complete = KINDS.iter().all(listed);
        let report = report(&states);
        let is_news = report != told;
        if events.is_empty() && !is_news && now_complete == complete {
            continue;
        }
        complete = now_complete;
        let update = Update {
            events,
            complete,
            report: is_news.then(|| report.clone()),
            seen,
        };
        told = report;
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

/// Logs what is new about the way to a kind, once.
fn say(kind: Kind, before: Option<&State>, now: &State) {
    let away_before = before.and_then(|state| state.away.as_ref());
    match (&now.away, away_before) {
        (Some(away), before) if before.is_none_or(|before| before.words != away.words) => {
            warn!(%kind, "the API is away: {}; {}", away.words, away.remedy);
        }
        (None, Some(_)) => info!(%kind, "the API is back"),
        (_, _) => {}
    }
    let news = now.unreadable.iter().filter(|(name, words)| {
        before.is_none_or(|state| state.unreadable.get(name) != Some(words))
    });
    let unnamed_before = before.map_or(0, |state| state.unnamed);
    let mut unnamed = now.unnamed.saturating_sub(unnamed_before);
    for (index, (name, words)) in news.enumerate() {
        if index < NAMED {
            warn!("{kind} {name}: {words}; its last good state stays in use");
        } else {
            unnamed += 1;
        }
    }
    if unnamed > 0 {
        warn!(%kind, "{unnamed} more objects cannot be read; their last good states stay in use");
    }
}

fn report(states: &BTreeMap<Kind, State>) -> Report {
    let mut report = Report::default();
    // One sentence for one outage, whatever kinds it concerns.
    let mut kinds = Vec::new();
    let mut oldest: Option<&Away> = None;
    for (kind, state) in states {
        if let Some(away) = &state.away {
            kinds.push(kind.to_string());
            if oldest.is_none_or(|oldest| away.since < oldest.since) {
                oldest = Some(away);
            }
        }
        let unreadable = state.unreadable.iter().take(NAMED);
        report.troubles.extend(unreadable.map(|(name, words)| {
            let key = ObjectKey {
                kind: *kind,
                name: name.clone(),
            };
            Trouble {
                object: key.to_string(),
                problem: format!("{words}; its last good state stays in use"),
                remedy: "correct the field".to_owned(),
                since: None,
            }
        }));
        let unnamed = state.unreadable.len().saturating_sub(NAMED) + state.unnamed;
        report.troubles.extend((unnamed > 0).then(|| Trouble {
            object: kind.to_string(),
            problem: format!("{unnamed} more cannot be read; their last good states stay in use"),
            remedy: "correct what is wrong with those that are named; the others follow".to_owned(),
            since: None,
        }));
    }
    report.troubles.extend(oldest.map(|away| Trouble {
        object: "Kubernetes API".to_owned(),
        problem: format!("{} cannot be followed: {}", kinds.join(", "), away.words),
        remedy: away.remedy.clone(),
        since: Some(away.since),
    }));
    report
}
