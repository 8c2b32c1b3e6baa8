//! Facts about the cluster, as the sources told them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;

use crate::address::{BackendAddr, parse_address};
use crate::kube::{
    AddressKind, Endpoint, EndpointSlice, Kind, LOST_TAINTS, Node, Object, ObjectKey, Service,
    ServiceCidr,
};
use crate::names::ObjectName;

/// One step of what a source tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The object exists and is like this.
    Applied(Box<Object>),
    /// The object is gone.
    Deleted(ObjectKey),
}

/// Every object that the sources hold, and which slice belongs to which Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClusterState {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    /// Slices by the Service that their label names.
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    nodes: BTreeMap<String, Node>,
    /// Whether a Node that is not among them is gone.
    all_nodes: bool,
    /// Nodes that were there once, at most [`GONE_NODES`].
    gone_nodes: BTreeSet<String>,
    /// The same in the order in which they went.
    gone_order: VecDeque<String>,
    /// Nodes by each of their addresses.
    nodes_at: Index<String>,
    /// Services by each address that they name and no ServiceCIDR gave them: a Node
    /// may have it.
    named: Index<ObjectName>,
    service_cidrs: BTreeMap<String, ServiceCidr>,
}

/// How many names of Nodes that are gone are kept.
const GONE_NODES: usize = 4096;

/// What has each address.
type Index<K> = BTreeMap<IpAddr, BTreeSet<K>>;

/// What slices say of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The node it is on.
    pub node: Option<String>,
    /// Whether its pod is being ended.
    pub terminating: bool,
}

/// What an event touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Services whose frontends or backends may differ now.
    pub services: BTreeSet<ObjectName>,
    /// Nodes that came, changed or went.
    pub nodes: BTreeSet<String>,
    /// Whether the ranges of cluster addresses may differ now.
    pub service_cidrs: bool,
    /// What was said last of endpoints that a slice names no longer.
    pub left: Left,
}

/// What slices said of endpoints that they name no longer.
pub type Left = BTreeMap<BackendAddr, Listing>;

impl ClusterState {
    /// Takes an event in. Telling what is known already touches nothing.
    pub fn apply(&mut self, event: Event) -> Touched {
        match event {
            Event::Applied(object) => self.put(*object),
            Event::Deleted(key) => self.remove(key),
        }
    }

    fn put(&mut self, object: Object) -> Touched {
        match object {
            Object::Service(service) => {
                let name = service.metadata.object_name();
                let new = named_addresses(&service);
                let old = self.services.insert(name.clone(), service);
                let known = old.as_ref() == self.services.get(&name);
                let old = old.as_ref().map(named_addresses).unwrap_or_default();
                move_entries(&mut self.named, &name, &old, &new);
                Touched::service(name, known)
            }
            Object::EndpointSlice(slice) => self.put_slice(slice),
            Object::Node(node) => self.put_node(node),
            Object::ServiceCidr(cidr) => {
                let name = cidr.metadata.name.clone();
                let known = self.service_cidrs.get(&name) == Some(&cidr);
                self.service_cidrs.insert(name, cidr);
                Touched::cidrs(known)
            }
        }
    }

    fn remove(&mut self, key: ObjectKey) -> Touched {
        match key.kind {
            Kind::Service => {
                let old = self.services.remove(&key.name);
                let addresses = old.as_ref().map(named_addresses).unwrap_or_default();
                move_entries(&mut self.named, &key.name, &addresses, &BTreeSet::new());
                Touched::service(key.name, old.is_none())
            }
            Kind::EndpointSlice => {
                let mut touched = Touched::default();
                if let Some(slice) = self.slices.get(&key.name) {
                    touched.left = left(slice, &[]);
                }
                touched.services.extend(self.remove_slice(&key.name));
                touched
            }
            Kind::Node => {
                let old = self.nodes.remove(&key.name.name);
                if old.is_some() {
                    self.note_gone(&key.name.name);
                }
                let mut touched = self.move_node(&key.name.name, old.as_ref(), None);
                touched.merge(Touched::node(key.name.name, old.is_none()));
                touched
            }
            Kind::ServiceCidr => {
                Touched::cidrs(self.service_cidrs.remove(&key.name.name).is_none())
            }
        }
    }

    fn put_node(&mut self, node: Node) -> Touched {
        let name = node.metadata.name.clone();
        let old = self.nodes.get(&name).cloned();
        let mut touched = self.move_node(&name, old.as_ref(), Some(&node));
        touched.merge(Touched::node(name.clone(), old.as_ref() == Some(&node)));
        if self.gone_nodes.remove(&name) {
            self.gone_order.retain(|gone| *gone != name);
        }
        self.nodes.insert(name, node);
        touched
    }

    fn note_gone(&mut self, node: &str) {
        if self.gone_nodes.insert(node.to_owned()) {
            self.gone_order.push_back(node.to_owned());
        }
        if self.gone_order.len() > GONE_NODES
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone_nodes.remove(&oldest);
        }
    }

    /// Which Node has an address decides about the Services that name it.
    fn move_node(&mut self, name: &String, old: Option<&Node>, new: Option<&Node>) -> Touched {
        let old = old.map(node_addresses).unwrap_or_default();
        let new = new.map(node_addresses).unwrap_or_default();
        move_entries(&mut self.nodes_at, name, &old, &new);
        let services = old.symmetric_difference(&new);
        let services = services.filter_map(|ip| self.named.get(ip)).flatten();
        Touched {
            services: services.cloned().collect(),
            ..Touched::default()
        }
    }

    /// A slice may have moved from one Service to another: both are touched.
    fn put_slice(&mut self, slice: EndpointSlice) -> Touched {
        let mut touched = Touched::default();
        let name = slice.metadata.object_name();
        match self.slices.get(&name) {
            Some(former) if *former == slice => return touched,
            Some(former) => touched.left = left(former, &slice.endpoints),
            None => {}
        }
        touched.services.extend(self.remove_slice(&name));
        if let Some(service) = slice.service() {
            self.slices_of
                .entry(service.clone())
                .or_default()
                .insert(name.clone());
            touched.services.insert(service);
        }
        self.slices.insert(name, slice);
        touched
    }

    fn remove_slice(&mut self, name: &ObjectName) -> Option<ObjectName> {
        let service = self.slices.remove(name)?.service()?;
        if let Some(names) = self.slices_of.get_mut(&service) {
            names.remove(name);
            if names.is_empty() {
                self.slices_of.remove(&service);
            }
        }
        Some(service)
    }

    /// The Service of that name.
    #[must_use]
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// Every Service, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = (&ObjectName, &Service)> {
        self.services.iter()
    }

    /// The slices of a Service, by name.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> {
        self.slices_of
            .get(service)
            .into_iter()
            .flatten()
            .filter_map(|name| self.slices.get(name))
    }

    /// The Node of that name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// Every Node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (&**name, node))
    }

    /// Notes that every Node of a cluster was told: see [`ClusterState::is_unheard_of`].
    pub fn know_all_nodes(&mut self) {
        self.all_nodes = true;
    }

    /// Whether the Node of that name was seen to go, or is tainted as lost. Where there are no
    /// Nodes at all nothing is known: a folder of manifests may have one object alone.
    #[must_use]
    pub fn is_lost(&self, name: &str) -> bool {
        match self.nodes.get(name) {
            None => !self.nodes.is_empty() && self.gone_nodes.contains(name),
            Some(node) => {
                let mut taints = node.spec.taints.iter();
                taints.any(|taint| LOST_TAINTS.contains(&&*taint.key))
            }
        }
    }

    /// Whether every Node of the cluster was told once, and that of this name is not among them.
    /// It went before that, or came since, and its object is behind others.
    #[must_use]
    pub fn is_unheard_of(&self, name: &str) -> bool {
        self.all_nodes && !self.nodes.is_empty() && !self.nodes.contains_key(name)
    }

    /// What the slices of all Services say of these endpoints; one that is in none is left
    /// out. Where several say something, whoever says that it lives counts.
    #[must_use]
    pub fn listed(&self, backends: &BTreeSet<BackendAddr>) -> BTreeMap<BackendAddr, Listing> {
        listed(self.slices.values(), backends)
    }

    /// The first Node but `node` that has this address.
    #[must_use]
    pub fn other_node_at(&self, ip: IpAddr, node: &str) -> Option<&str> {
        let mut names = self.nodes_at.get(&ip)?.iter();
        names.find(|name| *name != node).map(String::as_str)
    }

    /// Every ServiceCIDR, by name.
    pub fn service_cidrs(&self) -> impl Iterator<Item = (&str, &ServiceCidr)> {
        self.service_cidrs
            .iter()
            .map(|(name, cidr)| (&**name, cidr))
    }

    /// How many EndpointSlices there are.
    #[must_use]
    pub fn slice_count(&self) -> usize {
        self.slices.len()
    }

    /// How many Services there are.
    #[must_use]
    pub fn service_count(&self) -> usize {
        self.services.len()
    }
}

/// Several pods may have one address, that of their node: the port tells them apart. A slice
/// without a number may mean any.
fn listed<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    backends: &BTreeSet<BackendAddr>,
) -> BTreeMap<BackendAddr, Listing> {
    let mut listed: BTreeMap<BackendAddr, Listing> = BTreeMap::new();
    let mut ports: BTreeMap<IpAddr, Vec<BackendAddr>> = BTreeMap::new();
    for backend in backends {
        ports.entry(backend.ip).or_default().push(*backend);
    }
    // Nearly all addresses are written as we would write them.
    let texts: HashMap<String, IpAddr> = ports.keys().map(|ip| (ip.to_string(), *ip)).collect();
    for slice in slices {
        let has = |port: u16| {
            let mut numbers = slice.ports.iter().map(|port| port.port);
            numbers.any(|number| number.is_none_or(|number| number == port))
        };
        for endpoint in &slice.endpoints {
            let Some(text) = endpoint.addresses.first() else {
                continue;
            };
            let ip = texts.get(text.as_str()).copied().or_else(|| {
                let ip = text.contains(':').then(|| parse_address(text).ok())?;
                ip.filter(|ip| ports.contains_key(ip))
            });
            let at = ip.and_then(|ip| ports.get(&ip)).into_iter().flatten();
            for backend in at.filter(|backend| has(backend.port)) {
                let terminating = endpoint.conditions.terminating.unwrap_or(false);
                let listing = listed.entry(*backend).or_insert_with(|| Listing {
                    node: None,
                    terminating,
                });
                listing.terminating &= terminating;
                if listing.node.is_none() {
                    listing.node.clone_from(&endpoint.node_name);
                }
            }
        }
    }
    listed
}

/// What a slice said of endpoints that are not among these.
fn left(former: &EndpointSlice, endpoints: &[Endpoint]) -> Left {
    let still: HashSet<&str> = endpoints
        .iter()
        .filter_map(|endpoint| endpoint.addresses.first())
        .map(String::as_str)
        .collect();
    let gone = former.endpoints.iter().filter_map(|endpoint| {
        let text = endpoint.addresses.first()?;
        let ip = (!still.contains(text.as_str())).then(|| parse_address(text).ok())??;
        Some((ip, endpoint))
    });
    let gone = gone.flat_map(|(ip, endpoint)| {
        let ports = former.ports.iter().filter_map(|port| port.port);
        let backends = ports.map(move |port| BackendAddr::new(ip, port));
        backends.map(|backend| {
            let listing = Listing {
                node: endpoint.node_name.clone(),
                terminating: endpoint.conditions.terminating.unwrap_or(false),
            };
            (backend, listing)
        })
    });
    gone.collect()
}

/// The addresses that a Service names itself: `spec.externalIPs` and those of its
/// load balancer.
fn named_addresses(service: &Service) -> BTreeSet<IpAddr> {
    let entries = &service.status.load_balancer.ingress;
    let texts = entries.iter().map(|entry| &entry.ip);
    let texts = texts.chain(&service.spec.external_ips);
    texts.filter_map(|text| parse_address(text).ok()).collect()
}

fn node_addresses(node: &Node) -> BTreeSet<IpAddr> {
    let kinds = [AddressKind::InternalIP, AddressKind::ExternalIP];
    let texts = kinds.into_iter().flat_map(|kind| node.addresses_of(kind));
    texts.filter_map(|text| parse_address(text).ok()).collect()
}

fn move_entries<K: Clone + Ord>(
    index: &mut Index<K>,
    key: &K,
    old: &BTreeSet<IpAddr>,
    new: &BTreeSet<IpAddr>,
) {
    for ip in old.difference(new) {
        if let Some(keys) = index.get_mut(ip) {
            keys.remove(key);
            if keys.is_empty() {
                index.remove(ip);
            }
        }
    }
    for ip in new.difference(old) {
        index.entry(*ip).or_default().insert(key.clone());
    }
}

impl Touched {
    fn service(name: ObjectName, no_news: bool) -> Self {
        let mut touched = Self::default();
        if !no_news {
            touched.services.insert(name);
        }
        touched
    }

    fn node(name: String, no_news: bool) -> Self {
        let mut touched = Self::default();
        if !no_news {
            touched.nodes.insert(name);
        }
        touched
    }

    fn cidrs(no_news: bool) -> Self {
        Self {
            service_cidrs: !no_news,
            ..Self::default()
        }
    }

    /// Adds what another event touched.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.nodes.extend(other.nodes);
        self.service_cidrs |= other.service_cidrs;
        self.left.extend(other.left);
    }
}
