//! Keeps the kernel as the facts want it.
//!
//! One task owns the facts, the desired state and what is known of the kernel.
//! A change costs what it touches: the Services concerned are computed anew,
//! their addresses compared and the difference carried out. What fails hurts
//! only its own addresses; they wait and are tried again with growing pauses,
//! while other changes go on. Everything is observed and compared at the start,
//! and when the kernel's state is in doubt; beside that the [`audit`] looks for
//! what others changed.

mod audit;
mod configure;
mod difference;
mod drain_file;
mod drains;
mod faults;
mod health_checks;
mod host_ports;
mod network;
mod progress;
mod report;
mod trace;
mod tuning;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ferrule_api::status::{LastChange, Problem};
use ferrule_datapath::modules::Missing;
use ferrule_datapath::{ChangeError, Node, Settings, apply};
use ferrule_model::address::{Family, FrontendAddr};
use ferrule_model::change::Change;
use ferrule_model::cluster::Touched;
use ferrule_model::condition::Condition;
use ferrule_model::desired::{Frontend, Scope};
use ferrule_model::diff::{diff, everything};
use ferrule_model::ipam::PodRange;
use ferrule_model::names::ObjectName;
use ferrule_model::observed::Observed;
use ferrule_model::service::ServiceKey;
use ferrule_model::view::NodeView;
use rustix::io::Errno;
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, error, info, warn};

use self::audit::Audit;
use self::difference::{Difference, Drifts};
use self::drains::Drains;
pub(crate) use self::faults::now;
use self::faults::{About, Faults, remedy, with_remedy};
use self::health_checks::HealthChecks;
pub(crate) use self::host_ports::PortsFault;
use self::network::Network;
pub(crate) use self::report::{Asker, Query};
use crate::config::Config;
use crate::events::Events;
use crate::pods::Pods;
use crate::programming::Programming;
use crate::source::Update;

/// Pause before a failed change is tried again: doubles from the first to the second.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Owner of the node's services.
pub(crate) struct Reconciler {
    settings: Settings,
    pods: Arc<Pods>,
    view: NodeView,
    /// Every source has told all it has; before that nothing is removed.
    complete: bool,
    kernel: Option<Node>,
    /// Modules that could not be loaded.
    missing: Missing,
    /// What the kernel holds; `None` until it was observed, and when it is in doubt.
    observed: Option<Observed>,
    /// What was believed when the kernel was found to be otherwise.
    contradicted: Option<Observed>,
    network: Network,
    dirty: Scope,
    /// What failed and waits for another try.
    waiting: Scope,
    retry_at: Option<Instant>,
    pause: Duration,
    /// When the oldest change was noticed that is not in the kernel.
    pending_since: Option<Instant>,
    /// Whether the kernel was changed since memory was given back.
    changed_since_rest: bool,
    last_change: Option<LastChange>,
    faults: Faults,
    /// What was logged of Services and their slices, by Service.
    said: BTreeMap<ObjectName, BTreeSet<Condition>>,
    /// What was logged of other objects.
    said_of_nodes: BTreeSet<Condition>,
    audit: Audit,
    drifts: Drifts,
    drains: Drains,
    source: report::Source,
    /// What is wrong with the configuration file.
    of_config: Option<Problem>,
    /// What is wrong with pods' addresses, since when.
    of_pods: Vec<Problem>,
    statistics: report::Statistics,
    /// Pods that are being added and wait for their host ports.
    waiting_pods: Vec<host_ports::Waiting>,
    /// Keys that were host ports while not everything was known.
    freed: BTreeSet<FrontendAddr>,
    health_checks: HealthChecks,
    events: Events,
    /// Kernel settings that the configuration asks for.
    tunings: tuning::Tunings,
    /// For whoever asks how far everything has come.
    programming: Arc<Programming>,
}

impl Reconciler {
    pub(crate) fn new(
        node_name: &str,
        settings: Settings,
        config: &Config,
        pods: Arc<Pods>,
        source: String,
        events: Events,
        programming: Arc<Programming>,
    ) -> Self {
        let vip_binding = config.policy.vip_binding.clone();
        let drains = Drains::new(config.drain_timeout, pods.state_dir());
        Self {
            network: Network::new(settings.vip_device.to_string(), &vip_binding),
            settings: Settings {
                vip_binding,
                excluded: config.kube_proxy.excluded.clone(),
                connection_table_bits: config.connection_table_bits,
                ..settings
            },
            pods,
            view: NodeView::new(node_name, config.policy.clone()),
            complete: false,
            kernel: None,
            missing: Missing::default(),
            observed: None,
            contradicted: None,
            dirty: Scope::default(),
            waiting: Scope::default(),
            retry_at: None,
            pause: RETRY.0,
            pending_since: None,
            changed_since_rest: false,
            last_change: None,
            faults: Faults::default(),
            said: BTreeMap::new(),
            said_of_nodes: BTreeSet::new(),
            audit: Audit::new(config.audit_budget),
            drifts: Drifts::default(),
            drains,
            source: report::Source::new(source),
            of_config: None,
            of_pods: Vec::new(),
            statistics: report::Statistics::default(),
            waiting_pods: Vec::new(),
            freed: BTreeSet::new(),
            health_checks: HealthChecks::new(),
            events,
            tunings: tuning::Tunings::new(config),
            programming,
        }
    }

    /// Runs until the source is gone.
    pub(crate) async fn run(
        mut self,
        mut updates: mpsc::Receiver<Update>,
        mut queries: mpsc::Receiver<Query>,
    ) {
        // Listening begins before the first look, so that nothing falls in between.
        self.network.open(&mut self.faults);
        self.health_checks.serve(&self.programming);
        let mut told = false;
        let host_ports = self.pods.leases().host_port_news();
        loop {
            self.programming.note_turn();
            self.look_at_network().await;
            self.take_host_ports();
            if told {
                let pass = self.begin_pass();
                self.reconcile().await;
                self.end_pass(&pass);
                self.keep_drains().await;
                self.tune_to_node().await;
                self.answer_waiting_pods();
                self.audit_if_due().await;
                self.tell_health_checks();
            }
            self.note_pods();
            let wake = self.wake_at(told);
            tokio::select! {
                update = updates.recv() => {
                    let Some(update) = update else {
                        return;
                    };
                    told = true;
                    self.take(update);
                    // What came meanwhile is done in the same pass.
                    while let Ok(update) = updates.try_recv() {
                        self.take(update);
                    }
                }
                Some(query) = queries.recv() => {
                    self.answer(query).await;
                    // Pods that are added at the same time get their host ports in one pass.
                    for _ in 0..queries.len() {
                        if let Ok(query) = queries.try_recv() {
                            self.answer(query).await;
                        }
                    }
                }
                () = self.network.news(&mut self.faults) => {}
                () = host_ports.notified() => {}
                () = sleep_until(wake.into()) => {}
            }
        }
    }

    /// When there is something to do without news.
    fn wake_at(&self, told: bool) -> Instant {
        let work = !self.dirty.is_empty() || (self.knows_all() && self.drains.is_busy());
        if told && work && self.retry_at.is_none() {
            return Instant::now();
        }
        let times = [self.retry_at, self.network.wake_at(told)];
        let tick = self.audit.next_tick.max(Instant::now());
        times.into_iter().flatten().fold(tick, Instant::min)
    }

    /// Takes facts in; the kernel is not touched.
    fn take(&mut self, mut update: Update) {
        let triggers = self.note_update(&mut update);
        if !update.events.is_empty() {
            self.source.last_event = Some(now());
            self.pending_since = self.pending_since.or(Some(update.seen));
        }
        let (scope, touched) = self.view.take(update.events);
        if !touched.services.is_empty() || !touched.nodes.is_empty() {
            self.drains.look_soon();
        }
        self.note_touched(&touched, triggers);
        self.dirty.merge(scope);
        if let Some(report) = update.report {
            self.source.take(report);
        }
        if !touched.nodes.is_empty() {
            self.network.routes_are_suspect();
        }
        self.say_conditions(&touched);
        if touched.nodes.contains(self.view.node()) {
            self.set_pod_ranges();
            self.tunings.bridges_are_suspect();
        }
        if update.complete && !self.complete {
            info!(source = self.source.name, "everything was read");
            self.complete = true;
            if self.events.has_cluster() {
                self.view.know_all_nodes();
            }
            self.network.routes_are_suspect();
            // Before that, what is wrong may only seem so.
            for condition in self.said.values().flatten() {
                self.events.tell(condition);
            }
            self.freed.clear();
            if let Some(observed) = &self.observed {
                self.dirty.merge(everything(self.view.desired(), observed));
            }
        }
        debug!(
            services = touched.services.len(),
            age = ?update.seen.elapsed(),
            "change taken in"
        );
    }

    /// Logs what is new about the objects concerned, once.
    fn say_conditions(&mut self, touched: &Touched) {
        let mut news: BTreeSet<Condition> = BTreeSet::new();
        for service in &touched.services {
            let conditions: BTreeSet<Condition> = self
                .view
                .desired()
                .conditions_of(service)
                .into_iter()
                .collect();
            let before = self.said.remove(service).unwrap_or_default();
            news.extend(conditions.difference(&before).cloned());
            // One without any takes no memory, also when its Service is gone.
            if !conditions.is_empty() {
                self.said.insert(service.clone(), conditions);
            }
        }
        if touched.service_cidrs || !touched.nodes.is_empty() {
            let conditions: BTreeSet<Condition> = self.view.node_conditions().into_iter().collect();
            news.extend(conditions.difference(&self.said_of_nodes).cloned());
            self.said_of_nodes = conditions;
        }
        for condition in news {
            warn!(object = %condition.object, reason = %condition.reason, "{}", condition.message);
            if self.complete {
                self.events.tell(&condition);
            }
        }
    }

    /// A Node that vanished keeps its ranges: pods go on, and a folder of
    /// manifests may be in the middle of being replaced.
    fn set_pod_ranges(&self) {
        let node = self.view.node();
        let Some(object) = self.view.cluster().node(node) else {
            warn!(node, "the Node object is gone; its pod ranges stay in use");
            return;
        };
        let mut ranges: Vec<PodRange> = Vec::new();
        for text in object.pod_cidrs() {
            match PodRange::parse(text) {
                Ok(range) => ranges.push(range),
                Err(error) => warn!(node, "spec.podCIDRs: {error}; it is left out"),
            }
        }
        for family in Family::ALL {
            let of_family = ranges.iter().filter(|range| range.family() == family);
            if of_family.count() > 1 {
                warn!(node, "spec.podCIDRs: two {family} ranges, the first counts");
            }
        }
        if !ranges.is_empty() {
            self.pods.leases().set_ranges(ranges);
        }
    }

    /// Makes the kernel as desired, as far as it can be now.
    async fn reconcile(&mut self) {
        self.routes().await;
        let due = self.retry_at.is_none_or(|retry| retry <= Instant::now());
        if due {
            self.dirty.merge(std::mem::take(&mut self.waiting));
        }
        if self.kernel.is_none() || self.observed.is_none() {
            // Nothing can be done before the kernel can be had, be there news or not.
            if !due || !self.prepare().await {
                return;
            }
        }
        if due {
            self.retry_at = None;
        }
        if due || !self.faults.has(About::SourceNat) {
            self.set_source_nat().await;
        }
        if self.dirty.is_empty() {
            self.settle();
            return;
        }
        let changes = self.changes();
        if changes.is_empty() {
            self.settle();
        } else {
            self.carry_out(&changes).await;
        }
        self.remove_unused_device().await;
    }

    /// What lies between what is and what should be, at the addresses that may differ.
    fn changes(&mut self) -> Vec<Change> {
        let mut scope = std::mem::take(&mut self.dirty);
        self.drain(&mut scope);
        let Some(observed) = &self.observed else {
            return Vec::new();
        };
        let mut changes = diff(self.view.desired(), observed, &scope);
        // What failed and is not wanted any longer, or was done by another, is no fault.
        let open: BTreeSet<About> = changes.iter().map(about).collect();
        self.faults.clear_if(|about| {
            let looked_at = match about {
                About::Frontend(addr) => scope.frontends.contains(&addr),
                About::Marked(key) => scope.marked.contains(&key),
                About::Address(ip) => scope.vips.contains(&ip) || scope.hairpins.contains(&ip),
                _ => false,
            };
            looked_at && !open.contains(&about)
        });
        if !self.knows_all() {
            let all = changes.len();
            changes.retain(|change| !removes(change) || self.is_certain(change));
            if changes.len() < all {
                warn!(
                    held_back = all - changes.len(),
                    "nothing is removed until every manifest can be read"
                );
            }
        }
        changes
    }

    /// Everything that can be done is done.
    fn settle(&mut self) {
        if self.waiting.is_empty() {
            self.pending_since = None;
            if !self.faults.has(About::SourceNat) {
                self.retry_at = None;
                self.pause = RETRY.0;
            }
        }
    }

    fn retry_later(&mut self) {
        self.retry_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(RETRY.1);
    }

    /// Opens and observes the kernel. False when that failed.
    async fn prepare(&mut self) -> bool {
        if self.kernel.is_none() {
            if self.settings.load_modules {
                let table_bits = self.settings.connection_table_bits;
                self.missing.load(table_bits).await;
            }
            self.tunings.set_sysctls(&self.settings.sysctls);
            let nat = self.view.source_nat();
            match Node::open(self.settings.clone(), nat, !self.knows_all()).await {
                Ok(kernel) => {
                    self.set_timeouts(&kernel).await;
                    self.kernel = Some(kernel);
                }
                Err(error) => {
                    let words =
                        "services cannot be programmed; pods get their addresses all the same";
                    self.kernel_fault(&error.to_string(), words);
                    return false;
                }
            }
        }
        let Some(kernel) = &self.kernel else {
            return false;
        };
        match kernel.observe().await {
            Ok(observed) => {
                info!(
                    services = observed.services.len(),
                    vips = observed.bound_vips().count(),
                    "the kernel's state was adopted"
                );
                self.dirty.merge(everything(self.view.desired(), &observed));
                if let Some(believed) = self.contradicted.take() {
                    self.note_drift(Difference::of(&believed, &observed));
                }
                self.observed = Some(observed);
                self.faults.clear(About::Kernel);
                true
            }
            Err(error) => {
                // A socket in doubt is replaced by a new one.
                self.kernel = None;
                self.kernel_fault(&error.to_string(), "cannot observe the kernel");
                false
            }
        }
    }

    fn kernel_fault(&mut self, error: &str, words: &str) {
        let (error, remedy) = with_remedy(error);
        let fault = format!("{words}: {error}");
        if self
            .faults
            .note(About::Kernel, "kernel".to_owned(), fault, &remedy)
        {
            error!(error, remedy, retry = ?self.pause, "{words}");
        }
        self.retry_later();
    }

    /// Whether every source has told all it has, and the machine's addresses are known.
    fn knows_all(&self) -> bool {
        self.complete && self.network.is_known()
    }

    /// A failure holds up nothing else: the former rules stay loaded. Those of a
    /// former agent stay until all is known: to know less is no reason to replace
    /// the sources of fewer connections, or of more.
    async fn set_source_nat(&mut self) {
        let knows_all = self.knows_all();
        let Some(kernel) = &mut self.kernel else {
            return;
        };
        if kernel.keeps_former_source_nat() && !knows_all {
            return;
        }
        match kernel.set_source_nat(&self.view.source_nat()).await {
            Ok(changed) => {
                if changed {
                    info!("the rules of source NAT follow the node's addresses and networks");
                }
                self.faults.clear(About::SourceNat);
            }
            Err(error) => {
                self.note_fault(
                    About::SourceNat,
                    &format!("nftables table {}", self.settings.nft_table),
                    &error.to_string(),
                    "it is tried again by itself; until then the rules are the former ones",
                );
                self.retry_later();
            }
        }
    }

    fn note_fault(&mut self, about: About, object: &str, problem: &str, remedy: &str) {
        let new = self
            .faults
            .note(about, object.to_owned(), problem.to_owned(), remedy);
        if new {
            error!(object, retry = ?self.pause, "{problem}");
        }
    }

    async fn carry_out(&mut self, changes: &[Change]) {
        let (Some(kernel), Some(mut observed)) = (&mut self.kernel, self.observed.take()) else {
            return;
        };
        let start = Instant::now();
        let applied = apply(kernel, changes).await;
        self.note_leaving(&applied.done, &observed);
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
        let failed: BTreeSet<About> = applied.failed.iter().map(|(c, _)| about(c)).collect();
        for change in applied.done.iter().filter(|c| !failed.contains(&about(c))) {
            self.faults.clear(about(change));
        }
        let (mut doubt, mut contradiction) = (false, false);
        for (change, error) in &applied.failed {
            doubt |= error.leaves_doubt();
            contradiction |= error.is_contradiction();
            self.change_fault(change, error);
            self.waiting.insert_change(change);
        }
        for change in &applied.held_back {
            self.waiting.insert_change(change);
        }
        self.changed_since_rest |= !applied.done.is_empty();
        if !applied.done.is_empty() {
            // What still waits has a fault that says since when.
            let seen = self.pending_since.take().unwrap_or(start);
            self.last_change = Some(LastChange {
                at: now(),
                steps: applied.done.len(),
                seen_to_kernel: seen.elapsed().as_secs_f64(),
                kernel: start.elapsed().as_secs_f64(),
            });
        }
        if doubt {
            self.kernel = None;
            self.contradicted = contradiction.then_some(observed);
        } else {
            self.observed = Some(observed);
        }
        if self.waiting.is_empty() {
            self.settle();
        } else if self.retry_at.is_none() {
            self.retry_later();
        } else if doubt {
            // Everything waits for the kernel to be observed, not only what failed before.
            self.retry_at = Some(Instant::now() + RETRY.0);
        }
        // Otherwise what failed before has its time already: changes that have nothing to do with
        // it must not put that off, or where changes come all the time it is never tried again.
    }

    fn change_fault(&mut self, change: &Change, error: &ChangeError) {
        let holder = change
            .frontend()
            .and_then(|addr| self.view.desired().frontend(&addr))
            .map(Frontend::object);
        let marked = || {
            let ServiceKey::Mark { mark, .. } = change.service()? else {
                return None;
            };
            let holder = self.view.desired().mark_holder(mark)?;
            Some(format!("Service {}", holder.service))
        };
        let address = || change.ip().map(|ip| format!("address {ip}"));
        let object = holder.or_else(marked).or_else(address);
        let object = object.unwrap_or_else(|| change.to_string());
        let scheduler = match change {
            Change::AddService(_, how) | Change::UpdateService(_, how) => {
                Some(how.scheduler.name().to_owned())
            }
            _ => None,
        };
        let words = format!("cannot {change}: {error}");
        if let (Some(Errno::NOENT), Some(scheduler)) = (error.errno(), &scheduler) {
            let scope = self.view.note_missing_scheduler(scheduler);
            self.dirty.merge(scope);
        }
        let remedy = remedy(error.errno(), scheduler.as_deref());
        self.note_fault(about(change), &object, &words, &remedy);
    }

    /// Looks at what events say has changed: the VIP device, addresses, routes.
    async fn look_at_network(&mut self) {
        let device = self.kernel.as_ref().and_then(Node::device_index);
        self.network.judge(device, self.observed.as_ref());
        if self.network.bindings_are_suspect()
            && let Err(error) = self.audit_bindings().await
        {
            self.kernel = None;
            self.observed = None;
            self.kernel_fault(&error, "VIPs cannot be bound");
        }
        if self.network.devices_are_suspect() {
            tuning::look_at_devices(&self.settings.sysctls);
        }
        let was_known = self.network.is_known();
        let device = self.kernel.as_ref().and_then(Node::device_index).or(device);
        if let Some(own) = self.network.addresses(device, &mut self.faults).await {
            self.dirty.merge(self.view.set_own(own));
            self.network.routes_are_suspect();
            self.tunings.bridges_are_suspect();
            // What was held back for want of the addresses is looked at again.
            if !was_known && let Some(observed) = &self.observed {
                self.dirty.merge(everything(self.view.desired(), observed));
            }
        }
    }

    async fn routes(&mut self) {
        self.network
            .reconcile_routes(
                &self.view,
                self.complete,
                &mut self.faults,
                &mut self.drifts,
            )
            .await;
    }
}

/// Whom a fault of a change is filed under.
fn about(change: &Change) -> About {
    match (change.service(), change.frontend(), change.ip()) {
        (_, Some(frontend), _) => About::Frontend(frontend),
        (Some(key), None, _) => About::Marked(key),
        (None, None, Some(ip)) => About::Address(ip),
        (None, None, None) => About::Kernel,
    }
}

/// Whether a change takes something away that may still be wanted.
fn removes(change: &Change) -> bool {
    match change {
        Change::RemoveService(_)
        | Change::DisallowFrontend(_)
        | Change::RemoveExternal(_)
        | Change::RemovePreserved(_)
        | Change::RemoveDropped(_)
        | Change::AddLeaving(_)
        | Change::AddClosed(_)
        | Change::RemoveLeaving(_)
        | Change::RemoveClosed(_)
        | Change::RemoveServed(_)
        | Change::UnbindVip(..)
        | Change::UnsilenceVip(_)
        | Change::UnguardVip(_)
        | Change::RemoveServer(..)
        | Change::RemoveHairpin(_) => true,
        Change::SetMark(_, from, _) => from.is_some(),
        Change::Restrict(_, how) => !how.dismiss.is_empty() || how.limit == Some(false),
        Change::UpdateServer(_, _, weight) => *weight == 0,
        Change::GuardVip(_)
        | Change::SilenceVip(_)
        | Change::BindVip(..)
        | Change::RebindVip(..)
        // It is bound otherwise.
        | Change::ReleaseVip(..)
        | Change::AllowFrontend(_)
        | Change::AddExternal(_)
        | Change::AddPreserved(_)
        | Change::AddDropped(_)
        | Change::AddServed(_)
        | Change::AddHairpin(_)
        | Change::AddService(..)
        | Change::UpdateService(..)
        | Change::AddServer(..) => false,
    }
}
