//! What becomes of a packet, by what is to be programmed for services.
//!
//! [`verdict`] takes the first packet of a connection along the way that
//! ARCHITECTURE.md draws: admission, IPVS, the guard, source NAT, in the order of
//! their hooks and rules. It looks at the desired state and at nothing else, so
//! that it says what the node does and not what a Service meant. Not followed:
//! what routing and other programs' rules do, answers to connections that are
//! there already, and a backend whose address is itself a service's. [`steps`] tells
//! how it came to its end, for [`crate::trace`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::address::{BackendAddr, Family, FrontendAddr};
use crate::desired::{Action, Desired, Frontend};
use crate::service::{Mark, ServiceKey, VirtualService, Weight};
use crate::source_nat::{SourceNat, Strangers};

/// The first packet of a connection, as this node meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// From where. A process of this node that calls a VIP has the VIP itself as its
    /// source, where that is an address of the VIP device.
    pub source: IpAddr,
    /// By which device it came in; `None`: a process of this node sends it.
    pub device: Option<&'a str>,
    /// Whereto.
    pub target: FrontendAddr,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// IPVS leads it to one of these backends, of which there is at least one.
    Forwarded(BTreeMap<BackendAddr, Lead>),
    /// It is refused at once.
    Refused(Refusal),
    /// It is dropped without a word.
    Dropped(Loss),
    /// It is refused: a service address that no Service has.
    Unallocated,
    /// It gets through to the program of this node that tells load balancers of its health.
    Served,
    /// It is none of ours and goes where it would go anyway; at most its source is replaced.
    Passed(Source),
}

/// How one backend is led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lead {
    /// Its share, where the scheduler weighs; never 0.
    pub weight: Weight,
    /// Whom it sees.
    pub source: Source,
}

/// Whom the receiver of a packet sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The address that the packet came with.
    Kept,
    /// An address of this node.
    Replaced(Masquerade),
}

/// Why a source is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Masquerade {
    /// The backend is the client.
    Hairpin,
    /// A process of this node calls from a VIP, to which nobody knows the way.
    ViaVip,
    /// `masqueradeAll`.
    All,
    /// The reply must come back through this node.
    OffNode,
    /// A client from beyond the cluster called a `ClusterIP`.
    OffCluster,
    /// A pod calls where nobody knows the way to pods.
    PodEgress,
}

impl Masquerade {
    /// The word for it, as in plans.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hairpin => "hairpin",
            Self::ViaVip => "viaVip",
            Self::All => "all",
            Self::OffNode => "offNode",
            Self::OffCluster => "offCluster",
            Self::PodEgress => "podEgress",
        }
    }
}

/// Why a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No endpoint is usable anywhere.
    NoEndpoint,
    /// Every backend has weight 0, so IPVS finds none.
    NoWeight,
    /// No Service has this port of the VIP.
    NoPort,
}

/// Why a packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Loss {
    /// `loadBalancerSourceRanges` does not name the client.
    NotAdmitted,
    /// Policy Local, and the usable endpoints are on other nodes.
    NoLocalEndpoint,
}

/// By what a client counts as within the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Within {
    /// It is a process of this node.
    Process,
    /// Its address is in the pod network.
    PodNetwork,
    /// It comes by a device of the cluster.
    Device,
}

/// How a verdict comes about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps<'a> {
    /// Whether it meets admission, IPVS and the guard: what this node only passes on does not.
    pub is_met: bool,
    /// What is called.
    pub frontend: Option<&'a Frontend>,
    /// Whether its source may call that.
    pub is_admitted: bool,
    /// By what its client counts as within the cluster; `None`: it does not.
    pub within: Option<Within>,
    /// The mark that it gets for that, where the frontend has one.
    pub mark: Option<Mark>,
    /// The virtual service that takes it, if it comes so far.
    pub service: Option<(ServiceKey, VirtualService)>,
    /// The end.
    pub verdict: Verdict,
}

/// The verdict on a packet, where `desired` and `nat` are programmed.
#[must_use]
pub fn verdict(desired: &Desired, nat: &SourceNat, packet: &Packet<'_>) -> Verdict {
    steps(desired, nat, packet).verdict
}

/// The verdict, and what was decided on the way to it.
#[must_use]
pub fn steps<'a>(desired: &'a Desired, nat: &SourceNat, packet: &Packet<'_>) -> Steps<'a> {
    let frontend = desired.frontend(&packet.target);
    let way = Way {
        desired,
        nat,
        packet,
        frontend,
    };
    let (is_met, is_admitted) = (way.is_met(), way.is_admitted());
    let taken = is_met && is_admitted;
    let service = way.virtual_service().filter(|_| taken);
    Steps {
        is_met,
        frontend,
        is_admitted,
        within: way.within(),
        mark: way.mark(),
        verdict: way.verdict(service.as_ref().map(|(_, service)| service)),
        service,
    }
}

struct Way<'a> {
    desired: &'a Desired,
    nat: &'a SourceNat,
    packet: &'a Packet<'a>,
    frontend: Option<&'a Frontend>,
}

impl Way<'_> {
    /// `service`: what takes it, if anything does.
    fn verdict(&self, service: Option<&VirtualService>) -> Verdict {
        let target = self.packet.target.ip;
        if !self.is_met() {
            return self.unallocated().unwrap_or_else(|| self.passed());
        }
        if !self.is_admitted() {
            return Verdict::Dropped(Loss::NotAdmitted);
        }
        if let Some(service) = service {
            return self.forwarded(service);
        }
        if self.is_vip(target) || self.is_external() {
            return self.without_service();
        }
        // The guard of the hook input has no rule for these: an address of the node is none.
        let unallocated = if self.is_own() {
            self.unallocated()
        } else {
            None
        };
        unallocated.unwrap_or_else(|| self.passed())
    }

    /// Otherwise it comes to the hook forward, where IPVS takes only replies.
    fn is_met(&self) -> bool {
        self.is_own() || self.is_local(self.packet.target.ip)
    }

    /// Whether a process of this node sends it.
    fn is_own(&self) -> bool {
        self.packet.device.is_none()
    }

    /// Whether the kernel counts the address as this machine's.
    fn is_local(&self, ip: IpAddr) -> bool {
        self.desired.facts().own.contains(&ip) || self.is_vip(ip) || ip.is_loopback()
    }

    /// One of which only old connections are left is guarded as before.
    fn is_vip(&self, ip: IpAddr) -> bool {
        self.desired.is_vip(ip) || self.desired.lingering(ip).next().is_some()
    }

    fn is_external(&self) -> bool {
        self.frontend
            .is_some_and(|frontend| frontend.kind.is_external())
    }

    /// Chains `admit-remote` and `admit-local`.
    fn is_admitted(&self) -> bool {
        let target = &self.packet.target;
        let admitted = self.desired.admitted(target);
        let mut networks = admitted.iter();
        !self.desired.is_restricted(target)
            || networks.any(|network| network.contains(self.packet.source))
    }

    /// By what the client counts as within the cluster.
    fn within(&self) -> Option<Within> {
        let Packet { source, device, .. } = *self.packet;
        if self.is_own() {
            return Some(Within::Process);
        }
        if among(&self.nat.networks.pods, source) == Membership::Inside {
            return Some(Within::PodNetwork);
        }
        let by_device = match self.nat.strangers(Family::of(source))? {
            Strangers::OutsideOf(_) => false,
            Strangers::NotThrough(name) => device == Some(name),
            Strangers::NotThroughAny(prefix) => {
                device.is_some_and(|device| device.starts_with(prefix))
            }
        };
        by_device.then_some(Within::Device)
    }

    /// What clients within the cluster get, if they are told apart.
    fn mark(&self) -> Option<Mark> {
        let mark = self.desired.mark(&self.packet.target)?;
        self.within().map(|_| mark)
    }

    /// IPVS looks for a virtual service by mark before it looks for one by address.
    fn virtual_service(&self) -> Option<(ServiceKey, VirtualService)> {
        let target = self.packet.target;
        let marked = self.mark().and_then(|mark| {
            let family = Family::of(target.ip);
            let key = ServiceKey::Mark { family, mark };
            Some((key, self.desired.marked_service(&key)?))
        });
        marked.or_else(|| Some((target.into(), self.frontend?.virtual_service()?)))
    }

    fn forwarded(&self, service: &VirtualService) -> Verdict {
        let servers = service.servers.iter().filter(|(_, weight)| **weight > 0);
        let leads: BTreeMap<BackendAddr, Lead> = servers
            .map(|(backend, weight)| {
                let lead = Lead {
                    weight: *weight,
                    source: self.source(backend.ip),
                };
                (*backend, lead)
            })
            .collect();
        if leads.is_empty() {
            return Verdict::Refused(Refusal::NoWeight);
        }
        Verdict::Forwarded(leads)
    }

    /// Chain `vip-without-service`.
    fn without_service(&self) -> Verdict {
        if self.desired.is_served(&self.packet.target) {
            return Verdict::Served;
        }
        match self.frontend.map(Frontend::action) {
            Some(Action::Drop) => Verdict::Dropped(Loss::NoLocalEndpoint),
            Some(Action::Reject | Action::Balance) => Verdict::Refused(Refusal::NoEndpoint),
            None => Verdict::Refused(Refusal::NoPort),
        }
    }

    /// Chain `unallocated`.
    fn unallocated(&self) -> Option<Verdict> {
        let networks = &self.nat.networks;
        let target = self.packet.target.ip;
        let service = among(&networks.services, target) == Membership::Inside;
        let pods = networks.pods_among_services();
        let pod = among(&pods, target) == Membership::Inside;
        let left = self.nat.left_to_others.contains(&target);
        (service && !pod && !left).then_some(Verdict::Unallocated)
    }

    fn passed(&self) -> Verdict {
        Verdict::Passed(self.source(self.packet.target.ip))
    }

    fn source(&self, to: IpAddr) -> Source {
        self.masquerade(to).map_or(Source::Kept, Source::Replaced)
    }

    /// Chain `source-nat`, rule by rule. `to` is where the packet goes after IPVS.
    fn masquerade(&self, to: IpAddr) -> Option<Masquerade> {
        // It does not leave the node, and so passes no such chain, or by way of `lo`.
        if self.is_local(to) {
            return None;
        }
        let Packet { source, target, .. } = *self.packet;
        let networks = &self.nat.networks;
        let at_vip = self.desired.is_vip(target.ip);
        if source == to && self.desired.is_hairpin(source) {
            return Some(Masquerade::Hairpin);
        }
        if self.desired.is_vip(source) {
            return Some(Masquerade::ViaVip);
        }
        if self.nat.masquerade_all && at_vip && !self.is_external() {
            return Some(Masquerade::All);
        }
        let is_external = self.is_external();
        let pod = among(&networks.all_pods(), source) == Membership::Inside;
        if (at_vip || is_external) && pod && networks.is_outside(to) {
            return Some(Masquerade::PodEgress);
        }
        let of_this_node = among(&networks.node_pods, source) == Membership::Inside;
        let preserved = self.frontend.is_some_and(|f| f.preserves_client);
        if preserved && !of_this_node {
            let pod = among(&networks.pods, source) == Membership::Inside;
            let elsewhere = !self.desired.is_hairpin(to);
            return (pod && elsewhere).then_some(Masquerade::OffNode);
        }
        if is_external && !of_this_node && !self.is_local(source) {
            return Some(Masquerade::OffNode);
        }
        if at_vip && !is_external && self.is_stranger() {
            return Some(Masquerade::OffCluster);
        }
        let off_cluster = among(&networks.non_masquerade, to) != Membership::Inside;
        (of_this_node && off_cluster).then_some(Masquerade::PodEgress)
    }

    /// Whether the client is from beyond the cluster, as the operator wants it told.
    fn is_stranger(&self) -> bool {
        let source = self.packet.source;
        // Who has a mark of ours has no other, and processes of the node come by no device.
        let device = self.packet.device.filter(|_| self.mark().is_none());
        match self.nat.strangers(Family::of(source)) {
            None => false,
            Some(Strangers::OutsideOf(networks)) => {
                let inside = networks.iter().any(|network| network.contains(source));
                !inside && !self.is_local(source)
            }
            Some(Strangers::NotThrough(name)) => device.is_some_and(|device| device != name),
            Some(Strangers::NotThroughAny(prefix)) => {
                device.is_some_and(|device| !device.starts_with(prefix))
            }
        }
    }
}

/// Where an address is, seen from some networks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Membership {
    Inside,
    Outside,
    /// No network of its family is known: what is in them or not has no rule.
    Unknown,
}

fn among(networks: &BTreeSet<IpNetwork>, ip: IpAddr) -> Membership {
    let family = Family::of(ip);
    let mut of_family = networks
        .iter()
        .filter(|network| Family::of(network.ip()) == family)
        .peekable();
    if of_family.peek().is_none() {
        Membership::Unknown
    } else if of_family.any(|network| network.contains(ip)) {
        Membership::Inside
    } else {
        Membership::Outside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of plans, and one that plans have no row for.
    #[test]
    fn words_do_not_change() {
        let words = [
            Masquerade::Hairpin,
            Masquerade::ViaVip,
            Masquerade::All,
            Masquerade::OffNode,
            Masquerade::OffCluster,
            Masquerade::PodEgress,
        ]
        .map(Masquerade::name);
        let expected = [
            "hairpin",
            "viaVip",
            "all",
            "offNode",
            "offCluster",
            "podEgress",
        ];
        assert_eq!(words, expected);
    }
}
