//! Which address a pod gets.
//!
//! An address that was never used goes first; after that the one that was
//! released longest ago, so that a late packet, a stale DNS answer or a
//! connection in `TIME_WAIT` meets a stranger as seldom as possible.
//!
//! [`Ledger`] decides and remembers; to make a decision durable before it is
//! told to anybody is the caller's part, and so the two are separate calls:
//! [`Ledger::choose`] changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::names::Attachment;
use crate::network::parse_network;

/// Most addresses that one pod range offers, whatever its prefix length; bounds
/// what the ledger remembers. No node runs as many pods.
pub const MAX_POOL: u32 = 65_536;

/// Offsets 0 (network; subnet-router anycast in IPv6) and 1 (kept for the node itself).
const FIRST_OFFSET: u32 = 2;

/// Why a network cannot be a pod range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Not CIDR notation.
    #[error("{0:?} is not an address range in CIDR notation, such as 10.244.1.0/24")]
    NotCidr(String),
    /// No address is left when network, node and broadcast address are taken off.
    #[error("{0} has no room for pods; the longest usable prefixes are /30 and /126")]
    TooSmall(IpNetwork),
}

/// The pod addresses of one family on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodRange {
    network: IpNetwork,
    /// Offsets `FIRST_OFFSET..end` are offered.
    end: u32,
}

impl PodRange {
    /// Parses `spec.podCIDRs[]` of a Node. Bits set behind the prefix are ignored.
    ///
    /// # Errors
    /// [`RangeError`], without the name of the Node.
    pub fn parse(text: &str) -> Result<Self, RangeError> {
        let network = parse_network(text).map_err(|_| RangeError::NotCidr(text.to_owned()))?;
        let host_bits = Family::of(network.ip()).bits() - network.prefix();
        let size = if host_bits >= 16 {
            MAX_POOL
        } else {
            1 << host_bits
        };
        // The last address is the broadcast address in IPv4; in IPv6 it is left out for symmetry.
        let end = size.saturating_sub(1);
        if end <= FIRST_OFFSET {
            return Err(RangeError::TooSmall(network));
        }
        Ok(Self { network, end })
    }

    /// Family of the range.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.network.ip())
    }

    /// The network.
    #[must_use]
    pub fn network(&self) -> IpNetwork {
        self.network
    }

    /// How many pods the range has room for.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.end - FIRST_OFFSET
    }

    fn nth(&self, offset: u32) -> IpAddr {
        match self.network.ip() {
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from(u32::from(base) + offset)),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from(u128::from(base) + u128::from(offset))),
        }
    }

    /// Whether the range offers this address to pods.
    #[must_use]
    pub fn offers(&self, ip: IpAddr) -> bool {
        let offset = match (self.network.ip(), ip) {
            (IpAddr::V4(base), IpAddr::V4(ip)) => {
                u128::from(u32::from(ip)).checked_sub(u128::from(u32::from(base)))
            }
            (IpAddr::V6(base), IpAddr::V6(ip)) => u128::from(ip).checked_sub(u128::from(base)),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => None,
        };
        offset.is_some_and(|o| (u128::from(FIRST_OFFSET)..u128::from(self.end)).contains(&o))
    }
}

/// Why no address can be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChooseError {
    /// The Node has no pod range, or no Node is known.
    #[error("this node has no pod range")]
    NoRange,
    /// Every address of a range is leased, or in use without a lease.
    #[error("all {capacity} addresses of pod range {range} are leased")]
    Exhausted {
        /// The range.
        range: IpNetwork,
        /// Its size.
        capacity: u32,
    },
    /// An address that was asked for is none for pods of this node.
    #[error(
        "address {ip} is none that this node gives to pods: it must be in {ranges}, and neither its first two nor its last"
    )]
    NotOffered {
        /// What was asked for.
        ip: IpAddr,
        /// The ranges, for the message.
        ranges: String,
    },
    /// An address that was asked for has another holder.
    #[error("address {ip} is leased to {holder}")]
    Taken {
        /// What was asked for.
        ip: IpAddr,
        /// Who has it.
        holder: String,
    },
    /// An address that was asked for is in use, and nobody has it.
    #[error("address {0} is in use by a pod's interface that has no lease")]
    InUse(IpAddr),
}

/// Who has which address, and which were released when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    ranges: Vec<PodRange>,
    leases: BTreeMap<Attachment, Vec<IpAddr>>,
    leased: BTreeSet<IpAddr>,
    /// In use by whom nobody knows.
    withheld: BTreeSet<IpAddr>,
    /// Released addresses by the order of their release.
    released: BTreeMap<u64, IpAddr>,
    release_order: BTreeMap<IpAddr, u64>,
}

impl Ledger {
    /// Whether an address had a lease that has ended, and is nobody's now. One that never had
    /// any may be a pod's of another plugin.
    #[must_use]
    pub fn is_abandoned(&self, ip: IpAddr) -> bool {
        self.release_order.contains_key(&ip)
            && !self.leased.contains(&ip)
            && !self.withheld.contains(&ip)
    }

    /// Sets the node's pod ranges, one for each family. Leases outside of them stay what they are.
    pub fn set_ranges(&mut self, mut ranges: Vec<PodRange>) {
        ranges.sort_by_key(PodRange::family);
        ranges.dedup_by_key(|range| range.family());
        self.ranges = ranges;
    }

    /// The node's pod ranges, IPv4 first.
    #[must_use]
    pub fn ranges(&self) -> &[PodRange] {
        &self.ranges
    }

    /// The lease of an attachment.
    #[must_use]
    pub fn lease(&self, attachment: &Attachment) -> Option<&[IpAddr]> {
        self.leases.get(attachment).map(Vec::as_slice)
    }

    /// Every lease.
    pub fn leases(&self) -> impl Iterator<Item = (&Attachment, &[IpAddr])> {
        self.leases.iter().map(|(a, ips)| (a, ips.as_slice()))
    }

    /// One free address of each range, IPv4 first: the one in `wanted`, if it has one of
    /// that family. Changes nothing.
    ///
    /// # Errors
    /// [`ChooseError`]; a range that is exhausted fails the whole choice, for a
    /// pod with half of its families is worse than one that is tried again.
    pub fn choose(&self, wanted: &[IpAddr]) -> Result<Vec<IpAddr>, ChooseError> {
        if self.ranges.is_empty() {
            return Err(ChooseError::NoRange);
        }
        for ip in wanted {
            self.check_wanted(*ip)?;
        }
        self.ranges
            .iter()
            .map(|range| {
                let asked = wanted.iter().find(|ip| range.offers(**ip));
                asked.map_or_else(|| self.choose_in(range), |ip| Ok(*ip))
            })
            .collect()
    }

    fn check_wanted(&self, ip: IpAddr) -> Result<(), ChooseError> {
        if !self.ranges.iter().any(|range| range.offers(ip)) {
            let ranges: Vec<String> = self
                .ranges
                .iter()
                .map(|r| r.network().to_string())
                .collect();
            return Err(ChooseError::NotOffered {
                ip,
                ranges: ranges.join(", "),
            });
        }
        match self.holder(ip) {
            Some(holder) => Err(ChooseError::Taken {
                ip,
                holder: holder.to_string(),
            }),
            None if self.withheld.contains(&ip) => Err(ChooseError::InUse(ip)),
            None => Ok(()),
        }
    }

    /// Sets which addresses are in use without a lease, and so are given to nobody.
    /// Those that are leased count as leased.
    pub fn withhold(&mut self, in_use: BTreeSet<IpAddr>) {
        self.withheld = in_use;
        self.withheld.retain(|ip| !self.leased.contains(ip));
    }

    /// The addresses that are in use without a lease.
    pub fn withheld(&self) -> impl Iterator<Item = IpAddr> {
        self.withheld.iter().copied()
    }

    /// Who has an address.
    #[must_use]
    pub fn holder(&self, ip: IpAddr) -> Option<&Attachment> {
        if !self.leased.contains(&ip) {
            return None;
        }
        let lease = self.leases.iter().find(|(_, held)| held.contains(&ip));
        lease.map(|(attachment, _)| attachment)
    }

    fn choose_in(&self, range: &PodRange) -> Result<IpAddr, ChooseError> {
        let fresh = (FIRST_OFFSET..range.end)
            .map(|offset| range.nth(offset))
            .find(|ip| {
                !self.leased.contains(ip)
                    && !self.withheld.contains(ip)
                    && !self.release_order.contains_key(ip)
            });
        let mut released = self.released.values().copied();
        let oldest = || released.find(|ip| range.offers(*ip) && !self.withheld.contains(ip));
        fresh.or_else(oldest).ok_or(ChooseError::Exhausted {
            range: range.network,
            capacity: range.capacity(),
        })
    }

    /// Records a lease that is durable. An address that is leased to another already is refused.
    ///
    /// # Errors
    /// The address and who has it.
    pub fn record_lease(
        &mut self,
        attachment: Attachment,
        ips: Vec<IpAddr>,
    ) -> Result<(), LeasedTwice> {
        for ip in &ips {
            if let Some(holder) = self.holder(*ip) {
                return Err(LeasedTwice {
                    ip: *ip,
                    holder: holder.to_string(),
                    claimant: attachment.to_string(),
                });
            }
        }
        for ip in &ips {
            self.leased.insert(*ip);
            self.withheld.remove(ip);
            if let Some(order) = self.release_order.remove(ip) {
                self.released.remove(&order);
            }
        }
        self.leases.insert(attachment, ips);
        Ok(())
    }

    /// The number that the next release gets.
    #[must_use]
    pub fn next_release(&self) -> u64 {
        self.released
            .keys()
            .next_back()
            .map_or(0, |order| order + 1)
    }

    /// Records that an address was released as number `order`.
    pub fn record_released(&mut self, ip: IpAddr, order: u64) {
        if let Some(before) = self.release_order.insert(ip, order) {
            self.released.remove(&before);
        }
        self.released.insert(order, ip);
    }

    /// Records a release that is durable: its addresses get numbers from `order` on.
    pub fn record_release(&mut self, attachment: &Attachment, order: u64) {
        let ips = self.leases.remove(attachment).unwrap_or_default();
        for (ip, order) in ips.into_iter().zip(order..) {
            self.leased.remove(&ip);
            self.record_released(ip, order);
        }
    }

    /// Released addresses that no range offers any longer: they need not be remembered.
    pub fn forgettable(&self) -> impl Iterator<Item = IpAddr> {
        self.release_order
            .keys()
            .copied()
            .filter(|ip| !self.ranges.iter().any(|range| range.offers(*ip)))
    }

    /// Forgets that an address was ever released.
    pub fn forget(&mut self, ip: IpAddr) {
        if let Some(order) = self.release_order.remove(&ip) {
            self.released.remove(&order);
        }
    }
}

/// A lease record that contradicts another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("address {ip} is leased to {holder} already, so not to {claimant}")]
pub struct LeasedTwice {
    /// The address.
    pub ip: IpAddr,
    /// Who has it.
    pub holder: String,
    /// Who was to get it.
    pub claimant: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{ContainerId, IfName};

    /// Beside another plugin no pod has a lease of ours.
    #[test]
    fn an_address_is_abandoned_by_who_had_it() {
        let ip = IpAddr::from([10, 244, 1, 2]);
        let attachment = Attachment {
            container_id: ContainerId::try_from("pod".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let mut ledger = Ledger::default();
        assert!(!ledger.is_abandoned(ip), "never leased");
        ledger.record_lease(attachment.clone(), vec![ip]).unwrap();
        assert!(!ledger.is_abandoned(ip), "in use");
        ledger.record_release(&attachment, ledger.next_release());
        assert!(ledger.is_abandoned(ip));
        ledger.withhold(BTreeSet::from([ip]));
        assert!(!ledger.is_abandoned(ip), "somebody has it without a lease");
    }
}
