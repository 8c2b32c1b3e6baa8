//! What an IPVS virtual service is made of.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::address::{BackendAddr, Family, FrontendAddr};

/// Firewall mark of a packet, in the order of this machine.
pub type Mark = u32;

/// What packets a virtual service takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceKey {
    /// Those for an address, port and protocol.
    Address(FrontendAddr),
    /// Those of a family that carry a firewall mark; the whole mark is compared.
    Mark {
        /// The family.
        family: Family,
        /// The mark, never 0.
        mark: Mark,
    },
}

impl ServiceKey {
    /// Family of the virtual service.
    #[must_use]
    pub fn family(&self) -> Family {
        match self {
            Self::Address(addr) => Family::of(addr.ip),
            Self::Mark { family, .. } => *family,
        }
    }

    /// All that are selected by one address, for looking them up in order.
    pub(crate) fn all_at(ip: IpAddr) -> RangeInclusive<Self> {
        let (first, last) = FrontendAddr::all_at(ip).into_inner();
        Self::Address(first)..=Self::Address(last)
    }

    /// The address, unless it is selected by mark.
    #[must_use]
    pub fn address(&self) -> Option<FrontendAddr> {
        match self {
            Self::Address(addr) => Some(*addr),
            Self::Mark { .. } => None,
        }
    }
}

impl From<FrontendAddr> for ServiceKey {
    fn from(addr: FrontendAddr) -> Self {
        Self::Address(addr)
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(f),
            Self::Mark { family, mark } => write!(f, "mark {mark:#x} ({family})"),
        }
    }
}

/// Weight of a real server; 0 takes no new connections.
pub type Weight = u32;

/// Largest weight that can be given, as with `ipvsadm(8)`.
pub const MAX_WEIGHT: Weight = 65_535;

/// IPVS scheduler.
///
/// A name that this enum does not know (of a virtual service that another
/// program made on one of our addresses) is kept as text, so that it differs
/// from what is desired and is put right.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheduler {
    /// Round robin, kube-proxy's default and ours.
    #[default]
    RoundRobin,
    /// Round robin by weight.
    WeightedRoundRobin,
    /// Fewest connections.
    LeastConnection,
    /// Fewest connections by weight.
    WeightedLeastConnection,
    /// Fewest connections, one backend for each destination.
    LocalityLeastConnection,
    /// Fewest connections, a set of backends for each destination.
    LocalityLeastConnectionReplicated,
    /// By a hash of the client's address.
    SourceHash,
    /// By a hash of the destination.
    DestinationHash,
    /// Shortest expected delay.
    ShortestExpectedDelay,
    /// An idle backend, else the shortest expected delay.
    NeverQueue,
    /// Maglev: a consistent hash of the client's address.
    MaglevHash,
    /// The backend of the greatest weight.
    WeightedFailover,
    /// The backend of the greatest weight, until it has as many connections.
    WeightedOverflow,
    /// Any other scheduler that the kernel reports.
    Other(String),
}

impl Scheduler {
    /// Every one that can be asked for.
    pub const ALL: [Self; 13] = [
        Self::RoundRobin,
        Self::WeightedRoundRobin,
        Self::LeastConnection,
        Self::WeightedLeastConnection,
        Self::LocalityLeastConnection,
        Self::LocalityLeastConnectionReplicated,
        Self::SourceHash,
        Self::DestinationHash,
        Self::ShortestExpectedDelay,
        Self::NeverQueue,
        Self::MaglevHash,
        Self::WeightedFailover,
        Self::WeightedOverflow,
    ];

    /// The name as netlink and `ipvsadm(8)` have it, which is that of its kernel
    /// module less `ip_vs_`.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::RoundRobin => "rr",
            Self::WeightedRoundRobin => "wrr",
            Self::LeastConnection => "lc",
            Self::WeightedLeastConnection => "wlc",
            Self::LocalityLeastConnection => "lblc",
            Self::LocalityLeastConnectionReplicated => "lblcr",
            Self::SourceHash => "sh",
            Self::DestinationHash => "dh",
            Self::ShortestExpectedDelay => "sed",
            Self::NeverQueue => "nq",
            Self::MaglevHash => "mh",
            Self::WeightedFailover => "fo",
            Self::WeightedOverflow => "ovf",
            Self::Other(name) => name,
        }
    }

    /// The scheduler of this name that can be asked for.
    #[must_use]
    pub fn known(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.name() == name)
    }

    /// The scheduler that the kernel calls so.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        Self::known(name).unwrap_or_else(|| Self::Other(name.to_owned()))
    }

    /// The names of all that can be asked for, for messages.
    #[must_use]
    pub fn names() -> String {
        let names: Vec<String> = Self::ALL.iter().map(Self::to_string).collect();
        names.join(", ")
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

impl Scheduling {
    /// The flags by name: `flag-1`, `flag-2`, `flag-3`.
    pub fn flag_names(&self) -> impl Iterator<Item = String> {
        let flags = self.scheduler_flags;
        (0..3)
            .filter(move |bit| flags & (1 << bit) != 0)
            .map(|bit| format!("flag-{}", bit + 1))
    }

    /// The same beside a real server of weight 0, which is to take no new connection. `sh` and
    /// `mh` refuse a client whose hash leads to one, but for flag 1; `dh` refuses all of its
    /// virtual service's (`ip_vs_sh_get`, `ip_vs_mh_get`, `ip_vs_dh_schedule` of the kernel).
    #[must_use]
    pub fn around_weight_0(mut self) -> Self {
        match self.scheduler {
            Scheduler::SourceHash | Scheduler::MaglevHash => self.scheduler_flags |= 1,
            Scheduler::DestinationHash => {
                self.scheduler = Scheduler::RoundRobin;
                self.scheduler_flags = 0;
            }
            _ => {}
        }
        self
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Protocol;

    #[test]
    fn a_hash_leads_past_weight_0() {
        let of = |scheduler, scheduler_flags| Scheduling {
            scheduler,
            scheduler_flags,
            persistence: Some(60),
        };
        for (asked, around) in [
            (of(Scheduler::SourceHash, 0), of(Scheduler::SourceHash, 1)),
            (of(Scheduler::MaglevHash, 2), of(Scheduler::MaglevHash, 3)),
            (
                of(Scheduler::DestinationHash, 0),
                of(Scheduler::RoundRobin, 0),
            ),
            (
                of(Scheduler::LeastConnection, 0),
                of(Scheduler::LeastConnection, 0),
            ),
        ] {
            assert_eq!(asked.around_weight_0(), around);
        }
    }

    #[test]
    fn a_virtual_service_has_an_address_or_a_mark() {
        let addr = FrontendAddr::new([10, 96, 0, 1].into(), 80, Protocol::Udp);
        let (family, mark) = (Family::IPv6, 0xfe00_0001);
        for (key, of, address, words) in [
            (addr.into(), Family::IPv4, Some(addr), "10.96.0.1:80/UDP"),
            (
                ServiceKey::Mark { family, mark },
                family,
                None,
                "mark 0xfe000001 (IPv6)",
            ),
        ] {
            assert_eq!(key.family(), of);
            assert_eq!(key.address(), address);
            assert_eq!(key.to_string(), words);
        }
    }

    #[test]
    fn schedulers_have_the_kernels_names() {
        assert_eq!(
            Scheduler::names(),
            "rr, wrr, lc, wlc, lblc, lblcr, sh, dh, sed, nq, mh, fo, ovf"
        );
        for scheduler in Scheduler::ALL {
            assert_eq!(Scheduler::known(scheduler.name()), Some(scheduler.clone()));
            assert_eq!(Scheduler::from_name(scheduler.name()), scheduler);
        }
        assert_eq!(Scheduler::known("twos"), None);
        assert_eq!(Scheduler::from_name("twos").to_string(), "twos");
        assert_ne!(Scheduler::from_name("twos"), Scheduler::RoundRobin);
    }

    #[test]
    fn flags_have_names() {
        for (scheduler_flags, names) in [
            (0, &[][..]),
            (1, &["flag-1"]),
            (2, &["flag-2"]),
            (5, &["flag-1", "flag-3"]),
        ] {
            let scheduling = Scheduling {
                scheduler_flags,
                ..Scheduling::default()
            };
            assert_eq!(scheduling.flag_names().collect::<Vec<_>>(), names);
        }
    }
}
