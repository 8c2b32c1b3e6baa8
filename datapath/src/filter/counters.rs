//! Names of the counters in our table; `status` and metrics have the same ones.

/// Refused with a reset.
pub const REFUSED_TCP: &str = "refusedTcp";
/// Refused with "port unreachable".
pub const REFUSED_OTHER: &str = "refusedOther";
/// Source replaced: the backend is the client.
pub const HAIRPIN: &str = "hairpin";
/// Source replaced: a process of the node called from the VIP.
pub const VIA_VIP: &str = "viaVip";
/// Source replaced: `masqueradeAll`.
pub const ALL_CLUSTER: &str = "masqueradeAll";
/// Source replaced: the client of an external frontend is not on this node.
pub const OFF_NODE: &str = "offNode";
/// Source replaced: a pod called beyond the pod network.
pub const POD_EGRESS: &str = "podEgress";

/// Those that count packets we refused.
pub const REFUSED: [&str; 2] = [REFUSED_TCP, REFUSED_OTHER];

/// Those that count connections whose source was replaced.
pub const MASQUERADED: [&str; 5] = [HAIRPIN, VIA_VIP, ALL_CLUSTER, OFF_NODE, POD_EGRESS];

/// Every one.
pub(super) const ALL: [&str; 7] = [
    REFUSED_TCP,
    REFUSED_OTHER,
    HAIRPIN,
    VIA_VIP,
    ALL_CLUSTER,
    OFF_NODE,
    POD_EGRESS,
];
