//! What the agent tells about itself.
//!
//! These types are the documented output of `ferrule-agent status -o json`
//! (docs/status.md): fields are added, never renamed or taken away. Every list
//! has a bound, so that an answer fits into one line of the socket.
//!
//! Times of day are seconds since 1970; spans are seconds with fractions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most problems, conditions and notes in one answer, each; the counts beside them are exact.
pub const MAX_LISTED: usize = 24;

/// Longest text of a problem or condition, in bytes; the rest is cut.
pub const MAX_TEXT: usize = 400;

/// Cuts a text that others wrote, so that what is told about it fits a line of the socket.
pub fn cut(text: &mut String) {
    if text.len() > MAX_TEXT {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text.push('…');
    }
}

/// Most rows in one answer to a listing.
pub const MAX_ROWS: u32 = 100;

/// How the node fares, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Health {
    /// Everything that is wanted is programmed, and the facts are fresh.
    Healthy,
    /// Something is not as it should be; the problems say what.
    Degraded,
}

/// What `ferrule-agent status` shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// How the node fares; degraded exactly when there is a problem.
    pub health: Health,
    /// Name of the node.
    pub node: String,
    /// Version of the agent.
    pub agent_version: String,
    /// When the agent started.
    pub started: u64,
    /// When this was told.
    pub now: u64,
    /// Where the facts come from.
    pub source: SourceStatus,
    /// What is in the kernel.
    pub programmed: Programmed,
    /// The last change of the kernel, if there was one since the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_change: Option<LastChange>,
    /// Pod addresses.
    pub pods: PodStatus,
    /// What another changed and the agent put right, since its start.
    pub drift: Drift,
    /// Backends that leave and keep the connections that they have.
    #[serde(default)]
    pub draining: Draining,
    /// The comparison of the kernel with what it should be.
    pub audit: Audit,
    /// Packets counted by our rules, since these were made.
    pub packets: Packets,
    /// Operations of the kernel that failed since the start, each try counted.
    #[serde(default)]
    pub failed_operations: u64,
    /// Kubernetes Events since the start: `written`, by this node or another, and `lost`.
    #[serde(default)]
    pub events: BTreeMap<String, u64>,
    /// What came over the socket since the start.
    #[serde(default)]
    pub socket: SocketStatus,
    /// Kernel settings that the configuration asks for, those that were as asked for left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<SysctlStatus>,
    /// What is wrong on this node, worst first, [`MAX_LISTED`] at most.
    pub problems: Vec<Problem>,
    /// How many problems there are.
    pub problem_count: usize,
    /// Objects that are served only in part, [`MAX_LISTED`] at most. These do
    /// not degrade the node: the owner of the object can put them right.
    pub conditions: Vec<ObjectCondition>,
    /// How many of those there are.
    pub condition_count: usize,
}

/// What came over the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SocketStatus {
    /// Calls that were answered.
    pub calls: u64,
    /// Lines that were no request, or came too slowly.
    pub bad_requests: u64,
    /// Connections of users that may not ask.
    pub refused_connections: u64,
}

/// Where the facts come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SourceStatus {
    /// Kind and place in words: `manifests in /etc/ferrule/manifests`.
    pub name: String,
    /// Whether everything was read once; before that nothing is removed.
    pub complete: bool,
    /// Services known.
    pub services: usize,
    /// EndpointSlices known.
    pub endpoint_slices: usize,
    /// Nodes known.
    pub nodes: usize,
    /// `ServiceCIDR` objects known.
    pub service_cidrs: usize,
    /// When a fact last came or went.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_event: Option<u64>,
}

/// What of ours is in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Programmed {
    /// Services with at least one frontend.
    pub services: usize,
    /// Frontends that should be there.
    pub frontends: usize,
    /// Those of them that refuse, because there is no usable endpoint.
    pub rejecting: usize,
    /// Those that drop, because their policy is Local and the endpoints are on other nodes.
    #[serde(default)]
    pub dropping: usize,
    /// Addresses on the VIP device.
    pub vips: usize,
    /// Frontends on node ports.
    pub node_ports: usize,
    /// Frontends on host ports of pods.
    #[serde(default)]
    pub host_ports: usize,
    /// IPVS virtual services.
    pub virtual_services: usize,
    /// IPVS real servers, over all virtual services.
    pub real_servers: usize,
    /// Routes to other nodes' pods.
    pub routes: usize,
    /// Addresses of this node that serve node ports.
    pub node_addresses: Vec<String>,
    /// Changes that wait, be it for their turn or for another try.
    pub pending: usize,
    /// Service ports with policy Local whose endpoints are all on other nodes, by the
    /// policy: `internal`, `external`.
    #[serde(default)]
    pub no_local_endpoints: BTreeMap<String, u64>,
}

/// A kernel setting that the configuration asks for and that was not there before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SysctlStatus {
    /// Its name, such as `net.ipv4.conf.all.arp_ignore`.
    pub name: String,
    /// What was there before the agent set it, or what is there because it could not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// What is asked for.
    pub value: String,
    /// Why it could not be set; absent where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The last change of the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastChange {
    /// When it was done.
    pub at: u64,
    /// Steps that it took.
    pub steps: usize,
    /// From the moment the change of facts was noticed to the kernel's last acknowledgement.
    pub seen_to_kernel: f64,
    /// Of that, the time in which the kernel was being changed.
    pub kernel: f64,
}

/// Pod addresses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Pod interfaces with a lease.
    pub leases: usize,
    /// Each pod range.
    pub ranges: Vec<RangeStatus>,
    /// How often leases and pods' interfaces were put in agreement, by what was done.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tidied: BTreeMap<String, u64>,
}

/// One pod range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeStatus {
    /// The range, such as `10.244.1.0/24`.
    pub range: String,
    /// Addresses leased.
    pub used: u64,
    /// Addresses that can still be leased.
    pub free: u64,
}

/// Backends that leave and keep the connections that they have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Draining {
    /// Real servers that take no new connections and have old ones, one for each virtual service.
    pub backends: usize,
    /// For how long the oldest of them has, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest: Option<f64>,
    /// After how many seconds out of all slices one loses its connections.
    pub bound: f64,
    /// How many came to their end since the agent's start, by why: `idle`, `podGone`,
    /// `nodeGone`, `bound`.
    pub ended: BTreeMap<String, u64>,
    /// Entries of connection tracking that led to backends which are gone.
    pub forgotten_flows: u64,
    /// How often these could not be looked for.
    pub failed: u64,
}

/// What another changed and the agent put right.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Drift {
    /// How often, by kind: `device`, `address`, `filter`, `service`, `server`, `route`.
    pub repaired: BTreeMap<String, u64>,
    /// The last one, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
    /// When it was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_at: Option<u64>,
}

/// The comparison of the kernel with what it should be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Audit {
    /// Share of one core that the comparison of real servers may take, in percent.
    pub budget_percent: f64,
    /// Virtual services whose real servers were compared in this round.
    pub done: usize,
    /// Virtual services in a round.
    pub total: usize,
    /// Full rounds since the start.
    pub rounds: u64,
    /// How long the last full round took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_round: Option<f64>,
    /// How long a round takes at the present pace; the longest that a changed
    /// real server stays unnoticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_estimate: Option<f64>,
    /// When virtual services were last compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services_at: Option<u64>,
    /// When the nftables table was last compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter_at: Option<u64>,
}

/// Packets counted by our rules.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Packets {
    /// Packets by counter: `refusedTcp`, `refusedOther`, `noLocalEndpoint`,
    /// `notAdmitted`.
    pub counters: BTreeMap<String, u64>,
    /// Connections whose source was replaced, by reason: `hairpin`, `offNode`,
    /// `podEgress`, `viaVip`, `masqueradeAll`.
    pub masqueraded: BTreeMap<String, u64>,
}

/// Something that is wrong on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// What is concerned: a Service, a file, a device, a Node.
    pub object: String,
    /// What is wrong, in plain words.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
    /// Since when.
    pub since: u64,
    /// How often it was tried in vain, 0 where nothing is tried.
    pub attempts: u64,
}

/// An object that is served only in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectCondition {
    /// Such as `Service default/web`.
    pub object: String,
    /// In CamelCase; never changes.
    pub reason: String,
    /// Names the field and the remedy.
    pub message: String,
}

/// One part of a list of frontends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRows {
    /// At most [`MAX_ROWS`], by Service, port, address; host ports of pods behind them.
    pub rows: Vec<FrontendRow>,
    /// Pass this as `after` for the next part; absent behind the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// One frontend with what passed through it since it was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendRow {
    /// Namespace and name of the Service; of a host port, of the pod.
    pub service: String,
    /// Name of the service port.
    pub port: String,
    /// `ClusterIP`, `NodePort` or `HostPort`.
    pub kind: String,
    /// Such as `10.96.0.10:80/TCP`.
    pub address: String,
    /// `balance`, `reject` or `drop`.
    pub action: String,
    /// Scheduler.
    pub scheduler: String,
    /// Real servers.
    pub backends: usize,
    /// Whether the kernel is as it should be, as far as is known.
    pub programmed: bool,
    /// Connections since the virtual service was made.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
}

/// One part of a list of pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRows {
    /// At most [`MAX_ROWS`], by container and interface.
    pub rows: Vec<PodRow>,
    /// Pass this as `after` for the next part; absent behind the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// One interface of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRow {
    /// Namespace and name of the pod, where the runtime told.
    pub pod: String,
    /// Container ID.
    pub container_id: String,
    /// Interface in the pod.
    pub interface: String,
    /// CNI network, where the plugin told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The host's end; empty while it does not exist.
    pub host_interface: String,
    /// Packets that the pod received, 0 while there is no device.
    pub packets_in: u64,
    /// Packets that the pod sent.
    pub packets_out: u64,
    /// Bytes that the pod received.
    pub bytes_in: u64,
    /// Bytes that the pod sent.
    pub bytes_out: u64,
}
