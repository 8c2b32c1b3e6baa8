//! Services and the ranges of their addresses.

use serde::Deserialize;

use super::ObjectMeta;
use super::fields::{null_is_default, port_number};
use crate::address::Protocol;

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
