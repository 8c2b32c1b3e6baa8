//! Random clusters and calls: few addresses and names, so that they meet often.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::cluster::Event;
use ferrule_model::host_ports::{HostPort, PodPorts};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice,
    LoadBalancerIngress, Node, NodeAddress, Object, SERVICE_NAME_LABEL, Service, ServicePort,
    ServiceType, WEIGHT_ANNOTATION,
};
use ferrule_model::names::{Attachment, ContainerId, IfName, ObjectName};
use ferrule_model::network::{DetectLocal, Policy, parse_network};
use ferrule_model::time::Timestamp;
use ferrule_model::view::NodeView;
use proptest::prelude::*;
use proptest::sample::{Index, select, subsequence};

pub(crate) const OWN: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
pub(crate) const SERVICES: [&str; 2] = ["10.96.0.0/24", "fd00:96::/112"];
pub(crate) const PODS: [&str; 2] = ["10.1.0.0/16", "fd00:1::/32"];

/// Few, so that they meet often; the last two are the node's own.
pub(crate) const VIPS: [&str; 8] = [
    "10.96.0.1",
    "10.96.0.2",
    "fd00:96::1",
    "fd00:96::2",
    "203.0.113.1",
    "2001:db8:203::1",
    OWN[0],
    OWN[1],
];

/// The last two are on this node: a pod that is not in the node's range, and one that is not in
/// the pod network.
pub(crate) const BACKENDS: [[&str; 2]; 9] = [
    ["10.1.0.1", "fd00:1::1"],
    ["10.1.0.2", "fd00:1::2"],
    ["10.1.1.1", "fd00:1:1::1"],
    ["10.1.1.2", "fd00:1:1::2"],
    OWN,
    ["192.0.2.2", "2001:db8::2"],
    ["198.51.100.9", "2001:db8:9::9"],
    ["10.1.7.1", "fd00:1:7::1"],
    ["203.0.113.50", "2001:db8:50::50"],
];

/// A client and the device by which it comes; the first is a process of the node.
pub(crate) const CLIENTS: [([&str; 2], Option<&str>); 7] = [
    (OWN, None),
    (["10.1.0.1", "fd00:1::1"], Some("cni0")),
    (["10.1.0.9", "fd00:1::9"], Some("cni0")),
    (["10.1.7.1", "fd00:1:7::1"], Some("cni0")),
    (["10.1.1.1", "fd00:1:1::1"], Some("uplink")),
    (["192.0.2.2", "2001:db8::2"], Some("uplink")),
    (["198.51.100.7", "2001:db8:7::7"], Some("uplink")),
];

/// Whom a packet is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    Node,
    /// Within the node's range; whether it is known to have one is another matter.
    PodHere,
    /// Within the pod network, and not in the node's range.
    PodElsewhere,
    Stranger,
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn within(ip: IpAddr, networks: &[&str]) -> bool {
    let mut networks = networks.iter().map(|text| parse_network(text).unwrap());
    networks.any(|network| network.contains(ip))
}

pub(crate) fn pod_here(ip: IpAddr) -> bool {
    within(ip, &["10.1.0.0/24", "fd00:1::/64"])
}

pub(crate) fn pod(ip: IpAddr) -> bool {
    within(ip, &PODS)
}

/// By what its endpoint says.
pub(crate) fn is_here(backend: IpAddr) -> bool {
    [0, 1, 4, 7, 8]
        .iter()
        .any(|at: &usize| BACKENDS[*at].map(ip).contains(&backend))
}

pub(crate) fn own(ip: IpAddr) -> bool {
    OWN.iter().any(|text| ip == text.parse::<IpAddr>().unwrap())
}

/// What the objects and the configuration are.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) services: Vec<Service>,
    pub(crate) slices: Vec<EndpointSlice>,
    pub(crate) host_port: bool,
    pub(crate) masquerade_all: bool,
    pub(crate) detect_local: Option<DetectLocal>,
    /// Whether pods show their own address to the one backend outside of the cluster.
    pub(crate) exempt: bool,
    /// Of which families the Nodes have a pod range, IPv4 first.
    pub(crate) ranges: [bool; 2],
}

/// One of [`BACKENDS`] in each family, and nothing else.
pub(crate) const EXEMPT: [&str; 2] = ["198.51.100.0/24", "2001:db8:9::/48"];

pub(crate) fn some(
    texts: &'static [&'static str],
    most: usize,
) -> impl Strategy<Value = Vec<String>> {
    let some = subsequence(texts.to_vec(), 0..=most);
    some.prop_map(|texts| texts.into_iter().map(str::to_owned).collect())
}

pub(crate) fn service_port() -> impl Strategy<Value = ServicePort> {
    (
        0..2_u8,
        select(vec![Protocol::Tcp, Protocol::Udp]),
        select(vec![80_u16, 81]),
        select(vec![0_u16, 30_080, 30_081]),
    )
        .prop_map(|(name, protocol, port, node_port)| ServicePort {
            name: format!("p{name}"),
            protocol,
            port,
            node_port,
        })
}

pub(crate) fn service() -> impl Strategy<Value = Service> {
    (
        (0..3_u8, prop::option::of(1..3_u8)),
        (some(&VIPS, 3), some(&VIPS, 2), some(&VIPS, 2)),
        (any::<[bool; 3]>(), select(vec![0_u16, 32_000, 30_080])),
        some(
            &[
                "192.0.2.0/24",
                "10.1.0.0/24",
                "203.0.113.1/32",
                "fd00:1:1::/64",
                "::/0",
            ],
            2,
        ),
        prop::collection::vec(service_port(), 1..4),
    )
        .prop_map(
            |((name, age), vips, ([internal, external, affine], check), ranges, ports)| {
                let policy = |local: bool| if local { "Local" } else { "Cluster" }.to_owned();
                let mut service = Service::default();
                service.metadata.name = format!("s{name}");
                service.metadata.creation_timestamp =
                    age.and_then(|day| Timestamp::parse(&format!("2026-01-0{day}T00:00:00Z")));
                let spec = &mut service.spec;
                spec.service_type = ServiceType::LoadBalancer;
                (spec.cluster_ips, spec.external_ips) = (vips.0, vips.1);
                spec.internal_traffic_policy = policy(internal);
                spec.external_traffic_policy = policy(external);
                if affine { "ClientIP" } else { "None" }.clone_into(&mut spec.session_affinity);
                spec.health_check_node_port = check;
                spec.load_balancer_source_ranges = ranges;
                spec.ports = ports;
                let ingress = vips.2.into_iter().map(|ip| LoadBalancerIngress {
                    ip,
                    ..LoadBalancerIngress::default()
                });
                service.status.load_balancer.ingress = ingress.collect();
                service
            },
        )
}

pub(crate) fn endpoint(family: usize) -> impl Strategy<Value = Endpoint> {
    let states = select(vec![
        (true, false),
        (true, false),
        (false, true),
        (false, false),
    ]);
    (0..BACKENDS.len(), states).prop_map(move |(backend, (ready, terminating))| Endpoint {
        addresses: vec![BACKENDS[backend][family].to_owned()],
        conditions: EndpointConditions {
            ready: Some(ready),
            serving: None,
            terminating: Some(terminating),
        },
        node_name: match backend {
            0 | 1 | 4 | 7 | 8 => Some("n0".to_owned()),
            2 | 3 | 5 => Some("n1".to_owned()),
            _ => None,
        },
        ..Endpoint::default()
    })
}

pub(crate) fn slice() -> impl Strategy<Value = EndpointSlice> {
    let endpoints = (0..2_usize).prop_flat_map(|family| {
        let endpoints = prop::collection::vec(endpoint(family), 1..4);
        (Just(family), endpoints)
    });
    let weight = select(vec![None, None, None, Some("0"), Some("3")]);
    let ports = subsequence(vec![0_u16, 1], 1..3);
    (0..6_u8, 0..3_u8, endpoints, weight, ports).prop_map(
        |(name, service, (family, endpoints), weight, ports)| {
            let mut slice = EndpointSlice {
                address_type: [AddressType::IPv4, AddressType::IPv6][family],
                endpoints,
                ..EndpointSlice::default()
            };
            slice.metadata.name = format!("e{name}");
            let label = (SERVICE_NAME_LABEL.to_owned(), format!("s{service}"));
            slice.metadata.labels = BTreeMap::from([label]);
            let weight = weight.map(|text| (WEIGHT_ANNOTATION.to_owned(), text.to_owned()));
            slice.metadata.annotations = weight.into_iter().collect();
            let protocols = [Protocol::Tcp, Protocol::Udp];
            let ports = ports.into_iter().flat_map(|name| {
                protocols.map(|protocol| EndpointPort {
                    name: format!("p{name}"),
                    protocol,
                    port: Some(8080 + name),
                })
            });
            slice.ports = ports.collect();
            slice
        },
    )
}

pub(crate) fn world() -> impl Strategy<Value = World> {
    let detect = select(vec![
        None,
        None,
        Some(DetectLocal::ClusterCidr),
        Some(DetectLocal::NodeCidr),
        Some(DetectLocal::BridgeInterface("cni0".to_owned())),
        Some(DetectLocal::InterfaceNamePrefix("cni".to_owned())),
    ]);
    (
        prop::collection::vec(service(), 1..5),
        prop::collection::vec(slice(), 0..8),
        any::<bool>(),
        (prop::bool::weighted(0.2), detect, any::<bool>()),
        any::<[bool; 2]>(),
    )
        .prop_map(
            |(services, slices, host_port, (masquerade_all, detect_local, exempt), ranges)| {
                // The last of a name is what there is.
                let services: BTreeMap<_, _> = services
                    .into_iter()
                    .map(|s| (s.metadata.name.clone(), s))
                    .collect();
                let slices: BTreeMap<_, _> = slices
                    .into_iter()
                    .map(|s| (s.metadata.name.clone(), s))
                    .collect();
                World {
                    services: services.into_values().collect(),
                    slices: slices.into_values().collect(),
                    host_port,
                    masquerade_all,
                    detect_local,
                    exempt,
                    ranges,
                }
            },
        )
}

pub(crate) fn node(name: &str, addresses: [&str; 2], ranges: &[&str]) -> Object {
    let mut node = Node::default();
    name.clone_into(&mut node.metadata.name);
    node.spec.pod_cidrs = ranges.iter().map(|range| (*range).to_owned()).collect();
    let addresses = addresses.map(|address| NodeAddress {
        kind: AddressKind::InternalIP,
        address: address.to_owned(),
    });
    node.status.addresses = addresses.to_vec();
    Object::Node(node)
}

impl World {
    pub(crate) fn view(&self) -> NodeView {
        let mut view = NodeView::new(
            "n0",
            Policy {
                masquerade_all: self.masquerade_all,
                detect_local: self.detect_local.clone(),
                non_masquerade: self
                    .exempt
                    .then(|| EXEMPT.map(|text| parse_network(text).unwrap()).to_vec()),
                service_cidrs: SERVICES.map(|text| parse_network(text).unwrap()).to_vec(),
                cluster_cidrs: PODS.map(|text| parse_network(text).unwrap()).to_vec(),
                ..Policy::default()
            },
        );
        let known = |ranges: [&'static str; 2]| -> Vec<&str> {
            let ranges = ranges.into_iter().zip(self.ranges);
            ranges
                .filter_map(|(range, known)| known.then_some(range))
                .collect()
        };
        let nodes = [
            node("n0", OWN, &known(["10.1.0.0/24", "fd00:1::/64"])),
            node(
                "n1",
                ["192.0.2.2", "2001:db8::2"],
                &known(["10.1.1.0/24", "fd00:1:1::/64"]),
            ),
        ];
        let services = self.services.iter().cloned().map(Object::Service);
        let slices = self.slices.iter().cloned().map(Object::EndpointSlice);
        let objects = nodes.into_iter().chain(services).chain(slices);
        view.take(objects.map(|object| Event::Applied(Box::new(object))));
        if self.host_port {
            let attachment = Attachment {
                container_id: ContainerId::try_from("c".to_owned()).unwrap(),
                interface: IfName::try_from("eth0".to_owned()).unwrap(),
            };
            let ports = PodPorts {
                pod: ObjectName::new("default", "pod"),
                addresses: vec![ip("10.1.0.1"), ip("fd00:1::1")],
                ports: vec![HostPort {
                    host_ip: None,
                    host_port: 30_080,
                    container_port: 8080,
                    protocol: Protocol::Tcp,
                }],
            };
            view.set_host_ports(&attachment, Some(ports));
        }
        view
    }

    /// Services that have an address, the one that wins first.
    pub(crate) fn by_age(&self) -> Vec<&Service> {
        let served = self
            .services
            .iter()
            .filter(|s| !s.spec.cluster_ips.is_empty());
        let mut services: Vec<&Service> = served.collect();
        services.sort_by_key(|service| {
            let created = service.metadata.creation_timestamp;
            (created.is_none(), created, service.metadata.name.clone())
        });
        services
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) client: Client,
    /// The address that source ranges are compared with.
    pub(crate) who: IpAddr,
    pub(crate) device: Option<&'static str>,
    pub(crate) target: FrontendAddr,
}

/// A call that is yet to be directed: at one of the frontends that there are, or elsewhere.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    client: usize,
    frontend: Option<Index>,
    elsewhere: FrontendAddr,
}

const ELSEWHERE: [&str; 10] = [
    "10.96.0.77",
    "fd00:96::77",
    "10.1.0.2",
    "fd00:1::2",
    "10.1.1.2",
    "fd00:1:1::2",
    "192.0.2.2",
    "198.51.100.9",
    "2001:db8:9::9",
    "169.254.0.9",
];

pub(crate) fn wish() -> impl Strategy<Value = Wish> {
    let targets = [&VIPS[..], &VIPS[..], &ELSEWHERE[..]].concat();
    let port = select(vec![80_u16, 81, 8081, 30_080, 30_081, 32_000, 32_000]);
    let protocol = select(vec![Protocol::Tcp, Protocol::Tcp, Protocol::Udp]);
    let frontend = prop::option::weighted(0.7, any::<Index>());
    (0..CLIENTS.len(), frontend, select(targets), port, protocol).prop_map(
        |(client, frontend, target, port, protocol)| Wish {
            client,
            frontend,
            elsewhere: FrontendAddr::new(ip(target), port, protocol),
        },
    )
}

impl Wish {
    pub(crate) fn directed(&self, view: &NodeView) -> Call {
        let frontends: Vec<_> = view.desired().frontends().map(|(addr, _)| addr).collect();
        let frontend = self.frontend.filter(|_| !frontends.is_empty());
        let target = frontend.map_or(self.elsewhere, |index| *index.get(&frontends));
        let (addresses, device) = CLIENTS[self.client];
        let who = ip(addresses[usize::from(target.ip.is_ipv6())]);
        let client = match device {
            None => Client::Node,
            Some(_) if pod_here(who) => Client::PodHere,
            Some(_) if pod(who) => Client::PodElsewhere,
            Some(_) => Client::Stranger,
        };
        Call {
            client,
            who,
            device,
            target,
        }
    }
}
