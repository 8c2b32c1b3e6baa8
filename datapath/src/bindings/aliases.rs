//! VIPs that are addresses of a device which is not ours.
//!
//! The kernel notes with an address who made it (`IFA_PROTO`, Linux 5.18): our number is
//! the proof that one is ours, and without it this binding is refused, for a foreign
//! address must never be taken for ours. The kernel chooses none of them as a source.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ferrule_model::address::Family;
use ferrule_model::binding::Binding;
use ferrule_model::names::IfName;
use ferrule_model::ownership::{ADDRESS_PROTOCOL, owns_address};
use ferrule_netlink::{Error, Socket, route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Bound, gone};
use crate::routes::{devices, forgive};
use crate::vip::{DeviceError, FOREVER, address_of};

/// The first Linux that notes who made an address.
const FIRST_KERNEL: (u32, u32) = (5, 18);

/// Refuses kernels that cannot tell whose an address is.
pub(crate) fn check_kernel(device: &IfName) -> Result<(), DeviceError> {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    if notes_who_made_addresses(&release) {
        return Ok(());
    }
    Err(DeviceError::NoOwner {
        device: device.clone(),
        release,
    })
}

/// A release that cannot be read is no old one.
fn notes_who_made_addresses(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    number()
        .zip(number())
        .is_none_or(|version| version >= FIRST_KERNEL)
}

/// Whether an address is such an alias.
pub(crate) fn is_alias(message: &AddressMessage) -> bool {
    let mut attributes = message.attributes.iter();
    let protocol = attributes.find_map(|attribute| match attribute {
        AddressAttribute::Protocol(protocol) => Some(u8::from(*protocol)),
        _ => None,
    });
    let host =
        address_of(message).is_some_and(|ip| message.header.prefix_len == Family::of(ip).bits());
    host && protocol.is_some_and(owns_address)
}

/// Every alias of ours, on whichever device but this one.
pub(super) async fn list(socket: &Socket, but: Option<u32>) -> Result<Vec<Bound>, Error> {
    let question = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut found = Vec::new();
    for answer in socket.dump(route::encode(question)).await? {
        if let RouteNetlinkMessage::NewAddress(message) = route::decode(&answer)?
            && is_alias(&message)
            && Some(message.header.index) != but
        {
            found.extend(address_of(&message).map(|ip| (ip, message.header.index)));
        }
    }
    if found.is_empty() {
        return Ok(Vec::new());
    }
    // Devices come second: one that is not among them is gone, with its addresses.
    let devices = devices(socket).await?;
    let bound = found.into_iter().filter_map(|(ip, index)| {
        let device = IfName::try_from(devices.get(&index)?.clone()).ok()?;
        Some((ip, Binding::Alias { device }))
    });
    Ok(bound.collect())
}

/// Makes aliases. An address that the device has from another stays, and is an error
/// ([`Error::already_exists`]).
pub(super) async fn bind(socket: &Socket, bound: &[&Bound]) -> Vec<Result<(), Error>> {
    if bound.is_empty() {
        return Vec::new();
    }
    let indices = match indices(socket).await {
        Ok(indices) => indices,
        Err(error) => return vec![Err(error); bound.len()],
    };
    let mut results: Vec<Result<(), Error>> = Vec::new();
    let (mut orders, mut tried) = (Vec::new(), Vec::new());
    for (place, (ip, binding)) in bound.iter().enumerate() {
        let Binding::Alias { device } = binding else {
            results.push(Err(Error::Closed));
            continue;
        };
        let Some(index) = indices.get(device.as_str()) else {
            results.push(Err(gone(device)));
            continue;
        };
        let message = RouteNetlinkMessage::NewAddress(message(*ip, *index));
        orders.push((route::encode(message), NLM_F_CREATE | NLM_F_EXCL));
        tried.push(place);
        results.push(Ok(()));
    }
    let made = socket.batch(orders).await;
    let exists = |result: &Result<(), Error>| result.as_ref().is_err_and(Error::already_exists);
    let present = if made.iter().any(exists) {
        list(socket, None).await.unwrap_or_default()
    } else {
        Vec::new()
    };
    for (place, result) in tried.into_iter().zip(made) {
        let ours = bound
            .get(place)
            .is_some_and(|bound| present.contains(bound));
        if let Some(slot) = results.get_mut(place)
            && !(exists(&result) && ours)
        {
            *slot = result;
        }
    }
    results
}

/// Removes aliases. One that is not ours any more stays.
pub(super) async fn unbind(socket: &Socket, bound: &[&Bound]) -> Vec<Result<(), Error>> {
    if bound.is_empty() {
        return Vec::new();
    }
    // The kernel removes an address whoever made it.
    let found = match (list(socket, None).await, indices(socket).await) {
        (Ok(present), Ok(indices)) => (present, indices),
        (Err(error), _) | (_, Err(error)) => return vec![Err(error); bound.len()],
    };
    let (present, indices) = found;
    let (mut results, mut orders, mut tried) = (Vec::new(), Vec::new(), Vec::new());
    for (place, unwanted) in bound.iter().enumerate() {
        results.push(Ok(()));
        let Binding::Alias { device } = &unwanted.1 else {
            continue;
        };
        if let Some(index) = indices.get(device.as_str())
            && present.contains(*unwanted)
        {
            let message = RouteNetlinkMessage::DelAddress(message(unwanted.0, *index));
            orders.push((route::encode(message), 0));
            tried.push(place);
        }
    }
    let undone = forgive(socket.batch(orders).await, Error::is_not_found);
    for (place, result) in tried.into_iter().zip(undone) {
        if let Some(slot) = results.get_mut(place) {
            *slot = result;
        }
    }
    results
}

async fn indices(socket: &Socket) -> Result<BTreeMap<String, u32>, Error> {
    let devices = devices(socket).await?;
    Ok(devices
        .into_iter()
        .map(|(index, name)| (name, index))
        .collect())
}

fn message(ip: IpAddr, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.prefix_len = Family::of(ip).bits();
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        AddressAttribute::Protocol(AddressProtocol::from(ADDRESS_PROTOCOL)),
    ];
    match ip {
        IpAddr::V4(_) => {
            message.header.family = AddressFamily::Inet;
            // Of scope link it would be the first of the device, and the source of whatever has no
            // better one (inet_select_addr()).
            message.header.scope = AddressScope::Host;
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            message.header.scope = AddressScope::Universe;
            // Every node has it, so none may ask whether another does.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            message.attributes.push(AddressAttribute::Flags(flags));
            // Deprecated from the start: by RFC 6724 any other source is better.
            let mut lifetimes = CacheInfo::default();
            lifetimes.ifa_valid = FOREVER;
            let lifetimes = AddressAttribute::CacheInfo(lifetimes);
            message.attributes.push(lifetimes);
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_cannot_tell_whose_an_address_is() {
        for (release, can) in [
            ("5.15.0-91-generic", false),
            ("5.17.9", false),
            ("4.19.0", false),
            ("5.18.0", true),
            ("6.1.0-28-amd64", true),
            ("6.12.9+bpo", true),
            ("unknown", true),
        ] {
            assert_eq!(notes_who_made_addresses(release), can, "{release}");
        }
    }
}
