//! The words that a Service chooses by: traffic policies and affinity.

use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::kube::{Service, ServiceType};
use crate::names::ObjectName;

/// Whose endpoints are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TrafficPolicy {
    /// Those of all nodes.
    Cluster,
    /// Those of this node.
    Local,
}

impl TrafficPolicy {
    fn of(word: &str) -> Self {
        if word == "Local" {
            Self::Local
        } else {
            Self::Cluster
        }
    }

    /// For clients in the cluster, at the ClusterIP.
    pub(crate) fn internal(service: &Service) -> Self {
        Self::of(&service.spec.internal_traffic_policy)
    }

    /// For the other frontends. A Service that can be called from outside by none
    /// of the ways that the API knows has no such policy, whatever stands there.
    pub(crate) fn external(service: &Service) -> Self {
        let spec = &service.spec;
        match spec.service_type {
            ServiceType::NodePort | ServiceType::LoadBalancer => {
                Self::of(&spec.external_traffic_policy)
            }
            ServiceType::ClusterIP if !spec.external_ips.is_empty() => {
                Self::of(&spec.external_traffic_policy)
            }
            ServiceType::ClusterIP | ServiceType::ExternalName => Self::Cluster,
        }
    }
}

/// Says which words are none that we know; they count as the default.
pub(crate) fn note_unknown(name: &ObjectName, service: &Service, conditions: &mut Vec<Condition>) {
    let spec = &service.spec;
    for (field, value, default, choice) in [
        (
            "spec.sessionAffinity",
            &spec.session_affinity,
            "None",
            "ClientIP",
        ),
        (
            "spec.internalTrafficPolicy",
            &spec.internal_traffic_policy,
            "Cluster",
            "Local",
        ),
        (
            "spec.externalTrafficPolicy",
            &spec.external_traffic_policy,
            "Cluster",
            "Local",
        ),
    ] {
        if value.is_empty() || value == default || value == choice {
            continue;
        }
        let message = format!(
            "{field}: {value:?} is not known and counts as {default}; the rest of the Service is \
             served, write {default} or {choice}"
        );
        conditions.push(condition(name, Reason::Unsupported, message));
    }
}
