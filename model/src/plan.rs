//! What a node would program, in the stable form that people diff and script against.
//!
//! Fields are added, never renamed; [`VERSION`] rises when a meaning changes.
//! Fields of features that are not there yet have the value that says so.

use std::net::IpAddr;

use serde::Serialize;

use crate::address::{Family, FrontendAddr, Protocol};
use crate::condition::{Condition, Reason};
use crate::desired::{Action, Frontend, FrontendKind};
use crate::endpoints::BackendState;
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
    /// Health checks of load-balanced Services; none are served by this version.
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
    /// `ClusterIP` or `NodePort`.
    pub kind: String,
    /// Address, IPv6 as in RFC 5952.
    pub address: IpAddr,
    /// Port that clients call.
    pub port_number: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Whom the row holds for: `any`.
    pub clients: &'static str,
    /// `balance` or `reject`.
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
                .map(|(addr, frontend)| row(view, addr, frontend))
                .collect(),
            health_checks: Vec::new(),
            conditions,
        }
    }
}

fn row(view: &NodeView, addr: FrontendAddr, frontend: &Frontend) -> FrontendRow {
    let servers = frontend.virtual_service().unwrap_or_default().servers;
    let backends = servers.iter().filter_map(|(backend, weight)| {
        let known = frontend.backends.get(backend)?;
        Some(BackendRow {
            address: backend.ip,
            port: backend.port,
            weight: *weight,
            state: match known.state {
                BackendState::Ready => "ready",
                BackendState::Terminating => "terminating",
            },
            local: known.local,
        })
    });
    let flags = frontend.scheduling.scheduler_flags;
    FrontendRow {
        service: frontend.holder.to_string(),
        port: frontend.port_name.clone(),
        family: Family::of(addr.ip),
        kind: frontend.kind.to_string(),
        address: addr.ip,
        port_number: addr.port,
        protocol: addr.protocol,
        clients: "any",
        action: match frontend.action() {
            Action::Balance => "balance",
            Action::Reject => "reject",
        },
        scheduler: frontend.scheduling.scheduler.name().to_owned(),
        scheduler_flags: (0..3)
            .filter(|bit| flags & (1 << bit) != 0)
            .map(|bit| format!("flag-{}", bit + 1))
            .collect(),
        affinity_seconds: frontend.scheduling.persistence,
        source_ranges: Vec::new(),
        masquerade: masquerade(view, frontend),
        backends: backends.collect(),
    }
}

/// The cases of source NAT that a frontend can meet, sorted.
fn masquerade(view: &NodeView, frontend: &Frontend) -> Vec<&'static str> {
    match (frontend.action(), frontend.kind) {
        (Action::Reject, _) => return Vec::new(),
        (Action::Balance, FrontendKind::ClusterIP) if view.policy().masquerade_all => {
            return vec!["all"];
        }
        (
            Action::Balance,
            FrontendKind::ClusterIP | FrontendKind::NodePort | FrontendKind::HostPort,
        ) => {}
    }
    let mut cases = vec!["hairpin"];
    if frontend.kind.is_external() && !frontend.kind.preserves_client() {
        cases.push("offNode");
    }
    let networks = view.networks();
    if frontend
        .backends
        .keys()
        .any(|backend| networks.is_outside(backend.ip))
    {
        cases.push("podEgress");
    }
    cases
}
