//! Tables: which Service gives which frontends and backends.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;

use expect_test::{Expect, expect};
use ferrule_model::address::Protocol;
use ferrule_model::cluster::{ClusterState, Event};
use ferrule_model::desired::Desired;
use ferrule_model::endpoints::BackendState;
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice,
    HEADLESS_LABEL, LoadBalancerIngress, Node, NodeAddress, Object, ObjectMeta, PROXY_NAME_LABEL,
    SERVICE_NAME_LABEL, Service, ServicePort, ServiceSpec, ServiceType,
};
use ferrule_model::network::Policy;
use ferrule_model::service::Scheduling;
use ferrule_model::time::Timestamp;
use ferrule_model::view::NodeView;

fn service(name: &str, ips: &[&str]) -> Service {
    Service {
        metadata: ObjectMeta {
            name: name.to_owned(),
            ..ObjectMeta::default()
        },
        spec: ServiceSpec {
            cluster_ips: ips.iter().map(ToString::to_string).collect(),
            ports: vec![port("", 80)],
            ..ServiceSpec::default()
        },
        ..Service::default()
    }
}

fn port(name: &str, port: u16) -> ServicePort {
    ServicePort {
        name: name.to_owned(),
        port,
        ..ServicePort::default()
    }
}

/// `r` ready, `t` terminating and serving, `x` neither, `?` conditions unknown.
fn endpoint(address: &str, state: char, node: &str) -> Endpoint {
    let conditions = match state {
        'r' => [Some(true), Some(true), Some(false)],
        't' => [Some(false), Some(true), Some(true)],
        'x' => [Some(false), Some(false), Some(false)],
        _ => [None, None, None],
    };
    Endpoint {
        addresses: vec![address.to_owned()],
        conditions: EndpointConditions {
            ready: conditions[0],
            serving: conditions[1],
            terminating: conditions[2],
        },
        node_name: Some(node.to_owned()),
        ..Endpoint::default()
    }
}

fn slice(name: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    let v6 = endpoints.iter().any(|e| e.addresses[0].contains(':'));
    EndpointSlice {
        metadata: ObjectMeta {
            name: name.to_owned(),
            labels: BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), service.to_owned())]),
            ..ObjectMeta::default()
        },
        address_type: if v6 {
            AddressType::IPv6
        } else {
            AddressType::IPv4
        },
        endpoints,
        ports: vec![EndpointPort {
            port: Some(8080),
            ..EndpointPort::default()
        }],
    }
}

/// What `node-a` would program, and what it has to say.
fn check(objects: Vec<Object>, expected: &Expect) {
    let mut cluster = ClusterState::default();
    let mut desired = Desired::new("node-a");
    for object in objects {
        for name in cluster.apply(Event::Applied(Box::new(object))).services {
            desired.update(&cluster, &name);
        }
    }
    let mut text = String::new();
    for (addr, frontend) in desired.frontends() {
        writeln!(text, "{addr} {} {:?}", frontend.holder, frontend.action()).unwrap();
        for (backend, how) in &frontend.backends {
            let state = match how.state {
                BackendState::Ready => "ready",
                BackendState::Terminating => "terminating",
            };
            let place = if how.local { "local" } else { "remote" };
            writeln!(text, "  {backend} {state} {place}").unwrap();
        }
    }
    for (name, _) in cluster.services() {
        for condition in desired.conditions_of(name) {
            writeln!(text, "! {condition}").unwrap();
        }
    }
    expected.assert_eq(&text);
}

#[test]
fn both_families_each_with_its_own_backends() {
    check(
        vec![
            Object::Service(service("web", &["10.96.0.10", "fd00::10"])),
            Object::EndpointSlice(slice(
                "web-4",
                "web",
                vec![
                    endpoint("10.1.0.2", 'r', "node-a"),
                    endpoint("10.1.1.2", '?', "node-b"),
                ],
            )),
            Object::EndpointSlice(slice(
                "web-6",
                "web",
                vec![endpoint("fd00:1::2", 'r', "node-a")],
            )),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.2:8080 ready local
              10.1.1.2:8080 ready remote
            [fd00::10]:80/TCP default/web Balance
              [fd00:1::2]:8080 ready local
        "]],
    );
}

#[test]
fn terminating_endpoints_serve_when_nothing_is_ready() {
    let not_ready = |state| {
        slice(
            "web-4",
            "web",
            vec![
                endpoint("10.1.0.2", 't', "node-a"),
                endpoint("10.1.0.3", state, "node-a"),
            ],
        )
    };
    check(
        vec![
            Object::Service(service("web", &["10.96.0.10"])),
            Object::EndpointSlice(not_ready('x')),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.2:8080 terminating local
        "]],
    );
    check(
        vec![
            Object::Service(service("web", &["10.96.0.10"])),
            Object::EndpointSlice(not_ready('r')),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.3:8080 ready local
        "]],
    );
}

/// Policy Local would use it, and no frontend has that policy.
#[test]
fn an_endpoint_that_no_frontend_uses_is_no_hairpin() {
    let service = Object::Service(service("web", &["10.96.0.10"]));
    let endpoints = vec![
        endpoint("10.1.0.2", 't', "node-a"),
        endpoint("10.1.1.2", 'r', "node-b"),
    ];
    let slice = Object::EndpointSlice(slice("web-4", "web", endpoints));
    let mut cluster = ClusterState::default();
    let mut desired = Desired::new("node-a");
    for object in [service, slice] {
        for name in cluster.apply(Event::Applied(Box::new(object))).services {
            desired.update(&cluster, &name);
        }
    }
    assert_eq!(desired.hairpins().count(), 0);
}

#[test]
fn one_endpoint_in_two_slices_counts_once_and_ready_wins() {
    check(
        vec![
            Object::Service(service("web", &["10.96.0.10"])),
            Object::EndpointSlice(slice("a", "web", vec![endpoint("10.1.0.2", 't', "node-a")])),
            Object::EndpointSlice(slice("b", "web", vec![endpoint("10.1.0.2", 'r', "node-a")])),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.2:8080 ready local
        "]],
    );
}

#[test]
fn ports_match_by_name_and_protocol() {
    let mut web = service("web", &["10.96.0.10"]);
    web.spec.ports = vec![
        port("http", 80),
        port("admin", 81),
        ServicePort {
            protocol: Protocol::Udp,
            ..port("http", 80)
        },
    ];
    let mut endpoints = slice("web-4", "web", vec![endpoint("10.1.0.2", 'r', "node-a")]);
    endpoints.ports = vec![
        EndpointPort {
            name: "http".to_owned(),
            port: Some(8080),
            ..EndpointPort::default()
        },
        EndpointPort {
            name: "admin".to_owned(),
            port: None,
            ..EndpointPort::default()
        },
    ];
    check(
        vec![Object::Service(web), Object::EndpointSlice(endpoints)],
        &expect![[r"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.2:8080 ready local
            10.96.0.10:80/UDP default/web Reject
            10.96.0.10:81/TCP default/web Reject
        "]],
    );
}

#[test]
fn what_is_none_of_our_business_holds_nothing() {
    let mut headless = service("headless", &["None"]);
    headless.spec.cluster_ip = "None".to_owned();
    let mut external = service("external", &["10.96.0.1"]);
    external.spec.service_type = ServiceType::ExternalName;
    let mut other_proxy = service("other-proxy", &["10.96.0.2"]);
    let label = (PROXY_NAME_LABEL.to_owned(), "mesh".to_owned());
    other_proxy.metadata.labels.extend([label]);
    let mut headless_slice = slice("x", "web", vec![endpoint("10.1.0.9", 'r', "node-a")]);
    let label = (HEADLESS_LABEL.to_owned(), String::new());
    headless_slice.metadata.labels.extend([label]);
    let unassigned = service("unassigned", &[]);
    check(
        vec![
            Object::Service(headless),
            Object::Service(external),
            Object::Service(other_proxy),
            Object::Service(unassigned),
            Object::Service(service("web", &["10.96.0.10"])),
            Object::EndpointSlice(headless_slice),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/web Reject
        "]],
    );
}

#[test]
fn the_older_service_holds_an_address_and_then_the_first_by_name() {
    let aged = |name: &str, day: u8| {
        let mut service = service(name, &["10.96.0.10"]);
        service.metadata.creation_timestamp =
            Timestamp::parse(&format!("2026-01-0{day}T00:00:00Z"));
        Object::Service(service)
    };
    check(
        vec![
            aged("a", 3),
            aged("b", 2),
            aged("c", 2),
            Object::Service(service("d", &["10.96.0.10"])),
        ],
        &expect![[r"
            10.96.0.10:80/TCP default/b Reject
            ! Service default/a: AddressConflict: spec.clusterIPs: 10.96.0.10:80/TCP is held by Service default/b, which is older or comes first by name; give one of the two another address or port
            ! Service default/c: AddressConflict: spec.clusterIPs: 10.96.0.10:80/TCP is held by Service default/b, which is older or comes first by name; give one of the two another address or port
            ! Service default/d: AddressConflict: spec.clusterIPs: 10.96.0.10:80/TCP is held by Service default/b, which is older or comes first by name; give one of the two another address or port
        "]],
    );
}

#[test]
fn what_cannot_be_served_is_said() {
    let mut web = service("web", &["10.96.0.010", "::ffff:10.0.0.1", "10.96.0"]);
    web.spec.ports = vec![port("a", 80), port("b", 80), port("c", 0)];
    web.spec.ports[0].node_port = 30080;
    web.spec.session_affinity = "ClientIP".to_owned();
    web.spec.external_ips = vec!["203.0.113.1".to_owned()];
    let wrong = slice("web-4", "web", vec![endpoint("10.1.0.300", 'r', "node-a")]);
    check(
        vec![Object::Service(web), Object::EndpointSlice(wrong)],
        &expect![[r#"
            10.96.0.10:80/TCP default/web Reject
            203.0.113.1:80/TCP default/web Reject
            ! Service default/web: InvalidAddress: spec.clusterIPs: "10.96.0" is not an IP address; the address is not served, correct it
            ! Service default/web: InvalidAddress: spec.clusterIPs: "::ffff:10.0.0.1" is an IPv4-mapped IPv6 address, write it as plain IPv4; the address is not served, correct it
            ! Service default/web: InvalidPort: spec.ports[].port is 0; give a number from 1 to 65535
            ! Service default/web: DuplicatePort: spec.ports[].port: 80/TCP stands twice, the first is served; remove the other
        "#]],
    );
}

/// The slice is read for each port of the Service, and said to be wrong once.
#[test]
fn an_endpoint_of_another_family_than_its_slice_is_left_out() {
    let mut web = service("web", &["10.96.0.10", "fd00::10"]);
    web.spec.ports.push(port("", 81));
    let mut wrong = slice("web-4", "web", vec![endpoint("10.1.0.2", 'r', "node-a")]);
    wrong.endpoints.push(endpoint("fd00:1::2", 'r', "node-a"));
    check(
        vec![Object::Service(web), Object::EndpointSlice(wrong)],
        &expect![[r#"
            10.96.0.10:80/TCP default/web Balance
              10.1.0.2:8080 ready local
            10.96.0.10:81/TCP default/web Balance
              10.1.0.2:8080 ready local
            [fd00::10]:80/TCP default/web Reject
            [fd00::10]:81/TCP default/web Reject
            ! EndpointSlice default/web-4: InvalidAddress: endpoints[].addresses: "fd00:1::2" is not of the slice's addressType IPv4; the endpoint is left out, correct it
        "#]],
    );
}

/// What `node-a` has for these objects, without the schedulers that its kernel lacks.
fn on_a_kernel_without(missing: &[&str], objects: &[Object]) -> NodeView {
    let mut view = NodeView::new("node-a", Policy::default());
    for scheduler in missing {
        view.note_missing_scheduler(scheduler);
    }
    let objects = objects.iter().cloned();
    view.take(objects.map(|object| Event::Applied(Box::new(object))));
    view
}

/// Each frontend's scheduler, that of clients within the cluster behind it, and conditions.
fn schedulers(view: &NodeView) -> String {
    let mut text = String::new();
    let words = |scheduling: &Scheduling| {
        let flags: Vec<String> = scheduling.flag_names().collect();
        let persistence = scheduling.persistence;
        format!("{} {flags:?} {persistence:?}", scheduling.scheduler)
    };
    for (addr, frontend) in view.desired().frontends() {
        writeln!(text, "{addr} {}", words(&frontend.scheduling)).unwrap();
        if let Some(internal) = &frontend.internal {
            writeln!(text, "  within: {}", words(&internal.scheduling)).unwrap();
        }
    }
    for condition in view.desired().conditions() {
        writeln!(text, "! {condition}").unwrap();
    }
    text
}

#[test]
fn a_scheduler_that_the_kernel_lacks_is_round_robin_until_it_is_there() {
    let mut web = service("web", &["10.96.0.10"]);
    let asked = [
        ("ferrule.io/scheduler", "sh"),
        ("ferrule.io/scheduler-flags", "flag-1"),
    ];
    let asked = asked.map(|(key, text)| (key.to_owned(), text.to_owned()));
    web.metadata.annotations = BTreeMap::from(asked);
    let mut view = on_a_kernel_without(&["sh", "lc", "rr", "unheard"], &[Object::Service(web)]);
    expect![[r"
        10.96.0.10:80/TCP rr [] None
        ! Service default/web: SchedulerMissing: scheduler sh is not in the kernel of this node; rr is used, load the module ip_vs_sh there
    "]]
    .assert_eq(&schedulers(&view));
    let scope = view.forget_missing_schedulers();
    assert_eq!(scope.frontends.len(), 1, "{scope:?}");
    expect![[r#"
        10.96.0.10:80/TCP sh ["flag-1"] None
    "#]]
    .assert_eq(&schedulers(&view));
}

#[test]
fn affinity_of_clients_within_the_cluster_is_a_hash_that_the_kernel_has() {
    let mut web = service("web", &["10.96.0.10"]);
    web.spec.external_ips = vec!["203.0.113.1".to_owned()];
    web.spec.external_traffic_policy = "Local".to_owned();
    web.spec.session_affinity = "ClientIP".to_owned();
    let objects = [
        Object::Service(web),
        Object::EndpointSlice(slice("a", "web", vec![endpoint("10.1.1.2", 'r', "node-b")])),
    ];
    expect![[r#"
        10.96.0.10:80/TCP rr [] Some(10800)
        203.0.113.1:80/TCP rr [] Some(10800)
          within: mh ["flag-1"] None
    "#]]
    .assert_eq(&schedulers(&on_a_kernel_without(&[], &objects)));
    expect![[r#"
        10.96.0.10:80/TCP rr [] Some(10800)
        203.0.113.1:80/TCP rr [] Some(10800)
          within: sh ["flag-1"] None
    "#]]
    .assert_eq(&schedulers(&on_a_kernel_without(&["mh"], &objects)));
    expect![[r"
        10.96.0.10:80/TCP rr [] Some(10800)
        203.0.113.1:80/TCP rr [] Some(10800)
          within: rr [] None
    "]]
    .assert_eq(&schedulers(&on_a_kernel_without(&["mh", "sh"], &objects)));
}

/// A process of the node has the VIP as its source where the VIP is an address of the
/// node; it counts as the node.
#[test]
fn the_vip_is_admitted_where_the_nodes_own_address_is() {
    let admitted = |ranges: &[&str]| {
        let mut web = service("web", &["10.96.0.10", "fd00::10"]);
        web.spec.service_type = ServiceType::LoadBalancer;
        web.spec.load_balancer_source_ranges = ranges.iter().map(ToString::to_string).collect();
        let ingress = ["203.0.113.1", "2001:db8::1"].map(|ip| LoadBalancerIngress {
            ip: ip.to_owned(),
            ..LoadBalancerIngress::default()
        });
        web.status.load_balancer.ingress = ingress.to_vec();
        let mut node = Node::default();
        "node-a".clone_into(&mut node.metadata.name);
        node.status.addresses = vec![NodeAddress {
            kind: AddressKind::InternalIP,
            address: "192.0.2.10".to_owned(),
        }];
        let view = on_a_kernel_without(&[], &[Object::Node(node), Object::Service(web)]);
        let desired = view.desired();
        let mut text = String::new();
        for (addr, _) in desired.frontends() {
            let networks: Vec<_> = desired.admitted(&addr).into_iter().collect();
            let networks: Vec<String> = networks.iter().map(ToString::to_string).collect();
            writeln!(text, "{addr} {networks:?}").unwrap();
        }
        text
    };
    expect![[r#"
        10.96.0.10:80/TCP []
        203.0.113.1:80/TCP ["192.0.2.0/24", "203.0.113.1/32"]
        [2001:db8::1]:80/TCP []
        [fd00::10]:80/TCP []
    "#]]
    .assert_eq(&admitted(&["192.0.2.0/24"]));
    expect![[r#"
        10.96.0.10:80/TCP []
        203.0.113.1:80/TCP ["198.51.100.0/24"]
        [2001:db8::1]:80/TCP ["2001:db8:1::/48"]
        [fd00::10]:80/TCP []
    "#]]
    .assert_eq(&admitted(&["198.51.100.0/24", "2001:db8:1::/48"]));
    expect![[r#"
        10.96.0.10:80/TCP []
        203.0.113.1:80/TCP ["192.0.2.0/24", "203.0.113.0/24"]
        [2001:db8::1]:80/TCP []
        [fd00::10]:80/TCP []
    "#]]
    .assert_eq(&admitted(&["192.0.2.0/24", "203.0.113.0/24"]));
}

/// IPVS takes TCP on port 21 with persistence for FTP, whichever frontend has it, and
/// no other protocol or port.
#[test]
fn no_frontend_on_port_21_has_persistence() {
    let mut web = service("web", &["10.96.0.10"]);
    web.spec.service_type = ServiceType::NodePort;
    web.spec.session_affinity = "ClientIP".to_owned();
    let with = |name: &str, number, node_port, protocol| ServicePort {
        node_port,
        protocol,
        ..port(name, number)
    };
    web.spec.ports = vec![
        with("ftp", 21, 30_021, Protocol::Tcp),
        with("udp", 21, 30_021, Protocol::Udp),
        with("low", 22, 21, Protocol::Tcp),
    ];
    let mut view = NodeView::new("node-a", Policy::default());
    let node = Node {
        metadata: ObjectMeta {
            name: "node-a".to_owned(),
            ..ObjectMeta::default()
        },
        status: ferrule_model::kube::NodeStatus {
            addresses: vec![NodeAddress {
                kind: AddressKind::InternalIP,
                address: "192.0.2.1".to_owned(),
            }],
        },
        ..Node::default()
    };
    view.take([
        Event::Applied(Box::new(Object::Node(node))),
        Event::Applied(Box::new(Object::Service(web))),
    ]);
    let frontends = view.desired().frontends();
    let without: Vec<String> = frontends
        .filter(|(_, frontend)| frontend.scheduling.persistence.is_none())
        .map(|(addr, frontend)| format!("{addr} {}", frontend.scheduling.scheduler))
        .collect();
    assert_eq!(without, ["10.96.0.10:21/TCP mh", "192.0.2.1:21/TCP mh"]);
    let conditions = view.desired().conditions();
    let said: Vec<_> = conditions.map(|condition| condition.to_string()).collect();
    assert!(
        said.iter()
            .any(|text| text.contains("spec.ports[].port: with persistence"))
    );
    assert!(
        said.iter()
            .any(|text| text.contains("spec.ports[].nodePort: with persistence"))
    );
}
