//! VIPs that are bound by local routes: no address, no list of addresses that the kernel
//! walks for each new one, and a source of our choice for processes of the node.
//!
//! Ours stand in the local table, on the loopback device (one that is down, as the VIP
//! device, cannot have local routes of IPv6), with our protocol number. The kernel's
//! own have another.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferrule_model::address::Family;
use ferrule_model::binding::Binding;
use ferrule_model::ownership::{ROUTE_PROTOCOL, owns_vip_route};
use ferrule_netlink::{Error, RawMessage, Socket, route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Bound;
use crate::routes::{forgive, ip};

/// `LOOPBACK_IFINDEX` of `linux/net.h`: the same in every network namespace.
const LOOPBACK: u32 = 1;

/// `RT_TABLE_LOCAL` of `linux/rtnetlink.h`.
const TABLE: u8 = 255;

/// Metric of those of IPv6. The kernel takes one of the same destination and metric for
/// the same route, so it is none that another takes without thinking.
const METRIC: u32 = 10_101;

/// Every route of ours to a VIP.
pub(super) async fn list(socket: &Socket) -> Result<Vec<Bound>, Error> {
    let mut bound = Vec::new();
    for family in Family::ALL {
        let mut question = RouteMessage::default();
        question.header.address_family = address_family(family);
        question.header.table = TABLE;
        question.header.kind = RouteType::Local;
        question.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        let question = route::encode(RouteNetlinkMessage::GetRoute(question));
        let answers = match socket.dump(question).await {
            Ok(answers) => answers,
            // The kernel makes the table with its first route.
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        for answer in answers {
            if let RouteNetlinkMessage::NewRoute(message) = route::decode(&answer)? {
                bound.extend(vip_of(&message));
            }
        }
    }
    Ok(bound)
}

/// The VIP of a route that is ours, and its binding.
pub(crate) fn vip_of(message: &RouteMessage) -> Option<Bound> {
    let header = &message.header;
    if header.table != TABLE || header.kind != RouteType::Local {
        return None;
    }
    let (mut vip, mut device, mut source, mut metric) = (None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => vip = ip(address),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(priority) => metric = *priority,
            _ => {}
        }
    }
    let vip = vip?;
    let family = Family::of(vip);
    let host = header.destination_prefix_length == family.bits();
    let ours = owns_vip_route(header.protocol.into(), device == Some(LOOPBACK));
    let made_so = host && metric == self::metric(family).unwrap_or(0);
    let source = source.filter(|source| *source != vip);
    (ours && made_so).then_some((vip, Binding::Route { source }))
}

/// Makes routes; of IPv6 one with another source takes the place of ours.
pub(super) async fn bind(socket: &Socket, bound: &[&Bound]) -> Vec<Result<(), Error>> {
    let orders = bound.iter().map(|wanted| {
        // In IPv4 it comes before another to the same VIP, in which it may differ in nothing
        // but the source: the kernel takes the first. So that one may stay until this is there.
        let flags = match wanted.0 {
            IpAddr::V4(_) => NLM_F_CREATE,
            IpAddr::V6(_) => NLM_F_CREATE | NLM_F_EXCL,
        };
        (order(wanted), flags)
    });
    let mut results = socket.batch(orders.collect()).await;
    let exists = |result: &Result<(), Error>| result.as_ref().is_err_and(Error::already_exists);
    if !results.iter().any(exists) {
        return results;
    }
    let ours: BTreeMap<IpAddr, Binding> = match list(socket).await {
        // In IPv4 there may be several of a VIP; there the one that exists is the one wanted.
        Ok(ours) => ours.into_iter().collect(),
        Err(_) => return results,
    };
    let mut replaced = Vec::new();
    for (index, (wanted, result)) in bound.iter().zip(&mut results).enumerate() {
        if !exists(result) {
            continue;
        }
        match ours.get(&wanted.0) {
            Some(present) if wanted.0.is_ipv4() || *present == wanted.1 => *result = Ok(()),
            Some(_) => replaced.push((index, *wanted)),
            None => {}
        }
    }
    let orders = replaced.iter().map(|(_, wanted)| {
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        (order(wanted), flags)
    });
    let again = socket.batch(orders.collect()).await;
    for ((index, _), result) in replaced.into_iter().zip(again) {
        if let Some(slot) = results.get_mut(index) {
            *slot = result;
        }
    }
    results
}

/// Removes routes of ours, told from others by device, protocol, in IPv4 also source, in
/// IPv6 metric.
pub(super) async fn unbind(socket: &Socket, bound: &[&Bound]) -> Vec<Result<(), Error>> {
    let orders = bound.iter().map(|unwanted| {
        let message = RouteNetlinkMessage::DelRoute(message(unwanted));
        (route::encode(message), 0)
    });
    let results = socket.batch(orders.collect()).await;
    forgive(results, Error::is_not_found)
}

fn order(bound: &Bound) -> RawMessage {
    route::encode(RouteNetlinkMessage::NewRoute(message(bound)))
}

fn message((vip, binding): &Bound) -> RouteMessage {
    let family = Family::of(*vip);
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family);
    message.header.destination_prefix_length = family.bits();
    message.header.table = TABLE;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.header.kind = RouteType::Local;
    message.header.scope = match family {
        Family::IPv4 => RouteScope::Host,
        Family::IPv6 => RouteScope::Universe,
    };
    message.attributes = vec![
        RouteAttribute::Destination((*vip).into()),
        RouteAttribute::Oif(LOOPBACK),
    ];
    let source = match binding {
        Binding::Route { source } => *source,
        Binding::Address | Binding::Alias { .. } => None,
    };
    // Without any, IPv4 takes 127.0.0.1, from which nothing can leave the node.
    let source = source.or(vip.is_ipv4().then_some(*vip));
    let source = source.map(|source| RouteAttribute::PrefSource(source.into()));
    message.attributes.extend(source);
    let metric = metric(family).map(RouteAttribute::Priority);
    message.attributes.extend(metric);
    message
}

fn metric(family: Family) -> Option<u32> {
    match family {
        // An address's own route has none, and the kernel compares metrics first.
        Family::IPv4 => None,
        Family::IPv6 => Some(METRIC),
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::IPv4 => AddressFamily::Inet,
        Family::IPv6 => AddressFamily::Inet6,
    }
}
