//! What a node would program, in the stable form that people diff and script against.
//!
//! Fields are added, never renamed; [`VERSION`] rises when a meaning changes.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Serialize;

use crate::address::{BackendAddr, Family, FrontendAddr, Protocol};
use crate::condition::{Condition, Reason};
use crate::desired::{Action, Frontend, FrontendKind};
use crate::endpoints::{Backend, BackendState, Backends};
use crate::service::Scheduling;
use crate::view::NodeView;

/// Version of the form.
pub const VERSION: u32 = 1;

/// Everything that one node would program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    /// [`VERSION`].
    pub version: u32,
    /// Name of the node.
    pub node: String,
    /// By namespace, name, port, family, kind, address, clients.
    pub frontends: Vec<FrontendRow>,
    /// Health checks of load-balanced Services, by namespace and name.
    pub health_checks: Vec<HealthCheckRow>,
    /// By object, reason, message.
    pub conditions: Vec<ConditionRow>,
}

/// One frontend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRow {
    /// Namespace and name of the Service.
    pub service: String,
    /// Name of the service port, `""` if it has none.
    pub port: String,
    /// `IPv4` or `IPv6`.
    pub family: Family,
    /// `ClusterIP`, `NodePort`, `ExternalIP` or `LoadBalancer`.
    pub kind: String,
    /// Address, IPv6 as in RFC 5952.
    pub address: IpAddr,
    /// Port that clients call.
    pub port_number: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Whom the row holds for: `any`; or, where these fare differently, `internal`
    /// (pods of the cluster and this node itself) and `external`.
    pub clients: &'static str,
    /// `balance`, `reject` or `drop`.
    pub action: &'static str,
    /// Scheduler of IPVS.
    pub scheduler: String,
    /// `flag-1`, `flag-2`, `flag-3`.
    pub scheduler_flags: Vec<String>,
    /// Session affinity in seconds.
    pub affinity_seconds: Option<u32>,
    /// Who may come; empty admits everyone.
    pub source_ranges: Vec<String>,
    /// Conditions under which the source is replaced, sorted.
    pub masquerade: Vec<&'static str>,
    /// By address and port.
    pub backends: Vec<BackendRow>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendRow {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Its weight.
    pub weight: u32,
    /// `ready` or `terminating`.
    pub state: &'static str,
    /// Whether it runs on this node.
    pub local: bool,
}

/// One health check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheckRow {
    /// Namespace and name of the Service.
    pub service: String,
    /// The port.
    pub port: u16,
    /// Ready endpoints on this node.
    pub local_endpoints: usize,
}

/// One object that was skipped or honoured only in part.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ConditionRow {
    /// Such as `Service default/db`.
    pub object: String,
    /// In CamelCase; never changes.
    pub reason: String,
    /// Line of the file that the object is told by, where it has no name; 0 for all
    /// others. It stands in the message, too, and is here for the order of lines.
    #[serde(skip)]
    pub line: u64,
    /// Names the field and the remedy.
    pub message: String,
}

impl From<&Condition> for ConditionRow {
    fn from(condition: &Condition) -> Self {
        Self {
            object: condition.object.to_string(),
            reason: condition.reason.to_string(),
            line: 0,
            message: condition.message.clone(),
        }
    }
}

impl FrontendRow {
    /// Whether nothing but for whom they hold tells two rows apart.
    fn fares_like(&self, other: &Self) -> bool {
        let of_same = Self {
            clients: other.clients,
            ..self.clone()
        };
        of_same == *other
    }
}

impl Plan {
    /// The plan of a node; `more` are conditions that the view cannot know, such
    /// as those of objects that could not be read.
    #[must_use]
    pub fn new(view: &NodeView, more: impl IntoIterator<Item = ConditionRow>) -> Self {
        let mut frontends: Vec<_> = view.desired().frontends().collect();
        frontends.sort_by_key(|(addr, frontend)| {
            (
                &frontend.holder,
                &frontend.port_name,
                Family::of(addr.ip),
                frontend.kind,
                *addr,
            )
        });
        let mut conditions: Vec<ConditionRow> =
            view.conditions().iter().map(ConditionRow::from).collect();
        // Which Nodes share a link with this one is known on the machine alone.
        let (_, of_routes) = view.routes();
        let of_ranges = of_routes
            .iter()
            .filter(|condition| condition.reason == Reason::AddressConflict);
        conditions.extend(of_ranges.map(ConditionRow::from));
        conditions.extend(more);
        conditions.sort();
        conditions.dedup();
        Self {
            version: VERSION,
            node: view.node().to_owned(),
            frontends: frontends
                .into_iter()
                .flat_map(|(addr, frontend)| rows(view, addr, frontend))
                .collect(),
            health_checks: view
                .desired()
                .health_checks()
                .iter()
                .map(|(service, check)| HealthCheckRow {
                    service: service.to_string(),
                    port: check.port,
                    local_endpoints: check.local_endpoints(),
                })
                .collect(),
            conditions,
        }
    }
}

/// One row, or two where clients within the cluster fare otherwise.
fn rows(view: &NodeView, addr: FrontendAddr, frontend: &Frontend) -> Vec<FrontendRow> {
    let row = |clients, action: Action, scheduling: &Scheduling, affinity, backends: &Backends| {
        FrontendRow {
            service: frontend.holder.to_string(),
            port: frontend.port_name.clone(),
            family: Family::of(addr.ip),
            kind: frontend.kind.to_string(),
            address: addr.ip,
            port_number: addr.port,
            protocol: addr.protocol,
            clients,
            action: action.name(),
            scheduler: scheduling.scheduler.name().to_owned(),
            scheduler_flags: scheduling.flag_names().collect(),
            affinity_seconds: affinity,
            source_ranges: frontend
                .source_ranges
                .iter()
                .map(IpNetwork::to_string)
                .collect(),
            masquerade: masquerade(view, frontend, backends, clients),
            backends: backends.iter().map(backend_row).collect(),
        }
    };
    let own = |clients| {
        row(
            clients,
            frontend.action(),
            &frontend.scheduling,
            frontend.scheduling.persistence,
            &frontend.backends,
        )
    };
    let Some(internal) = &frontend.internal else {
        return vec![own("any")];
    };
    let internal = row(
        "internal",
        Action::Balance,
        &internal.scheduling,
        internal.affinity,
        &internal.backends,
    );
    let external = own("external");
    let any = FrontendRow {
        clients: "any",
        ..internal.clone()
    };
    // Told apart in the kernel, and yet they may fare alike.
    if any.fares_like(&external) {
        vec![any]
    } else {
        vec![internal, external]
    }
}

fn backend_row((addr, backend): (&BackendAddr, &Backend)) -> BackendRow {
    BackendRow {
        address: addr.ip,
        port: addr.port,
        weight: backend.weight,
        state: match backend.state {
            BackendState::Ready => "ready",
            BackendState::Terminating => "terminating",
        },
        local: backend.local,
    }
}

/// The cases of source NAT that clients of a frontend can meet, sorted.
fn masquerade(
    view: &NodeView,
    frontend: &Frontend,
    backends: &Backends,
    clients: &str,
) -> Vec<&'static str> {
    if backends.is_empty() {
        return Vec::new();
    }
    if frontend.kind == FrontendKind::ClusterIP && view.policy().masquerade_all {
        return vec!["all"];
    }
    let mut cases = vec!["hairpin"];
    let family = backends.keys().map(|backend| Family::of(backend.ip)).next();
    let nat = view.source_nat();
    let strangers = family.and_then(|family| nat.strangers(family));
    if frontend.kind == FrontendKind::ClusterIP && strangers.is_some() {
        cases.push("offCluster");
    }
    let networks = view.networks();
    let outside = |addr: &BackendAddr| networks.is_outside(addr.ip);
    // Under policy Local a backend on this node answers by way of it; one that clients
    // within the cluster are led to may be on another.
    let away = |addr: &BackendAddr| !view.desired().is_hairpin(addr.ip) && !outside(addr);
    if frontend.kind.is_external() && (!frontend.preserves_client || backends.keys().any(away)) {
        cases.push("offNode");
    }
    // No pod is among clients that are told apart as external.
    if clients != "external" && backends.keys().any(outside) {
        cases.push("podEgress");
    }
    cases
}
