//! Host ports of this node's pods: who has which, and the ADD that asks for them.
//!
//! [`Table`] stands beside the leases, under their lock, so that of two pods that
//! ask for one port at the same time one gets it. What is in it is on disk with
//! the lease. The reconciler takes changes of it as it takes facts from a source,
//! and it alone decides against Services, for it alone knows these: until it has
//! [accepted](Table::accept) the ports of a pod, they are held and not served.
//! [`allocate`] waits for that, and for the kernel; a new lease whose ports cannot be
//! had is ended before the answer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ferrule_api::{Allocation, Answer, Call, CallError, ErrorCode, PodName, Wanted};
use ferrule_model::address::Protocol;
use ferrule_model::host_ports::{self, HostPort, HostPortsError, PodPorts};
use ferrule_model::names::{Attachment, ObjectName};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::pods::Pods;
use crate::reconcile::{Asker, PortsFault};

/// Another pod has a port that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "host port {port}/{protocol} is held by pod {pod} (container {container}); give one of the two another hostPort or hostIP"
)]
pub(crate) struct Taken {
    port: u16,
    protocol: Protocol,
    pod: ObjectName,
    container: String,
}

/// The host ports of every lease.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pods: BTreeMap<Attachment, Entry>,
    /// Whose ports came, went or were accepted since the reconciler looked.
    changed: BTreeSet<Attachment>,
    news: Arc<Notify>,
}

#[derive(Debug)]
struct Entry {
    ports: PodPorts,
    accepted: bool,
}

impl Table {
    /// Tells of changes. Nothing is lost when nobody waits at the moment.
    pub(crate) fn news(&self) -> Arc<Notify> {
        Arc::clone(&self.news)
    }

    /// The ports of an attachment, served or not.
    pub(crate) fn ports_of(&self, attachment: &Attachment) -> &[HostPort] {
        let entry = self.pods.get(attachment);
        entry.map_or(&[], |entry| &entry.ports.ports)
    }

    /// The ports of an attachment with where they lead, served or not.
    pub(crate) fn of(&self, attachment: &Attachment) -> Option<&PodPorts> {
        self.pods.get(attachment).map(|entry| &entry.ports)
    }

    /// Whether no other pod has one of these ports.
    ///
    /// # Errors
    /// Who has which.
    pub(crate) fn are_free(
        &self,
        attachment: &Attachment,
        wanted: &[HostPort],
    ) -> Result<(), Taken> {
        let others = self.pods.iter().filter(|(other, _)| *other != attachment);
        for (other, entry) in others {
            for port in wanted {
                if entry.ports.ports.iter().any(|held| held.overlaps(port)) {
                    return Err(Taken {
                        port: port.host_port,
                        protocol: port.protocol,
                        pod: entry.ports.pod.clone(),
                        container: other.container_id.to_string(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Puts in the ports of a new lease. `accepted` are those that were served
    /// in an earlier life of the agent.
    pub(crate) fn insert(&mut self, attachment: &Attachment, ports: PodPorts, accepted: bool) {
        if ports.ports.is_empty() {
            return;
        }
        let entry = Entry { ports, accepted };
        self.pods.insert(attachment.clone(), entry);
        if accepted {
            self.note(attachment);
        }
    }

    /// What is on disk takes the place of what was believed, at the start and after
    /// the disk failed a write. What comes of it was served in an earlier life.
    pub(crate) fn become_these(&mut self, stored: Vec<(Attachment, PodPorts)>) {
        let stored: BTreeMap<Attachment, PodPorts> = stored.into_iter().collect();
        let gone: Vec<Attachment> = self
            .pods
            .keys()
            .filter(|attachment| !stored.contains_key(attachment))
            .cloned()
            .collect();
        for attachment in gone {
            self.remove(&attachment);
        }
        for (attachment, ports) in stored {
            if self.of(&attachment) != Some(&ports) {
                self.insert(&attachment, ports, true);
            }
        }
    }

    /// They are to be served from now on. False when the lease has ended meanwhile.
    pub(crate) fn accept(&mut self, attachment: &Attachment) -> bool {
        let Some(entry) = self.pods.get_mut(attachment) else {
            return false;
        };
        entry.accepted = true;
        self.note(attachment);
        true
    }

    /// The lease has ended.
    pub(crate) fn remove(&mut self, attachment: &Attachment) {
        if self.pods.remove(attachment).is_some_and(|e| e.accepted) {
            self.note(attachment);
        }
    }

    fn note(&mut self, attachment: &Attachment) {
        self.changed.insert(attachment.clone());
        self.news.notify_one();
    }

    /// What is to be served of those whose ports changed; `None` is nothing.
    pub(crate) fn take_changed(&mut self) -> Vec<(Attachment, Option<PodPorts>)> {
        let changed = std::mem::take(&mut self.changed);
        let now = |attachment: Attachment| {
            let entry = self.pods.get(&attachment).filter(|entry| entry.accepted);
            let ports = entry.map(|entry| entry.ports.clone());
            (attachment, ports)
        };
        changed.into_iter().map(now).collect()
    }
}

/// What people call a pod; its container where the runtime did not tell.
pub(crate) fn pod_name(attachment: &Attachment, pod: Option<&PodName>) -> ObjectName {
    match pod {
        Some(pod) => ObjectName::new(&pod.namespace, &pod.name),
        None => ObjectName::new("container", attachment.container_id.as_str()),
    }
}

/// Answers an `allocate` with host ports: when the answer says that they are
/// there, they are in the kernel. In every other case nothing is leased that was not before.
pub(crate) async fn allocate(pods: &Arc<Pods>, asker: &Asker, mut wanted: Box<Wanted>) -> Answer {
    if let Err(error) = host_ports::check(&wanted.ports) {
        return Answer::Error(bad_ports(&error));
    }
    // Which conflict is told must not depend on the order in which a runtime tells them.
    wanted.ports.sort_unstable();
    let (attachment, ports) = (wanted.attachment.clone(), wanted.ports.len());
    let answer = Arc::clone(pods).call(Call::Allocate(wanted)).await;
    let Answer::Allocated(Allocation { renewed, .. }) = answer else {
        return answer;
    };
    let error = match asker.host_ports(attachment.clone()).await {
        Some(Ok(())) => {
            info!(container_id = %attachment.container_id, ports, "host ports served");
            return answer;
        }
        Some(Err(fault)) => CallError {
            code: fault.code(),
            message: fault.to_string(),
        },
        None => CallError {
            code: ErrorCode::NotReady,
            message: "the agent has not brought the pod's host ports into the kernel in time; ask again, and see `ferrule-agent status`".to_owned(),
        },
    };
    if renewed {
        // Its pod may live.
        info!(container_id = %attachment.container_id, error = error.message, "no host ports; the lease is older and stays");
        return Answer::Error(error);
    }
    info!(container_id = %attachment.container_id, error = error.message, "no host ports, so no lease");
    let release = Call::Release {
        attachment: attachment.clone(),
    };
    if let Answer::Error(left) = Arc::clone(pods).call(release).await {
        // The DEL that follows a failed ADD ends it.
        warn!(container_id = %attachment.container_id, error = left.message, "the lease stays until its pod is removed");
    }
    Answer::Error(error)
}

fn bad_ports(error: &HostPortsError) -> CallError {
    let code = match error {
        HostPortsError::One { fault, .. } if fault.is_unsupported() => ErrorCode::Unsupported,
        HostPortsError::One { .. } | HostPortsError::TooMany(_) | HostPortsError::Twice { .. } => {
            ErrorCode::BadRequest
        }
    };
    CallError {
        code,
        message: format!("runtimeConfig.{error}"),
    }
}

impl PortsFault {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Claim(host_ports::ClaimError::Taken { .. }) => ErrorCode::PortTaken,
            // The address or the kernel may come.
            Self::Claim(host_ports::ClaimError::Nowhere(_)) | Self::Kernel(_) | Self::Gone => {
                ErrorCode::NotReady
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::{ContainerId, IfName};

    use super::*;

    fn attachment(name: &str) -> Attachment {
        Attachment {
            container_id: ContainerId::try_from(name.to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        }
    }

    fn port(host_ip: &str, number: u16, protocol: Protocol) -> HostPort {
        HostPort {
            host_ip: host_ip.parse().ok(),
            host_port: number,
            container_port: 80,
            protocol,
        }
    }

    fn pod(name: &str, ports: &[HostPort]) -> PodPorts {
        PodPorts {
            pod: ObjectName::new("default", name),
            addresses: vec!["10.1.0.2".parse().unwrap()],
            ports: ports.to_vec(),
        }
    }

    #[test]
    fn a_port_has_one_holder_at_each_address() {
        let mut table = Table::default();
        let held = port("192.0.2.1", 80, Protocol::Tcp);
        table.insert(&attachment("a"), pod("a", &[held]), false);
        let free = |table: &Table, who: &str, wanted| table.are_free(&attachment(who), &[wanted]);
        for wanted in [
            held,
            port("", 80, Protocol::Tcp),
            port("0.0.0.0", 80, Protocol::Tcp),
        ] {
            let taken = free(&table, "b", wanted).unwrap_err().to_string();
            assert!(
                taken.contains("80/TCP") && taken.contains("default/a"),
                "{taken}"
            );
            assert_eq!(free(&table, "a", wanted), Ok(()), "its own");
        }
        for wanted in [
            port("192.0.2.2", 80, Protocol::Tcp),
            port("::", 80, Protocol::Tcp),
            port("", 80, Protocol::Udp),
            port("", 81, Protocol::Tcp),
        ] {
            assert_eq!(free(&table, "b", wanted), Ok(()), "{wanted:?}");
        }
        table.remove(&attachment("a"));
        assert_eq!(free(&table, "b", held), Ok(()));
    }

    #[test]
    fn what_was_not_accepted_is_never_served() {
        let mut table = Table::default();
        let ports = pod("a", &[port("", 80, Protocol::Tcp)]);
        let a = attachment("a");
        table.insert(&a, ports.clone(), false);
        assert_eq!(table.take_changed(), []);
        table.remove(&a);
        assert_eq!(table.take_changed(), [], "nobody knew of it");
        assert!(!table.accept(&a), "it has ended");

        table.insert(&a, ports.clone(), false);
        assert!(table.accept(&a));
        assert_eq!(table.take_changed(), [(a.clone(), Some(ports.clone()))]);
        assert_eq!(table.take_changed(), []);
        table.remove(&a);
        assert_eq!(table.take_changed(), [(a.clone(), None)]);
        table.insert(&a, ports.clone(), true);
        assert_eq!(
            table.take_changed(),
            [(a.clone(), Some(ports.clone()))],
            "of an earlier life"
        );

        // The disk says the same, then that it has ended, then that it is back.
        table.become_these(vec![(a.clone(), ports.clone())]);
        assert_eq!(table.take_changed(), []);
        table.become_these(Vec::new());
        assert_eq!(table.take_changed(), [(a.clone(), None)]);
        table.become_these(vec![(a.clone(), ports.clone())]);
        assert_eq!(table.take_changed(), [(a, Some(ports))]);
    }
}
