//! Tables: what single fields of a Service, a slice or a Node mean, and what is said of
//! those that are wrong.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferrule_model::address::{BackendAddr, Family, FrontendAddr, Protocol};
use ferrule_model::cluster::Event;
use ferrule_model::desired::{Action, Frontend, FrontendKind};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointPort, EndpointSlice, LoadBalancerIngress, Node,
    NodeAddress, Object, PROXY_NAME_LABEL, SERVICE_NAME_LABEL, Service, ServicePort, ServiceType,
    WEIGHT_ANNOTATION,
};
use ferrule_model::network::{DetectLocal, Policy, outermost, parse_network};
use ferrule_model::source_nat::OwnAddress;
use ferrule_model::verdict::{Loss, Packet, Source, Verdict, Within, steps, verdict};
use ferrule_model::view::NodeView;

fn service() -> Service {
    let mut service = Service::default();
    "web".clone_into(&mut service.metadata.name);
    service.spec.cluster_ips = vec!["10.96.0.1".to_owned()];
    service.spec.ports = vec![port("", 80)];
    service
}

fn port(name: &str, port: u16) -> ServicePort {
    ServicePort {
        name: name.to_owned(),
        port,
        ..ServicePort::default()
    }
}

fn ingress(ip: &str, mode: &str) -> LoadBalancerIngress {
    LoadBalancerIngress {
        ip: ip.to_owned(),
        ip_mode: mode.to_owned(),
    }
}

fn slice(endpoints: &[(&str, Option<&str>)]) -> EndpointSlice {
    let mut slice = EndpointSlice::default();
    "web".clone_into(&mut slice.metadata.name);
    let label = (SERVICE_NAME_LABEL.to_owned(), "web".to_owned());
    slice.metadata.labels = BTreeMap::from([label]);
    slice.address_type = AddressType::IPv4;
    slice.ports = vec![EndpointPort {
        port: Some(8080),
        ..EndpointPort::default()
    }];
    let endpoints = endpoints.iter().map(|(address, node)| Endpoint {
        addresses: vec![(*address).to_owned()],
        node_name: node.map(str::to_owned),
        ..Endpoint::default()
    });
    slice.endpoints = endpoints.collect();
    slice
}

fn node() -> Node {
    let mut node = Node::default();
    "n0".clone_into(&mut node.metadata.name);
    node.spec.pod_cidrs = vec!["10.1.0.0/24".to_owned()];
    node.status.addresses = vec![NodeAddress {
        kind: AddressKind::InternalIP,
        address: "192.0.2.1".to_owned(),
    }];
    node
}

fn view(objects: impl IntoIterator<Item = Object>) -> NodeView {
    let mut view = NodeView::new("n0", Policy::default());
    let events = objects.into_iter().map(Box::new);
    view.take(events.map(Event::Applied));
    view
}

fn of_service(service: Service) -> NodeView {
    view([Object::Service(service)])
}

fn at(view: &NodeView, ip: &str, port: u16) -> Option<Frontend> {
    let addr = FrontendAddr::new(ip.parse().unwrap(), port, Protocol::Tcp);
    view.desired().frontend(&addr).cloned()
}

/// Object and reason of what is said of Services and slices.
fn said(view: &NodeView) -> Vec<String> {
    let conditions = view.desired().conditions();
    let words = conditions.map(|said| format!("{} {}", said.object, said.reason));
    words.collect()
}

#[test]
fn cluster_ip_alone_counts() {
    let mut web = service();
    web.spec.cluster_ip = web.spec.cluster_ips.remove(0);
    assert!(at(&of_service(web), "10.96.0.1", 80).is_some());
}

#[test]
fn a_service_without_cluster_ip_is_ignored_entirely() {
    let mut web = service();
    web.spec.cluster_ips.clear();
    web.spec.service_type = ServiceType::LoadBalancer;
    "Local".clone_into(&mut web.spec.external_traffic_policy);
    web.spec.health_check_node_port = 32_000;
    web.spec.external_ips = vec!["nonsense".to_owned()];
    let view = of_service(web);
    assert_eq!(view.desired().frontends().count(), 0);
    assert_eq!(view.desired().health_checks().len(), 0);
    assert_eq!(said(&view), Vec::<String>::new());
}

#[test]
fn a_health_check_at_a_node_port_of_its_own_service_is_told() {
    for (node_port, problems) in [
        (32_000, vec!["Service default/web DuplicatePort".to_owned()]),
        (32_001, vec![]),
    ] {
        let mut web = service();
        web.spec.service_type = ServiceType::LoadBalancer;
        "Local".clone_into(&mut web.spec.external_traffic_policy);
        web.spec.health_check_node_port = 32_000;
        web.spec.ports[0].node_port = node_port;
        let view = view([Object::Node(node()), Object::Service(web)]);
        assert_eq!(said(&view), problems, "{node_port}");
        assert_eq!(view.desired().health_checks().len(), 1);
        assert!(at(&view, "192.0.2.1", node_port).is_some());
    }
}

#[test]
fn balancers_with_ip_mode_proxy_or_an_unknown_one_yield_no_frontend() {
    let mut web = service();
    web.spec.service_type = ServiceType::LoadBalancer;
    web.status.load_balancer.ingress = vec![
        ingress("203.0.113.1", ""),
        ingress("203.0.113.2", "VIP"),
        ingress("203.0.113.3", "Proxy"),
        ingress("203.0.113.4", "Sideways"),
        ingress("", ""),
    ];
    let view = of_service(web);
    let kinds = view
        .desired()
        .frontends()
        .map(|(addr, f)| (addr.ip, f.kind));
    let balancers = kinds.filter(|(_, kind)| *kind == FrontendKind::LoadBalancer);
    let balancers: Vec<String> = balancers.map(|(ip, _)| ip.to_string()).collect();
    assert_eq!(balancers, ["203.0.113.1", "203.0.113.2"]);
    assert_eq!(said(&view), ["Service default/web Unsupported"]);
}

/// Such as one whose type was changed, and whose status is still the old one.
#[test]
fn a_service_that_is_not_called_from_outside_has_no_external_policy() {
    let policy_at_balancer = |kind, external_ips: &[&str]| {
        let mut web = service();
        web.spec.service_type = kind;
        "Local".clone_into(&mut web.spec.external_traffic_policy);
        web.spec.external_ips = external_ips.iter().map(ToString::to_string).collect();
        web.status.load_balancer.ingress = vec![ingress("203.0.113.1", "")];
        let frontend = at(&of_service(web), "203.0.113.1", 80).unwrap();
        frontend.preserves_client
    };
    assert!(!policy_at_balancer(ServiceType::ClusterIP, &[]));
    assert!(policy_at_balancer(ServiceType::ClusterIP, &["203.0.113.9"]));
    assert!(policy_at_balancer(ServiceType::NodePort, &[]));
    assert!(policy_at_balancer(ServiceType::LoadBalancer, &[]));
}

#[test]
fn words_that_are_not_known_count_as_the_default_and_are_said() {
    let told = |word: &str| {
        let mut web = service();
        word.clone_into(&mut web.spec.internal_traffic_policy);
        let view = of_service(web);
        assert_eq!(at(&view, "10.96.0.1", 80).unwrap().empty, Action::Reject);
        said(&view)
    };
    for word in ["", "Cluster", "Local"] {
        assert_eq!(told(word), Vec::<String>::new(), "{word}");
    }
    assert_eq!(told("local"), ["Service default/web Unsupported"]);
}

/// One that admits everyone needs no rule.
#[test]
fn a_source_range_of_length_zero_admits_all() {
    let ranges = |texts: &[&str]| {
        let mut web = service();
        web.spec.service_type = ServiceType::LoadBalancer;
        web.spec.load_balancer_source_ranges = texts.iter().map(ToString::to_string).collect();
        web.status.load_balancer.ingress = vec![ingress("203.0.113.1", "")];
        let frontend = at(&of_service(web), "203.0.113.1", 80).unwrap();
        let ranges = frontend.source_ranges.into_iter();
        ranges.map(|range| range.to_string()).collect::<Vec<_>>()
    };
    let none = Vec::<String>::new();
    assert_eq!(ranges(&[]), none);
    assert_eq!(ranges(&[" 192.0.2.0/24 "]), ["192.0.2.0/24"]);
    assert_eq!(ranges(&["192.0.2.0/24", "0.0.0.0/0"]), none);
    assert_eq!(ranges(&["2001:db8::/32"]), none, "of the other family");
}

#[test]
fn a_node_port_out_of_range_is_served_and_said_once() {
    let told = |node_port| {
        let mut web = service();
        web.spec.ports = vec![port("a", 80), port("b", 81)];
        web.spec.ports[0].node_port = node_port;
        web.spec.ports[1].node_port = node_port;
        web.spec.ports[1].protocol = Protocol::Udp;
        let view = view([Object::Node(node()), Object::Service(web)]);
        let served = node_port == 0 || at(&view, "192.0.2.1", node_port).is_some();
        assert!(served, "{node_port}");
        said(&view)
    };
    for inside in [0, 30_000, 32_767] {
        assert_eq!(told(inside), Vec::<String>::new(), "{inside}");
    }
    for outside in [29_999, 32_768] {
        assert_eq!(told(outside), ["Service default/web InvalidPort"]);
    }
}

#[test]
fn two_ports_of_one_number_are_a_mistake_and_two_fields_of_one_address_are_none() {
    let told = |names: [&str; 2], numbers: [u16; 2]| {
        let mut web = service();
        web.spec.service_type = ServiceType::LoadBalancer;
        web.spec.ports = vec![port(names[0], numbers[0]), port(names[1], numbers[1])];
        web.spec.external_ips = vec!["203.0.113.1".to_owned()];
        web.status.load_balancer.ingress = vec![ingress("203.0.113.1", "")];
        let view = of_service(web);
        let shared = at(&view, "203.0.113.1", 80).unwrap();
        assert_eq!(shared.kind, FrontendKind::LoadBalancer);
        assert_eq!(shared.port_name, names[0]);
        said(&view)
    };
    let twice = ["Service default/web DuplicatePort"];
    assert_eq!(told(["a", "b"], [80, 81]), Vec::<String>::new());
    assert_eq!(told(["a", "b"], [80, 80]), twice);
    assert_eq!(told(["", ""], [80, 80]), twice);
}

/// It is read for each port of the Service, and by none where the Service has none.
#[test]
fn a_weight_that_is_none_counts_for_nothing_and_is_said() {
    let told = |text: &str| {
        let mut endpoints = slice(&[("10.1.0.2", Some("n0"))]);
        let annotation = (WEIGHT_ANNOTATION.to_owned(), text.to_owned());
        endpoints.metadata.annotations = BTreeMap::from([annotation]);
        let view = view([Object::Service(service()), Object::EndpointSlice(endpoints)]);
        let backends = at(&view, "10.96.0.1", 80).unwrap().backends;
        let weights: Vec<u32> = backends.values().map(|backend| backend.weight).collect();
        (weights, said(&view))
    };
    let none = Vec::new();
    assert_eq!(told("7"), (vec![7], none.clone()));
    assert_eq!(told("65535"), (vec![65_535], none.clone()));
    assert_eq!(told(" "), (vec![1], none));
    let wrong = vec!["EndpointSlice default/web InvalidAnnotation".to_owned()];
    assert_eq!(told("65536"), (vec![1], wrong.clone()));
    assert_eq!(told("much"), (vec![1], wrong));
}

/// By the endpoint's node, which a host's address has, or by the pod network, where a
/// slice made by hand names no node.
#[test]
fn backends_of_this_node_may_call_themselves() {
    let endpoints = slice(&[
        ("192.0.2.1", Some("n0")),
        ("10.1.0.2", None),
        ("10.1.0.3", Some("n0")),
        ("10.1.1.2", Some("n1")),
        ("198.51.100.1", None),
    ]);
    let view = view([
        Object::Node(node()),
        Object::Service(service()),
        Object::EndpointSlice(endpoints),
    ]);
    let hairpins: Vec<String> = view.desired().hairpins().map(|ip| ip.to_string()).collect();
    assert_eq!(hairpins, ["10.1.0.2", "10.1.0.3", "192.0.2.1"]);
}

#[test]
fn clients_within_the_cluster_are_told_apart_where_there_are_endpoints() {
    let internal = |endpoints: &[(&str, Option<&str>)]| {
        let mut web = service();
        web.spec.external_ips = vec!["203.0.113.1".to_owned()];
        "Local".clone_into(&mut web.spec.external_traffic_policy);
        let view = view([
            Object::Service(web),
            Object::EndpointSlice(slice(endpoints)),
        ]);
        assert_eq!(at(&view, "10.96.0.1", 80).unwrap().internal, None);
        let frontend = at(&view, "203.0.113.1", 80).unwrap();
        let backends = frontend.internal.map(|internal| internal.backends);
        backends.map(|backends| backends.into_keys().collect::<Vec<_>>())
    };
    let backend = |ip: &str| BackendAddr::new(ip.parse::<IpAddr>().unwrap(), 8080);
    let (here, there) = (("10.1.0.2", Some("n0")), ("10.1.1.2", Some("n1")));
    assert_eq!(internal(&[]), None);
    let same = Some(vec![backend("10.1.0.2")]);
    assert_eq!(
        internal(&[here]),
        same,
        "lest connections end when they come to be the same"
    );
    assert_eq!(internal(&[there]), Some(vec![backend("10.1.1.2")]));
    assert_eq!(
        internal(&[here, there]),
        Some(vec![backend("10.1.0.2"), backend("10.1.1.2")])
    );
}

#[test]
fn a_network_within_another_says_nothing_more() {
    let networks = [
        "10.0.0.0/8",
        "10.0.0.0/16",
        "10.244.1.0/24",
        "192.0.2.0/25",
        "192.0.2.128/25",
        "fd00::/8",
        "fd00::/16",
    ];
    let networks = networks.map(|text| parse_network(text).unwrap()).into();
    let words = |family| {
        let outermost = outermost(&networks, family).into_iter();
        outermost
            .map(|network| network.to_string())
            .collect::<Vec<_>>()
    };
    let v4 = ["10.0.0.0/8", "192.0.2.0/25", "192.0.2.128/25"];
    assert_eq!(words(Family::IPv4), v4);
    assert_eq!(words(Family::IPv6), ["fd00::/8"]);
}

#[test]
fn what_is_wrong_with_the_nodes_object_is_said() {
    let told = |change: fn(&mut Node)| {
        let mut node = node();
        change(&mut node);
        let conditions = view([Object::Node(node)]).node_conditions();
        let reasons = conditions.iter().map(|said| said.reason.to_string());
        reasons.collect::<Vec<_>>()
    };
    assert_eq!(told(|_| {}), Vec::<String>::new());
    let wrong_address = told(|node| {
        node.status.addresses.push(NodeAddress {
            kind: AddressKind::ExternalIP,
            address: "::ffff:192.0.2.1".to_owned(),
        });
    });
    assert_eq!(wrong_address, ["InvalidAddress"]);
    let no_network = told(|node| node.spec.pod_cidrs = vec!["10.1.0.0".to_owned()]);
    assert_eq!(no_network, ["InvalidPodRange"]);
    let too_small = told(|node| node.spec.pod_cidrs = vec!["10.1.0.0/31".to_owned()]);
    assert_eq!(too_small, ["InvalidPodRange"]);
}

/// The VIP alone is no network that a client can be in.
#[test]
fn ranges_that_hold_the_vip_alone_admit_nobody() {
    let mut web = service();
    web.spec.service_type = ServiceType::LoadBalancer;
    web.status.load_balancer.ingress = vec![ingress("198.51.100.10", "")];
    web.spec.load_balancer_source_ranges = vec!["198.51.100.10/32".to_owned()];
    let view = view([
        Object::Service(web),
        Object::EndpointSlice(slice(&[("10.1.0.2", Some("n0"))])),
    ]);
    let target = FrontendAddr::new("198.51.100.10".parse().unwrap(), 80, Protocol::Tcp);
    assert!(view.desired().is_restricted(&target));
    assert!(view.desired().admitted(&target).is_empty());
    let packet = Packet {
        source: "203.0.113.5".parse().unwrap(),
        device: Some("eth0"),
        target,
    };
    let nat = view.source_nat();
    let refused = steps(view.desired(), &nat, &packet);
    assert_eq!(refused.verdict, Verdict::Dropped(Loss::NotAdmitted));
    assert_eq!(refused.service, None, "it does not come so far");
}

#[test]
fn clients_within_the_cluster_may_be_known_by_their_device() {
    let within = |detect_local, source: &str, device| {
        let policy = Policy {
            detect_local: Some(detect_local),
            cluster_cidrs: vec![parse_network("10.244.0.0/16").unwrap()],
            ..Policy::default()
        };
        let view = NodeView::new("n0", policy);
        let packet = Packet {
            source: source.parse().unwrap(),
            device: Some(device),
            target: FrontendAddr::new("10.96.0.1".parse().unwrap(), 80, Protocol::Tcp),
        };
        steps(view.desired(), &view.source_nat(), &packet).within
    };
    let bridge = || DetectLocal::BridgeInterface("cni0".to_owned());
    let prefix = || DetectLocal::InterfaceNamePrefix("veth".to_owned());
    let (pod, other) = ("10.244.1.7", "198.51.100.7");
    for (detect_local, source, device, expected) in [
        (bridge(), other, "cni0", Some(Within::Device)),
        (bridge(), other, "cni01", None),
        (bridge(), other, "eth0", None),
        (bridge(), pod, "eth0", Some(Within::PodNetwork)),
        (prefix(), other, "veth12", Some(Within::Device)),
        (prefix(), other, "eth0", None),
        (DetectLocal::ClusterCidr, other, "cni0", None),
        (
            DetectLocal::ClusterCidr,
            pod,
            "cni0",
            Some(Within::PodNetwork),
        ),
    ] {
        let asked = format!("{detect_local:?} {source} {device}");
        assert_eq!(within(detect_local, source, device), expected, "{asked}");
    }
}

/// What is configured for one family says nothing of the other.
#[test]
fn the_pod_network_is_known_for_each_family() {
    let mut object = node();
    object.spec.pod_cidrs.push("fd00:1:0::/64".to_owned());
    let policy = Policy {
        cluster_cidrs: vec![parse_network("10.0.0.0/8").unwrap()],
        ..Policy::default()
    };
    let mut view = NodeView::new("n0", policy);
    view.take([Event::Applied(Box::new(Object::Node(object)))]);
    let pods = ["10.0.0.0/8", "fd00:1::/64"].map(|text| parse_network(text).unwrap());
    assert_eq!(view.networks().pods, pods.into());
}

/// A pod network around the service range is no claim to its addresses; one within it is.
#[test]
fn a_service_address_that_no_service_has_is_refused_within_the_pod_network() {
    for (pods, target, expected) in [
        ("10.0.0.0/8", "10.96.77.7", Verdict::Unallocated),
        ("10.96.77.0/24", "10.96.77.7", Verdict::Passed(Source::Kept)),
        ("10.96.77.0/24", "10.96.78.7", Verdict::Unallocated),
    ] {
        let policy = Policy {
            cluster_cidrs: vec![parse_network(pods).unwrap()],
            service_cidrs: vec![parse_network("10.96.0.0/16").unwrap()],
            ..Policy::default()
        };
        let view = NodeView::new("n0", policy);
        let packet = Packet {
            source: "198.51.100.7".parse().unwrap(),
            device: Some("eth0"),
            target: FrontendAddr::new(target.parse().unwrap(), 443, Protocol::Tcp),
        };
        let found = verdict(view.desired(), &view.source_nat(), &packet);
        assert_eq!(found, expected, "{pods} {target}");
    }
}

#[test]
fn a_cluster_address_that_makes_no_sense_takes_nothing_else_away() {
    let mut web = service();
    web.spec.cluster_ips = vec!["10.96.0.300".to_owned()];
    web.spec.external_ips = vec!["203.0.113.2".to_owned()];
    let view = view([
        Object::Service(web),
        Object::EndpointSlice(slice(&[("10.1.0.2", Some("n0"))])),
    ]);
    let frontend = at(&view, "203.0.113.2", 80).unwrap();
    assert_eq!(frontend.action(), Action::Balance);
}

/// Load balancers ask at every VIP, also at one that the node has; a frontend comes first.
#[test]
fn where_health_is_asked_for() {
    let mut web = service();
    web.spec.service_type = ServiceType::LoadBalancer;
    web.spec.external_traffic_policy = "Local".to_owned();
    web.spec.health_check_node_port = 32_000;
    web.status.load_balancer.ingress = ["192.0.2.1", "198.51.100.10"]
        .map(|ip| ingress(ip, ""))
        .into();
    let places = |web: Service| {
        let view = view([Object::Service(web), Object::Node(node())]);
        let own = |ip: &str| OwnAddress {
            ip: ip.parse().unwrap(),
            link: parse_network("192.0.2.0/24").unwrap(),
            device: "eth0".to_owned(),
        };
        let mut view = view;
        view.set_own(vec![own("192.0.2.1")]);
        let desired = view.desired();
        let texts = |places: Vec<FrontendAddr>| -> Vec<String> {
            places.iter().map(|place| place.ip.to_string()).collect()
        };
        (
            texts(desired.asked().collect()),
            texts(desired.served().collect()),
        )
    };
    let all = vec!["192.0.2.1".to_owned(), "198.51.100.10".to_owned()];
    assert_eq!(places(web.clone()), (all.clone(), vec![all[1].clone()]));
    web.spec.ports = vec![port("", 32_000)];
    assert_eq!(places(web), (all, Vec::new()));
}

/// Whoever serves them may do so beyond this node.
#[test]
fn cluster_addresses_of_services_of_another_proxy_are_not_refused() {
    let policy = Policy {
        service_cidrs: vec![parse_network("10.96.0.0/16").unwrap()],
        proxy_name: Some("ours".to_owned()),
        ..Policy::default()
    };
    let mut view = NodeView::new("n0", policy);
    view.take([Event::Applied(Box::new(Object::Node(node())))]);
    let mut judged = |label: Option<&str>| {
        let mut web = service();
        web.spec.cluster_ips = vec!["10.96.0.10".to_owned()];
        let label = label.map(|name| (PROXY_NAME_LABEL.to_owned(), name.to_owned()));
        web.metadata.labels.extend(label);
        view.take([Event::Applied(Box::new(Object::Service(web)))]);
        let packet = Packet {
            source: "198.51.100.7".parse().unwrap(),
            device: Some("eth0"),
            target: FrontendAddr::new("10.96.0.10".parse().unwrap(), 443, Protocol::Tcp),
        };
        verdict(view.desired(), &view.source_nat(), &packet)
    };
    assert_eq!(judged(Some("mesh")), Verdict::Passed(Source::Kept));
    assert_ne!(judged(Some("ours")), Verdict::Passed(Source::Kept));
    assert_eq!(judged(Some("mesh")), Verdict::Passed(Source::Kept));
    assert_ne!(judged(None), Verdict::Passed(Source::Kept));
}
