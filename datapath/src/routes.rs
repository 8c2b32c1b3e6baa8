//! Routes to the pods of other nodes, and the addresses that this machine has.
//!
//! Routes stand in the main table with our protocol number and a gateway. Routes
//! to the pods of this node have the number, too, but no gateway: those are the
//! CNI plugin's and are neither listed nor touched. What anybody else routes is
//! reported and never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::ownership::{ROUTE_PROTOCOL, owns_node_route};
pub use ferrule_model::routes::NodeRoute;
use ferrule_netlink::{Error, Protocol, RawMessage, Socket, route};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NlasIterator};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
    RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::bindings::is_alias;

/// `struct ifinfomsg` of `linux/rtnetlink.h`: its length, where the index is.
const LINK_HEADER: usize = 16;
const LINK_INDEX: usize = 4;

/// `RTM_NEWLINK`.
const NEW_LINK: u16 = 16;

/// `IFLA_IFNAME`.
const LINK_NAME: u16 = 3;

/// Takes what is as it was wanted for done.
pub(crate) fn forgive(
    results: Vec<Result<(), Error>>,
    fine: impl Fn(&Error) -> bool,
) -> Vec<Result<(), Error>> {
    let forgiven = results.into_iter().map(|result| match result {
        Err(error) if fine(&error) => Ok(()),
        other => other,
    });
    forgiven.collect()
}

/// The unicast routes of the main table, other than default routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteTable {
    /// Those with our protocol number and a gateway.
    pub ours: BTreeSet<NodeRoute>,
    /// What others route to exactly a prefix, in words for people, such as
    /// `proto kernel dev eth0`; several of one prefix with `; ` in between.
    pub foreign: BTreeMap<IpNetwork, String>,
}

/// An address by which others may reach this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineAddress {
    /// The address.
    pub ip: IpAddr,
    /// Length of its prefix, in bits.
    pub prefix: u8,
    /// Name of the device that has it.
    pub device: String,
    /// Index of the device.
    pub index: u32,
}

/// The way to routes and addresses.
#[derive(Debug)]
pub struct Routes {
    socket: Socket,
}

impl Routes {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open(Protocol::Route)?,
        })
    }

    /// The unicast routes of the main table, of both families.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn list(&self) -> Result<RouteTable, Error> {
        let mut table = RouteTable::default();
        let mut foreign = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            for message in self.main_table(family).await? {
                let Some(destination) = destination(&message)? else {
                    continue;
                };
                if message.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL) {
                    table.ours.extend(our_routes(&message, destination));
                } else {
                    foreign.push((destination, message.header.protocol, hops(&message)));
                }
            }
        }
        let devices = if foreign.is_empty() {
            BTreeMap::new()
        } else {
            self.devices().await?
        };
        for (destination, protocol, hops) in foreign {
            let words = in_words(protocol, &hops, &devices);
            let said = table.foreign.entry(destination).or_default();
            if !said.is_empty() {
                said.push_str("; ");
            }
            said.push_str(&words);
        }
        Ok(table)
    }

    async fn main_table(&self, family: AddressFamily) -> Result<Vec<RouteMessage>, Error> {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        question.header.table = RouteHeader::RT_TABLE_MAIN;
        question.header.kind = RouteType::Unicast;
        let question = route::encode(RouteNetlinkMessage::GetRoute(question));
        let answers = match self.socket.dump(question).await {
            Ok(answers) => answers,
            // The kernel makes the table with its first route.
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut messages = Vec::with_capacity(answers.len());
        for answer in answers {
            if let RouteNetlinkMessage::NewRoute(message) = route::decode(&answer)? {
                let header = &message.header;
                // A kernel without strict checking answers with every table.
                let asked = header.address_family == family
                    && header.table == RouteHeader::RT_TABLE_MAIN
                    && header.kind == RouteType::Unicast;
                if asked {
                    messages.push(message);
                }
            }
        }
        Ok(messages)
    }

    /// Adds routes. Those that are there already are fine; one to the same
    /// prefix that is another's, or leads elsewhere, stays and is an error
    /// ([`Error::already_exists`]). The i-th result is that of the i-th route.
    pub async fn add(&self, routes: &[NodeRoute]) -> Vec<Result<(), Error>> {
        let orders = routes.iter().map(|wanted| {
            let message = RouteNetlinkMessage::NewRoute(message(wanted));
            (route::encode(message), NLM_F_CREATE | NLM_F_EXCL)
        });
        let mut results = self.socket.batch(orders.collect()).await;
        let exists = |result: &Result<(), Error>| result.as_ref().is_err_and(Error::already_exists);
        if results.iter().any(exists) {
            // The kernel refuses whatever stands at the prefix: it does not say whose it is.
            let Ok(table) = self.list().await else {
                return results;
            };
            for (result, route) in results.iter_mut().zip(routes) {
                if exists(result) && table.ours.contains(&canonical(route)) {
                    *result = Ok(());
                }
            }
        }
        results
    }

    /// Gives routes of ours another gateway, without a moment in which there is
    /// none. No other route may lead to the same prefix: the kernel would replace
    /// that. The i-th result is that of the i-th route.
    pub async fn replace(&self, routes: &[NodeRoute]) -> Vec<Result<(), Error>> {
        let orders = routes.iter().map(|wanted| {
            let message = RouteNetlinkMessage::NewRoute(message(wanted));
            (route::encode(message), NLM_F_CREATE | NLM_F_REPLACE)
        });
        self.socket.batch(orders.collect()).await
    }

    /// Removes routes of ours. Those that are gone already are fine, and one to
    /// the same prefix that is another's, or leads elsewhere, stays. The i-th
    /// result is that of the i-th route.
    pub async fn remove(&self, routes: &[NodeRoute]) -> Vec<Result<(), Error>> {
        let orders = routes.iter().map(|unwanted| {
            let message = RouteNetlinkMessage::DelRoute(message(unwanted));
            (route::encode(message), 0)
        });
        let results = self.socket.batch(orders.collect()).await;
        forgive(results, Error::is_not_found)
    }

    /// The addresses of the machine that others may reach, by index of their
    /// device and then by number, those that routers announce from the loopback
    /// device among them. Left out are: those of host scope, link-local, loopback,
    /// multicast and unspecified ones, those that another machine was found to have, and VIPs
    /// of ours.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn addresses(&self) -> Result<Vec<MachineAddress>, Error> {
        let question = AddressMessage::default();
        let question = route::encode(RouteNetlinkMessage::GetAddress(question));
        let answers = self.socket.dump(question).await?;
        // Devices come second: a device that is not among them is gone, with its addresses.
        let devices = self.devices().await?;
        let mut addresses = Vec::new();
        for answer in answers {
            if let RouteNetlinkMessage::NewAddress(message) = route::decode(&answer)? {
                addresses.extend(machine_address(&message, &devices)?);
            }
        }
        addresses.sort_by_key(|address| (address.index, address.ip, address.prefix));
        Ok(addresses)
    }

    async fn devices(&self) -> Result<BTreeMap<u32, String>, Error> {
        devices(&self.socket).await
    }
}

/// The names of the devices by their index.
pub(crate) async fn devices(socket: &Socket) -> Result<BTreeMap<u32, String>, Error> {
    let question = route::encode(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    let mut devices = BTreeMap::new();
    for answer in socket.dump(question).await? {
        if answer.message_type == NEW_LINK {
            let (index, device) = device(&answer)?;
            devices.insert(index, device);
        }
    }
    Ok(devices)
}

/// Where a route leads.
#[derive(Debug, Default, PartialEq, Eq)]
struct Hop {
    gateway: Option<IpAddr>,
    device: Option<u32>,
}

/// With the bits behind the prefix cleared, as the kernel has it.
fn canonical(route: &NodeRoute) -> NodeRoute {
    let destination = route.destination;
    NodeRoute {
        destination: IpNetwork::new(destination.network(), destination.prefix())
            .unwrap_or(destination),
        gateway: route.gateway,
    }
}

/// The same message adds and removes: for removing, the kernel compares protocol,
/// type, scope, destination and gateway, so that it finds no other's route.
fn message(route: &NodeRoute) -> RouteMessage {
    let NodeRoute {
        destination,
        gateway,
    } = canonical(route);
    let mut message = RouteMessage::default();
    message.header.address_family = match destination {
        IpNetwork::V4(_) => AddressFamily::Inet,
        IpNetwork::V6(_) => AddressFamily::Inet6,
    };
    message.header.destination_prefix_length = destination.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    let via = if destination.is_ipv4() == gateway.is_ipv4() {
        RouteAttribute::Gateway(gateway.into())
    } else {
        RouteAttribute::Via(gateway.into())
    };
    message.attributes = vec![RouteAttribute::Destination(destination.ip().into()), via];
    message
}

/// What of a message is a route of ours to another node's pods.
pub(crate) fn our_routes(
    message: &RouteMessage,
    destination: IpNetwork,
) -> impl Iterator<Item = NodeRoute> {
    let protocol = u8::from(message.header.protocol);
    let gateways = hops(message).into_iter().map(|hop| hop.gateway);
    gateways.filter_map(move |gateway| {
        owns_node_route(protocol, gateway.is_some()).then_some(())?;
        Some(NodeRoute {
            destination,
            gateway: gateway?,
        })
    })
}

/// `None` for a default route.
pub(crate) fn destination(message: &RouteMessage) -> Result<Option<IpNetwork>, Error> {
    let prefix = message.header.destination_prefix_length;
    if prefix == 0 {
        return Ok(None);
    }
    let ip = message.attributes.iter().find_map(|attribute| {
        let RouteAttribute::Destination(destination) = attribute else {
            return None;
        };
        ip(destination)
    });
    ip.and_then(|ip| IpNetwork::new(ip, prefix).ok())
        .map(Some)
        .ok_or_else(|| Error::Decode(format!("a route to /{prefix} without its destination")))
}

pub(crate) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// One, or those of a multipath route.
fn hops(message: &RouteMessage) -> Vec<Hop> {
    let paths = message.attributes.iter().find_map(|attribute| {
        let RouteAttribute::MultiPath(paths) = attribute else {
            return None;
        };
        Some(paths)
    });
    let Some(paths) = paths else {
        return vec![hop(&message.attributes)];
    };
    let hops = paths.iter().map(|path| Hop {
        device: (path.interface_index != 0).then_some(path.interface_index),
        ..hop(&path.attributes)
    });
    hops.collect()
}

fn hop(attributes: &[RouteAttribute]) -> Hop {
    let mut hop = Hop::default();
    for attribute in attributes {
        match attribute {
            RouteAttribute::Gateway(gateway) => hop.gateway = ip(gateway),
            RouteAttribute::Via(RouteVia::Inet(gateway)) => hop.gateway = Some((*gateway).into()),
            RouteAttribute::Via(RouteVia::Inet6(gateway)) => hop.gateway = Some((*gateway).into()),
            RouteAttribute::Oif(index) => hop.device = Some(*index),
            _ => {}
        }
    }
    hop
}

/// As `ip route` has it: these protocols by name, the others by number.
fn in_words(protocol: RouteProtocol, hops: &[Hop], devices: &BTreeMap<u32, String>) -> String {
    let mut words = vec![match protocol {
        RouteProtocol::IcmpRedirect => "proto redirect".to_owned(),
        RouteProtocol::Kernel => "proto kernel".to_owned(),
        RouteProtocol::Boot => "proto boot".to_owned(),
        RouteProtocol::Static => "proto static".to_owned(),
        RouteProtocol::Ra => "proto ra".to_owned(),
        RouteProtocol::Dhcp => "proto dhcp".to_owned(),
        other => format!("proto {}", u8::from(other)),
    }];
    for hop in hops {
        words.extend(hop.gateway.map(|gateway| format!("via {gateway}")));
        words.extend(hop.device.map(|index| match devices.get(&index) {
            Some(device) => format!("dev {device}"),
            // Gone since the routes were read.
            None => format!("dev {index}"),
        }));
    }
    words.join(" ")
}

/// Index and name of a device, by a link message. Only these fields are read: devices come
/// with hundreds of attributes that depend on their kind, and one that cannot be
/// read must not hide the addresses of all.
fn device(answer: &RawMessage) -> Result<(u32, String), Error> {
    let index = answer.body.get(LINK_INDEX..).and_then(<[u8]>::first_chunk);
    let (Some(index), Some(attributes)) = (index, answer.body.get(LINK_HEADER..)) else {
        return Err(Error::Decode(
            "a link message without its header".to_owned(),
        ));
    };
    let index = u32::from_ne_bytes(*index);
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        if attribute.kind() == LINK_NAME {
            let name = attribute.value();
            let name = name.strip_suffix(&[0]).unwrap_or(name);
            // Names are bytes other than '/' and white space; these are for people.
            return Ok((index, String::from_utf8_lossy(name).into_owned()));
        }
    }
    Err(Error::Decode(format!("device {index} has no name")))
}

/// `None` for an address that is left out.
fn machine_address(
    message: &AddressMessage,
    devices: &BTreeMap<u32, String>,
) -> Result<Option<MachineAddress>, Error> {
    let (mut address, mut local) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // On a link of two ends the address is that of the other end.
    let ip = local
        .or(address)
        .ok_or_else(|| Error::Decode("an address message without its address".to_owned()))?;
    let index = message.header.index;
    let Some(device) = devices.get(&index) else {
        return Ok(None);
    };
    let reachable = !is_of_the_machine_alone(ip)
        && message.header.scope != AddressScope::Host
        && !flags.contains(AddressFlags::Dadfailed)
        && !is_alias(message);
    Ok(reachable.then(|| MachineAddress {
        ip,
        prefix: message.header.prefix_len,
        device: device.clone(),
        index,
    }))
}

/// Whether others cannot reach it, or not by it alone.
fn is_of_the_machine_alone(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    link_local || ip.is_loopback() || ip.is_multicast() || ip.is_unspecified()
}

#[cfg(feature = "fuzzing")]
pub mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_without_what_we_need_is_an_error() {
        let mut body = vec![0; LINK_HEADER];
        body[LINK_INDEX] = 7;
        let name = body.len();
        body.extend([7, 0]);
        body.extend(LINK_NAME.to_ne_bytes());
        body.extend(*b"lo\0");
        let read = |body: &[u8]| {
            device(&RawMessage {
                message_type: NEW_LINK,
                body: body.to_vec(),
            })
        };
        assert_eq!(read(&body).unwrap(), (7, "lo".to_owned()));
        for cut in 0..body.len() {
            assert!(read(&body[..cut]).is_err(), "{cut}");
        }
        for length in [0, 3, 255] {
            body[name] = length;
            assert!(read(&body).is_err(), "{length}");
        }
    }

    #[test]
    fn a_route_without_its_destination_is_an_error() {
        let route = NodeRoute {
            destination: "10.2.3.4/16".parse().unwrap(),
            gateway: "192.0.2.9".parse().unwrap(),
        };
        let mut message = message(&route);
        let network = destination(&message).unwrap();
        assert_eq!(network, Some("10.2.0.0/16".parse().unwrap()));
        message.attributes.remove(0);
        assert!(destination(&message).is_err());
        message.header.destination_prefix_length = 0;
        assert_eq!(destination(&message).unwrap(), None);
    }

    #[test]
    fn foreign_routes_are_put_into_words() {
        let devices = BTreeMap::from([(3, "eth1".to_owned())]);
        let hop = |gateway: &str, device| Hop {
            gateway: gateway.parse().ok(),
            device,
        };
        let words = |protocol: u8, hops: &[Hop]| in_words(protocol.into(), hops, &devices);
        assert_eq!(words(2, &[hop("", Some(3))]), "proto kernel dev eth1");
        assert_eq!(
            words(186, &[hop("192.0.2.9", Some(3)), hop("fe80::1", Some(4))]),
            "proto 186 via 192.0.2.9 dev eth1 via fe80::1 dev 4"
        );
    }
}
