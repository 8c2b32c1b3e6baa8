//! Host ports: where they are served, and against whom.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::cluster::{ClusterState, Event};
use ferrule_model::condition::Reason;
use ferrule_model::desired::{Desired, FrontendKind};
use ferrule_model::host_ports::{ClaimError, HostPort, PodPorts};
use ferrule_model::kube::{Object, ObjectMeta, Service, ServicePort, ServiceSpec};
use ferrule_model::names::{Attachment, ContainerId, IfName, ObjectName};
use ferrule_model::network::NodeFacts;

const OWN: [&str; 4] = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"];

struct World {
    cluster: ClusterState,
    desired: Desired,
}

impl World {
    /// A node of which one address alone serves node ports.
    fn new() -> Self {
        let cluster = ClusterState::default();
        let mut desired = Desired::new("a");
        let facts = NodeFacts {
            own: OWN.iter().map(|ip| ip.parse().unwrap()).collect(),
            node_ports: BTreeSet::from([OWN[0].parse().unwrap()]),
            ..NodeFacts::default()
        };
        desired.set_facts(&cluster, facts);
        Self { cluster, desired }
    }

    /// A Service without endpoints that has a node port.
    fn add_service(&mut self, node_port: u16) {
        let service = Service {
            metadata: ObjectMeta {
                name: "web".to_owned(),
                ..ObjectMeta::default()
            },
            spec: ServiceSpec {
                cluster_ips: vec!["10.96.0.1".to_owned()],
                ports: vec![ServicePort {
                    port: 80,
                    node_port,
                    ..ServicePort::default()
                }],
                ..ServiceSpec::default()
            },
            ..Service::default()
        };
        let event = Event::Applied(Box::new(Object::Service(service)));
        for name in self.cluster.apply(event).services {
            self.desired.update(&self.cluster, &name);
        }
    }
}

fn attachment() -> Attachment {
    Attachment {
        container_id: ContainerId::try_from("c".to_owned()).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

fn pod(host_ip: &str, addresses: &[&str]) -> PodPorts {
    PodPorts {
        pod: ObjectName::new("default", "pod"),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: vec![HostPort {
            host_ip: host_ip.parse().ok(),
            host_port: 30_080,
            container_port: 80,
            protocol: Protocol::Tcp,
        }],
    }
}

const BOTH: [&str; 2] = ["10.1.0.2", "fd00:1::2"];

#[test]
fn a_host_port_is_at_the_addresses_that_it_names_and_leads_to_its_own_family() {
    for (host_ip, addresses, expected) in [
        ("", &BOTH[..], &OWN[..]),
        ("0.0.0.0", &BOTH, &OWN[..2]),
        ("::", &BOTH, &OWN[2..]),
        (OWN[1], &BOTH, &OWN[1..2]),
        ("", &BOTH[..1], &OWN[..2]),
        ("", &BOTH[1..], &OWN[2..]),
    ] {
        let mut world = World::new();
        let ports = pod(host_ip, addresses);
        assert_eq!(world.desired.claim_host_ports(&ports), Ok(()), "{host_ip}");
        world.desired.set_host_ports(&attachment(), Some(ports));
        let mut found = Vec::new();
        for (addr, frontend) in world.desired.frontends() {
            assert_eq!(frontend.kind, FrontendKind::HostPort);
            let [backend] = frontend
                .backends
                .keys()
                .collect::<Vec<_>>()
                .try_into()
                .unwrap();
            assert_eq!(backend.ip.is_ipv4(), addr.ip.is_ipv4());
            assert_eq!(backend.port, 80);
            assert!(world.desired.is_hairpin(backend.ip), "it may call itself");
            found.push(addr.ip.to_string());
        }
        assert_eq!(found, expected, "{host_ip} {addresses:?}");
        world.desired.set_host_ports(&attachment(), None);
        assert_eq!(world.desired, World::new().desired, "nothing is left");
    }
}

#[test]
fn what_no_address_can_serve_is_no_claim() {
    let world = World::new();
    for (host_ip, addresses) in [
        ("192.0.2.77", &BOTH[..]),
        ("::", &BOTH[..1]),
        ("0.0.0.0", &BOTH[1..]),
        (OWN[0], &BOTH[1..]),
    ] {
        let claim = world.desired.claim_host_ports(&pod(host_ip, addresses));
        let fault = claim.unwrap_err();
        assert!(
            matches!(fault, ClaimError::Nowhere(_)),
            "{host_ip}: {fault}"
        );
        assert!(fault.to_string().contains(host_ip), "{fault}");
    }
}

#[test]
fn a_node_port_is_not_taken_from_its_service_nor_a_host_port_from_its_pod() {
    let at = |ip: &str| FrontendAddr::new(ip.parse::<IpAddr>().unwrap(), 30_080, Protocol::Tcp);
    let kind = |world: &World, ip| world.desired.frontend(&at(ip)).map(|f| f.kind);
    let mut world = World::new();
    world.add_service(30_080);
    for (host_ip, free) in [("", false), (OWN[0], false), (OWN[1], true), ("::", true)] {
        let claim = world.desired.claim_host_ports(&pod(host_ip, &BOTH));
        assert_eq!(claim.is_ok(), free, "{host_ip:?}: {claim:?}");
        if let Err(fault) = claim {
            assert!(fault.to_string().contains("Service default/web"), "{fault}");
        }
    }

    // A Service that comes later, or after a restart, is told and waits.
    let mut world = World::new();
    world
        .desired
        .set_host_ports(&attachment(), Some(pod("", &BOTH)));
    world.add_service(30_080);
    assert_eq!(kind(&world, OWN[0]), Some(FrontendKind::HostPort));
    let conflicts = |world: &World| {
        let said = world
            .desired
            .conditions_of(&ObjectName::new("default", "web"));
        let conflict = said.iter().find(|c| c.reason == Reason::AddressConflict);
        conflict.map(|c| c.message.clone())
    };
    let told = conflicts(&world).unwrap();
    assert!(
        told.contains("nodePort") && told.contains("pod default/pod"),
        "{told}"
    );
    let scope = world.desired.set_host_ports(&attachment(), None);
    assert!(scope.frontends.contains(&at(OWN[0])), "the Service's turn");
    assert_eq!(kind(&world, OWN[0]), Some(FrontendKind::NodePort));
    assert_eq!(kind(&world, OWN[1]), None);
    assert_eq!(conflicts(&world), None);
}
