//! How a Service wants its connections spread: scheduler, flags, affinity and
//! weights, from its annotations and fields.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::address::{Protocol, parse_address};
use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::kube::{
    Endpoint, EndpointSlice, FLAGS_ANNOTATIONS, ObjectMeta, SCHEDULER_ANNOTATIONS, Service,
    WEIGHT_ANNOTATION, WEIGHTS_ANNOTATION,
};
use crate::names::ObjectName;
use crate::network::NodeFacts;
use crate::service::{MAX_WEIGHT, Scheduler, Scheduling, Weight};

/// Affinity of a Service that asks for it and names no time, in seconds.
const AFFINITY: u32 = 10_800;

/// Longest affinity that the API allows, in seconds.
const MAX_AFFINITY: u32 = 86_400;

/// The port that IPVS takes for FTP's.
const FTP: u16 = 21;

/// The scheduler and its flags, by the Service's annotations or else the
/// configured one; and its affinity.
pub(crate) fn of_service(
    name: &ObjectName,
    service: &Service,
    facts: &NodeFacts,
    conditions: &mut Vec<Condition>,
) -> Scheduling {
    let mut chosen = Scheduling {
        persistence: affinity(name, service, conditions),
        ..facts.scheduling.clone()
    };
    let mut say = |reason, message| conditions.push(condition(name, reason, message));
    let mut refused = false;
    if let Some((key, text)) = annotation(&service.metadata, &SCHEDULER_ANNOTATIONS) {
        if let Some(scheduler) = Scheduler::known(text) {
            chosen.scheduler = scheduler;
            chosen.scheduler_flags = 0;
        } else {
            refused = true;
            say(
                Reason::InvalidAnnotation,
                format!(
                    "metadata.annotations[{key}]: {text:?} is no scheduler; {} is used as \
                     configured, write one of {}",
                    chosen.scheduler,
                    Scheduler::names()
                ),
            );
        }
    }
    if let Some((key, text)) = annotation(&service.metadata, &FLAGS_ANNOTATIONS) {
        match parse_flags(text) {
            // They were meant for the scheduler that there is none of.
            Ok(_) if refused => {}
            Ok(flags) => chosen.scheduler_flags = flags,
            Err(word) => say(
                Reason::InvalidAnnotation,
                format!(
                    "metadata.annotations[{key}]: {word:?} is no flag of a scheduler; the \
                     annotation counts for nothing, write flag-1, flag-2 or flag-3 with commas \
                     between them"
                ),
            ),
        }
    }
    if facts.missing_schedulers.contains(&chosen.scheduler) {
        say(
            Reason::SchedulerMissing,
            format!(
                "scheduler {0} is not in the kernel of this node; {1} is used, load the module \
                 ip_vs_{0} there",
                chosen.scheduler,
                Scheduler::RoundRobin
            ),
        );
        chosen.scheduler = Scheduler::RoundRobin;
        chosen.scheduler_flags = 0;
    }
    chosen
}

/// The same without the persistence that IPVS cannot have for a service by mark:
/// where there was one, the scheduler hashes the client's address. Maglev moves the
/// fewest clients when backends come and go.
pub(crate) fn without_persistence(asked: &Scheduling, facts: &NodeFacts) -> Scheduling {
    if asked.persistence.is_none() {
        return asked.clone();
    }
    let hashes = [Scheduler::MaglevHash, Scheduler::SourceHash];
    let mut hashes = hashes.into_iter();
    let there = hashes.find(|scheduler| !facts.missing_schedulers.contains(scheduler));
    match there {
        // Flag 1 of both: where the hash leads to a backend of weight 0, take another.
        Some(scheduler) => Scheduling {
            scheduler,
            scheduler_flags: 1,
            persistence: None,
        },
        None => Scheduling {
            persistence: None,
            ..asked.clone()
        },
    }
}

/// Whether IPVS, with persistence, would take more than this port: it holds a virtual
/// service of TCP on port 21 to be FTP, and each other port from 1024 on of its address
/// to be data of that. With persistence it leads them to the same port of a backend
/// (`ip_vs_service_find` and `ip_vs_sched_persist` of the kernel).
pub(crate) fn takes_other_ports(port: u16, protocol: Protocol) -> bool {
    port == FTP && protocol == Protocol::Tcp
}

/// The first of these annotations that says something.
fn annotation<'a>(metadata: &'a ObjectMeta, keys: &[&'a str]) -> Option<(&'a str, &'a str)> {
    keys.iter().find_map(|key| {
        let text = metadata.annotations.get(*key)?.trim();
        (!text.is_empty()).then_some((*key, text))
    })
}

/// Flags by name with commas between them, as bits 0 to 2.
///
/// # Errors
/// The word that is no flag.
pub fn parse_flags(text: &str) -> Result<u8, String> {
    let words = text.split(',').map(str::trim);
    words
        .filter(|word| !word.is_empty())
        .try_fold(0, |flags, word| match word {
            "flag-1" => Ok(flags | 1),
            "flag-2" => Ok(flags | 2),
            "flag-3" => Ok(flags | 4),
            other => Err(other.to_owned()),
        })
}

fn affinity(name: &ObjectName, service: &Service, conditions: &mut Vec<Condition>) -> Option<u32> {
    if service.spec.session_affinity != "ClientIP" {
        return None;
    }
    let config = &service.spec.session_affinity_config.client_ip;
    let Some(written) = config.timeout_seconds else {
        return Some(AFFINITY);
    };
    let seconds = u32::try_from(written).ok();
    let seconds = seconds.filter(|seconds| (1..=MAX_AFFINITY).contains(seconds));
    if seconds.is_none() {
        conditions.push(condition(
            name,
            Reason::InvalidValue,
            format!(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {written} is not from 1 to \
                 {MAX_AFFINITY}; {AFFINITY} is used, correct it"
            ),
        ));
    }
    Some(seconds.unwrap_or(AFFINITY))
}

/// Weights of a Service's endpoints. What is nearest to the endpoint wins: its
/// own entry, then its slice's annotation, then the Service's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weights {
    all: Weight,
    by_address: BTreeMap<IpAddr, Weight>,
    by_pod: BTreeMap<String, Weight>,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            all: 1,
            by_address: BTreeMap::new(),
            by_pod: BTreeMap::new(),
        }
    }
}

impl Weights {
    /// The weights that a Service's annotations give.
    #[must_use]
    pub fn new(name: &ObjectName, service: &Service, conditions: &mut Vec<Condition>) -> Self {
        let mut weights = Self::default();
        let annotations = &service.metadata.annotations;
        let mut wrong = |key: &str, text: &str, form: &str| {
            conditions.push(condition(
                name,
                Reason::InvalidAnnotation,
                format!(
                    "metadata.annotations[{key}]: {text:?} is no weight and counts for nothing; \
                     write {form} from 0 to {MAX_WEIGHT}"
                ),
            ));
        };
        let written = |key| annotations.get(key).map(|text: &String| text.trim());
        if let Some(text) = written(WEIGHT_ANNOTATION).filter(|text| !text.is_empty()) {
            match weight(text) {
                Some(all) => weights.all = all,
                None => wrong(WEIGHT_ANNOTATION, text, "a number"),
            }
        }
        let entries = written(WEIGHTS_ANNOTATION).unwrap_or_default().split(',');
        for entry in entries.map(str::trim).filter(|entry| !entry.is_empty()) {
            let parsed = entry.split_once('=');
            let parsed = parsed.and_then(|(who, text)| Some((who.trim(), weight(text)?)));
            match parsed {
                None | Some(("", _)) => wrong(WEIGHTS_ANNOTATION, entry, "ADDRESS=N or POD=N, N"),
                Some((who, weight)) => match parse_address(who) {
                    Ok(ip) => {
                        weights.by_address.insert(ip, weight);
                    }
                    Err(_) => {
                        weights.by_pod.insert(who.to_owned(), weight);
                    }
                },
            }
        }
        weights
    }

    /// The weight of one endpoint. A slice's annotation that is no weight is the
    /// concern of `slice_fault`.
    #[must_use]
    pub fn of(&self, slice: &EndpointSlice, endpoint: &Endpoint, ip: IpAddr) -> Weight {
        let by_pod = || self.by_pod.get(&endpoint.target_ref.name);
        let by_slice = || weight(slice.metadata.annotations.get(WEIGHT_ANNOTATION)?);
        let own = self.by_address.get(&ip).or_else(by_pod).copied();
        own.or_else(by_slice).unwrap_or(self.all)
    }
}

/// What is wrong with a slice's own weight, in words.
pub(crate) fn slice_fault(slice: &EndpointSlice) -> Option<String> {
    let text = slice.metadata.annotations.get(WEIGHT_ANNOTATION)?.trim();
    (!text.is_empty() && weight(text).is_none()).then(|| {
        format!(
            "metadata.annotations[{WEIGHT_ANNOTATION}]: {text:?} is no weight and counts for \
             nothing; write a number from 0 to {MAX_WEIGHT}"
        )
    })
}

fn weight(text: &str) -> Option<Weight> {
    let number: Weight = text.trim().parse().ok()?;
    (number <= MAX_WEIGHT).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flags were meant for a scheduler that is not used.
    #[test]
    fn an_unknown_scheduler_gives_the_configured_one_with_its_flags() {
        let mut facts = NodeFacts::default();
        facts.scheduling.scheduler = Scheduler::MaglevHash;
        facts.scheduling.scheduler_flags = 2;
        let mut service = Service::default();
        for (keys, text) in [
            (SCHEDULER_ANNOTATIONS, "fastest"),
            (FLAGS_ANNOTATIONS, "flag-1"),
        ] {
            let annotations = &mut service.metadata.annotations;
            annotations.insert(keys[0].to_owned(), text.to_owned());
        }
        let mut conditions = Vec::new();
        let name = ObjectName::new("default", "web");
        let chosen = of_service(&name, &service, &facts, &mut conditions);
        assert_eq!(chosen, facts.scheduling);
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn flags_are_bits() {
        for (text, flags) in [
            ("", 0),
            ("flag-1", 1),
            ("flag-2", 2),
            ("flag-3", 4),
            ("flag-1,flag-2", 3),
            ("flag-3, flag-1,", 5),
            ("flag-1,flag-1", 1),
            ("flag-2,flag-2", 2),
            ("flag-3,flag-3", 4),
        ] {
            assert_eq!(parse_flags(text), Ok(flags), "{text}");
        }
        assert_eq!(parse_flags("flag-1,flag-4"), Err("flag-4".to_owned()));
    }
}
