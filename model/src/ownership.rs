//! What in the kernel is ours.
//!
//! Every name, number and rule that answers "did Ferrule make this?" stands
//! here and nowhere else. The risk is lopsided: to miss one of ours leaves a
//! leftover that the next pass removes; to take another's for ours cuts its
//! network. So each answer needs proof, and "probably" is no.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

use crate::address::FrontendAddr;
use crate::names::{Attachment, ContainerId, IfName, NetworkName};
use crate::service::{Mark, ServiceKey};

/// The dummy device that carries the VIPs; the name that operators of
/// kube-proxy's IPVS mode know.
pub const VIP_DEVICE: &str = "kube-ipvs0";

/// Our one nftables table, of family `inet`.
pub const NFT_TABLE: &str = "ferrule";

/// Host ends of pods' veths begin so.
pub const HOST_VETH_PREFIX: &str = "fer";

/// The devices that shape what comes from pods begin so.
pub const SHAPER_PREFIX: &str = "feb";

/// Bits of a firewall mark that tell our virtual services by mark apart.
pub const MARK_BITS: u32 = 24;

/// The other bits, in which a mark shows that it is one of these. IPVS compares
/// the whole mark, so other programs' bits cannot stand beside it: it is set just
/// before IPVS looks at a packet, and taken off behind it.
pub const MARK_BASE: Mark = 0xfe00_0000;

/// The mark between IPVS and source NAT of new connections of clients that came
/// through a device by which nobody of the cluster comes.
pub const STRANGER_MARK: Mark = 0xfd00_0000;

/// `rtm_protocol` of every route we make (the kernel leaves 4 to 255 to routing
/// programs; iproute2's `rt_protos` does not list this one).
pub const ROUTE_PROTOCOL: u8 = 101;

fn digest(attachment: &Attachment) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(attachment.container_id.as_str());
    hash.update([0]);
    hash.update(attachment.interface.as_str());
    hash.finalize().into()
}

/// Name of the host end of a pod's veth: the prefix and 60 bits of SHA-256 over
/// the attachment in base 32, which fits the kernel's 15 bytes.
///
/// It is a function of the attachment alone, so that a DEL finds the device
/// with the agent down and every record lost.
#[must_use]
pub fn host_veth_name(attachment: &Attachment) -> IfName {
    derived_name(HOST_VETH_PREFIX, attachment)
}

/// Name of the ifb device that shapes what comes from a pod: the same bits
/// behind another prefix, so that one is found from the other by eye.
#[must_use]
pub fn shaper_name(attachment: &Attachment) -> IfName {
    derived_name(SHAPER_PREFIX, attachment)
}

/// Whether a name is like those of a pod's devices. No proof of anything: for
/// telling what concerns the node's own network from what does not.
#[must_use]
pub fn is_of_a_pod(name: &str) -> bool {
    name.starts_with(HOST_VETH_PREFIX) || name.starts_with(SHAPER_PREFIX)
}

fn derived_name(prefix: &str, attachment: &Attachment) -> IfName {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut bits = digest(attachment)
        .iter()
        .take(8)
        .fold(0_u64, |bits, byte| (bits << 8) | u64::from(*byte));
    let mut name = String::from(prefix);
    for _ in prefix.len()..IfName::MAX_LEN {
        let index = usize::try_from(bits & 31).unwrap_or(0);
        name.push(char::from(ALPHABET[index]));
        bits >>= 5;
    }
    IfName::from_derived(name)
}

/// Hardware address of the host end: locally administered, unicast, and like
/// the name a function of the attachment alone (45 other bits of the hash).
#[must_use]
pub fn host_veth_mac(attachment: &Attachment) -> [u8; 6] {
    let mut mac = veth_mac(attachment);
    mac[5] &= 0xfe;
    mac
}

/// Hardware address of the pod's end, which differs from the host's in the last bit.
#[must_use]
pub fn pod_veth_mac(attachment: &Attachment) -> [u8; 6] {
    let mut mac = veth_mac(attachment);
    mac[5] |= 0x01;
    mac
}

fn veth_mac(attachment: &Attachment) -> [u8; 6] {
    let digest = digest(attachment);
    mac_of(&digest[digest.len() - 6..])
}

/// Hardware address of the ifb device: nobody sends to it, it is the proof of
/// [`owns_shaper`]. Other bits of the hash than the veth's and the names'.
#[must_use]
pub fn shaper_mac(attachment: &Attachment) -> [u8; 6] {
    mac_of(&digest(attachment)[16..22])
}

/// Locally administered and unicast.
fn mac_of(bytes: &[u8]) -> [u8; 6] {
    let mut mac = [0; 6];
    mac.copy_from_slice(bytes);
    mac[0] = (mac[0] & 0xfc) | 0x02;
    mac
}

/// Longest `IFLA_IFALIAS` that the kernel takes, in bytes (`IFALIASZ` less the terminating zero).
const MAX_ALIAS: usize = 255;

/// Bytes of a container ID that stand in an alias in which it does not fit whole.
const SHORT_ID: usize = 64;

/// `IFLA_IFALIAS` of a pod's devices on the host: tells an operator, and the
/// agent after a loss of its leases, whose they are and of which network.
///
/// A container ID that does not fit is cut and marked with `~`, which no ID
/// has: such an alias proves whose the device is, but cannot be read back.
#[must_use]
pub fn device_alias(attachment: &Attachment, network: Option<&NetworkName>) -> String {
    let mut alias = alias_of(attachment);
    if let Some(network) = network
        && alias.len() + 1 + network.as_str().len() <= MAX_ALIAS
    {
        alias.push(' ');
        alias.push_str(network.as_str());
    }
    alias
}

fn alias_of(attachment: &Attachment) -> String {
    let id = attachment.container_id.as_str();
    let whole = format!("ferrule {id} {}", attachment.interface);
    if whole.len() <= MAX_ALIAS {
        return whole;
    }
    // An ID is ASCII, so every offset is a boundary.
    format!("ferrule {}~ {}", &id[..SHORT_ID], attachment.interface)
}

/// Whether an alias is like those of pods' devices. No proof of anything: for telling
/// whom to ask, where [`read_alias`] cannot say whose the device is.
#[must_use]
pub fn is_alias(alias: &str) -> bool {
    alias.starts_with("ferrule ")
}

/// Whose device it is, and of which network, by the name and alias of the host end
/// of a veth, or of a shaper.
///
/// `None` is for what is not provably ours, and for what we cannot read back.
#[must_use]
pub fn read_alias(name: &str, alias: &str) -> Option<(Attachment, Option<NetworkName>)> {
    // An interface's name may have no blank, so the words are told apart.
    let mut words = alias.split(' ');
    if words.next() != Some("ferrule") {
        return None;
    }
    let attachment = Attachment {
        container_id: ContainerId::try_from(words.next()?.to_owned()).ok()?,
        interface: IfName::try_from(words.next()?.to_owned()).ok()?,
    };
    let network = match words.next() {
        None => None,
        Some(word) => Some(NetworkName::try_from(word.to_owned()).ok()?),
    };
    let names = [host_veth_name(&attachment), shaper_name(&attachment)];
    let proven = words.next().is_none() && names.iter().any(|ours| ours.as_str() == name);
    proven.then_some((attachment, network))
}

/// Whether a veth is the host end of the one that we made for `attachment`.
///
/// The name alone could be anybody's: the alias must agree. The kernel takes
/// an alias only after the link is made, so a link without any, left by an ADD
/// that was killed in between, is told by its MAC, which is part of the
/// message that makes it. Another's alias is never overlooked, unless a DEL
/// names the namespace in which the other end is the pod's interface.
#[must_use]
pub fn owns_host_veth(
    attachment: &Attachment,
    name: &str,
    alias: Option<&str>,
    mac: Option<[u8; 6]>,
) -> bool {
    proven(attachment, alias, mac, host_veth_mac(attachment))
        && name == host_veth_name(attachment).as_str()
}

/// Whether a veth has name and MAC of the host end that we made for `attachment`.
///
/// That is no proof, but reason enough to keep the lease: it may be a live pod's,
/// whose alias somebody has changed.
#[must_use]
pub fn resembles_host_veth(attachment: &Attachment, name: &str, mac: Option<[u8; 6]>) -> bool {
    mac == Some(host_veth_mac(attachment)) && name == host_veth_name(attachment).as_str()
}

/// Whether an ifb device is the one that we made to shape what comes from
/// `attachment`. The proof is that of [`owns_host_veth`].
#[must_use]
pub fn owns_shaper(
    attachment: &Attachment,
    name: &str,
    alias: Option<&str>,
    mac: Option<[u8; 6]>,
) -> bool {
    proven(attachment, alias, mac, shaper_mac(attachment))
        && name == shaper_name(attachment).as_str()
}

fn proven(
    attachment: &Attachment,
    alias: Option<&str>,
    mac: Option<[u8; 6]>,
    derived: [u8; 6],
) -> bool {
    match alias {
        // The network behind it proves nothing more.
        Some(alias) => alias
            .strip_prefix(&alias_of(attachment))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(' ')),
        None => mac == Some(derived),
    }
}

/// Whether an IPVS virtual service is ours.
///
/// Proof is that its address is a VIP of ours: a VIP enters the guard's set in
/// our nft table before its first virtual service is made and leaves it after
/// the last one is gone, so this holds across a crash at any instruction. At
/// the node's own addresses others may have services too: there the proof is
/// the frontend itself in the set of external ones, which keeps the same order. So it is at
/// addresses that the operator shares with another program (kube-proxy's `excludeCIDRs`), by the
/// set of frontends whose replies pass the guard.
/// One selected by a firewall mark is ours if the filter's map gives that mark to
/// a frontend; the entry keeps the same order, too.
#[must_use]
pub fn owns_virtual_service(key: &ServiceKey, proofs: &Proofs) -> bool {
    match key {
        ServiceKey::Address(frontend) => {
            proofs.vips.contains(&frontend.ip) || proofs.frontends.contains(frontend)
        }
        ServiceKey::Mark { .. } => proofs.marks.contains(key),
    }
}

/// What proves that virtual services are ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proofs {
    /// VIPs of ours at which nobody else has virtual services.
    pub vips: BTreeSet<IpAddr>,
    /// Frontends in the set of external ones, and those at addresses that are shared.
    pub frontends: BTreeSet<FrontendAddr>,
    /// Marks that the filter's map gives to a frontend of the family.
    pub marks: BTreeSet<ServiceKey>,
}

/// Whether a route leads to another node's pods and is ours: by its protocol
/// number and because it has a gateway. Routes to this node's pods have none.
#[must_use]
pub fn owns_node_route(protocol: u8, has_gateway: bool) -> bool {
    protocol == ROUTE_PROTOCOL && has_gateway
}

/// `IFA_PROTO` of every address that we put on a device which is not ours.
pub const ADDRESS_PROTOCOL: u8 = ROUTE_PROTOCOL;

/// Whether a route of the kernel's local table binds a VIP and is ours: by its protocol
/// number and because it is on the loopback device.
#[must_use]
pub fn owns_vip_route(protocol: u8, on_loopback: bool) -> bool {
    protocol == ROUTE_PROTOCOL && on_loopback
}

/// Whether an address of a device that is not ours binds a VIP and is ours. The kernel
/// notes who made it; that it is a VIP proves nothing, for others bind VIPs, too.
#[must_use]
pub fn owns_address(protocol: u8) -> bool {
    protocol == ADDRESS_PROTOCOL
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::ContainerId;

    fn attachment(container: &str, interface: &str) -> Attachment {
        Attachment {
            container_id: ContainerId::try_from(container.to_owned()).unwrap(),
            interface: IfName::try_from(interface.to_owned()).unwrap(),
        }
    }

    #[test]
    fn host_veth_names_are_stable_and_distinct() {
        let name = host_veth_name(&attachment("abc", "eth0"));
        assert_eq!(name, host_veth_name(&attachment("abc", "eth0")));
        assert_eq!(name.as_str().len(), 15);
        assert!(name.as_str().starts_with(HOST_VETH_PREFIX));
        assert_ne!(name, host_veth_name(&attachment("abc", "eth1")));
        assert_ne!(
            host_veth_name(&attachment("abc", "d")),
            host_veth_name(&attachment("ab", "cd"))
        );
    }

    #[test]
    fn macs_are_local_unicast_and_differ_in_one_bit() {
        let a = attachment("abc", "eth0");
        let (host, pod) = (host_veth_mac(&a), pod_veth_mac(&a));
        assert_eq!(host[0] & 0x03, 0x02);
        assert_eq!(host[..5], pod[..5]);
        assert_eq!(host[5] ^ pod[5], 1);
        assert_ne!(host, host_veth_mac(&attachment("abd", "eth0")));
        let shaper = shaper_mac(&a);
        assert_eq!(shaper[0] & 0x03, 0x02);
        assert_ne!(shaper[..5], host[..5]);
    }

    #[test]
    fn a_name_without_proof_is_not_ours() {
        let a = attachment("abc", "eth0");
        let name = host_veth_name(&a);
        let (name, alias, mac) = (name.as_str(), device_alias(&a, None), host_veth_mac(&a));
        let pods = NetworkName::try_from("pods".to_owned()).unwrap();
        let of_network = device_alias(&a, Some(&pods));
        assert!(owns_host_veth(&a, name, Some(&of_network), None));
        assert!(!owns_host_veth(&a, name, Some(&format!("{alias}x")), None));
        assert!(owns_host_veth(&a, name, Some(&alias), None));
        assert!(
            owns_host_veth(&a, name, None, Some(mac)),
            "killed before the alias"
        );
        assert!(!owns_host_veth(&a, name, None, None));
        assert!(!owns_host_veth(&a, name, None, Some(pod_veth_mac(&a))));
        assert!(!owns_host_veth(&a, name, Some("uplink"), Some(mac)));
        assert!(!owns_host_veth(&a, "eth0", Some(&alias), Some(mac)));
    }

    #[test]
    fn an_alias_is_read_back() {
        let a = attachment("abc", "eth0");
        let name = host_veth_name(&a);
        let pods = NetworkName::try_from("pods".to_owned()).unwrap();
        for network in [None, Some(pods)] {
            let alias = device_alias(&a, network.as_ref());
            let read = read_alias(name.as_str(), &alias);
            assert_eq!(read, Some((a.clone(), network)), "{alias}");
        }
        for alias in [
            "",
            "ferrule",
            "ferrule abc",
            "ferrule abc eth1",
            "ferrule abc eth0 pods more",
            "ferrule abc eth0 ",
            "Ferrule abc eth0",
        ] {
            assert_eq!(read_alias(name.as_str(), alias), None, "{alias}");
        }
        assert_eq!(read_alias("eth0", "ferrule abc eth0"), None);
    }

    #[test]
    fn an_alias_fits_whatever_the_id() {
        let network = NetworkName::try_from("n".repeat(128)).unwrap();
        for length in [64, 200, 232, 233, 234, 256] {
            let a = attachment(&"x".repeat(length), "fifteen-bytes__");
            let alias = device_alias(&a, Some(&network));
            assert!(alias.len() <= MAX_ALIAS, "{length}: {}", alias.len());
            let name = host_veth_name(&a);
            assert!(owns_host_veth(&a, name.as_str(), Some(&alias), None));
            let other = attachment(&"x".repeat(length - 1), "fifteen-bytes__");
            let its = host_veth_name(&other);
            assert!(!owns_host_veth(&other, name.as_str(), Some(&alias), None));
            assert_ne!(name, its);
        }
    }

    #[test]
    fn what_binds_a_vip_is_ours_by_our_number_alone() {
        assert!(owns_vip_route(ROUTE_PROTOCOL, true));
        assert!(!owns_vip_route(ROUTE_PROTOCOL, false), "another device's");
        // RTPROT_KERNEL, RTPROT_STATIC; IFAPROT_UNSPEC, IFAPROT_KERNEL_LL.
        for others in [2, 4] {
            assert!(!owns_vip_route(others, true), "{others}");
        }
        assert!(owns_address(ADDRESS_PROTOCOL));
        for others in [0, 3] {
            assert!(!owns_address(others), "{others}");
        }
    }

    #[test]
    fn a_shaper_is_proven_like_a_veth_and_is_none() {
        let a = attachment("abc", "eth0");
        let (name, alias, mac) = (shaper_name(&a), device_alias(&a, None), shaper_mac(&a));
        let name = name.as_str();
        assert_eq!(name.len(), IfName::MAX_LEN);
        assert_eq!(
            name.strip_prefix(SHAPER_PREFIX),
            host_veth_name(&a).as_str().strip_prefix(HOST_VETH_PREFIX)
        );
        assert!(owns_shaper(&a, name, Some(&alias), None));
        assert!(owns_shaper(&a, name, None, Some(mac)), "before the alias");
        assert!(!owns_shaper(&a, name, None, None));
        assert!(!owns_shaper(&a, name, None, Some(host_veth_mac(&a))));
        assert!(!owns_shaper(&a, name, Some("uplink"), Some(mac)));
        let veth = host_veth_name(&a);
        assert!(!owns_shaper(&a, veth.as_str(), Some(&alias), Some(mac)));
        assert!(!owns_host_veth(&a, name, Some(&alias), Some(mac)));
        assert!(is_of_a_pod(name) && is_of_a_pod(veth.as_str()));
        assert!(!is_of_a_pod("eth0") && !is_of_a_pod("ifb0"));
    }
}
