//! A pod's veth pair: what it is called, and every message that makes it.
//!
//! Nothing here talks to the kernel, so the tests can look at what would be
//! sent. The pod reaches its gateway without a bridge and without proxy ARP:
//! a link-scope route to a link-local address that no device needs to carry,
//! and a permanent neighbour entry with the MAC of the host's end. The host
//! has a route and a permanent neighbour entry for each address of the pod.
//! So no packet ever waits for ARP or neighbour discovery.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;

use ferrule_model::names::{Attachment, IfName, NetworkName};
use ferrule_model::ownership;
use ferrule_netlink::route as netlink_route;
use ipnetwork::IpNetwork;
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// The pods' gateways, the same on every node. Link-local, so that they clash
/// with no address that a pod could want to reach.
const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

const MAKE: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const PUT: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
const SET: u16 = NLM_F_REQUEST | NLM_F_ACK;

/// The gateway of a pod's address.
pub(crate) fn gateway(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => GATEWAY_V4.into(),
        IpAddr::V6(_) => GATEWAY_V6.into(),
    }
}

/// `0.0.0.0/0` or `::/0`.
pub(crate) fn everywhere(address: IpAddr) -> (IpAddr, u8) {
    match address {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// A hardware address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mac(pub(crate) [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, byte) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { ":" };
            write!(f, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

/// A message for the kernel, and what it does, for the error.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) what: String,
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) flags: u16,
}

/// One pod's pair of interfaces.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// Name of the host's end.
    pub(crate) host_name: IfName,
    /// Name of the pod's end.
    pub(crate) pod_name: IfName,
    /// Alias of the host's end: tells people and the agent whose it is.
    alias: String,
    /// MAC of the host's end, which is the pod's gateway.
    pub(crate) host_mac: Mac,
    /// MAC of the pod's end.
    pub(crate) pod_mac: Mac,
    /// MTU of both ends, in bytes.
    pub(crate) mtu: u32,
    /// The pod's addresses, one of each family at most.
    pub(crate) addresses: Vec<IpNetwork>,
}

impl Pair {
    /// The pair of an attachment, with the addresses it has been leased.
    pub(crate) fn new(
        attachment: &Attachment,
        network: &NetworkName,
        mtu: u32,
        addresses: Vec<IpNetwork>,
    ) -> Self {
        let host_name = ownership::host_veth_name(attachment);
        Self {
            host_mac: Mac(ownership::host_veth_mac(attachment)),
            pod_mac: Mac(ownership::pod_veth_mac(attachment)),
            host_name,
            pod_name: attachment.interface.clone(),
            alias: ownership::device_alias(attachment, Some(network)),
            mtu,
            addresses,
        }
    }

    /// With another MAC for the pod's end.
    pub(crate) fn with_mac(self, pod_mac: Mac) -> Self {
        Self { pod_mac, ..self }
    }

    /// Whether the pod has an IPv6 address.
    pub(crate) fn has_ipv6(&self) -> bool {
        self.addresses.iter().any(IpNetwork::is_ipv6)
    }

    /// Makes both ends in one message, the peer in the pod's namespace from
    /// the start: moving it there later costs the kernel a grace period of
    /// some 17 ms.
    ///
    /// The kernel ignores `IFLA_IFALIAS` in a message that makes a link
    /// (`rtnl_create_link()`, seen with 6.18), so the alias comes later, with
    /// [`Pair::host_side`]. Until then the MAC is the proof that the link is
    /// ours; see [`ownership::owns_host_veth`].
    pub(crate) fn create(&self, netns: RawFd) -> Order {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(self.pod_name.to_string()),
            LinkAttribute::NetNsFd(netns),
            LinkAttribute::Mtu(self.mtu),
            LinkAttribute::Address(self.pod_mac.0.to_vec()),
        ];
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(self.host_name.to_string()),
            LinkAttribute::Mtu(self.mtu),
            // Given explicitly, or udev's MACAddressPolicy would change it
            // behind our back and cut the pods' neighbour entries off.
            LinkAttribute::Address(self.host_mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        Order {
            what: format!(
                "make veth {} with its peer {}",
                self.host_name, self.pod_name
            ),
            message: RouteNetlinkMessage::NewLink(link),
            flags: MAKE,
        }
    }

    /// The pod's side, its interface being `index`; in this order.
    pub(crate) fn pod_side(&self, index: u32, loopback: u32) -> Vec<Order> {
        let mut orders = vec![up("lo", loopback), up(self.pod_name.as_str(), index)];
        for address in &self.addresses {
            let ip = address.ip();
            let gateway = gateway(ip);
            orders.push(add_address(index, *address));
            orders.push(neighbour(index, gateway, self.host_mac));
            orders.push(route(index, single(gateway), None, RouteProtocol::Boot));
            orders.push(route(
                index,
                everywhere(ip),
                Some(gateway),
                RouteProtocol::Boot,
            ));
        }
        orders
    }

    /// The host's side, its interface being `index`; in this order.
    pub(crate) fn host_side(&self, index: u32) -> Vec<Order> {
        let mut first = up(self.host_name.as_str(), index);
        if let RouteNetlinkMessage::SetLink(link) = &mut first.message {
            link.attributes = vec![LinkAttribute::IfAlias(self.alias.clone())];
        }
        let mut orders = vec![first];
        for address in &self.addresses {
            let ip = address.ip();
            let ours = RouteProtocol::Other(ownership::ROUTE_PROTOCOL);
            orders.push(neighbour(index, ip, self.pod_mac));
            orders.push(route(index, single(ip), None, ours));
        }
        orders
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn single(ip: IpAddr) -> (IpAddr, u8) {
    match ip {
        IpAddr::V4(_) => (ip, 32),
        IpAddr::V6(_) => (ip, 128),
    }
}

pub(crate) fn up(name: &str, index: u32) -> Order {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Order {
        what: format!("set {name} up"),
        message: RouteNetlinkMessage::SetLink(link),
        flags: SET,
    }
}

/// Deletes the interface `index`.
pub(crate) fn delete_link(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    RouteNetlinkMessage::DelLink(link)
}

/// Asks for the interface of a name.
pub(crate) fn get_link(name: &str) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    RouteNetlinkMessage::GetLink(link)
}

/// Asks for the interface of an index.
pub(crate) fn get_link_at(index: u32) -> RouteNetlinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    RouteNetlinkMessage::GetLink(link)
}

/// Asks for the interface of an index in another namespace, by what ours calls that.
pub(crate) fn get_link_in(namespace: i32, index: u32) -> RouteNetlinkMessage {
    /// `IFLA_TARGET_NETNSID`, which the library does not know.
    const TARGET_NETNSID: u16 = 46;
    let mut link = LinkMessage::default();
    link.header.index = index;
    let namespace = DefaultNla::new(TARGET_NETNSID, namespace.to_ne_bytes().to_vec());
    link.attributes = vec![LinkAttribute::Other(namespace)];
    RouteNetlinkMessage::GetLink(link)
}

/// Asks for all interfaces of a namespace.
pub(crate) fn get_links() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetLink(LinkMessage::default())
}

/// Asks where packets for `ip` go.
pub(crate) fn get_route(ip: IpAddr) -> RouteNetlinkMessage {
    let mut route = RouteMessage::default();
    let (_, length) = single(ip);
    route.header.address_family = family(ip);
    route.header.destination_prefix_length = length;
    route.attributes = vec![RouteAttribute::Destination(ip.into())];
    RouteNetlinkMessage::GetRoute(route)
}

/// Asks for all addresses of a namespace.
pub(crate) fn get_addresses() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetAddress(AddressMessage::default())
}

/// Asks for all neighbour entries of a namespace.
pub(crate) fn get_neighbours() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default())
}

/// Asks for all routes of a namespace.
pub(crate) fn get_routes() -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetRoute(RouteMessage::default())
}

fn add_address(index: u32, address: IpNetwork) -> Order {
    let ip = address.ip();
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.index = index;
    message.header.prefix_len = address.prefix();
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    if ip.is_ipv6() {
        // The agent leases an address once; detection would only keep the pod
        // from using it for a second or more.
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Order {
        what: format!("add address {address} to the pod's interface"),
        message: RouteNetlinkMessage::NewAddress(message),
        flags: MAKE,
    }
}

fn neighbour(index: u32, ip: IpAddr, mac: Mac) -> Order {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(ip.into()),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    Order {
        what: format!("add a permanent neighbour entry for {ip}"),
        message: RouteNetlinkMessage::NewNeighbour(message),
        flags: PUT,
    }
}

/// A route out of interface `index`. It must not exist yet: replacing would
/// take away what another put there for the same address.
fn route(
    index: u32,
    (destination, length): (IpAddr, u8),
    gateway: Option<IpAddr>,
    protocol: RouteProtocol,
) -> Order {
    let message = netlink_route::out_of(index, (destination, length), gateway, protocol);
    Order {
        what: format!("add a route to {destination}/{length}"),
        message: RouteNetlinkMessage::NewRoute(message),
        flags: MAKE,
    }
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::ContainerId;

    use super::*;

    fn pair() -> Pair {
        let attachment = Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let addresses = ["10.0.0.2/32", "fd00::2/128"];
        Pair::new(
            &attachment,
            &NetworkName::try_from("pods".to_owned()).unwrap(),
            1450,
            addresses.map(|text| text.parse().unwrap()).to_vec(),
        )
    }

    #[test]
    fn macs_are_local_unicast_and_differ_in_one_bit() {
        let pair = pair();
        let Mac([first, ..]) = pair.host_mac;
        assert_eq!(first & 0x03, 0x02);
        let differing: u32 = std::iter::zip(pair.host_mac.0, pair.pod_mac.0)
            .map(|(a, b)| (a ^ b).count_ones())
            .sum();
        assert_eq!(differing, 1);
        assert_eq!(Mac([2, 0, 0, 0, 0, 255]).to_string(), "02:00:00:00:00:ff");
    }

    #[test]
    fn the_pair_is_made_whole_in_one_message() {
        let order = pair().create(7);
        let RouteNetlinkMessage::NewLink(link) = order.message else {
            panic!("{:?}", order.message);
        };
        let mac = LinkAttribute::Address(pair().host_mac.0.to_vec());
        assert!(link.attributes.contains(&mac));
        assert!(format!("{link:?}").contains("NetNsFd(7)"));
        assert_eq!(order.flags & NLM_F_EXCL, NLM_F_EXCL);
    }

    #[test]
    fn addresses_come_before_the_routes_that_need_them() {
        let said: Vec<_> = pair()
            .pod_side(2, 1)
            .into_iter()
            .map(|order| order.what)
            .collect();
        assert_eq!(
            said,
            [
                "set lo up",
                "set eth0 up",
                "add address 10.0.0.2/32 to the pod's interface",
                "add a permanent neighbour entry for 169.254.1.1",
                "add a route to 169.254.1.1/32",
                "add a route to 0.0.0.0/0",
                "add address fd00::2/128 to the pod's interface",
                "add a permanent neighbour entry for fe80::1",
                "add a route to fe80::1/128",
                "add a route to ::/0",
            ]
        );
        assert_eq!(pair().host_side(9).len(), 5);
    }
}
