//! Which addresses are pods, which are this node's, and whose source is to be replaced.
//!
//! [`Policy`] is what the operator configured, [`Networks`] what follows from
//! it and from the cluster's facts. Source NAT is decided from these alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;

use crate::address::{AddressError, Family, parse_address, parse_any};
use crate::binding::VipBinding;
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::ipam::{PodRange, RangeError};
use crate::kube::{AddressKind, Kind, Node, ObjectKey, ZONE_LABEL};
use crate::names::ObjectName;
use crate::service::{Scheduler, Scheduling};

/// Which of the node's addresses serve node ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every address.
    #[default]
    All,
    /// The first InternalIP of each family, else the first ExternalIP.
    Primary,
    /// Those within one of these networks; a family of which none is named is open.
    Within(Vec<IpNetwork>),
}

/// Which external IPs are served.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExternalIps {
    /// Every one that a Service names.
    #[default]
    All,
    /// Those within one of these networks; none of them, no external IP.
    Within(Vec<IpNetwork>),
}

/// How it is told that a client of a ClusterIP is within the cluster; the source of
/// others is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DetectLocal {
    /// Its address is in the configured pod network.
    ClusterCidr,
    /// Its address is in this node's pod ranges.
    NodeCidr,
    /// It comes through this device.
    BridgeInterface(String),
    /// It comes through a device whose name begins so.
    InterfaceNamePrefix(String),
}

/// What the operator decides about services and their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The pod network; where empty, the pod ranges of all Nodes.
    pub cluster_cidrs: Vec<IpNetwork>,
    /// Ranges of cluster addresses, beside those of the ServiceCIDR objects.
    pub service_cidrs: Vec<IpNetwork>,
    /// Which of the node's addresses serve node ports.
    pub node_port_addresses: NodePortAddresses,
    /// Where pods' own addresses may appear, beside the pod and service
    /// networks; `None` is what is link-local.
    pub non_masquerade: Option<Vec<IpNetwork>>,
    /// Whether every ClusterIP call gets a source of this node.
    pub masquerade_all: bool,
    /// Ports out of which node ports are given; a replaced source never has one of them.
    pub node_ports: RangeInclusive<u16>,
    /// Which external IPs are served.
    pub external_ips: ExternalIps,
    /// How connections are spread where a Service says nothing.
    pub scheduling: Scheduling,
    /// What Services call us that ask for a proxy by name; absent: none does.
    pub proxy_name: Option<String>,
    /// How clients within the cluster are told; absent: nobody calls a ClusterIP from
    /// beyond it, or their source may stay.
    pub detect_local: Option<DetectLocal>,
    /// How VIPs are bound.
    pub vip_binding: VipBinding,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            cluster_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            node_port_addresses: NodePortAddresses::All,
            non_masquerade: None,
            masquerade_all: false,
            node_ports: 30_000..=32_767,
            external_ips: ExternalIps::All,
            scheduling: Scheduling::default(),
            proxy_name: None,
            detect_local: None,
            vip_binding: VipBinding::Address,
        }
    }
}

/// Lowest port that a replaced source may have: below are those of services.
const LOWEST_SOURCE_PORT: u16 = 1024;

impl Policy {
    /// Ports that a replaced source may have: the larger part of the unprivileged
    /// ones above or below the node ports.
    #[must_use]
    pub fn source_ports(&self) -> RangeInclusive<u16> {
        let above = self.node_ports.end().saturating_add(1)..=u16::MAX;
        let below = LOWEST_SOURCE_PORT..=self.node_ports.start().saturating_sub(1);
        if *self.node_ports.end() < u16::MAX && above.len() >= below.len() {
            above
        } else {
            below
        }
    }
}

/// Networks as they follow from the cluster's facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    /// Pods of the whole cluster.
    pub pods: BTreeSet<IpNetwork>,
    /// Pods of this node.
    pub node_pods: BTreeSet<IpNetwork>,
    /// Where pods' own addresses may appear.
    pub non_masquerade: BTreeSet<IpNetwork>,
    /// Ranges of cluster addresses.
    pub services: BTreeSet<IpNetwork>,
}

impl Networks {
    /// What holds for the node of that name. What cannot be read is in the conditions.
    /// `former` is the node's own object as it was last, which counts while it is gone.
    #[must_use]
    pub fn new(
        cluster: &ClusterState,
        node: &str,
        policy: &Policy,
        former: Option<&Node>,
    ) -> (Self, Vec<Condition>) {
        let mut conditions = Vec::new();
        let mut networks = Self {
            pods: policy.cluster_cidrs.iter().copied().collect(),
            services: policy.service_cidrs.iter().copied().collect(),
            ..Self::default()
        };
        // What is configured counts for its family.
        let configured: BTreeSet<Family> = policy
            .cluster_cidrs
            .iter()
            .map(|network| Family::of(network.ip()))
            .collect();
        let former = former.filter(|_| cluster.node(node).is_none());
        let former = former.map(|object| (node, object));
        for (name, object) in cluster.nodes().chain(former) {
            let ranges = pod_ranges(name, object, &mut conditions);
            if name == node {
                networks.node_pods.extend(&ranges);
            }
            let others = ranges.into_iter();
            let others = others.filter(|range| !configured.contains(&Family::of(range.ip())));
            networks.pods.extend(others);
        }
        for (name, object) in cluster.service_cidrs() {
            for text in &object.spec.cidrs {
                match parse_network(text) {
                    Ok(network) => {
                        networks.services.insert(network);
                    }
                    Err(problem) => conditions.push(Condition {
                        object: cluster_object(Kind::ServiceCidr, name),
                        reason: Reason::InvalidRange,
                        message: format!(
                            "spec.cidrs: {problem}; the range is left out, correct it"
                        ),
                    }),
                }
            }
        }
        // Pods see one another's own addresses whatever else is configured.
        networks.non_masquerade = &networks.pods | &networks.services;
        match &policy.non_masquerade {
            Some(also) => networks.non_masquerade.extend(also),
            None => networks.non_masquerade.extend(link_local()),
        }
        (networks, conditions)
    }

    /// The pods' networks that lie within a range of cluster addresses: what pods have is not
    /// taken from them. A pod network around the whole range is no claim to its addresses.
    #[must_use]
    pub fn pods_among_services(&self) -> BTreeSet<IpNetwork> {
        let lies_within = |pods: &&IpNetwork| {
            let mut services = self.services.iter();
            services.any(|range| range.prefix() <= pods.prefix() && range.contains(pods.network()))
        };
        self.pods.iter().filter(lies_within).copied().collect()
    }

    /// Pods of the whole cluster, those of this node among them also where the pod network does
    /// not hold their range.
    #[must_use]
    pub fn all_pods(&self) -> BTreeSet<IpNetwork> {
        &self.pods | &self.node_pods
    }

    /// Whether `ip` lies outside of the pod network. Without a pod network of its
    /// family nothing is known to lie outside.
    #[must_use]
    pub fn is_outside(&self, ip: IpAddr) -> bool {
        let mut of_family = self
            .pods
            .iter()
            .filter(|network| Family::of(network.ip()) == Family::of(ip))
            .peekable();
        of_family.peek().is_some() && !of_family.any(|network| network.contains(ip))
    }
}

/// RFC 3927, RFC 4291.
fn link_local() -> impl Iterator<Item = IpNetwork> {
    [
        (IpAddr::from([169, 254, 0, 0]), 16),
        (IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 0]), 10),
    ]
    .into_iter()
    .filter_map(|(ip, prefix)| IpNetwork::new(ip, prefix).ok())
}

/// The networks of a family that lie within no other of them, in order.
#[must_use]
pub fn outermost(networks: &BTreeSet<IpNetwork>, family: Family) -> Vec<IpNetwork> {
    let of_family = || networks.iter().filter(|n| Family::of(n.ip()) == family);
    of_family()
        .filter(|network| {
            !of_family()
                .any(|other| other.prefix() < network.prefix() && other.contains(network.network()))
        })
        .copied()
        .collect()
}

/// Parses a network in CIDR notation; bits behind the prefix are cleared.
///
/// # Errors
/// What is wrong with the text, in words.
pub fn parse_network(text: &str) -> Result<IpNetwork, String> {
    let wrong = || format!("{text:?} is not a network in CIDR notation, such as 10.244.0.0/16");
    // The parser takes a lone address, and a netmask behind the slash, too.
    let (ip, prefix) = text.trim().split_once('/').ok_or_else(wrong)?;
    if !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let prefix = prefix.parse().map_err(|_| wrong())?;
    let ip = parse_any(ip).map_err(|error| match error {
        AddressError::Mapped => format!("{text:?} is IPv4-mapped IPv6, write it as plain IPv4"),
        AddressError::NotAnAddress | AddressError::NotUnicast => wrong(),
    })?;
    let network = IpNetwork::new(ip, prefix).map_err(|_| wrong())?;
    IpNetwork::new(network.network(), prefix).map_err(|_| wrong())
}

/// A network but for one of its addresses, as one network for each bit behind its prefix.
pub(crate) fn without(network: IpNetwork, ip: IpAddr) -> impl Iterator<Item = IpNetwork> {
    let bits = Family::of(ip).bits();
    (network.prefix()..bits).filter_map(move |prefix| {
        // The half that `ip` is not in.
        let distance = u32::from(bits - prefix - 1);
        let other: IpAddr = match ip {
            IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits() ^ (1 << distance)).into(),
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() ^ (1 << distance)).into(),
        };
        let half = IpNetwork::new(other, prefix + 1).ok()?;
        IpNetwork::new(half.network(), prefix + 1).ok()
    })
}

/// Key of an object that has no namespace.
#[must_use]
pub fn cluster_object(kind: Kind, name: &str) -> ObjectKey {
    ObjectKey {
        kind,
        name: ObjectName::new("", name),
    }
}

/// The pod ranges of a Node, the first of each family.
pub(crate) fn pod_ranges(
    name: &str,
    node: &Node,
    conditions: &mut Vec<Condition>,
) -> Vec<IpNetwork> {
    let mut ranges: BTreeMap<Family, IpNetwork> = BTreeMap::new();
    let mut say = |message| {
        conditions.push(Condition {
            object: cluster_object(Kind::Node, name),
            reason: Reason::InvalidPodRange,
            message,
        });
    };
    for text in node.pod_cidrs() {
        match parse_network(text) {
            // A route to it would be a default route, and every client a pod.
            Ok(network) if network.prefix() == 0 => say(format!(
                "spec.podCIDRs: {network} is every address; the range is left out, correct it"
            )),
            Ok(network) => {
                let family = Family::of(network.ip());
                if let Some(first) = ranges.get(&family) {
                    say(format!(
                        "spec.podCIDRs: {network} is a second {family} range, {first} counts; \
                         give the Node one range of each family"
                    ));
                } else {
                    ranges.insert(family, network);
                }
            }
            Err(problem) => say(format!(
                "spec.podCIDRs: {problem}; the range is left out, correct it"
            )),
        }
    }
    ranges.into_values().collect()
}

/// What is known of this node, and what the operator decided for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFacts {
    /// Every address of the node: none of them can be a VIP.
    pub own: BTreeSet<IpAddr>,
    /// Those that serve node ports.
    pub node_ports: BTreeSet<IpAddr>,
    /// Pods of this node.
    pub pods: BTreeSet<IpNetwork>,
    /// The ports that node ports are given out of.
    pub node_port_range: RangeInclusive<u16>,
    /// The address of each family by which the node is known.
    pub primary: BTreeMap<Family, IpAddr>,
    /// The zone that the Node object names.
    pub zone: Option<String>,
    /// Which external IPs are served.
    pub external_ips: ExternalIps,
    /// How connections are spread where a Service says nothing.
    pub scheduling: Scheduling,
    /// Schedulers that the kernel of this node was seen not to have.
    pub missing_schedulers: BTreeSet<Scheduler>,
    /// What Services call us that ask for a proxy by name.
    pub proxy_name: Option<String>,
    /// How VIPs are bound.
    pub vip_binding: VipBinding,
    /// The address of each family by which processes of the node call VIPs that are bound by
    /// route; the machine has it.
    pub sources: BTreeMap<Family, IpAddr>,
}

impl Default for NodeFacts {
    fn default() -> Self {
        Self::new(None, None, &Policy::default(), &BTreeSet::new())
    }
}

impl NodeFacts {
    /// Chooses the addresses that serve node ports out of `own`.
    ///
    /// `own` is what the machine has; where nothing is known of the machine, as
    /// in a plan, pass `None`: then the Node object's addresses stand for it.
    #[must_use]
    pub fn new(
        own: Option<&BTreeSet<IpAddr>>,
        object: Option<&Node>,
        policy: &Policy,
        pods: &BTreeSet<IpNetwork>,
    ) -> Self {
        let internal = object_addresses(object, AddressKind::InternalIP);
        let external = object_addresses(object, AddressKind::ExternalIP);
        let own: BTreeSet<IpAddr> = match own {
            Some(own) => own.clone(),
            None => internal.iter().chain(&external).copied().collect(),
        };
        let node_ports = match &policy.node_port_addresses {
            NodePortAddresses::All => own.clone(),
            NodePortAddresses::Primary => Family::ALL
                .into_iter()
                .filter_map(|family| primary(family, &internal, &external))
                .filter(|ip| own.contains(ip))
                .collect(),
            NodePortAddresses::Within(networks) => own
                .iter()
                .copied()
                .filter(|ip| within(*ip, networks))
                .collect(),
        };
        let primary = Family::ALL.into_iter().filter_map(|family| {
            let ip = primary(family, &internal, &external)?;
            Some((family, ip))
        });
        let zone = object.and_then(|node| node.metadata.labels.get(ZONE_LABEL));
        Self {
            own,
            node_ports,
            pods: pods.clone(),
            node_port_range: policy.node_ports.clone(),
            primary: primary.collect(),
            zone: zone.filter(|zone| !zone.is_empty()).cloned(),
            external_ips: policy.external_ips.clone(),
            scheduling: policy.scheduling.clone(),
            missing_schedulers: BTreeSet::new(),
            proxy_name: policy.proxy_name.clone(),
            vip_binding: policy.vip_binding.clone(),
            sources: BTreeMap::new(),
        }
    }
}

/// The address by which a Node is known: its first InternalIP of a family, else
/// its first ExternalIP.
#[must_use]
pub fn primary_address(object: &Node, family: Family) -> Option<IpAddr> {
    let internal = object_addresses(Some(object), AddressKind::InternalIP);
    let external = object_addresses(Some(object), AddressKind::ExternalIP);
    primary(family, &internal, &external)
}

fn primary(family: Family, internal: &[IpAddr], external: &[IpAddr]) -> Option<IpAddr> {
    let mut all = internal.iter().chain(external).copied();
    all.find(|ip| Family::of(*ip) == family)
}

/// In the order of the object; what is no address is left out.
pub(crate) fn object_addresses(object: Option<&Node>, kind: AddressKind) -> Vec<IpAddr> {
    object
        .into_iter()
        .flat_map(|node| node.addresses_of(kind))
        .filter_map(|text| parse_address(text).ok())
        .collect()
}

/// Networks of one family leave the other open.
fn within(ip: IpAddr, networks: &[IpNetwork]) -> bool {
    let mut of_family = networks
        .iter()
        .filter(|network| Family::of(network.ip()) == Family::of(ip))
        .peekable();
    of_family.peek().is_none() || of_family.any(|network| network.contains(ip))
}

/// What is to be said about ranges of this node that are networks, and yet none
/// out of which pods can get addresses.
#[must_use]
pub fn range_conditions(name: &str, node: &Node) -> Vec<Condition> {
    let parsed = node.pod_cidrs().map(PodRange::parse);
    parsed
        .filter_map(|range| match range {
            Err(error @ RangeError::TooSmall(_)) => Some(Condition {
                object: cluster_object(Kind::Node, name),
                reason: Reason::InvalidPodRange,
                message: format!(
                    "spec.podCIDRs: {error}; no pod of this node gets an address of it, give the \
                     Node a larger range"
                ),
            }),
            // What is no network is told with the networks.
            Err(RangeError::NotCidr(_)) | Ok(_) => None,
        })
        .collect()
}

/// What is to be said about addresses in this node's object.
#[must_use]
pub fn address_conditions(name: &str, node: &Node) -> Vec<Condition> {
    let mut conditions = Vec::new();
    for kind in [AddressKind::InternalIP, AddressKind::ExternalIP] {
        for text in node.addresses_of(kind) {
            if let Err(error) = parse_address(text) {
                conditions.push(Condition {
                    object: cluster_object(Kind::Node, name),
                    reason: Reason::InvalidAddress,
                    message: format!(
                        "status.addresses: {text:?} {error}; the address is not used, correct it"
                    ),
                });
            }
        }
    }
    conditions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::{NodeAddress, NodeSpec, NodeStatus, ObjectMeta};

    fn networks(texts: &[&str]) -> Vec<IpNetwork> {
        texts.iter().map(|t| parse_network(t).unwrap()).collect()
    }

    fn ips(texts: &[&str]) -> BTreeSet<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn node(addresses: &[(AddressKind, &str)]) -> Node {
        Node {
            metadata: ObjectMeta::default(),
            spec: NodeSpec::default(),
            status: NodeStatus {
                addresses: addresses
                    .iter()
                    .map(|(kind, address)| NodeAddress {
                        kind: *kind,
                        address: (*address).to_owned(),
                    })
                    .collect(),
            },
        }
    }

    #[test]
    fn source_ports_never_meet_node_ports() {
        let cases = [
            (30_000..=32_767, 32_768..=65_535),
            (60_000..=65_535, 1024..=59_999),
            (1024..=2000, 2001..=65_535),
            (60_000..=65_000, 1024..=59_999),
            (1025..=65_535, 1024..=1024),
        ];
        for (node_ports, expected) in cases {
            let policy = Policy {
                node_ports,
                ..Policy::default()
            };
            assert_eq!(policy.source_ports(), expected);
        }
    }

    #[test]
    fn addresses_that_serve_node_ports() {
        let own = ips(&["192.0.2.1", "198.51.100.1", "2001:db8::1"]);
        let object = node(&[
            (AddressKind::ExternalIP, "198.51.100.1"),
            (AddressKind::InternalIP, "192.0.2.1"),
            (AddressKind::ExternalIP, "2001:db8::1"),
            (AddressKind::Other, "node-a"),
        ]);
        let chosen = |choice| {
            let policy = Policy {
                node_port_addresses: choice,
                ..Policy::default()
            };
            NodeFacts::new(Some(&own), Some(&object), &policy, &BTreeSet::new()).node_ports
        };
        assert_eq!(chosen(NodePortAddresses::All), own);
        assert_eq!(
            chosen(NodePortAddresses::Primary),
            ips(&["192.0.2.1", "2001:db8::1"])
        );
        let within = NodePortAddresses::Within(networks(&["198.51.100.0/24"]));
        assert_eq!(chosen(within), ips(&["198.51.100.1", "2001:db8::1"]));
        let none = NodePortAddresses::Within(networks(&["10.0.0.0/8", "::/0"]));
        assert_eq!(chosen(none), ips(&["2001:db8::1"]));
        let planned = NodeFacts::new(None, Some(&object), &Policy::default(), &BTreeSet::new());
        assert_eq!(planned.node_ports, own, "a plan takes the Node object's");
    }

    #[test]
    fn networks_in_cidr_notation() {
        assert_eq!(
            parse_network("10.244.3.7/16").unwrap().to_string(),
            "10.244.0.0/16"
        );
        // Decimal, as the API's old objects have it.
        for (text, network) in [
            ("010.000.0.0/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            (" ::/0 ", "::/0"),
        ] {
            assert_eq!(parse_network(text).unwrap().to_string(), network);
        }
        for bad in [
            "10.0.0.1",
            "10.0.0.0/33",
            "10.0.0.0/255.0.0.0",
            "10.0.0.0/+8",
            "x",
            "",
            "::ffff:10.0.0.0/104",
        ] {
            assert!(parse_network(bad).is_err(), "{bad}");
            assert!(PodRange::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_but_for_one_address() {
        let but = |network, ip: &str| -> Vec<String> {
            let halves = without(parse_network(network).unwrap(), ip.parse().unwrap());
            halves.map(|half| half.to_string()).collect()
        };
        let halves = ["192.0.2.4/31", "192.0.2.7/32"];
        assert_eq!(but("192.0.2.4/30", "192.0.2.6"), halves);
        assert_eq!(but("fd00::2/127", "fd00::3"), ["fd00::2/128"]);
        assert_eq!(but("fd00::/126", "fd00::3"), ["fd00::/127", "fd00::2/128"]);
        assert!(but("192.0.2.6/32", "192.0.2.6").is_empty());
        assert_eq!(but("::/0", "::").len(), 128);
    }

    #[test]
    fn pods_among_services_and_of_every_node() {
        let set = |texts: &[&str]| networks(texts).into_iter().collect::<BTreeSet<_>>();
        let known = Networks {
            // Around the range, within it, beside it.
            pods: set(&["10.0.0.0/8", "10.97.0.0/16", "10.244.0.0/16"]),
            node_pods: set(&["10.244.0.0/16", "172.16.0.0/24"]),
            services: set(&["10.96.0.0/12"]),
            ..Networks::default()
        };
        assert_eq!(known.pods_among_services(), set(&["10.97.0.0/16"]));
        let all = set(&[
            "10.0.0.0/8",
            "10.97.0.0/16",
            "10.244.0.0/16",
            "172.16.0.0/24",
        ]);
        assert_eq!(known.all_pods(), all);
    }

    #[test]
    fn without_a_pod_network_nothing_is_outside() {
        let mut known = Networks::default();
        let ip: IpAddr = "203.0.113.1".parse().unwrap();
        assert!(!known.is_outside(ip));
        known.pods = networks(&["fd00::/48"]).into_iter().collect();
        assert!(!known.is_outside(ip));
        known.pods.extend(networks(&["10.244.0.0/16"]));
        assert!(known.is_outside(ip));
        assert!(!known.is_outside("10.244.1.1".parse().unwrap()));
    }
}
