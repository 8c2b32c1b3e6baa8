//! Random facts, and the model that is told of them. Few addresses and names, so that they
//! collide often.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::{Family, Protocol};
use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::cluster::{ClusterState, Event};
use ferrule_model::desired::{Desired, Scope};
use ferrule_model::host_ports::{HostPort, PodPorts};
use ferrule_model::kube::{
    AddressType, Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, Kind,
    LoadBalancerIngress, LoadBalancerStatus, Object, ObjectKey, ObjectMeta, SERVICE_NAME_LABEL,
    Service, ServicePort, ServiceSpec, ServiceStatus, ServiceType,
};
use ferrule_model::names::{Attachment, ContainerId, IfName, ObjectName};
use ferrule_model::network::NodeFacts;
use ferrule_model::time::Timestamp;
use proptest::prelude::*;

/// Few addresses and names, so that they collide often.
pub(super) fn vip() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "10.96.0.1",
        "10.96.0.2",
        "fd00::1",
        "fd00::2",
        "nonsense",
    ])
    .prop_map(str::to_owned)
}

pub(super) fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp])
}

pub(super) fn service_port() -> impl Strategy<Value = ServicePort> {
    (
        0..2_u8,
        protocol(),
        prop::sample::select(vec![0_u16, 53, 80]),
        prop::sample::select(vec![0_u16, 30_053, 30_080, 30_999]),
    )
        .prop_map(|(name, protocol, port, node_port)| ServicePort {
            name: format!("p{name}"),
            protocol,
            port,
            node_port,
        })
}

pub(super) fn service() -> impl Strategy<Value = Event> {
    (
        0..4_u8,
        prop::option::of(0..3_u8),
        prop::collection::vec(vip(), 0..3),
        prop::collection::vec(service_port(), 0..3),
        outward(),
    )
        .prop_map(|(name, age, cluster_ips, ports, outward)| {
            let (external_ips, ingress, ranges, policies, affinity) = outward;
            let policy = |local: bool| if local { "Local" } else { "" }.to_owned();
            Event::Applied(Box::new(Object::Service(Service {
                metadata: ObjectMeta {
                    name: format!("s{name}"),
                    creation_timestamp: age.and_then(|age| {
                        Timestamp::parse(&format!("2026-01-0{}T00:00:00Z", age + 1))
                    }),
                    ..ObjectMeta::default()
                },
                spec: ServiceSpec {
                    cluster_ips,
                    ports,
                    service_type: ServiceType::LoadBalancer,
                    external_ips,
                    load_balancer_source_ranges: ranges,
                    internal_traffic_policy: policy(policies.0),
                    external_traffic_policy: policy(policies.1),
                    session_affinity: if affinity { "ClientIP" } else { "" }.to_owned(),
                    health_check_node_port: 30_999,
                    ..ServiceSpec::default()
                },
                status: ServiceStatus {
                    load_balancer: LoadBalancerStatus { ingress },
                },
            })))
        })
}

/// External IPs, load-balancer VIPs, who may call these, both policies, affinity.
type Outward = (
    Vec<String>,
    Vec<LoadBalancerIngress>,
    Vec<String>,
    (bool, bool),
    bool,
);

/// Out of the same few addresses as the cluster addresses.
pub(super) fn outward() -> impl Strategy<Value = Outward> {
    let ingress = (vip(), any::<bool>()).prop_map(|(ip, proxy)| LoadBalancerIngress {
        ip,
        ip_mode: if proxy { "Proxy" } else { "" }.to_owned(),
    });
    let range = prop::sample::select(vec![
        "192.0.2.0/24",
        "192.0.2.1/32",
        "10.0.0.0/8",
        "::/0",
        "2001:db8::/32",
        "nonsense",
    ]);
    (
        prop::collection::vec(vip(), 0..2),
        prop::collection::vec(ingress, 0..2),
        prop::collection::vec(range.prop_map(str::to_owned), 0..3),
        any::<(bool, bool)>(),
        any::<bool>(),
    )
}

pub(super) fn endpoint() -> impl Strategy<Value = Endpoint> {
    (
        0..4_u8,
        any::<bool>(),
        prop::option::of(any::<bool>()),
        any::<bool>(),
        prop::option::of(prop::sample::select(vec!["n0", "n1"])),
    )
        .prop_map(|(host, v6, ready, terminating, hint)| Endpoint {
            hints: EndpointHints {
                for_nodes: hint.into_iter().map(str::to_owned).collect(),
                for_zones: Vec::new(),
            },
            addresses: vec![if v6 {
                format!("fd00:1::{host}")
            } else {
                format!("10.1.0.{host}")
            }],
            conditions: EndpointConditions {
                ready,
                serving: None,
                terminating: Some(terminating),
            },
            node_name: Some(format!("n{}", host % 2)),
            ..Endpoint::default()
        })
}

pub(super) fn slice() -> impl Strategy<Value = Event> {
    (
        0..5_u8,
        0..4_u8,
        any::<bool>(),
        prop::collection::vec(endpoint(), 0..4),
        protocol(),
    )
        .prop_map(|(name, service, v6, endpoints, protocol)| {
            let ports = (0..2).map(|port| EndpointPort {
                name: format!("p{port}"),
                protocol,
                port: Some(8000 + port),
            });
            Event::Applied(Box::new(Object::EndpointSlice(EndpointSlice {
                metadata: ObjectMeta {
                    name: format!("e{name}"),
                    labels: BTreeMap::from([(
                        SERVICE_NAME_LABEL.to_owned(),
                        format!("s{service}"),
                    )]),
                    ..ObjectMeta::default()
                },
                address_type: if v6 {
                    AddressType::IPv6
                } else {
                    AddressType::IPv4
                },
                endpoints,
                ports: ports.collect(),
            })))
        })
}

pub(super) fn deletion() -> impl Strategy<Value = Event> {
    (any::<bool>(), 0..5_u8).prop_map(|(service, name)| {
        let (kind, name) = if service {
            (Kind::Service, format!("s{name}"))
        } else {
            (Kind::EndpointSlice, format!("e{name}"))
        };
        Event::Deleted(ObjectKey {
            kind,
            name: ObjectName::new("default", name),
        })
    })
}

/// Host ports of few pods, at ports that Services have too; two pods may have
/// the same, which the agent would refuse.
pub(super) fn pod_ports() -> impl Strategy<Value = Told> {
    let host_ip = prop::sample::select(vec!["", "0.0.0.0", "::", "192.0.2.1", "2001:db8::1"]);
    let port = (
        host_ip,
        protocol(),
        prop::sample::select(vec![80_u16, 30_053, 30_080]),
    )
        .prop_map(|(host_ip, protocol, host_port)| HostPort {
            host_ip: host_ip.parse().ok(),
            host_port,
            container_port: 8080,
            protocol,
        });
    let ports = prop::option::of(prop::collection::vec(port, 0..3));
    (0..3_u8, ports).prop_map(|(pod, ports)| {
        let attachment = Attachment {
            container_id: ContainerId::try_from(format!("c{pod}")).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let ports = ports.map(|ports| PodPorts {
            pod: ObjectName::new("default", format!("p{pod}")),
            addresses: vec![
                format!("10.1.0.{pod}").parse().unwrap(),
                format!("fd00:1::{pod}").parse().unwrap(),
            ],
            ports,
        });
        Told::HostPorts(attachment, ports)
    })
}

/// What the model is told.
#[derive(Clone, Debug)]
pub(super) enum Told {
    Event(Event),
    HostPorts(Attachment, Option<PodPorts>),
}

pub(super) fn events() -> impl Strategy<Value = Vec<Told>> {
    prop::collection::vec(
        prop_oneof![
            3 => service().prop_map(Told::Event),
            4 => slice().prop_map(Told::Event),
            1 => deletion().prop_map(Told::Event),
            1 => pod_ports(),
        ],
        0..40,
    )
}

/// The model as the agent drives it.
pub(super) struct World {
    pub(super) cluster: ClusterState,
    pub(super) desired: Desired,
}

/// Addresses of the node; one of them is also asked for as a VIP.
pub(super) fn facts() -> impl Strategy<Value = NodeFacts> {
    let own = prop::sample::subsequence(
        vec!["192.0.2.1", "192.0.2.2", "2001:db8::1", "fd00::2"],
        0..5,
    );
    (own, any::<bool>(), vip_binding()).prop_map(|(own, pods, vip_binding)| {
        let own: BTreeSet<IpAddr> = own.into_iter().map(|ip| ip.parse().unwrap()).collect();
        NodeFacts {
            node_ports: own
                .iter()
                .copied()
                .filter(|ip| ip.is_ipv4() || own.len() > 2)
                .collect(),
            sources: own.iter().rev().map(|ip| (Family::of(*ip), *ip)).collect(),
            vip_binding,
            own,
            pods: pods
                .then(|| "10.1.0.0/30".parse().unwrap())
                .into_iter()
                .collect(),
            ..NodeFacts::default()
        }
    })
}

pub(super) fn vip_binding() -> impl Strategy<Value = VipBinding> {
    prop::sample::select(vec![
        VipBinding::Address,
        VipBinding::Route,
        VipBinding::Device(device("eth0")),
    ])
}

pub(super) fn device(name: &str) -> IfName {
    IfName::try_from(name.to_owned()).unwrap()
}

/// What the operator's former decisions, and deaths of the agent, may have left.
pub(super) fn binding() -> impl Strategy<Value = Binding> {
    let source = |text: &str| Binding::Route {
        source: text.parse().ok(),
    };
    prop::sample::select(vec![
        Binding::Address,
        source(""),
        source("192.0.2.9"),
        source("2001:db8::1"),
        Binding::Alias {
            device: device("eth0"),
        },
        Binding::Alias {
            device: device("eth1"),
        },
    ])
}

impl World {
    pub(super) fn new() -> Self {
        let mut world = Self {
            cluster: ClusterState::default(),
            desired: Desired::new("n0"),
        };
        let own: BTreeSet<IpAddr> = [[192, 0, 2, 1].into()].into();
        let facts = NodeFacts {
            node_ports: own.clone(),
            own,
            ..NodeFacts::default()
        };
        world.desired.set_facts(&world.cluster, facts);
        world
    }

    pub(super) fn take(&mut self, told: Told) -> Scope {
        let mut scope = Scope::default();
        let event = match told {
            Told::Event(event) => event,
            Told::HostPorts(attachment, ports) => {
                return self.desired.set_host_ports(&attachment, ports);
            }
        };
        for service in self.cluster.apply(event).services {
            scope.merge(self.desired.update(&self.cluster, &service));
        }
        scope
    }
}

/// What a sequence of events leaves, last state of each object and pod.
pub(super) fn remaining(events: &[Told]) -> Vec<Told> {
    let mut objects = BTreeMap::new();
    let mut pods = BTreeMap::new();
    for told in events {
        match told {
            Told::Event(Event::Applied(object)) => objects.insert(object.key(), told.clone()),
            Told::Event(Event::Deleted(key)) => objects.remove(key),
            Told::HostPorts(attachment, Some(_)) => pods.insert(attachment, told.clone()),
            Told::HostPorts(attachment, None) => pods.remove(attachment),
        };
    }
    objects.into_values().chain(pods.into_values()).collect()
}
