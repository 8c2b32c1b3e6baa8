//! The parts of Kubernetes objects that Ferrule reads.
//!
//! Slim on purpose: a full `EndpointSlice` of 50 endpoints costs six times the
//! memory. The types follow the API's JSON, `null` counts as absent, fields not
//! named here are skipped. Sources: `core/v1` Service and Node,
//! `discovery.k8s.io/v1` EndpointSlice, `networking.k8s.io/v1` ServiceCIDR.

mod endpoint_slice;
mod fields;
mod node;
mod service;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer};

pub use self::endpoint_slice::{
    AddressType, Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice,
    TargetRef,
};
use self::fields::texts;
pub use self::node::{
    AddressKind, LOST_TAINTS, Node, NodeAddress, NodeSpec, NodeStatus, TO_BE_DELETED_TAINT, Taint,
    ZONE_LABEL,
};
pub use self::service::{
    ClientIpConfig, LoadBalancerIngress, LoadBalancerStatus, Service, ServiceCidr, ServiceCidrSpec,
    ServicePort, ServiceSpec, ServiceStatus, ServiceType, SessionAffinityConfig,
};
use crate::names::ObjectName;
use crate::time::Timestamp;

/// Label that ties an EndpointSlice to its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// Label of slices that belong to a headless Service.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// Label by which a Service asks for another proxy than the node's usual one.
pub const PROXY_NAME_LABEL: &str = "service.kubernetes.io/service-proxy-name";

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

fn is_known_annotation(key: &str) -> bool {
    let mut schedulers = SCHEDULER_ANNOTATIONS.iter().chain(&FLAGS_ANNOTATIONS);
    let others = [
        WEIGHT_ANNOTATION,
        WEIGHTS_ANNOTATION,
        TRIGGER_TIME_ANNOTATION,
    ];
    others.contains(&key) || schedulers.any(|known| *known == key)
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
