//! Names of the counters in our table; `status` and metrics have the same ones.

/// Refused with a reset.
pub const REFUSED_TCP: &str = "refusedTcp";
/// Refused with "port unreachable".
pub const REFUSED_OTHER: &str = "refusedOther";
/// Dropped: policy Local, and the endpoints are on other nodes.
pub const NO_LOCAL_ENDPOINT: &str = "noLocalEndpoint";
/// Dropped: `loadBalancerSourceRanges` does not name the client.
pub const NOT_ADMITTED: &str = "notAdmitted";
/// Source replaced: the backend is the client.
pub const HAIRPIN: &str = "hairpin";
/// Source replaced: a process of the node called from the VIP.
pub const VIA_VIP: &str = "viaVip";
/// Source replaced: `masqueradeAll`.
pub const ALL_CLUSTER: &str = "masqueradeAll";
/// Source replaced: the client of an external frontend is not on this node.
pub const OFF_NODE: &str = "offNode";
/// Source replaced: a client from beyond the cluster called a ClusterIP.
pub const OFF_CLUSTER: &str = "offCluster";
/// Source replaced: a pod called beyond the pod network.
pub const POD_EGRESS: &str = "podEgress";

/// Those that count packets we refused.
pub const REFUSED: [&str; 2] = [REFUSED_TCP, REFUSED_OTHER];

/// Those that count packets we dropped.
pub const DROPPED: [&str; 2] = [NO_LOCAL_ENDPOINT, NOT_ADMITTED];

/// Those that count connections whose source was replaced.
pub const MASQUERADED: [&str; 6] = [
    HAIRPIN,
    VIA_VIP,
    ALL_CLUSTER,
    OFF_NODE,
    OFF_CLUSTER,
    POD_EGRESS,
];

/// Every one.
pub(super) const ALL: [&str; 10] = [
    REFUSED_TCP,
    REFUSED_OTHER,
    NO_LOCAL_ENDPOINT,
    NOT_ADMITTED,
    HAIRPIN,
    VIA_VIP,
    ALL_CLUSTER,
    OFF_NODE,
    OFF_CLUSTER,
    POD_EGRESS,
];
