//! Pods' devices on the node (host ends of veths, shapers): what the kernel has,
//! and the little that [`crate::housekeeping`] changes about it. Making and removing them is the
//! plugin's work.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::Family;
use ferrule_model::ownership::{
    HOST_VETH_PREFIX, ROUTE_PROTOCOL, SHAPER_PREFIX, is_of_a_pod, owns_node_route,
};
use ferrule_netlink::{Error, Protocol, RawMessage, Socket, route};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NlasIterator};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Most addresses inside of one pod that count where no route says which are its own.
const MOST_INSIDE: usize = 8;

/// What passed through an interface, seen from the pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) packets_in: u64,
    pub(crate) packets_out: u64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

/// A veth or ifb whose name begins like ours of that kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
    pub(crate) mac: Option<[u8; 6]>,
    pub(crate) counters: Counters,
    /// Where its other end is: the index there, and the namespace's ID here.
    pub(crate) peer: Option<(u32, i32)>,
}

/// Which devices there are, and to which addresses routes of the plugin lead over each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Host ends of veths.
    pub(crate) ends: Vec<Device>,
    /// Devices that shape what comes from a pod.
    pub(crate) shapers: Vec<Device>,
    /// By index of the interface.
    pub(crate) routes: BTreeMap<u32, BTreeSet<IpAddr>>,
    /// Addresses inside of pods that no route leads to, by index of the host's end; only
    /// of those that [`look_inside`] was asked about.
    pub(crate) inside: BTreeMap<u32, BTreeSet<IpAddr>>,
    /// What may be a device or route of a pod and cannot be decoded, in words. Where there is
    /// any, nothing is known to be absent.
    pub(crate) unclear: Vec<String>,
}

/// Looks at everything.
///
/// # Errors
/// [`Error`]; what is returned is complete, but for what is named as unclear.
pub(crate) async fn look() -> Result<Seen, Error> {
    let socket = Socket::open(Protocol::Route)?;
    // Routes first: a pod that is made in between has an end without routes, and
    // none has routes over an end that is not listed.
    let question = route::encode(RouteNetlinkMessage::GetRoute(RouteMessage::default()));
    let mut routes: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    let mut unclear = Vec::new();
    for answer in socket.dump(question).await? {
        match way_to_pod(&answer) {
            Ok(Some((index, ip))) => {
                routes.entry(index).or_default().insert(ip);
            }
            Ok(None) => {}
            Err(words) => unclear.push(words),
        }
    }
    let mut seen = devices(&socket).await?;
    seen.routes = routes;
    seen.unclear.extend(unclear);
    Ok(seen)
}

/// Looks at the addresses inside of pods, of a family that no route leads to them by. What
/// cannot be found out is unclear then.
///
/// # Errors
/// [`Error`]
pub(crate) async fn look_inside(
    seen: &mut Seen,
    concerns: impl Fn(&Device) -> bool,
) -> Result<(), Error> {
    let asked: Vec<&Device> = seen.ends.iter().filter(|end| concerns(end)).collect();
    if asked.is_empty() {
        return Ok(());
    }
    let socket = Socket::open(Protocol::Route)?;
    let routed: BTreeSet<IpAddr> = seen.routes.values().flatten().copied().collect();
    let none = BTreeSet::new();
    let mut unclear = Vec::new();
    for end in asked {
        let Some(peer) = end.peer else { continue };
        match addresses_at(&socket, peer).await {
            Ok(mut addresses) => {
                // Where there is a route it says which address the pod got.
                let known = seen.routes.get(&end.index).unwrap_or(&none);
                let known: Vec<Family> = known.iter().map(|ip| Family::of(*ip)).collect();
                addresses.retain(|ip| !routed.contains(ip) && !known.contains(&Family::of(*ip)));
                seen.inside.insert(end.index, addresses);
            }
            Err(error) => unclear.push((end.index, end.peer, &end.name, error)),
        }
    }
    if !unclear.is_empty() {
        // A pod that has gone meanwhile has no address.
        let still = devices(&socket).await?.ends;
        unclear.retain(|(index, peer, ..)| {
            let mut ends = still.iter();
            ends.any(|end| end.index == *index && end.peer == *peer)
        });
    }
    let words = unclear.into_iter();
    seen.unclear.extend(words.map(|(_, _, name, error)| {
        format!("interface {name}, whose pod's addresses cannot be read: {error}")
    }));
    Ok(())
}

/// Addresses as the plugin makes them, at an interface of another namespace.
async fn addresses_at(
    socket: &Socket,
    (index, namespace): (u32, i32),
) -> Result<BTreeSet<IpAddr>, Error> {
    let mut found = BTreeSet::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = AddressMessage::default();
        message.header.family = family;
        message.header.index = index;
        message.attributes = vec![AddressAttribute::TargetNetNsId(namespace)];
        let question = route::encode(RouteNetlinkMessage::GetAddress(message));
        let answers = match socket.dump(question).await {
            Err(error) if error.is_not_found() => continue,
            answers => answers?,
        };
        for answer in answers {
            if let RouteNetlinkMessage::NewAddress(message) = route::decode(&answer)?
                && let Some(ip) = of_a_pod(&message, index, namespace)
            {
                found.insert(ip);
            }
        }
    }
    // A pod may give itself more, but has no claim to them.
    Ok(found.into_iter().take(MOST_INSIDE).collect())
}

/// The address in a message, if it is of that interface and one that the plugin may have made.
fn of_a_pod(message: &AddressMessage, index: u32, namespace: i32) -> Option<IpAddr> {
    // A kernel that overlooks the namespace answers for this one.
    let there = AddressAttribute::TargetNetNsId(namespace);
    if message.header.index != index || !message.attributes.contains(&there) {
        return None;
    }
    let ip = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })?;
    let made = message.header.prefix_len == whole(ip);
    (made && message.header.scope == AddressScope::Universe).then_some(ip)
}

/// Counters by the name of the host's end.
///
/// # Errors
/// [`Error`]; what is returned is complete, but for what cannot be decoded.
pub(crate) async fn counters() -> Result<BTreeMap<String, Counters>, Error> {
    let seen = devices(&Socket::open(Protocol::Route)?).await?;
    let ends = seen.ends.into_iter();
    Ok(ends.map(|e| (e.name, e.counters)).collect())
}

/// Everything but routes.
async fn devices(socket: &Socket) -> Result<Seen, Error> {
    let question = route::encode(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    Ok(sorted(&socket.dump(question).await?))
}

/// Host ends and shapers among devices, and what may be one.
fn sorted(answers: &[RawMessage]) -> Seen {
    let mut seen = Seen::default();
    for answer in answers {
        match read(answer) {
            Ok(Some((InfoKind::Veth, end))) if end.name.starts_with(HOST_VETH_PREFIX) => {
                seen.ends.push(end);
            }
            Ok(Some((InfoKind::Ifb, shaper))) if shaper.name.starts_with(SHAPER_PREFIX) => {
                seen.shapers.push(shaper);
            }
            Ok(_) => {}
            Err(words) => seen.unclear.push(words),
        }
    }
    seen
}

/// The device that a message is about, and its kind, if it has one. An error says which
/// device it may be that cannot be decoded; one with a name unlike ours is nobody's concern.
fn read(answer: &RawMessage) -> Result<Option<(InfoKind, Device)>, String> {
    let link = match route::decode(answer) {
        Ok(RouteNetlinkMessage::NewLink(link)) => link,
        Ok(_) => return Ok(None),
        Err(error) => {
            return match unread_name(answer) {
                Some(name) if !is_of_a_pod(&name) => Ok(None),
                Some(name) => Err(format!("interface {name}: {error}")),
                None => Err(format!("an interface without a legible name: {error}")),
            };
        }
    };
    let mut device = Device {
        index: link.header.index,
        ..Device::default()
    };
    let (mut kind, mut peer, mut namespace) = (None, None, None);
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::Link(index) => peer = Some(index),
            // A namespace that is going has none.
            LinkAttribute::LinkNetNsId(id) => namespace = Some(id).filter(|id| *id >= 0),
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::IfAlias(alias) => device.alias = Some(alias),
            LinkAttribute::Address(bytes) => device.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                kind = infos.into_iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind),
                    _ => None,
                });
            }
            // What the host's end received is what the pod sent.
            LinkAttribute::Stats64(stats) => {
                device.counters = Counters {
                    packets_in: stats.tx_packets,
                    packets_out: stats.rx_packets,
                    bytes_in: stats.tx_bytes,
                    bytes_out: stats.rx_bytes,
                };
            }
            _ => {}
        }
    }
    device.peer = peer.zip(namespace);
    Ok(kind.map(|kind| (kind, device)))
}

/// The name in a message about a link of which something else cannot be decoded.
fn unread_name(answer: &RawMessage) -> Option<String> {
    /// Bytes of `struct ifinfomsg`, which stands before the attributes.
    const HEADER: usize = 16;
    const IFLA_IFNAME: u16 = 3;
    let attributes = NlasIterator::new(answer.body.get(HEADER..)?);
    let name = attributes
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() == IFLA_IFNAME)?;
    let name = name.value().split(|byte| *byte == 0).next()?;
    (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
}

/// Interface and address of a route that the plugin made. An error tells of one that
/// may be such and cannot be decoded.
fn way_to_pod(answer: &RawMessage) -> Result<Option<(u32, IpAddr)>, String> {
    /// Place of `rtm_protocol` in `struct rtmsg`.
    const PROTOCOL: usize = 5;
    match route::decode(answer) {
        Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(to_pod(&message)),
        Ok(_) => Ok(None),
        Err(error) => match answer.body.get(PROTOCOL) {
            Some(protocol) if *protocol != ROUTE_PROTOCOL => Ok(None),
            _ => Err(format!("a route: {error}")),
        },
    }
}

fn to_pod(message: &RouteMessage) -> Option<(u32, IpAddr)> {
    let header = &message.header;
    let protocol = u8::from(header.protocol);
    let (mut index, mut ip, mut gateway) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Destination(RouteAddress::Inet(to)) => ip = Some(IpAddr::from(*to)),
            RouteAttribute::Destination(RouteAddress::Inet6(to)) => ip = Some(IpAddr::from(*to)),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => gateway = true,
            _ => {}
        }
    }
    let ours = protocol == ROUTE_PROTOCOL && !owns_node_route(protocol, gateway);
    let ip = ip.filter(|ip| header.destination_prefix_length == whole(*ip))?;
    (ours && header.table == RouteHeader::RT_TABLE_MAIN).then_some((index?, ip))
}

fn whole(ip: IpAddr) -> u8 {
    if ip.is_ipv6() { 128 } else { 32 }
}

/// Removes an interface; one that is gone already is fine.
///
/// # Errors
/// [`Error`]
pub(crate) async fn remove(index: u32) -> Result<(), Error> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    let message = route::encode(RouteNetlinkMessage::DelLink(link));
    match order(message, NLM_F_REQUEST | NLM_F_ACK).await {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Makes the route to a pod's address that the plugin had made. Another's route in
/// its place stays.
///
/// # Errors
/// [`Error`]; also where there is one already.
pub(crate) async fn add_route(index: u32, ip: IpAddr) -> Result<(), Error> {
    let protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    let message = route::out_of(index, (ip, whole(ip)), None, protocol);
    let message = route::encode(RouteNetlinkMessage::NewRoute(message));
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    order(message, flags).await
}

async fn order(message: RawMessage, flags: u16) -> Result<(), Error> {
    let socket = Socket::open(Protocol::Route)?;
    let results = socket.batch(vec![(message, flags)]).await;
    results.into_iter().collect()
}

/// What is made of an answer of the kernel, for the fuzz targets.
#[cfg(feature = "fuzzing")]
#[allow(dead_code, reason = "its caller is in another workspace")]
pub(crate) fn read_any(answer: &RawMessage) {
    let _device = read(answer);
    let _route = way_to_pod(answer);
}

#[cfg(test)]
#[path = "links/tests.rs"]
mod tests;
