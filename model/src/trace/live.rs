//! The steps of a trace, held against the kernel.
//!
//! What is wrong is what [`diff()`] would change at the addresses on the packet's way: the
//! same comparison by which the agent programs the node.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Question, QuestionError, Trace, Walk, words};
use crate::change::Change;
use crate::desired::Scope;
use crate::diff::{diff, expected};
use crate::observed::Observed;
use crate::service::{MAX_WEIGHT, Mark, ServiceKey};
use crate::view::NodeView;

/// Most sentences about one step; the count of what is broken is exact.
const MAX_SENTENCES: usize = 10;

/// The steps in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Live {
    /// How many steps are not as they should be.
    pub broken: usize,
    /// Each step on the packet's way.
    pub checks: Vec<Check>,
}

/// One step in the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// `ruleset`, `guard`, `vip`, `frontend`, `admission`, `mark`, `service`, `backends`,
    /// `source`, or `agent` for what the agent has tried in vain.
    pub step: String,
    /// Whether it is as it should be.
    pub ok: bool,
    /// A sentence for each thing that is wrong, or one that says what is right.
    pub says: Vec<String>,
    /// What to do; null where nothing is wrong.
    pub remedy: Option<String>,
}

/// Rules, chains and sets of our nftables table, elements aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruleset {
    /// They are what was loaded.
    AsLoaded,
    /// The table is gone.
    Missing,
    /// A rule, chain or set is another.
    Changed,
}

/// What the kernel was seen to hold.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The rules.
    pub ruleset: Ruleset,
    /// Name of our nftables table.
    pub table: String,
    /// Whatever of ours is at the addresses of [`scope`].
    pub observed: Observed,
    /// What the agent has tried in vain at these addresses, with the remedy.
    pub faults: Vec<String>,
}

/// What of the kernel is on the way of a packet.
///
/// # Errors
/// As [`Trace::new`].
pub fn scope(view: &NodeView, question: &Question) -> Result<Scope, QuestionError> {
    Ok(Walk::new(view, question)?.scope())
}

impl Trace {
    /// Holds the steps against the kernel.
    ///
    /// # Errors
    /// As [`Trace::new`].
    pub fn compare(
        &mut self,
        view: &NodeView,
        question: &Question,
        seen: &Seen,
    ) -> Result<(), QuestionError> {
        let walk = Walk::new(view, question)?;
        let mut changes = diff(view.desired(), &seen.observed, &walk.scope());
        // Of a virtual service that is not there, the real servers need not be told one by one.
        let absent: BTreeSet<ServiceKey> = changes.iter().filter_map(added).collect();
        changes.retain(|change| {
            let is_server = matches!(change, Change::AddServer(key, ..) if absent.contains(key));
            !is_server
        });
        let mut checks = vec![ruleset(seen)];
        checks.extend(STEPS.into_iter().filter_map(|step| {
            let of_step = changes.iter().filter(|change| step_of(change) == step);
            let wrong: Vec<String> = of_step
                .map(|change| complaint(change, &seen.observed))
                .collect();
            if wrong.is_empty() && step == "backends" && !absent.is_empty() {
                return None;
            }
            if wrong.is_empty() {
                return praise(step, &walk, seen).map(|says| Check {
                    step: step.to_owned(),
                    ok: true,
                    says: vec![says],
                    remedy: None,
                });
            }
            Some(broken(step, wrong, remedy(step, seen)))
        }));
        if !seen.faults.is_empty() {
            let remedy = "see `ferrule-agent status` and the agent's log".to_owned();
            checks.push(broken("agent", seen.faults.clone(), remedy));
        }
        self.live = Some(Live {
            broken: checks.iter().filter(|check| !check.ok).count(),
            checks,
        });
        Ok(())
    }
}

fn added(change: &Change) -> Option<ServiceKey> {
    match change {
        Change::AddService(key, _) => Some(*key),
        _ => None,
    }
}

fn broken(step: &str, mut says: Vec<String>, remedy: String) -> Check {
    let all = says.len();
    if all > MAX_SENTENCES {
        says.truncate(MAX_SENTENCES);
        says.push(format!("And {} more of the kind.", all - MAX_SENTENCES));
    }
    Check {
        step: step.to_owned(),
        ok: false,
        says,
        remedy: Some(remedy),
    }
}

fn ruleset(seen: &Seen) -> Check {
    let table = &seen.table;
    let says = match seen.ruleset {
        Ruleset::AsLoaded => {
            return Check {
                step: "ruleset".to_owned(),
                ok: true,
                says: vec![format!(
                    "Rules, chains and sets of nftables table {table} are as they were loaded."
                )],
                remedy: None,
            };
        }
        Ruleset::Missing => format!("The nftables table {table} is gone: nothing guards VIPs."),
        Ruleset::Changed => {
            format!("A rule, chain or set of nftables table {table} is another than was loaded.")
        }
    };
    broken("ruleset", vec![says], remedy("ruleset", seen))
}

/// The steps in the order of making.
const STEPS: [&str; 8] = [
    "guard",
    "vip",
    "frontend",
    "admission",
    "mark",
    "service",
    "backends",
    "source",
];

fn step_of(change: &Change) -> &'static str {
    match change {
        Change::GuardVip(_)
        | Change::UnguardVip(_)
        | Change::SilenceVip(_)
        | Change::UnsilenceVip(_) => "guard",
        Change::BindVip(..)
        | Change::RebindVip(..)
        | Change::ReleaseVip(..)
        | Change::UnbindVip(..) => "vip",
        Change::AllowFrontend(_)
        | Change::DisallowFrontend(_)
        | Change::AddExternal(_)
        | Change::RemoveExternal(_)
        | Change::AddPreserved(_)
        | Change::RemovePreserved(_)
        | Change::AddDropped(_)
        | Change::RemoveDropped(_)
        | Change::AddLeaving(_)
        | Change::AddClosed(_)
        | Change::RemoveLeaving(_)
        | Change::RemoveClosed(_)
        | Change::AddServed(_)
        | Change::RemoveServed(_) => "frontend",
        Change::Restrict(..) => "admission",
        Change::SetMark(..) => "mark",
        Change::AddService(..) | Change::UpdateService(..) | Change::RemoveService(_) => "service",
        Change::AddServer(..) | Change::UpdateServer(..) | Change::RemoveServer(..) => "backends",
        Change::AddHairpin(_) | Change::RemoveHairpin(_) => "source",
    }
}

/// What is wrong, of which the change is the remedy.
fn complaint(change: &Change, observed: &Observed) -> String {
    match change {
        Change::GuardVip(ip) | Change::UnguardVip(ip) => {
            misplaced(change, ip.to_string(), "vips", *ip)
        }
        Change::SilenceVip(ip) | Change::UnsilenceVip(ip) => {
            misplaced(change, ip.to_string(), "silent", *ip)
        }
        Change::AddHairpin(ip) | Change::RemoveHairpin(ip) => {
            misplaced(change, format!("{ip} . {ip}"), "hairpins", *ip)
        }
        Change::AllowFrontend(addr) | Change::DisallowFrontend(addr) => {
            misplaced(change, addr.to_string(), "frontends", addr.ip)
        }
        Change::AddExternal(addr) | Change::RemoveExternal(addr) => {
            misplaced(change, addr.to_string(), "external", addr.ip)
        }
        Change::AddPreserved(addr) | Change::RemovePreserved(addr) => {
            misplaced(change, addr.to_string(), "preserved", addr.ip)
        }
        Change::AddDropped(addr) | Change::RemoveDropped(addr) => {
            misplaced(change, addr.to_string(), "dropped", addr.ip)
        }
        Change::AddLeaving(addr) | Change::RemoveLeaving(addr) => {
            misplaced(change, addr.to_string(), "leaving", addr.ip)
        }
        Change::AddClosed(addr) | Change::RemoveClosed(addr) => {
            misplaced(change, addr.to_string(), "closed", addr.ip)
        }
        Change::AddServed(addr) | Change::RemoveServed(addr) => {
            misplaced(change, addr.to_string(), "served", addr.ip)
        }
        Change::BindVip(ip, binding) => {
            format!("VIP {ip} is not bound to this node; it should be ({binding}).")
        }
        Change::RebindVip(ip, binding) => {
            format!("VIP {ip} is bound another way than is configured ({binding}).")
        }
        Change::ReleaseVip(ip, binding) => {
            format!("VIP {ip} is still bound the former way as well ({binding}).")
        }
        Change::UnbindVip(ip, binding) => {
            format!("{ip} is no VIP, and still bound ({binding}).")
        }
        Change::Restrict(addr, how) => {
            let limit = match how.limit {
                Some(true) => ", and everyone may call it",
                Some(false) => ", and it should be open to everyone",
                None => "",
            };
            format!(
                "{addr}: {} of its source ranges are not in set {}, {} in it are not its{limit}.",
                how.admit.len(),
                set("admitted", addr.ip),
                how.dismiss.len()
            )
        }
        Change::SetMark(addr, from, to) => {
            let word = |mark: &Option<Mark>| {
                mark.map_or_else(|| "no mark".to_owned(), |mark| format!("mark {mark:#x}"))
            };
            format!(
                "Clients within the cluster of {addr} get {} by map {}; it should be {}.",
                word(from),
                set("marks", addr.ip),
                word(to)
            )
        }
        Change::AddService(key, _) => format!("There is no virtual service {key}."),
        Change::RemoveService(key) => {
            format!("There is a virtual service {key}, where there should be none.")
        }
        Change::UpdateService(key, wanted) => {
            let present = observed.services.get(key);
            let present = present.map(|service| words::scheduling(&service.scheduling));
            format!(
                "Virtual service {key} has {}; it should have {}.",
                present.unwrap_or_default(),
                words::scheduling(wanted)
            )
        }
        Change::AddServer(key, backend, _) => {
            format!("Real server {backend} is missing in virtual service {key}.")
        }
        Change::UpdateServer(key, backend, weight) => {
            let present = observed.services.get(key);
            match present.and_then(|service| service.servers.get(backend)) {
                Some(have) if *have <= MAX_WEIGHT => format!(
                    "Real server {backend} of virtual service {key} has weight {have}; it should \
                     have {weight}."
                ),
                Some(_) | None => format!(
                    "Real server {backend} of virtual service {key} has limits or a forwarding \
                     method that are not ours."
                ),
            }
        }
        Change::RemoveServer(key, backend) => format!(
            "Real server {backend} in virtual service {key} is none of the Service's backends."
        ),
    }
}

/// An element that is missing in a set, or should not be in it.
fn misplaced(change: &Change, what: String, name: &str, ip: IpAddr) -> String {
    let set = set(name, ip);
    let what = match change {
        Change::GuardVip(_) | Change::SilenceVip(_) => format!("VIP {what}"),
        _ => what,
    };
    match change {
        Change::UnguardVip(_)
        | Change::UnsilenceVip(_)
        | Change::RemoveHairpin(_)
        | Change::DisallowFrontend(_)
        | Change::RemoveExternal(_)
        | Change::RemovePreserved(_)
        | Change::RemoveDropped(_)
        | Change::RemoveLeaving(_)
        | Change::RemoveClosed(_)
        | Change::RemoveServed(_) => format!("{what} is in set {set}, where it should not be."),
        _ => format!("{what} is not in set {set}."),
    }
}

/// The name of a set, of which each family has its own.
fn set(name: &str, ip: IpAddr) -> String {
    format!("{name}{}", if ip.is_ipv4() { 4 } else { 6 })
}

/// What is right; `None` where nothing of the kind is on the way.
fn praise(step: &str, walk: &Walk<'_>, seen: &Seen) -> Option<String> {
    let desired = walk.view.desired();
    let to = walk.question.to;
    let frontend = walk.frontend();
    let service = || {
        let (key, service) = walk.steps.service.clone()?;
        let present = seen.observed.services.get(&key);
        Some((key, expected(key, Some(service), present, desired)?))
    };
    match step {
        "guard" => desired
            .is_vip(to.ip)
            .then(|| format!("VIP {} is in the guard's set.", to.ip)),
        "vip" => desired
            .binding(to.ip)
            .map(|binding| format!("VIP {} is bound ({binding}).", to.ip)),
        "frontend" => {
            frontend.map(|_| format!("{to} is in the sets where it belongs, and in no other."))
        }
        "admission" => frontend
            .filter(|frontend| !frontend.source_ranges.is_empty())
            .map(|_| "Its source ranges are in the set.".to_owned()),
        "mark" => desired
            .mark(&to)
            .map(|mark| format!("Clients within the cluster of {to} get mark {mark:#x}.")),
        "service" => service().map(|(key, service)| {
            format!(
                "Virtual service {key} is there ({}).",
                words::scheduling(&service.scheduling)
            )
        }),
        "backends" => service().map(|(_, service)| {
            let all = service.servers.len();
            let wanted = walk.steps.service.iter();
            let wanted: usize = wanted.map(|(_, wanted)| wanted.servers.len()).sum();
            let leaving = match all.saturating_sub(wanted) {
                0 => String::new(),
                1 => ", of which 1 leaves".to_owned(),
                more => format!(", of which {more} leave"),
            };
            format!("Its real servers and their weights are as they should be ({all}{leaving}).")
        }),
        _ => (!walk.scope().hairpins.is_empty())
            .then(|| "The client, which is a backend, is in the set of hairpins.".to_owned()),
    }
}

/// What to do: the agent puts all of it right by itself, but not what undoes that.
fn remedy(step: &str, seen: &Seen) -> String {
    let table = &seen.table;
    let (when, watch) = match step {
        "vip" => ("at once", "`ip monitor address route`".to_owned()),
        "service" => ("within 30 s", "`ipvsadm -Ln`".to_owned()),
        "backends" => (
            "within a round of its audit, which `ferrule-agent status` tells",
            "`ipvsadm -Ln`".to_owned(),
        ),
        _ => (
            "within some seconds",
            format!("`nft monitor` and `nft list table inet {table}`"),
        ),
    };
    format!(
        "wait: the agent puts it right {when}; if it stays so, `ferrule-agent status` says why; if \
         it comes again, another program does it: find that by {watch}"
    )
}
