//! Who holds an address, what that gives and takes, and what of it is news.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ferrule_model::address::{BackendAddr, Family, FrontendAddr, Protocol};
use ferrule_model::cluster::{Event, Listing};
use ferrule_model::condition::Reason;
use ferrule_model::desired::{FrontendKind, HealthCheck, Scope};
use ferrule_model::diff::{diff, diff_all};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, Kind,
    LoadBalancerIngress, Node, NodeAddress, Object, ObjectKey, SERVICE_NAME_LABEL, Service,
    ServicePort, ServiceSpec, ServiceType,
};
use ferrule_model::names::ObjectName;
use ferrule_model::network::Policy;
use ferrule_model::observed::Observed;
use ferrule_model::plan::Plan;
use ferrule_model::service::ServiceKey;
use ferrule_model::source_nat::OwnAddress;
use ferrule_model::time::Timestamp;
use ferrule_model::view::NodeView;

fn service(name: &str, cluster_ips: &[&str], external_ips: &[&str]) -> Service {
    let mut service = Service::default();
    name.clone_into(&mut service.metadata.name);
    let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    service.spec.service_type = ServiceType::LoadBalancer;
    service.spec.cluster_ips = owned(cluster_ips);
    service.spec.external_ips = owned(external_ips);
    "Local".clone_into(&mut service.spec.external_traffic_policy);
    service.spec.ports = vec![ServicePort {
        port: 80,
        ..ServicePort::default()
    }];
    service
}

/// `r` ready, `t` terminating and serving.
fn slice(name: &str, service: &str, endpoints: &[(&str, &str, char)]) -> EndpointSlice {
    let mut slice = EndpointSlice::default();
    name.clone_into(&mut slice.metadata.name);
    let label = (SERVICE_NAME_LABEL.to_owned(), service.to_owned());
    slice.metadata.labels = BTreeMap::from([label]);
    let v6 = endpoints.iter().any(|(address, ..)| address.contains(':'));
    slice.address_type = if v6 {
        AddressType::IPv6
    } else {
        AddressType::IPv4
    };
    slice.ports = vec![EndpointPort {
        port: Some(8080),
        ..EndpointPort::default()
    }];
    let endpoints = endpoints.iter().map(|(address, node, state)| Endpoint {
        addresses: vec![(*address).to_owned()],
        node_name: Some((*node).to_owned()),
        conditions: EndpointConditions {
            ready: Some(*state == 'r'),
            serving: Some(true),
            terminating: Some(*state == 't'),
        },
        ..Endpoint::default()
    });
    slice.endpoints = endpoints.collect();
    slice
}

fn told(object: Object) -> Event {
    Event::Applied(Box::new(object))
}

fn view(events: impl IntoIterator<Item = Event>) -> NodeView {
    let mut view = NodeView::new("n0", Policy::default());
    view.take(events);
    view
}

/// Carries out what a scope is about, and looks that nothing else was left to do.
fn follow(view: &NodeView, kernel: &mut Observed, scope: &Scope) {
    for change in diff(view.desired(), kernel, scope) {
        kernel.record(&change);
    }
    assert_eq!(diff_all(view.desired(), kernel), vec![], "{scope:?}");
}

#[test]
fn a_service_that_is_told_again_is_no_news() {
    let web = service("web", &["10.96.0.1"], &["203.0.113.1"]);
    let mut view = view([told(Object::Service(web.clone()))]);
    let (scope, _) = view.take([told(Object::Service(web))]);
    assert!(scope.is_empty(), "{scope:?}");
}

#[test]
fn one_port_that_is_new_is_the_only_news() {
    let mut web = service("web", &["10.96.0.1"], &[]);
    let mut view = view([told(Object::Service(web.clone()))]);
    web.spec.ports.push(ServicePort {
        name: "more".to_owned(),
        port: 81,
        ..ServicePort::default()
    });
    let (scope, _) = view.take([told(Object::Service(web))]);
    let more = FrontendAddr::new([10, 96, 0, 1].into(), 81, Protocol::Tcp);
    assert_eq!(scope.frontends, [more].into());
    assert!(!scope.is_empty());
}

#[test]
fn a_scope_counts_what_it_names() {
    let mut scope = Scope::default();
    assert!(scope.is_empty());
    let ip = |last| IpAddr::from([10, 96, 0, last]);
    for (last, port) in [(1, 80), (1, 81), (2, 80)] {
        scope.insert(FrontendAddr::new(ip(last), port, Protocol::Tcp));
    }
    scope.hairpins.insert(ip(9));
    let marks = [1, 2, 3, 4].map(|mark| ServiceKey::Mark {
        family: Family::IPv4,
        mark,
    });
    for key in marks {
        scope.insert_service(key);
    }
    // Three frontends, their two addresses, a hairpin and four marks.
    assert_eq!(scope.len(), 10);
    assert!(!scope.is_empty());
}

/// What backends leave is told in bounds: where it is more, none of the older is.
#[test]
fn a_scope_holds_as_much_of_what_was_told_last_as_it_may() {
    let addr = FrontendAddr::new([10, 96, 0, 1].into(), 80, Protocol::Tcp);
    let backend = |n: u32| BackendAddr::new(Ipv4Addr::from_bits(n).into(), 8080);
    let full = |left: u32, ended: u32| {
        let mut scope = Scope::default();
        for n in 0..left {
            let listing = Listing {
                node: None,
                terminating: false,
            };
            scope.left.insert(backend(n), listing);
        }
        scope.ended = (0..ended).map(|n| (addr.into(), backend(n))).collect();
        scope
    };
    for (left, ended, kept) in [(65_536, 0, true), (65_530, 6, true), (65_531, 6, false)] {
        let mut scope = full(left, ended);
        scope.merge(Scope::default());
        assert_eq!(!scope.left.is_empty(), kept, "{left} and {ended}");
        assert_eq!(!scope.is_empty(), kept);
    }
}

/// The same key is a node port first, and an external IP when the node has the
/// address no more: then it is a VIP.
#[test]
fn an_address_that_leaves_the_node_can_be_a_vip() {
    let ip: IpAddr = [192, 0, 2, 1].into();
    let mut web = service("web", &["10.96.0.1"], &["192.0.2.1"]);
    web.spec.ports[0].port = 30_080;
    web.spec.ports[0].node_port = 30_080;
    let mut view = view([told(Object::Service(web))]);
    let key = FrontendAddr::new(ip, 30_080, Protocol::Tcp);
    let own = OwnAddress {
        ip,
        link: "192.0.2.0/24".parse().unwrap(),
        device: "eth0".to_owned(),
    };
    let mut kernel = Observed::default();
    for change in diff_all(view.desired(), &kernel) {
        kernel.record(&change);
    }
    for (own, kind) in [
        (vec![own.clone()], FrontendKind::NodePort),
        (vec![], FrontendKind::ExternalIP),
        (vec![own], FrontendKind::NodePort),
    ] {
        let scope = view.set_own(own);
        let frontend = view.desired().frontend(&key).unwrap();
        assert_eq!(frontend.kind, kind);
        assert_eq!(view.desired().is_vip(ip), kind == FrontendKind::ExternalIP);
        follow(&view, &mut kernel, &scope);
    }
}

/// Who moves addresses among nodes, such as keepalived, brings one to a device of this
/// node, and takes it away: it is served all the time, and bound as long as no device has it.
#[test]
fn an_address_that_comes_to_a_device_is_served_and_no_vip() {
    let ip: IpAddr = [203, 0, 113, 1].into();
    let web = service("web", &["10.96.0.1"], &["203.0.113.1"]);
    let slice = slice("web-4", "web", &[("10.244.1.1", "n0", 'r')]);
    let mut view = view([
        told(Object::Service(web)),
        told(Object::EndpointSlice(slice)),
    ]);
    let own = OwnAddress {
        ip,
        link: "203.0.113.1/32".parse().unwrap(),
        device: "eth0".to_owned(),
    };
    let key = FrontendAddr::new(ip, 80, Protocol::Tcp);
    let mut kernel = Observed::default();
    for change in diff_all(view.desired(), &kernel) {
        kernel.record(&change);
    }
    for (own, bound) in [(vec![], true), (vec![own], false), (vec![], true)] {
        let scope = view.set_own(own);
        follow(&view, &mut kernel, &scope);
        assert_eq!(view.desired().is_vip(ip), bound);
        assert_eq!(kernel.guarded.contains(&ip), bound);
        assert_eq!(kernel.allowed.contains(&key), bound);
        assert!(kernel.services.contains_key(&key.into()));
        assert!(kernel.external.contains(&key));
    }
}

/// Bound here, it would cut this node off the other.
#[test]
fn the_address_of_another_node_is_left_to_it() {
    let ip: IpAddr = [192, 0, 2, 2].into();
    let web = service("web", &["10.96.0.1"], &["192.0.2.2", "203.0.113.1"]);
    let mut view = view([told(Object::Service(web))]);
    let mut kernel = Observed::default();
    for change in diff_all(view.desired(), &kernel) {
        kernel.record(&change);
    }
    let node = |address: &str| {
        let mut node = Node::default();
        node.metadata.name = "n2".to_owned();
        node.status.addresses = vec![NodeAddress {
            kind: AddressKind::InternalIP,
            address: address.to_owned(),
        }];
        Event::Applied(Box::new(Object::Node(node)))
    };
    let gone = Event::Deleted(ObjectKey {
        kind: Kind::Node,
        name: ObjectName::new("", "n2"),
    });
    for (event, served) in [
        (node("192.0.2.2"), false),
        (node("192.0.2.3"), true),
        (node("192.0.2.2"), false),
        (gone, true),
    ] {
        let (scope, _) = view.take([event]);
        follow(&view, &mut kernel, &scope);
        assert_eq!(view.desired().is_vip(ip), served);
        let said = view.desired().conditions().map(|said| said.to_string());
        let theirs = said.filter(|said| said.contains("192.0.2.2 is an address of node n2"));
        assert_eq!(theirs.count(), usize::from(!served));
    }
}

/// The virtual service by mark of the one that loses goes with its last frontend, and
/// comes back with it.
#[test]
fn who_wins_an_address_wins_the_internal_clients_too() {
    let aged = |name: &str, cluster: &str, day: u8| {
        let mut service = service(name, &[cluster], &["203.0.113.1"]);
        service.metadata.creation_timestamp =
            Timestamp::parse(&format!("2026-01-0{day}T00:00:00Z"));
        Object::Service(service)
    };
    let endpoints = |service: &str, address: &str| {
        Object::EndpointSlice(slice(service, service, &[(address, "n1", 'r')]))
    };
    let older = aged("older", "10.96.0.1", 1);
    let events = [
        aged("younger", "10.96.0.2", 2),
        endpoints("younger", "10.1.1.2"),
        endpoints("older", "10.1.1.1"),
        older.clone(),
    ];
    let mut view = NodeView::new("n0", Policy::default());
    let mut kernel = Observed::default();
    let key = FrontendAddr::new([203, 0, 113, 1].into(), 80, Protocol::Tcp);
    let holder = |view: &NodeView| {
        let marked: Vec<_> = view.desired().marked().collect();
        assert_eq!(marked.len(), 1, "{marked:?}");
        let mark = view.desired().mark(&key).unwrap();
        view.desired()
            .mark_holder(mark)
            .unwrap()
            .service
            .name
            .clone()
    };
    for object in events {
        let (scope, _) = view.take([told(object)]);
        follow(&view, &mut kernel, &scope);
    }
    assert_eq!(holder(&view), "older");
    let (scope, _) = view.take([Event::Deleted(older.key())]);
    follow(&view, &mut kernel, &scope);
    assert_eq!(holder(&view), "younger");
}

/// A Service that moves to an address which another one holds: nothing leads to its virtual
/// service by mark any more.
#[test]
fn the_last_address_that_is_held_takes_the_internal_clients_with_it() {
    let mut younger = service("younger", &["10.96.0.2"], &["203.0.113.2"]);
    younger.metadata.creation_timestamp = Timestamp::parse("2026-01-02T00:00:00Z");
    let mut older = service("older", &["10.96.0.1"], &["203.0.113.1"]);
    older.metadata.creation_timestamp = Timestamp::parse("2026-01-01T00:00:00Z");
    let endpoint = |service: &str, address: &str| {
        Object::EndpointSlice(slice(service, service, &[(address, "n1", 'r')]))
    };
    let mut view = NodeView::new("n0", Policy::default());
    let mut kernel = Observed::default();
    let moved = Service {
        spec: ServiceSpec {
            external_ips: vec!["203.0.113.1".to_owned()],
            ..younger.spec.clone()
        },
        ..younger.clone()
    };
    for (object, marked) in [
        (Object::Service(older), 0),
        (endpoint("older", "10.1.1.1"), 1),
        (Object::Service(younger), 1),
        (endpoint("younger", "10.1.1.2"), 2),
        (Object::Service(moved), 1),
    ] {
        let (scope, _) = view.take([told(object)]);
        follow(&view, &mut kernel, &scope);
        assert_eq!(view.desired().marked().count(), marked);
    }
}

/// A pod with an address of each family is one endpoint, and one that terminates none.
#[test]
fn a_health_check_counts_ready_endpoints_of_this_node() {
    let checked = |kind, policy: &str, port| {
        let mut web = service("web", &["10.96.0.1", "fd00::1"], &["203.0.113.1"]);
        web.spec.service_type = kind;
        policy.clone_into(&mut web.spec.external_traffic_policy);
        web.spec.health_check_node_port = port;
        web.status.load_balancer.ingress = vec![LoadBalancerIngress {
            ip: "198.51.100.1".to_owned(),
            ..LoadBalancerIngress::default()
        }];
        let v4 = [
            ("10.1.0.1", "n0", 'r'),
            ("10.1.0.2", "n0", 'r'),
            ("10.1.0.3", "n0", 't'),
            ("10.1.1.1", "n1", 'r'),
        ];
        let view = view([
            told(Object::Service(web)),
            told(Object::EndpointSlice(slice("v4", "web", &v4))),
            told(Object::EndpointSlice(slice(
                "v6",
                "web",
                &[("fd00:1::1", "n0", 'r')],
            ))),
        ]);
        let name = ObjectName::new("default", "web");
        let served: Vec<String> = view.desired().served().map(|at| at.to_string()).collect();
        let check = view.desired().health_checks().get(&name).copied().cloned();
        (check, served)
    };
    let expected = HealthCheck {
        port: 32_000,
        ready: BTreeMap::from([(Family::IPv4, 2), (Family::IPv6, 1)]),
    };
    assert_eq!(expected.local_endpoints(), 2);
    let of = |check: &HealthCheck| Family::ALL.map(|family| check.local_endpoints_of(family));
    assert_eq!(of(&expected), [2, 1]);
    let of_one_family = HealthCheck {
        port: 32_000,
        ready: BTreeMap::from([(Family::IPv6, 3)]),
    };
    assert_eq!(of(&of_one_family), [3, 3]);
    assert_eq!(
        checked(ServiceType::LoadBalancer, "Local", 32_000),
        (Some(expected), vec!["198.51.100.1:32000/TCP".to_owned()])
    );
    let none = (None, vec![]);
    assert_eq!(checked(ServiceType::LoadBalancer, "Cluster", 32_000), none);
    assert_eq!(checked(ServiceType::LoadBalancer, "Local", 0), none);
    assert_eq!(checked(ServiceType::NodePort, "Local", 32_000), none);
}

/// One program answers at a port, so it is one Service's; and where a node port is another's,
/// the older of the two has the node's addresses.
#[test]
fn the_older_service_has_the_port_of_a_health_check() {
    let aged = |name: &str, number: u8, day: u8| {
        let mut service = service(name, &[&format!("10.96.0.{number}")], &[]);
        service.metadata.creation_timestamp =
            Timestamp::parse(&format!("2026-01-0{day}T00:00:00Z"));
        service.spec.health_check_node_port = 32_000;
        service.status.load_balancer.ingress = vec![LoadBalancerIngress {
            ip: format!("198.51.100.{number}"),
            ..LoadBalancerIngress::default()
        }];
        service
    };
    let node_port = |day: u8| {
        let mut service = aged("port", 3, day);
        service.spec.health_check_node_port = 0;
        service.spec.ports[0].node_port = 32_000;
        service
    };
    let mut node = Node::default();
    "n0".clone_into(&mut node.metadata.name);
    node.status.addresses = vec![NodeAddress {
        kind: AddressKind::InternalIP,
        address: "192.0.2.1".to_owned(),
    }];
    let mut view = view([told(Object::Node(node))]);
    let mut kernel = Observed::default();
    let mut tell = |event| {
        let (scope, _) = view.take([event]);
        follow(&view, &mut kernel, &scope);
        let desired = view.desired();
        let holders = desired.health_checks().into_keys();
        let served = desired.served().map(|addr| addr.ip.to_string());
        let at_node = FrontendAddr::new([192, 0, 2, 1].into(), 32_000, Protocol::Tcp);
        let conflicts = desired.conditions();
        let conflicts = conflicts.filter(|said| said.reason == Reason::AddressConflict);
        let conflicts: Vec<String> = conflicts.map(|said| said.to_string()).collect();
        let words = conflicts.iter().map(|said| {
            let (said, _) = said.split_once(", which").unwrap();
            said.to_owned()
        });
        (
            holders.map(|name| name.name.clone()).collect::<Vec<_>>(),
            served.collect::<Vec<_>>(),
            desired.frontend(&at_node).is_some(),
            words.collect::<Vec<_>>(),
        )
    };
    let only = |holder: &str, served: &str, frontend, said: &[&str]| {
        let said: Vec<String> = said.iter().map(ToString::to_string).collect();
        (
            vec![holder.to_owned()],
            vec![served.to_owned()],
            frontend,
            said,
        )
    };
    let conflict = |loser: &str, field: &str, what: &str, holder: &str| {
        format!(
            "Service default/{loser}: AddressConflict: spec.{field}: {what} is held by Service default/{holder}"
        )
    };
    let younger = told(Object::Service(aged("a-younger", 1, 3)));
    let older = Object::Service(aged("older", 2, 2));
    assert_eq!(tell(younger), only("a-younger", "198.51.100.1", false, &[]));
    let lost = conflict("a-younger", "healthCheckNodePort", "port 32000", "older");
    let with_older = only("older", "198.51.100.2", false, &[&lost]);
    assert_eq!(tell(told(older.clone())), with_older);
    let at = "192.0.2.1:32000/TCP";
    let port = conflict("port", "ports[].nodePort", at, "older");
    let youngest = tell(told(Object::Service(node_port(4))));
    assert_eq!(
        youngest,
        only("older", "198.51.100.2", false, &[&lost, &port])
    );
    let check = conflict("older", "healthCheckNodePort", at, "port");
    let oldest = tell(told(Object::Service(node_port(1))));
    assert_eq!(
        oldest,
        only("older", "198.51.100.2", true, &[&lost, &check])
    );
    let check = conflict("a-younger", "healthCheckNodePort", at, "port");
    let left = tell(Event::Deleted(older.key()));
    assert_eq!(left, only("a-younger", "198.51.100.1", true, &[&check]));
}

/// The endpoints are the same, and what their clients are seen as is not.
#[test]
fn clients_that_fare_otherwise_have_rows_of_their_own() {
    let rows = |endpoints: &[(&str, &str, char)], affinity: &str| {
        let mut web = service("web", &["10.96.0.1"], &["203.0.113.1"]);
        affinity.clone_into(&mut web.spec.session_affinity);
        let mut node = Node::default();
        "n0".clone_into(&mut node.metadata.name);
        node.spec.pod_cidrs = vec!["10.1.0.0/24".to_owned()];
        let view = view([
            told(Object::Node(node)),
            told(Object::Service(web)),
            told(Object::EndpointSlice(slice("e", "web", endpoints))),
        ]);
        let plan = Plan::new(&view, []);
        let external = plan.frontends.into_iter();
        let external = external.filter(|row| row.kind == "ExternalIP");
        let words = external.map(|row| {
            let (why, scheduler) = (row.masquerade.join(","), row.scheduler);
            format!("{} {scheduler} {why}", row.clients)
        });
        words.collect::<Vec<_>>()
    };
    let here = ("10.1.0.1", "n0", 'r');
    let beyond = ("203.0.113.50", "n0", 'r');
    assert_eq!(rows(&[here], "None"), ["any rr hairpin"]);
    let two = ["internal rr hairpin,podEgress", "external rr hairpin"];
    assert_eq!(rows(&[here, beyond], "None"), two);
    let two = ["internal mh hairpin", "external rr hairpin"];
    assert_eq!(rows(&[here], "ClientIP"), two);
}
