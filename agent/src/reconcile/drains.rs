//! Backends that leave: until when, and what becomes of their flows.
//!
//! The model decides which real servers drain and when that ends by the facts and by time;
//! here the kernel's connections are counted, and what would hold a flow at a backend that
//! is gone is forgotten. How much is looked at in one go is bounded. What is known of them
//! outlives the agent ([`super::drain_file`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::time::{Duration, Instant};

use ferrule_api::status::Draining;
use ferrule_datapath::conntrack::Conntrack;
use ferrule_model::address::{BackendAddr, Family, FrontendAddr, Protocol};
use ferrule_model::change::Change;
use ferrule_model::desired::Scope;
use ferrule_model::drain::{End, Server};
use ferrule_model::observed::Observed;
use ferrule_model::service::ServiceKey;
use ferrule_netlink::Error;
use tracing::{info, warn};

use super::Reconciler;
use super::drain_file::DrainFile;

/// Time between two counts of the connections of one backend, and between two looks at
/// the slices where nothing was told.
const COUNT: Duration = Duration::from_secs(3);

/// Least time between two looks at the slices, which go through all of them.
const LOOK: Duration = Duration::from_secs(1);

/// Virtual services whose real servers are read in one go.
const AT_ONCE: usize = 256;

/// For how long entries of connection tracking are looked for in one go. The kernel walks its
/// whole table for each frontend.
const FORGETTING: Duration = Duration::from_millis(50);

/// For how long an answer that came too late may be in the way of its flow, and how many
/// backends are remembered for that.
const STRAY: Duration = Duration::from_mins(3);
const MOST_REMOVED: usize = 4096;

/// What is kept about backends that leave.
#[derive(Debug)]
pub(super) struct Drains {
    /// How long one may drain when it is in no slice any more.
    bound: Duration,
    /// Virtual services of which a backend has just begun to leave: it may have none.
    fresh: BTreeSet<ServiceKey>,
    /// Virtual services whose connections are to be counted.
    queue: VecDeque<ServiceKey>,
    count_at: Instant,
    look_at: Instant,
    ended: BTreeMap<&'static str, u64>,
    /// Flows that led to backends which are gone.
    stale: BTreeSet<(FrontendAddr, BackendAddr)>,
    /// Backends of UDP and SCTP that were removed, and when: their last answers may be flows of
    /// their own now.
    removed: BTreeMap<(Protocol, BackendAddr), Instant>,
    /// Those of them that are back.
    back: BTreeSet<(Protocol, BackendAddr)>,
    conntrack: Option<Conntrack>,
    forgotten: u64,
    failed: u64,
    file: DrainFile,
    /// Why that cannot be written.
    trouble: Option<String>,
    /// Whether what a former agent knew was taken in.
    recalled: bool,
}

impl Drains {
    pub(super) fn new(bound: Duration, folder: &Path) -> Self {
        let start = Instant::now();
        Self {
            bound,
            fresh: BTreeSet::new(),
            queue: VecDeque::new(),
            count_at: start,
            look_at: start,
            ended: End::ALL.map(|end| (end.name(), 0)).into(),
            stale: BTreeSet::new(),
            removed: BTreeMap::new(),
            back: BTreeSet::new(),
            conntrack: None,
            forgotten: 0,
            failed: 0,
            file: DrainFile::new(folder),
            trouble: None,
            recalled: false,
        }
    }

    /// Another bound, for those that leave already as well.
    pub(super) fn set_bound(&mut self, bound: Duration) {
        self.bound = bound;
    }

    /// What was told may be about backends that leave.
    pub(super) fn look_soon(&mut self) {
        self.look_at = self.look_at.min(Instant::now() + LOOK);
    }

    /// Whether there is something that should not wait for the next tick.
    pub(super) fn is_busy(&self) -> bool {
        !self.fresh.is_empty() || !self.stale.is_empty() || !self.back.is_empty()
    }

    /// One frontend at least, so that it comes to an end.
    async fn forget(&mut self) {
        let start = Instant::now();
        while let Some((protocol, backend)) = self.back.pop_first() {
            self.forget_by(async |conntrack| conntrack.forget_strays(protocol, &backend).await)
                .await;
            if start.elapsed() >= FORGETTING {
                return;
            }
        }
        while let Some((frontend, _)) = self.stale.first().copied() {
            let (now, later) = std::mem::take(&mut self.stale)
                .into_iter()
                .partition(|(of, _)| *of == frontend);
            self.stale = later;
            self.forget_these(&now).await;
            if start.elapsed() >= FORGETTING {
                return;
            }
        }
    }

    async fn forget_these(&mut self, gone: &BTreeSet<(FrontendAddr, BackendAddr)>) {
        self.forget_by(async |conntrack| conntrack.forget(gone).await)
            .await;
    }

    /// Takes in that a backend of UDP or SCTP was removed, or is there again.
    fn note_flows(&mut self, protocol: Protocol, backend: BackendAddr, is_back: bool) {
        let now = Instant::now();
        if is_back {
            if self.removed.remove(&(protocol, backend)).is_some() {
                self.back.insert((protocol, backend));
            }
        } else {
            if self.removed.len() >= MOST_REMOVED {
                self.removed.clear();
            }
            self.removed
                .retain(|_, at| now.saturating_duration_since(*at) < STRAY);
            self.removed.insert((protocol, backend), now);
        }
    }

    async fn forget_by(&mut self, work: impl AsyncFnOnce(&Conntrack) -> Result<usize, Error>) {
        let conntrack = match self.conntrack.take() {
            Some(conntrack) => Ok(conntrack),
            None => Conntrack::open(),
        };
        let outcome = match conntrack {
            Ok(conntrack) => {
                let outcome = work(&conntrack).await;
                // A socket in doubt is replaced by a new one.
                self.conntrack = outcome.is_ok().then_some(conntrack);
                outcome
            }
            Err(error) => Err(error),
        };
        match outcome {
            Ok(count) => self.forgotten += u64::try_from(count).unwrap_or(u64::MAX),
            Err(error) => {
                self.failed += 1;
                // IPVS does the same at the cost of one packet of each flow.
                warn!(%error, "flows to backends that are gone cannot be looked for");
            }
        }
    }
}

/// The frontends of a virtual service, as the kernel has them.
fn frontends(key: ServiceKey, observed: &Observed) -> Vec<FrontendAddr> {
    match key {
        ServiceKey::Address(addr) => vec![addr],
        ServiceKey::Mark { family, mark } => {
            let marks = observed.marks.iter();
            let those = marks.filter(|(addr, of)| **of == mark && Family::of(addr.ip) == family);
            those.map(|(addr, _)| *addr).collect()
        }
    }
}

impl Reconciler {
    /// Notes what changes that were carried out mean for flows. `before` is the kernel
    /// before them.
    pub(super) fn note_leaving(&mut self, done: &[Change], before: &Observed) {
        for change in done {
            let (key, gone): (ServiceKey, Vec<BackendAddr>) = match change {
                Change::AddServer(key, backend, _) => {
                    for frontend in frontends(*key, before) {
                        self.drains.note_flows(frontend.protocol, *backend, true);
                    }
                    continue;
                }
                Change::UpdateServer(key, _, 0) => {
                    self.drains.fresh.insert(*key);
                    continue;
                }
                Change::RemoveServer(key, backend) => (*key, vec![*backend]),
                Change::RemoveService(key) => {
                    let service = before.services.get(key);
                    let servers = service.iter().flat_map(|service| service.servers.keys());
                    (*key, servers.copied().collect())
                }
                _ => continue,
            };
            for frontend in frontends(key, before) {
                // Those of TCP that end idle have none; the others are noted where they end.
                if frontend.protocol != Protocol::Tcp {
                    for backend in &gone {
                        self.drains.note_flows(frontend.protocol, *backend, false);
                    }
                    let flows = gone.iter().map(|backend| (frontend, *backend));
                    self.drains.stale.extend(flows);
                }
            }
        }
    }

    /// Ends drains that need not go on. What is to be removed by that is dirty then.
    pub(super) async fn keep_drains(&mut self) {
        if !self.knows_all() || self.observed.is_none() {
            return;
        }
        if !self.drains.stale.is_empty() || !self.drains.back.is_empty() {
            self.drains.forget().await;
        }
        self.recall_drains();
        if self.view.desired().drains().live().next().is_none() {
            self.drains.fresh.clear();
            self.drains.queue.clear();
            self.write_drains();
            return;
        }
        let now = Instant::now();
        if self.drains.look_at <= now {
            self.drains.look_at = now + COUNT;
            self.look_at_slices(now);
            self.write_drains();
        }
        self.count_connections(now).await;
    }

    /// Once everything is known, what leaves is in the kernel as the former agent left it.
    fn recall_drains(&mut self) {
        if std::mem::replace(&mut self.drains.recalled, true) {
            return;
        }
        match self.drains.file.recall() {
            Ok(recall) => self.view.recall_drains(recall),
            Err(error) => {
                self.drains.failed += 1;
                warn!(%error, "what was known of leaving backends cannot be read; their time begins anew");
            }
        }
    }

    fn write_drains(&mut self) {
        let trouble = self.drains.file.keep(self.view.desired().drains()).err();
        let trouble = trouble.map(|error| error.to_string());
        if let Some(error) = &trouble {
            self.drains.failed += 1;
            if self.drains.trouble != trouble {
                warn!(
                    error,
                    "what is known of leaving backends cannot be kept for the next agent"
                );
            }
        }
        self.drains.trouble = trouble;
    }

    fn look_at_slices(&mut self, now: Instant) {
        let pods = &self.pods;
        // Before the first look at pods, one that was found may have no lease yet.
        let looked = pods.has_looked();
        let is_gone = |ip| looked && pods.leases().is_abandoned(ip);
        for (server, end) in self.view.look_at_drains(self.drains.bound, now, is_gone) {
            self.end_drain(&server, end);
        }
    }

    fn end_drain(&mut self, server: &Server, end: End) {
        self.note_end(server, end);
        self.dirty.insert_service(server.0);
    }

    fn note_end(&mut self, server: &Server, end: End) {
        let (key, backend) = server;
        if end != End::Idle {
            info!(service = %key, %backend, reason = end.name(), "a backend's connections end");
            if let Some(observed) = &self.observed {
                let flows = frontends(*key, observed).into_iter();
                let flows = flows.map(|frontend| (frontend, *backend));
                self.drains.stale.extend(flows);
            }
        }
        *self.drains.ended.entry(end.name()).or_default() += 1;
    }

    async fn count_connections(&mut self, now: Instant) {
        if self.drains.queue.is_empty() && self.drains.count_at <= now {
            self.drains.count_at = now + COUNT;
            let live = self.view.desired().drains().live();
            let keys: BTreeSet<ServiceKey> = live.map(|((key, _), _)| *key).collect();
            self.drains.queue = keys.into_iter().collect();
        }
        for _ in 0..AT_ONCE {
            let fresh = self.drains.fresh.pop_first();
            let Some(key) = fresh.or_else(|| self.drains.queue.pop_front()) else {
                return;
            };
            let kept: Vec<BackendAddr> = self.view.desired().drains().kept(key).collect();
            let Some(kernel) = self.kernel.as_ref().filter(|_| !kept.is_empty()) else {
                continue;
            };
            // What cannot be read is counted again the next time; the audit finds why.
            let Ok(connections) = kernel.connections(&key).await else {
                continue;
            };
            let known = self.observed.as_ref().and_then(|o| o.services.get(&key));
            // Only with weight 0 none can come between the count and the removal.
            let weights: BTreeMap<_, _> = known.map(|s| s.servers.clone()).unwrap_or_default();
            let kept = kept.into_iter().filter(|b| weights.get(b) == Some(&0));
            let (mut idle, mut inactive) = (Vec::new(), Vec::new());
            for backend in kept {
                match connections.get(&backend) {
                    None | Some((0, 0)) => idle.push(backend),
                    Some((0, _)) => inactive.push(backend),
                    Some(_) => {}
                }
            }
            if !inactive.is_empty()
                && let Some(open) = self.open_connections(key).await
            {
                idle.extend(inactive.into_iter().filter(|b| !open.contains(b)));
            }
            for backend in idle {
                self.view.end_drain(&(key, backend));
                self.end_drain(&(key, backend), End::Idle);
            }
        }
    }

    /// Backends of a virtual service with connections that have not ended, of which IPVS
    /// knows no active ones. `None` where nobody can tell: they end with their time-out then.
    async fn open_connections(&mut self, key: ServiceKey) -> Option<BTreeSet<BackendAddr>> {
        let frontends = frontends(key, self.observed.as_ref()?);
        let conntrack = match self.drains.conntrack.take() {
            Some(conntrack) => conntrack,
            None => Conntrack::open().ok()?,
        };
        let mut open = BTreeSet::new();
        for frontend in &frontends {
            open.extend(conntrack.open_to(frontend).await.ok()?);
        }
        self.drains.conntrack = Some(conntrack);
        Some(open)
    }

    /// What `status` tells.
    pub(super) fn draining(&self) -> Draining {
        let drains = self.view.desired().drains();
        let oldest = drains.live().map(|(_, drain)| drain.since.elapsed()).max();
        let ended = self.drains.ended.iter();
        Draining {
            backends: drains.live().count(),
            oldest: oldest.map(|oldest| oldest.as_secs_f64()),
            bound: self.drains.bound.as_secs_f64(),
            ended: ended
                .map(|(end, count)| ((*end).to_owned(), *count))
                .collect(),
            forgotten_flows: self.drains.forgotten,
            failed: self.drains.failed,
        }
    }

    /// Lets what is not wanted any longer keep its connections, before the difference to
    /// the kernel is taken.
    pub(super) fn drain(&mut self, scope: &mut Scope) {
        let Some(observed) = &self.observed else {
            return;
        };
        for server in self.view.drain(observed, scope, Instant::now()) {
            self.note_end(&server, End::PodGone);
        }
    }
}
