//! From observed to desired: which steps, in which order.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::address::{BackendAddr, Family, FrontendAddr};
use crate::binding::Binding;
use crate::change::{Change, Restriction};
use crate::desired::{Action, Desired, Frontend, Scope};
use crate::observed::Observed;
use crate::service::{Mark, ServiceKey, VirtualService};

/// The steps that make the addresses in `scope` as desired, in the order in
/// which they must be carried out (see [`Change`]). Nothing outside of `scope`
/// is looked at.
#[must_use]
pub fn diff(desired: &Desired, observed: &Observed, scope: &Scope) -> Vec<Change> {
    let mut changes = Vec::new();
    for ip in &scope.vips {
        diff_vip(*ip, desired, observed, &mut changes);
    }
    for addr in &scope.frontends {
        diff_frontend(addr, desired, observed, &mut changes);
    }
    for key in &scope.marked {
        let wanted = desired.marked_service(key);
        diff_service(*key, wanted, desired, observed, &mut changes);
    }
    for ip in &scope.hairpins {
        match (desired.is_hairpin(*ip), observed.hairpins.contains(ip)) {
            (true, false) => changes.push(Change::AddHairpin(*ip)),
            (false, true) => changes.push(Change::RemoveHairpin(*ip)),
            (true, true) | (false, false) => {}
        }
    }
    // The variants of `Change` are declared in the order of execution.
    changes.sort();
    order_marks(&mut changes);
    changes
}

/// A mark that goes from one frontend to another is proven at each moment: it is given to the
/// one before it is taken from the other.
fn order_marks(changes: &mut [Change]) {
    let is_mark = |change: &Change| matches!(change, Change::SetMark(..));
    let start = changes.iter().take_while(|c| !is_mark(c)).count();
    let count = changes
        .iter()
        .skip(start)
        .take_while(|c| is_mark(c))
        .count();
    if let Some(marks) = changes.get_mut(start..start + count) {
        marks.sort_by_key(|change| {
            let Change::SetMark(_, from, to) = change else {
                return (true, true);
            };
            (to.is_none(), from.is_some())
        });
    }
}

/// [`diff`] over everything that is desired or observed.
#[must_use]
pub fn diff_all(desired: &Desired, observed: &Observed) -> Vec<Change> {
    diff(desired, observed, &everything(desired, observed))
}

/// Every address that is desired or observed.
#[must_use]
pub fn everything(desired: &Desired, observed: &Observed) -> Scope {
    let mut scope = Scope::default();
    for (addr, _) in desired.frontends() {
        scope.insert(addr);
    }
    let elements = observed.allowed.iter().chain(&observed.external);
    let elements = elements.chain(&observed.preserved);
    let elements = elements.chain(&observed.dropped).chain(&observed.limited);
    let elements = elements.chain(&observed.leaving).chain(&observed.closed);
    let elements = elements
        .chain(observed.admitted.keys())
        .chain(&observed.served);
    for addr in elements.chain(observed.marks.keys()) {
        scope.insert(*addr);
    }
    for key in observed.services.keys() {
        scope.insert_service(*key);
    }
    scope.marked.extend(desired.marked());
    scope.frontends.extend(desired.served());
    scope.hairpins.extend(desired.hairpins());
    scope.hairpins.extend(&observed.hairpins);
    scope.vips.extend(desired.vips());
    scope.vips.extend(&observed.guarded);
    scope.vips.extend(&observed.silent);
    scope.vips.extend(observed.bound_vips());
    scope
}

fn diff_vip(ip: IpAddr, desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let wanted = desired.is_vip(ip);
    if !wanted && is_held(ip, desired, observed) {
        return;
    }
    // By neighbour discovery a node answers for the addresses of the link's own device only.
    if wanted && ip.is_ipv4() && !observed.silent.contains(&ip) {
        changes.push(Change::SilenceVip(ip));
    } else if !wanted && observed.silent.contains(&ip) {
        changes.push(Change::UnsilenceVip(ip));
    }
    match (wanted, observed.guarded.contains(&ip)) {
        (true, false) => changes.push(Change::GuardVip(ip)),
        (false, true) => changes.push(Change::UnguardVip(ip)),
        (true, true) | (false, false) => {}
    }
    diff_binding(ip, desired.binding(ip), observed, changes);
}

/// Whether connections to this address live on although no frontend has it.
fn is_held(ip: IpAddr, desired: &Desired, observed: &Observed) -> bool {
    let services = observed.services.range(ServiceKey::all_at(ip));
    let services = services.filter_map(|(key, _)| key.address());
    let marked = observed.marks.range(FrontendAddr::all_at(ip));
    let mut all = services.chain(marked.map(|(addr, _)| *addr));
    !desired.facts().own.contains(&ip) && all.any(|addr| lingers(&addr, desired, observed))
}

/// Whether a virtual service that nobody wants stays for the connections of backends that
/// leave: that of a frontend, or the one by its mark.
fn lingers(addr: &FrontendAddr, desired: &Desired, observed: &Observed) -> bool {
    stays(ServiceKey::Address(*addr), desired, observed)
        || lingering_mark(addr, desired, observed).is_some()
}

/// The mark of a frontend by which connections live on.
fn lingering_mark(addr: &FrontendAddr, desired: &Desired, observed: &Observed) -> Option<Mark> {
    let mark = *observed.marks.get(addr)?;
    let family = Family::of(addr.ip);
    let key = ServiceKey::Mark { family, mark };
    (desired.drains().holds_mark(&key, addr) && stays(key, desired, observed)).then_some(mark)
}

fn stays(key: ServiceKey, desired: &Desired, observed: &Observed) -> bool {
    let Some(present) = observed.services.get(&key) else {
        return false;
    };
    let mut kept = desired.drains().kept(key);
    desired.virtual_service(&key).is_none()
        && kept.any(|backend| present.servers.contains_key(&backend))
}

fn diff_binding(
    ip: IpAddr,
    wanted: Option<Binding>,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let present = || observed.bindings(ip).cloned();
    let Some(wanted) = wanted else {
        changes.extend(present().map(|from| Change::UnbindVip(ip, from)));
        return;
    };
    let former = present().filter(|binding| *binding != wanted);
    let former = former.filter(|binding| !binding.is_replaced_by(&wanted, ip));
    changes.extend(former.map(|from| Change::ReleaseVip(ip, from)));
    if !observed.is_bound(ip) {
        changes.push(Change::BindVip(ip, wanted));
    } else if !observed.is_bound_as(ip, &wanted) {
        changes.push(Change::RebindVip(ip, wanted));
    }
}

fn diff_frontend(
    addr: &FrontendAddr,
    desired: &Desired,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let frontend = desired.frontend(addr);
    let wanted = frontend.and_then(Frontend::virtual_service);
    let lingers = lingers(addr, desired, observed);
    // What its connections need stays as it is.
    let held = lingers && frontend.is_none();
    let remains = |set: &BTreeSet<FrontendAddr>| held && set.contains(addr);
    // At a VIP, the guard lets the service's answers pass; it has none at a node's address.
    // They may be those of the virtual service by mark, while there is no other.
    let allow = frontend.is_some_and(|frontend| {
        frontend.is_vip && (wanted.is_some() || frontend.internal.is_some() || lingers)
    });
    let allow = allow || remains(&observed.allowed);
    match (allow, observed.allowed.contains(addr)) {
        (true, false) => changes.push(Change::AllowFrontend(*addr)),
        (false, true) => changes.push(Change::DisallowFrontend(*addr)),
        (true, true) | (false, false) => {}
    }
    let external = frontend.is_some_and(|frontend| frontend.kind.is_external());
    let external = external || remains(&observed.external);
    match (external, observed.external.contains(addr)) {
        (true, false) => changes.push(Change::AddExternal(*addr)),
        (false, true) => changes.push(Change::RemoveExternal(*addr)),
        (true, true) | (false, false) => {}
    }
    let preserved = frontend.is_some_and(|frontend| frontend.preserves_client);
    let preserved = preserved || remains(&observed.preserved);
    match (preserved, observed.preserved.contains(addr)) {
        (true, false) => changes.push(Change::AddPreserved(*addr)),
        (false, true) => changes.push(Change::RemovePreserved(*addr)),
        (true, true) | (false, false) => {}
    }
    let dropped = frontend.is_some_and(|frontend| frontend.action() == Action::Drop);
    match (dropped, observed.dropped.contains(addr)) {
        (true, false) => changes.push(Change::AddDropped(*addr)),
        (false, true) => changes.push(Change::RemoveDropped(*addr)),
        (true, true) | (false, false) => {}
    }
    match (desired.is_served(addr), observed.served.contains(addr)) {
        (true, false) => changes.push(Change::AddServed(*addr)),
        (false, true) => changes.push(Change::RemoveServed(*addr)),
        (true, true) | (false, false) => {}
    }
    let leaving = stays((*addr).into(), desired, observed);
    match (leaving, observed.leaving.contains(addr)) {
        (true, false) => changes.push(Change::AddLeaving(*addr)),
        (false, true) => changes.push(Change::RemoveLeaving(*addr)),
        (true, true) | (false, false) => {}
    }
    let by_mark = lingering_mark(addr, desired, observed);
    match (by_mark.is_some(), observed.closed.contains(addr)) {
        (true, false) => changes.push(Change::AddClosed(*addr)),
        (false, true) => changes.push(Change::RemoveClosed(*addr)),
        (true, true) | (false, false) => {}
    }
    if !held {
        diff_restriction(addr, desired, observed, changes);
    }
    // It is what proves that a virtual service by mark is ours.
    let mark = desired.mark(addr).or(by_mark);
    let marked = observed.marks.get(addr).copied();
    if mark != marked {
        changes.push(Change::SetMark(*addr, marked, mark));
    }
    diff_service((*addr).into(), wanted, desired, observed, changes);
}

fn diff_service(
    key: ServiceKey,
    wanted: Option<VirtualService>,
    desired: &Desired,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let present = observed.services.get(&key);
    match (expected(key, wanted, present, desired), present) {
        (None, None) => {}
        (None, Some(_)) => changes.push(Change::RemoveService(key)),
        (Some(wanted), None) => {
            changes.push(Change::AddService(key, wanted.scheduling.clone()));
            diff_servers(key, &wanted, &VirtualService::default(), changes);
        }
        // A mark that has passed from one service port to another: not one client of
        // the new one may meet a backend of the old one.
        (Some(wanted), Some(present)) if key.address().is_none() && disjoint(&wanted, present) => {
            changes.push(Change::RemoveService(key));
            changes.push(Change::AddService(key, wanted.scheduling.clone()));
            diff_servers(key, &wanted, &VirtualService::default(), changes);
        }
        (Some(wanted), Some(present)) => {
            if wanted.scheduling != present.scheduling {
                changes.push(Change::UpdateService(key, wanted.scheduling.clone()));
            }
            diff_servers(key, &wanted, present, changes);
        }
    }
}

/// What a virtual service should be that is `present`: what is wanted, and what leaves and keeps
/// its connections.
pub(crate) fn expected(
    key: ServiceKey,
    wanted: Option<VirtualService>,
    present: Option<&VirtualService>,
    desired: &Desired,
) -> Option<VirtualService> {
    match present {
        Some(present) => with_leaving(key, wanted, present, desired),
        None => wanted,
    }
}

fn with_leaving(
    key: ServiceKey,
    wanted: Option<VirtualService>,
    present: &VirtualService,
    desired: &Desired,
) -> Option<VirtualService> {
    let kept = desired.drains().kept(key);
    let kept = kept.filter(|backend| present.servers.contains_key(backend));
    let kept: Vec<BackendAddr> = kept.collect();
    if kept.is_empty() {
        return wanted;
    }
    let mut service = match wanted {
        Some(mut wanted) => {
            wanted.scheduling = wanted.scheduling.around_weight_0();
            wanted
        }
        None => VirtualService {
            scheduling: present.scheduling.clone(),
            ..VirtualService::default()
        },
    };
    for backend in kept {
        service.servers.entry(backend).or_insert(0);
    }
    Some(service)
}

fn disjoint(wanted: &VirtualService, present: &VirtualService) -> bool {
    let mut servers = wanted.servers.keys();
    !present.servers.is_empty() && !servers.any(|server| present.servers.contains_key(server))
}

fn diff_restriction(
    addr: &FrontendAddr,
    desired: &Desired,
    observed: &Observed,
    changes: &mut Vec<Change>,
) {
    let wanted = desired.admitted(addr);
    let nobody = BTreeSet::new();
    let present = observed.admitted.get(addr).unwrap_or(&nobody);
    let (limit, limited) = (desired.is_restricted(addr), observed.limited.contains(addr));
    let how = Restriction {
        admit: wanted.difference(present).copied().collect(),
        dismiss: present.difference(&wanted).copied().collect(),
        limit: (limit != limited).then_some(limit),
    };
    if how != Restriction::default() {
        changes.push(Change::Restrict(*addr, how));
    }
}

fn diff_servers(
    key: ServiceKey,
    wanted: &VirtualService,
    present: &VirtualService,
    changes: &mut Vec<Change>,
) {
    for (backend, weight) in &wanted.servers {
        match present.servers.get(backend) {
            None => changes.push(Change::AddServer(key, *backend, *weight)),
            Some(have) if have != weight => {
                changes.push(Change::UpdateServer(key, *backend, *weight));
            }
            Some(_) => {}
        }
    }
    for backend in present.servers.keys() {
        if !wanted.servers.contains_key(backend) {
            changes.push(Change::RemoveServer(key, *backend));
        }
    }
}
