//! What another changed: found by comparison, told in words, counted.

use std::collections::{BTreeMap, BTreeSet};

use ferrule_datapath::FilterDrift;
use ferrule_model::address::FrontendAddr;
use ferrule_model::binding::Binding;
use ferrule_model::desired::Scope;
use ferrule_model::observed::Observed;
use ferrule_model::service::{Mark, ServiceKey, VirtualService};
use tracing::warn;

use super::faults::now;

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

    /// Compares bindings of VIPs.
    pub(super) fn vips(&mut self, believed: &Observed, found: &Observed) {
        for (ip, binding) in believed.bound.difference(&found.bound) {
            let words = match binding {
                Binding::Address => format!("VIP {ip} was gone from its device"),
                Binding::Route { .. } => format!("the {binding} of VIP {ip} was gone"),
                Binding::Alias { device } => format!("VIP {ip} was gone from {device}"),
            };
            self.say("address", words);
            self.scope.vips.insert(*ip);
        }
        for (ip, binding) in found.bound.difference(&believed.bound) {
            let words = match binding {
                Binding::Address => format!("address {ip} was put on the VIP device"),
                Binding::Route { .. } => format!("a {binding} to {ip} was made"),
                Binding::Alias { device } => format!("address {ip} was put on {device}"),
            };
            self.say("address", words);
            self.scope.vips.insert(*ip);
        }
    }

    /// Compares elements of our sets.
    pub(super) fn filter(&mut self, believed: &Observed, found: &Observed) {
        for (set, believed, found) in [
            ("vips", &believed.guarded, &found.guarded),
            ("silent", &believed.silent, &found.silent),
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
            ("preserved", &believed.preserved, &found.preserved),
            ("dropped", &believed.dropped, &found.dropped),
            ("leaving", &believed.leaving, &found.leaving),
            ("closed", &believed.closed, &found.closed),
            ("limited", &believed.limited, &found.limited),
            ("served", &believed.served, &found.served),
        ] {
            for (addr, what) in differing(believed, found) {
                self.say("filter", format!("element {addr} of set {set} was {what}"));
                self.scope.insert(addr);
            }
        }
        self.admitted(believed, found);
        self.marks(believed, found);
    }

    /// Compares who may call the frontends that are limited.
    fn admitted(&mut self, believed: &Observed, found: &Observed) {
        let nobody = BTreeSet::new();
        let keys = believed.admitted.keys().chain(found.admitted.keys());
        for addr in keys.collect::<BTreeSet<_>>() {
            let of = |observed: &'_ Observed| observed.admitted.get(addr).cloned();
            let (before, now) = (of(believed), of(found));
            let before = before.as_ref().unwrap_or(&nobody);
            for (network, what) in differing(before, now.as_ref().unwrap_or(&nobody)) {
                let words = format!("element {network} . {addr} of set admitted was {what}");
                self.say("filter", words);
                self.scope.insert(*addr);
            }
        }
    }

    fn marks(&mut self, believed: &Observed, found: &Observed) {
        let pairs = |observed: &Observed| -> BTreeSet<(FrontendAddr, Mark)> {
            let marks = observed.marks.iter();
            marks.map(|(addr, mark)| (*addr, *mark)).collect()
        };
        for ((addr, mark), what) in differing(&pairs(believed), &pairs(found)) {
            let words = format!("element {addr} : {mark:#x} of map marks was {what}");
            self.say("filter", words);
            self.scope.insert(addr);
        }
    }

    fn services(&mut self, believed: &Observed, found: &Observed) {
        let keys: BTreeSet<&ServiceKey> = believed
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
        addr: &ServiceKey,
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
        self.scope.insert_service(*addr);
    }

    fn servers(&mut self, addr: &ServiceKey, believed: &VirtualService, found: &VirtualService) {
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
    fn differences_are_told_and_marked() {
        let backend = BackendAddr::new([10, 1, 0, 2].into(), 8080);
        let service = |weight| VirtualService {
            servers: BTreeMap::from([(backend, weight)]),
            ..VirtualService::default()
        };
        let mut believed = Observed::default();
        believed.services.insert(addr(1).into(), service(1));
        believed.services.insert(addr(2).into(), service(1));
        believed.bind(addr(1).ip, Binding::Address);
        let mut found = Observed::default();
        found.services.insert(addr(1).into(), service(7));
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
