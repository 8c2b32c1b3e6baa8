//! Which endpoints a service port uses.
//!
//! Ready endpoints; where there is none at all, those that are terminating but
//! still serving. One endpoint that stands in several slices counts once, and
//! the copy that is ready wins. What is chosen depends on the traffic policy:
//! [`choose`] gives both sets, each chosen for itself.

use std::collections::BTreeMap;

use crate::address::{BackendAddr, Family, parse_address};
use crate::condition::{Condition, Reason};
use crate::kube::{
    AddressType, Endpoint, EndpointHints, EndpointSlice, HEADLESS_LABEL, Kind, ObjectKey,
    ServicePort,
};
use crate::scheduling::Weights;
use crate::service::Weight;

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
    /// Its share, where the scheduler weighs; 0 takes no new connections.
    pub weight: Weight,
}

/// Backends by address.
pub type Backends = BTreeMap<BackendAddr, Backend>;

/// The backends of a service port, for each traffic policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Under policy Cluster; empty if no endpoint is usable anywhere.
    pub cluster: Backends,
    /// Under policy Local: those on this node.
    pub local: Backends,
}

/// Where the choice is made.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Name of this node.
    pub node: &'a str,
    /// Its zone, if it has one.
    pub zone: Option<&'a str>,
}

/// An endpoint that can be used, with what is needed to choose.
#[derive(Default)]
struct Candidate<'a> {
    backend: Option<Backend>,
    hints: Vec<&'a EndpointHints>,
}

impl<'a> Candidate<'a> {
    /// Takes in one copy of the endpoint. The ready ones count, if there is any: the
    /// others may tell of a pod on another node that had the address before.
    fn take(&mut self, copy: Backend, hints: &'a EndpointHints) {
        match &mut self.backend {
            Some(known) if known.state < copy.state => {}
            Some(known) if known.state == copy.state => {
                known.local |= copy.local;
                known.weight = known.weight.max(copy.weight);
                self.hints.push(hints);
            }
            Some(_) | None => {
                self.backend = Some(copy);
                self.hints = vec![hints];
            }
        }
    }
}

/// The backends of `port` in `family`, chosen from the Service's slices.
///
/// `conditions` receives one entry for each address that cannot be used.
#[must_use]
pub fn choose<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
    place: Place<'_>,
    weights: &Weights,
    conditions: &mut Vec<Condition>,
) -> Choice {
    let mut known: BTreeMap<BackendAddr, Candidate<'a>> = BTreeMap::new();
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
                let backend = Backend {
                    state,
                    local: endpoint.node_name.as_deref() == Some(place.node),
                    weight: weights.of(slice, endpoint, ip),
                };
                known
                    .entry(BackendAddr::new(ip, number))
                    .or_default()
                    .take(backend, &endpoint.hints);
            }
        }
    }
    Choice {
        local: usable(known.iter().filter(|(_, c)| is_local(c))),
        cluster: nearest(&known, place).unwrap_or_else(|| usable(known.iter())),
    }
}

fn is_local(candidate: &Candidate<'_>) -> bool {
    candidate.backend.is_some_and(|backend| backend.local)
}

fn is_ready(candidate: &Candidate<'_>) -> bool {
    let backend = candidate.backend;
    backend.is_some_and(|backend| backend.state == BackendState::Ready)
}

/// The ready ones, or all where none is.
fn usable<'a>(
    candidates: impl Iterator<Item = (&'a BackendAddr, &'a Candidate<'a>)> + Clone,
) -> Backends {
    let any_ready = candidates.clone().any(|(_, candidate)| is_ready(candidate));
    candidates
        .filter(|(_, candidate)| !any_ready || is_ready(candidate))
        .filter_map(|(addr, candidate)| Some((*addr, candidate.backend?)))
        .collect()
}

/// The ready endpoints that are meant for this node, or else for its zone: if
/// every ready endpoint says for whom it is meant, and at least one for us.
fn nearest(known: &BTreeMap<BackendAddr, Candidate<'_>>, place: Place<'_>) -> Option<Backends> {
    let ready = || known.iter().filter(|(_, candidate)| is_ready(candidate));
    let pick = |said: &dyn Fn(&EndpointHints) -> &[String], here: &str| {
        let said_at_all = |hints: &[&EndpointHints]| hints.iter().any(|h| !said(h).is_empty());
        let meant = |hints: &[&EndpointHints]| {
            let mut names = hints.iter().flat_map(|hints| said(hints));
            names.any(|name| name == here)
        };
        let all_say = ready().all(|(_, candidate)| said_at_all(&candidate.hints));
        let chosen: Backends = ready()
            .filter(|(_, candidate)| meant(&candidate.hints))
            .filter_map(|(addr, candidate)| Some((*addr, candidate.backend?)))
            .collect();
        (all_say && !chosen.is_empty()).then_some(chosen)
    };
    let of_node = pick(&|hints| &hints.for_nodes, place.node);
    of_node.or_else(|| pick(&|hints| &hints.for_zones, place.zone?))
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
