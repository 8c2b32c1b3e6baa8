//! Pods' devices on the node (host ends of veths, shapers): what the kernel has,
//! and the little that [`crate::housekeeping`] changes about it. Making and removing them is the
//! plugin's work.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::ownership::{HOST_VETH_PREFIX, ROUTE_PROTOCOL, SHAPER_PREFIX, owns_node_route};
use ferrule_netlink::{Error, Protocol, RawMessage, Socket, route};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol,
};

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
}

/// Looks at everything.
///
/// # Errors
/// [`Error`]; what is returned is complete.
pub(crate) async fn look() -> Result<Seen, Error> {
    let socket = Socket::open(Protocol::Route)?;
    // Routes first: a pod that is made in between has an end without routes, and
    // none has routes over an end that is not listed.
    let question = route::encode(RouteNetlinkMessage::GetRoute(RouteMessage::default()));
    let mut routes: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    for answer in socket.dump(question).await? {
        if let Some((index, ip)) = way_to_pod(&answer) {
            routes.entry(index).or_default().insert(ip);
        }
    }
    let (ends, shapers) = devices(&socket).await?;
    Ok(Seen {
        ends,
        shapers,
        routes,
    })
}

/// Counters by the name of the host's end.
///
/// # Errors
/// [`Error`]; what is returned is complete.
pub(crate) async fn counters() -> Result<BTreeMap<String, Counters>, Error> {
    let (ends, _) = devices(&Socket::open(Protocol::Route)?).await?;
    Ok(ends.into_iter().map(|e| (e.name, e.counters)).collect())
}

/// Host ends, and shapers.
async fn devices(socket: &Socket) -> Result<(Vec<Device>, Vec<Device>), Error> {
    let question = route::encode(RouteNetlinkMessage::GetLink(LinkMessage::default()));
    let (mut ends, mut shapers) = (Vec::new(), Vec::new());
    for answer in socket.dump(question).await? {
        match read(&answer) {
            Some((InfoKind::Veth, end)) if end.name.starts_with(HOST_VETH_PREFIX) => {
                ends.push(end);
            }
            Some((InfoKind::Ifb, shaper)) if shaper.name.starts_with(SHAPER_PREFIX) => {
                shapers.push(shaper);
            }
            _ => {}
        }
    }
    Ok((ends, shapers))
}

/// The device that a message is about, and its kind, if it has one.
fn read(answer: &RawMessage) -> Option<(InfoKind, Device)> {
    // A device of a kind that cannot be decoded is none of ours.
    let Ok(RouteNetlinkMessage::NewLink(link)) = route::decode(answer) else {
        return None;
    };
    let mut device = Device {
        index: link.header.index,
        ..Device::default()
    };
    let mut kind = None;
    for attribute in link.attributes {
        match attribute {
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
    Some((kind?, device))
}

/// Interface and address of a route that the plugin made.
fn way_to_pod(answer: &RawMessage) -> Option<(u32, IpAddr)> {
    // A route of a kind that cannot be decoded is none of ours.
    let Ok(RouteNetlinkMessage::NewRoute(message)) = route::decode(answer) else {
        return None;
    };
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
