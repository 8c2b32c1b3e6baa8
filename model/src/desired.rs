//! What this node should have programmed.
//!
//! [`Desired`] is kept up to date one Service at a time, so that the work is
//! proportional to the change, and yet depends on the facts alone: any order of
//! the same facts gives the same `Desired`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use crate::address::{Family, FrontendAddr, Protocol};
use crate::binding::{Binding, VipBinding};
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::drain::{Drains, End, Recalled, Server};
pub use crate::frontend::{Action, Frontend, FrontendKind, Internal};
use crate::host_ports::HostPorts;
use crate::kube::{Kind, ObjectKey};
use crate::marks::{MarkHolder, Marks};
use crate::names::ObjectName;
use crate::network::{self, NodeFacts};
use crate::observed::Observed;
pub use crate::planner::HealthCheck;
use crate::planner::{Created, Planner, ServicePlan, left_to_another};
pub use crate::scope::Scope;
use crate::service::{Mark, ServiceKey, VirtualService};

/// A Service's claim to a frontend, or to the port of a health check; the least one wins.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    created: Created,
    pub(crate) service: ObjectName,
}

/// How many cluster addresses of Services for another proxy are spared: they stand in a rule, which
/// is loaded anew with each of them.
const MOST_LEFT_TO_OTHERS: usize = 1024;

/// Everything that should be programmed for services on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    node: String,
    pub(crate) facts: NodeFacts,
    pub(crate) plans: BTreeMap<ObjectName, ServicePlan>,
    claims: BTreeMap<FrontendAddr, BTreeSet<Claim>>,
    /// How many claims to frontends each VIP has.
    vips: BTreeMap<IpAddr, usize>,
    /// How many Services, and pods with host ports, have each backend of this node.
    hairpins: BTreeMap<IpAddr, usize>,
    pub(crate) host_ports: HostPorts,
    marks: Marks,
    /// Cluster addresses of Services that ask for another proxy.
    left_to_others: BTreeMap<ObjectName, BTreeSet<IpAddr>>,
    /// Claims to the ports of health checks.
    pub(crate) checks: BTreeMap<u16, BTreeSet<Claim>>,
    pub(crate) drains: Drains,
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
        let binding = |facts: &NodeFacts| (facts.vip_binding.clone(), facts.sources.clone());
        if binding(&self.facts) != binding(&facts) {
            scope.vips.extend(self.vips());
        }
        self.facts = facts;
        for (name, _) in cluster.services() {
            scope.merge(self.update(cluster, name));
        }
        scope.merge(self.move_host_ports());
        scope
    }

    /// The backends that leave.
    #[must_use]
    pub fn drains(&self) -> &Drains {
        &self.drains
    }

    /// Frontends at an address that is no device's of this node and of which backends leave:
    /// they hold it though no Service has it any more.
    pub fn lingering(&self, ip: IpAddr) -> impl Iterator<Item = FrontendAddr> {
        let is_held = !self.facts.own.contains(&ip);
        let leaving = self.drains.frontends();
        leaving.filter(move |addr| is_held && addr.ip == ip)
    }

    /// Lets the real servers of TCP in `scope` that the kernel has and nobody wants keep
    /// their connections from now on, and forgets those that are gone or wanted again.
    /// Returns those whose pods are gone, so that they need not. A virtual service by mark and
    /// the frontends that it holds are looked at together: `scope` has both afterwards.
    pub fn drain(&mut self, observed: &Observed, scope: &mut Scope, now: Instant) -> Vec<Server> {
        self.drains.widen(scope);
        let frontends = scope.frontends.iter();
        let frontends = frontends.map(|addr| ServiceKey::Address(*addr));
        for key in frontends.chain(scope.marked.iter().copied()) {
            let wanted = self.virtual_service(&key);
            let drains = match key {
                ServiceKey::Address(addr) => {
                    addr.protocol == Protocol::Tcp && !self.is_health_check(&addr)
                }
                ServiceKey::Mark { mark, .. } if wanted.is_some() => {
                    self.drains.set_marked(key, BTreeSet::new());
                    let holder = self.marks.holder(mark);
                    holder.is_some_and(|holder| holder.protocol == Protocol::Tcp)
                }
                ServiceKey::Mark { .. } => {
                    let held = match observed.services.get(&key) {
                        Some(_) => self.still_marked(key, observed),
                        None => BTreeSet::new(),
                    };
                    let drains = !held.is_empty();
                    self.drains.set_marked(key, held);
                    drains
                }
            };
            let present = observed.services.get(&key).filter(|_| drains);
            let servers = present.iter().flat_map(|present| present.servers.keys());
            let unwanted = servers.copied().filter(|server| {
                let wanted = wanted.as_ref();
                wanted.is_none_or(|wanted| !wanted.servers.contains_key(server))
            });
            self.drains.set(key, &unwanted.collect(), now);
        }
        self.drains.widen(scope);
        self.drains.note(&scope.left);
        let ended = scope.ended.iter().copied();
        let ended = ended.filter(|server| self.drains.end(server)).collect();
        self.drains.forget_gone(observed);
        ended
    }

    /// The frontends of TCP that lead to a virtual service by mark which nobody wants, as the
    /// kernel has them, and that lead nowhere else now.
    fn still_marked(&self, key: ServiceKey, observed: &Observed) -> BTreeSet<FrontendAddr> {
        let marked = observed.marks.iter();
        let marked = marked.filter(|(addr, mark)| {
            keys_of(**mark).any(|of| of == key)
                && Family::of(addr.ip) == key.family()
                && addr.protocol == Protocol::Tcp
        });
        let free = marked.filter(|(addr, _)| {
            let service = self.virtual_service(&ServiceKey::Address(**addr));
            service.is_none() && self.mark(addr).is_none() && !self.is_health_check(addr)
        });
        free.map(|(addr, _)| *addr).collect()
    }

    /// Takes in what the cluster says of the backends that leave, and ends the drains of
    /// which nothing is left to wait for. Returns these; what may have changed by that is
    /// about their virtual services.
    pub fn look_at_drains(
        &mut self,
        cluster: &ClusterState,
        bound: Duration,
        now: Instant,
        is_gone: impl Fn(IpAddr) -> bool,
    ) -> Vec<(Server, End)> {
        let keys: BTreeSet<ServiceKey> = self.drains.live().map(|((key, _), _)| *key).collect();
        let served = keys.into_iter().filter(|key| self.has_frontend(key));
        let served: BTreeSet<ServiceKey> = served.collect();
        let is_served = |key: &ServiceKey| served.contains(key);
        self.drains.look(cluster, bound, now, is_served, is_gone)
    }

    /// Whether a frontend of this virtual service is there, though it may have no backends.
    fn has_frontend(&self, key: &ServiceKey) -> bool {
        match key {
            ServiceKey::Address(addr) => self.frontend(addr).is_some(),
            ServiceKey::Mark { .. } => {
                let mut marked = self.drains.marked(key);
                self.virtual_service(key).is_some() || marked.any(|a| self.frontend(a).is_some())
            }
        }
    }

    /// Takes in what a former agent knew of backends that leave.
    pub fn recall_drains(&mut self, recall: impl Fn(&Server) -> Option<Recalled>) {
        self.drains.recall(recall);
    }

    /// Ends a drain: the backend has no connections any more.
    pub fn end_drain(&mut self, server: &Server) {
        self.drains.end(server);
    }

    /// The virtual service that should be there.
    #[must_use]
    pub fn virtual_service(&self, key: &ServiceKey) -> Option<VirtualService> {
        match key {
            ServiceKey::Address(addr) => self.frontend(addr)?.virtual_service(),
            ServiceKey::Mark { .. } => self.marked_service(key),
        }
    }

    /// Cluster addresses of Services that ask for another proxy: by namespace and name, as many
    /// as a rule may hold.
    pub fn left_to_others(&self) -> impl Iterator<Item = IpAddr> {
        let all = self.left_to_others.values().flatten().copied();
        all.take(MOST_LEFT_TO_OTHERS)
    }

    fn note_left_to_others(&mut self, cluster: &ClusterState, name: &ObjectName) {
        let ours = self.facts.proxy_name.as_deref();
        let left = cluster
            .service(name)
            .map(|service| left_to_another(service, ours))
            .filter(|left| !left.is_empty());
        match left {
            Some(left) => self.left_to_others.insert(name.clone(), left),
            None => self.left_to_others.remove(name),
        };
    }

    /// Computes one Service anew and returns what may have changed by it.
    pub fn update(&mut self, cluster: &ClusterState, name: &ObjectName) -> Scope {
        self.note_left_to_others(cluster, name);
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
        let of_plan = |plan: &ServicePlan| plan.health_check.as_ref().map(|check| check.port);
        let former = self.plans.get(name).and_then(of_plan);
        let ports: BTreeSet<u16> = former.into_iter().chain(of_plan(&plan)).collect();
        let served_before = self.served_at(&ports);
        let old = self.plans.remove(name).unwrap_or_default();
        let mut scope = Scope::default();
        for (addr, frontend) in &old.frontends {
            let stays = plan
                .frontends
                .get(addr)
                .is_some_and(|new| (new.kind, new.is_vip) == (frontend.kind, frontend.is_vip));
            if stays && plan.created == old.created {
                continue;
            }
            self.withdraw(*addr, frontend.is_vip, &Claim::new(&old, name));
            scope.insert(*addr);
        }
        for addr in &old.checked {
            if !plan.checked.contains(addr) || plan.created != old.created {
                self.withdraw(*addr, false, &Claim::new(&old, name));
                scope.insert(*addr);
            }
        }
        for addr in &plan.checked {
            self.claim(*addr, false, Claim::new(&plan, name));
            if !old.checked.contains(addr) {
                scope.insert(*addr);
            }
        }
        for (addr, frontend) in &plan.frontends {
            self.claim(*addr, frontend.is_vip, Claim::new(&plan, name));
            if old.frontends.get(addr) != Some(frontend) {
                scope.insert(*addr);
            }
        }
        self.count_hairpins(&old.hairpins, &plan.hairpins, &mut scope);
        self.claim_check(&old, &plan, name);
        let moved = self.give_marks(&old, &plan, &mut scope);
        if plan != ServicePlan::default() {
            self.plans.insert(name.clone(), plan);
        }
        let served = self.served_at(&ports);
        let news = served.symmetric_difference(&served_before);
        scope.frontends.extend(news);
        for holder in moved.keys() {
            self.note_mark(holder, &mut scope);
        }
        self.note_claimed_marks(&mut scope);
        scope
    }

    /// A virtual service by mark stands as long as a frontend leads to it: who wins or
    /// loses one may win or lose the other.
    pub(crate) fn note_claimed_marks(&self, scope: &mut Scope) {
        for addr in &scope.frontends {
            let claims = self.claims.get(addr).into_iter().flatten();
            for claim in claims {
                let plan = self.plans.get(&claim.service);
                let frontend = plan.and_then(|plan| plan.frontends.get(addr));
                let internal = frontend.and_then(|frontend| frontend.internal.as_ref());
                let mark = internal.and_then(|internal| self.marks.of(&internal.holder));
                scope.marked.extend(mark.into_iter().flat_map(keys_of));
            }
        }
    }

    /// Gives marks to the service ports that need one now, and takes them from those
    /// that need none any more. Returns which others have another mark now.
    fn give_marks(
        &mut self,
        old: &ServicePlan,
        new: &ServicePlan,
        scope: &mut Scope,
    ) -> BTreeMap<MarkHolder, Mark> {
        let (before, after) = (old.internals(), new.internals());
        let mut moved = BTreeMap::new();
        let mut about = BTreeSet::new();
        for (holder, internals) in &before {
            if after.get(holder) == Some(internals) {
                continue;
            }
            about.extend(self.marks.of(holder));
            if !after.contains_key(holder) {
                moved.extend(self.marks.remove(holder));
            }
        }
        // It may have been the last one that led there: a pod may hold the others.
        let gone = old
            .frontends
            .iter()
            .filter(|(addr, _)| !new.frontends.contains_key(addr));
        let led = gone.filter_map(|(_, frontend)| frontend.internal.as_ref());
        about.extend(led.filter_map(|internal| self.marks.of(&internal.holder)));
        for (holder, internals) in &after {
            if before.get(holder) != Some(internals) {
                moved.extend(self.marks.insert((*holder).clone()));
                about.extend(self.marks.of(holder));
            }
        }
        for (holder, former) in &moved {
            about.insert(*former);
            about.extend(self.marks.of(holder));
        }
        scope.marked.extend(about.into_iter().flat_map(keys_of));
        moved
    }

    /// Adds what the mark of a service port is about.
    fn note_mark(&self, holder: &MarkHolder, scope: &mut Scope) {
        let plan = self.plans.get(&holder.service);
        let frontends = plan.into_iter().flat_map(|plan| &plan.frontends);
        for (addr, frontend) in frontends {
            let internal = frontend.internal.as_ref();
            if internal.is_some_and(|internal| internal.holder == *holder) {
                scope.insert(*addr);
            }
        }
    }

    /// The mark of packets of clients within the cluster to a frontend.
    #[must_use]
    pub fn mark(&self, addr: &FrontendAddr) -> Option<Mark> {
        let internal = self.frontend(addr)?.internal.as_ref()?;
        self.marks.of(&internal.holder)
    }

    /// The virtual service by this mark, which has the backends of a service port
    /// for clients within the cluster.
    #[must_use]
    pub fn marked_service(&self, key: &ServiceKey) -> Option<VirtualService> {
        let ServiceKey::Mark { family, mark } = key else {
            return None;
        };
        self.internal_of(self.marks.holder(*mark)?, *family)
            .map(Internal::virtual_service)
    }

    /// The service port that has this mark.
    #[must_use]
    pub fn mark_holder(&self, mark: Mark) -> Option<&MarkHolder> {
        self.marks.holder(mark)
    }

    fn internal_of(&self, holder: &MarkHolder, family: Family) -> Option<&Internal> {
        let plan = self.plans.get(&holder.service)?;
        let mut of_family = plan
            .frontends
            .iter()
            .filter(|(addr, _)| Family::of(addr.ip) == family)
            .filter(|(addr, frontend)| self.frontend(addr) == Some(frontend))
            .filter_map(|(_, frontend)| frontend.internal.as_ref());
        of_family.find(|internal| internal.holder == *holder)
    }

    /// Every virtual service by mark.
    pub fn marked(&self) -> impl Iterator<Item = ServiceKey> {
        let marks = self.marks.iter();
        marks.flat_map(move |(mark, holder)| {
            let keys = keys_of(mark);
            keys.filter(move |key| self.internal_of(holder, key.family()).is_some())
        })
    }

    fn claim(&mut self, addr: FrontendAddr, is_vip: bool, claim: Claim) {
        let new = self.claims.entry(addr).or_default().insert(claim);
        if new && is_vip {
            *self.vips.entry(addr.ip).or_default() += 1;
        }
    }

    fn withdraw(&mut self, addr: FrontendAddr, is_vip: bool, claim: &Claim) {
        let Some(claims) = self.claims.get_mut(&addr) else {
            return;
        };
        let removed = claims.remove(claim);
        if claims.is_empty() {
            self.claims.remove(&addr);
        }
        if removed && is_vip {
            count_down(&mut self.vips, &addr.ip);
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
            count_down(&mut self.hairpins, ip);
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

    /// Whether only clients of some networks may call the frontend: those that are admitted.
    #[must_use]
    pub fn is_restricted(&self, addr: &FrontendAddr) -> bool {
        let frontend = self.frontend(addr);
        frontend.is_some_and(|frontend| !frontend.source_ranges.is_empty())
    }

    /// Who may call the frontend, if it is restricted: that may be nobody. A process of this node
    /// may call with the VIP as its source, where that is an address of the VIP
    /// device: it is admitted where the node's own address is, and nowhere else.
    #[must_use]
    pub fn admitted(&self, addr: &FrontendAddr) -> BTreeSet<IpNetwork> {
        let Some(frontend) = self.frontend(addr) else {
            return BTreeSet::new();
        };
        let mut ranges = frontend.source_ranges.clone();
        let family = Family::of(addr.ip);
        let node = self.facts.primary.get(&family);
        let admitted = node.is_some_and(|node| ranges.iter().any(|range| range.contains(*node)));
        let with_vip: Vec<IpNetwork> = ranges
            .iter()
            .filter(|range| range.contains(addr.ip))
            .copied()
            .collect();
        if admitted {
            if with_vip.is_empty()
                && let Ok(vip) = IpNetwork::new(addr.ip, family.bits())
            {
                ranges.insert(vip);
            }
            return ranges;
        }
        for range in with_vip {
            ranges.remove(&range);
            ranges.extend(network::without(range, addr.ip));
        }
        ranges
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

    /// How `ip` should be bound; `None` where it is no VIP.
    #[must_use]
    pub fn binding(&self, ip: IpAddr) -> Option<Binding> {
        self.is_vip(ip).then(|| match &self.facts.vip_binding {
            VipBinding::Address => Binding::Address,
            VipBinding::Route => Binding::Route {
                source: self.facts.sources.get(&Family::of(ip)).copied(),
            },
            VipBinding::Device(device) => Binding::Alias {
                device: device.clone(),
            },
        })
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
        let conflict = |message| condition(name, Reason::AddressConflict, message);
        let held = plan.frontends.iter().filter_map(|(addr, frontend)| {
            let held = self.held_by_another(addr, name, "address or port")?;
            Some(format!(
                "{}: {addr} is held by {held}",
                frontend.kind.field()
            ))
        });
        conditions.extend(held.map(conflict));
        conditions.extend(self.lost_checks(plan, name).into_iter().map(conflict));
        conditions.sort();
        conditions
    }

    /// Who has what a Service asks for at this place, and what to do, if it is another.
    pub(crate) fn held_by_another(
        &self,
        addr: &FrontendAddr,
        name: &ObjectName,
        what: &str,
    ) -> Option<String> {
        if let Some(held) = self.host_ports.frontend(addr) {
            let held = held.object();
            return Some(format!(
                "a host port of {held}; give one of the two another port"
            ));
        }
        let holder = self.service_at(addr).filter(|holder| *holder != name)?;
        Some(older(holder, what))
    }
}

/// Who has it, and what to do.
pub(crate) fn older(holder: &ObjectName, what: &str) -> String {
    format!(
        "Service {holder}, which is older or comes first by name; give one of the two another {what}"
    )
}

impl Claim {
    pub(crate) fn new(plan: &ServicePlan, service: &ObjectName) -> Self {
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

fn keys_of(mark: Mark) -> impl Iterator<Item = ServiceKey> {
    let families = Family::ALL.into_iter();
    families.map(move |family| ServiceKey::Mark { family, mark })
}

fn count_down<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
