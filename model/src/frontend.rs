//! What clients call, and where it leads.

use std::collections::BTreeSet;
use std::fmt;

use ipnetwork::IpNetwork;

use crate::endpoints::Backends;
use crate::marks::MarkHolder;
use crate::names::ObjectName;
use crate::service::{Scheduling, VirtualService};

/// What happens to traffic for a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It goes to one of the backends.
    Balance,
    /// It is refused at once: there is no usable endpoint anywhere.
    Reject,
    /// It is dropped: policy Local, and the usable endpoints are on other nodes.
    /// Load balancers go on to one of these.
    Drop,
}

impl Action {
    /// The word for it: `balance`, `reject`, `drop`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Balance => "balance",
            Self::Reject => "reject",
            Self::Drop => "drop",
        }
    }
}

/// Where the address of a frontend comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FrontendKind {
    /// `spec.clusterIPs`.
    ClusterIP,
    /// `ports[].nodePort` at an address of this node.
    NodePort,
    /// `spec.externalIPs`.
    ExternalIP,
    /// `status.loadBalancer.ingress[].ip`.
    LoadBalancer,
    /// A pod's host port at an address of this node.
    HostPort,
}

impl FrontendKind {
    /// Where a Service, or a runtime for a pod, asks for it.
    #[must_use]
    pub fn field(self) -> &'static str {
        match self {
            Self::ClusterIP => "spec.clusterIPs",
            Self::NodePort => "spec.ports[].nodePort",
            Self::ExternalIP => "spec.externalIPs",
            Self::LoadBalancer => "status.loadBalancer.ingress[].ip",
            Self::HostPort => "runtimeConfig.portMappings[].hostPort",
        }
    }

    /// Whether clients beyond the cluster call it.
    #[must_use]
    pub fn is_external(self) -> bool {
        match self {
            Self::ClusterIP => false,
            Self::NodePort | Self::ExternalIP | Self::LoadBalancer | Self::HostPort => true,
        }
    }
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::ExternalIP => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
            Self::HostPort => "HostPort",
        })
    }
}

/// One service port at one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontend {
    /// Where the address comes from.
    pub kind: FrontendKind,
    /// Whether its address is bound to this node for it, and guarded. One that a device
    /// of the node has is not: its other ports are the node's.
    pub is_vip: bool,
    /// The Service that holds the address; of a host port, the pod.
    pub holder: ObjectName,
    /// Name of the service port, empty if it has none.
    pub port_name: String,
    /// How connections are spread.
    pub scheduling: Scheduling,
    /// Backends.
    pub backends: Backends,
    /// What happens where there are none.
    pub empty: Action,
    /// Whether its backends see the client's own address although it is beyond
    /// the node: they are on this node, so their answers come back through it.
    pub preserves_client: bool,
    /// Who may call; empty admits everyone.
    pub source_ranges: BTreeSet<IpNetwork>,
    /// How clients within the cluster (pods, and this node itself) fare, where they
    /// fare otherwise.
    pub internal: Option<Internal>,
}

/// How clients within the cluster fare at a frontend whose policy is Local.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Internal {
    /// The service port, to which the mark belongs.
    pub holder: MarkHolder,
    /// How connections are spread.
    pub scheduling: Scheduling,
    /// Session affinity that was asked for, in seconds. IPVS has none for services by
    /// mark where ports are translated, so the scheduler gives it: a hash of the client.
    pub affinity: Option<u32>,
    /// Backends, of all nodes; never empty.
    pub backends: Backends,
}

impl Internal {
    /// The virtual service that balances it.
    #[must_use]
    pub fn virtual_service(&self) -> VirtualService {
        virtual_service(&self.scheduling, &self.backends)
    }
}

fn virtual_service(scheduling: &Scheduling, backends: &Backends) -> VirtualService {
    let servers = backends.iter();
    VirtualService {
        scheduling: scheduling.clone(),
        servers: servers
            .map(|(addr, backend)| (*addr, backend.weight))
            .collect(),
    }
}

impl Frontend {
    /// Its holder in words, such as `Service default/web`.
    #[must_use]
    pub fn object(&self) -> String {
        let kind = match self.kind {
            FrontendKind::ClusterIP
            | FrontendKind::NodePort
            | FrontendKind::ExternalIP
            | FrontendKind::LoadBalancer => "Service",
            FrontendKind::HostPort => "pod",
        };
        format!("{kind} {}", self.holder)
    }

    /// What happens to its traffic.
    #[must_use]
    pub fn action(&self) -> Action {
        if self.backends.is_empty() {
            self.empty
        } else {
            Action::Balance
        }
    }

    /// The virtual service that balances it. A frontend without backends has none:
    /// the guard refuses or drops at once, while an empty virtual service refuses
    /// late on IPv6 and with a line in the kernel's log each time.
    #[must_use]
    pub fn virtual_service(&self) -> Option<VirtualService> {
        match self.action() {
            Action::Reject | Action::Drop => None,
            Action::Balance => Some(virtual_service(&self.scheduling, &self.backends)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plans and `status` have these words; scripts compare them.
    #[test]
    fn words_do_not_change() {
        let actions = [Action::Balance, Action::Reject, Action::Drop];
        assert_eq!(actions.map(Action::name), ["balance", "reject", "drop"]);
        let kinds = [
            FrontendKind::ClusterIP,
            FrontendKind::NodePort,
            FrontendKind::ExternalIP,
            FrontendKind::LoadBalancer,
            FrontendKind::HostPort,
        ];
        let words = kinds.map(|kind| format!("{kind} {}", kind.field()));
        assert_eq!(
            words,
            [
                "ClusterIP spec.clusterIPs",
                "NodePort spec.ports[].nodePort",
                "ExternalIP spec.externalIPs",
                "LoadBalancer status.loadBalancer.ingress[].ip",
                "HostPort runtimeConfig.portMappings[].hostPort",
            ]
        );
    }
}
