//! One step of programming the node.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::address::{BackendAddr, FrontendAddr};
use crate::binding::Binding;
use crate::service::{Mark, Scheduling, ServiceKey, Weight};

/// A change of who may call a frontend, made as one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Restriction {
    /// Networks that may call from now on.
    pub admit: Vec<IpNetwork>,
    /// Networks that no longer may, or no longer need to be named.
    pub dismiss: Vec<IpNetwork>,
    /// Whether from now on only those that are named may call; `None`: as before.
    pub limit: Option<bool>,
}

/// One step. Each is idempotent: to add what is there already, or to remove
/// what is gone, counts as done.
///
/// The variants stand in the order in which [`crate::diff`] emits them, which
/// is the order in which they must be carried out: what goes, goes first, from
/// the inside out (virtual service, VIP, guard); what comes, comes second, from
/// the outside in (guard, VIP, virtual service, real servers). Within a service
/// new backends come before old ones leave, so that it never stands empty in
/// between.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Drop what IPVS does not take of this frontend, where it would be refused. Before the virtual
    /// service goes, so that nobody is refused in between.
    AddDropped(FrontendAddr),
    /// Refuse or drop new connections to a frontend before IPVS sees them: it has only backends
    /// that leave. Before their weights become 0, with which IPVS would say nothing to clients.
    AddLeaving(FrontendAddr),
    /// The same for those of clients within the cluster, whose virtual service by mark has only
    /// backends that leave.
    AddClosed(FrontendAddr),
    /// Remove a virtual service; its real servers go with it.
    RemoveService(ServiceKey),
    /// Undo [`Change::AllowFrontend`].
    DisallowFrontend(FrontendAddr),
    /// Undo a binding of a VIP that is no VIP any more.
    UnbindVip(IpAddr, Binding),
    /// Undo [`Change::SilenceVip`].
    UnsilenceVip(IpAddr),
    /// Take a VIP out of the guard's set.
    UnguardVip(IpAddr),
    /// Put a VIP into the guard's set: from here on nothing that arrives for it and is not taken
    /// by IPVS reaches a socket of the host.
    GuardVip(IpAddr),
    /// Answer nobody on a link who asks for a VIP by ARP: the node has it for itself.
    SilenceVip(IpAddr),
    /// Bind a VIP that is not bound.
    BindVip(IpAddr, Binding),
    /// Bind a VIP that is bound otherwise, which it stays for the time being.
    RebindVip(IpAddr, Binding),
    /// Undo the former binding of a VIP. Behind the making of the new one: at no moment is a VIP
    /// not bound.
    ReleaseVip(IpAddr, Binding),
    /// Let replies of this frontend through the guard, to processes of the node that call it.
    AllowFrontend(FrontendAddr),
    /// Put a frontend that clients beyond the cluster call into the set of these: what IPVS does
    /// not take of it is refused, and the source of a client that is not on this node is replaced.
    /// The entry is also the proof that the virtual service at a node's address is ours.
    AddExternal(FrontendAddr),
    /// Put an external frontend into the set of those whose backends see the client's own address,
    /// wherever it is.
    AddPreserved(FrontendAddr),
    /// Undo [`Change::AddPreserved`].
    RemovePreserved(FrontendAddr),
    /// Undo [`Change::AddExternal`]. Behind the making of VIPs: a virtual service whose address has
    /// become a VIP is never without a proof that it is ours.
    RemoveExternal(FrontendAddr),
    /// Put another mark, or none, on packets of clients within the cluster to a frontend: from one
    /// mark to the other. The entry is also the proof that the virtual service by mark is ours.
    SetMark(FrontendAddr, Option<Mark>, Option<Mark>),
    /// Change who may call a frontend: before it has a virtual service, and after it has none.
    Restrict(FrontendAddr, Restriction),
    /// Let a program of this node answer at this place of a VIP.
    AddServed(FrontendAddr),
    /// Undo [`Change::AddServed`].
    RemoveServed(FrontendAddr),
    /// Replace the source of connections that go from this address to itself.
    AddHairpin(IpAddr),
    /// Make a virtual service.
    AddService(ServiceKey, Scheduling),
    /// Change scheduler, flags or persistence of a virtual service in place.
    UpdateService(ServiceKey, Scheduling),
    /// Add a real server.
    AddServer(ServiceKey, BackendAddr, Weight),
    /// Change the weight of a real server.
    UpdateServer(ServiceKey, BackendAddr, Weight),
    /// Remove a real server.
    RemoveServer(ServiceKey, BackendAddr),
    /// Undo [`Change::AddHairpin`].
    RemoveHairpin(IpAddr),
    /// Undo [`Change::AddDropped`].
    RemoveDropped(FrontendAddr),
    /// Undo [`Change::AddLeaving`].
    RemoveLeaving(FrontendAddr),
    /// Undo [`Change::AddClosed`].
    RemoveClosed(FrontendAddr),
}

impl Change {
    /// The address that the step is about, where it is about one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::UnbindVip(ip, _)
            | Self::UnguardVip(ip)
            | Self::GuardVip(ip)
            | Self::SilenceVip(ip)
            | Self::UnsilenceVip(ip)
            | Self::BindVip(ip, _)
            | Self::RebindVip(ip, _)
            | Self::ReleaseVip(ip, _)
            | Self::AddHairpin(ip)
            | Self::RemoveHairpin(ip) => Some(*ip),
            _ => self.frontend().map(|frontend| frontend.ip),
        }
    }

    /// The frontend that the step is about, where it is about one.
    #[must_use]
    pub fn frontend(&self) -> Option<FrontendAddr> {
        match self {
            Self::UnbindVip(..)
            | Self::UnguardVip(_)
            | Self::GuardVip(_)
            | Self::SilenceVip(_)
            | Self::UnsilenceVip(_)
            | Self::BindVip(..)
            | Self::RebindVip(..)
            | Self::ReleaseVip(..)
            | Self::AddHairpin(_)
            | Self::RemoveHairpin(_) => None,
            Self::DisallowFrontend(frontend)
            | Self::RemoveExternal(frontend)
            | Self::RemovePreserved(frontend)
            | Self::AllowFrontend(frontend)
            | Self::AddExternal(frontend)
            | Self::AddPreserved(frontend)
            | Self::AddDropped(frontend)
            | Self::RemoveDropped(frontend)
            | Self::AddLeaving(frontend)
            | Self::RemoveLeaving(frontend)
            | Self::AddClosed(frontend)
            | Self::RemoveClosed(frontend)
            | Self::AddServed(frontend)
            | Self::RemoveServed(frontend)
            | Self::SetMark(frontend, ..)
            | Self::Restrict(frontend, _) => Some(*frontend),
            Self::RemoveService(_)
            | Self::AddService(..)
            | Self::UpdateService(..)
            | Self::AddServer(..)
            | Self::UpdateServer(..)
            | Self::RemoveServer(..) => self.service().and_then(|key| key.address()),
        }
    }

    /// The virtual service that the step is about, where it is about one.
    #[must_use]
    pub fn service(&self) -> Option<ServiceKey> {
        match self {
            Self::RemoveService(service)
            | Self::AddService(service, _)
            | Self::UpdateService(service, _)
            | Self::AddServer(service, ..)
            | Self::UpdateServer(service, ..)
            | Self::RemoveServer(service, _) => Some(*service),
            _ => None,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveService(at) => write!(f, "remove virtual service {at}"),
            Self::DisallowFrontend(at) => {
                write!(f, "remove frontend {at} from the guard")
            }
            Self::RemoveExternal(at) => {
                write!(f, "remove external frontend {at} from the filter")
            }
            Self::AddExternal(at) => {
                write!(f, "add external frontend {at} to the filter")
            }
            Self::AddPreserved(at) => {
                write!(
                    f,
                    "add {at} to the filter's frontends that preserve the client"
                )
            }
            Self::RemovePreserved(at) => {
                write!(
                    f,
                    "remove {at} from the filter's frontends that preserve the client"
                )
            }
            Self::AddServed(at) => write!(f, "let this node answer at {at}"),
            Self::RemoveServed(at) => {
                write!(f, "let this node answer at {at} no more")
            }
            Self::AddDropped(at) => {
                write!(f, "add {at} to the filter's frontends that are dropped")
            }
            Self::RemoveDropped(at) => {
                write!(
                    f,
                    "remove {at} from the filter's frontends that are dropped"
                )
            }
            Self::AddLeaving(at) => {
                write!(f, "refuse new connections to {at}, whose backends leave")
            }
            Self::RemoveLeaving(at) => {
                write!(f, "refuse new connections to {at} no more")
            }
            Self::AddClosed(at) => write!(
                f,
                "refuse new connections of clients within the cluster to {at}, whose backends leave"
            ),
            Self::RemoveClosed(at) => write!(
                f,
                "refuse new connections of clients within the cluster to {at} no more"
            ),
            Self::SetMark(at, _, Some(mark)) => {
                write!(f, "mark clients within the cluster of {at} with {mark:#x}")
            }
            Self::SetMark(at, _, None) => {
                write!(f, "mark clients within the cluster of {at} no more")
            }
            Self::Restrict(at, how) => {
                write!(
                    f,
                    "admit {} and dismiss {} networks at {at}",
                    how.admit.len(),
                    how.dismiss.len()
                )
            }
            Self::AddHairpin(ip) => write!(f, "add hairpin address {ip} to the filter"),
            Self::RemoveHairpin(ip) => write!(f, "remove hairpin address {ip} from the filter"),
            Self::UnbindVip(ip, from) => write!(f, "unbind VIP {ip} ({from})"),
            Self::UnsilenceVip(ip) => write!(f, "silence VIP {ip} no more"),
            Self::SilenceVip(ip) => write!(f, "silence VIP {ip}"),
            Self::UnguardVip(ip) => write!(f, "unguard VIP {ip}"),
            Self::GuardVip(ip) => write!(f, "guard VIP {ip}"),
            Self::BindVip(ip, to) => write!(f, "bind VIP {ip} ({to})"),
            Self::RebindVip(ip, to) => write!(f, "bind VIP {ip} another way ({to})"),
            Self::ReleaseVip(ip, from) => {
                write!(f, "undo the former binding of VIP {ip} ({from})")
            }
            Self::AllowFrontend(at) => write!(f, "add frontend {at} to the guard"),
            Self::AddService(at, scheduling) => {
                write!(f, "add virtual service {at} ({})", scheduling.scheduler)
            }
            Self::UpdateService(at, scheduling) => {
                write!(f, "update virtual service {at} ({})", scheduling.scheduler)
            }
            Self::AddServer(at, backend, weight) => {
                write!(f, "add real server {backend} weight {weight} to {at}")
            }
            Self::UpdateServer(at, backend, weight) => {
                write!(f, "set weight {weight} of real server {backend} of {at}")
            }
            Self::RemoveServer(at, backend) => {
                write!(f, "remove real server {backend} from {at}")
            }
        }
    }
}
