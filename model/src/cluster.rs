//! Facts about the cluster, as the sources told them.

use std::collections::{BTreeMap, BTreeSet};

use crate::kube::{EndpointSlice, Kind, Node, Object, ObjectKey, Service, ServiceCidr};
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
    service_cidrs: BTreeMap<String, ServiceCidr>,
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
}

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
                let known = self.services.get(&name) == Some(&service);
                self.services.insert(name.clone(), service);
                Touched::service(name, known)
            }
            Object::EndpointSlice(slice) => self.put_slice(slice),
            Object::Node(node) => {
                let name = node.metadata.name.clone();
                let known = self.nodes.get(&name) == Some(&node);
                self.nodes.insert(name.clone(), node);
                Touched::node(name, known)
            }
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
                let unknown = self.services.remove(&key.name).is_none();
                Touched::service(key.name, unknown)
            }
            Kind::EndpointSlice => {
                let mut touched = Touched::default();
                touched.services.extend(self.remove_slice(&key.name));
                touched
            }
            Kind::Node => {
                let unknown = self.nodes.remove(&key.name.name).is_none();
                Touched::node(key.name.name, unknown)
            }
            Kind::ServiceCidr => {
                Touched::cidrs(self.service_cidrs.remove(&key.name.name).is_none())
            }
        }
    }

    /// A slice may have moved from one Service to another: both are touched.
    fn put_slice(&mut self, slice: EndpointSlice) -> Touched {
        let mut touched = Touched::default();
        let name = slice.metadata.object_name();
        if self.slices.get(&name) == Some(&slice) {
            return touched;
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
    }
}
