//! Which endpoints a service port uses.
//!
//! Ready endpoints; where there is none at all, those that are terminating but
//! still serving. One endpoint that stands in several slices counts once, and
//! the copy that is ready wins.

use std::collections::BTreeMap;

use crate::address::{BackendAddr, Family, parse_address};
use crate::condition::{Condition, Reason};
use crate::kube::{
    AddressType, Endpoint, EndpointSlice, HEADLESS_LABEL, Kind, ObjectKey, ServicePort,
};

/// State of an endpoint that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendState {
    /// Takes new connections.
    Ready,
    /// Is terminating, still serves, and is used because nothing ready is left.
    Terminating,
}

/// One backend of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Why it is in use.
    pub state: BackendState,
    /// Whether it runs on this node.
    pub local: bool,
}

/// The backends of `port` in `family`, chosen from the Service's slices.
///
/// `conditions` receives one entry for each address that cannot be used.
#[must_use]
pub fn choose<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
    node: &str,
    conditions: &mut Vec<Condition>,
) -> BTreeMap<BackendAddr, Backend> {
    let mut known: BTreeMap<BackendAddr, Backend> = BTreeMap::new();
    for slice in slices.filter(|slice| counts(slice, family)) {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol)
            .filter_map(|p| p.port)
            .filter(|number| *number != 0);
        for number in numbers {
            for endpoint in &slice.endpoints {
                let Some(state) = usable_as(endpoint) else {
                    continue;
                };
                let Some(ip) = address(endpoint, slice, family, conditions) else {
                    continue;
                };
                let local = endpoint.node_name.as_deref() == Some(node);
                known
                    .entry(BackendAddr::new(ip, number))
                    .and_modify(|copy| {
                        copy.state = copy.state.min(state);
                        copy.local |= local;
                    })
                    .or_insert(Backend { state, local });
            }
        }
    }
    if known.values().any(|b| b.state == BackendState::Ready) {
        known.retain(|_, b| b.state == BackendState::Ready);
    }
    known
}

/// Whether the endpoints of a slice are used for a family.
pub(crate) fn counts(slice: &EndpointSlice, family: Family) -> bool {
    let same_family = matches!(
        (slice.address_type, family),
        (AddressType::IPv4, Family::IPv4) | (AddressType::IPv6, Family::IPv6)
    );
    same_family && !slice.metadata.labels.contains_key(HEADLESS_LABEL)
}

/// `ready: true` counts even while terminating: `publishNotReadyAddresses` sets it so.
fn usable_as(endpoint: &Endpoint) -> Option<BackendState> {
    let conditions = endpoint.conditions;
    if conditions.is_ready() {
        Some(BackendState::Ready)
    } else if conditions.is_serving() && conditions.is_terminating() {
        Some(BackendState::Terminating)
    } else {
        None
    }
}

fn address(
    endpoint: &Endpoint,
    slice: &EndpointSlice,
    family: Family,
    conditions: &mut Vec<Condition>,
) -> Option<std::net::IpAddr> {
    let text = endpoint.addresses.first()?;
    let problem = match parse_address(text) {
        Ok(ip) if Family::of(ip) == family => return Some(ip),
        Ok(_) => format!("is not of the slice's addressType {family}"),
        Err(error) => error.to_string(),
    };
    let condition = Condition {
        object: ObjectKey {
            kind: Kind::EndpointSlice,
            name: slice.metadata.object_name(),
        },
        reason: Reason::InvalidAddress,
        message: format!(
            "endpoints[].addresses: {text:?} {problem}; the endpoint is left out, correct it"
        ),
    };
    // A slice is read once for each port of its Service.
    if !conditions.contains(&condition) {
        conditions.push(condition);
    }
    None
}
