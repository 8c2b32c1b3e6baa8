//! What the plugin wants from the agent: a lease, and its end.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use ferrule_api::queue::{self, QueueError};
use ferrule_api::{Allocation, Answer, Call, Client, ClientError, ErrorCode, Lease, Wanted};
use ferrule_model::names::{Attachment, ContainerId, IfName, NetworkName};

use crate::config::{Config, MIN_MTU_IPV6};
use crate::failure::{Code, Failure};

/// For ADD. The agent's answer takes a commit to disk, of which hundreds may
/// queue up after a reboot; the kubelet gives up after minutes.
const ALLOCATE_TIMEOUT: Duration = Duration::from_secs(20);

/// For DEL, which has the queue to fall back on and should not hold up the
/// runtime.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// For a part of a list, or a look at all of the node's interfaces.
const LIST_TIMEOUT: Duration = Duration::from_secs(20);

/// For CHECK, which takes a look at one lease.
const LEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// For STATUS, which containerd asks with every poll of the kubelet.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    #[error(
        "{0}: the pod is started again when the ferrule-agent of this node runs; see its pod's status and log"
    )]
    Down(ClientError),
    #[error("asking the agent for an address of {attachment} failed: {source}")]
    Call {
        attachment: Attachment,
        source: ClientError,
    },
    #[error("the agent gives {attachment} no address: {message}")]
    Refused {
        attachment: Attachment,
        code: ErrorCode,
        message: String,
    },
    #[error(
        "the agent's answer for {attachment} makes no sense: {reason}; install plugin and agent of the same release"
    )]
    Nonsense {
        attachment: Attachment,
        reason: String,
        /// Whether the attachment had its lease before it asked.
        renewed: bool,
    },
    #[error(
        "mtu of the network configuration is {mtu}, and {attachment} gets an IPv6 address, which needs at least {MIN_MTU_IPV6}; give a larger one, or leave it out"
    )]
    Mtu {
        attachment: Attachment,
        mtu: u32,
        /// Whether the attachment had its lease before it asked.
        renewed: bool,
    },
    #[error(transparent)]
    Withdraw(#[from] QueueError),
}

impl LeaseError {
    /// Whether the agent may hold a lease that nobody will use. Where no answer came,
    /// that may be an older one, but then no pod lives by it: ADD has looked for one.
    pub(crate) fn may_hold_lease(&self) -> bool {
        match self {
            Self::Down(source) | Self::Call { source, .. } => source.may_have_taken_effect(),
            // A refused call changed nothing.
            Self::Refused { .. } | Self::Withdraw(_) => false,
            Self::Nonsense { renewed, .. } | Self::Mtu { renewed, .. } => !renewed,
        }
    }
}

impl From<LeaseError> for Failure {
    fn from(error: LeaseError) -> Self {
        let code = match &error {
            LeaseError::Down(_)
            | LeaseError::Call {
                source: ClientError::Timeout { .. },
                ..
            }
            | LeaseError::Refused {
                code: ErrorCode::NotReady | ErrorCode::PoolExhausted,
                ..
            } => Code::TryAgainLater,
            LeaseError::Refused {
                code: ErrorCode::AddressTaken | ErrorCode::PortTaken,
                ..
            } => Code::Taken,
            LeaseError::Refused {
                code: ErrorCode::Unsupported,
                ..
            } => Code::UnsupportedField,
            LeaseError::Call { .. }
            | LeaseError::Refused {
                code: ErrorCode::BadRequest | ErrorCode::Disconnected | ErrorCode::Internal,
                ..
            }
            | LeaseError::Nonsense { .. } => Code::Agent,
            LeaseError::Mtu { .. } => Code::InvalidConfiguration,
            LeaseError::Withdraw(_) => Code::Io,
        };
        Self::new(code, error.to_string())
    }
}

/// Leases addresses for an attachment; durable at the agent when this returns.
pub(crate) fn allocate(
    config: &Config,
    wanted: Wanted,
    mtu: Option<u32>,
) -> Result<Allocation, LeaseError> {
    let attachment = &wanted.attachment.clone();
    let named = |source: ClientError| {
        if source.agent_is_down() {
            LeaseError::Down(source)
        } else {
            LeaseError::Call {
                attachment: attachment.clone(),
                source,
            }
        }
    };
    if let Some(mtu) = mtu
        && mtu < MIN_MTU_IPV6
        && wanted.ips.iter().any(IpAddr::is_ipv6)
    {
        // Nothing was asked for.
        return Err(LeaseError::Mtu {
            attachment: attachment.clone(),
            mtu,
            renewed: true,
        });
    }
    // Before anything is leased: a release of an earlier life of this
    // attachment that still waits would end the new lease.
    queue::withdraw(&config.state_dir, attachment)?;
    let mut client = Client::connect(&config.agent_socket, ALLOCATE_TIMEOUT).map_err(named)?;
    let answer = client
        .call(Call::Allocate(Box::new(wanted)))
        .map_err(named)?;
    let nonsense = |renewed, reason| LeaseError::Nonsense {
        attachment: attachment.clone(),
        reason,
        renewed,
    };
    match answer {
        Answer::Allocated(allocation) => {
            // It is known here only whether there is an IPv6 address.
            if let Some(mtu) = mtu
                && mtu < MIN_MTU_IPV6
                && allocation.ips().any(|ip| ip.is_ipv6())
            {
                return Err(LeaseError::Mtu {
                    attachment: attachment.clone(),
                    mtu,
                    renewed: allocation.renewed,
                });
            }
            let allocation = Allocation {
                mtu: mtu.unwrap_or(allocation.mtu),
                ..allocation
            };
            check(&allocation).map_err(|reason| nonsense(allocation.renewed, reason))?;
            Ok(allocation)
        }
        Answer::Error(error) => Err(LeaseError::Refused {
            attachment: attachment.clone(),
            code: error.code,
            message: error.message,
        }),
        Answer::Released
        | Answer::Ready
        | Answer::Lease(_)
        | Answer::Tidied
        | Answer::Status(_)
        | Answer::Frontends(_)
        | Answer::Pods(_)
        | Answer::Trace { .. } => Err(nonsense(false, "it answers another call".to_owned())),
    }
}

/// Whether an allocation can be put on a pod's interface.
fn check(allocation: &Allocation) -> Result<(), String> {
    let ips: Vec<IpAddr> = allocation.ips().collect();
    let ipv6 = ips.iter().filter(|ip| ip.is_ipv6()).count();
    if ips.is_empty() || ipv6 > 1 || ips.len() - ipv6 > 1 {
        return Err(format!(
            "{} addresses instead of one of each family",
            ips.len()
        ));
    }
    for address in &allocation.addresses {
        let ip = address.ip();
        let whole = if ip.is_ipv6() { 128 } else { 32 };
        if address.prefix() != whole || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast()
        {
            return Err(format!("{address} is no address of one host"));
        }
    }
    let least = if ipv6 > 0 { MIN_MTU_IPV6 } else { 68 };
    if !(least..=65535).contains(&allocation.mtu) {
        return Err(format!(
            "an MTU of {} is not within {least} to 65535",
            allocation.mtu
        ));
    }
    Ok(())
}

/// How a lease ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Released {
    /// The agent has ended it.
    ByAgent,
    /// It waits on disk for the agent, for this reason.
    Queued(String),
}

/// The agent did not end a lease, and it could not be queued either.
#[derive(Debug, thiserror::Error)]
#[error(
    "the lease of {attachment} was not released ({agent}), and it cannot be queued for later: {queue}"
)]
pub(crate) struct ReleaseError {
    attachment: Attachment,
    agent: String,
    queue: QueueError,
}

impl From<ReleaseError> for Failure {
    fn from(error: ReleaseError) -> Self {
        Self::new(Code::Io, error.to_string())
    }
}

/// Ends an attachment's lease, or has it ended once the agent is back.
pub(crate) fn release(config: &Config, attachment: &Attachment) -> Result<Released, ReleaseError> {
    let reason = match ask_to_release(config, attachment) {
        Ok(Answer::Released) => return Ok(Released::ByAgent),
        Ok(Answer::Error(error)) => error.message,
        Ok(
            Answer::Allocated(_)
            | Answer::Ready
            | Answer::Lease(_)
            | Answer::Tidied
            | Answer::Status(_)
            | Answer::Frontends(_)
            | Answer::Pods(_)
            | Answer::Trace { .. },
        ) => "the agent answered another call".to_owned(),
        Err(error) => error.to_string(),
    };
    match queue::push(&config.state_dir, attachment) {
        Ok(_) => Ok(Released::Queued(reason)),
        Err(queue) => Err(ReleaseError {
            attachment: attachment.clone(),
            agent: reason,
            queue,
        }),
    }
}

fn ask_to_release(config: &Config, attachment: &Attachment) -> Result<Answer, ClientError> {
    Client::connect(&config.agent_socket, RELEASE_TIMEOUT)?.call(Call::Release {
        attachment: attachment.clone(),
    })
}

/// The verb STATUS: whether an ADD would work now.
pub(crate) fn status(config: &Config) -> Result<(), Failure> {
    let unavailable = |error: ClientError| Failure::new(Code::NotAvailable, error.to_string());
    let mut client = Client::connect(&config.agent_socket, STATUS_TIMEOUT).map_err(unavailable)?;
    match client.call(Call::Ready).map_err(unavailable)? {
        Answer::Ready => Ok(()),
        Answer::Error(error) => match error.code {
            // An agent of an older release: it is there, more it cannot say.
            ErrorCode::BadRequest => Ok(()),
            ErrorCode::Disconnected => Err(Failure::new(Code::Disconnected, error.message)),
            ErrorCode::NotReady
            | ErrorCode::PoolExhausted
            | ErrorCode::AddressTaken
            | ErrorCode::PortTaken
            | ErrorCode::Unsupported
            | ErrorCode::Internal => Err(Failure::new(Code::NotAvailable, error.message)),
        },
        other => Err(Failure::new(Code::NotAvailable, nonsense(&other))),
    }
}

/// What an attachment has been leased; `None` where the agent is of a release that
/// does not tell.
pub(crate) fn lease_of(config: &Config, attachment: &Attachment) -> Result<Option<Lease>, Failure> {
    let unseen = |reason: String| {
        Failure::new(
            Code::TryAgainLater,
            format!("whether {attachment} has its lease cannot be seen: {reason}"),
        )
    };
    let failed = |error: ClientError| unseen(error.to_string());
    let call = Call::Lease {
        attachment: attachment.clone(),
    };
    let mut client = Client::connect(&config.agent_socket, LEASE_TIMEOUT).map_err(failed)?;
    match client.call(call).map_err(failed)? {
        Answer::Lease(lease) => Ok(Some(lease)),
        Answer::Error(error) if error.code == ErrorCode::BadRequest => Ok(None),
        Answer::Error(error) => Err(unseen(error.message)),
        other => Err(Failure::new(Code::Agent, nonsense(&other))),
    }
}

/// Every attachment of a network that has a lease.
pub(crate) fn leases_of(
    config: &Config,
    network: &NetworkName,
) -> Result<BTreeSet<Attachment>, Failure> {
    let failed = |error: ClientError| {
        let code = if error.agent_is_down() || matches!(error, ClientError::Timeout { .. }) {
            Code::TryAgainLater
        } else {
            Code::Agent
        };
        Failure::new(
            code,
            format!("asking the agent for its leases failed: {error}"),
        )
    };
    let mut client = Client::connect(&config.agent_socket, LIST_TIMEOUT).map_err(failed)?;
    let mut leased = BTreeSet::new();
    let mut after = None;
    loop {
        let rows = match client.call(Call::Pods { after }).map_err(failed)? {
            Answer::Pods(rows) => rows,
            Answer::Error(error) => return Err(Failure::new(Code::Agent, error.message)),
            other => return Err(Failure::new(Code::Agent, nonsense(&other))),
        };
        for row in rows.rows {
            if row.network.as_deref() != Some(network.as_str()) {
                continue;
            }
            let names = ContainerId::try_from(row.container_id)
                .and_then(|id| Ok((id, IfName::try_from(row.interface)?)));
            let (container_id, interface) = names.map_err(|error| {
                Failure::new(
                    Code::Agent,
                    format!("the agent lists a lease whose {error}"),
                )
            })?;
            leased.insert(Attachment {
                container_id,
                interface,
            });
        }
        match rows.next {
            None => return Ok(leased),
            next => after = next,
        }
    }
}

/// Has the agent put right what it can by itself.
pub(crate) fn tidy(config: &Config) -> Result<(), Failure> {
    let failed = |error: ClientError| Failure::new(Code::Agent, error.to_string());
    let mut client = Client::connect(&config.agent_socket, LIST_TIMEOUT).map_err(failed)?;
    match client.call(Call::Tidy).map_err(failed)? {
        Answer::Tidied => Ok(()),
        Answer::Error(error) if error.code == ErrorCode::BadRequest => Ok(()),
        Answer::Error(error) => Err(Failure::new(Code::Agent, error.message)),
        other => Err(Failure::new(Code::Agent, nonsense(&other))),
    }
}

fn nonsense(answer: &Answer) -> String {
    let kind = match answer {
        Answer::Allocated(_) => "an allocation",
        Answer::Released => "a release",
        Answer::Ready => "readiness",
        Answer::Lease(_) => "a lease",
        Answer::Tidied => "tidiness",
        Answer::Status(_) => "a status",
        Answer::Frontends(_) | Answer::Pods(_) => "a list",
        Answer::Trace { .. } => "a trace",
        Answer::Error(_) => "an error",
    };
    format!(
        "the agent answered with {kind}, which was not asked for: install plugin and agent of the same release"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocations_that_make_no_sense() {
        let with = |addresses: &[&str], mtu| {
            check(&Allocation {
                addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
                mtu,
                renewed: false,
            })
        };
        assert_eq!(with(&["10.0.0.2/32", "fd00::2/128"], 1500), Ok(()));
        assert_eq!(with(&["10.0.0.2/32"], 576), Ok(()));
        for (addresses, mtu) in [
            (&[][..], 1500),
            (&["10.0.0.2/32", "10.0.0.3/32"], 1500),
            (&["10.0.0.2/24"], 1500),
            (&["127.0.0.1/32"], 1500),
            (&["ff02::1/128"], 1500),
            (&["::/128"], 1500),
            (&["fd00::2/128"], 576),
            (&["10.0.0.2/32"], 0),
            (&["10.0.0.2/32"], 70000),
        ] {
            assert!(with(addresses, mtu).is_err(), "{addresses:?} {mtu}");
        }
    }
}
