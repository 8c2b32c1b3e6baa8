//! A random cluster of the cast, and random calls in it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context as _;
use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::cluster::Event;
use ferrule_model::kube::{
    AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, LoadBalancerIngress,
    Object, SCHEDULER_ANNOTATIONS, SERVICE_NAME_LABEL, Service, ServicePort, ServiceType,
    WEIGHT_ANNOTATION,
};
use ferrule_model::network::{DetectLocal, Policy, parse_network};
use ferrule_model::verdict::Packet;
use ferrule_model::view::NodeView;

use super::super::cast;
use super::{BACKENDS, CLIENTS, Call};
use crate::random::Random;

/// Cluster addresses, external ones and those of balancers: two of each, in both families.
const VIPS: [[[&str; 2]; 2]; 3] = [
    [
        ["10.96.0.1", "fd00:10:96::1"],
        ["10.96.0.2", "fd00:10:96::2"],
    ],
    [
        ["203.0.113.1", "2001:db8:203::1"],
        ["203.0.113.2", "2001:db8:203::2"],
    ],
    [
        ["198.51.100.1", "2001:db8:198::1"],
        ["198.51.100.2", "2001:db8:198::2"],
    ],
];

/// Each names some of the clients.
const RANGES: [&str; 4] = [
    "192.0.2.2/32",
    "10.244.0.0/16",
    "2001:db8::1/128",
    "fd00:10:244:1::/64",
];

/// Ports that clients call.
const PORTS: [u16; 2] = [80, 81];
const NODE_PORTS: [u16; 3] = [0, 30_080, 30_081];

/// No Service has these.
const UNALLOCATED: [&str; 2] = ["10.96.0.77", "fd00:10:96::77"];

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

/// A random cluster, as node-a sees it; its own addresses are still to be told.
pub(super) fn view(random: &mut Random, nodes: &[Object]) -> NodeView {
    let network = |text| parse_network(text).into_iter();
    let pods = ["10.244.0.0/16", "fd00:10:244::/48"];
    let policy = Policy {
        cluster_cidrs: pods.into_iter().flat_map(network).collect(),
        masquerade_all: random.chance(15),
        detect_local: match random.below(4) {
            0 => Some(DetectLocal::ClusterCidr),
            1 => Some(DetectLocal::InterfaceNamePrefix("fer".to_owned())),
            _ => None,
        },
        ..Policy::default()
    };
    let mut objects = nodes.to_vec();
    for number in 0..2 + random.below(2) {
        let name = format!("s{number}");
        objects.push(Object::Service(service(random, &name)));
        for family in 0..2 {
            for index in 0..=random.below(2) {
                let slice = slice(random, &name, family, index);
                objects.push(Object::EndpointSlice(slice));
            }
        }
    }
    let mut view = NodeView::new(cast::NODE, policy);
    let events = objects.into_iter().map(Box::new);
    view.take(events.map(Event::Applied));
    view
}

/// Some addresses of a kind, of one family or both.
fn vips(random: &mut Random, kind: usize, percent: usize) -> Vec<String> {
    let mut vips = Vec::new();
    for pair in VIPS[kind] {
        for vip in pair {
            if random.chance(percent) {
                vips.push(vip.to_owned());
            }
        }
    }
    vips
}

fn service(random: &mut Random, name: &str) -> Service {
    let mut service = Service::default();
    name.clone_into(&mut service.metadata.name);
    let scheduler = *random.pick(&["rr", "wrr", "lc", "sed"]);
    let [key, ..] = SCHEDULER_ANNOTATIONS;
    service.metadata.annotations = BTreeMap::from([(key.to_owned(), scheduler.to_owned())]);
    let policy = |local| if local { "Local" } else { "Cluster" }.to_owned();
    let spec = &mut service.spec;
    spec.service_type = ServiceType::LoadBalancer;
    spec.cluster_ips = vips(random, 0, 60);
    spec.external_ips = vips(random, 1, 40);
    spec.internal_traffic_policy = policy(random.chance(40));
    spec.external_traffic_policy = policy(random.chance(60));
    if random.chance(50) {
        spec.health_check_node_port = cast::KUBELET;
    }
    for range in RANGES {
        if random.chance(25) {
            spec.load_balancer_source_ranges.push(range.to_owned());
        }
    }
    for port in PORTS {
        for protocol in PROTOCOLS {
            if random.chance(70) {
                spec.ports.push(ServicePort {
                    name: format!("{port}-{protocol}").to_lowercase(),
                    protocol,
                    port,
                    node_port: *random.pick(&NODE_PORTS),
                });
            }
        }
    }
    let ingress = vips(random, 2, 40)
        .into_iter()
        .map(|ip| LoadBalancerIngress {
            ip,
            ..LoadBalancerIngress::default()
        });
    service.status.load_balancer.ingress = ingress.collect();
    service
}

fn slice(random: &mut Random, service: &str, family: usize, index: usize) -> EndpointSlice {
    let mut slice = EndpointSlice {
        address_type: [AddressType::IPv4, AddressType::IPv6][family],
        ..EndpointSlice::default()
    };
    slice.metadata.name = format!("{service}-{family}-{index}");
    let label = (SERVICE_NAME_LABEL.to_owned(), service.to_owned());
    slice.metadata.labels = BTreeMap::from([label]);
    if random.chance(15) {
        let weight = (WEIGHT_ANNOTATION.to_owned(), "0".to_owned());
        slice.metadata.annotations = BTreeMap::from([weight]);
    }
    for _ in 0..=random.below(3) {
        let (name, here) = *random.pick(&BACKENDS);
        let ips = cast::ips(name).into_iter().flatten();
        let (ready, terminating) =
            *random.pick(&[(true, false), (true, false), (false, true), (false, false)]);
        slice.endpoints.push(Endpoint {
            addresses: ips.skip(family).take(1).map(|ip| ip.to_string()).collect(),
            conditions: EndpointConditions {
                ready: Some(ready),
                serving: None,
                terminating: Some(terminating),
            },
            node_name: (name != "external")
                .then(|| if here { "node-a" } else { "node-b" }.to_owned()),
            ..Endpoint::default()
        });
    }
    // Not every slice has every port.
    for port in PORTS {
        for protocol in PROTOCOLS {
            if random.chance(85) {
                slice.ports.push(EndpointPort {
                    name: format!("{port}-{protocol}").to_lowercase(),
                    protocol,
                    port: Some(cast::PORT),
                });
            }
        }
    }
    slice
}

/// A random call: three in four at a frontend.
pub(super) fn call(random: &mut Random, view: &NodeView) -> anyhow::Result<Call> {
    let (client, device) = *random.pick(&CLIENTS);
    let frontends: Vec<FrontendAddr> = view.desired().frontends().map(|(addr, _)| addr).collect();
    let target = if !frontends.is_empty() && random.chance(75) {
        *random.pick(&frontends)
    } else {
        elsewhere(random, view, device)?
    };
    let ips = cast::ips(client).with_context(|| format!("nobody is called {client}"))?;
    let own = ips[usize::from(target.ip.is_ipv6())];
    // The kernel takes a VIP for the source of a process that calls it.
    let from_vip = device.is_none() && view.desired().is_vip(target.ip);
    Ok(Call {
        client,
        packet: Packet {
            source: if from_vip { target.ip } else { own },
            device,
            target,
        },
    })
}

/// What is no frontend, or nearly one: other ports of VIPs, addresses that nobody has,
/// and others to whom node-a is on the way.
fn elsewhere(
    random: &mut Random,
    view: &NodeView,
    device: Option<&str>,
) -> anyhow::Result<FrontendAddr> {
    let family = random.below(2);
    let protocol = *random.pick(&PROTOCOLS);
    let vips: Vec<IpAddr> = view.desired().vips().collect();
    let member = |name| {
        let ips = cast::ips(name).with_context(|| format!("nobody is called {name}"))?;
        anyhow::Ok(ips[family])
    };
    let (ip, port) = match random.below(5) {
        0 if !vips.is_empty() => (*random.pick(&vips), cast::KUBELET),
        1 if !vips.is_empty() => (*random.pick(&vips), *random.pick(&PORTS)),
        2 => (UNALLOCATED[family].parse()?, *random.pick(&PORTS)),
        3 if device != Some("uplink") => {
            let (name, _) = *random.pick(&BACKENDS);
            (member(name)?, cast::PORT)
        }
        _ => (member(cast::NODE)?, cast::KUBELET),
    };
    Ok(FrontendAddr::new(ip, port, protocol))
}
