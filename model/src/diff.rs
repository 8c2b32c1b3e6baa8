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
    for addr in observed.services.keys().chain(&observed.allowed) {
        scope.insert(*addr);
    }
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
    let wanted = desired.frontend(addr).and_then(Frontend::virtual_service);
    let present = observed.services.get(addr);
    let allowed = observed.allowed.contains(addr);
    match (&wanted, allowed) {
        (Some(_), false) => changes.push(Change::AllowFrontend(*addr)),
        (None, true) => changes.push(Change::DisallowFrontend(*addr)),
        (Some(_), true) | (None, false) => {}
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
