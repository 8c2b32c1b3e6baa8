//! Until when a backend that leaves keeps its connections.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::net::IpAddr;
use std::time::{Duration, Instant};

use ferrule_model::address::{BackendAddr, Family, FrontendAddr, Protocol};
use ferrule_model::change::Change;
use ferrule_model::cluster::Event;
use ferrule_model::desired::Scope;
use ferrule_model::diff::{diff, everything};
use ferrule_model::drain::{End, Recalled, Server};
use ferrule_model::kube::{
    AddressKind, AddressType, Endpoint, EndpointConditions, EndpointPort, EndpointSlice, Kind,
    LoadBalancerIngress, Node, NodeAddress, Object, ObjectKey, SERVICE_NAME_LABEL, Service,
    ServicePort, ServiceType, Taint,
};
use ferrule_model::names::ObjectName;
use ferrule_model::network::Policy;
use ferrule_model::observed::Observed;
use ferrule_model::service::{Scheduler, ServiceKey};
use ferrule_model::verdict::{Packet, Refusal, Verdict, verdict};
use ferrule_model::view::NodeView;

const VIP: [u8; 4] = [10, 96, 0, 1];
const BOUND: Duration = Duration::from_mins(10);

/// A node and a kernel that does what it is told.
struct World {
    view: NodeView,
    kernel: Observed,
    start: Instant,
}

fn endpoint(ip: &str, node: &str, ready: bool, terminating: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_owned()],
        conditions: EndpointConditions {
            ready: Some(ready),
            serving: Some(ready || terminating),
            terminating: Some(terminating),
        },
        node_name: Some(node.to_owned()),
        ..Endpoint::default()
    }
}

fn node(name: &str, taints: &[&str]) -> Object {
    let mut node = Node::default();
    name.clone_into(&mut node.metadata.name);
    let taints = taints.iter().map(|key| Taint {
        key: (*key).to_owned(),
    });
    node.spec.taints = taints.collect();
    Object::Node(node)
}

fn slice<const N: usize>(endpoints: [Endpoint; N]) -> Object {
    let mut slice = EndpointSlice::default();
    "web-4".clone_into(&mut slice.metadata.name);
    let label = (SERVICE_NAME_LABEL.to_owned(), "web".to_owned());
    slice.metadata.labels = [label].into();
    slice.address_type = AddressType::IPv4;
    slice.ports = [Protocol::Tcp, Protocol::Udp]
        .map(|protocol| EndpointPort {
            port: Some(8080),
            protocol,
            ..EndpointPort::default()
        })
        .into();
    slice.endpoints = endpoints.into();
    Object::EndpointSlice(slice)
}

fn service() -> Service {
    let mut service = Service::default();
    "web".clone_into(&mut service.metadata.name);
    service.spec.cluster_ips = vec![IpAddr::from(VIP).to_string()];
    service.spec.ports = [Protocol::Tcp, Protocol::Udp]
        .map(|protocol| ServicePort {
            port: 80,
            protocol,
            ..ServicePort::default()
        })
        .into();
    service
}

/// Likewise, at an external address of which pods and this node are told apart.
fn external_service() -> Service {
    let mut service = service();
    service.spec.service_type = ServiceType::LoadBalancer;
    service.spec.external_ips = vec!["198.51.100.7".to_owned()];
    "Local".clone_into(&mut service.spec.external_traffic_policy);
    service
}

impl World {
    /// A Service of TCP and UDP with the endpoints 10.1.0.1 and 10.1.0.2 on node n1.
    fn new() -> Self {
        Self::with(Policy::default())
    }

    fn with(policy: Policy) -> Self {
        let mut world = Self {
            view: NodeView::new("n0", policy),
            kernel: Observed::default(),
            start: Instant::now(),
        };
        world.tell(Object::Service(service()));
        world.tell(node("n1", &[]));
        world.list([
            endpoint("10.1.0.1", "n1", true, false),
            endpoint("10.1.0.2", "n1", true, false),
        ]);
        world
    }

    fn tell(&mut self, object: Object) -> Vec<Change> {
        let (scope, _) = self.view.take([Event::Applied(Box::new(object))]);
        self.follow(&scope)
    }

    fn list<const N: usize>(&mut self, endpoints: [Endpoint; N]) -> Vec<Change> {
        self.tell(slice(endpoints))
    }

    fn follow(&mut self, scope: &Scope) -> Vec<Change> {
        let mut scope = scope.clone();
        self.view.drain(&self.kernel, &mut scope, self.start);
        let changes = diff(self.view.desired(), &self.kernel, &scope);
        for change in &changes {
            self.kernel.record(change);
        }
        changes
    }

    /// What ends so long after the beginning, where these pods of the node are gone.
    fn ends(&mut self, after: Duration, gone: &[&str]) -> Vec<End> {
        let now = self.start + after;
        let gone: Vec<IpAddr> = gone.iter().map(|ip| ip.parse().unwrap()).collect();
        let ends = self
            .view
            .look_at_drains(BOUND, now, |ip| gone.contains(&ip));
        let mut scope = Scope::default();
        for ((key, _), _) in &ends {
            scope.insert_service(*key);
        }
        self.follow(&scope);
        ends.into_iter().map(|(_, end)| end).collect()
    }

    /// The weight of a backend of TCP, if it is there.
    fn weight(&self, last: u8) -> Option<u32> {
        let (key, backend) = server(last);
        let service = self.kernel.services.get(&key)?;
        service.servers.get(&backend).copied()
    }
}

fn server(last: u8) -> Server {
    let addr = FrontendAddr::new(VIP.into(), 80, Protocol::Tcp);
    let backend = BackendAddr::new(IpAddr::from([10, 1, 0, last]), 8080);
    (addr.into(), backend)
}

const MINUTE: Duration = Duration::from_mins(1);

/// For so long no slice proves that a pod is gone.
const SETTLED: Duration = Duration::from_secs(2);

#[test]
fn as_long_as_a_slice_names_it_there_is_no_bound() {
    let mut world = World::new();
    for (ready, terminating) in [(false, false), (false, true)] {
        world.list([
            endpoint("10.1.0.1", "n1", ready, terminating),
            endpoint("10.1.0.2", "n1", true, false),
        ]);
        assert_eq!(world.weight(1), Some(0));
        assert_eq!(world.ends(60 * MINUTE, &[]), []);
        assert_eq!(world.weight(1), Some(0));
    }
    // It comes back with its weight.
    world.list([
        endpoint("10.1.0.1", "n1", true, false),
        endpoint("10.1.0.2", "n1", true, false),
    ]);
    assert_eq!(world.weight(1), Some(1));
    assert!(world.view.desired().drains().is_empty());
}

#[test]
fn datagrams_have_nothing_to_wait_for() {
    let mut world = World::new();
    let changes = world.list([endpoint("10.1.0.2", "n1", true, false)]);
    let udp = FrontendAddr::new(VIP.into(), 80, Protocol::Udp);
    let removed = Change::RemoveServer(udp.into(), server(1).1);
    assert!(changes.contains(&removed), "{changes:?}");
    assert_eq!(world.weight(1), Some(0));
}

#[test]
fn the_bound_counts_from_the_last_sight() {
    let mut world = World::new();
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(5 * MINUTE, &[]), []);
    assert_eq!(world.ends(14 * MINUTE, &[]), []);
    assert_eq!(world.ends(15 * MINUTE, &[]), [End::Bound]);
    assert_eq!(world.weight(1), None);
    assert!(world.view.desired().drains().live().next().is_none());
}

#[test]
fn a_pod_that_was_being_ended_is_gone_with_its_endpoint() {
    let mut world = World::new();
    world.list([
        endpoint("10.1.0.1", "n1", false, true),
        endpoint("10.1.0.2", "n1", true, false),
    ]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(2 * MINUTE, &[]), []);
    assert_eq!(world.ends(2 * MINUTE + SETTLED, &[]), [End::PodGone]);
    assert_eq!(world.weight(1), None);
}

/// Between its ending and its end nobody has looked, and no frontend differs by the latter.
#[test]
fn what_a_slice_said_last_counts_whoever_looks_first() {
    for looks_first in [false, true] {
        let mut world = World::new();
        world.list([
            endpoint("10.1.0.1", "n1", false, true),
            endpoint("10.1.0.2", "n1", true, false),
        ]);
        let slice = slice([endpoint("10.1.0.2", "n1", true, false)]);
        let (scope, _) = world.view.take([Event::Applied(Box::new(slice))]);
        assert_eq!(scope.len(), 0);
        assert!(!scope.is_empty(), "it would never be followed");
        if looks_first {
            assert_eq!(world.ends(MINUTE, &[]), []);
        }
        world.follow(&scope);
        assert_eq!(world.ends(MINUTE, &[]), []);
        let ends = world.ends(MINUTE + SETTLED, &[]);
        assert_eq!(ends, [End::PodGone], "{looks_first}");
    }
}

/// A whole application is removed: its pods are being ended, and go on until they have.
#[test]
fn with_a_service_no_pod_is_known_to_be_gone() {
    for slices_first in [false, true] {
        let mut world = World::new();
        let pods = [1, 2].map(|last| endpoint(&format!("10.1.0.{last}"), "n1", false, true));
        world.list(pods);
        assert_eq!(world.ends(MINUTE, &[]), []);
        let keys = [(Kind::Service, "web"), (Kind::EndpointSlice, "web-4")];
        let mut keys = keys.map(|(kind, name)| ObjectKey {
            kind,
            name: ObjectName::new("default", name),
        });
        if slices_first {
            keys.reverse();
        }
        for (seconds, key) in (1..).zip(keys) {
            let (scope, _) = world.view.take([Event::Deleted(key)]);
            world.follow(&scope);
            // Somebody looks between the two as well.
            assert_eq!(world.ends(MINUTE + Duration::from_secs(seconds), &[]), []);
        }
        assert_eq!(world.ends(9 * MINUTE, &[]), []);
        assert_eq!((world.weight(1), world.weight(2)), (Some(0), Some(0)));
        assert_eq!(world.ends(12 * MINUTE, &[]), [End::Bound, End::Bound]);
    }
}

/// A VIP of a deleted Service is guarded until the last connection to it has ended.
#[test]
fn a_trace_knows_what_lives_on() {
    let mut world = World::new();
    let deleted = Event::Deleted(ObjectKey {
        kind: Kind::Service,
        name: ObjectName::new("default", "web"),
    });
    let (scope, _) = world.view.take([deleted]);
    world.follow(&scope);
    let fares = |world: &World, port| {
        let packet = Packet {
            source: [10, 1, 0, 9].into(),
            device: Some("eth0"),
            target: FrontendAddr::new(VIP.into(), port, Protocol::Tcp),
        };
        verdict(world.view.desired(), &world.view.source_nat(), &packet)
    };
    for port in [80, 81] {
        assert_eq!(fares(&world, port), Verdict::Refused(Refusal::NoPort));
    }
    world.list([]);
    let gone = ["10.1.0.1", "10.1.0.2"];
    assert_eq!(world.ends(MINUTE, &gone), [End::PodGone, End::PodGone]);
    assert!(matches!(fares(&world, 80), Verdict::Passed(_)));
}

/// A hash must not lead new clients to a backend that leaves.
#[test]
fn a_hash_leads_past_backends_that_leave() {
    for (scheduler, flags, (around, around_flags)) in [
        ("mh", 2, ("mh", 3)),
        ("sh", 0, ("sh", 1)),
        ("dh", 0, ("rr", 0)),
        ("wlc", 0, ("wlc", 0)),
    ] {
        let mut policy = Policy::default();
        policy.scheduling.scheduler = Scheduler::known(scheduler).unwrap();
        policy.scheduling.scheduler_flags = flags;
        let mut world = World::with(policy);
        let scheduling = |world: &World| {
            let scheduling = &world.kernel.services[&server(1).0].scheduling;
            (scheduling.scheduler.to_string(), scheduling.scheduler_flags)
        };
        assert_eq!(scheduling(&world), (scheduler.to_owned(), flags));
        world.list([endpoint("10.1.0.2", "n1", true, false)]);
        assert_eq!(scheduling(&world), (around.to_owned(), around_flags));
        assert_eq!(world.ends(MINUTE, &["10.1.0.1"]), [End::PodGone]);
        assert_eq!(scheduling(&world), (scheduler.to_owned(), flags));
    }
}

/// It was used to the last, so nobody has looked at it while it drained.
#[test]
fn the_last_pod_that_was_being_ended_is_gone_soon() {
    let mut world = World::new();
    world.list([endpoint("10.1.0.1", "n1", false, true)]);
    assert_eq!(world.weight(1), Some(1));
    // The other drained meanwhile.
    assert_eq!(world.weight(2), Some(0));
    world.list([]);
    assert_eq!((world.weight(1), world.weight(2)), (Some(0), Some(0)));
    assert_eq!(world.ends(MINUTE, &[]), []);
    assert_eq!(world.ends(MINUTE + SETTLED, &[]), [End::PodGone]);
    assert_eq!((world.weight(1), world.weight(2)), (None, Some(0)));
}

#[test]
fn a_pod_of_this_node_is_gone_with_its_lease() {
    let mut world = World::new();
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(MINUTE, &["10.1.0.9"]), []);
    assert_eq!(world.ends(MINUTE, &["10.1.0.1"]), [End::PodGone]);
}

#[test]
fn a_node_that_is_lost_has_no_connections() {
    for taint in [
        "node.kubernetes.io/unreachable",
        "node.kubernetes.io/out-of-service",
    ] {
        let mut world = World::new();
        world.list([
            endpoint("10.1.0.1", "n1", false, false),
            endpoint("10.1.0.2", "n1", true, false),
        ]);
        world.tell(node("n1", &["node.kubernetes.io/not-ready"]));
        assert_eq!(world.ends(MINUTE, &[]), []);
        world.tell(node("n1", &[taint]));
        assert_eq!(world.ends(MINUTE, &[]), [End::NodeGone]);
        // What is used all the same stays.
        assert_eq!(world.weight(2), Some(1));
    }
}

#[test]
fn a_node_whose_object_is_gone_is_lost_where_there_are_others() {
    let mut world = World::new();
    world.list([
        endpoint("10.1.0.1", "n1", false, false),
        endpoint("10.1.0.2", "n1", true, false),
    ]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    let gone = |name: &str| {
        Event::Deleted(ObjectKey {
            kind: Kind::Node,
            name: ObjectName::new("", name),
        })
    };
    // Without any Node nothing is known of them.
    world.view.take([gone("n1")]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    world.tell(node("n2", &[]));
    assert_eq!(world.ends(MINUTE, &[]), [End::NodeGone]);
}

/// A folder of manifests may have the object of this node alone.
#[test]
fn a_node_that_was_never_there_is_not_lost() {
    let mut world = World::new();
    world.list([
        endpoint("10.1.0.1", "n7", false, false),
        endpoint("10.1.0.2", "n1", true, false),
    ]);
    assert_eq!(world.ends(MINUTE, &[]), []);
}

/// It went while no agent listened. A cluster's list of Nodes has every one.
#[test]
fn a_node_that_is_in_no_complete_list_is_lost() {
    let mut world = World::new();
    world.list([
        endpoint("10.1.0.1", "n7", false, false),
        endpoint("10.1.0.2", "n1", true, false),
    ]);
    world.view.know_all_nodes();
    // It may have come since: each kind of object is watched by itself.
    assert_eq!(world.ends(MINUTE, &[]), []);
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(MINUTE, &[]), [End::NodeGone]);
    // A list without any says nothing.
    let mut world = World::new();
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    world.view.know_all_nodes();
    world.view.take([Event::Deleted(ObjectKey {
        kind: Kind::Node,
        name: ObjectName::new("", "n1"),
    })]);
    assert_eq!(world.ends(MINUTE, &[]), []);
}

/// Pods and this node call an external frontend by the cluster's endpoints, whatever its policy:
/// they have a virtual service of their own.
#[test]
fn connections_of_clients_within_the_cluster_live_on() {
    const BALANCER: [u8; 4] = [198, 51, 100, 7];
    let mut world = World::new();
    let mut service = service();
    service.spec.service_type = ServiceType::LoadBalancer;
    "Local".clone_into(&mut service.spec.external_traffic_policy);
    service.status.load_balancer.ingress = vec![LoadBalancerIngress {
        ip: IpAddr::from(BALANCER).to_string(),
        ..LoadBalancerIngress::default()
    }];
    world.tell(Object::Service(service));
    world.list([endpoint("10.1.0.1", "n1", true, false)]);
    let addr = FrontendAddr::new(BALANCER.into(), 80, Protocol::Tcp);
    let family = Family::IPv4;
    let key = |world: &World| {
        let mark = *world.kernel.marks.get(&addr)?;
        Some(ServiceKey::Mark { family, mark })
    };
    let marked = key(&world).unwrap();
    let weight = |world: &World| {
        let service = world.kernel.services.get(&marked)?;
        service.servers.get(&server(1).1).copied()
    };
    assert_eq!(weight(&world), Some(1));
    let of_udp = FrontendAddr::new(BALANCER.into(), 80, Protocol::Udp);
    let mark = world.kernel.marks[&of_udp];
    let servers = world.kernel.services[&ServiceKey::Mark { family, mark }]
        .servers
        .keys();
    assert_eq!(
        servers.collect::<Vec<_>>(),
        [&server(1).1],
        "datagrams are not waited for"
    );
    // Not one endpoint is left, and then not even the Service.
    world.list([endpoint("10.1.0.1", "n1", false, false)]);
    let deleted = Event::Deleted(ObjectKey {
        kind: Kind::Service,
        name: ObjectName::new("default", "web"),
    });
    for event in [None, Some(deleted)] {
        let (scope, _) = world.view.take(event);
        world.follow(&scope);
        assert_eq!(weight(&world), Some(0));
        assert_eq!(key(&world), Some(marked), "nothing proves that it is ours");
        assert!(world.kernel.closed.contains(&addr));
        assert!(world.kernel.is_bound(addr.ip));
        let everything = everything(world.view.desired(), &world.kernel);
        assert_eq!(world.follow(&everything), []);
    }
    let lingering = |world: &World, ip: [u8; 4]| {
        let lingering = world.view.desired().lingering(ip.into());
        lingering.collect::<Vec<_>>()
    };
    assert_eq!(lingering(&world, BALANCER), [addr; 2], "of each backend");
    assert_eq!(lingering(&world, [10, 96, 0, 9]), []);
    // An agent that starts now finds it so.
    let mut next = NodeView::new("n0", Policy::default());
    next.take([Event::Applied(Box::new(node("n1", &[])))]);
    world.view = next;
    let all = everything(world.view.desired(), &world.kernel);
    assert_eq!(world.follow(&all), []);
    assert_eq!(weight(&world), Some(0));
    let ends = world.ends(MINUTE, &["10.1.0.1", "10.1.0.2"]);
    assert!(ends.iter().all(|end| *end == End::PodGone), "{ends:?}");
    assert_eq!((weight(&world), key(&world)), (None, None));
    assert_eq!(lingering(&world, BALANCER), []);
    let closed = &world.kernel.closed;
    assert!(closed.is_empty(), "{closed:?}");
    assert!(!world.kernel.is_bound(addr.ip));
}

/// As those of all others, where the frontend is there and has no endpoint.
#[test]
fn connections_of_clients_within_the_cluster_end_with_their_pod() {
    let mut world = World::new();
    world.tell(Object::Service(external_service()));
    world.list([endpoint("10.1.0.1", "n1", false, true)]);
    world.ends(MINUTE, &["10.1.0.2"]);
    world.list([]);
    let leaving = |world: &World| world.view.desired().drains().live().count();
    assert_eq!(leaving(&world), 2, "by address and by mark");
    assert_eq!(world.ends(MINUTE, &[]), []);
    let ends = world.ends(MINUTE + SETTLED, &[]);
    assert_eq!(ends, [End::PodGone, End::PodGone]);
    assert_eq!(leaving(&world), 0);
}

/// Whoever has the frontend now is not refused for the sake of those who had it.
#[test]
fn connections_by_mark_end_where_another_service_gets_their_frontend() {
    let mut world = World::new();
    let mut next = external_service();
    next.spec.external_traffic_policy.clear();
    world.tell(Object::Service(external_service()));
    world.list([endpoint("10.1.0.1", "n1", false, false)]);
    assert_eq!(world.kernel.closed.len(), 1, "nobody leaves");
    // Its slices are said to be of the other one.
    "next".clone_into(&mut next.metadata.name);
    next.spec.cluster_ips = vec!["10.96.0.2".to_owned()];
    let Object::EndpointSlice(mut slice) = slice([endpoint("10.1.0.3", "n0", true, false)]) else {
        unreachable!("it is one")
    };
    "next-4".clone_into(&mut slice.metadata.name);
    slice.metadata.labels = [(SERVICE_NAME_LABEL.to_owned(), "next".to_owned())].into();
    world.tell(Object::EndpointSlice(slice));
    world.tell(Object::Service(next));
    let (scope, _) = world.view.take([Event::Deleted(ObjectKey {
        kind: Kind::Service,
        name: ObjectName::new("default", "web"),
    })]);
    world.follow(&scope);
    let addr = FrontendAddr::new([198, 51, 100, 7].into(), 80, Protocol::Tcp);
    let Observed {
        closed,
        marks,
        services,
        ..
    } = &world.kernel;
    assert!(closed.is_empty(), "{closed:?}");
    assert!(marks.is_empty(), "{marks:?}");
    let servers = services[&addr.into()].servers.keys().map(|b| b.ip);
    assert_eq!(servers.collect::<Vec<_>>(), [IpAddr::from([10, 1, 0, 3])]);
    let by_mark = services.keys().find(|key| key.address().is_none());
    assert_eq!(by_mark, None);
    let everything = everything(world.view.desired(), &world.kernel);
    assert_eq!(world.follow(&everything), []);
}

/// A load balancer would take the node for one without endpoints.
#[test]
fn connections_end_where_a_health_check_is_asked_now() {
    let mut world = World::new();
    let mut here = Node::default();
    "n0".clone_into(&mut here.metadata.name);
    here.status.addresses = vec![NodeAddress {
        kind: AddressKind::InternalIP,
        address: "192.0.2.1".to_owned(),
    }];
    world.tell(Object::Node(here));
    let mut former = service();
    let mut next = former.clone();
    former.spec.service_type = ServiceType::NodePort;
    former.spec.ports[0].node_port = 32_000;
    world.tell(Object::Service(former));
    let (scope, _) = world.view.take([Event::Deleted(ObjectKey {
        kind: Kind::Service,
        name: ObjectName::new("default", "web"),
    })]);
    world.follow(&scope);
    let addr = FrontendAddr::new([192, 0, 2, 1].into(), 32_000, Protocol::Tcp);
    assert!(world.kernel.leaving.contains(&addr));
    "next".clone_into(&mut next.metadata.name);
    next.spec.cluster_ips = vec!["10.96.0.2".to_owned()];
    next.spec.service_type = ServiceType::LoadBalancer;
    "Local".clone_into(&mut next.spec.external_traffic_policy);
    next.spec.health_check_node_port = 32_000;
    world.tell(Object::Service(next));
    assert!(!world.kernel.leaving.contains(&addr));
    assert!(!world.kernel.services.contains_key(&addr.into()));
    let everything = everything(world.view.desired(), &world.kernel);
    assert_eq!(world.follow(&everything), []);
}

/// Nobody has looked at it while it drained and was listed.
#[test]
fn where_an_endpoint_was_that_left_at_once_is_known() {
    let mut world = World::new();
    world.tell(node("n2", &[]));
    world.list([]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    let gone = Event::Deleted(ObjectKey {
        kind: Kind::Node,
        name: ObjectName::new("", "n1"),
    });
    world.view.take([gone]);
    assert_eq!(world.ends(MINUTE, &[]), [End::NodeGone, End::NodeGone]);
}

/// The next agent finds the kernel as it was, and in no slice what leaves.
#[test]
fn what_a_former_agent_knew_counts() {
    for (recalled, end) in [
        (None, None),
        (Some((Some(9 * MINUTE), None, false)), Some(End::Bound)),
        (Some((None, Some("n1"), false)), Some(End::NodeGone)),
        (Some((Some(MINUTE), None, true)), Some(End::PodGone)),
    ] {
        let mut world = World::new();
        world.view = NodeView::new("n0", Policy::default());
        world.tell(Object::Service(service()));
        world.tell(node("n1", &["node.kubernetes.io/unreachable"]));
        let scope = everything(world.view.desired(), &world.kernel);
        world.follow(&scope);
        let start = world.start;
        if let Some((left, node, terminating)) = recalled {
            world.view.recall_drains(|asked| {
                (*asked == server(1)).then(|| Recalled {
                    left: left.map(|left: Duration| start.checked_sub(left).unwrap()),
                    node: node.map(str::to_owned),
                    terminating,
                })
            });
        }
        let ends: Vec<End> = world.ends(2 * MINUTE, &[]);
        assert_eq!(ends, Vec::from_iter(end), "{recalled:?}");
    }
}

/// Pods with the address of their node are told apart by their ports.
#[test]
fn another_endpoint_at_the_same_address_holds_nothing_up() {
    let mut world = World::new();
    let mut slice = EndpointSlice::default();
    "other-4".clone_into(&mut slice.metadata.name);
    slice.metadata.labels = [(SERVICE_NAME_LABEL.to_owned(), "other".to_owned())].into();
    slice.address_type = AddressType::IPv4;
    slice.ports = vec![EndpointPort {
        port: Some(9100),
        ..EndpointPort::default()
    }];
    slice.endpoints = vec![endpoint("10.1.0.1", "n1", true, false)];
    world.tell(Object::EndpointSlice(slice.clone()));
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    assert_eq!(world.ends(12 * MINUTE, &[]), [End::Bound]);

    // With the same port it is the same pod.
    let mut world = World::new();
    slice.ports[0].port = Some(8080);
    world.tell(Object::EndpointSlice(slice));
    world.list([endpoint("10.1.0.2", "n1", true, false)]);
    assert_eq!(world.ends(MINUTE, &[]), []);
    assert_eq!(world.ends(12 * MINUTE, &[]), []);
}

#[test]
fn ends_have_words() {
    let words = End::ALL.map(End::name);
    assert_eq!(words, ["idle", "podGone", "nodeGone", "bound"]);
}
