//! Whether the kernel still is what it was made.
//!
//! Devices, addresses and routes are compared when an event says that another
//! touched them; our nftables table when the generation of the kernel's ruleset
//! has moved; virtual services in one dump every [`SERVICES`]; their real
//! servers a few at a time, so that a share of one core is not exceeded. What
//! differs replaces what was believed, and the next pass of the reconciler puts
//! it right like any other difference.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::time::{Duration, Instant};

use ferrule_datapath::FilterDrift;
use ferrule_model::address::FrontendAddr;
use ferrule_model::desired::Scope;
use ferrule_model::observed::Observed;
use ferrule_model::service::VirtualService;
use tracing::warn;

use super::faults::now;

/// Time between two looks at what costs little.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// Time between two dumps of the virtual services.
const SERVICES: Duration = Duration::from_secs(30);

/// Longest pause after a comparison of the table that was expensive.
const LONGEST_FILTER_PAUSE: Duration = Duration::from_secs(30);

/// Most time that the comparison of real servers may save up, so that it never
/// holds up a change for long.
const LARGEST_ALLOWANCE: Duration = Duration::from_millis(50);

/// Drift of one pass that is written to the log one by one.
const LOGGED: usize = 10;

/// What was found and counted.
#[derive(Debug, Default)]
pub(super) struct Drifts {
    pub(super) repaired: BTreeMap<&'static str, u64>,
    pub(super) last: Option<(u64, String)>,
}

impl Drifts {
    /// Notes drift of a kind, one text each.
    pub(super) fn note(&mut self, kind: &'static str, found: &[String]) {
        let count = u64::try_from(found.len()).unwrap_or(u64::MAX);
        let Some(last) = found.last() else {
            return;
        };
        *self.repaired.entry(kind).or_default() += count;
        for text in found.iter().take(LOGGED) {
            warn!(kind, "drift: {text}; it is put right");
        }
        if found.len() > LOGGED {
            warn!(
                kind,
                more = found.len() - LOGGED,
                "drift: and more of the kind"
            );
        }
        let text = if found.len() > 1 {
            format!("{last} (and {} more)", found.len() - 1)
        } else {
            last.clone()
        };
        self.last = Some((now(), text));
    }
}

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
    cursor: Option<FrontendAddr>,
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
    pub(super) fn next_service(&mut self, observed: &Observed) -> Option<FrontendAddr> {
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

/// What differs between what was believed and what was found, in words, by kind.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub(super) words: BTreeMap<&'static str, Vec<String>>,
    pub(super) scope: Scope,
}

impl Difference {
    fn say(&mut self, kind: &'static str, words: String) {
        self.words.entry(kind).or_default().push(words);
    }

    /// Compares everything.
    pub(super) fn of(believed: &Observed, found: &Observed) -> Self {
        let mut difference = Self::default();
        difference.vips(believed, found);
        difference.filter(believed, found);
        difference.services(believed, found);
        difference
    }

    /// Compares addresses on the VIP device.
    pub(super) fn vips(&mut self, believed: &Observed, found: &Observed) {
        for ip in believed.bound.difference(&found.bound) {
            self.say("address", format!("VIP {ip} was gone from its device"));
            self.scope.vips.insert(*ip);
        }
        for ip in found.bound.difference(&believed.bound) {
            self.say("address", format!("address {ip} was put on the VIP device"));
            self.scope.vips.insert(*ip);
        }
    }

    /// Compares elements of our sets.
    pub(super) fn filter(&mut self, believed: &Observed, found: &Observed) {
        for (set, believed, found) in [
            ("vips", &believed.guarded, &found.guarded),
            ("hairpins", &believed.hairpins, &found.hairpins),
        ] {
            for (ip, what) in differing(believed, found) {
                self.say("filter", format!("element {ip} of set {set} was {what}"));
                self.scope.vips.insert(ip);
                self.scope.hairpins.insert(ip);
            }
        }
        for (set, believed, found) in [
            ("frontends", &believed.allowed, &found.allowed),
            ("external", &believed.external, &found.external),
        ] {
            for (addr, what) in differing(believed, found) {
                self.say("filter", format!("element {addr} of set {set} was {what}"));
                self.scope.insert(addr);
            }
        }
    }

    fn services(&mut self, believed: &Observed, found: &Observed) {
        let keys: BTreeSet<&FrontendAddr> = believed
            .services
            .keys()
            .chain(found.services.keys())
            .collect();
        for addr in keys {
            self.service(addr, believed.services.get(addr), found.services.get(addr));
        }
    }

    /// Compares one virtual service with its real servers.
    pub(super) fn service(
        &mut self,
        addr: &FrontendAddr,
        believed: Option<&VirtualService>,
        found: Option<&VirtualService>,
    ) {
        match (believed, found) {
            (None, None) => return,
            (Some(_), None) => {
                self.say("service", format!("virtual service {addr} was gone"));
            }
            (None, Some(_)) => {
                self.say(
                    "service",
                    format!("virtual service {addr} was made by another"),
                );
            }
            (Some(believed), Some(found)) => {
                if believed == found {
                    return;
                }
                if believed.scheduling != found.scheduling {
                    self.say(
                        "service",
                        format!(
                            "virtual service {addr} had scheduler {} and other settings",
                            found.scheduling.scheduler
                        ),
                    );
                }
                self.servers(addr, believed, found);
            }
        }
        self.scope.insert(*addr);
    }

    fn servers(&mut self, addr: &FrontendAddr, believed: &VirtualService, found: &VirtualService) {
        for (backend, weight) in &believed.servers {
            match found.servers.get(backend) {
                None => self.say(
                    "server",
                    format!("real server {backend} of {addr} was gone"),
                ),
                Some(other) if other != weight => self.say(
                    "server",
                    format!(
                        "real server {backend} of {addr} had weight {other} instead of {weight}"
                    ),
                ),
                Some(_) => {}
            }
        }
        for backend in found
            .servers
            .keys()
            .filter(|b| !believed.servers.contains_key(b))
        {
            self.say(
                "server",
                format!("real server {backend} of {addr} was added by another"),
            );
        }
    }
}

fn differing<T: Copy + Ord>(believed: &BTreeSet<T>, found: &BTreeSet<T>) -> Vec<(T, &'static str)> {
    let gone = believed.difference(found).map(|item| (*item, "gone"));
    let added = found.difference(believed);
    gone.chain(added.map(|item| (*item, "added by another")))
        .collect()
}

/// What was wrong with the table, in words.
pub(super) fn filter_words(drift: FilterDrift) -> String {
    match drift {
        FilterDrift::Missing => "our nftables table was gone".to_owned(),
        FilterDrift::Changed => {
            "a rule, chain or set of our nftables table was changed by another".to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferrule_model::address::{BackendAddr, Protocol};

    fn addr(n: u8) -> FrontendAddr {
        FrontendAddr::new([10, 96, 0, n].into(), 80, Protocol::Tcp)
    }

    #[test]
    fn rounds_visit_every_service_once() {
        let mut observed = Observed::default();
        for n in [1, 2, 3] {
            observed.services.insert(addr(n), VirtualService::default());
        }
        let mut audit = Audit::new(0.3);
        for round in 1..=2_u64 {
            let mut visited = Vec::new();
            while let Some(next) = audit.next_service(&observed) {
                visited.push(next);
                audit.spent(Instant::now());
            }
            assert_eq!(visited, [addr(1), addr(2), addr(3)]);
            assert_eq!(audit.rounds, round);
        }
        // One that vanishes while it is its turn is no obstacle.
        audit.next_service(&observed);
        observed.services.remove(&addr(1));
        assert_eq!(audit.next_service(&observed), Some(addr(2)));
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

    #[test]
    fn differences_are_told_and_marked() {
        let backend = BackendAddr::new([10, 1, 0, 2].into(), 8080);
        let service = |weight| VirtualService {
            servers: BTreeMap::from([(backend, weight)]),
            ..VirtualService::default()
        };
        let mut believed = Observed::default();
        believed.services.insert(addr(1), service(1));
        believed.services.insert(addr(2), service(1));
        believed.bound.insert(addr(1).ip);
        let mut found = Observed::default();
        found.services.insert(addr(1), service(7));
        found.external.insert(addr(3));
        let difference = Difference::of(&believed, &found);
        let words: Vec<&str> = difference.words.values().flatten().map(|w| &**w).collect();
        assert_eq!(
            words,
            [
                "VIP 10.96.0.1 was gone from its device",
                "element 10.96.0.3:80/TCP of set external was added by another",
                "real server 10.1.0.2:8080 of 10.96.0.1:80/TCP had weight 7 instead of 1",
                "virtual service 10.96.0.2:80/TCP was gone",
            ]
        );
        assert_eq!(difference.scope.frontends.len(), 3);
        let same = Difference::of(&believed, &believed);
        assert!(same.words.is_empty() && same.scope.is_empty());
    }
}
