//! How far the programming of services has come, for whoever must not wait for the
//! reconciler: the node's health, and the metrics that kube-proxy's dashboards know.
//!
//! The reconciler tells it what it does; nothing here ever asks it. So a reconciler that
//! hangs is noticed by the change that waits.

use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets, linear_buckets};
use prometheus_client::registry::Registry;

/// Most changes of which it is remembered when they were caused, until they are programmed.
const MAX_TRIGGERS: usize = 4096;

/// For how long the reconciler may be at one thing.
const HANGS: Duration = Duration::from_mins(5);

/// A counter for each answer of a health check.
pub(crate) type Answers = Family<[(&'static str, &'static str); 1], Counter>;

/// What the node is doing about services.
#[derive(Debug)]
pub(crate) struct Programming {
    /// How long a change may wait before the node counts as unhealthy.
    patience: Duration,
    started: Timestamp,
    state: Mutex<State>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    /// When the oldest change was noticed that is not programmed.
    waiting_since: Option<Instant>,
    /// When everything was programmed that could be.
    updated: Option<Timestamp>,
    /// Whether the Node object says that the node goes.
    is_leaving: bool,
    /// When the reconciler was last at the beginning of its loop.
    turned: Option<Instant>,
    /// When the changes were caused that are not programmed.
    triggers: Vec<Timestamp>,
}

/// How a node fares for those who send it traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Health {
    /// No change has waited for too long.
    pub(crate) is_up_to_date: bool,
    /// The node is not about to go.
    pub(crate) is_eligible: bool,
    /// When everything was programmed that could be.
    pub(crate) updated: Option<Timestamp>,
}

/// kube-proxy's, by its names.
#[derive(Debug)]
struct Metrics {
    sync: Histogram,
    full: Histogram,
    partial: Histogram,
    network: Histogram,
    synced: Gauge<f64, AtomicU64>,
    queued: Gauge<f64, AtomicU64>,
    endpoints_pending: Gauge,
    endpoints: Counter,
    services_pending: Gauge,
    services: Counter,
    healthz: Answers,
    livez: Answers,
}

/// Objects of an update, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Noticed {
    /// Services.
    pub(crate) services: u32,
    /// `EndpointSlice`s.
    pub(crate) slices: u32,
}

impl Programming {
    /// Nothing has been done yet, which is healthy. A change may wait for twice `sync_period`.
    pub(crate) fn new(sync_period: Duration) -> Self {
        Self {
            patience: sync_period.saturating_mul(2),
            started: Timestamp::now(),
            state: Mutex::default(),
            metrics: Metrics::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes changes of Services and slices that were noticed at `seen`.
    pub(crate) fn note_changes(&self, noticed: Noticed, seen: Instant) {
        if noticed == Noticed::default() {
            return;
        }
        let metrics = &self.metrics;
        metrics.services.inc_by(noticed.services.into());
        metrics.services_pending.inc_by(noticed.services.into());
        metrics.endpoints.inc_by(noticed.slices.into());
        metrics.endpoints_pending.inc_by(noticed.slices.into());
        metrics.queued.set(seconds(Timestamp::now()));
        self.state().waiting_since.get_or_insert(seen);
    }

    /// Notes when a change was caused that is to be programmed. Those from before the
    /// agent's start tell nothing about it.
    pub(crate) fn note_trigger(&self, text: &str) {
        let Ok(caused) = text.parse::<Timestamp>() else {
            return;
        };
        let mut state = self.state();
        if caused > self.started && state.triggers.len() < MAX_TRIGGERS {
            state.triggers.push(caused);
        }
    }

    /// Notes that the reconciler goes on.
    pub(crate) fn note_turn(&self) {
        self.state().turned = Some(Instant::now());
    }

    /// Whether the reconciler has not come round for [`HANGS`]: what only a restart cures. It
    /// comes round once a second, and takes its time over the first tens of thousands of Services.
    pub(crate) fn hangs(&self) -> bool {
        let turned = self.state().turned;
        turned.is_some_and(|turned| turned.elapsed() >= HANGS)
    }

    /// Notes whether the Node object says that the node goes.
    pub(crate) fn note_node(&self, is_leaving: bool) {
        self.state().is_leaving = is_leaving;
    }

    /// Notes a pass that programmed something, or looked whether there was something to
    /// program; a full one compared everything.
    pub(crate) fn note_pass(&self, took: Duration, full: bool) {
        let metrics = &self.metrics;
        metrics.sync.observe(took.as_secs_f64());
        let kind = if full {
            &metrics.full
        } else {
            &metrics.partial
        };
        kind.observe(took.as_secs_f64());
    }

    /// Notes that everything is programmed that could be.
    pub(crate) fn note_up_to_date(&self) {
        let now = Timestamp::now();
        let metrics = &self.metrics;
        metrics.synced.set(seconds(now));
        metrics.services_pending.set(0);
        metrics.endpoints_pending.set(0);
        let triggers = {
            let mut state = self.state();
            state.waiting_since = None;
            state.updated = Some(now);
            std::mem::take(&mut state.triggers)
        };
        for caused in triggers {
            // The clock of who wrote it may be ahead.
            metrics
                .network
                .observe((seconds(now) - seconds(caused)).max(0.0));
        }
    }

    /// How the node fares.
    pub(crate) fn health(&self) -> Health {
        let state = self.state();
        let waited = state.waiting_since.map(|since| since.elapsed());
        Health {
            is_up_to_date: waited.is_none_or(|waited| waited < self.patience),
            is_eligible: !state.is_leaving,
            updated: state.updated,
        }
    }

    /// Answers of `/healthz`, by code.
    pub(crate) fn healthz_answers(&self) -> &Answers {
        &self.metrics.healthz
    }

    /// Answers of `/livez`, by code.
    pub(crate) fn livez_answers(&self) -> &Answers {
        &self.metrics.livez
    }

    /// Puts kube-proxy's metrics into a registry.
    pub(crate) fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
    }
}

/// Seconds since 1970 with fractions.
#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds of this century fit, and metrics are floats"
)]
fn seconds(time: Timestamp) -> f64 {
    time.as_microsecond() as f64 / 1e6
}

impl Metrics {
    fn new() -> Self {
        let sync = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let network = linear_buckets(0.25, 0.25, 2)
            .chain(linear_buckets(1.0, 1.0, 59))
            .chain(linear_buckets(60.0, 5.0, 12))
            .chain(linear_buckets(120.0, 30.0, 7));
        let answers = || {
            let answers = Answers::default();
            // Both series are there from the start.
            for code in ["200", "503"] {
                drop(answers.get_or_create(&[("code", code)]));
            }
            answers
        };
        Self {
            sync: sync(),
            full: sync(),
            partial: sync(),
            network: Histogram::new(network),
            synced: Gauge::default(),
            queued: Gauge::default(),
            endpoints_pending: Gauge::default(),
            endpoints: Counter::default(),
            services_pending: Gauge::default(),
            services: Counter::default(),
            healthz: answers(),
            livez: answers(),
        }
    }

    fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("kubeproxy");
        registry.register(
            "sync_proxy_rules_duration_seconds",
            "Duration of a pass over changes, from taking them up to the kernel's last acknowledgement",
            self.sync.clone(),
        );
        registry.register(
            "sync_full_proxy_rules_duration_seconds",
            "Duration of a pass that compared everything with the kernel",
            self.full.clone(),
        );
        registry.register(
            "sync_partial_proxy_rules_duration_seconds",
            "Duration of a pass over what had changed",
            self.partial.clone(),
        );
        registry.register(
            "network_programming_duration_seconds",
            "From the cause of a change of endpoints, as its EndpointSlice tells, to the kernel",
            self.network.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_timestamp_seconds",
            "When everything was last programmed that could be, in seconds since 1970",
            self.synced.clone(),
        );
        registry.register(
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "When a change was last taken in, in seconds since 1970",
            self.queued.clone(),
        );
        registry.register(
            "sync_proxy_rules_endpoint_changes_pending",
            "Changes of EndpointSlices that wait for a pass",
            self.endpoints_pending.clone(),
        );
        registry.register(
            "sync_proxy_rules_endpoint_changes",
            "Changes of EndpointSlices taken in",
            self.endpoints.clone(),
        );
        registry.register(
            "sync_proxy_rules_service_changes_pending",
            "Changes of Services that wait for a pass",
            self.services_pending.clone(),
        );
        registry.register(
            "sync_proxy_rules_service_changes",
            "Changes of Services taken in",
            self.services.clone(),
        );
        registry.register("proxy_healthz", "Answers of /healthz", self.healthz.clone());
        registry.register("proxy_livez", "Answers of /livez", self.livez.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_change() -> Noticed {
        Noticed {
            services: 1,
            slices: 2,
        }
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy_until_it_is_programmed() {
        let programming = Programming::new(Duration::from_secs(30));
        assert!(programming.health().is_up_to_date, "nothing is known yet");
        let minute = Duration::from_mins(1);
        let Some(long_ago) = Instant::now().checked_sub(minute) else {
            return;
        };
        programming.note_changes(Noticed::default(), long_ago);
        assert!(programming.health().is_up_to_date, "of no interest");
        programming.note_changes(one_change(), Instant::now());
        assert!(programming.health().is_up_to_date, "in time");
        programming.note_up_to_date();
        programming.note_changes(one_change(), long_ago);
        programming.note_changes(one_change(), Instant::now());
        assert!(!programming.health().is_up_to_date, "the oldest counts");
        programming.note_up_to_date();
        assert!(programming.health().is_up_to_date);
        assert!(programming.health().updated.is_some());
    }

    #[test]
    fn the_node_counts_apart() {
        let programming = Programming::new(Duration::from_secs(30));
        assert!(programming.health().is_eligible);
        programming.note_node(true);
        let health = programming.health();
        assert!(!health.is_eligible && health.is_up_to_date);
        programming.note_node(false);
        assert!(programming.health().is_eligible);
    }

    #[test]
    fn what_was_caused_before_the_start_is_not_measured() {
        let programming = Programming::new(Duration::from_secs(30));
        programming.note_trigger("2020-01-01T00:00:00Z");
        programming.note_trigger("no time");
        programming.note_trigger(&Timestamp::now().to_string());
        programming.note_trigger("2999-01-01T00:00:00.123456789Z");
        for _ in 0..MAX_TRIGGERS {
            programming.note_trigger("2999-01-01T00:00:00Z");
        }
        assert_eq!(programming.state().triggers.len(), MAX_TRIGGERS);
        programming.note_up_to_date();
        assert_eq!(programming.state().triggers.len(), 0);
    }
}
