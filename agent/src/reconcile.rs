//! Keeps the kernel as the facts want it.
//!
//! One task owns the facts, the desired state and what is known of the kernel.
//! A change costs what it touches: the Services concerned are computed anew,
//! their addresses compared and the difference carried out. What fails hurts
//! only its own addresses; they stay in `dirty` and are tried again with
//! growing pauses. Only at the start, and when the kernel's state is in doubt,
//! is everything observed and compared.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferrule_datapath::{Node, Settings, apply};
use ferrule_model::address::Family;
use ferrule_model::change::Change;
use ferrule_model::cluster::{ClusterState, Touched};
use ferrule_model::condition::Condition;
use ferrule_model::desired::{Desired, Scope};
use ferrule_model::diff::{diff, everything};
use ferrule_model::ipam::PodRange;
use ferrule_model::kube;
use ferrule_model::observed::Observed;
use tokio::sync::mpsc;
use tokio::time::timeout_at;
use tracing::{debug, error, info, warn};

use crate::pods::Pods;
use crate::source::Update;

/// Pause before a failed change is tried again: doubles from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Owner of the node's services.
pub(crate) struct Reconciler {
    node_name: String,
    settings: Settings,
    pods: Arc<Pods>,
    cluster: ClusterState,
    desired: Desired,
    /// Every source has told all it has; before that nothing is removed.
    complete: bool,
    kernel: Option<Node>,
    /// What the kernel holds; `None` until it was observed, and when it is in doubt.
    observed: Option<Observed>,
    dirty: Scope,
    said: BTreeSet<Condition>,
    pause: Duration,
}

impl Reconciler {
    pub(crate) fn new(node_name: String, settings: Settings, pods: Arc<Pods>) -> Self {
        Self {
            desired: Desired::new(&*node_name),
            node_name,
            settings,
            pods,
            cluster: ClusterState::default(),
            complete: false,
            kernel: None,
            observed: None,
            dirty: Scope::default(),
            said: BTreeSet::new(),
            pause: RETRY.0,
        }
    }

    /// Runs until the source is gone.
    pub(crate) async fn run(mut self, mut updates: mpsc::Receiver<Update>) {
        let Some(first) = updates.recv().await else {
            return;
        };
        self.take(first);
        loop {
            let settled = self.reconcile().await;
            let update = if settled {
                self.pause = RETRY.0;
                updates.recv().await
            } else {
                let again = tokio::time::Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(RETRY.1);
                match timeout_at(again, updates.recv()).await {
                    Ok(update) => update,
                    Err(_elapsed) => continue,
                }
            };
            let Some(update) = update else {
                return;
            };
            self.take(update);
            // What came meanwhile is done in the same pass.
            while let Ok(update) = updates.try_recv() {
                self.take(update);
            }
        }
    }

    /// Takes facts in; the kernel is not touched.
    fn take(&mut self, update: Update) {
        let mut touched = Touched::default();
        for event in update.events {
            touched.merge(self.cluster.apply(event));
        }
        for service in &touched.services {
            let scope = self.desired.update(&self.cluster, service);
            self.dirty.merge(scope);
        }
        self.say_conditions(&touched);
        if touched.nodes.contains(&self.node_name) {
            self.set_pod_ranges();
        }
        if update.complete && !self.complete {
            info!("all manifests were read");
            self.complete = true;
            if let Some(observed) = &self.observed {
                self.dirty.merge(everything(&self.desired, observed));
            }
        }
        debug!(
            services = touched.services.len(),
            age = ?update.seen.elapsed(),
            "change taken in"
        );
    }

    /// Logs what is new about the Services concerned, once.
    fn say_conditions(&mut self, touched: &Touched) {
        for service in &touched.services {
            let conditions = self.desired.conditions_of(service);
            self.said.retain(|said| {
                said.object.name != *service
                    || said.object.kind != kube::Kind::Service
                    || conditions.contains(said)
            });
            for condition in conditions {
                if self.said.insert(condition.clone()) {
                    warn!(object = %condition.object, reason = %condition.reason, "{}", condition.message);
                }
            }
        }
    }

    /// A Node that vanished keeps its ranges: pods go on, and a folder of
    /// manifests may be in the middle of being replaced.
    fn set_pod_ranges(&self) {
        let Some(node) = self.cluster.node(&self.node_name) else {
            warn!(
                node = self.node_name,
                "the Node object is gone; its pod ranges stay in use"
            );
            return;
        };
        let spec = &node.spec;
        let texts = if spec.pod_cidrs.is_empty() {
            std::slice::from_ref(&spec.pod_cidr)
        } else {
            spec.pod_cidrs.as_slice()
        };
        let mut ranges: Vec<PodRange> = Vec::new();
        for text in texts.iter().filter(|text| !text.is_empty()) {
            match PodRange::parse(text) {
                Ok(range) => ranges.push(range),
                Err(error) => {
                    warn!(
                        node = self.node_name,
                        "spec.podCIDRs: {error}; it is left out"
                    );
                }
            }
        }
        for family in Family::ALL {
            if ranges
                .iter()
                .filter(|range| range.family() == family)
                .count()
                > 1
            {
                warn!(
                    node = self.node_name,
                    "spec.podCIDRs: two {family} ranges, the first counts"
                );
            }
        }
        if !ranges.is_empty() {
            self.pods.leases().set_ranges(ranges);
        }
    }

    /// Makes the kernel as desired. False when something is left to do.
    async fn reconcile(&mut self) -> bool {
        if self.kernel.is_none() {
            match Node::open(self.settings.clone()).await {
                Ok(kernel) => self.kernel = Some(kernel),
                Err(error) => {
                    error!(%error, retry = ?self.pause, "services cannot be programmed; pods get their addresses all the same");
                    return false;
                }
            }
        }
        let Some(kernel) = &mut self.kernel else {
            return false;
        };
        let mut observed = match self.observed.take() {
            Some(observed) => observed,
            None => match kernel.observe().await {
                Ok(observed) => {
                    info!(
                        services = observed.services.len(),
                        vips = observed.bound.len(),
                        "the kernel's state was adopted"
                    );
                    self.dirty.merge(everything(&self.desired, &observed));
                    observed
                }
                Err(error) => {
                    // A socket in doubt is replaced by a new one.
                    error!(%error, retry = ?self.pause, "cannot observe the kernel");
                    self.kernel = None;
                    return false;
                }
            },
        };
        let start = Instant::now();
        let scope = std::mem::take(&mut self.dirty);
        let mut changes = diff(&self.desired, &observed, &scope);
        if !self.complete {
            let all = changes.len();
            changes.retain(|change| !removes(change));
            if changes.len() < all {
                warn!(
                    held_back = all - changes.len(),
                    "nothing is removed until every manifest can be read"
                );
            }
        }
        if changes.is_empty() {
            self.observed = Some(observed);
            return true;
        }
        let applied = apply(kernel, &changes).await;
        for change in &applied.done {
            observed.record(change);
        }
        info!(
            changes = applied.done.len(),
            failed = applied.failed.len(),
            held_back = applied.held_back.len(),
            took = ?start.elapsed(),
            "node changed"
        );
        let mut in_doubt = false;
        for (change, error) in &applied.failed {
            error!(%change, %error, retry = ?self.pause, "change failed");
            in_doubt |= error.leaves_doubt();
            mark(&mut self.dirty, change);
        }
        for change in &applied.held_back {
            mark(&mut self.dirty, change);
        }
        let settled = self.dirty.is_empty();
        if in_doubt {
            self.kernel = None;
        } else {
            self.observed = Some(observed);
        }
        settled
    }
}

fn mark(dirty: &mut Scope, change: &Change) {
    dirty.vips.insert(change.ip());
    dirty.frontends.extend(change.frontend());
}

/// Whether a change takes something away that may still be wanted.
fn removes(change: &Change) -> bool {
    match change {
        Change::RemoveService(_)
        | Change::DisallowFrontend(_)
        | Change::UnbindVip(_)
        | Change::UnguardVip(_)
        | Change::RemoveServer(..) => true,
        Change::GuardVip(_)
        | Change::BindVip(_)
        | Change::AllowFrontend(_)
        | Change::AddService(..)
        | Change::UpdateService(..)
        | Change::AddServer(..)
        | Change::UpdateServer(..) => false,
    }
}
