//! Static manifests beside a cluster: one picture of both.
//!
//! Where both define an object, the cluster's counts: whoever changes it there
//! must not wonder why nothing happens. The manifest's definition is kept, said
//! to be set aside, and counts again when the cluster's is gone.

use std::collections::{BTreeMap, BTreeSet};

use ferrule_model::cluster::Event;
use ferrule_model::condition::Reason;
use ferrule_model::kube::{Object, ObjectKey};
use ferrule_model::plan::ConditionRow;
use tokio::sync::mpsc;

use super::{Report, Update};

/// Combines the updates of both until one of the channels is closed.
pub(crate) async fn run(
    mut manifests: mpsc::Receiver<Update>,
    mut cluster: mpsc::Receiver<Update>,
    out: mpsc::Sender<Update>,
) {
    let mut both = Both::default();
    loop {
        let (side, update) = tokio::select! {
            update = manifests.recv() => (Side::Manifests, update),
            update = cluster.recv() => (Side::Cluster, update),
            () = out.closed() => return,
        };
        let Some(update) = update else {
            return;
        };
        if out.send(both.take(side, update)).await.is_err() {
            return;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Manifests,
    Cluster,
}

/// What both have told.
#[derive(Debug, Default)]
struct Both {
    /// Objects of the manifests, those that are set aside among them.
    manifests: BTreeMap<ObjectKey, Box<Object>>,
    /// Names of the cluster's.
    cluster: BTreeSet<ObjectKey>,
    complete: [bool; 2],
    reports: [Report; 2],
    told: Option<Report>,
}

impl Both {
    fn take(&mut self, side: Side, update: Update) -> Update {
        let index = usize::from(side == Side::Cluster);
        self.complete[index] = update.complete;
        if let Some(report) = update.report {
            self.reports[index] = report;
        }
        let events = update.events.into_iter();
        let events = match side {
            Side::Manifests => events
                .filter_map(|event| self.of_manifests(event))
                .collect(),
            Side::Cluster => events.map(|event| self.of_cluster(event)).collect(),
        };
        let report = self.report();
        let news = self.told.as_ref() != Some(&report);
        if news {
            self.told = Some(report.clone());
        }
        Update {
            events,
            complete: self.complete == [true, true],
            report: news.then_some(report),
            seen: update.seen,
        }
    }

    fn of_manifests(&mut self, event: Event) -> Option<Event> {
        let key = match &event {
            Event::Applied(object) => {
                let key = object.key();
                self.manifests.insert(key.clone(), object.clone());
                key
            }
            Event::Deleted(key) => {
                self.manifests.remove(key);
                key.clone()
            }
        };
        (!self.cluster.contains(&key)).then_some(event)
    }

    fn of_cluster(&mut self, event: Event) -> Event {
        match event {
            Event::Applied(object) => {
                self.cluster.insert(object.key());
                Event::Applied(object)
            }
            Event::Deleted(key) => {
                self.cluster.remove(&key);
                match self.manifests.get(&key) {
                    Some(object) => Event::Applied(object.clone()),
                    None => Event::Deleted(key),
                }
            }
        }
    }

    fn report(&self) -> Report {
        let [manifests, cluster] = &self.reports;
        let mut report = manifests.clone();
        report.troubles.extend(cluster.troubles.iter().cloned());
        report.conditions.extend(cluster.conditions.iter().cloned());
        let twice = self
            .manifests
            .keys()
            .filter(|key| self.cluster.contains(key));
        report.conditions.extend(twice.map(|key| {
            ConditionRow {
                object: key.to_string(),
                reason: Reason::DuplicateObject.to_string(),
                line: 0,
                message: "metadata.name: the object is in the cluster and in a manifest; the \
                      cluster's counts, remove the manifest"
                    .to_owned(),
            }
        }));
        report
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ferrule_model::kube::Node;

    use super::*;

    fn node(name: &str, cidr: &str) -> Box<Object> {
        let mut node = Node::default();
        node.metadata.name = name.to_owned();
        node.spec.pod_cidr = cidr.to_owned();
        Box::new(Object::Node(node))
    }

    fn told(events: Vec<Event>) -> Update {
        Update {
            events,
            complete: true,
            report: None,
            seen: Instant::now(),
        }
    }

    #[test]
    fn the_clusters_object_counts_as_long_as_it_is_there() {
        let mut both = Both::default();
        let (ours, theirs) = (node("a", "10.1.0.0/24"), node("a", "10.2.0.0/24"));
        let key = ours.key();
        let applied = |object: &Object| vec![Event::Applied(Box::new(object.clone()))];
        let first = both.take(Side::Manifests, told(applied(&ours)));
        assert_eq!(first.events, applied(&ours));
        assert!(!first.complete, "the cluster has not told anything");
        let second = both.take(Side::Cluster, told(applied(&theirs)));
        assert_eq!(second.events, applied(&theirs));
        assert!(second.complete);
        let [condition] = second.report.unwrap().conditions.try_into().unwrap();
        assert_eq!(condition.object, "Node a");
        let changed = both.take(Side::Manifests, told(applied(&node("a", "10.3.0.0/24"))));
        assert_eq!(changed.events, []);
        let gone = both.take(Side::Cluster, told(vec![Event::Deleted(key.clone())]));
        assert_eq!(gone.events, applied(&node("a", "10.3.0.0/24")));
        assert_eq!(gone.report.unwrap().conditions, []);
        let gone = both.take(Side::Manifests, told(vec![Event::Deleted(key.clone())]));
        assert_eq!(gone.events, [Event::Deleted(key)]);
    }
}
