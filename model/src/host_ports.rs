//! Host ports: ports of this node that lead to one pod.
//!
//! A runtime asks for them when it adds a pod (the CNI capability
//! `portMappings`), so they are facts of the node's leases and not of the
//! cluster. Each becomes a frontend at every address of the node that it names,
//! with one backend. A host port holds its key against Services, as with
//! kube-proxy, where the `portmap` plugin takes a packet before IPVS sees it;
//! which of two pods gets a key is decided before it is told here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::address::{AddressError, BackendAddr, Family, FrontendAddr, Protocol, parse_address};
use crate::desired::{Action, Desired, Frontend, FrontendKind, Scope};
use crate::endpoints::{Backend, BackendState};
use crate::names::{Attachment, ObjectName};
use crate::network::NodeFacts;
use crate::service::Scheduling;

/// Most host ports that one attachment can have.
pub const MAX_HOST_PORTS: usize = 256;

/// One port of the node that leads to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPort {
    /// The node's address that serves it. Absent: every address; `0.0.0.0` and
    /// `::`: every one of that family.
    #[serde(default, rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The port that clients call.
    pub host_port: u16,
    /// The port of the pod.
    pub container_port: u16,
    /// Transport protocol.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Why a host port cannot be had, whatever else there is. Each names the field
/// as the runtime's configuration has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostPortError {
    /// Port 0 is none.
    #[error("hostPort is 0; give a number from 1 to 65535")]
    NoHostPort,
    /// Port 0 is none.
    #[error("containerPort is 0; give a number from 1 to 65535")]
    NoContainerPort,
    /// IPVS never serves it.
    #[error(
        "hostIP is {0}, a loopback address, which this version does not serve; leave hostIP out or name an address of the node"
    )]
    Loopback(IpAddr),
    /// No address of a node that others can call.
    #[error("hostIP is {ip}, which {problem}; leave hostIP out or name an address of the node")]
    HostIp {
        /// The address.
        ip: IpAddr,
        /// What is wrong with it.
        problem: AddressError,
    },
}

impl HostPortError {
    /// Whether the mapping makes sense and only this version lacks it.
    #[must_use]
    pub fn is_unsupported(self) -> bool {
        match self {
            Self::Loopback(_) => true,
            Self::NoHostPort | Self::NoContainerPort | Self::HostIp { .. } => false,
        }
    }
}

/// Why a list of host ports cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostPortsError {
    /// Each takes memory, disk and kernel.
    #[error("portMappings has {0} entries, more than {MAX_HOST_PORTS}; map fewer ports")]
    TooMany(usize),
    /// One of them.
    #[error("portMappings[{index}].{fault}")]
    One {
        /// Its place in the list.
        index: usize,
        /// What is wrong with it.
        fault: HostPortError,
    },
    /// Two of them ask for the same.
    #[error(
        "portMappings[{index}].hostPort is {port}/{protocol}, which portMappings[{earlier}] has already; remove one of the two"
    )]
    Twice {
        /// Place of the later one.
        index: usize,
        /// Place of the earlier one.
        earlier: usize,
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
    },
}

impl HostPort {
    /// Whether it can be had at all.
    ///
    /// # Errors
    /// [`HostPortError`].
    pub fn check(&self) -> Result<(), HostPortError> {
        if self.host_port == 0 {
            return Err(HostPortError::NoHostPort);
        }
        if self.container_port == 0 {
            return Err(HostPortError::NoContainerPort);
        }
        match self.host_ip {
            None => Ok(()),
            Some(ip) if ip.is_unspecified() => Ok(()),
            Some(ip) if ip.is_loopback() => Err(HostPortError::Loopback(ip)),
            Some(ip) => parse_address(&ip.to_string())
                .map(drop)
                .map_err(|problem| HostPortError::HostIp { ip, problem }),
        }
    }

    /// Whether it is served at this address of the node.
    #[must_use]
    pub fn is_at(&self, ip: IpAddr) -> bool {
        match self.host_ip {
            None => true,
            Some(host) if host.is_unspecified() => Family::of(host) == Family::of(ip),
            Some(host) => host == ip,
        }
    }

    /// Whether some address could serve both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let addresses = match (self.host_ip, other.host_ip) {
            (None, _) | (_, None) => true,
            (Some(ip), Some(_)) if !ip.is_unspecified() => other.is_at(ip),
            (Some(_), Some(ip)) if !ip.is_unspecified() => self.is_at(ip),
            (Some(a), Some(b)) => a == b,
        };
        addresses && self.host_port == other.host_port && self.protocol == other.protocol
    }
}

/// Whether a list of host ports can be had, whatever others have.
///
/// # Errors
/// The first fault.
pub fn check(ports: &[HostPort]) -> Result<(), HostPortsError> {
    if ports.len() > MAX_HOST_PORTS {
        return Err(HostPortsError::TooMany(ports.len()));
    }
    for (index, port) in ports.iter().enumerate() {
        port.check()
            .map_err(|fault| HostPortsError::One { index, fault })?;
        let mut before = ports.iter().take(index);
        if let Some(earlier) = before.position(|other| other.overlaps(port)) {
            return Err(HostPortsError::Twice {
                index,
                earlier,
                port: port.host_port,
                protocol: port.protocol,
            });
        }
    }
    Ok(())
}

/// The host ports of one attachment, and where they lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPorts {
    /// The pod, for people.
    pub pod: ObjectName,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its host ports.
    pub ports: Vec<HostPort>,
}

impl PodPorts {
    /// The frontends at the node's addresses: of host ports all of them count,
    /// for `nodePortAddresses` is about Services.
    pub(crate) fn frontends(&self, facts: &NodeFacts) -> BTreeMap<FrontendAddr, Frontend> {
        let mut frontends = BTreeMap::new();
        for port in &self.ports {
            frontends.extend(self.frontends_of(port, facts));
        }
        frontends
    }

    /// A family that the pod has no address of has no frontend.
    fn frontends_of(
        &self,
        port: &HostPort,
        facts: &NodeFacts,
    ) -> impl Iterator<Item = (FrontendAddr, Frontend)> {
        let own = facts.own.iter().filter(|ip| port.is_at(**ip));
        own.filter_map(|ip| {
            let mut addresses = self.addresses.iter();
            let pod = addresses.find(|pod| Family::of(**pod) == Family::of(*ip))?;
            let backend = BackendAddr::new(*pod, port.container_port);
            let here = Backend {
                state: BackendState::Ready,
                local: true,
                weight: 1,
            };
            let frontend = Frontend {
                kind: FrontendKind::HostPort,
                holder: self.pod.clone(),
                port_name: String::new(),
                scheduling: Scheduling::default(),
                backends: BTreeMap::from([(backend, here)]),
                empty: Action::Reject,
                is_vip: false,
                preserves_client: true,
                source_ranges: BTreeSet::new(),
                internal: None,
            };
            let addr = FrontendAddr::new(*ip, port.host_port, port.protocol);
            Some((addr, frontend))
        })
    }

    /// The first of its ports that no address of the node serves.
    pub(crate) fn nowhere(&self, facts: &NodeFacts) -> Option<HostPort> {
        let mut ports = self.ports.iter();
        let nowhere = |port: &&HostPort| self.frontends_of(port, facts).next().is_none();
        ports.find(nowhere).copied()
    }
}

/// Why the host ports of a pod to be cannot be served on this node now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// A Service has the node port.
    #[error(
        "host port {}/{} is the node port of Service {service} at {}, or that of its health check; give the pod another hostPort, or the Service another nodePort",
        .addr.port, .addr.protocol, .addr.ip
    )]
    Taken {
        /// Where.
        addr: FrontendAddr,
        /// The Service.
        service: ObjectName,
    },
    /// The address may come, or the pod get one of that family.
    #[error(
        "host port {}/{}: {}; name an address that the node and the pod have the family of, or leave hostIP out",
        .0.host_port, .0.protocol, nowhere_words(.0)
    )]
    Nowhere(HostPort),
}

fn nowhere_words(port: &HostPort) -> String {
    match port.host_ip {
        None => "node and pod have no address of the same family".to_owned(),
        Some(ip) if ip.is_unspecified() => {
            let family = Family::of(ip);
            format!("hostIP is {ip}, and node or pod has no {family} address")
        }
        Some(ip) => {
            let family = Family::of(ip);
            format!("hostIP {ip} is no address of this node, or the pod has no {family} address")
        }
    }
}

/// Every host port of this node, as frontends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostPorts {
    pods: BTreeMap<Attachment, (PodPorts, BTreeMap<FrontendAddr, Frontend>)>,
    /// Who asks for each key; the first has it, so that the order does not
    /// matter in which two were told that should never have been given.
    claims: BTreeMap<FrontendAddr, BTreeSet<Attachment>>,
}

/// What changed for one attachment.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Keys whose frontend may differ.
    pub(crate) keys: BTreeSet<FrontendAddr>,
    /// Addresses of pods that had host ports.
    pub(crate) before: BTreeSet<IpAddr>,
    /// Addresses of pods that have host ports now.
    pub(crate) after: BTreeSet<IpAddr>,
}

impl HostPorts {
    /// Takes in what an attachment has now; `None` is nothing.
    pub(crate) fn set(
        &mut self,
        facts: &NodeFacts,
        attachment: &Attachment,
        ports: Option<PodPorts>,
    ) -> Moved {
        let mut moved = Moved::default();
        let before = self.pods.remove(attachment);
        let before = before.map(|(_, frontends)| frontends).unwrap_or_default();
        let after = ports
            .as_ref()
            .map(|ports| ports.frontends(facts))
            .unwrap_or_default();
        moved.before = backends(&before);
        moved.after = backends(&after);
        for addr in before.keys().filter(|addr| !after.contains_key(addr)) {
            if let Some(claims) = self.claims.get_mut(addr) {
                claims.remove(attachment);
                if claims.is_empty() {
                    self.claims.remove(addr);
                }
            }
            moved.keys.insert(*addr);
        }
        for (addr, frontend) in &after {
            if before.get(addr) != Some(frontend) {
                moved.keys.insert(*addr);
            }
            let claims = self.claims.entry(*addr).or_default();
            claims.insert(attachment.clone());
        }
        if let Some(ports) = ports {
            self.pods.insert(attachment.clone(), (ports, after));
        }
        moved
    }

    /// Computes everything anew for other addresses of the node.
    pub(crate) fn set_facts(&mut self, facts: &NodeFacts) -> Vec<Moved> {
        let all: Vec<Attachment> = self.pods.keys().cloned().collect();
        all.iter()
            .filter_map(|attachment| {
                let (ports, _) = self.pods.get(attachment)?;
                let ports = Some(ports.clone());
                Some(self.set(facts, attachment, ports))
            })
            .collect()
    }

    /// What an attachment has.
    pub(crate) fn of(&self, attachment: &Attachment) -> Option<&PodPorts> {
        self.pods.get(attachment).map(|(ports, _)| ports)
    }

    /// The keys that an attachment asks for.
    pub(crate) fn keys_of(&self, attachment: &Attachment) -> impl Iterator<Item = FrontendAddr> {
        let frontends = self.pods.get(attachment).map(|(_, frontends)| frontends);
        frontends.into_iter().flat_map(|f| f.keys().copied())
    }

    /// The frontend with this key.
    pub(crate) fn frontend(&self, addr: &FrontendAddr) -> Option<&Frontend> {
        self.pods.get(self.holder(addr)?)?.1.get(addr)
    }

    /// Who has this key.
    pub(crate) fn holder(&self, addr: &FrontendAddr) -> Option<&Attachment> {
        self.claims.get(addr)?.first()
    }

    /// Every key, in order.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &FrontendAddr> {
        self.claims.keys()
    }
}

fn backends(frontends: &BTreeMap<FrontendAddr, Frontend>) -> BTreeSet<IpAddr> {
    let all = frontends.values().flat_map(|f| f.backends.keys());
    all.map(|backend| backend.ip).collect()
}

impl Desired {
    /// Takes in the host ports of an attachment; `None` is none. Returns what may
    /// have changed by it.
    pub fn set_host_ports(&mut self, attachment: &Attachment, ports: Option<PodPorts>) -> Scope {
        let mut scope = Scope::default();
        if ports.is_none() {
            // Nobody is left behind what it has.
            for addr in self.host_ports.keys_of(attachment) {
                let frontend = self.host_ports.frontend(&addr);
                let backends = frontend.into_iter().flat_map(|f| f.backends.keys());
                scope
                    .ended
                    .extend(backends.map(|backend| (addr.into(), *backend)));
            }
        }
        let moved = self.host_ports.set(&self.facts, attachment, ports);
        self.note_moved(&moved, &mut scope);
        scope
    }

    /// Computes host ports anew for other addresses of the node.
    pub(crate) fn move_host_ports(&mut self) -> Scope {
        let mut scope = Scope::default();
        for moved in self.host_ports.set_facts(&self.facts) {
            self.note_moved(&moved, &mut scope);
        }
        scope
    }

    fn note_moved(&mut self, moved: &Moved, scope: &mut Scope) {
        for addr in &moved.keys {
            scope.insert(*addr);
        }
        self.count_hairpins(&moved.before, &moved.after, scope);
        self.note_claimed_marks(scope);
    }

    /// Whether the host ports of a pod to be can be served at the node's
    /// addresses. Other pods' host ports are not looked at.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub fn claim_host_ports(&self, ports: &PodPorts) -> Result<(), ClaimError> {
        for addr in ports.frontends(&self.facts).into_keys() {
            if let Some(service) = self.service_at(&addr) {
                let service = service.clone();
                return Err(ClaimError::Taken { addr, service });
            }
        }
        match ports.nowhere(&self.facts) {
            Some(port) => Err(ClaimError::Nowhere(port)),
            None => Ok(()),
        }
    }

    /// The host ports of an attachment.
    #[must_use]
    pub fn host_ports_of(&self, attachment: &Attachment) -> Option<&PodPorts> {
        self.host_ports.of(attachment)
    }

    /// Where the host ports of an attachment are served.
    pub fn host_port_keys(&self, attachment: &Attachment) -> impl Iterator<Item = FrontendAddr> {
        self.host_ports.keys_of(attachment)
    }

    /// Whose host port this key is, if it is one.
    #[must_use]
    pub fn host_port_holder(&self, addr: &FrontendAddr) -> Option<&Attachment> {
        self.host_ports.holder(addr)
    }

    /// Every host port, in the order of addresses.
    pub fn host_ports(&self) -> impl Iterator<Item = (FrontendAddr, &Frontend)> {
        let keys = self.host_ports.keys();
        keys.filter_map(|addr| Some((*addr, self.host_ports.frontend(addr)?)))
    }
}
