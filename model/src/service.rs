//! What an IPVS virtual service is made of.

use std::collections::BTreeMap;
use std::fmt;

use crate::address::BackendAddr;

/// Weight of a real server; 0 takes no new connections.
pub type Weight = u32;

/// IPVS scheduler, by the name of its kernel module less `ip_vs_`.
///
/// A name that this enum does not know (of a virtual service that another
/// program made on one of our addresses) is kept as text, so that it differs
/// from what is desired and is put right.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheduler {
    /// Round robin, kube-proxy's default and ours.
    #[default]
    RoundRobin,
    /// Any other scheduler that the kernel reports.
    Other(String),
}

impl Scheduler {
    /// The name as netlink and `ipvsadm(8)` have it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::RoundRobin => "rr",
            Self::Other(name) => name,
        }
    }

    /// The scheduler with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        match name {
            "rr" => Self::RoundRobin,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a virtual service spreads connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scheduling {
    /// The scheduler.
    pub scheduler: Scheduler,
    /// `IP_VS_SVC_F_SCHED1` to `SCHED3` as bits 0 to 2; their meaning is the scheduler's.
    pub scheduler_flags: u8,
    /// Session affinity by client address, in seconds; `None` without.
    pub persistence: Option<u32>,
}

/// One virtual service with its real servers. The forwarding method is always
/// NAT: direct routing and tunnels cannot map ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtualService {
    /// How connections are spread.
    pub scheduling: Scheduling,
    /// Real servers with their weights.
    pub servers: BTreeMap<BackendAddr, Weight>,
}
