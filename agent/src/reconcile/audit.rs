//! Whether the kernel still is what it was made.
//!
//! Devices, addresses and routes are compared when an event says that another
//! touched them; our nftables table when the generation of the kernel's ruleset
//! has moved; virtual services in one dump every [`SERVICES`]; their real
//! servers a few at a time, so that a share of one core is not exceeded. What
//! differs replaces what was believed, and the next pass of the reconciler puts
//! it right like any other difference.

use std::ops::Bound;
use std::time::{Duration, Instant};

use ferrule_datapath::modules;
use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::observed::Observed;
use ferrule_model::service::{ServiceKey, VirtualService};

use tracing::{info, warn};

use super::Reconciler;
use super::difference::{Difference, filter_words};
use super::faults::now;
use crate::memory;

/// Time between two looks at what costs little.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// Time between two dumps of the virtual services.
const SERVICES: Duration = Duration::from_secs(30);

/// Longest pause after a comparison of the table that was expensive.
const LONGEST_FILTER_PAUSE: Duration = Duration::from_secs(30);

/// Most time that the comparison of real servers may save up, so that it never
/// holds up a change for long.
const LARGEST_ALLOWANCE: Duration = Duration::from_millis(50);

/// Where the audit is.
#[derive(Debug)]
pub(super) struct Audit {
    /// Share of a core for real servers, 0 to 1.
    pub(super) budget: f64,
    pub(super) next_tick: Instant,
    next_services: Instant,
    next_filter: Instant,
    /// Time that may be spent on real servers; below zero after an expensive one.
    allowance: f64,
    last_tick: Instant,
    /// The last virtual service whose real servers were compared.
    cursor: Option<ServiceKey>,
    round_began: Instant,
    /// Time that one virtual service takes, in seconds, as a moving average.
    cost: f64,
    pub(super) done: usize,
    pub(super) rounds: u64,
    pub(super) last_round: Option<f64>,
    pub(super) services_at: Option<u64>,
    pub(super) filter_at: Option<u64>,
}

impl Audit {
    pub(super) fn new(budget_percent: f64) -> Self {
        let start = Instant::now();
        Self {
            budget: budget_percent / 100.0,
            next_tick: start + TICK,
            next_services: start + SERVICES,
            next_filter: start,
            allowance: 0.0,
            last_tick: start,
            cursor: None,
            round_began: start,
            cost: 0.0,
            done: 0,
            rounds: 0,
            last_round: None,
            services_at: None,
            filter_at: None,
        }
    }

    /// Begins a tick; real servers may be compared for as long as [`Audit::may_go_on`].
    pub(super) fn begin(&mut self) {
        let start = Instant::now();
        let earned = start.duration_since(self.last_tick).as_secs_f64() * self.budget;
        self.allowance = (self.allowance + earned).min(LARGEST_ALLOWANCE.as_secs_f64());
        self.last_tick = start;
        self.next_tick = start + TICK;
    }

    pub(super) fn services_are_due(&mut self) -> bool {
        let due = Instant::now() >= self.next_services;
        if due {
            self.next_services = Instant::now() + SERVICES;
        }
        due
    }

    pub(super) fn filter_is_due(&self) -> bool {
        Instant::now() >= self.next_filter
    }

    /// Notes a comparison of the table, which is not repeated before its cost is within the budget.
    pub(super) fn filter_done(&mut self, began: Instant) {
        let pause = began.elapsed().div_f64(self.budget.max(0.0001));
        self.next_filter = Instant::now() + pause.min(LONGEST_FILTER_PAUSE);
        self.filter_at = Some(now());
    }

    pub(super) fn may_go_on(&self) -> bool {
        self.allowance > 0.0
    }

    /// The virtual service whose turn it is. `None` at the end of a round.
    pub(super) fn next_service(&mut self, observed: &Observed) -> Option<ServiceKey> {
        let after = self.cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let next = observed
            .services
            .range((after, Bound::Unbounded))
            .next()
            .map(|(addr, _)| *addr);
        if next.is_none() {
            if self.done > 0 {
                self.rounds += 1;
                self.last_round = Some(self.round_began.elapsed().as_secs_f64());
            }
            self.done = 0;
            self.round_began = Instant::now();
        }
        self.cursor = next;
        next
    }

    /// Notes what a comparison took.
    pub(super) fn spent(&mut self, began: Instant) {
        let spent = began.elapsed().as_secs_f64();
        self.allowance -= spent;
        self.done += 1;
        self.cost = if self.cost > 0.0 {
            self.cost * 0.95 + spent * 0.05
        } else {
            spent
        };
    }

    /// How long a round over so many virtual services takes, in seconds.
    pub(super) fn estimate(&self, services: usize) -> Option<f64> {
        let count = f64::from(u32::try_from(services).unwrap_or(u32::MAX));
        // Ticks are whole; a round is never shorter than one.
        (self.cost > 0.0 && services > 0)
            .then(|| (count * self.cost / self.budget).max(TICK.as_secs_f64()))
    }
}

impl Reconciler {
    /// Counts what was found; the next pass puts it right.
    pub(super) fn note_drift(&mut self, difference: Difference) {
        for (kind, words) in &difference.words {
            self.drifts.note(kind, words);
        }
        self.dirty.merge(difference.scope);
    }

    /// The part of the audit that goes by the clock.
    pub(super) async fn audit_if_due(&mut self) {
        if Instant::now() < self.audit.next_tick {
            return;
        }
        self.audit.begin();
        if std::mem::take(&mut self.changed_since_rest) {
            memory::give_back();
        }
        if let Err(error) = self.audit_once().await {
            // What is believed may be wrong now: observe before going on.
            self.kernel = None;
            self.observed = None;
            self.kernel_fault(&error, "the audit cannot read the kernel");
        }
    }

    async fn audit_once(&mut self) -> Result<(), String> {
        self.audit_filter().await?;
        if self.audit.services_are_due() {
            self.look_for_schedulers();
            self.audit_services().await?;
        }
        self.audit_servers().await
    }

    /// A scheduler that the kernel lacked may have been loaded since.
    fn look_for_schedulers(&mut self) {
        let facts = self.view.desired().facts();
        let mut missing = facts.missing_schedulers.iter();
        if missing.any(|scheduler| modules::is_loaded(&format!("ip_vs_{scheduler}"))) {
            let scope = self.view.forget_missing_schedulers();
            self.dirty.merge(scope);
        }
    }

    async fn audit_filter(&mut self) -> Result<(), String> {
        let (Some(kernel), Some(observed)) = (&mut self.kernel, &mut self.observed) else {
            return Ok(());
        };
        if !self.audit.filter_is_due() {
            return Ok(());
        }
        let moved = kernel.filter_moved().await.map_err(|e| e.to_string())?;
        let Some(generation) = moved else {
            return Ok(());
        };
        let began = Instant::now();
        let mut generation = generation;
        if let Some(drift) = kernel.filter_drift().await.map_err(|e| e.to_string())? {
            kernel.repair_filter().await.map_err(|e| e.to_string())?;
            self.drifts.note("filter", &[filter_words(drift)]);
            // Our own loading moved it again; whatever comes behind that is seen next time.
            let moved = kernel.filter_moved().await.map_err(|e| e.to_string())?;
            generation = moved.unwrap_or(generation);
        }
        let mut found = Observed::default();
        let strange = kernel.observe_filter(&mut found).await;
        let strange: Vec<String> = strange
            .map_err(|e| e.to_string())?
            .into_iter()
            .map(|set| format!("a foreign element was in set {set}"))
            .collect();
        self.drifts.note("filter", &strange);
        kernel.filter_compared(generation);
        self.audit.filter_done(began);
        let mut difference = Difference::default();
        difference.filter(observed, &found);
        observed.take_filter(found);
        self.note_drift(difference);
        Ok(())
    }

    async fn audit_services(&mut self) -> Result<(), String> {
        let (Some(kernel), Some(observed)) = (&self.kernel, &mut self.observed) else {
            return Ok(());
        };
        let found = kernel.observe_services(observed).await;
        let found = found.map_err(|error| error.to_string())?;
        self.audit.services_at = Some(now());
        let mut differing = Vec::new();
        for (addr, scheduling) in &found {
            let known = observed.services.get(addr);
            if known.is_none_or(|known| known.scheduling != *scheduling) {
                differing.push((*addr, Some(scheduling.clone())));
            }
        }
        let gone = observed
            .services
            .keys()
            .filter(|addr| !found.contains_key(addr));
        differing.extend(gone.map(|addr| (*addr, None)));
        let mut difference = Difference::default();
        for (addr, scheduling) in differing {
            let service = match scheduling {
                None => None,
                Some(scheduling) => Some(VirtualService {
                    scheduling,
                    servers: kernel
                        .observe_servers(&addr)
                        .await
                        .map_err(|error| error.to_string())?,
                }),
            };
            difference.service(&addr, observed.services.get(&addr), service.as_ref());
            match service {
                Some(service) => observed.services.insert(addr, service),
                None => observed.services.remove(&addr),
            };
        }
        self.note_drift(difference);
        Ok(())
    }

    /// Compares real servers for as long as the budget allows.
    async fn audit_servers(&mut self) -> Result<(), String> {
        while self.audit.may_go_on() {
            let (Some(kernel), Some(observed)) = (&self.kernel, &mut self.observed) else {
                return Ok(());
            };
            let Some(addr) = self.audit.next_service(observed) else {
                return Ok(());
            };
            let began = Instant::now();
            let servers = kernel.observe_servers(&addr).await;
            let servers = servers.map_err(|error| error.to_string())?;
            self.audit.spent(began);
            let Some(believed) = observed.services.get_mut(&addr) else {
                continue;
            };
            if believed.servers == servers {
                continue;
            }
            let before = believed.clone();
            believed.servers = servers;
            let mut difference = Difference::default();
            difference.service(&addr, Some(&before), Some(believed));
            self.note_drift(difference);
        }
        Ok(())
    }

    /// Where VIPs are bound otherwise now, the device goes with the last of them.
    pub(super) async fn remove_unused_device(&mut self) {
        let knows_all = self.knows_all();
        let (Some(kernel), Some(observed)) = (&mut self.kernel, &self.observed) else {
            return;
        };
        let unneeded = self.settings.vip_binding != VipBinding::Address;
        let used = || {
            observed
                .bound
                .iter()
                .any(|(_, way)| *way == Binding::Address)
        };
        if !unneeded || !knows_all || kernel.device_index().is_none() || used() {
            return;
        }
        match kernel.remove_unused_device().await {
            Ok(true) => info!(device = %self.settings.vip_device, "removed, no VIP needs it"),
            Ok(false) => {}
            Err(error) => warn!(%error, "an unused device stays"),
        }
    }

    pub(super) async fn audit_bindings(&mut self) -> Result<(), String> {
        let (Some(kernel), Some(observed)) = (&mut self.kernel, &mut self.observed) else {
            return Ok(());
        };
        if kernel.ensure_device().await.map_err(|e| e.to_string())? {
            let words = format!("device {} was gone", self.settings.vip_device);
            self.drifts.note("device", &[words]);
        }
        let found = Observed {
            bound: kernel.observe_bindings().await.map_err(|e| e.to_string())?,
            ..Observed::default()
        };
        let mut difference = Difference::default();
        difference.vips(observed, &found);
        observed.bound = found.bound;
        self.note_drift(difference);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrule_model::address::{FrontendAddr, Protocol};

    fn addr(n: u8) -> FrontendAddr {
        FrontendAddr::new([10, 96, 0, n].into(), 80, Protocol::Tcp)
    }

    #[test]
    fn rounds_visit_every_service_once() {
        let mut observed = Observed::default();
        for n in [1, 2, 3] {
            observed
                .services
                .insert(addr(n).into(), VirtualService::default());
        }
        let mut audit = Audit::new(0.3);
        for round in 1..=2_u64 {
            let mut visited = Vec::new();
            while let Some(next) = audit.next_service(&observed) {
                visited.push(next);
                audit.spent(Instant::now());
            }
            assert_eq!(visited, [1, 2, 3].map(|n| addr(n).into()));
            assert_eq!(audit.rounds, round);
        }
        // One that vanishes while it is its turn is no obstacle.
        audit.next_service(&observed);
        observed.services.remove(&addr(1).into());
        assert_eq!(audit.next_service(&observed), Some(addr(2).into()));
    }

    #[test]
    fn the_budget_bounds_the_time_spent() {
        let mut audit = Audit::new(0.3);
        audit.begin();
        audit.allowance = 0.001;
        assert!(audit.may_go_on());
        audit.spent(
            Instant::now()
                .checked_sub(Duration::from_millis(100))
                .unwrap(),
        );
        assert!(!audit.may_go_on());
        audit.begin();
        assert!(
            !audit.may_go_on(),
            "a debt of 100 ms is paid in half a minute"
        );
        let estimate = audit.estimate(100).unwrap();
        assert!((3000.0..4000.0).contains(&estimate), "{estimate}");
    }
}
