//! Nodes.

use serde::Deserialize;

use super::ObjectMeta;
use super::fields::null_is_default;

/// Label of a Node that names its zone.
pub const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// Taint of a Node that the cluster autoscaler is about to remove.
pub const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";

/// Taints of a node that the cluster has lost: its node controller sets the first where
/// kubelet has not been heard of, an operator the second where the machine is off.
pub const LOST_TAINTS: [&str; 2] = [
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/out-of-service",
];

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
