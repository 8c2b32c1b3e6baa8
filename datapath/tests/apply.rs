//! `apply` on a kernel that fails one operation in ten: it never opens the
//! node on the way, and it arrives.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_datapath::{ChangeError, Kernel, apply};
use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};
use ferrule_model::binding::Binding;
use ferrule_model::change::Change;
use ferrule_model::cluster::{ClusterState, Event};
use ferrule_model::desired::Desired;
use ferrule_model::diff::{diff, diff_all, everything};
use ferrule_model::kube::{
    AddressType, Endpoint, EndpointPort, EndpointSlice, Object, ObjectMeta, SERVICE_NAME_LABEL,
    Service, ServicePort, ServiceSpec,
};
use ferrule_model::network::NodeFacts;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::VirtualService;
use ferrule_netlink::Error;
use proptest::prelude::*;
use rustix::io::Errno;

/// A kernel that refuses what the real one refuses, fails now and then, and
/// takes down every moment at which the node is open.
struct FakeKernel {
    state: Observed,
    /// State of a linear congruential generator; every run with one seed is the same.
    random: u64,
    failing: bool,
    openings: Vec<String>,
}

/// What goes wrong with an operation.
enum Failure {
    /// The kernel says no.
    Refused(Errno),
    /// No answer comes, whether it was done or not.
    Lost { done: bool },
}

/// Interrupted, no memory, busy, no such module, no permission.
const REFUSALS: [Errno; 5] = [
    Errno::INTR,
    Errno::NOBUFS,
    Errno::BUSY,
    Errno::NOENT,
    Errno::PERM,
];

impl FakeKernel {
    fn number(&mut self, below: usize) -> usize {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.random >> 33).unwrap_or_default() % below
    }

    fn failure(&mut self) -> Option<Failure> {
        if !self.failing || self.number(10) != 0 {
            return None;
        }
        let done = self.number(2) == 0;
        let which = self.number(REFUSALS.len() + 1);
        Some(match REFUSALS.get(which) {
            Some(errno) => Failure::Refused(*errno),
            None => Failure::Lost { done },
        })
    }

    fn execute_one(&mut self, change: &Change) -> Result<(), ChangeError> {
        match self.failure() {
            None => self.carry_out(change),
            Some(Failure::Refused(errno)) => Err(refusal(errno)),
            Some(Failure::Lost { done }) => {
                if done {
                    self.carry_out(change)?;
                }
                let patience = std::time::Duration::from_secs(30);
                Err(ChangeError::new(Error::Timeout(patience)))
            }
        }
    }

    fn carry_out(&mut self, change: &Change) -> Result<(), ChangeError> {
        let service = change
            .service()
            .map(|key| self.state.services.contains_key(&key));
        match change {
            Change::AddServer(..) | Change::UpdateServer(..) | Change::UpdateService(..)
                if service == Some(false) =>
            {
                return Err(refusal(Errno::SRCH));
            }
            _ => self.state.record(change),
        }
        let open = self
            .state
            .bound_vips()
            .find(|ip| !self.state.guarded.contains(ip));
        if let Some(ip) = open {
            self.openings
                .push(format!("after {change}: {ip} is bound without a guard"));
        }
        let proofs = self.state.proofs(&[]);
        let mut services = self.state.services.keys();
        let lost = services.find(|key| !owns_virtual_service(key, &proofs));
        if let Some(addr) = lost {
            self.openings
                .push(format!("after {change}: {addr} is nobody's"));
        }
        Ok(())
    }
}

fn refusal(errno: Errno) -> ChangeError {
    ChangeError::new(Error::Refused {
        errno,
        reason: Some("on purpose".to_owned()),
    })
}

impl Kernel for FakeKernel {
    async fn execute(&mut self, changes: &[Change]) -> Vec<Result<(), ChangeError>> {
        let first = changes.first().map(std::mem::discriminant);
        assert!(
            changes
                .iter()
                .all(|c| Some(std::mem::discriminant(c)) == first)
        );
        changes
            .iter()
            .map(|change| self.execute_one(change))
            .collect()
    }
}

fn vip(number: u8) -> IpAddr {
    IpAddr::from([10, 96, 0, number])
}

/// The node's own address.
fn node() -> IpAddr {
    IpAddr::from([192, 0, 2, 1])
}

/// Services `(number, backends)`, each with two ports on a VIP that it may share,
/// and with node ports.
fn desired(services: &[(u8, u8)]) -> Desired {
    let mut cluster = ClusterState::default();
    let mut desired = Desired::new("n0");
    let own = BTreeSet::from([node()]);
    let facts = NodeFacts {
        node_ports: own.clone(),
        own,
        pods: ipnetwork::IpNetwork::new([10, 1, 0, 0].into(), 24)
            .into_iter()
            .collect(),
        ..NodeFacts::default()
    };
    desired.set_facts(&cluster, facts);
    for (number, backends) in services {
        let name = format!("s{number}");
        let ports = [80, 443].map(|port| ServicePort {
            name: format!("p{port}"),
            port: port + u16::from(*number),
            node_port: 30_000 + port + u16::from(*number % 3),
            ..ServicePort::default()
        });
        let service = Service {
            metadata: ObjectMeta {
                name: name.clone(),
                ..ObjectMeta::default()
            },
            spec: ServiceSpec {
                cluster_ips: vec![vip(number % 4).to_string()],
                ports: ports.to_vec(),
                ..ServiceSpec::default()
            },
            ..Service::default()
        };
        let endpoints = (0..*backends).map(|host| Endpoint {
            addresses: vec![format!("10.1.0.{host}")],
            ..Endpoint::default()
        });
        let slice = EndpointSlice {
            metadata: ObjectMeta {
                name: name.clone(),
                labels: BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), name)]),
                ..ObjectMeta::default()
            },
            address_type: AddressType::IPv4,
            endpoints: endpoints.collect(),
            ports: [80, 443]
                .map(|port| EndpointPort {
                    name: format!("p{port}"),
                    port: Some(8000 + port),
                    ..EndpointPort::default()
                })
                .to_vec(),
        };
        for object in [Object::Service(service), Object::EndpointSlice(slice)] {
            for touched in cluster.apply(Event::Applied(Box::new(object))).services {
                desired.update(&cluster, &touched);
            }
        }
    }
    desired
}

/// What an earlier life may have left: a state on the way, always under guard.
fn leftover() -> impl Strategy<Value = Observed> {
    prop::collection::vec((0..4_u8, 80..84_u16, 0..3_u8, any::<bool>()), 0..6).prop_map(|parts| {
        let mut state = Observed::default();
        for (number, port, backends, allowed) in parts {
            if allowed && backends > 1 {
                let addr = FrontendAddr::new(node(), 30_000 + port, Protocol::Tcp);
                state.external.insert(addr);
                state
                    .services
                    .insert(addr.into(), VirtualService::default());
                state.hairpins.insert(IpAddr::from([10, 1, 0, backends]));
            }
            let addr = FrontendAddr::new(vip(number), port, Protocol::Tcp);
            state.guarded.insert(addr.ip);
            state.bind(addr.ip, Binding::Address);
            if allowed {
                state.allowed.insert(addr);
            }
            let servers = (0..backends)
                .map(|host| (BackendAddr::new(IpAddr::from([10, 1, 0, host]), 9000), 1))
                .collect();
            let service = VirtualService {
                servers,
                ..VirtualService::default()
            };
            state.services.insert(addr.into(), service);
        }
        state
    })
}

proptest! {
    #[test]
    fn failures_delay_and_never_open(
        services in prop::collection::vec((0..8_u8, 0..4_u8), 0..8),
        state in leftover(),
        seed in any::<u64>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let desired = desired(&services);
        let mut believed = state.clone();
        let mut kernel = FakeKernel { state, random: seed, failing: true, openings: vec![] };
        let mut scope = everything(&desired, &believed);
        for round in 0..1000 {
            let changes = diff(&desired, &believed, &scope);
            if changes.is_empty() {
                break;
            }
            // The last rounds succeed: what is tested is where it arrives.
            kernel.failing = round < 50;
            let applied = runtime.block_on(apply(&mut kernel, &changes));
            prop_assert_eq!(
                applied.done.len() + applied.failed.len() + applied.held_back.len(),
                changes.len()
            );
            for change in &applied.done {
                believed.record(change);
            }
            let errors = || applied.failed.iter().map(|(_, error)| error);
            if errors().any(ChangeError::leaves_doubt) {
                // What is then in the kernel is looked at, as the agent does.
                believed = kernel.state.clone();
                scope = everything(&desired, &believed);
                continue;
            }
            prop_assert!(errors().all(|error| error.errno().is_some()));
            prop_assert_eq!(&believed, &kernel.state, "what is believed is what is");
            scope = ferrule_model::desired::Scope::default();
            let failed = applied.failed.iter().map(|(change, _)| change);
            for change in failed.chain(&applied.held_back) {
                scope.insert_change(change);
            }
        }
        prop_assert_eq!(diff_all(&desired, &kernel.state), vec![]);
        prop_assert!(kernel.openings.is_empty(), "{:?}", kernel.openings);
    }

    #[test]
    fn a_failure_hurts_its_own_address_only(
        broken in 0..4_u8,
        services in prop::collection::vec((0..8_u8, 1..4_u8), 1..8),
    ) {
        /// Fails everything about one address.
        struct OneBroken(FakeKernel, IpAddr);
        impl Kernel for OneBroken {
            async fn execute(&mut self, changes: &[Change]) -> Vec<Result<(), ChangeError>> {
                let mut results = Vec::new();
                for change in changes {
                    results.push(if change.ip() == Some(self.1) {
                        Err(refusal(Errno::BUSY))
                    } else {
                        self.0.execute_one(change)
                    });
                }
                results
            }
        }
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let desired = desired(&services);
        let state = Observed::default();
        let inner = FakeKernel { state, random: 0, failing: false, openings: vec![] };
        let mut kernel = OneBroken(inner, vip(broken));
        let changes = diff_all(&desired, &Observed::default());
        let applied = runtime.block_on(apply(&mut kernel, &changes));
        for change in &changes {
            let expected = change.ip() != Some(vip(broken));
            prop_assert_eq!(applied.done.contains(change), expected, "{}", change);
        }
        // Nothing is tried once the guard has failed.
        prop_assert!(applied.failed.len() <= 1, "{:?}", applied.failed);
    }
}
