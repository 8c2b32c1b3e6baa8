//! What this node should have programmed.
//!
//! [`Desired`] is kept up to date one Service at a time, so that the work is
//! proportional to the change, and yet depends on the facts alone: any order of
//! the same facts gives the same `Desired`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::address::{BackendAddr, Family, FrontendAddr, parse_address};
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::endpoints::{self, Backend};
use crate::kube::{
    Kind, ObjectKey, PROXY_NAME_LABEL, Service, ServicePort, ServiceSpec, ServiceType,
};
use crate::names::ObjectName;
use crate::service::{Scheduling, VirtualService};

/// Weight of every real server.
const WEIGHT: u32 = 1;

/// What happens to traffic for a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It goes to one of the backends.
    Balance,
    /// It is refused at once: there is no usable endpoint anywhere.
    Reject,
}

/// One service port at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// The Service that holds the address.
    pub service: ObjectName,
    /// Name of the service port, empty if it has none.
    pub port_name: String,
    /// How connections are spread.
    pub scheduling: Scheduling,
    /// Backends; empty means [`Action::Reject`].
    pub backends: BTreeMap<BackendAddr, Backend>,
}

impl Frontend {
    /// What happens to its traffic.
    #[must_use]
    pub fn action(&self) -> Action {
        if self.backends.is_empty() {
            Action::Reject
        } else {
            Action::Balance
        }
    }

    /// The virtual service that balances it. A frontend that rejects has none:
    /// the guard refuses at once, while an empty virtual service refuses late
    /// on IPv6 and with a line in the kernel's log each time.
    #[must_use]
    pub fn virtual_service(&self) -> Option<VirtualService> {
        match self.action() {
            Action::Reject => None,
            Action::Balance => Some(VirtualService {
                scheduling: self.scheduling.clone(),
                servers: self.backends.keys().map(|addr| (*addr, WEIGHT)).collect(),
            }),
        }
    }
}

/// What one Service asks for, before conflicts with others are settled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ServicePlan {
    frontends: BTreeMap<FrontendAddr, Frontend>,
    conditions: Vec<Condition>,
    created: Created,
}

/// Age of a Service; one without a time stamp counts as younger than any with one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Created {
    At(String),
    #[default]
    Unknown,
}

/// A Service's claim to a frontend; the least one wins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    created: Created,
    service: ObjectName,
}

/// Addresses whose desired state may have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Frontends.
    pub frontends: BTreeSet<FrontendAddr>,
    /// VIPs.
    pub vips: BTreeSet<IpAddr>,
}

impl Scope {
    /// Adds another scope to this one.
    pub fn merge(&mut self, other: Self) {
        self.frontends.extend(other.frontends);
        self.vips.extend(other.vips);
    }

    /// Adds a frontend and its VIP.
    pub fn insert(&mut self, frontend: FrontendAddr) {
        self.frontends.insert(frontend);
        self.vips.insert(frontend.ip);
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.vips.is_empty()
    }
}

/// Everything that should be programmed for services on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    node: String,
    plans: BTreeMap<ObjectName, ServicePlan>,
    claims: BTreeMap<FrontendAddr, BTreeSet<Claim>>,
    /// How many frontends each VIP has.
    vips: BTreeMap<IpAddr, usize>,
}

impl Desired {
    /// Nothing yet, for the node of that name.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            ..Self::default()
        }
    }

    /// Computes one Service anew and returns what may have changed by it.
    pub fn update(&mut self, cluster: &ClusterState, name: &ObjectName) -> Scope {
        let plan = cluster
            .service(name)
            .map(|service| plan_service(cluster, name, service, &self.node))
            .unwrap_or_default();
        let old = self.plans.remove(name).unwrap_or_default();
        let mut scope = Scope::default();
        for addr in old.frontends.keys() {
            let claim = Claim::new(&old, name);
            if plan.frontends.contains_key(addr) && plan.created == old.created {
                continue;
            }
            self.withdraw(*addr, &claim);
            scope.insert(*addr);
        }
        for (addr, frontend) in &plan.frontends {
            self.claim(*addr, Claim::new(&plan, name));
            if old.frontends.get(addr) != Some(frontend) {
                scope.insert(*addr);
            }
        }
        if plan != ServicePlan::default() {
            self.plans.insert(name.clone(), plan);
        }
        scope
    }

    fn claim(&mut self, addr: FrontendAddr, claim: Claim) {
        let claims = self.claims.entry(addr).or_default();
        if claims.is_empty() {
            *self.vips.entry(addr.ip).or_default() += 1;
        }
        claims.insert(claim);
    }

    fn withdraw(&mut self, addr: FrontendAddr, claim: &Claim) {
        let Some(claims) = self.claims.get_mut(&addr) else {
            return;
        };
        claims.remove(claim);
        if !claims.is_empty() {
            return;
        }
        self.claims.remove(&addr);
        if let Some(count) = self.vips.get_mut(&addr.ip) {
            *count -= 1;
            if *count == 0 {
                self.vips.remove(&addr.ip);
            }
        }
    }

    /// The frontend at `addr`, of the Service that holds it.
    #[must_use]
    pub fn frontend(&self, addr: &FrontendAddr) -> Option<&Frontend> {
        let holder = self.claims.get(addr)?.first()?;
        self.plans.get(&holder.service)?.frontends.get(addr)
    }

    /// Every frontend with its address, in the order of addresses.
    pub fn frontends(&self) -> impl Iterator<Item = (FrontendAddr, &Frontend)> {
        self.claims
            .keys()
            .filter_map(|addr| self.frontend(addr).map(|frontend| (*addr, frontend)))
    }

    /// Whether `ip` is a VIP.
    #[must_use]
    pub fn is_vip(&self, ip: IpAddr) -> bool {
        self.vips.contains_key(&ip)
    }

    /// Every VIP, in order.
    pub fn vips(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.keys().copied()
    }

    /// What is to be said about one Service and its slices, in order.
    #[must_use]
    pub fn conditions_of(&self, name: &ObjectName) -> Vec<Condition> {
        let Some(plan) = self.plans.get(name) else {
            return Vec::new();
        };
        let mut conditions = plan.conditions.clone();
        for addr in plan.frontends.keys() {
            let holder = self.claims.get(addr).and_then(BTreeSet::first);
            if let Some(holder) = holder.filter(|claim| claim.service != *name) {
                conditions.push(condition(
                    name,
                    Reason::AddressConflict,
                    format!(
                        "{addr} is held by Service {}, which is older or comes first by name; \
                         give one of the two another address or port",
                        holder.service
                    ),
                ));
            }
        }
        conditions.sort();
        conditions
    }
}

impl Claim {
    fn new(plan: &ServicePlan, service: &ObjectName) -> Self {
        Self {
            created: plan.created.clone(),
            service: service.clone(),
        }
    }
}

fn condition(service: &ObjectName, reason: Reason, message: String) -> Condition {
    Condition {
        object: ObjectKey {
            kind: Kind::Service,
            name: service.clone(),
        },
        reason,
        message,
    }
}

fn plan_service(
    cluster: &ClusterState,
    name: &ObjectName,
    service: &Service,
    node: &str,
) -> ServicePlan {
    let mut plan = ServicePlan {
        created: service
            .metadata
            .creation_timestamp
            .clone()
            .map_or(Created::Unknown, Created::At),
        ..ServicePlan::default()
    };
    if !is_ours_to_serve(service) {
        return plan;
    }
    note_unsupported(name, service, &mut plan.conditions);
    let vips = cluster_ips(name, &service.spec, &mut plan.conditions);
    for port in &service.spec.ports {
        if port.port == 0 {
            let message = "spec.ports[].port is 0; give a number from 1 to 65535".to_owned();
            plan.conditions
                .push(condition(name, Reason::InvalidPort, message));
            continue;
        }
        for ip in &vips {
            plan_port(cluster, name, port, *ip, node, &mut plan);
        }
    }
    plan
}

/// Headless Services, external names, and those that ask for another proxy are not.
fn is_ours_to_serve(service: &Service) -> bool {
    let spec = &service.spec;
    spec.service_type != ServiceType::ExternalName
        && !service.metadata.labels.contains_key(PROXY_NAME_LABEL)
        && !spec.cluster_ip.eq_ignore_ascii_case("none")
}

fn plan_port(
    cluster: &ClusterState,
    name: &ObjectName,
    port: &ServicePort,
    ip: IpAddr,
    node: &str,
    plan: &mut ServicePlan,
) {
    let addr = FrontendAddr::new(ip, port.port, port.protocol);
    if plan.frontends.contains_key(&addr) {
        let message = format!(
            "spec.ports[]: {}/{} stands twice, the first is served; remove the other",
            port.port, port.protocol
        );
        plan.conditions
            .push(condition(name, Reason::DuplicatePort, message));
        return;
    }
    let backends = endpoints::choose(
        cluster.slices_of(name),
        port,
        Family::of(ip),
        node,
        &mut plan.conditions,
    );
    plan.frontends.insert(
        addr,
        Frontend {
            service: name.clone(),
            port_name: port.name.clone(),
            scheduling: Scheduling::default(),
            backends,
        },
    );
}

/// `clusterIPs`, or `clusterIP` where an object has only that.
fn cluster_ips(
    name: &ObjectName,
    spec: &ServiceSpec,
    conditions: &mut Vec<Condition>,
) -> BTreeSet<IpAddr> {
    let (field, texts) = if spec.cluster_ips.is_empty() {
        ("spec.clusterIP", std::slice::from_ref(&spec.cluster_ip))
    } else {
        ("spec.clusterIPs", spec.cluster_ips.as_slice())
    };
    let mut vips = BTreeSet::new();
    for text in texts.iter().filter(|text| !text.is_empty()) {
        match parse_address(text) {
            Ok(ip) => {
                vips.insert(ip);
            }
            Err(error) => conditions.push(condition(
                name,
                Reason::InvalidAddress,
                format!("{field}: {text:?} {error}; the address is not served"),
            )),
        }
    }
    vips
}

/// Says which parts of a Service this version leaves out; its cluster addresses are served all the same.
fn note_unsupported(name: &ObjectName, service: &Service, conditions: &mut Vec<Condition>) {
    let spec = &service.spec;
    let mut note = |field: &str, effect: &str| {
        let message = format!("{field}: {effect}; the ClusterIPs of the Service are served");
        conditions.push(condition(name, Reason::Unsupported, message));
    };
    if spec.ports.iter().any(|port| port.node_port != 0) {
        note("spec.ports[].nodePort", "node ports are not served");
    }
    if !spec.external_ips.is_empty() {
        note("spec.externalIPs", "external addresses are not served");
    }
    let ingress = &service.status.load_balancer.ingress;
    if ingress.iter().any(|entry| !entry.ip.is_empty()) {
        note(
            "status.loadBalancer.ingress",
            "load-balancer addresses are not served",
        );
    }
    if spec.session_affinity == "ClientIP" {
        note(
            "spec.sessionAffinity",
            "connections are spread without affinity",
        );
    }
    if spec.internal_traffic_policy == "Local" {
        note(
            "spec.internalTrafficPolicy",
            "endpoints of all nodes are used",
        );
    }
}
