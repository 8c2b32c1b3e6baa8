//! What must hold for the semantics of Services, whatever the facts: families,
//! policies, hints, weights, and who holds an address.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::{BTreeMap, BTreeSet};

use ferrule_model::address::{BackendAddr, Family};
use ferrule_model::cluster::Event;
use ferrule_model::desired::{Action, FrontendKind};
use ferrule_model::endpoints::{Backend, BackendState, Backends, Choice, Place, choose};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointConditions, EndpointHints, EndpointPort,
    EndpointSlice, Kind, LoadBalancerIngress, Node, NodeAddress, Object, ObjectKey,
    SERVICE_NAME_LABEL, Service, ServicePort, ServiceType, TargetRef, WEIGHT_ANNOTATION,
    WEIGHTS_ANNOTATION, ZONE_LABEL,
};
use ferrule_model::names::ObjectName;
use ferrule_model::network::Policy;
use ferrule_model::scheduling::Weights;
use ferrule_model::service::{ServiceKey, Weight};
use ferrule_model::time::Timestamp;
use ferrule_model::view::NodeView;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

/// Few, so that they meet often: as cluster, external and balancer's addresses.
const VIPS: [&str; 5] = ["10.96.0.1", "10.96.0.2", "fd00::1", "fd00::2", "192.0.2.1"];

fn vips(max: usize) -> impl Strategy<Value = Vec<String>> {
    let some = subsequence(VIPS.to_vec(), 0..=max);
    some.prop_map(|vips| vips.into_iter().map(str::to_owned).collect())
}

fn annotations() -> impl Strategy<Value = BTreeMap<String, String>> {
    let scheduler = select(vec!["rr", "wlc", "mh", "none"]);
    let scheduler = scheduler.prop_map(|name| ("ferrule.io/scheduler", name));
    let weight = select(vec!["0", "3", "heavy"]).prop_map(|text| (WEIGHT_ANNOTATION, text));
    let weights = select(vec!["10.1.0.1=4", "p2=5,fd00:1::2=6"]);
    let weights = weights.prop_map(|text| (WEIGHTS_ANNOTATION, text));
    let some = prop::collection::vec(prop_oneof![scheduler, weight, weights], 0..3);
    some.prop_map(|pairs| {
        let pairs = pairs.into_iter();
        pairs
            .map(|(key, text)| (key.to_owned(), text.to_owned()))
            .collect()
    })
}

fn service() -> impl Strategy<Value = Service> {
    (
        (0..3_u8, prop::option::of(1..4_u8), annotations()),
        (vips(3), vips(2), vips(2)),
        any::<(bool, bool, bool)>(),
        prop::collection::btree_set((select(vec![80_u16, 81]), 0..2_u16), 1..3),
    )
        .prop_map(|(meta, vips, (internal, external, affinity), ports)| {
            let (name, age, annotations) = meta;
            let policy = |local: bool| if local { "Local" } else { "Cluster" }.to_owned();
            let mut service = Service::default();
            service.metadata.name = format!("s{name}");
            service.metadata.annotations = annotations;
            service.metadata.creation_timestamp =
                age.and_then(|day| Timestamp::parse(&format!("2026-01-0{day}T00:00:00Z")));
            let spec = &mut service.spec;
            spec.service_type = ServiceType::LoadBalancer;
            (spec.cluster_ips, spec.external_ips) = (vips.0, vips.1);
            spec.internal_traffic_policy = policy(internal);
            spec.external_traffic_policy = policy(external);
            let affinity = if affinity { "ClientIP" } else { "None" };
            affinity.clone_into(&mut spec.session_affinity);
            let ports = ports.into_iter();
            spec.ports = ports
                .map(|(port, name)| ServicePort {
                    name: format!("p{name}"),
                    port,
                    node_port: 30_000 + port,
                    ..ServicePort::default()
                })
                .collect();
            let ingress = vips.2.into_iter().map(|ip| LoadBalancerIngress {
                ip,
                ..LoadBalancerIngress::default()
            });
            service.status.load_balancer.ingress = ingress.collect();
            service
        })
}

fn hints() -> impl Strategy<Value = EndpointHints> {
    let names = |names: Vec<&'static str>| {
        let some = subsequence(names, 0..3);
        some.prop_map(|names| names.into_iter().map(str::to_owned).collect())
    };
    (names(vec!["n0", "n1"]), names(vec!["z0", "z1"])).prop_map(|(for_nodes, for_zones)| {
        EndpointHints {
            for_zones,
            for_nodes,
        }
    })
}

fn endpoint(v6: bool) -> impl Strategy<Value = Endpoint> {
    let unknown = || prop::option::of(any::<bool>());
    (
        0..4_u8,
        (unknown(), unknown(), unknown()),
        hints(),
        prop::option::of(0..2_u8),
    )
        .prop_map(move |(host, (ready, serving, terminating), hints, node)| {
            let prefix = if v6 { "fd00:1::" } else { "10.1.0." };
            Endpoint {
                addresses: vec![format!("{prefix}{host}")],
                conditions: EndpointConditions {
                    ready,
                    serving,
                    terminating,
                },
                node_name: node.map(|n| format!("n{n}")),
                hints,
                target_ref: TargetRef {
                    name: format!("p{host}"),
                },
            }
        })
}

fn slice() -> impl Strategy<Value = EndpointSlice> {
    let endpoints = any::<bool>().prop_flat_map(|v6| {
        let endpoints = prop::collection::vec(endpoint(v6), 0..5);
        (Just(v6), endpoints)
    });
    let ports = subsequence(vec![0_u16, 1], 1..3);
    (0..4_u8, 0..3_u8, endpoints, ports, annotations()).prop_map(
        |(name, service, (v6, endpoints), ports, annotations)| {
            let mut slice = EndpointSlice {
                address_type: if v6 {
                    AddressType::IPv6
                } else {
                    AddressType::IPv4
                },
                endpoints,
                ..EndpointSlice::default()
            };
            slice.metadata.name = format!("e{name}");
            let label = (SERVICE_NAME_LABEL.to_owned(), format!("s{service}"));
            slice.metadata.labels = BTreeMap::from([label]);
            slice.metadata.annotations = annotations;
            let ports = ports.into_iter();
            slice.ports = ports
                .map(|name| EndpointPort {
                    name: format!("p{name}"),
                    port: Some(8080 + name),
                    ..EndpointPort::default()
                })
                .collect();
            slice
        },
    )
}

/// This node with another zone each time, and with addresses that come and go.
fn node() -> impl Strategy<Value = Node> {
    let addresses = subsequence(vec!["192.0.2.1", "2001:db8::1"], 0..3);
    (select(vec!["", "z0", "z1"]), addresses).prop_map(|(zone, addresses)| {
        let mut node = Node::default();
        "n0".clone_into(&mut node.metadata.name);
        let label = (ZONE_LABEL.to_owned(), zone.to_owned());
        node.metadata.labels = BTreeMap::from([label]);
        let addresses = addresses.into_iter().map(|address| NodeAddress {
            kind: AddressKind::InternalIP,
            address: address.to_owned(),
        });
        node.status.addresses = addresses.collect();
        node
    })
}

fn deletion() -> impl Strategy<Value = Event> {
    let kind = select(vec![
        (Kind::Service, 's'),
        (Kind::EndpointSlice, 'e'),
        (Kind::EndpointSlice, 'e'),
    ]);
    (kind, 0..4_u8).prop_map(|((kind, letter), n)| {
        Event::Deleted(ObjectKey {
            kind,
            name: ObjectName::new("default", format!("{letter}{n}")),
        })
    })
}

fn applied(object: Object) -> Event {
    Event::Applied(Box::new(object))
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    prop::collection::vec(
        prop_oneof![
            4 => service().prop_map(|s| applied(Object::Service(s))),
            5 => slice().prop_map(|s| applied(Object::EndpointSlice(s))),
            1 => node().prop_map(|n| applied(Object::Node(n))),
            1 => deletion(),
        ],
        0..40,
    )
}

fn view(events: impl IntoIterator<Item = Event>) -> NodeView {
    let mut view = NodeView::new("n0", Policy::default());
    for event in events {
        view.take([event]);
    }
    view
}

/// The last state of each object.
fn remaining(events: &[Event]) -> BTreeMap<ObjectKey, Event> {
    let mut objects = BTreeMap::new();
    for event in events {
        match event {
            Event::Applied(object) => objects.insert(object.key(), event.clone()),
            Event::Deleted(key) => objects.remove(key),
        };
    }
    objects
}

/// The same facts with another policy for clients from outside.
fn with_external_policy(events: &[Event], policy: &str) -> Vec<Event> {
    let changed = events.iter().cloned().map(|mut event| {
        if let Event::Applied(object) = &mut event
            && let Object::Service(service) = object.as_mut()
        {
            policy.clone_into(&mut service.spec.external_traffic_policy);
        }
        event
    });
    changed.collect()
}

fn weights_of(backends: &Backends) -> BTreeMap<BackendAddr, Weight> {
    let backends = backends.iter();
    backends.map(|(addr, how)| (*addr, how.weight)).collect()
}

/// One copy of an endpoint of a port.
type Copy<'a> = (BackendAddr, Backend, &'a EndpointHints);

/// The endpoints of a port, each as often as it stands in slices, as the
/// specification words it.
fn copies<'a>(slices: &'a [EndpointSlice], port: &ServicePort, weights: &Weights) -> Vec<Copy<'a>> {
    let mut copies = Vec::new();
    for slice in slices {
        for endpoint in &slice.endpoints {
            let c = endpoint.conditions;
            let state = match (c.ready, c.serving, c.terminating) {
                (None | Some(true), ..) => BackendState::Ready,
                (Some(false), None | Some(true), Some(true)) => BackendState::Terminating,
                _ => continue,
            };
            let ip = endpoint.addresses[0].parse().unwrap();
            for number in slice.ports.iter().filter(|p| p.name == port.name) {
                let backend = Backend {
                    state,
                    local: endpoint.node_name.as_deref() == Some("n0"),
                    weight: weights.of(slice, endpoint, ip),
                };
                let addr = BackendAddr::new(ip, number.port.unwrap());
                copies.push((addr, backend, &endpoint.hints));
            }
        }
    }
    copies
}

/// What a port uses, as the specification words it: slowly, from the copies that count.
fn expected(copies: &[Copy<'_>], zone: Option<&str>) -> Choice {
    let addrs: BTreeSet<BackendAddr> = copies.iter().map(|(addr, ..)| *addr).collect();
    let of = |addr: BackendAddr| {
        let all = copies.iter().filter(move |copy| copy.0 == addr);
        let ready = all.clone().any(|copy| copy.1.state == BackendState::Ready);
        all.filter(move |copy| !ready || copy.1.state == BackendState::Ready)
    };
    let backend = |addr: BackendAddr| Backend {
        state: of(addr).map(|copy| copy.1.state).min().unwrap(),
        local: of(addr).any(|copy| copy.1.local),
        weight: of(addr).map(|copy| copy.1.weight).max().unwrap(),
    };
    let all: Backends = addrs.iter().map(|addr| (*addr, backend(*addr))).collect();
    let in_state = |set: &Backends, state| -> Backends {
        let chosen = set.iter().filter(|(_, how)| how.state == state);
        chosen.map(|(addr, how)| (*addr, *how)).collect()
    };
    let usable = |set: &Backends| {
        let ready = in_state(set, BackendState::Ready);
        if ready.is_empty() { set.clone() } else { ready }
    };
    let ready = in_state(&all, BackendState::Ready);
    let hinted = |names: fn(&EndpointHints) -> &Vec<String>, here: &str| {
        let said = |addr: &BackendAddr| -> Vec<&String> {
            let hints = of(*addr).map(|copy| copy.2);
            hints.flat_map(names).collect()
        };
        let mut for_us = ready.clone();
        for_us.retain(|addr, _| said(addr).into_iter().any(|name| name == here));
        let all_say = ready.keys().all(|addr| !said(addr).is_empty());
        (all_say && !for_us.is_empty()).then_some(for_us)
    };
    let by_node = hinted(|hints| &hints.for_nodes, "n0");
    let by_zone = zone.and_then(|zone| hinted(|hints| &hints.for_zones, zone));
    let mut here = all.clone();
    here.retain(|_, how| how.local);
    Choice {
        cluster: by_node.or(by_zone).unwrap_or_else(|| usable(&all)),
        local: usable(&here),
    }
}

proptest! {
    #[test]
    fn the_order_of_hints_zones_and_annotations_does_not_matter(
        events in events(),
        seed in any::<prop::sample::Index>(),
    ) {
        let mut listed: Vec<Event> = remaining(&events).into_values().collect();
        let middle = seed.index(listed.len() + 1);
        listed.rotate_left(middle);
        listed.reverse();
        prop_assert_eq!(view(events), view(listed));
    }

    #[test]
    fn a_frontend_never_has_a_backend_of_another_family(events in events()) {
        let view = view(events);
        for (addr, frontend) in view.desired().frontends() {
            let internal = frontend.internal.iter().flat_map(|i| i.backends.keys());
            for backend in frontend.backends.keys().chain(internal) {
                prop_assert_eq!(Family::of(backend.ip), Family::of(addr.ip), "{}", addr);
            }
        }
        for key in view.desired().marked() {
            let service = view.desired().marked_service(&key).unwrap();
            for backend in service.servers.keys() {
                prop_assert_eq!(Family::of(backend.ip), key.family(), "{}", key);
            }
        }
    }

    #[test]
    fn no_service_takes_what_another_holds(
        events in events(),
        newcomer in service(),
        endpoints in slice(),
    ) {
        let mut view = view(events);
        let before = view.desired().clone();
        // The youngest, and the last by name.
        let mut newcomer = newcomer;
        "z".clone_into(&mut newcomer.metadata.name);
        newcomer.metadata.creation_timestamp = None;
        let mut endpoints = endpoints;
        "z".clone_into(&mut endpoints.metadata.name);
        endpoints.metadata.labels = BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), "z".to_owned())]);
        view.take([
            applied(Object::Service(newcomer)),
            applied(Object::EndpointSlice(endpoints)),
        ]);
        for (addr, frontend) in before.frontends() {
            prop_assert_eq!(view.desired().frontend(&addr), Some(frontend), "{}", addr);
            prop_assert_eq!(view.desired().admitted(&addr), before.admitted(&addr));
        }
        for key in before.marked() {
            let service = before.marked_service(&key);
            let holder = |desired: &ferrule_model::desired::Desired| match key {
                ServiceKey::Mark { mark, .. } => desired.mark_holder(mark).cloned(),
                ServiceKey::Address(_) => None,
            };
            prop_assert_eq!(holder(view.desired()), holder(&before));
            prop_assert_eq!(view.desired().marked_service(&key), service);
        }
    }

    #[test]
    fn internal_clients_have_the_backends_of_policy_cluster_and_a_mark_to_them(events in events()) {
        let local = view(with_external_policy(&events, "Local"));
        let cluster = view(with_external_policy(&events, "Cluster"));
        let mut led: BTreeSet<ServiceKey> = BTreeSet::new();
        for (addr, frontend) in local.desired().frontends() {
            let other = cluster.desired().frontend(&addr).unwrap();
            if frontend.kind == FrontendKind::ClusterIP {
                prop_assert_eq!(frontend, other);
                continue;
            }
            let mark = local.desired().mark(&addr);
            let Some(internal) = &frontend.internal else {
                prop_assert_eq!(mark, None);
                prop_assert_eq!(&frontend.backends, &other.backends, "{}", addr);
                prop_assert_ne!(frontend.action(), Action::Drop);
                continue;
            };
            prop_assert!(!internal.backends.is_empty());
            prop_assert_eq!(&internal.backends, &other.backends, "{}", addr);
            prop_assert!(frontend.backends.values().all(|backend| backend.local));
            prop_assert_ne!(frontend.action(), Action::Reject);
            prop_assert_eq!(internal.affinity, frontend.scheduling.persistence);
            let key = ServiceKey::Mark { family: Family::of(addr.ip), mark: mark.unwrap() };
            let service = local.desired().marked_service(&key).unwrap();
            prop_assert_eq!(&service.servers, &weights_of(&internal.backends));
            prop_assert_eq!(service.scheduling.persistence, None);
            let holder = local.desired().mark_holder(mark.unwrap()).unwrap();
            prop_assert_eq!(&holder.service, &frontend.holder);
            prop_assert_eq!(&holder.port, &frontend.port_name);
            led.insert(key);
        }
        prop_assert_eq!(local.desired().marked().collect::<BTreeSet<_>>(), led);
    }

    #[test]
    fn endpoints_are_chosen_as_the_specification_says(
        slices in prop::collection::vec(slice(), 0..4),
        annotations in annotations(),
        zone in prop::option::of(select(vec!["z0", "z1"])),
    ) {
        let port = ServicePort { name: "p1".to_owned(), port: 80, ..ServicePort::default() };
        let mut service = Service::default();
        service.metadata.annotations = annotations;
        let name = ObjectName::new("default", "s");
        let weights = Weights::new(&name, &service, &mut Vec::new());
        let mut said = Vec::new();
        for (family, kind) in [
            (Family::IPv4, AddressType::IPv4),
            (Family::IPv6, AddressType::IPv6),
        ] {
            let place = Place { node: "n0", zone };
            let chosen = choose(slices.iter(), &port, family, place, &weights, &mut said);
            let mut of_family = slices.clone();
            of_family.retain(|slice| slice.address_type == kind);
            let copies = copies(&of_family, &port, &weights);
            prop_assert_eq!(chosen, expected(&copies, zone));
        }
        prop_assert_eq!(said, vec![]);
    }
}
