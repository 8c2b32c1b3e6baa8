//! What clients call, and where it leads.

use std::collections::BTreeMap;
use std::fmt;

use crate::address::BackendAddr;
use crate::endpoints::Backend;
use crate::names::ObjectName;
use crate::service::{Scheduling, VirtualService};

/// Weight of every real server.
const WEIGHT: u32 = 1;

/// What happens to traffic for a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It goes to one of the backends.
    Balance,
    /// It is refused at once: there is no usable endpoint anywhere.
    Reject,
}

/// Where the address of a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIP,
    /// `ports[].nodePort` at an address of this node.
    NodePort,
    /// A pod's host port at an address of this node.
    HostPort,
}

impl FrontendKind {
    /// Whether its address is bound to this node for it, and guarded.
    #[must_use]
    pub fn is_vip(self) -> bool {
        match self {
            Self::ClusterIP => true,
            Self::NodePort | Self::HostPort => false,
        }
    }

    /// Where a Service, or a runtime for a pod, asks for it.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::ClusterIP => "spec.clusterIPs",
            Self::NodePort => "spec.ports[].nodePort",
            Self::HostPort => "runtimeConfig.portMappings[].hostPort",
        }
    }

    /// Whether clients beyond the cluster call it.
    #[must_use]
    pub fn is_external(self) -> bool {
        match self {
            Self::ClusterIP => false,
            Self::NodePort | Self::HostPort => true,
        }
    }

    /// Whether its backends see the client's own address although it is beyond
    /// the node: they are on this node, so their answers come back through it.
    #[must_use]
    pub fn preserves_client(self) -> bool {
        match self {
            Self::ClusterIP | Self::NodePort => false,
            Self::HostPort => true,
        }
    }
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::HostPort => "HostPort",
        })
    }
}

/// One service port at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Where the address comes from.
    pub kind: FrontendKind,
    /// The Service that holds the address; of a host port, the pod.
    pub holder: ObjectName,
    /// Name of the service port, empty if it has none.
    pub port_name: String,
    /// How connections are spread.
    pub scheduling: Scheduling,
    /// Backends; empty means [`Action::Reject`].
    pub backends: BTreeMap<BackendAddr, Backend>,
}

impl Frontend {
    /// Its holder in words, such as `Service default/web`.
    #[must_use]
    pub fn object(&self) -> String {
        let kind = match self.kind {
            FrontendKind::ClusterIP | FrontendKind::NodePort => "Service",
            FrontendKind::HostPort => "pod",
        };
        format!("{kind} {}", self.holder)
    }

    /// What happens to its traffic.
    #[must_use]
    pub fn action(&self) -> Action {
        if self.backends.is_empty() {
            Action::Reject
        } else {
            Action::Balance
        }
    }

    /// The virtual service that balances it. A frontend that rejects has none:
    /// the guard refuses at once, while an empty virtual service refuses late
    /// on IPv6 and with a line in the kernel's log each time.
    #[must_use]
    pub fn virtual_service(&self) -> Option<VirtualService> {
        match self.action() {
            Action::Reject => None,
            Action::Balance => Some(VirtualService {
                scheduling: self.scheduling.clone(),
                servers: self.backends.keys().map(|addr| (*addr, WEIGHT)).collect(),
            }),
        }
    }
}
