//! The parts of Kubernetes objects that Ferrule reads.
//!
//! Slim on purpose: a full `EndpointSlice` of 50 endpoints costs six times the
//! memory. The types follow the API's JSON, `null` counts as absent, fields not
//! named here are skipped. Sources: `core/v1` Service and Node,
//! `discovery.k8s.io/v1` EndpointSlice, `networking.k8s.io/v1` ServiceCIDR.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

use crate::address::Protocol;
use crate::names::ObjectName;
use crate::time::Timestamp;

/// Label that ties an EndpointSlice to its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Label of slices that belong to a headless Service.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Label by which a Service asks for another proxy than the node's usual one.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

/// The API treats `null` like a field that is not there; serde's `default` does not.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// A port, with an error that says what one looks like; `null` is 0, the API's "none".
fn port_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    optional_port(deserializer).map(Option::unwrap_or_default)
}

/// Likewise, where 0 and `null` differ.
fn optional_port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    deserializer.deserialize_option(PortNumber)
}

struct PortNumber;

impl PortNumber {
    fn check<N, E>(number: N) -> Result<Option<u16>, E>
    where
        N: Copy + fmt::Display,
        u16: TryFrom<N>,
        E: de::Error,
    {
        u16::try_from(number).map(Some).map_err(|_| {
            E::custom(format!(
                "{number} is not a port number; give one from 1 to 65535"
            ))
        })
    }
}

impl<'de> Visitor<'de> for PortNumber {
    type Value = Option<u16>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a port number from 1 to 65535, without quotes")
    }

    fn visit_none<E>(self) -> Result<Option<u16>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<u16>, D::Error> {
        deserializer.deserialize_i64(self)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Option<u16>, E> {
        Self::check(number)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Option<u16>, E> {
        Self::check(number)
    }
}

/// Label of a Node that names its zone.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Annotations by which a Service chooses its scheduler: ours, which wins, and kube-router's.
pub const SCHEDULER_ANNOTATIONS: [&str; 2] =
    ["ferrule.io/scheduler", "kube-router.io/service.scheduler"];

/// Likewise, the scheduler's flags.
pub const FLAGS_ANNOTATIONS: [&str; 2] = [
    "ferrule.io/scheduler-flags",
    "kube-router.io/service.schedflags",
];

/// Annotation of a Service, or of a slice, that gives its endpoints their weight.
pub const WEIGHT_ANNOTATION: &str = "ferrule.io/weight";

/// Annotation of a Service that gives single endpoints their weight, by address or pod.
pub const WEIGHTS_ANNOTATION: &str = "ferrule.io/endpoint-weights";

/// Annotation of a slice: when the change of a pod or Service was made that it shows. Of
/// interest to who measures how long changes take; nothing is decided by it.
pub const TRIGGER_TIME_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";

/// Taint of a Node that the cluster autoscaler is about to remove.
pub const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

fn is_known_annotation(key: &str) -> bool {
    let mut schedulers = SCHEDULER_ANNOTATIONS.iter().chain(&FLAGS_ANNOTATIONS);
    let others = [
        WEIGHT_ANNOTATION,
        WEIGHTS_ANNOTATION,
        TRIGGER_TIME_ANNOTATION,
    ];
    others.contains(&key) || schedulers.any(|known| *known == key)
}

/// Texts by key. A value that is `null` is empty, as the API server reads it: charts
/// write `label:` with nothing behind it.
fn texts<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let texts: BTreeMap<String, Option<String>> = null_is_default(deserializer)?;
    let texts = texts.into_iter();
    Ok(texts
        .map(|(key, text)| (key, text.unwrap_or_default()))
        .collect())
}

/// The annotations that we read; others may be as long as the object itself.
fn known_annotations<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    let mut annotations = texts(deserializer)?;
    annotations.retain(|key, _| is_known_annotation(key));
    Ok(annotations)
}

/// What all objects have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectMeta {
    /// Name within the namespace.
    pub name: String,
    /// Namespace; `None` in manifests means `default`, and for a Node nothing.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Labels.
    #[serde(default, deserialize_with = "texts")]
    pub labels: BTreeMap<String, String>,
    /// Annotations that we read, and no others.
    #[serde(default, deserialize_with = "known_annotations")]
    pub annotations: BTreeMap<String, String>,
    /// When the object was made.
    #[serde(default)]
    pub creation_timestamp: Option<Timestamp>,
    /// When somebody asked that it be deleted; it is there until its finalizers are done.
    #[serde(default)]
    pub deletion_timestamp: Option<Timestamp>,
}

impl ObjectMeta {
    /// Namespace and name of a namespaced object.
    #[must_use]
    pub fn object_name(&self) -> ObjectName {
        ObjectName::new(namespace(self.namespace.as_deref()), &*self.name)
    }
}

/// The namespace of an object that has one; absent and empty mean `default`.
#[must_use]
pub fn namespace(written: Option<&str>) -> &str {
    written.filter(|text| !text.is_empty()).unwrap_or("default")
}

/// `core/v1` Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Service {
    /// Name, labels and age.
    pub metadata: ObjectMeta,
    /// What is asked for.
    #[serde(default, deserialize_with = "null_is_default")]
    pub spec: ServiceSpec,
    /// What the cluster gave.
    #[serde(default, deserialize_with = "null_is_default")]
    pub status: ServiceStatus,
}

/// `ServiceSpec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// Kind of service; ClusterIP when absent.
    #[serde(default, rename = "type", deserialize_with = "null_is_default")]
    pub service_type: ServiceType,
    /// The first cluster address, or `None` (the word) for a headless Service.
    #[serde(default, rename = "clusterIP", deserialize_with = "null_is_default")]
    pub cluster_ip: String,
    /// All cluster addresses, one for each family.
    #[serde(default, rename = "clusterIPs", deserialize_with = "null_is_default")]
    pub cluster_ips: Vec<String>,
    /// Addresses that the operator routes to the nodes.
    #[serde(default, rename = "externalIPs", deserialize_with = "null_is_default")]
    pub external_ips: Vec<String>,
    /// `ClientIP` or `None` (the word).
    #[serde(default, deserialize_with = "null_is_default")]
    pub session_affinity: String,
    /// How long the affinity lasts.
    #[serde(default, deserialize_with = "null_is_default")]
    pub session_affinity_config: SessionAffinityConfig,
    /// `Cluster` or `Local`, for clients in the cluster.
    #[serde(default, deserialize_with = "null_is_default")]
    pub internal_traffic_policy: String,
    /// `Cluster` or `Local`, for clients that come from outside.
    #[serde(default, deserialize_with = "null_is_default")]
    pub external_traffic_policy: String,
    /// Port of the health check, 0 for none.
    #[serde(default, deserialize_with = "port_number")]
    pub health_check_node_port: u16,
    /// Who may come through a load balancer.
    #[serde(default, deserialize_with = "null_is_default")]
    pub load_balancer_source_ranges: Vec<String>,
    /// Ports.
    #[serde(default, deserialize_with = "null_is_default")]
    pub ports: Vec<ServicePort>,
}

/// `SessionAffinityConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct SessionAffinityConfig {
    /// Of `sessionAffinity: ClientIP`.
    #[serde(default, rename = "clientIP", deserialize_with = "null_is_default")]
    pub client_ip: ClientIpConfig,
}

/// `ClientIPConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClientIpConfig {
    /// Seconds; absent means three hours.
    #[serde(default)]
    pub timeout_seconds: Option<i64>,
}

/// `ServiceSpec.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum ServiceType {
    /// Reached inside the cluster.
    #[default]
    #[serde(alias = "")]
    ClusterIP,
    /// Also through a port of each node.
    NodePort,
    /// Also through an address of a load balancer.
    LoadBalancer,
    /// A DNS name; nothing for a proxy to do.
    ExternalName,
}

/// `ServicePort`. The target port is not read: the number in the slice wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name, empty where the Service has a single port without one.
    #[serde(default, deserialize_with = "null_is_default")]
    pub name: String,
    /// Transport protocol.
    #[serde(default, deserialize_with = "null_is_default")]
    pub protocol: Protocol,
    /// Port on the VIP.
    #[serde(deserialize_with = "port_number")]
    pub port: u16,
    /// Port on the nodes, 0 for none.
    #[serde(default, deserialize_with = "port_number")]
    pub node_port: u16,
}

/// `ServiceStatus`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// What the load balancer gave.
    #[serde(default, deserialize_with = "null_is_default")]
    pub load_balancer: LoadBalancerStatus,
}

/// `LoadBalancerStatus`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct LoadBalancerStatus {
    /// Entry points.
    #[serde(default, deserialize_with = "null_is_default")]
    pub ingress: Vec<LoadBalancerIngress>,
}

/// `LoadBalancerIngress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct LoadBalancerIngress {
    /// Address of the load balancer, empty where it has only a name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub ip: String,
    /// `Proxy` where the balancer ends connections itself, and nodes never see
    /// the address as a destination; `VIP` otherwise.
    #[serde(default, rename = "ipMode", deserialize_with = "null_is_default")]
    pub ip_mode: String,
}

/// `discovery.k8s.io/v1` EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// Name and labels; one label names the Service.
    pub metadata: ObjectMeta,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: AddressType,
    /// Endpoints.
    #[serde(default, deserialize_with = "null_is_default")]
    pub endpoints: Vec<Endpoint>,
    /// Ports that every endpoint of the slice has.
    #[serde(default, deserialize_with = "null_is_default")]
    pub ports: Vec<EndpointPort>,
}

impl EndpointSlice {
    /// The Service that the slice belongs to, by its label.
    #[must_use]
    pub fn service(&self) -> Option<ObjectName> {
        let name = self.metadata.labels.get(SERVICE_NAME_LABEL)?;
        let namespace = self.metadata.object_name().namespace;
        Some(ObjectName::new(namespace, name.as_str()))
    }
}

/// `EndpointSlice.addressType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum AddressType {
    /// Internet Protocol version 4.
    #[default]
    IPv4,
    /// Internet Protocol version 6.
    IPv6,
    /// Names; of no use to a proxy.
    #[serde(rename = "FQDN")]
    Fqdn,
}

/// `Endpoint`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Addresses of one endpoint; only the first counts.
    #[serde(default, deserialize_with = "null_is_default")]
    pub addresses: Vec<String>,
    /// Its state.
    #[serde(default, deserialize_with = "null_is_default")]
    pub conditions: EndpointConditions,
    /// The node it runs on.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Whom it is meant for.
    #[serde(default, deserialize_with = "null_is_default")]
    pub hints: EndpointHints,
    /// The pod behind it.
    #[serde(default, deserialize_with = "null_is_default")]
    pub target_ref: TargetRef,
}

/// `EndpointHints`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointHints {
    /// Zones whose clients should use the endpoint.
    #[serde(default, deserialize_with = "names")]
    pub for_zones: Vec<String>,
    /// Nodes whose clients should use the endpoint.
    #[serde(default, deserialize_with = "names")]
    pub for_nodes: Vec<String>,
}

/// The names of a list of `{name: …}`.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let list: Vec<Named> = null_is_default(deserializer)?;
    Ok(list.into_iter().map(|named| named.name).collect())
}

/// `ObjectReference`, of which the name is read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct TargetRef {
    /// Name of the pod.
    #[serde(default, deserialize_with = "null_is_default")]
    pub name: String,
}

/// `EndpointConditions`; what is absent has the API's meaning, see the methods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct EndpointConditions {
    /// Takes new connections.
    #[serde(default)]
    pub ready: Option<bool>,
    /// Answers, whether it is terminating or not.
    #[serde(default)]
    pub serving: Option<bool>,
    /// Is being shut down.
    #[serde(default)]
    pub terminating: Option<bool>,
}

impl EndpointConditions {
    /// Unknown counts as ready.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.ready.unwrap_or(true)
    }

    /// Unknown counts as serving.
    #[must_use]
    pub fn is_serving(self) -> bool {
        self.serving.unwrap_or(true)
    }

    /// Unknown counts as not terminating.
    #[must_use]
    pub fn is_terminating(self) -> bool {
        self.terminating.unwrap_or(false)
    }
}

/// `EndpointPort`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct EndpointPort {
    /// Matched against the name of the service port.
    #[serde(default, deserialize_with = "null_is_default")]
    pub name: String,
    /// Matched against the protocol of the service port.
    #[serde(default, deserialize_with = "null_is_default")]
    pub protocol: Protocol,
    /// `None` means "all ports", which gives a service port no backend.
    #[serde(default, deserialize_with = "optional_port")]
    pub port: Option<u16>,
}

/// `core/v1` Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Node {
    /// Name and labels.
    pub metadata: ObjectMeta,
    /// What the cluster assigned.
    #[serde(default, deserialize_with = "null_is_default")]
    pub spec: NodeSpec,
    /// What the node told about itself.
    #[serde(default, deserialize_with = "null_is_default")]
    pub status: NodeStatus,
}

impl Node {
    /// The pod ranges as they are written, `podCIDR` where there is only that.
    pub fn pod_cidrs(&self) -> impl Iterator<Item = &str> {
        let texts = if self.spec.pod_cidrs.is_empty() {
            std::slice::from_ref(&self.spec.pod_cidr)
        } else {
            self.spec.pod_cidrs.as_slice()
        };
        texts
            .iter()
            .map(String::as_str)
            .filter(|text| !text.is_empty())
    }

    /// Whether the node is about to be taken away: balancers should send nobody new to it.
    #[must_use]
    pub fn is_leaving(&self) -> bool {
        let mut taints = self.spec.taints.iter();
        self.metadata.deletion_timestamp.is_some()
            || taints.any(|taint| taint.key == TO_BE_DELETED_TAINT)
    }

    /// The addresses of a type, as they are written.
    pub fn addresses_of(&self, kind: AddressKind) -> impl Iterator<Item = &str> {
        self.status
            .addresses
            .iter()
            .filter(move |address| address.kind == kind)
            .map(|address| address.address.as_str())
    }
}

/// `NodeStatus`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NodeStatus {
    /// Addresses and names of the node.
    #[serde(default, deserialize_with = "null_is_default")]
    pub addresses: Vec<NodeAddress>,
}

/// `NodeAddress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NodeAddress {
    /// What it is.
    #[serde(default, rename = "type", deserialize_with = "null_is_default")]
    pub kind: AddressKind,
    /// The address or name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub address: String,
}

/// `NodeAddress.type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum AddressKind {
    /// An address by which nodes reach one another.
    InternalIP,
    /// An address by which the world reaches the node.
    ExternalIP,
    /// A name, or a type that this version does not know.
    #[default]
    #[serde(other)]
    Other,
}

/// `networking.k8s.io/v1` ServiceCIDR.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ServiceCidr {
    /// Its name.
    pub metadata: ObjectMeta,
    /// What is asked for.
    #[serde(default, deserialize_with = "null_is_default")]
    pub spec: ServiceCidrSpec,
}

/// `ServiceCIDRSpec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct ServiceCidrSpec {
    /// Ranges out of which cluster addresses of Services are given.
    #[serde(default, deserialize_with = "null_is_default")]
    pub cidrs: Vec<String>,
}

/// `NodeSpec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct NodeSpec {
    /// The first pod range.
    #[serde(default, rename = "podCIDR", deserialize_with = "null_is_default")]
    pub pod_cidr: String,
    /// All pod ranges, at most one for each family.
    #[serde(default, rename = "podCIDRs", deserialize_with = "null_is_default")]
    pub pod_cidrs: Vec<String>,
    /// What keeps pods off the node, and says how it fares.
    #[serde(default, deserialize_with = "null_is_default")]
    pub taints: Vec<Taint>,
}

/// `Taint`; its effect does not matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Taint {
    /// Its name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub key: String,
}

/// Taints of a node that the cluster has lost: its node controller sets the first where
/// kubelet has not been heard of, an operator the second where the machine is off.
pub const LOST_TAINTS: [&str; 2] = [
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/out-of-service",
];

/// Kinds of object that Ferrule reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `core/v1` Service.
    Service,
    /// `discovery.k8s.io/v1` EndpointSlice.
    EndpointSlice,
    /// `core/v1` Node.
    Node,
    /// `networking.k8s.io/v1` ServiceCIDR.
    ServiceCidr,
}

impl Kind {
    /// The kind that a manifest's `apiVersion` and `kind` name, if Ferrule reads it.
    #[must_use]
    pub fn from_type_meta(api_version: &str, kind: &str) -> Option<Self> {
        match (api_version, kind) {
            ("v1", "Service") => Some(Self::Service),
            ("discovery.k8s.io/v1", "EndpointSlice") => Some(Self::EndpointSlice),
            ("v1", "Node") => Some(Self::Node),
            ("networking.k8s.io/v1" | "networking.k8s.io/v1beta1", "ServiceCIDR") => {
                Some(Self::ServiceCidr)
            }
            _ => None,
        }
    }

    /// The kind of the items of a list of one kind, such as `ServiceList`; the
    /// API server writes no kind into each of them.
    #[must_use]
    pub fn of_list(api_version: &str, kind: &str) -> Option<Self> {
        Self::from_type_meta(api_version, kind.strip_suffix("List")?)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        })
    }
}

/// Names one object of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name; the namespace of what has none is empty.
    pub name: ObjectName,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Node | Kind::ServiceCidr => write!(f, "{} {}", self.kind, self.name.name),
            Kind::Service | Kind::EndpointSlice => write!(f, "{} {}", self.kind, self.name),
        }
    }
}

/// One object of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// A Service.
    Service(Service),
    /// An EndpointSlice.
    EndpointSlice(EndpointSlice),
    /// A Node.
    Node(Node),
    /// A ServiceCIDR.
    ServiceCidr(ServiceCidr),
}

impl Object {
    /// The object's kind and name.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let (kind, name) = match self {
            Self::Service(service) => (Kind::Service, service.metadata.object_name()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.metadata.object_name()),
            Self::Node(node) => (Kind::Node, ObjectName::new("", &*node.metadata.name)),
            Self::ServiceCidr(cidr) => {
                let name = ObjectName::new("", &*cidr.metadata.name);
                (Kind::ServiceCidr, name)
            }
        };
        ObjectKey { kind, name }
    }
}
