//! What one Service asks for, before conflicts with others are settled.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::address::{Family, FrontendAddr, Protocol, parse_address};
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::endpoints::{self, BackendState, Backends, Choice, Place};
use crate::frontend::{Action, Frontend, FrontendKind, Internal};
use crate::kube::{Kind, ObjectKey, PROXY_NAME_LABEL, Service, ServicePort, ServiceType};
use crate::marks::MarkHolder;
use crate::names::ObjectName;
use crate::network::NodeFacts;
use crate::policy_words::{TrafficPolicy, note_unknown};
use crate::scheduling::{self, Weights};
use crate::service::Scheduling;
use crate::source_ranges::SourceRanges;
use crate::time::Timestamp;
use crate::vips::Vips;

/// What one Service asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServicePlan {
    pub(crate) frontends: BTreeMap<FrontendAddr, Frontend>,
    pub(crate) conditions: Vec<Condition>,
    pub(crate) created: Created,
    /// Backends that run on this node, and so may call themselves.
    pub(crate) hairpins: BTreeSet<IpAddr>,
    pub(crate) health_check: Option<HealthCheck>,
    /// Where a program of this node answers at a VIP: load balancers ask for the
    /// health there.
    pub(crate) served: BTreeSet<FrontendAddr>,
    /// Likewise, also at addresses of this node, where nothing stands in the way.
    pub(crate) asked: BTreeSet<FrontendAddr>,
    /// Where it answers at addresses that serve node ports: claimed like frontends, and none.
    pub(crate) checked: BTreeSet<FrontendAddr>,
}

impl ServicePlan {
    /// How clients within the cluster fare, by service port and family.
    pub(crate) fn internals(&self) -> BTreeMap<&MarkHolder, BTreeMap<Family, &Internal>> {
        let mut internals: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for (addr, frontend) in &self.frontends {
            if let Some(internal) = &frontend.internal {
                let of_holder = internals.entry(&internal.holder).or_default();
                of_holder.insert(Family::of(addr.ip), internal);
            }
        }
        internals
    }
}

/// Age of a Service; one without a time stamp counts as younger than any with one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Created {
    At(Timestamp),
    #[default]
    Unknown,
}

/// By what a load balancer learns whether this node has endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// `spec.healthCheckNodePort`.
    pub port: u16,
    /// Ready endpoints on this node, of each family that the Service has.
    pub ready: BTreeMap<Family, usize>,
}

impl HealthCheck {
    /// Ready endpoints on this node; a pod with an address of each family is one.
    #[must_use]
    pub fn local_endpoints(&self) -> usize {
        self.ready.values().copied().max().unwrap_or(0)
    }

    /// What is answered at an address of a family: a frontend of one family has no backend of
    /// another. A family that the Service does not have says nothing of its own.
    #[must_use]
    pub fn local_endpoints_of(&self, family: Family) -> usize {
        let of_family = self.ready.get(&family).copied();
        of_family.unwrap_or_else(|| self.local_endpoints())
    }
}

fn asks_for_us(service: &Service, proxy_name: Option<&str>) -> bool {
    let asked = service.metadata.labels.get(PROXY_NAME_LABEL);
    asked.is_none_or(|name| Some(name.as_str()) == proxy_name)
}

/// The cluster addresses of a Service that asks for another proxy: ours serves nothing there,
/// and neither does it refuse.
pub(crate) fn left_to_another(service: &Service, proxy_name: Option<&str>) -> BTreeSet<IpAddr> {
    if asks_for_us(service, proxy_name) {
        return BTreeSet::new();
    }
    let spec = &service.spec;
    let texts = spec.cluster_ips.iter().chain([&spec.cluster_ip]);
    texts.filter_map(|text| parse_address(text).ok()).collect()
}

/// Headless Services, external names, those that ask for another proxy and those
/// that have no address yet are not.
fn is_ours_to_serve(service: &Service, proxy_name: Option<&str>) -> bool {
    let spec = &service.spec;
    let mut ips = std::iter::once(&spec.cluster_ip).chain(&spec.cluster_ips);
    let headless = ips.clone().any(|text| text.eq_ignore_ascii_case("none"));
    let has_address = ips.any(|text| !text.is_empty());
    let asks_for_us = asks_for_us(service, proxy_name);
    spec.service_type != ServiceType::ExternalName && asks_for_us && !headless && has_address
}

/// What it takes to plan one Service.
pub(crate) struct Planner<'a> {
    pub(crate) cluster: &'a ClusterState,
    pub(crate) name: &'a ObjectName,
    pub(crate) node: &'a str,
    pub(crate) facts: &'a NodeFacts,
}

/// What holds for all ports of a Service.
struct Common {
    vips: Vips,
    scheduling: Scheduling,
    weights: Weights,
    ranges: SourceRanges,
    internal: TrafficPolicy,
    external: TrafficPolicy,
}

impl Planner<'_> {
    pub(crate) fn plan(&self, service: &Service) -> ServicePlan {
        let mut plan = ServicePlan {
            created: service
                .metadata
                .creation_timestamp
                .map_or(Created::Unknown, Created::At),
            ..ServicePlan::default()
        };
        if !is_ours_to_serve(service, self.facts.proxy_name.as_deref()) {
            return plan;
        }
        let said = &mut plan.conditions;
        note_unknown(self.name, service, said);
        self.note_slice_weights(said);
        let vips = Vips::of(service, self, said);
        let common = Common {
            scheduling: scheduling::of_service(self.name, service, self.facts, said),
            weights: Weights::new(self.name, service, said),
            ranges: SourceRanges::of(self.name, service, &vips, said),
            internal: TrafficPolicy::internal(service),
            external: TrafficPolicy::external(service),
            vips,
        };
        let mut ready = BTreeMap::new();
        for port in &service.spec.ports {
            if port.port == 0 {
                let message = "spec.ports[].port is 0; give a number from 1 to 65535".to_owned();
                let invalid = condition(self.name, Reason::InvalidPort, message);
                plan.conditions.push(invalid);
                continue;
            }
            self.note_node_port(port, &mut plan.conditions);
            self.note_ftp(port, &common.scheduling, &mut plan.conditions);
            let mut duplicates = BTreeSet::new();
            for family in &common.vips.families {
                let choice = endpoints::choose(
                    self.cluster.slices_of(self.name),
                    port,
                    *family,
                    Place {
                        node: self.node,
                        zone: self.facts.zone.as_deref(),
                    },
                    &common.weights,
                    &mut plan.conditions,
                );
                note_ready(*family, &choice.local, &mut ready);
                let port = Port {
                    spec: port,
                    family: *family,
                    choice: &choice,
                };
                self.add_port(&port, &common, &mut plan.frontends, &mut duplicates);
            }
            for (field, number) in duplicates {
                let message = format!(
                    "spec.ports[].{field}: {number}/{} stands twice, the first is served; remove the other",
                    port.protocol
                );
                let duplicate = condition(self.name, Reason::DuplicatePort, message);
                plan.conditions.push(duplicate);
            }
        }
        plan.hairpins = self.hairpins(&plan.frontends);
        plan.health_check = health_check(service, common.external, &ready);
        if let Some(check) = &plan.health_check {
            let at = |ip: &IpAddr| FrontendAddr::new(*ip, check.port, Protocol::Tcp);
            plan.asked = common.vips.balancer.iter().map(at).collect();
            // The node's own addresses have no guard that would refuse it there.
            let vips = common.vips.balancer.difference(&self.facts.own);
            plan.served = vips.map(at).collect();
            let node = self.facts.node_ports.iter().map(at);
            // Its own node port there says nothing of health, and is served.
            let (taken, free) = node.partition(|addr| plan.frontends.contains_key(addr));
            plan.checked = free;
            if !BTreeSet::is_empty(&taken) {
                let message = format!(
                    "spec.healthCheckNodePort: {}/TCP is a nodePort of the Service, too, which is \
                     served at the addresses of nodes; give one of the two another port",
                    check.port
                );
                let duplicate = condition(self.name, Reason::DuplicatePort, message);
                plan.conditions.push(duplicate);
            }
        }
        plan
    }

    /// Also where no port of the Service uses the slice: it is wrong all the same.
    fn note_slice_weights(&self, conditions: &mut Vec<Condition>) {
        for slice in self.cluster.slices_of(self.name) {
            if let Some(message) = scheduling::slice_fault(slice) {
                conditions.push(Condition {
                    object: ObjectKey {
                        kind: Kind::EndpointSlice,
                        name: slice.metadata.object_name(),
                    },
                    reason: Reason::InvalidAnnotation,
                    message,
                });
            }
        }
    }

    /// The backends on this node that some client may be led to.
    fn hairpins(&self, frontends: &BTreeMap<FrontendAddr, Frontend>) -> BTreeSet<IpAddr> {
        let backends = frontends.values().flat_map(|frontend| {
            let internal = frontend.internal.iter();
            let internal = internal.flat_map(|internal| &internal.backends);
            frontend.backends.iter().chain(internal)
        });
        let pods = &self.facts.pods;
        let here = backends.filter(|(addr, backend)| {
            backend.local || pods.iter().any(|pods| pods.contains(addr.ip))
        });
        here.map(|(addr, _)| addr.ip).collect()
    }

    fn note_node_port(&self, port: &ServicePort, conditions: &mut Vec<Condition>) {
        let range = &self.facts.node_port_range;
        if port.node_port == 0 || range.contains(&port.node_port) {
            return;
        }
        let outside = condition(
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
        if !conditions.contains(&outside) {
            conditions.push(outside);
        }
    }

    fn note_ftp(
        &self,
        port: &ServicePort,
        scheduling: &Scheduling,
        conditions: &mut Vec<Condition>,
    ) {
        let ports = [("port", port.port), ("nodePort", port.node_port)];
        let taken = ports.into_iter().find(|(_, number)| {
            scheduling.persistence.is_some()
                && scheduling::takes_other_ports(*number, port.protocol)
        });
        if let Some((field, number)) = taken {
            let message = format!(
                "spec.ports[].{field}: with persistence IPVS takes {number}/TCP for FTP and opens \
                 every other port of the address; clients keep to one backend by a hash instead, \
                 without a time-out, use another port or do without sessionAffinity"
            );
            let said = condition(self.name, Reason::Unsupported, message);
            if !conditions.contains(&said) {
                conditions.push(said);
            }
        }
    }

    fn add_port(
        &self,
        port: &Port<'_>,
        common: &Common,
        frontends: &mut BTreeMap<FrontendAddr, Frontend>,
        duplicates: &mut BTreeSet<(&'static str, u16)>,
    ) {
        let vips = &common.vips;
        let nodes = if port.spec.node_port == 0 {
            &BTreeSet::new()
        } else {
            &self.facts.node_ports
        };
        for (kind, ips, number) in [
            (FrontendKind::ClusterIP, &vips.cluster, port.spec.port),
            (FrontendKind::LoadBalancer, &vips.balancer, port.spec.port),
            (FrontendKind::NodePort, nodes, port.spec.node_port),
            (FrontendKind::ExternalIP, &vips.external, port.spec.port),
        ] {
            for ip in ips.iter().filter(|ip| Family::of(**ip) == port.family) {
                let addr = FrontendAddr::new(*ip, number, port.spec.protocol);
                match frontends.get(&addr) {
                    None => {
                        frontends.insert(addr, self.frontend(kind, addr, port, common));
                    }
                    // One address in two fields of the Service.
                    Some(first) if first.kind != kind && first.port_name == port.spec.name => {}
                    Some(_) => {
                        let field = match kind {
                            FrontendKind::NodePort => "nodePort",
                            FrontendKind::HostPort => "hostPort",
                            FrontendKind::ClusterIP
                            | FrontendKind::ExternalIP
                            | FrontendKind::LoadBalancer => "port",
                        };
                        duplicates.insert((field, number));
                    }
                }
            }
        }
    }

    fn frontend(
        &self,
        kind: FrontendKind,
        addr: FrontendAddr,
        port: &Port<'_>,
        common: &Common,
    ) -> Frontend {
        let scheduling = if scheduling::takes_other_ports(addr.port, addr.protocol) {
            scheduling::without_persistence(&common.scheduling, self.facts)
        } else {
            common.scheduling.clone()
        };
        let policy = if kind.is_external() {
            common.external
        } else {
            common.internal
        };
        let (backends, empty) = port.fare(policy);
        Frontend {
            kind,
            is_vip: !self.facts.own.contains(&addr.ip),
            holder: self.name.clone(),
            port_name: port.spec.name.clone(),
            scheduling,
            backends: backends.clone(),
            empty,
            preserves_client: kind.is_external() && policy == TrafficPolicy::Local,
            // An address that is also another is filtered as the balancer's.
            source_ranges: match kind {
                FrontendKind::LoadBalancer | FrontendKind::ClusterIP
                    if common.vips.balancer.contains(&addr.ip) =>
                {
                    common.ranges.of_family(Family::of(addr.ip)).clone()
                }
                FrontendKind::LoadBalancer
                | FrontendKind::ClusterIP
                | FrontendKind::NodePort
                | FrontendKind::ExternalIP
                | FrontendKind::HostPort => BTreeSet::new(),
            },
            internal: (kind.is_external() && policy == TrafficPolicy::Local)
                .then(|| self.internal(port, common))
                .flatten(),
        }
    }

    /// How clients within the cluster fare under policy Local: they use the endpoints
    /// of all nodes, also where these are those of this node just now. Their connections
    /// would end with the virtual service otherwise, whenever that becomes so.
    fn internal(&self, port: &Port<'_>, common: &Common) -> Option<Internal> {
        let cluster = &port.choice.cluster;
        (!cluster.is_empty()).then(|| Internal {
            holder: MarkHolder {
                service: self.name.clone(),
                port: port.spec.name.clone(),
                protocol: port.spec.protocol,
            },
            scheduling: scheduling::without_persistence(&common.scheduling, self.facts),
            affinity: common.scheduling.persistence,
            backends: cluster.clone(),
        })
    }
}

/// One service port in one family.
struct Port<'a> {
    spec: &'a ServicePort,
    family: Family,
    choice: &'a Choice,
}

impl Port<'_> {
    /// The backends under a policy, and what happens where there are none.
    fn fare(&self, policy: TrafficPolicy) -> (&Backends, Action) {
        match policy {
            TrafficPolicy::Cluster => (&self.choice.cluster, Action::Reject),
            TrafficPolicy::Local if self.choice.cluster.is_empty() => {
                (&self.choice.local, Action::Reject)
            }
            // Load balancers go on to a node that has one.
            TrafficPolicy::Local => (&self.choice.local, Action::Drop),
        }
    }
}

fn note_ready(family: Family, local: &Backends, ready: &mut BTreeMap<Family, BTreeSet<IpAddr>>) {
    let of_family = ready.entry(family).or_default();
    let addresses = local
        .iter()
        .filter(|(_, backend)| backend.state == BackendState::Ready);
    of_family.extend(addresses.map(|(addr, _)| addr.ip));
}

fn health_check(
    service: &Service,
    external: TrafficPolicy,
    ready: &BTreeMap<Family, BTreeSet<IpAddr>>,
) -> Option<HealthCheck> {
    let port = service.spec.health_check_node_port;
    let asked = service.spec.service_type == ServiceType::LoadBalancer
        && external == TrafficPolicy::Local
        && port != 0;
    asked.then(|| HealthCheck {
        port,
        ready: ready
            .iter()
            .map(|(family, ips)| (*family, ips.len()))
            .collect(),
    })
}
