//! The addresses of a Service that this node answers for.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::address::{Family, parse_address};
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::kube::{LoadBalancerIngress, Service};
use crate::names::ObjectName;
use crate::network::{ExternalIps, NodeFacts};
use crate::planner::Planner;

/// VIPs by where they come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vips {
    /// `spec.clusterIPs`, or `spec.clusterIP` where an object has only that.
    pub(crate) cluster: BTreeSet<IpAddr>,
    /// `spec.externalIPs`.
    pub(crate) external: BTreeSet<IpAddr>,
    /// `status.loadBalancer.ingress[].ip` of those that nodes answer for.
    pub(crate) balancer: BTreeSet<IpAddr>,
    /// The families of the cluster addresses: a VIP of another has no backends.
    pub(crate) families: BTreeSet<Family>,
}

/// What it takes to read the addresses of one Service.
struct Reader<'a> {
    name: &'a ObjectName,
    node: &'a str,
    cluster: &'a ClusterState,
    facts: &'a NodeFacts,
    conditions: &'a mut Vec<Condition>,
}

impl Vips {
    pub(crate) fn of(
        service: &Service,
        planner: &Planner<'_>,
        conditions: &mut Vec<Condition>,
    ) -> Self {
        let mut reader = Reader {
            name: planner.name,
            node: planner.node,
            cluster: planner.cluster,
            facts: planner.facts,
            conditions,
        };
        let spec = &service.spec;
        let (field, texts) = if spec.cluster_ips.is_empty() {
            ("spec.clusterIP", std::slice::from_ref(&spec.cluster_ip))
        } else {
            ("spec.clusterIPs", spec.cluster_ips.as_slice())
        };
        let cluster = reader.parse(field, texts.iter());
        let families: BTreeSet<Family> = texts.iter().filter_map(|text| family_of(text)).collect();
        let cluster = reader.without_own(field, cluster);
        let external = reader.parse("spec.externalIPs", spec.external_ips.iter());
        let external = reader.allowed(external);
        let external = reader.without_others("spec.externalIPs", external);
        let entries = &service.status.load_balancer.ingress;
        let named = entries.iter().filter(|entry| !entry.ip.is_empty());
        let ours: Vec<_> = named.filter(|entry| reader.is_ours(entry)).collect();
        let field = "status.loadBalancer.ingress[].ip";
        let balancer = reader.parse(field, ours.into_iter().map(|entry| &entry.ip));
        let balancer = reader.without_others(field, balancer);
        Self {
            external: reader.of_families("spec.externalIPs", external, &families),
            balancer: reader.of_families(field, balancer, &families),
            cluster,
            families,
        }
    }
}

/// The family that a cluster address is meant to be of. One that cannot be served takes
/// nothing away from the Service's other addresses.
fn family_of(text: &str) -> Option<Family> {
    (!text.is_empty()).then(|| {
        if text.contains(':') {
            Family::IPv6
        } else {
            Family::IPv4
        }
    })
}

impl Reader<'_> {
    fn say(&mut self, reason: Reason, message: String) {
        let said = condition(self.name, reason, message);
        if !self.conditions.contains(&said) {
            self.conditions.push(said);
        }
    }

    /// Whether packets to the address of a balancer come to nodes. With a mode that is
    /// not known, to take them could cut clients off the balancer.
    fn is_ours(&mut self, entry: &LoadBalancerIngress) -> bool {
        let LoadBalancerIngress { ip, ip_mode } = entry;
        match ip_mode.as_str() {
            "" | "VIP" => true,
            "Proxy" => false,
            other => {
                let message = format!(
                    "status.loadBalancer.ingress[].ipMode: {other:?} is not known; {ip} is not \
                     served, write VIP or Proxy"
                );
                self.say(Reason::Unsupported, message);
                false
            }
        }
    }

    fn parse<'a>(
        &mut self,
        field: &str,
        texts: impl Iterator<Item = &'a String>,
    ) -> BTreeSet<IpAddr> {
        let mut ips = BTreeSet::new();
        for text in texts.filter(|text| !text.is_empty()) {
            match parse_address(text) {
                Ok(ip) => {
                    ips.insert(ip);
                }
                Err(error) => self.say(
                    Reason::InvalidAddress,
                    format!("{field}: {text:?} {error}; the address is not served, correct it"),
                ),
            }
        }
        ips
    }

    /// An address of the node answers for the node. No cluster address is one, unless
    /// their ranges overlap.
    fn without_own(&mut self, field: &str, mut ips: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        ips.retain(|ip| {
            let own = self.facts.own.contains(ip);
            if own {
                let message = format!(
                    "{field}: {ip} is an address of node {}; it is not served, give the Service \
                     an address that no node has",
                    self.node
                );
                self.say(Reason::AddressConflict, message);
            }
            !own
        });
        ips
    }

    /// An address of this node, be it its own or brought by who moves addresses among
    /// nodes, is served as it is, not bound. Bound as a VIP, that of another node would
    /// cut this one off it: off its kubelet, and its API server. Packets to it go there.
    fn without_others(&mut self, field: &str, ips: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        for ip in ips.intersection(&self.facts.own) {
            let message = format!(
                "{field}: {ip} is an address of node {}, which keeps it: only the Service's ports \
                 there are the Service's",
                self.node
            );
            self.say(Reason::AddressOfNode, message);
        }
        let of_node = |ip: IpAddr| {
            let theirs = !self.facts.own.contains(&ip);
            self.cluster.other_node_at(ip, self.node).filter(|_| theirs)
        };
        let (theirs, ours): (BTreeSet<_>, BTreeSet<_>) =
            ips.into_iter().partition(|ip| of_node(*ip).is_some());
        if let Some(first) = theirs.first()
            && let Some(node) = of_node(*first)
        {
            let others = match theirs.len() {
                1 => String::new(),
                more => format!(" (and {} more of other nodes)", more - 1),
            };
            let message = format!(
                "{field}: {first} is an address of node {node}{others}, where it is served; not \
                 served here"
            );
            self.say(Reason::AddressOfNode, message);
        }
        ours
    }

    /// Who may write Services could take any address in the world by an external
    /// IP (CVE-2020-8554): the operator says which.
    fn allowed(&mut self, mut ips: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let allowed = |ip: &IpAddr| match &self.facts.external_ips {
            ExternalIps::All => true,
            ExternalIps::Within(networks) => networks.iter().any(|n| n.contains(*ip)),
        };
        let refused: Vec<IpAddr> = ips.iter().filter(|ip| !allowed(ip)).copied().collect();
        ips.retain(|ip| !refused.contains(ip));
        for ip in refused {
            let message = format!(
                "spec.externalIPs: {ip} is not within externalIPs of the agent's configuration; \
                 it is not served, ask the operator to allow it there or remove it"
            );
            self.say(Reason::AddressNotAllowed, message);
        }
        ips
    }

    /// Backends of a family exist only where the Service has that family.
    fn of_families(
        &mut self,
        field: &str,
        mut ips: BTreeSet<IpAddr>,
        families: &BTreeSet<Family>,
    ) -> BTreeSet<IpAddr> {
        ips.retain(|ip| {
            let family = Family::of(*ip);
            let served = families.contains(&family);
            if !served {
                let message = format!(
                    "{field}: {ip} is {family} and the Service has no ClusterIP of that family; \
                     it is not served, give the Service both families or remove the address"
                );
                self.say(Reason::FamilyMismatch, message);
            }
            served
        });
        ips
    }
}
