//! From observed to desired: which steps, in which order.

use std::net::IpAddr;

use crate::address::FrontendAddr;
use crate::change::Change;
use crate::desired::{Desired, Frontend, Scope};
use crate::observed::Observed;
use crate::service::VirtualService;

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
    for ip in &scope.hairpins {
        match (desired.is_hairpin(*ip), observed.hairpins.contains(ip)) {
            (true, false) => changes.push(Change::AddHairpin(*ip)),
            (false, true) => changes.push(Change::RemoveHairpin(*ip)),
            (true, true) | (false, false) => {}
        }
    }
    // The variants of `Change` are declared in the order of execution.
    changes.sort();
    changes
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
    for addr in elements.chain(observed.services.keys()) {
        scope.insert(*addr);
    }
    scope.hairpins.extend(desired.hairpins());
    scope.hairpins.extend(&observed.hairpins);
    scope.vips.extend(desired.vips());
    scope.vips.extend(&observed.guarded);
    scope.vips.extend(&observed.bound);
    scope
}

fn diff_vip(ip: IpAddr, desired: &Desired, observed: &Observed, changes: &mut Vec<Change>) {
    let wanted = desired.is_vip(ip);
    let steps = [
        (
            observed.bound.contains(&ip),
            Change::BindVip(ip),
            Change::UnbindVip(ip),
        ),
        (
            observed.guarded.contains(&ip),
            Change::GuardVip(ip),
            Change::UnguardVip(ip),
        ),
    ];
    for (present, make, remove) in steps {
        match (wanted, present) {
            (true, false) => changes.push(make),
            (false, true) => changes.push(remove),
            (true, true) | (false, false) => {}
        }
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
    let present = observed.services.get(addr);
    // At a VIP, the guard lets the service's answers pass; it has none at a node's address.
    let allow = wanted.is_some() && frontend.is_some_and(|frontend| frontend.kind.is_vip());
    match (allow, observed.allowed.contains(addr)) {
        (true, false) => changes.push(Change::AllowFrontend(*addr)),
        (false, true) => changes.push(Change::DisallowFrontend(*addr)),
        (true, true) | (false, false) => {}
    }
    let external = frontend.is_some_and(|frontend| frontend.kind.is_external());
    match (external, observed.external.contains(addr)) {
        (true, false) => changes.push(Change::AddExternal(*addr)),
        (false, true) => changes.push(Change::RemoveExternal(*addr)),
        (true, true) | (false, false) => {}
    }
    let preserved = frontend.is_some_and(|frontend| frontend.kind.preserves_client());
    match (preserved, observed.preserved.contains(addr)) {
        (true, false) => changes.push(Change::AddPreserved(*addr)),
        (false, true) => changes.push(Change::RemovePreserved(*addr)),
        (true, true) | (false, false) => {}
    }
    match (wanted, present) {
        (None, None) => {}
        (None, Some(_)) => changes.push(Change::RemoveService(*addr)),
        (Some(wanted), None) => {
            changes.push(Change::AddService(*addr, wanted.scheduling.clone()));
            diff_servers(addr, &wanted, &VirtualService::default(), changes);
        }
        (Some(wanted), Some(present)) => {
            if wanted.scheduling != present.scheduling {
                changes.push(Change::UpdateService(*addr, wanted.scheduling.clone()));
            }
            diff_servers(addr, &wanted, present, changes);
        }
    }
}

fn diff_servers(
    addr: &FrontendAddr,
    wanted: &VirtualService,
    present: &VirtualService,
    changes: &mut Vec<Change>,
) {
    for (backend, weight) in &wanted.servers {
        match present.servers.get(backend) {
            None => changes.push(Change::AddServer(*addr, *backend, *weight)),
            Some(have) if have != weight => {
                changes.push(Change::UpdateServer(*addr, *backend, *weight));
            }
            Some(_) => {}
        }
    }
    for backend in present.servers.keys() {
        if !wanted.servers.contains_key(backend) {
            changes.push(Change::RemoveServer(*addr, *backend));
        }
    }
}
