//! What of ours the kernel was seen to hold.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::address::FrontendAddr;
use crate::change::Change;
use crate::service::VirtualService;

/// The parts of the node that are ours, as they were observed and as they
/// became by the changes carried out since.
///
/// An `Observed` is complete: a dump that could not be finished is an error of
/// the observer and never a smaller `Observed`. Foreign objects are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// VIPs in the guard's set.
    pub guarded: BTreeSet<IpAddr>,
    /// VIPs on our device.
    pub bound: BTreeSet<IpAddr>,
    /// Frontends whose replies pass the guard.
    pub allowed: BTreeSet<FrontendAddr>,
    /// Frontends in the set of external ones.
    pub external: BTreeSet<FrontendAddr>,
    /// Frontends in the set of those whose backends see the client.
    pub preserved: BTreeSet<FrontendAddr>,
    /// Addresses in the set of hairpins.
    pub hairpins: BTreeSet<IpAddr>,
    /// Virtual services on our addresses.
    pub services: BTreeMap<FrontendAddr, VirtualService>,
}

impl Observed {
    /// Records a change that the kernel has acknowledged.
    pub fn record(&mut self, change: &Change) {
        match change {
            Change::RemoveService(frontend) => {
                self.services.remove(frontend);
            }
            Change::DisallowFrontend(frontend) => {
                self.allowed.remove(frontend);
            }
            Change::UnbindVip(ip) => {
                self.bound.remove(ip);
            }
            Change::UnguardVip(ip) => {
                self.guarded.remove(ip);
            }
            Change::GuardVip(ip) => {
                self.guarded.insert(*ip);
            }
            Change::BindVip(ip) => {
                self.bound.insert(*ip);
            }
            Change::AllowFrontend(frontend) => {
                self.allowed.insert(*frontend);
            }
            Change::AddExternal(frontend) => {
                self.external.insert(*frontend);
            }
            Change::RemoveExternal(frontend) => {
                self.external.remove(frontend);
            }
            Change::AddPreserved(frontend) => {
                self.preserved.insert(*frontend);
            }
            Change::RemovePreserved(frontend) => {
                self.preserved.remove(frontend);
            }
            Change::AddHairpin(ip) => {
                self.hairpins.insert(*ip);
            }
            Change::RemoveHairpin(ip) => {
                self.hairpins.remove(ip);
            }
            Change::AddService(frontend, scheduling)
            | Change::UpdateService(frontend, scheduling) => {
                self.services.entry(*frontend).or_default().scheduling = scheduling.clone();
            }
            Change::AddServer(frontend, backend, weight)
            | Change::UpdateServer(frontend, backend, weight) => {
                if let Some(service) = self.services.get_mut(frontend) {
                    service.servers.insert(*backend, *weight);
                }
            }
            Change::RemoveServer(frontend, backend) => {
                if let Some(service) = self.services.get_mut(frontend) {
                    service.servers.remove(backend);
                }
            }
        }
    }
}
