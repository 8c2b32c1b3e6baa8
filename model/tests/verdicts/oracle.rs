//! What the specification says of a call, from the Services and their slices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};
use ferrule_model::kube::{SERVICE_NAME_LABEL, Service, ServicePort, WEIGHT_ANNOTATION};
use ferrule_model::network::DetectLocal;
use ferrule_model::service::Weight;
use ferrule_model::verdict::{Loss, Masquerade};

use crate::world::{Call, Client, EXEMPT, SERVICES, World, ip, is_here, own, pod, within};

/// Where the address of a frontend stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Cluster,
    NodePort,
    Balancer,
    External,
}

pub(crate) const FIELDS: [Field; 4] = [
    Field::Cluster,
    Field::NodePort,
    Field::Balancer,
    Field::External,
];

/// Addresses of a Service in a field: of a family without a cluster address none that are
/// called from outside.
pub(crate) fn addresses(service: &Service, field: Field) -> BTreeSet<IpAddr> {
    let cluster = || service.spec.cluster_ips.iter().map(|text| ip(text));
    let of: Vec<IpAddr> = match field {
        Field::Cluster => cluster().collect(),
        Field::NodePort => return BTreeSet::new(),
        Field::External => service
            .spec
            .external_ips
            .iter()
            .map(|text| ip(text))
            .collect(),
        Field::Balancer => {
            let ingress = &service.status.load_balancer.ingress;
            ingress.iter().map(|entry| ip(&entry.ip)).collect()
        }
    };
    // No range of cluster addresses holds one of a node.
    let of = of.into_iter();
    let of = of.filter(|ip| field != Field::Cluster || !own(*ip));
    of.filter(|ip| cluster().any(|other| other.is_ipv4() == ip.is_ipv4()))
        .collect()
}

pub(crate) fn has(service: &Service, port: &ServicePort, field: Field, key: &FrontendAddr) -> bool {
    let same_family = |text: &String| ip(text).is_ipv4() == key.ip.is_ipv4();
    port.protocol == key.protocol
        && match field {
            Field::NodePort => {
                own(key.ip)
                    && port.node_port == key.port
                    && service.spec.cluster_ips.iter().any(same_family)
            }
            Field::Cluster | Field::Balancer | Field::External => {
                port.port == key.port && addresses(service, field).contains(&key.ip)
            }
        }
}

/// Whether the Service asks to have its health told at this port.
fn is_checked(service: &Service, key: &FrontendAddr) -> bool {
    service.spec.external_traffic_policy == "Local"
        && service.spec.health_check_node_port == key.port
        && key.protocol == Protocol::Tcp
}

/// Usable endpoints with their weights: ready ones, else serving ones that terminate.
pub(crate) fn endpoints(
    world: &World,
    service: &Service,
    port: &ServicePort,
    v4: bool,
    local: bool,
) -> BTreeMap<BackendAddr, Weight> {
    let mut known: BTreeMap<BackendAddr, (bool, Weight)> = BTreeMap::new();
    for slice in &world.slices {
        if slice.metadata.labels[SERVICE_NAME_LABEL] != service.metadata.name {
            continue;
        }
        let weight = slice.metadata.annotations.get(WEIGHT_ANNOTATION);
        let weight = weight.map_or(1, |text| text.parse().unwrap());
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers.map(|p| p.port.unwrap()) {
            for endpoint in &slice.endpoints {
                let address = ip(&endpoint.addresses[0]);
                let ready = endpoint.conditions.ready.unwrap();
                let usable = ready || endpoint.conditions.terminating.unwrap();
                let here = endpoint.node_name.as_deref() == Some("n0");
                if address.is_ipv4() != v4 || !usable || (local && !here) {
                    continue;
                }
                let entry = known
                    .entry(BackendAddr::new(address, number))
                    .or_insert((ready, weight));
                // The ready copy wins; of two alike the greater weight counts.
                *entry = (*entry).max((ready, weight));
            }
        }
    }
    let any_ready = known.values().any(|(ready, _)| *ready);
    known.retain(|_, (ready, _)| *ready || !any_ready);
    known
        .into_iter()
        .map(|(addr, (_, weight))| (addr, weight))
        .collect()
}

/// What the specification says, less why: backends, each with its weight and the rows
/// of the masquerade table that ask for another source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Forwarded(BTreeMap<BackendAddr, (Weight, Vec<Masquerade>)>),
    Refused,
    Dropped(Loss),
    Unallocated,
    Served,
    Passed(Vec<Masquerade>),
}

impl World {
    pub(crate) fn says(&self, call: &Call) -> Said {
        let key = &call.target;
        let host_port =
            self.host_port && own(key.ip) && key.port == 30_080 && key.protocol == Protocol::Tcp;
        if host_port {
            let pod = if key.ip.is_ipv4() {
                "10.1.0.1"
            } else {
                "fd00:1::1"
            };
            let pod = BackendAddr::new(ip(pod), 8080);
            let rows = if call.who == pod.ip {
                vec![Masquerade::Hairpin]
            } else {
                vec![]
            };
            return Said::Forwarded(BTreeMap::from([(pod, (1, rows))]));
        }
        for service in self.by_age() {
            for port in &service.spec.ports {
                for field in FIELDS {
                    if has(service, port, field, key) {
                        return self.balanced(call, service, port, field);
                    }
                }
            }
            // The agent answers, and no younger Service has a node port there.
            if is_checked(service, key) && own(key.ip) {
                break;
            }
        }
        self.not_a_frontend(call)
    }

    fn not_a_frontend(&self, call: &Call) -> Said {
        let key = &call.target;
        let services = self.by_age();
        let holder = services.iter().find(|service| is_checked(service, key));
        let served = holder.is_some_and(|service| {
            !own(key.ip) && addresses(service, Field::Balancer).contains(&key.ip)
        });
        if served {
            return Said::Served;
        }
        if self.is_vip(key.ip) {
            return Said::Refused;
        }
        if within(key.ip, &SERVICES) {
            return Said::Unallocated;
        }
        let exempt = if self.exempt {
            &EXEMPT[..]
        } else {
            &["169.254.0.0/16"]
        };
        let beyond = !pod(key.ip) && !own(key.ip) && !within(key.ip, exempt);
        let egress = self.is_pod_of_this_node(call) && beyond;
        Said::Passed(if egress {
            vec![Masquerade::PodEgress]
        } else {
            vec![]
        })
    }

    pub(crate) fn is_vip(&self, ip: IpAddr) -> bool {
        let mut services = self.services.iter();
        services.any(|service| {
            FIELDS
                .iter()
                .any(|field| !own(ip) && addresses(service, *field).contains(&ip))
        })
    }

    fn balanced(&self, call: &Call, service: &Service, port: &ServicePort, field: Field) -> Said {
        let v4 = call.target.ip.is_ipv4();
        let ranges = service.spec.load_balancer_source_ranges.iter();
        let ranges: Vec<&str> = ranges
            .map(String::as_str)
            .filter(|text| text.contains(':') != v4)
            .collect();
        let balancer = addresses(service, Field::Balancer).contains(&call.target.ip)
            && matches!(field, Field::Balancer | Field::Cluster);
        let open = !balancer || ranges.is_empty() || ranges.contains(&"::/0");
        if !open && !within(call.who, &ranges) {
            return Said::Dropped(Loss::NotAdmitted);
        }
        let external = field != Field::Cluster;
        let policy = if external {
            &service.spec.external_traffic_policy
        } else {
            &service.spec.internal_traffic_policy
        };
        let within_cluster = call.client != Client::Stranger;
        let all = endpoints(self, service, port, v4, false);
        let local = policy == "Local" && !(external && within_cluster);
        let chosen = if local {
            endpoints(self, service, port, v4, true)
        } else {
            all.clone()
        };
        if chosen.is_empty() && !all.is_empty() {
            return Said::Dropped(Loss::NoLocalEndpoint);
        }
        let takers = chosen.into_iter().filter(|(_, weight)| *weight > 0);
        let forwarded: BTreeMap<_, _> = takers
            .map(|(addr, weight)| (addr, (weight, self.rows(call, field, policy, addr.ip))))
            .collect();
        if forwarded.is_empty() {
            Said::Refused
        } else {
            Said::Forwarded(forwarded)
        }
    }

    /// Rows of the masquerade table that hold for a client and the backend that it got.
    fn rows(&self, call: &Call, field: Field, policy: &str, backend: IpAddr) -> Vec<Masquerade> {
        // What stays on the node comes back by itself.
        if own(backend) {
            return Vec::new();
        }
        let mut rows = Vec::new();
        let external = field != Field::Cluster;
        let beyond = call.client != Client::Node && !self.is_pod_of_this_node(call);
        // Who is elsewhere is led by its own node.
        if backend == call.who && is_here(backend) {
            rows.push(Masquerade::Hairpin);
        }
        if call.client == Client::Node && !own(call.target.ip) {
            rows.push(Masquerade::ViaVip);
        }
        if external && beyond && (policy == "Cluster" || !is_here(backend)) {
            rows.push(Masquerade::OffNode);
        }
        // Also of another node: the backend would answer it and not this node.
        if pod(call.who) && !pod(backend) {
            rows.push(Masquerade::PodEgress);
        }
        if !external && self.masquerade_all {
            rows.push(Masquerade::All);
        }
        if !external && self.is_foreign(call) {
            rows.push(Masquerade::OffCluster);
        }
        rows
    }

    /// Without a range of the node its pods are like those of others.
    fn is_pod_of_this_node(&self, call: &Call) -> bool {
        call.client == Client::PodHere && self.has_range(call)
    }

    fn has_range(&self, call: &Call) -> bool {
        self.ranges[usize::from(call.target.ip.is_ipv6())]
    }

    fn is_foreign(&self, call: &Call) -> bool {
        match (&self.detect_local, call.client, call.device) {
            (None, ..) | (_, Client::Node, _) => false,
            (Some(DetectLocal::ClusterCidr), client, _) => client == Client::Stranger,
            (Some(DetectLocal::NodeCidr), client, _) => {
                self.has_range(call) && client != Client::PodHere
            }
            (Some(DetectLocal::BridgeInterface(_)), _, device) => device != Some("cni0"),
            (Some(DetectLocal::InterfaceNamePrefix(_)), _, device) => device == Some("uplink"),
        }
    }
}
