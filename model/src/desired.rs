//! What this node should have programmed.
//!
//! [`Desired`] is kept up to date one Service at a time, so that the work is
//! proportional to the change, and yet depends on the facts alone: any order of
//! the same facts gives the same `Desired`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use crate::address::{BackendAddr, Family, FrontendAddr, Protocol, parse_address};
use crate::change::Change;
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::endpoints::{self, Backend};
pub use crate::frontend::{Action, Frontend, FrontendKind};
use crate::host_ports::HostPorts;
use crate::kube::{
    Kind, ObjectKey, PROXY_NAME_LABEL, Service, ServicePort, ServiceSpec, ServiceType,
};
use crate::names::ObjectName;
use crate::network::NodeFacts;
use crate::service::Scheduling;
use crate::time::Timestamp;
use crate::unsupported::{note_hints, note_unsupported, unsupported};

/// What one Service asks for, before conflicts with others are settled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct ServicePlan {
    frontends: BTreeMap<FrontendAddr, Frontend>,
    conditions: Vec<Condition>,
    created: Created,
    /// Backends that run on this node, and so may call themselves.
    hairpins: BTreeSet<IpAddr>,
}

/// Age of a Service; one without a time stamp counts as younger than any with one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Created {
    At(Timestamp),
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
    /// Addresses of backends on this node.
    pub hairpins: BTreeSet<IpAddr>,
}

impl Scope {
    /// Adds another scope to this one.
    pub fn merge(&mut self, other: Self) {
        self.frontends.extend(other.frontends);
        self.vips.extend(other.vips);
        self.hairpins.extend(other.hairpins);
    }

    /// Adds what a change is about.
    pub fn insert_change(&mut self, change: &Change) {
        match (change, change.frontend()) {
            (Change::AddHairpin(ip) | Change::RemoveHairpin(ip), _) => {
                self.hairpins.insert(*ip);
            }
            (_, Some(frontend)) => self.insert(frontend),
            (_, None) => {
                self.vips.insert(change.ip());
            }
        }
    }

    /// How many addresses it names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frontends.len() + self.vips.len() + self.hairpins.len()
    }

    /// Adds a frontend and its VIP.
    pub fn insert(&mut self, frontend: FrontendAddr) {
        self.frontends.insert(frontend);
        self.vips.insert(frontend.ip);
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frontends.is_empty() && self.vips.is_empty() && self.hairpins.is_empty()
    }
}

/// Everything that should be programmed for services on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    node: String,
    pub(crate) facts: NodeFacts,
    plans: BTreeMap<ObjectName, ServicePlan>,
    claims: BTreeMap<FrontendAddr, BTreeSet<Claim>>,
    /// How many claims to frontends each VIP has.
    vips: BTreeMap<IpAddr, usize>,
    /// How many Services, and pods with host ports, have each backend of this node.
    hairpins: BTreeMap<IpAddr, usize>,
    pub(crate) host_ports: HostPorts,
}

impl Desired {
    /// Nothing yet, for the node of that name.
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            ..Self::default()
        }
    }

    /// What is known of this node.
    #[must_use]
    pub fn facts(&self) -> &NodeFacts {
        &self.facts
    }

    /// Takes in what is known of this node, and computes every Service anew if
    /// that is news. Returns what may have changed by it.
    pub fn set_facts(&mut self, cluster: &ClusterState, facts: NodeFacts) -> Scope {
        let mut scope = Scope::default();
        if self.facts == facts {
            return scope;
        }
        self.facts = facts;
        for (name, _) in cluster.services() {
            scope.merge(self.update(cluster, name));
        }
        scope.merge(self.move_host_ports());
        scope
    }

    /// Computes one Service anew and returns what may have changed by it.
    pub fn update(&mut self, cluster: &ClusterState, name: &ObjectName) -> Scope {
        let plan = cluster
            .service(name)
            .map(|service| {
                Planner {
                    cluster,
                    name,
                    node: &self.node,
                    facts: &self.facts,
                }
                .plan(service)
            })
            .unwrap_or_default();
        let old = self.plans.remove(name).unwrap_or_default();
        let mut scope = Scope::default();
        for (addr, frontend) in &old.frontends {
            let stays = plan
                .frontends
                .get(addr)
                .is_some_and(|new| new.kind == frontend.kind);
            if stays && plan.created == old.created {
                continue;
            }
            self.withdraw(*addr, frontend.kind, &Claim::new(&old, name));
            scope.insert(*addr);
        }
        for (addr, frontend) in &plan.frontends {
            self.claim(*addr, frontend.kind, Claim::new(&plan, name));
            if old.frontends.get(addr) != Some(frontend) {
                scope.insert(*addr);
            }
        }
        self.count_hairpins(&old.hairpins, &plan.hairpins, &mut scope);
        if plan != ServicePlan::default() {
            self.plans.insert(name.clone(), plan);
        }
        scope
    }

    fn claim(&mut self, addr: FrontendAddr, kind: FrontendKind, claim: Claim) {
        let new = self.claims.entry(addr).or_default().insert(claim);
        if new && kind.is_vip() {
            *self.vips.entry(addr.ip).or_default() += 1;
        }
    }

    fn withdraw(&mut self, addr: FrontendAddr, kind: FrontendKind, claim: &Claim) {
        let Some(claims) = self.claims.get_mut(&addr) else {
            return;
        };
        let removed = claims.remove(claim);
        if claims.is_empty() {
            self.claims.remove(&addr);
        }
        if removed && kind.is_vip() {
            count_down(&mut self.vips, addr.ip);
        }
    }

    pub(crate) fn count_hairpins(
        &mut self,
        old: &BTreeSet<IpAddr>,
        new: &BTreeSet<IpAddr>,
        scope: &mut Scope,
    ) {
        for ip in new.difference(old) {
            *self.hairpins.entry(*ip).or_default() += 1;
            scope.hairpins.insert(*ip);
        }
        for ip in old.difference(new) {
            count_down(&mut self.hairpins, *ip);
            scope.hairpins.insert(*ip);
        }
    }

    /// The frontend at `addr`, of the pod or Service that holds it.
    #[must_use]
    pub fn frontend(&self, addr: &FrontendAddr) -> Option<&Frontend> {
        if let Some(frontend) = self.host_ports.frontend(addr) {
            return Some(frontend);
        }
        let holder = self.claims.get(addr)?.first()?;
        self.plans.get(&holder.service)?.frontends.get(addr)
    }

    /// The Service whose claim to `addr` comes first among Services.
    pub(crate) fn service_at(&self, addr: &FrontendAddr) -> Option<&ObjectName> {
        let claims = self.claims.get(addr)?;
        claims.first().map(|claim| &claim.service)
    }

    /// Every frontend with its address, in the order of addresses.
    pub fn frontends(&self) -> impl Iterator<Item = (FrontendAddr, &Frontend)> {
        let mut services = self.claims.keys().peekable();
        let mut pods = self.host_ports.keys().peekable();
        let addrs = std::iter::from_fn(move || match (services.peek(), pods.peek()) {
            (Some(service), Some(pod)) if service < pod => services.next(),
            (Some(service), Some(pod)) if service == pod => services.next().and(pods.next()),
            (_, Some(_)) => pods.next(),
            (_, None) => services.next(),
        });
        addrs.filter_map(|addr| self.frontend(addr).map(|frontend| (*addr, frontend)))
    }

    /// The frontends that each Service holds, by namespace and name, beginning
    /// with the Service `from`.
    pub fn frontends_by_service(
        &self,
        from: Option<&ObjectName>,
    ) -> impl Iterator<Item = (&ObjectName, Vec<(FrontendAddr, &Frontend)>)> {
        let start = from.map_or(Bound::Unbounded, Bound::Included);
        let plans = self.plans.range::<ObjectName, _>((start, Bound::Unbounded));
        plans.map(|(name, plan)| {
            let held = plan.frontends.iter().filter(|(addr, _)| {
                let held_by_pod = self.host_ports.frontend(addr).is_some();
                !held_by_pod && self.service_at(addr) == Some(name)
            });
            (
                name,
                held.map(|(addr, frontend)| (*addr, frontend)).collect(),
            )
        })
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

    /// Whether connections from `ip` to itself need another source.
    #[must_use]
    pub fn is_hairpin(&self, ip: IpAddr) -> bool {
        self.hairpins.contains_key(&ip)
    }

    /// Every such address, in order.
    pub fn hairpins(&self) -> impl Iterator<Item = IpAddr> {
        self.hairpins.keys().copied()
    }

    /// What is to be said about all Services and their slices, in order.
    pub fn conditions(&self) -> impl Iterator<Item = Condition> {
        self.plans.keys().flat_map(|name| self.conditions_of(name))
    }

    /// What is to be said about one Service and its slices, in order.
    #[must_use]
    pub fn conditions_of(&self, name: &ObjectName) -> Vec<Condition> {
        let Some(plan) = self.plans.get(name) else {
            return Vec::new();
        };
        let mut conditions = plan.conditions.clone();
        for (addr, frontend) in &plan.frontends {
            if let Some(held) = self.host_ports.frontend(addr) {
                conditions.push(condition(
                    name,
                    Reason::AddressConflict,
                    format!(
                        "{}: {addr} is held by a host port of {}; give one of the two another port",
                        frontend.kind.field(),
                        held.object()
                    ),
                ));
                continue;
            }
            let holder = self.claims.get(addr).and_then(BTreeSet::first);
            if let Some(holder) = holder.filter(|claim| claim.service != *name) {
                conditions.push(condition(
                    name,
                    Reason::AddressConflict,
                    format!(
                        "{}: {addr} is held by Service {}, which is older or comes first by name; \
                         give one of the two another address or port",
                        frontend.kind.field(),
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

pub(crate) fn condition(service: &ObjectName, reason: Reason, message: String) -> Condition {
    Condition {
        object: ObjectKey {
            kind: Kind::Service,
            name: service.clone(),
        },
        reason,
        message,
    }
}

fn count_down(counts: &mut BTreeMap<IpAddr, usize>, ip: IpAddr) {
    if let Some(count) = counts.get_mut(&ip) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&ip);
        }
    }
}

/// Headless Services, external names, those that ask for another proxy and those
/// that have no address yet are not.
fn is_ours_to_serve(service: &Service) -> bool {
    let spec = &service.spec;
    let mut ips = std::iter::once(&spec.cluster_ip).chain(&spec.cluster_ips);
    let headless = ips.clone().any(|text| text.eq_ignore_ascii_case("none"));
    let has_address = ips.any(|text| !text.is_empty());
    spec.service_type != ServiceType::ExternalName
        && !service.metadata.labels.contains_key(PROXY_NAME_LABEL)
        && !headless
        && has_address
}

/// What it takes to plan one Service.
struct Planner<'a> {
    cluster: &'a ClusterState,
    name: &'a ObjectName,
    node: &'a str,
    facts: &'a NodeFacts,
}

impl Planner<'_> {
    fn plan(&self, service: &Service) -> ServicePlan {
        let mut plan = ServicePlan {
            created: service
                .metadata
                .creation_timestamp
                .map_or(Created::Unknown, Created::At),
            ..ServicePlan::default()
        };
        if !is_ours_to_serve(service) {
            return plan;
        }
        note_unsupported(self.name, service, &mut plan.conditions);
        let vips = cluster_ips(self.name, &service.spec, &mut plan.conditions);
        let families: BTreeSet<Family> = vips.iter().map(|ip| Family::of(*ip)).collect();
        let slices = self.cluster.slices_of(self.name);
        note_hints(self.name, slices, &families, &mut plan.conditions);
        let vips = self.without_own(vips, &mut plan.conditions);
        for port in &service.spec.ports {
            if port.port == 0 {
                let message = "spec.ports[].port is 0; give a number from 1 to 65535".to_owned();
                plan.conditions
                    .push(condition(self.name, Reason::InvalidPort, message));
                continue;
            }
            match port.protocol {
                Protocol::Tcp | Protocol::Udp => {}
                Protocol::Sctp => {
                    let condition = unsupported(
                        self.name,
                        "spec.ports[].protocol",
                        "SCTP ports are not served",
                    );
                    if !plan.conditions.contains(&condition) {
                        plan.conditions.push(condition);
                    }
                    continue;
                }
            }
            for family in &families {
                let backends = endpoints::choose(
                    self.cluster.slices_of(self.name),
                    port,
                    *family,
                    self.node,
                    &mut plan.conditions,
                );
                self.note_hairpins(&backends, &mut plan.hairpins);
                self.add_port(port, *family, &vips, &backends, &mut plan);
            }
        }
        plan
    }

    /// A VIP that is an address of this node would cut the node off: the guard
    /// refuses whatever comes for a VIP and is no service.
    fn without_own(
        &self,
        mut vips: BTreeSet<IpAddr>,
        conditions: &mut Vec<Condition>,
    ) -> BTreeSet<IpAddr> {
        vips.retain(|ip| {
            let own = self.facts.own.contains(ip);
            if own {
                conditions.push(condition(
                    self.name,
                    Reason::AddressConflict,
                    format!(
                        "spec.clusterIPs: {ip} is an address of node {}; it is not served, \
                         give the Service an address of the service network",
                        self.node
                    ),
                ));
            }
            !own
        });
        vips
    }

    fn note_hairpins(
        &self,
        backends: &BTreeMap<BackendAddr, Backend>,
        hairpins: &mut BTreeSet<IpAddr>,
    ) {
        for (addr, backend) in backends {
            let here = backend.local || self.facts.pods.iter().any(|pods| pods.contains(addr.ip));
            if here {
                hairpins.insert(addr.ip);
            }
        }
    }

    fn add_port(
        &self,
        port: &ServicePort,
        family: Family,
        vips: &BTreeSet<IpAddr>,
        backends: &BTreeMap<BackendAddr, Backend>,
        plan: &mut ServicePlan,
    ) {
        let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
        let mut duplicates = BTreeSet::new();
        let mut add = |kind, ip, number| {
            let addr = FrontendAddr::new(ip, number, port.protocol);
            if plan.frontends.contains_key(&addr) {
                let field = match kind {
                    FrontendKind::ClusterIP => "port",
                    FrontendKind::NodePort => "nodePort",
                    FrontendKind::HostPort => "hostPort",
                };
                duplicates.insert((field, number));
                return;
            }
            plan.frontends.insert(
                addr,
                Frontend {
                    kind,
                    holder: self.name.clone(),
                    port_name: port.name.clone(),
                    scheduling: Scheduling::default(),
                    backends: backends.clone(),
                },
            );
        };
        for ip in vips.iter().filter(of_family) {
            add(FrontendKind::ClusterIP, *ip, port.port);
        }
        if port.node_port != 0 {
            let range = &self.facts.node_port_range;
            let condition = condition(
                self.name,
                Reason::InvalidPort,
                format!(
                    "spec.ports[].nodePort: {} is not in nodePortRange {}-{}: a source that is \
                     replaced may have the same port; set nodePortRange to what the API server has",
                    port.node_port,
                    range.start(),
                    range.end()
                ),
            );
            if !range.contains(&port.node_port) && !plan.conditions.contains(&condition) {
                plan.conditions.push(condition);
            }
            for ip in self.facts.node_ports.iter().filter(of_family) {
                add(FrontendKind::NodePort, *ip, port.node_port);
            }
        }
        for (field, number) in duplicates {
            let message = format!(
                "spec.ports[].{field}: {number}/{} stands twice, the first is served; remove the other",
                port.protocol
            );
            let condition = condition(self.name, Reason::DuplicatePort, message);
            // Both families find the same.
            if !plan.conditions.contains(&condition) {
                plan.conditions.push(condition);
            }
        }
    }
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
                format!("{field}: {text:?} {error}; the address is not served, correct it"),
            )),
        }
    }
    vips
}
