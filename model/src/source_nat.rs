//! Whose source is replaced, and by what: everything that the rules of source
//! NAT depend on and that changes seldom. What changes with each Service stands
//! in sets instead (external frontends, hairpins, VIPs).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::kube::Node;
use crate::network::{Networks, Policy, primary_address};

/// An address of this machine and the device that has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnAddress {
    /// The address.
    pub ip: IpAddr,
    /// The network that its prefix says is on the same link.
    pub link: IpNetwork,
    /// Name of the device.
    pub device: String,
}

/// Sources of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// What stands for the node where the device that leads out has no address
    /// of its own, as pods' veths have none.
    pub node: Option<IpAddr>,
    /// Devices that have addresses: there the kernel chooses the right one.
    pub devices: BTreeSet<String>,
}

/// The rules of source NAT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceNat {
    /// Networks as they follow from the cluster.
    pub networks: Networks,
    /// Whether every ClusterIP call gets a source of this node.
    pub masquerade_all: bool,
    /// Ports that a replaced source may have.
    pub ports: RangeInclusive<u16>,
    /// Sources by family.
    pub sources: BTreeMap<Family, Sources>,
}

impl Default for SourceNat {
    fn default() -> Self {
        Self::new(&Policy::default(), Networks::default(), &[], None)
    }
}

impl SourceNat {
    /// The rules for a machine with these addresses, in the machine's order.
    #[must_use]
    pub fn new(
        policy: &Policy,
        networks: Networks,
        own: &[OwnAddress],
        object: Option<&Node>,
    ) -> Self {
        let mut sources: BTreeMap<Family, Sources> = BTreeMap::new();
        for family in Family::ALL {
            let known = object.and_then(|node| primary_address(node, family));
            let of_family = own.iter().filter(|a| Family::of(a.ip) == family);
            let entry = sources.entry(family).or_default();
            entry.devices = of_family.clone().map(|a| a.device.clone()).collect();
            let mut ips = of_family.map(|a| a.ip);
            entry.node = ips
                .clone()
                .find(|ip| Some(*ip) == known)
                .or_else(|| ips.next());
        }
        Self {
            networks,
            masquerade_all: policy.masquerade_all,
            ports: policy.source_ports(),
            sources,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::{AddressKind, NodeAddress, NodeStatus};

    fn own(ip: &str, device: &str) -> OwnAddress {
        OwnAddress {
            ip: ip.parse().unwrap(),
            link: format!("{ip}/24").parse().unwrap(),
            device: device.to_owned(),
        }
    }

    #[test]
    fn the_node_objects_address_stands_for_the_node_if_the_machine_has_it() {
        let machine = [own("198.51.100.1", "eth1"), own("192.0.2.1", "eth0")];
        let chosen = |address: &str| {
            let object = Node {
                status: NodeStatus {
                    addresses: vec![NodeAddress {
                        kind: AddressKind::InternalIP,
                        address: address.to_owned(),
                    }],
                },
                ..Node::default()
            };
            let nat = SourceNat::new(
                &Policy::default(),
                Networks::default(),
                &machine,
                Some(&object),
            );
            nat.sources[&Family::IPv4].node.unwrap().to_string()
        };
        assert_eq!(chosen("192.0.2.1"), "192.0.2.1");
        assert_eq!(chosen("203.0.113.9"), "198.51.100.1", "not on this machine");
    }
}
