//! What this version leaves out of a Service, and says so.

use std::collections::BTreeSet;

use crate::address::Family;
use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::endpoints;
use crate::kube::{EndpointSlice, Kind, ObjectKey, Service, ServiceType};
use crate::names::ObjectName;

pub(crate) fn unsupported(name: &ObjectName, field: &str, effect: &str) -> Condition {
    let message = format!(
        "{field}: {effect} by this version; the rest of the Service is served, do without the field \
         or give the Service to another proxy"
    );
    condition(name, Reason::Unsupported, message)
}

/// Says which parts of a Service this version leaves out; the rest of it is served all the same.
pub(crate) fn note_unsupported(
    name: &ObjectName,
    service: &Service,
    conditions: &mut Vec<Condition>,
) {
    let spec = &service.spec;
    let mut unknown = Vec::new();
    let mut note = |field: &str, effect: &str| conditions.push(unsupported(name, field, effect));
    for annotation in service.metadata.annotations.keys() {
        note(
            &format!("metadata.annotations[{annotation}]"),
            "connections are spread round robin",
        );
    }
    if !spec.external_ips.is_empty() {
        note("spec.externalIPs", "external addresses are not served");
    }
    let ingress = &service.status.load_balancer.ingress;
    if ingress
        .iter()
        .any(|entry| !entry.ip.is_empty() && entry.ip_mode != "Proxy")
    {
        note(
            "status.loadBalancer.ingress",
            "load-balancer addresses are not served",
        );
    }
    if !spec.load_balancer_source_ranges.is_empty() {
        note(
            "spec.loadBalancerSourceRanges",
            "clients are not told apart by their address",
        );
    }
    match spec.session_affinity.as_str() {
        "" | "None" => {}
        "ClientIP" => note(
            "spec.sessionAffinity",
            "connections are spread without affinity",
        ),
        other => unknown.push(("spec.sessionAffinity", other, "None", "ClientIP")),
    }
    match spec.internal_traffic_policy.as_str() {
        "" | "Cluster" => {}
        "Local" => note(
            "spec.internalTrafficPolicy",
            "endpoints of all nodes are used",
        ),
        other => unknown.push(("spec.internalTrafficPolicy", other, "Cluster", "Local")),
    }
    let external = spec.service_type == ServiceType::NodePort
        || spec.service_type == ServiceType::LoadBalancer;
    match spec.external_traffic_policy.as_str() {
        "" | "Cluster" => {}
        "Local" if !external => {}
        "Local" => {
            note(
                "spec.externalTrafficPolicy",
                "endpoints of all nodes are used, and the client's address is replaced",
            );
            if spec.health_check_node_port != 0 {
                note("spec.healthCheckNodePort", "health checks are not answered");
            }
        }
        other => unknown.push(("spec.externalTrafficPolicy", other, "Cluster", "Local")),
    }
    for (field, value, default, choice) in unknown {
        let message = format!(
            "{field}: {value:?} is not known and counts as {default}; the rest of the Service is \
             served, write {default} or {choice}"
        );
        conditions.push(condition(name, Reason::Unsupported, message));
    }
}

/// Hints are fields of slices, and matter in those that are used.
pub(crate) fn note_hints<'a>(
    name: &ObjectName,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    families: &BTreeSet<Family>,
    conditions: &mut Vec<Condition>,
) {
    for slice in slices {
        let used = families
            .iter()
            .any(|family| endpoints::counts(slice, *family));
        let mut hints = slice.endpoints.iter().map(|endpoint| endpoint.hints);
        if used && hints.any(|hints| hints.for_zones || hints.for_nodes) {
            conditions.push(Condition {
                object: ObjectKey {
                    kind: Kind::EndpointSlice,
                    name: slice.metadata.object_name(),
                },
                ..unsupported(
                    name,
                    "endpoints[].hints",
                    "endpoints of all zones and nodes are used",
                )
            });
        }
    }
}
