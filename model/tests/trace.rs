//! What a trace says of a kernel that is not as it should be.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::fmt::Write as _;
use std::time::Instant;

use expect_test::expect;
use ferrule_model::address::{BackendAddr, Protocol};
use ferrule_model::cluster::Event;
use ferrule_model::diff::{diff_all, everything};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointPort, EndpointSlice, LoadBalancerIngress, Node,
    NodeAddress, Object, SERVICE_NAME_LABEL, Service, ServicePort, ServiceType,
};
use ferrule_model::network::Policy;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::MARK_BASE;
use ferrule_model::service::{Scheduler, Scheduling, ServiceKey, VirtualService};
use ferrule_model::trace::live::{Ruleset, Seen, scope};
use ferrule_model::trace::{Question, QuestionError, Trace, parse_from, parse_to};
use ferrule_model::view::NodeView;

const VIP: &str = "10.96.0.10:80/tcp";
const BALANCER: &str = "203.0.113.10:80/tcp";

fn service() -> Service {
    let mut service = Service::default();
    "web".clone_into(&mut service.metadata.name);
    let spec = &mut service.spec;
    spec.service_type = ServiceType::LoadBalancer;
    spec.cluster_ips = vec!["10.96.0.10".to_owned()];
    "Local".clone_into(&mut spec.external_traffic_policy);
    spec.load_balancer_source_ranges = vec!["10.0.0.0/8".to_owned()];
    spec.ports = vec![ServicePort {
        port: 80,
        ..ServicePort::default()
    }];
    service.status.load_balancer.ingress = vec![LoadBalancerIngress {
        ip: "203.0.113.10".to_owned(),
        ..LoadBalancerIngress::default()
    }];
    service
}

/// The slice of these addresses.
fn slice(addresses: &[(&str, &str)]) -> Object {
    let mut slice = EndpointSlice::default();
    "web".clone_into(&mut slice.metadata.name);
    let label = (SERVICE_NAME_LABEL.to_owned(), "web".to_owned());
    slice.metadata.labels.extend([label]);
    slice.address_type = AddressType::IPv4;
    slice.ports = vec![EndpointPort {
        port: Some(8080),
        protocol: Protocol::Tcp,
        ..EndpointPort::default()
    }];
    let endpoints = addresses.iter().map(|(address, node)| Endpoint {
        addresses: vec![(*address).to_owned()],
        node_name: Some((*node).to_owned()),
        ..Endpoint::default()
    });
    slice.endpoints = endpoints.collect();
    Object::EndpointSlice(slice)
}

/// A Service with an endpoint here and one elsewhere; for clients from beyond, policy Local.
fn view() -> NodeView {
    let mut node = Node::default();
    "node-a".clone_into(&mut node.metadata.name);
    node.spec.pod_cidrs = vec!["10.244.1.0/24".to_owned()];
    node.status.addresses = vec![NodeAddress {
        kind: AddressKind::InternalIP,
        address: "192.0.2.1".to_owned(),
    }];
    let objects = [
        Object::Node(node),
        Object::Service(service()),
        slice(&[("10.244.1.11", "node-a"), ("10.244.2.11", "node-b")]),
    ];
    let mut view = NodeView::new("node-a", Policy::default());
    view.take(objects.map(|object| Event::Applied(Box::new(object))));
    view
}

fn question(from: &str, to: &str) -> Question {
    Question::new(parse_from(from).unwrap(), parse_to(to).unwrap(), None).unwrap()
}

/// A kernel that is as it should be.
fn whole(view: &NodeView) -> Observed {
    let mut observed = Observed::default();
    for change in diff_all(view.desired(), &observed.clone()) {
        observed.record(&change);
    }
    observed
}

/// What a trace says after this was done to the kernel: a line for each step.
fn told(from: &str, to: &str, ruleset: Ruleset, harm: impl Fn(&mut Observed)) -> String {
    let view = view();
    let mut observed = whole(&view);
    harm(&mut observed);
    let seen = Seen {
        ruleset,
        table: "ferrule".to_owned(),
        observed,
        faults: Vec::new(),
    };
    let question = question(from, to);
    let mut trace = Trace::new(&view, &question).unwrap();
    trace.compare(&view, &question, &seen).unwrap();
    let live = trace.live.unwrap();
    let broken = live.checks.iter().filter(|check| !check.ok);
    assert_eq!(live.broken, broken.count());
    let mut told = String::new();
    for check in live.checks {
        assert_eq!(check.remedy.is_none(), check.ok);
        let ok = if check.ok { "ok" } else { "BROKEN" };
        writeln!(told, "{ok} {}: {}", check.step, check.says.join(" ")).unwrap();
    }
    told
}

/// Only the steps that are broken.
fn broken(from: &str, to: &str, harm: impl Fn(&mut Observed)) -> String {
    let told = told(from, to, Ruleset::AsLoaded, harm);
    let broken = told.lines().filter(|line| line.starts_with("BROKEN "));
    let lines: Vec<&str> = broken
        .map(|line| line.trim_start_matches("BROKEN "))
        .collect();
    lines.join("\n") + "\n"
}

#[test]
fn a_whole_kernel_is_told_step_by_step() {
    expect![[r"
        ok ruleset: Rules, chains and sets of nftables table ferrule are as they were loaded.
        ok guard: VIP 203.0.113.10 is in the guard's set.
        ok vip: VIP 203.0.113.10 is bound (address of the VIP device).
        ok frontend: 203.0.113.10:80/TCP is in the sets where it belongs, and in no other.
        ok admission: Its source ranges are in the set.
        ok mark: Clients within the cluster of 203.0.113.10:80/TCP get mark 0xfee20d74.
        ok service: Virtual service mark 0xfee20d74 (IPv4) is there (scheduler rr).
        ok backends: Its real servers and their weights are as they should be (2).
        ok source: The client, which is a backend, is in the set of hairpins.
    "]]
    .assert_eq(&told("10.244.1.11", BALANCER, Ruleset::AsLoaded, |_| {}));
    expect![[r"
        ok ruleset: Rules, chains and sets of nftables table ferrule are as they were loaded.
    "]]
    .assert_eq(&told(
        "10.244.1.11",
        "192.0.2.1:22/tcp",
        Ruleset::AsLoaded,
        |_| {},
    ));
}

#[test]
fn rules_that_are_gone_or_others_are_told() {
    for (ruleset, words) in [
        (
            Ruleset::Missing,
            "BROKEN ruleset: The nftables table ferrule is gone: nothing guards VIPs.",
        ),
        (
            Ruleset::Changed,
            "BROKEN ruleset: A rule, chain or set of nftables table ferrule is another than was loaded.",
        ),
    ] {
        let told = told("10.244.1.11", VIP, ruleset, |_| {});
        assert_eq!(told.lines().next(), Some(words));
    }
}

#[test]
fn each_broken_step_is_named() {
    let pod = "10.244.1.11";
    let vip = parse_to(VIP).unwrap();
    let balancer = parse_to(BALANCER).unwrap();
    let backend = BackendAddr::new("10.244.1.11".parse().unwrap(), 8080);
    let key = ServiceKey::Address(vip);
    let at_vip = |harm: &dyn Fn(&mut Observed)| broken(pod, VIP, harm);
    let at_balancer = |harm: &dyn Fn(&mut Observed)| broken(pod, BALANCER, harm);
    let service = |harm: &dyn Fn(&mut VirtualService)| {
        broken(pod, VIP, |o| harm(o.services.get_mut(&key).unwrap()))
    };
    let told = [
        at_vip(&|o| o.guarded.clear()),
        at_vip(&|o| o.silent.clear()),
        at_vip(&|o| o.bound.clear()),
        at_vip(&|o| o.allowed.clear()),
        at_balancer(&|o| {
            o.external.clear();
            o.preserved.clear();
            o.dropped.insert(balancer);
            o.served.insert(balancer);
        }),
        at_balancer(&|o| {
            o.limited.clear();
            o.admitted.clear();
        }),
        at_balancer(&|o| {
            o.marks.insert(balancer, MARK_BASE | 7);
        }),
        at_balancer(&|o| {
            o.marks.remove(&balancer);
        }),
        at_vip(&|o| {
            o.services.remove(&key);
        }),
        service(&|s| {
            s.scheduling = Scheduling {
                scheduler: Scheduler::MaglevHash,
                scheduler_flags: 2,
                persistence: Some(60),
            };
        }),
        service(&|s| {
            s.servers.remove(&backend);
        }),
        service(&|s| {
            s.servers.insert(backend, 0);
        }),
        service(&|s| {
            s.servers.insert(backend, u32::MAX);
        }),
        service(&|s| {
            s.servers.insert(BackendAddr::new(backend.ip, 81), 1);
        }),
        at_vip(&|o| o.hairpins.clear()),
    ];
    expect![[r"
        guard: VIP 10.96.0.10 is not in set vips4.
        guard: VIP 10.96.0.10 is not in set silent4.
        vip: VIP 10.96.0.10 is not bound to this node; it should be (address of the VIP device).
        frontend: 10.96.0.10:80/TCP is not in set frontends4.
        frontend: 203.0.113.10:80/TCP is not in set external4. 203.0.113.10:80/TCP is not in set preserved4. 203.0.113.10:80/TCP is in set served4, where it should not be. 203.0.113.10:80/TCP is in set dropped4, where it should not be.
        admission: 203.0.113.10:80/TCP: 1 of its source ranges are not in set admitted4, 0 in it are not its, and everyone may call it.
        mark: Clients within the cluster of 203.0.113.10:80/TCP get mark 0xfe000007 by map marks4; it should be mark 0xfee20d74.
        mark: Clients within the cluster of 203.0.113.10:80/TCP get no mark by map marks4; it should be mark 0xfee20d74.
        service: There is no virtual service 10.96.0.10:80/TCP.
        service: Virtual service 10.96.0.10:80/TCP has scheduler mh, flag-2, persistence of 60 s; it should have scheduler rr.
        backends: Real server 10.244.1.11:8080 is missing in virtual service 10.96.0.10:80/TCP.
        backends: Real server 10.244.1.11:8080 of virtual service 10.96.0.10:80/TCP has weight 0; it should have 1.
        backends: Real server 10.244.1.11:8080 of virtual service 10.96.0.10:80/TCP has limits or a forwarding method that are not ours.
        backends: Real server 10.244.1.11:81 in virtual service 10.96.0.10:80/TCP is none of the Service's backends.
        source: 10.244.1.11 . 10.244.1.11 is not in set hairpins4.
    "]].assert_eq(&told.concat());
    // What is not on the way is no matter.
    let elsewhere = broken("10.244.1.9", VIP, |o| o.hairpins.clear());
    assert_eq!(elsewhere, "\n");
    assert_eq!(
        at_balancer(&|o| {
            o.services.remove(&key);
        }),
        "\n"
    );
}

#[test]
fn a_process_comes_by_no_device() {
    let view = view();
    let mut asked = question("192.0.2.1", VIP);
    asked.device = Some("eth0".to_owned().try_into().unwrap());
    let own = QuestionError::OwnByDevice("192.0.2.1".parse().unwrap());
    assert_eq!(Trace::new(&view, &asked), Err(own.clone()));
    assert_eq!(scope(&view, &asked), Err(own));
}

/// Such a client would look in vain for a backend that is down.
#[test]
fn whom_a_hash_leads_to_weight_0_is_told() {
    for (scheduler, flags, is_told) in [
        ("sh", "", true),
        ("sh", "flag-1", false),
        ("dh", "flag-1", true),
        ("rr", "", false),
    ] {
        let mut service = service();
        service.metadata.annotations.extend(
            [
                ("ferrule.io/scheduler", scheduler),
                ("ferrule.io/scheduler-flags", flags),
                ("ferrule.io/endpoint-weights", "10.244.2.11=0"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        let mut view = view();
        view.take([Event::Applied(Box::new(Object::Service(service)))]);
        let question = question("10.244.1.12", "10.96.0.10:80/TCP");
        let trace = format!("{:?}", Trace::new(&view, &question).unwrap());
        assert!(trace.contains("and 1 of weight 0"), "{trace}");
        let told = trace.contains("whom the hash leads to one of those is refused");
        assert_eq!(told, is_told, "{scheduler} {flags}: {trace}");
    }
}

/// What is compared is the Service with the backends that leave, so that is told.
#[test]
fn a_backend_that_leaves_is_told() {
    let mut view = view();
    let mut service = service();
    let annotation = ("ferrule.io/scheduler".to_owned(), "dh".to_owned());
    service.metadata.annotations.extend([annotation]);
    view.take([Event::Applied(Box::new(Object::Service(service)))]);
    let mut observed = whole(&view);
    view.take([Event::Applied(Box::new(slice(&[(
        "10.244.1.11",
        "node-a",
    )])))]);
    view.drain(
        &observed,
        &mut everything(view.desired(), &observed),
        Instant::now(),
    );
    for change in diff_all(view.desired(), &observed.clone()) {
        observed.record(&change);
    }
    let key = ServiceKey::Address(parse_to(VIP).unwrap());
    let wanted = view.desired().virtual_service(&key);
    assert!(
        observed.serves(&key, wanted.as_ref()),
        "so says status, too"
    );
    let seen = Seen {
        ruleset: Ruleset::AsLoaded,
        table: "ferrule".to_owned(),
        observed,
        faults: Vec::new(),
    };
    let question = question("10.244.1.12", VIP);
    let mut trace = Trace::new(&view, &question).unwrap();
    trace.compare(&view, &question, &seen).unwrap();
    let balancing = trace.balancing.as_ref().unwrap();
    assert_eq!(balancing.scheduler, "rr", "the one that is programmed");
    let backends: Vec<(String, u32, f64, &str)> = trace
        .backends
        .iter()
        .map(|one| {
            (
                one.address.to_string(),
                one.weight,
                one.percent,
                &*one.state,
            )
        })
        .collect();
    assert_eq!(
        backends,
        [
            ("10.244.1.11".to_owned(), 1, 100.0, "ready"),
            ("10.244.2.11".to_owned(), 0, 0.0, "leaving"),
        ]
    );
    let says = |step: &str| {
        let mut steps = trace.steps.iter();
        steps.find(|one| one.step == step).unwrap().says.clone()
    };
    assert_eq!(
        says("balancing"),
        "IPVS takes it by virtual service 10.96.0.10:80/TCP and chooses the next in turn: \
         scheduler rr, 1 backend; beside 1 backend that leaves and keeps its connections, weight 0."
    );
    let live = trace.live.unwrap();
    assert_eq!(live.broken, 0, "{live:?}");
    let told: Vec<&str> = live
        .checks
        .iter()
        .filter(|check| matches!(&*check.step, "service" | "backends"))
        .flat_map(|check| check.says.iter().map(String::as_str))
        .collect();
    assert_eq!(
        told,
        [
            "Virtual service 10.96.0.10:80/TCP is there (scheduler rr).",
            "Its real servers and their weights are as they should be (2, of which 1 leaves).",
        ]
    );
}

/// It calls with the VIP as its source, which no range means.
#[test]
fn the_nodes_address_decides_for_its_processes() {
    for (range, words) in [
        (
            "192.0.2.1/32",
            "loadBalancerSourceRanges (192.0.2.1/32) admit 192.0.2.1, this node's address, which \
             decides for its processes.",
        ),
        (
            "203.0.113.0/24",
            "loadBalancerSourceRanges (203.0.113.0/24) do not admit 192.0.2.1, this node's address, \
             which decides for its processes.",
        ),
    ] {
        let mut service = service();
        service.spec.load_balancer_source_ranges = vec![range.to_owned()];
        let mut view = view();
        view.take([Event::Applied(Box::new(Object::Service(service)))]);
        let trace = Trace::new(&view, &question("192.0.2.1", BALANCER)).unwrap();
        let admission = trace.steps.iter().find(|one| one.step == "admission");
        assert_eq!(admission.unwrap().says, words);
        let verdict = &trace.steps.last().unwrap().says;
        assert!(!verdict.contains("203.0.113.10."), "{verdict}");
    }
}
