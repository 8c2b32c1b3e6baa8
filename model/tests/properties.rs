//! What must hold for any facts in any order.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};
use ferrule_model::change::Change;
use ferrule_model::cluster::{ClusterState, Event};
use ferrule_model::desired::{Desired, Frontend, FrontendKind, Scope};
use ferrule_model::diff::{diff, diff_all};
use ferrule_model::host_ports::{HostPort, PodPorts};
use ferrule_model::kube::{
    AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, Kind, Object,
    ObjectKey, ObjectMeta, SERVICE_NAME_LABEL, Service, ServicePort, ServiceSpec,
};
use ferrule_model::names::{Attachment, ContainerId, IfName, ObjectName};
use ferrule_model::network::NodeFacts;
use ferrule_model::observed::Observed;
use ferrule_model::service::{Scheduler, Scheduling, VirtualService};
use ferrule_model::time::Timestamp;
use proptest::prelude::*;

/// Few addresses and names, so that they collide often.
fn vip() -> impl Strategy<Value = String> {
    prop::sample::select(vec![
        "10.96.0.1",
        "10.96.0.2",
        "fd00::1",
        "fd00::2",
        "nonsense",
    ])
    .prop_map(str::to_owned)
}

fn protocol() -> impl Strategy<Value = Protocol> {
    prop::sample::select(vec![Protocol::Tcp, Protocol::Udp])
}

fn service_port() -> impl Strategy<Value = ServicePort> {
    (
        0..2_u8,
        protocol(),
        prop::sample::select(vec![0_u16, 53, 80]),
        prop::sample::select(vec![0_u16, 30_053, 30_080]),
    )
        .prop_map(|(name, protocol, port, node_port)| ServicePort {
            name: format!("p{name}"),
            protocol,
            port,
            node_port,
        })
}

fn service() -> impl Strategy<Value = Event> {
    (
        0..4_u8,
        prop::option::of(0..3_u8),
        prop::collection::vec(vip(), 0..3),
        prop::collection::vec(service_port(), 0..3),
    )
        .prop_map(|(name, age, cluster_ips, ports)| {
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
                    ..ServiceSpec::default()
                },
                ..Service::default()
            })))
        })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    (
        0..4_u8,
        any::<bool>(),
        prop::option::of(any::<bool>()),
        any::<bool>(),
    )
        .prop_map(|(host, v6, ready, terminating)| Endpoint {
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

fn slice() -> impl Strategy<Value = Event> {
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

fn deletion() -> impl Strategy<Value = Event> {
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
fn pod_ports() -> impl Strategy<Value = Told> {
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
enum Told {
    Event(Event),
    HostPorts(Attachment, Option<PodPorts>),
}

fn events() -> impl Strategy<Value = Vec<Told>> {
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
struct World {
    cluster: ClusterState,
    desired: Desired,
}

/// Addresses of the node; one of them is also asked for as a VIP.
fn facts() -> impl Strategy<Value = NodeFacts> {
    let own = prop::sample::subsequence(
        vec!["192.0.2.1", "192.0.2.2", "2001:db8::1", "fd00::2"],
        0..5,
    );
    (own, any::<bool>()).prop_map(|(own, pods)| {
        let own: BTreeSet<IpAddr> = own.into_iter().map(|ip| ip.parse().unwrap()).collect();
        NodeFacts {
            node_ports: own
                .iter()
                .copied()
                .filter(|ip| ip.is_ipv4() || own.len() > 2)
                .collect(),
            own,
            pods: pods
                .then(|| "10.1.0.0/30".parse().unwrap())
                .into_iter()
                .collect(),
            ..NodeFacts::default()
        }
    })
}

impl World {
    fn new() -> Self {
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

    fn take(&mut self, told: Told) -> Scope {
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
fn remaining(events: &[Told]) -> Vec<Told> {
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

fn observed() -> impl Strategy<Value = Observed> {
    let ip = prop::sample::select(vec!["10.96.0.1", "10.96.0.2", "10.96.0.9", "fd00::1"])
        .prop_map(|ip| ip.parse::<IpAddr>().unwrap());
    let addr = (
        ip.clone(),
        protocol(),
        prop::sample::select(vec![53_u16, 80, 99]),
    )
        .prop_map(|(ip, protocol, port)| FrontendAddr::new(ip, port, protocol));
    let backend = (0..4_u8, 8000..8002_u16)
        .prop_map(|(host, port)| BackendAddr::new(IpAddr::from([10, 1, 0, host]), port));
    let addr = addr.boxed();
    let service = (
        any::<bool>(),
        prop::collection::btree_map(backend, 0..3_u32, 0..4),
    )
        .prop_map(|(rr, servers)| VirtualService {
            scheduling: Scheduling {
                scheduler: Scheduler::from_name(if rr { "rr" } else { "lblc" }),
                ..Scheduling::default()
            },
            servers,
        });
    (
        prop::collection::btree_set(ip.clone(), 0..4),
        prop::collection::btree_set(ip, 0..4),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_map(addr, service, 0..4),
        prop::collection::btree_set((0..4_u8).prop_map(|n| IpAddr::from([10, 1, 0, n])), 0..3),
    )
        .prop_map(
            |(guarded, bound, allowed, external, preserved, services, hairpins)| Observed {
                guarded,
                bound,
                allowed,
                external,
                preserved,
                hairpins,
                services,
            },
        )
}

/// What the kernel should look like, straight from the definition.
fn wanted(desired: &Desired) -> Observed {
    let services: BTreeMap<FrontendAddr, VirtualService> = desired
        .frontends()
        .filter_map(|(addr, frontend)| Some((addr, frontend.virtual_service()?)))
        .collect();
    Observed {
        guarded: desired.vips().collect(),
        bound: desired.vips().collect(),
        allowed: services
            .keys()
            .copied()
            .filter(|addr| desired.is_vip(addr.ip))
            .collect(),
        external: desired
            .frontends()
            .filter(|(addr, _)| !desired.is_vip(addr.ip))
            .map(|(addr, _)| addr)
            .collect(),
        preserved: desired.host_ports().map(|(addr, _)| addr).collect(),
        hairpins: desired.hairpins().collect(),
        services,
    }
}

/// Carries changes out on a kernel that refuses what a real one would refuse,
/// and what would open the node.
fn carry_out(observed: &mut Observed, changes: &[Change]) -> Result<(), TestCaseError> {
    for change in changes {
        match change {
            Change::BindVip(ip) => {
                prop_assert!(observed.guarded.contains(ip), "{change} without a guard");
            }
            Change::UnguardVip(ip) => {
                prop_assert!(!observed.bound.contains(ip), "{change} while it is bound");
            }
            Change::UnbindVip(ip) => {
                prop_assert!(
                    !observed.services.keys().any(|addr| addr.ip == *ip),
                    "{change} while it has services"
                );
            }
            Change::AddService(addr, _) => {
                prop_assert!(
                    observed.bound.contains(&addr.ip) || observed.external.contains(addr),
                    "{change} on an unbound VIP and without a proof"
                );
                prop_assert!(!observed.services.contains_key(addr), "{change} twice");
            }
            Change::AddServer(addr, ..) | Change::UpdateServer(addr, ..) => {
                prop_assert!(
                    observed.services.contains_key(addr),
                    "{change} without a service"
                );
            }
            Change::RemoveServer(addr, _) => {
                observed.record(change);
                let left = observed.services.get(addr).map_or(0, |s| s.servers.len());
                prop_assert!(left > 0, "{change} left the service empty");
            }
            Change::RemoveExternal(addr) => {
                prop_assert!(
                    !observed.services.contains_key(addr) || observed.bound.contains(&addr.ip),
                    "{change} leaves a service without a proof"
                );
            }
            Change::RemoveService(_)
            | Change::DisallowFrontend(_)
            | Change::AddExternal(_)
            | Change::AddPreserved(_)
            | Change::RemovePreserved(_)
            | Change::AddHairpin(_)
            | Change::RemoveHairpin(_)
            | Change::GuardVip(_)
            | Change::AllowFrontend(_)
            | Change::UpdateService(..) => {}
        }
        observed.record(change);
    }
    Ok(())
}

proptest! {
    #[test]
    fn facts_in_any_order_give_the_same_state(
        events in events(),
        order in any::<prop::sample::Index>(),
    ) {
        let mut told = World::new();
        for event in &events {
            told.take(event.clone());
        }
        let mut objects = remaining(&events);
        let middle = order.index(objects.len() + 1);
        objects.rotate_left(middle);
        objects.reverse();
        let mut listed = World::new();
        for event in objects {
            listed.take(event);
        }
        prop_assert_eq!(told.desired, listed.desired);
    }

    #[test]
    fn the_diff_applied_to_what_is_observed_gives_what_is_desired(
        events in events(),
        observed in observed(),
    ) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        let mut kernel = observed;
        let changes = diff_all(&world.desired, &kernel);
        carry_out(&mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&world.desired));
        prop_assert_eq!(diff_all(&world.desired, &kernel), vec![]);
    }

    #[test]
    fn addresses_that_come_and_go_leave_no_trace(
        before in events(),
        facts in facts(),
        after in events(),
        observed in observed(),
    ) {
        let mut moved = World::new();
        let mut scope = Scope::default();
        let mut kernel = wanted(&moved.desired);
        for event in &before {
            scope.merge(moved.take(event.clone()));
        }
        scope.merge(moved.desired.set_facts(&moved.cluster, facts.clone()));
        for event in &after {
            scope.merge(moved.take(event.clone()));
        }
        let changes = diff(&moved.desired, &kernel, &scope);
        carry_out(&mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&moved.desired));

        let mut fresh = World::new();
        fresh.desired.set_facts(&fresh.cluster, facts);
        for event in before.into_iter().chain(after) {
            fresh.take(event);
        }
        prop_assert_eq!(&fresh.desired, &moved.desired);
        let mut kernel = observed;
        let changes = diff_all(&fresh.desired, &kernel);
        for change in &changes {
            kernel.record(change);
        }
        prop_assert_eq!(kernel, wanted(&fresh.desired));
    }

    #[test]
    fn a_change_at_a_time_ends_where_a_full_comparison_ends(events in events()) {
        let mut world = World::new();
        let mut kernel = Observed::default();
        for event in events {
            let scope = world.take(event);
            let changes = diff(&world.desired, &kernel, &scope);
            carry_out(&mut kernel, &changes)?;
            prop_assert_eq!(&kernel, &wanted(&world.desired));
        }
    }

    #[test]
    fn an_address_has_one_holder_and_each_loser_is_told(events in events()) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        let mut holders: BTreeSet<FrontendAddr> = BTreeSet::new();
        for (addr, frontend) in world.desired.frontends() {
            let Frontend { holder, kind, .. } = frontend;
            prop_assert!(holders.insert(addr));
            if *kind == FrontendKind::HostPort {
                // Any Service that asks for it is told that it has lost.
                let words = format!(": {addr} is held by a host port of {}", frontend.object());
                let services = world.cluster.services().map(|(name, _)| name);
                let mut alone = World::new();
                for service in services {
                    let object = world.cluster.service(service).unwrap().clone();
                    alone.take(Told::Event(Event::Applied(Box::new(Object::Service(object)))));
                    if alone.desired.frontend(&addr).is_none() {
                        continue;
                    }
                    alone.take(Told::Event(Event::Deleted(ObjectKey {
                        kind: Kind::Service,
                        name: service.clone(),
                    })));
                    let said = world.desired.conditions_of(service);
                    prop_assert!(said.iter().any(|c| c.message.contains(&words)), "{:?}", said);
                }
                continue;
            }
            let said = world.desired.conditions_of(holder);
            let words = format!(": {addr} is held by");
            prop_assert!(!said.iter().any(|c| c.message.contains(&words)), "{:?}", said);
        }
    }
}
