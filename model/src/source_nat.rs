//! Whose source is replaced, and by what: everything that the rules of source
//! NAT depend on and that changes seldom. What changes with each Service stands
//! in sets instead (external frontends, hairpins, VIPs).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::binding::VipBinding;
use crate::kube::Node;
use crate::network::{DetectLocal, Networks, Policy, outermost, primary_address};

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

/// As whom the kernel asks for a neighbour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Solicitor {
    /// The device that it asks on; any, if none is named.
    pub device: Option<String>,
    /// Where the neighbour is that is asked for; anywhere, if nothing is named.
    pub asked: Option<IpNetwork>,
    /// An address of the node.
    pub ip: IpAddr,
}

impl Solicitor {
    fn of(device: Option<&String>, ip: IpAddr) -> Self {
        Self {
            device: device.cloned(),
            asked: None,
            ip,
        }
    }
}

/// The rules of source NAT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceNat {
    /// Networks as they follow from the cluster.
    pub networks: Networks,
    /// Whether every ClusterIP call gets a source of this node.
    pub masquerade_all: bool,
    /// How clients of a ClusterIP are told that are within the cluster.
    pub detect_local: Option<DetectLocal>,
    /// The configured pod network.
    pub cluster_cidrs: BTreeSet<IpNetwork>,
    /// Cluster addresses of Services that are left to another proxy: few, where there are any.
    pub left_to_others: BTreeSet<IpAddr>,
    /// Ports that a replaced source may have.
    pub ports: RangeInclusive<u16>,
    /// Sources by family.
    pub sources: BTreeMap<Family, Sources>,
    /// As whom the kernel asks for neighbours where it would do so as a VIP; the first that
    /// fits.
    pub solicitors: Vec<Solicitor>,
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
            let of_family = own.iter().filter(|a| Family::of(a.ip) == family);
            let entry = sources.entry(family).or_default();
            entry.devices = of_family.map(|a| a.device.clone()).collect();
            entry.node = node_address(own, object, family);
        }
        Self {
            solicitors: solicitors(
                &policy.vip_binding,
                own,
                node_address(own, object, Family::IPv4),
            ),
            networks,
            masquerade_all: policy.masquerade_all,
            detect_local: policy.detect_local.clone(),
            cluster_cidrs: policy.cluster_cidrs.iter().copied().collect(),
            left_to_others: BTreeSet::new(),
            ports: policy.source_ports(),
            sources,
        }
    }
}

/// Who asks for a neighbour says by that where the asker is. The kernel asks by the source of
/// the packet that waits, which is a VIP where a Service answers: in IPv4 wherever a VIP is
/// bound, in IPv6 where it is an address of the device that leads out.
fn solicitors(binding: &VipBinding, own: &[OwnAddress], node: Option<IpAddr>) -> Vec<Solicitor> {
    let (v4, v6): (Vec<_>, Vec<_>) = own.iter().partition(|address| address.ip.is_ipv4());
    let on_link = v4
        .iter()
        .filter(|address| address.link.prefix() < Family::IPv4.bits());
    let mut solicitors: Vec<Solicitor> = on_link
        .map(|address| Solicitor {
            device: Some(address.device.clone()),
            asked: Some(address.link),
            ip: address.ip,
        })
        .collect();
    if let VipBinding::Device(device) = binding {
        let of_device = v6.iter().find(|address| address.device == device.as_str());
        solicitors
            .extend(of_device.map(|address| Solicitor::of(Some(&address.device), address.ip)));
    }
    let mut devices = BTreeSet::new();
    let first = v4.iter().filter(|address| devices.insert(&address.device));
    solicitors.extend(first.map(|address| Solicitor::of(Some(&address.device), address.ip)));
    solicitors.extend(node.map(|ip| Solicitor::of(None, ip)));
    solicitors
}

/// The address that stands for the node: the one by which it is known, if the machine has
/// that, else the machine's first.
#[must_use]
pub fn node_address(own: &[OwnAddress], object: Option<&Node>, family: Family) -> Option<IpAddr> {
    let known = object.and_then(|node| primary_address(node, family));
    let ips = own.iter().map(|address| address.ip);
    let mut ips = ips.filter(|ip| Family::of(*ip) == family);
    ips.clone()
        .find(|ip| Some(*ip) == known)
        .or_else(|| ips.next())
}

/// Whom a ClusterIP's backends see as the node, for being from beyond the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Strangers<'a> {
    /// Whoever is in none of these networks.
    OutsideOf(Vec<IpNetwork>),
    /// Whoever comes through another device.
    NotThrough(&'a str),
    /// Whoever comes through a device whose name begins otherwise.
    NotThroughAny(&'a str),
}

impl SourceNat {
    /// Who is a stranger to the cluster, in a family; `None`: nobody.
    #[must_use]
    pub fn strangers(&self, family: Family) -> Option<Strangers<'_>> {
        let outside = |networks| {
            let networks = outermost(networks, family);
            (!networks.is_empty()).then_some(Strangers::OutsideOf(networks))
        };
        match self.detect_local.as_ref()? {
            DetectLocal::ClusterCidr => outside(&self.cluster_cidrs),
            DetectLocal::NodeCidr => outside(&self.networks.node_pods),
            DetectLocal::BridgeInterface(name) => Some(Strangers::NotThrough(name)),
            DetectLocal::InterfaceNamePrefix(prefix) => Some(Strangers::NotThroughAny(prefix)),
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
            link: {
                let prefix = if ip.contains(':') { 64 } else { 24 };
                let link: IpNetwork = format!("{ip}/{prefix}").parse().unwrap();
                IpNetwork::new(link.network(), prefix).unwrap()
            },
            device: device.to_owned(),
        }
    }

    #[test]
    fn neighbours_are_asked_for_by_an_address_of_their_own_link() {
        let machine = [
            own("192.0.2.1", "eth0"),
            own("192.0.2.2", "eth0"),
            own("198.51.100.1", "eth1"),
            own("2001:db8::1", "eth0"),
            own("2001:db8:1::1", "eth1"),
        ];
        let said = |vip_binding| {
            let policy = Policy {
                vip_binding,
                ..Policy::default()
            };
            let nat = SourceNat::new(&policy, Networks::default(), &machine, None);
            let word = |row: &Solicitor| {
                let device = row.device.as_deref().unwrap_or("*");
                let asked = row.asked.map_or("*".to_owned(), |asked| asked.to_string());
                format!("{device} {asked} {}", row.ip)
            };
            nat.solicitors.iter().map(word).collect::<Vec<_>>()
        };
        let v4 = [
            "eth0 192.0.2.0/24 192.0.2.1",
            "eth0 192.0.2.0/24 192.0.2.2",
            "eth1 198.51.100.0/24 198.51.100.1",
            "eth0 * 192.0.2.1",
            "eth1 * 198.51.100.1",
            "* * 192.0.2.1",
        ];
        assert_eq!(said(VipBinding::Address), v4);
        assert_eq!(said(VipBinding::Route), v4);
        let eth1 = VipBinding::Device("eth1".to_owned().try_into().unwrap());
        let (on_link, others) = v4.split_at(3);
        let all = [on_link, &["eth1 * 2001:db8:1::1"], others].concat();
        assert_eq!(said(eth1), all);
    }

    /// There is nobody else on the link of a lone address.
    #[test]
    fn a_lone_address_asks_for_no_neighbour_of_its_own_link() {
        let mut alone = own("192.0.2.1", "eth0");
        alone.link = "192.0.2.1/32".parse().unwrap();
        let nat = SourceNat::new(&Policy::default(), Networks::default(), &[alone], None);
        let asked: Vec<_> = nat.solicitors.iter().map(|row| row.asked).collect();
        assert_eq!(asked, [None, None], "by its device, and any other");
    }

    #[test]
    fn who_is_a_stranger_to_the_cluster() {
        let network = |text: &str| text.parse::<IpNetwork>().unwrap();
        let strangers = |detect_local, family| {
            let policy = Policy {
                detect_local,
                cluster_cidrs: vec![network("10.244.0.0/16")],
                ..Policy::default()
            };
            let networks = Networks {
                node_pods: [network("fd00:1::/64")].into(),
                ..Networks::default()
            };
            let nat = SourceNat::new(&policy, networks, &[], None);
            nat.strangers(family).map(|who| format!("{who:?}"))
        };
        let outside = |text| Some(format!("{:?}", Strangers::OutsideOf(vec![network(text)])));
        let (v4, v6) = (Family::IPv4, Family::IPv6);
        for (detect_local, family, expected) in [
            (None, v4, None),
            (Some(DetectLocal::ClusterCidr), v4, outside("10.244.0.0/16")),
            // Nothing is known of the other family: nobody is.
            (Some(DetectLocal::ClusterCidr), v6, None),
            (Some(DetectLocal::NodeCidr), v4, None),
            (Some(DetectLocal::NodeCidr), v6, outside("fd00:1::/64")),
            (
                Some(DetectLocal::BridgeInterface("cni0".to_owned())),
                v4,
                Some(format!("{:?}", Strangers::NotThrough("cni0"))),
            ),
            (
                Some(DetectLocal::InterfaceNamePrefix("fe".to_owned())),
                v6,
                Some(format!("{:?}", Strangers::NotThroughAny("fe"))),
            ),
        ] {
            let asked = format!("{detect_local:?} {family}");
            assert_eq!(strangers(detect_local, family), expected, "{asked}");
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
