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
mod kernel;
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
use ferrule_datapath::{Node, Settings};
use ferrule_model::address::{Family, FrontendAddr};
use ferrule_model::cluster::Touched;
use ferrule_model::condition::Condition;
use ferrule_model::desired::Scope;
use ferrule_model::diff::everything;
use ferrule_model::ipam::PodRange;
use ferrule_model::names::ObjectName;
use ferrule_model::observed::Observed;
use ferrule_model::view::NodeView;
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tracing::{debug, info, warn};

use self::audit::Audit;
use self::difference::Drifts;
use self::drains::Drains;
use self::faults::Faults;
pub(crate) use self::faults::now;
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
