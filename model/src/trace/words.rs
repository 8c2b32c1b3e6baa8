//! The steps of a trace in sentences.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use super::{MAX_RANGES, Policy, Step, Walk, odds};
use crate::address::Family;
use crate::desired::{Frontend, FrontendKind};
use crate::service::Scheduling;
use crate::source_nat::Strangers;
use crate::verdict::{Loss, Masquerade, Refusal, Source, Verdict, Within};

/// Longest name that is told, in bytes: none in a cluster is longer, namespace included.
const MAX_NAME: usize = 320;

/// A name that others gave, cut where no cluster has such a one.
pub(super) fn short(name: &str) -> String {
    let mut name = name.to_owned();
    if name.len() > MAX_NAME {
        name.truncate(name.floor_char_boundary(MAX_NAME));
        name.push('…');
    }
    name
}

/// All of them, in the order of the packet's way.
pub(super) fn steps(walk: &Walk<'_>) -> Vec<Step> {
    let said = [
        ("client", Some(client(walk))),
        ("frontend", Some(frontend(walk))),
        ("admission", admission(walk)),
        ("policy", policy(walk)),
        ("affinity", affinity(walk)),
        ("balancing", balancing(walk)),
        ("translation", translation(walk)),
        ("source", source(walk)),
        ("verdict", Some(verdict(walk))),
    ];
    let said = said.into_iter().filter_map(|(step, says)| {
        Some(Step {
            step: step.to_owned(),
            says: says?,
        })
    });
    said.collect()
}

fn client(walk: &Walk<'_>) -> String {
    let from = walk.question.from;
    let Some((device, how)) = &walk.device else {
        let to = walk.question.to.ip;
        let why = if walk.source == from {
            "a process of it calls by that address".to_owned()
        } else if walk.source == to {
            format!("a process of it calls, by {to} itself, which is an address of the node, too")
        } else {
            format!(
                "a process of it calls, by {}, as the route to {to} says",
                walk.source
            )
        };
        return format!("{from} is this node: {why}. It counts as within the cluster.");
    };
    let client = walk.client();
    let who = match client.kind.as_str() {
        "podOfThisNode" => "is a pod of this node",
        "pod" => "is a pod of another node",
        _ => "is neither this node nor a pod",
    };
    let by = match (*how, device.as_str()) {
        ("given", device) => format!("comes by device {device}, as was said"),
        ("derived", _) if client.kind == "podOfThisNode" => {
            format!("comes by its veth ({device}…)")
        }
        ("derived", device) => format!("comes by device {device}, on whose link it is"),
        _ => "comes by a device that is not known".to_owned(),
    };
    let within = match walk.steps.within {
        Some(Within::Process) => "It counts as within the cluster.",
        Some(Within::PodNetwork) => {
            "It counts as within the cluster: its address is in the pod network."
        }
        Some(Within::Device) => {
            "It counts as within the cluster: it comes by a device that detectLocal names."
        }
        None => "It counts as from beyond the cluster.",
    };
    let by_device = matches!(
        walk.nat.strangers(Family::of(from)),
        Some(Strangers::NotThrough(_) | Strangers::NotThroughAny(_))
    );
    let guess = match *how {
        "unknown" if by_device => {
            " detectLocalMode asks by which device clients come; --device says it, and without it \
             none that detectLocal names is assumed."
        }
        "derived" if by_device => {
            " detectLocalMode asks by which device clients come; if that is another, say so by \
             --device."
        }
        _ => "",
    };
    format!("{from} {who}, and {by}. {within}{guess}")
}

/// `port "http" of Service default/web`.
fn object(frontend: &Frontend) -> String {
    let object = short(&frontend.object());
    match frontend.port_name.as_str() {
        "" => object,
        port => format!("port {:?} of {object}", short(port)),
    }
}

fn frontend(walk: &Walk<'_>) -> String {
    let to = walk.question.to;
    let Some(frontend) = walk.frontend() else {
        let desired = walk.view.desired();
        return if desired.is_served(&to) {
            format!("{to} is where load balancers ask for the health of a Service.")
        } else if desired.is_vip(to.ip) {
            format!(
                "{} is an address of Services; none of them has {to}.",
                to.ip
            )
        } else if desired.facts().own.contains(&to.ip) {
            format!("{to} is at an address of this node, and neither a node port nor a host port.")
        } else {
            format!("{to} is no Service's.")
        };
    };
    let kind = match frontend.kind {
        FrontendKind::ClusterIP => "at its ClusterIP",
        FrontendKind::NodePort => "at its node port, at an address of this node",
        FrontendKind::ExternalIP => "at an external IP",
        FrontendKind::LoadBalancer => "at its load balancer's address",
        FrontendKind::HostPort => "at a host port of this node",
    };
    let missed = if walk.steps.is_met {
        ""
    } else {
        " But that is no address of this node, which passes the packet on past IPVS."
    };
    format!("{to} is {}, {kind}.{missed}", object(frontend))
}

fn admission(walk: &Walk<'_>) -> Option<String> {
    let frontend = walk.frontend().filter(|_| walk.steps.is_met)?;
    let ranges = &frontend.source_ranges;
    if ranges.is_empty() {
        return None;
    }
    let mut words: Vec<String> = ranges
        .iter()
        .take(MAX_RANGES)
        .map(ToString::to_string)
        .collect();
    if ranges.len() > MAX_RANGES {
        words.push(format!("and {} more", ranges.len() - MAX_RANGES));
    }
    let words = words.join(", ");
    let who = who_is_admitted(walk);
    Some(if walk.steps.is_admitted {
        format!("loadBalancerSourceRanges ({words}) admit {who}.")
    } else {
        format!("loadBalancerSourceRanges ({words}) do not admit {who}.")
    })
}

/// Whose address decides. A process of this node may have the VIP itself as its source, which no
/// range means.
fn who_is_admitted(walk: &Walk<'_>) -> String {
    let to = walk.question.to.ip;
    if walk.device.is_some() || walk.source != to || !walk.view.desired().is_vip(to) {
        return walk.source.to_string();
    }
    match walk.view.desired().facts().primary.get(&Family::of(to)) {
        Some(node) => format!("{node}, this node's address, which decides for its processes"),
        None => "this node, of which no address is known".to_owned(),
    }
}

fn policy(walk: &Walk<'_>) -> Option<String> {
    if !walk.steps.is_met {
        return None;
    }
    if walk.frontend()?.kind == FrontendKind::HostPort {
        return Some("A host port has no policy: it leads to its pod on this node.".to_owned());
    }
    let Policy {
        field,
        value,
        clients,
        mark,
    } = walk.policy()?;
    Some(match (value.as_str(), clients.as_str()) {
        ("Cluster", _) => format!("{field} is Cluster: the endpoints of all nodes are used."),
        (_, "internal") => format!(
            "{field} is Local, and the client is within the cluster: by mark {} it is led to the \
             endpoints that policy Cluster uses.",
            mark.unwrap_or_default()
        ),
        (_, "external") => format!(
            "{field} is Local, and the client is from beyond the cluster: only endpoints of this \
             node are used."
        ),
        _ => format!("{field} is Local: only endpoints of this node are used."),
    })
}

fn affinity(walk: &Walk<'_>) -> Option<String> {
    walk.backends()?;
    Some(match walk.affinity() {
        None => "Without session affinity, each connection is balanced anew.".to_owned(),
        Some((_, Some(seconds))) => format!(
            "Session affinity keeps the client on one backend for {seconds} s from its last \
             connection; the shares are those of a new client."
        ),
        Some((_, None)) => {
            "Session affinity keeps the client on one backend by a hash of its address, for as \
             long as the backends stay; the shares are those of a new client."
                .to_owned()
        }
    })
}

fn balancing(walk: &Walk<'_>) -> Option<String> {
    let (_, backends) = walk.backends()?;
    let scheduling = walk.scheduling()?;
    let (key, _) = walk.steps.service.as_ref()?;
    let usable = backends
        .values()
        .filter(|backend| backend.weight > 0)
        .count();
    let mut words = format!(
        "IPVS takes it by virtual service {key} and chooses {}: scheduler {}",
        odds::manner(&scheduling.scheduler),
        scheduling.scheduler
    );
    for flag in scheduling.flag_names() {
        // Writing to a String cannot fail.
        let _ = write!(words, ", {flag}");
    }
    let _ = write!(words, ", {}", count(usable, "backend"));
    if usable < backends.len() {
        let _ = write!(words, " and {} of weight 0", backends.len() - usable);
        if odds::refuses_at_weight_0(&scheduling) {
            words.push_str("; whom the hash leads to one of those is refused");
        }
    }
    let leaving = walk.leaving().len();
    if leaving > 0 {
        let _ = write!(
            words,
            "; beside {}, weight 0",
            match leaving {
                1 => "1 backend that leaves and keeps its connections".to_owned(),
                more => format!("{more} backends that leave and keep their connections"),
            }
        );
    }
    words.push('.');
    Some(words)
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn translation(walk: &Walk<'_>) -> Option<String> {
    let Verdict::Forwarded(leads) = &walk.steps.verdict else {
        return None;
    };
    let to = walk.question.to;
    let called = crate::address::BackendAddr::new(to.ip, to.port);
    let mut only = leads.keys();
    Some(match (only.next(), only.next()) {
        (Some(backend), None) => format!(
            "The destination {called} becomes {backend}; in answers it is turned back on this node."
        ),
        _ => format!(
            "The destination {called} becomes the backend's address and port; in answers it is \
             turned back on this node."
        ),
    })
}

/// Whom the backends see, those alike together.
fn source(walk: &Walk<'_>) -> Option<String> {
    let (seen, passed): (Vec<Source>, bool) = match &walk.steps.verdict {
        Verdict::Forwarded(leads) => (leads.values().map(|lead| lead.source).collect(), false),
        Verdict::Passed(source @ Source::Replaced(_)) => (vec![*source], true),
        Verdict::Refused(_)
        | Verdict::Dropped(_)
        | Verdict::Unallocated
        | Verdict::Served
        | Verdict::Passed(Source::Kept) => return None,
    };
    let mut alike: BTreeMap<Source, usize> = BTreeMap::new();
    for source in &seen {
        *alike.entry(*source).or_default() += 1;
    }
    let several = alike.len() > 1;
    let sentences = alike.iter().map(|(source, number)| {
        let who = match (passed, several, *number, seen.len()) {
            (true, ..) => "The receiver sees".to_owned(),
            (_, false, _, 1) => "The backend sees".to_owned(),
            (_, false, ..) => "Each backend sees".to_owned(),
            (_, true, 1, all) => format!("1 of {all} backends sees"),
            (_, true, number, all) => format!("{number} of {all} backends see"),
        };
        match source {
            Source::Kept => format!("{who} the client's own address, {}.", walk.source),
            Source::Replaced(why) => format!(
                "{who} {} in place of {} ({}): {}.",
                node_address(walk),
                walk.source,
                why.name(),
                reason(*why)
            ),
        }
    });
    Some(sentences.collect::<Vec<_>>().join(" "))
}

fn node_address(walk: &Walk<'_>) -> String {
    let of_family = walk.nat.sources.get(&Family::of(walk.question.from));
    let node: Option<IpAddr> = of_family.and_then(|sources| sources.node);
    // Without a machine, as in a plan, the Node object's address stands for it.
    let primary = &walk.view.desired().facts().primary;
    match node.or_else(|| primary.get(&Family::of(walk.question.from)).copied()) {
        Some(ip) => format!("an address of this node, by default {ip},"),
        None => "an address of this node".to_owned(),
    }
}

fn reason(why: Masquerade) -> &'static str {
    match why {
        Masquerade::Hairpin => "the client is the backend, and would answer itself past this node",
        Masquerade::ViaVip => "nobody beyond this node knows the way to a VIP",
        Masquerade::All => "masqueradeAll is set",
        Masquerade::OffNode => "the client is not on this node, and the answer must come back here",
        Masquerade::OffCluster => "a client from beyond the cluster calls a ClusterIP",
        Masquerade::PodEgress => "a pod calls where nobody knows the way to pods",
    }
}

fn verdict(walk: &Walk<'_>) -> String {
    let to = walk.question.to;
    let object = walk
        .frontend()
        .map_or_else(|| to.to_string(), |frontend| short(&frontend.object()));
    match &walk.steps.verdict {
        Verdict::Forwarded(leads) => {
            format!("Forwarded to {}.", one_of(leads.len()))
        }
        Verdict::Refused(Refusal::NoEndpoint) => format!(
            "Refused at once by the guard (noEndpoint): {object} has no usable endpoint{}. Look at the readiness \
             of its pods.",
            match walk.policy() {
                Some(policy) if policy.value == "Local" => ", on this node or another",
                _ => "",
            }
        ),
        Verdict::Refused(Refusal::NoWeight) => format!(
            "Refused by IPVS (noWeight): every backend of {object} has weight 0. Give one of them a weight."
        ),
        Verdict::Refused(Refusal::NoPort) => format!(
            "Refused at once by the guard (noPort): no Service has port {}/{} of {}.",
            to.port, to.protocol, to.ip
        ),
        Verdict::Unallocated => format!(
            "Refused at once by the guard (unallocated): {} is in the network of cluster addresses, and no \
             Service has it.",
            to.ip
        ),
        Verdict::Dropped(Loss::NotAdmitted) => format!(
            "Dropped at admission (notAdmitted): {object} has loadBalancerSourceRanges, and they do not name {}.",
            who_is_admitted(walk)
        ),
        Verdict::Dropped(Loss::NoLocalEndpoint) => format!(
            "Dropped by the guard (noLocalEndpoint): the policy of {object} is Local, and its usable endpoints are \
             on other nodes."
        ),
        Verdict::Served => "Let through to the agent, which answers the health checks of load \
                            balancers there."
            .to_owned(),
        Verdict::Passed(_) => {
            "Passed: it is none of ours, and goes where this node's routes lead.".to_owned()
        }
    }
}

fn one_of(number: usize) -> String {
    match number {
        1 => "the one backend".to_owned(),
        number => format!("one of {number} backends"),
    }
}

/// Scheduler, flags, persistence in words.
pub(super) fn scheduling(how: &Scheduling) -> String {
    let mut words = format!("scheduler {}", how.scheduler);
    for flag in how.flag_names() {
        let _ = write!(words, ", {flag}");
    }
    if let Some(seconds) = how.persistence {
        let _ = write!(words, ", persistence of {seconds} s");
    }
    words
}
