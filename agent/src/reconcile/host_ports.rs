//! Host ports of pods, as the reconciler sees them.
//!
//! They are facts as Services are, and come from the leases. Those of a pod that
//! is being added are accepted here or refused: a node port that a Service has is
//! not taken from it. Once accepted they hold their keys, also against a Service
//! that comes later and after a restart. Who adds the pod hears from here when
//! the kernel has them.

use ferrule_datapath::local_ports::may_be_chosen;
use ferrule_model::address::FrontendAddr;
use ferrule_model::change::Change;
use ferrule_model::host_ports::{ClaimError, PodPorts};
use ferrule_model::names::Attachment;
use tokio::sync::oneshot;
use tracing::warn;

use super::Reconciler;
use super::faults::About;

/// The answer to who waits for host ports.
pub(super) type Reply = oneshot::Sender<Result<(), PortsFault>>;

/// Why a pod cannot have its host ports.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PortsFault {
    /// A Service has one, or there is no address for one.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// The kernel does not take them.
    #[error("the pod's host ports are not in the kernel: {0}")]
    Kernel(String),
    /// Its lease was ended meanwhile.
    #[error("the lease ended while its host ports were being made; ask again")]
    Gone,
}

/// One who waits until the kernel has a pod's host ports.
#[derive(Debug)]
pub(super) struct Waiting {
    attachment: Attachment,
    reply: Reply,
}

impl Reconciler {
    /// Takes in what changed among the leases; the kernel is not touched.
    pub(super) fn take_host_ports(&mut self) {
        for (attachment, ports) in self.pods.leases().changed_host_ports() {
            // While not everything is known, nothing is removed for want of an
            // object; but that these keys are no host ports of it any more is known.
            if !self.knows_all() {
                let before = self.view.desired().host_port_keys(&attachment);
                self.freed.extend(before);
            }
            self.dirty
                .merge(self.view.set_host_ports(&attachment, ports));
        }
    }

    /// Accepts or refuses the host ports of a pod that is being added.
    pub(super) fn claim_host_ports(&mut self, attachment: Attachment, reply: Reply) {
        // What others have released is free by now.
        self.take_host_ports();
        if let Err(fault) = self.accept_host_ports(&attachment) {
            // Who asked may have given up meanwhile.
            let _gave_up = reply.send(Err(fault));
            return;
        }
        self.take_host_ports();
        self.waiting_pods.push(Waiting { attachment, reply });
    }

    fn accept_host_ports(&mut self, attachment: &Attachment) -> Result<(), PortsFault> {
        let leases = self.pods.leases();
        let ports = leases.host_ports(attachment).ok_or(PortsFault::Gone)?;
        // An ADD that is asked for again finds them accepted.
        if self.view.desired().host_ports_of(attachment) == Some(&ports) {
            return Ok(());
        }
        self.view.desired().claim_host_ports(&ports)?;
        if leases.accept_host_ports(attachment) {
            self.warn_of_chosen_ports(&ports);
            Ok(())
        } else {
            Err(PortsFault::Gone)
        }
    }

    fn warn_of_chosen_ports(&self, ports: &PodPorts) {
        let root = &self.settings.sysctls.root;
        for port in &ports.ports {
            if may_be_chosen(root, port.host_port) {
                warn!(
                    pod = %ports.pod,
                    port = port.host_port,
                    "a host port within net.ipv4.ip_local_port_range: an answer to a process of the \
                     node that calls from it goes to the pod; add it to \
                     net.ipv4.ip_local_reserved_ports, or give the pod another"
                );
            }
        }
    }

    /// Tells those who wait what has become of their ports, if anything has.
    pub(super) fn answer_waiting_pods(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting_pods);
        // Who has given up is not kept.
        waiting.retain(|one| !one.reply.is_closed());
        for one in waiting {
            match self.fate(&one.attachment) {
                Some(fate) => {
                    let _gave_up = one.reply.send(fate);
                }
                None => self.waiting_pods.push(one),
            }
        }
    }

    fn fate(&self, attachment: &Attachment) -> Option<Result<(), PortsFault>> {
        let desired = self.view.desired();
        if desired.host_ports_of(attachment).is_none() {
            return Some(Err(PortsFault::Gone));
        }
        let mut served = self.observed.is_some();
        for addr in desired.host_port_keys(attachment) {
            if let Some(words) = self.faults.words(About::Frontend(addr)) {
                return Some(Err(PortsFault::Kernel(words)));
            }
            let is_its = desired.host_port_holder(&addr) == Some(attachment);
            served &= is_its && self.is_served(&addr);
        }
        if served {
            return Some(Ok(()));
        }
        let words = self.faults.words(About::Kernel)?;
        Some(Err(PortsFault::Kernel(words)))
    }

    fn is_served(&self, addr: &FrontendAddr) -> bool {
        let frontend = self.view.desired().frontend(addr);
        let (Some(frontend), Some(observed)) = (frontend, &self.observed) else {
            return false;
        };
        observed.external.contains(addr)
            && observed.preserved.contains(addr)
            && observed.serves(&(*addr).into(), frontend.virtual_service().as_ref())
    }

    /// Whether it is known, although not everything is, that what the change
    /// removes is not wanted: the leases say all about host ports.
    pub(super) fn is_certain(&self, change: &Change) -> bool {
        change.frontend().is_some_and(|addr| {
            self.freed.contains(&addr) || self.view.desired().host_port_holder(&addr).is_some()
        })
    }
}
