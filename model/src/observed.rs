//! What of ours the kernel was seen to hold.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::address::{BackendAddr, Family, FrontendAddr};
use crate::binding::Binding;
use crate::change::{Change, Restriction};
use crate::ownership::Proofs;
use crate::service::{Mark, ServiceKey, VirtualService, Weight};

/// The parts of the node that are ours, as they were observed and as they
/// became by the changes carried out since.
///
/// An `Observed` is complete: a dump that could not be finished is an error of
/// the observer and never a smaller `Observed`. Foreign objects are not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// VIPs in the guard's set.
    pub guarded: BTreeSet<IpAddr>,
    /// VIPs of IPv4 about which nobody on a link is answered.
    pub silent: BTreeSet<IpAddr>,
    /// VIPs that the kernel holds for local by our doing, and in which ways.
    pub bound: BTreeSet<(IpAddr, Binding)>,
    /// Frontends whose replies pass the guard.
    pub allowed: BTreeSet<FrontendAddr>,
    /// Frontends in the set of external ones.
    pub external: BTreeSet<FrontendAddr>,
    /// Frontends in the set of those whose backends see the client.
    pub preserved: BTreeSet<FrontendAddr>,
    /// Frontends in the set of those that are dropped.
    pub dropped: BTreeSet<FrontendAddr>,
    /// Frontends whose backends all leave: new connections do not reach IPVS.
    pub leaving: BTreeSet<FrontendAddr>,
    /// Those of which the virtual service by mark has only backends that leave.
    pub closed: BTreeSet<FrontendAddr>,
    /// Frontends that only those may call whom [`Observed::admitted`] names.
    pub limited: BTreeSet<FrontendAddr>,
    /// Who may call them.
    pub admitted: BTreeMap<FrontendAddr, BTreeSet<IpNetwork>>,
    /// Marks of packets of clients within the cluster, by frontend.
    pub marks: BTreeMap<FrontendAddr, Mark>,
    /// Places of VIPs where a program of this node answers.
    pub served: BTreeSet<FrontendAddr>,
    /// Addresses in the set of hairpins.
    pub hairpins: BTreeSet<IpAddr>,
    /// Virtual services on our addresses and by our marks.
    pub services: BTreeMap<ServiceKey, VirtualService>,
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
            Change::UnbindVip(ip, from) | Change::ReleaseVip(ip, from) => {
                self.bound.remove(&(*ip, from.clone()));
            }
            Change::UnguardVip(ip) => {
                self.guarded.remove(ip);
            }
            Change::GuardVip(ip) => {
                self.guarded.insert(*ip);
            }
            Change::SilenceVip(ip) => {
                self.silent.insert(*ip);
            }
            Change::UnsilenceVip(ip) => {
                self.silent.remove(ip);
            }
            Change::BindVip(ip, to) | Change::RebindVip(ip, to) => self.bind(*ip, to.clone()),
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
            Change::AddServed(frontend) => {
                self.served.insert(*frontend);
            }
            Change::RemoveServed(frontend) => {
                self.served.remove(frontend);
            }
            Change::AddDropped(frontend) => {
                self.dropped.insert(*frontend);
            }
            Change::RemoveDropped(frontend) => {
                self.dropped.remove(frontend);
            }
            Change::AddLeaving(frontend) => {
                self.leaving.insert(*frontend);
            }
            Change::RemoveLeaving(frontend) => {
                self.leaving.remove(frontend);
            }
            Change::AddClosed(frontend) => {
                self.closed.insert(*frontend);
            }
            Change::RemoveClosed(frontend) => {
                self.closed.remove(frontend);
            }
            Change::SetMark(frontend, _, Some(mark)) => {
                self.marks.insert(*frontend, *mark);
            }
            Change::SetMark(frontend, _, None) => {
                self.marks.remove(frontend);
            }
            Change::Restrict(frontend, how) => self.restrict(*frontend, how),
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
    /// What proves that virtual services are ours. In the `excluded` networks a VIP proves nothing
    /// about them: others may have theirs at it, too.
    #[must_use]
    pub fn proofs(&self, excluded: &[IpNetwork]) -> Proofs {
        let is_shared = |ip: &IpAddr| excluded.iter().any(|network| network.contains(*ip));
        let marks = self.marks.iter().map(|(addr, mark)| ServiceKey::Mark {
            family: Family::of(addr.ip),
            mark: *mark,
        });
        Proofs {
            vips: self
                .guarded
                .iter()
                .copied()
                .chain(self.bound_vips())
                .filter(|ip| !is_shared(ip))
                .collect(),
            frontends: self
                .allowed
                .iter()
                .filter(|frontend| is_shared(&frontend.ip))
                .chain(&self.external)
                .copied()
                .collect(),
            marks: marks.collect(),
        }
    }

    /// Whether a virtual service is as wanted, or is not there where none is; what leaves
    /// may be there besides, with the scheduler that leads past it.
    #[must_use]
    pub fn serves(&self, key: &ServiceKey, wanted: Option<&VirtualService>) -> bool {
        let none = VirtualService::default();
        let Some(present) = self.services.get(key) else {
            return wanted.is_none();
        };
        let servers = &wanted.unwrap_or(&none).servers;
        let leaves = |(server, weight): (&BackendAddr, &Weight)| {
            *weight == 0 && !servers.contains_key(server)
        };
        let here = |(server, weight)| present.servers.get(server) == Some(weight);
        let is_scheduled = |wanted: &VirtualService| {
            let wanted = wanted.scheduling.clone();
            present.scheduling == wanted
                || (present.servers.iter().any(leaves)
                    && present.scheduling == wanted.around_weight_0())
        };
        wanted.is_none_or(is_scheduled)
            && servers.iter().all(here)
            && present
                .servers
                .iter()
                .filter(|server| !leaves(*server))
                .count()
                == servers.len()
    }

    /// Takes over what `found` says of the filter's sets.
    pub fn take_filter(&mut self, found: Self) {
        let (bound, services) = (
            std::mem::take(&mut self.bound),
            std::mem::take(&mut self.services),
        );
        *self = Self {
            bound,
            services,
            ..found
        };
    }

    /// Records that a VIP is bound in this way.
    pub fn bind(&mut self, ip: IpAddr, binding: Binding) {
        let replaced = self.bindings(ip);
        let replaced = replaced.filter(|former| former.is_replaced_by(&binding, ip));
        let replaced: Vec<Binding> = replaced.cloned().collect();
        for former in replaced {
            self.bound.remove(&(ip, former));
        }
        self.bound.insert((ip, binding));
    }

    /// The ways in which a VIP is bound.
    pub fn bindings(&self, ip: IpAddr) -> impl Iterator<Item = &Binding> {
        let from = self.bound.range((ip, Binding::Address)..);
        let of_ip = from.take_while(move |(bound, _)| *bound == ip);
        of_ip.map(|(_, binding)| binding)
    }

    /// Whether a VIP is bound in this way.
    #[must_use]
    pub fn is_bound_as(&self, ip: IpAddr, binding: &Binding) -> bool {
        self.bindings(ip).any(|present| present == binding)
    }

    /// Whether a VIP is bound in any way.
    #[must_use]
    pub fn is_bound(&self, ip: IpAddr) -> bool {
        self.bindings(ip).next().is_some()
    }

    /// Every VIP that is bound, in order.
    pub fn bound_vips(&self) -> impl Iterator<Item = IpAddr> {
        let mut last = None;
        let ips = self.bound.iter().map(|(ip, _)| *ip);
        ips.filter(move |ip| last.replace(*ip) != Some(*ip))
    }

    fn restrict(&mut self, frontend: FrontendAddr, how: &Restriction) {
        let admitted = self.admitted.entry(frontend).or_default();
        for network in &how.dismiss {
            admitted.remove(network);
        }
        admitted.extend(&how.admit);
        if admitted.is_empty() {
            self.admitted.remove(&frontend);
        }
        match how.limit {
            Some(true) => {
                self.limited.insert(frontend);
            }
            Some(false) => {
                self.limited.remove(&frontend);
            }
            None => {}
        }
    }
}
