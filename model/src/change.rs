//! One step of programming the node.

use std::fmt;
use std::net::IpAddr;

use crate::address::{BackendAddr, FrontendAddr};
use crate::service::{Scheduling, Weight};

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
    /// Remove a virtual service; its real servers go with it.
    RemoveService(FrontendAddr),
    /// Undo [`Change::AllowFrontend`].
    DisallowFrontend(FrontendAddr),
    /// Take a VIP off the device.
    UnbindVip(IpAddr),
    /// Take a VIP out of the guard's set.
    UnguardVip(IpAddr),
    /// Put a VIP into the guard's set: from here on nothing that arrives for it and is not taken
    /// by IPVS reaches a socket of the host.
    GuardVip(IpAddr),
    /// Put a VIP on the device.
    BindVip(IpAddr),
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
    /// Replace the source of connections that go from this address to itself.
    AddHairpin(IpAddr),
    /// Make a virtual service.
    AddService(FrontendAddr, Scheduling),
    /// Change scheduler, flags or persistence of a virtual service in place.
    UpdateService(FrontendAddr, Scheduling),
    /// Add a real server.
    AddServer(FrontendAddr, BackendAddr, Weight),
    /// Change the weight of a real server.
    UpdateServer(FrontendAddr, BackendAddr, Weight),
    /// Remove a real server.
    RemoveServer(FrontendAddr, BackendAddr),
    /// Undo [`Change::AddHairpin`].
    RemoveHairpin(IpAddr),
}

impl Change {
    /// The address that the step is about. A step that failed holds back the later steps with the
    /// same address, and no others.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        match self {
            Self::UnbindVip(ip)
            | Self::UnguardVip(ip)
            | Self::GuardVip(ip)
            | Self::BindVip(ip)
            | Self::AddHairpin(ip)
            | Self::RemoveHairpin(ip) => *ip,
            Self::RemoveService(frontend)
            | Self::DisallowFrontend(frontend)
            | Self::RemoveExternal(frontend)
            | Self::RemovePreserved(frontend)
            | Self::AllowFrontend(frontend)
            | Self::AddExternal(frontend)
            | Self::AddPreserved(frontend)
            | Self::AddService(frontend, _)
            | Self::UpdateService(frontend, _)
            | Self::AddServer(frontend, _, _)
            | Self::UpdateServer(frontend, _, _)
            | Self::RemoveServer(frontend, _) => frontend.ip,
        }
    }

    /// The frontend that the step is about, where it is about one.
    #[must_use]
    pub fn frontend(&self) -> Option<FrontendAddr> {
        match self {
            Self::UnbindVip(_)
            | Self::UnguardVip(_)
            | Self::GuardVip(_)
            | Self::BindVip(_)
            | Self::AddHairpin(_)
            | Self::RemoveHairpin(_) => None,
            Self::RemoveService(frontend)
            | Self::DisallowFrontend(frontend)
            | Self::RemoveExternal(frontend)
            | Self::RemovePreserved(frontend)
            | Self::AllowFrontend(frontend)
            | Self::AddExternal(frontend)
            | Self::AddPreserved(frontend)
            | Self::AddService(frontend, _)
            | Self::UpdateService(frontend, _)
            | Self::AddServer(frontend, _, _)
            | Self::UpdateServer(frontend, _, _)
            | Self::RemoveServer(frontend, _) => Some(*frontend),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveService(frontend) => write!(f, "remove virtual service {frontend}"),
            Self::DisallowFrontend(frontend) => {
                write!(f, "remove frontend {frontend} from the guard")
            }
            Self::RemoveExternal(frontend) => {
                write!(f, "remove external frontend {frontend} from the filter")
            }
            Self::AddExternal(frontend) => {
                write!(f, "add external frontend {frontend} to the filter")
            }
            Self::AddPreserved(frontend) => {
                write!(
                    f,
                    "add {frontend} to the filter's frontends that preserve the client"
                )
            }
            Self::RemovePreserved(frontend) => {
                write!(
                    f,
                    "remove {frontend} from the filter's frontends that preserve the client"
                )
            }
            Self::AddHairpin(ip) => write!(f, "add hairpin address {ip} to the filter"),
            Self::RemoveHairpin(ip) => write!(f, "remove hairpin address {ip} from the filter"),
            Self::UnbindVip(ip) => write!(f, "unbind VIP {ip}"),
            Self::UnguardVip(ip) => write!(f, "unguard VIP {ip}"),
            Self::GuardVip(ip) => write!(f, "guard VIP {ip}"),
            Self::BindVip(ip) => write!(f, "bind VIP {ip}"),
            Self::AllowFrontend(frontend) => write!(f, "add frontend {frontend} to the guard"),
            Self::AddService(frontend, scheduling) => {
                write!(
                    f,
                    "add virtual service {frontend} ({})",
                    scheduling.scheduler
                )
            }
            Self::UpdateService(frontend, scheduling) => {
                write!(
                    f,
                    "update virtual service {frontend} ({})",
                    scheduling.scheduler
                )
            }
            Self::AddServer(frontend, backend, weight) => {
                write!(f, "add real server {backend} weight {weight} to {frontend}")
            }
            Self::UpdateServer(frontend, backend, weight) => {
                write!(
                    f,
                    "set weight {weight} of real server {backend} of {frontend}"
                )
            }
            Self::RemoveServer(frontend, backend) => {
                write!(f, "remove real server {backend} from {frontend}")
            }
        }
    }
}
