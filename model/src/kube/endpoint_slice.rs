//! Endpoints.

use serde::{Deserialize, Deserializer};

use super::fields::{null_is_default, optional_port};
use super::{ObjectMeta, SERVICE_NAME_LABEL};
use crate::address::Protocol;
use crate::names::ObjectName;

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
