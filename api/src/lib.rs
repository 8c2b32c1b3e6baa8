//! What crosses the agent's Unix socket: requests, replies and their framing.
//!
//! The protocol is newline-delimited JSON, one object a line. A client sends a
//! [`Request`] and reads one [`Reply`]; a connection may carry several
//! exchanges, one after the other. Both sides refuse a line longer than
//! [`MAX_LINE`] bytes. `docs/socket.md` describes it for other clients.
//!
//! No runtime is used here: the plugin talks with blocking calls, the agent
//! with its own. The [`queue`] on disk takes what could not cross the socket.

mod client;
mod line;
pub mod queue;
pub mod status;

use std::net::IpAddr;

pub use ferrule_model::host_ports::HostPort;
use ferrule_model::names::{Attachment, NetworkName};
use ferrule_model::trace::{Question, Trace};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

#[cfg(feature = "fuzzing")]
pub use client::fuzz;
pub use client::{Client, ClientError};
pub use line::{FrameError, decode, encode};
use status::{FrontendRows, PodRows, Status};

/// Version of the protocol. It rises when a change is not understood by the
/// other side; fields that may be left out do not raise it.
pub const VERSION: u32 = 1;

/// Longest line that either side accepts, in bytes, its newline included.
pub const MAX_LINE: usize = 64 * 1024;

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/ferrule/agent.sock";

/// Where agent and plugin keep what must survive a restart, unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/ferrule";

/// Folder below the state folder in which the plugin leaves releases that the
/// agent was not there to take: one file for each attachment.
pub const RELEASE_QUEUE: &str = "releases";

/// A line from client to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// What is asked for.
    #[serde(flatten)]
    pub call: Call,
}

impl Request {
    /// A request of this version.
    #[must_use]
    pub fn new(call: Call) -> Self {
        Self {
            version: VERSION,
            call,
        }
    }
}

/// What a client can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "camelCase")]
pub enum Call {
    /// Lease one address of each family that the node has a pod range for.
    ///
    /// Asked twice for one attachment, the agent gives the same addresses.
    Allocate(Box<Wanted>),
    /// Whether an [`Call::Allocate`] would work now.
    Ready,
    /// End the lease of an attachment. Ending one that does not exist is fine.
    Release {
        /// Whose lease ends.
        attachment: Attachment,
    },
    /// What an attachment has been leased.
    Lease {
        /// Whose lease it is.
        attachment: Attachment,
    },
    /// Put leases and pods' interfaces in agreement with one another, as the agent
    /// does by itself now and then.
    Tidy,
    /// How the node fares.
    Status,
    /// A part of the list of frontends.
    Frontends {
        /// [`FrontendRows::next`] of the part before; absent for the first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// A part of the list of pods.
    Pods {
        /// [`PodRows::next`] of the part before; absent for the first.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<String>,
    },
    /// What becomes of a packet.
    Trace(Box<TraceRequest>),
}

/// What [`Call::Trace`] asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Which packet.
    #[serde(flatten)]
    pub question: Question,
    /// Whether each step is held against the kernel.
    #[serde(default)]
    pub live: bool,
}

/// What [`Call::Allocate`] asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Whom the lease is for.
    pub attachment: Attachment,
    /// The pod, where the runtime told; for people who read leases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodName>,
    /// The network, so that the verb GC finds its leases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkName>,
    /// Path of the pod's network namespace: while something is there, so may the pod be.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "bounded_path"
    )]
    pub netns: Option<String>,
    /// Addresses to lease, at most one of each family; the agent chooses the others.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "bounded_ips"
    )]
    pub ips: Vec<IpAddr>,
    /// Ports of the node that are to lead to the pod. They are in the kernel
    /// before the answer, and end with the lease.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<HostPort>,
}

impl Wanted {
    /// Addresses of the agent's choice.
    #[must_use]
    pub fn new(attachment: Attachment) -> Self {
        Self {
            attachment,
            pod: None,
            network: None,
            netns: None,
            ips: Vec::new(),
            ports: Vec::new(),
        }
    }
}

/// Longest path that the kernel takes, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

fn bounded_path<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    let path = Option::<String>::deserialize(deserializer)?;
    match path {
        Some(path) if path.len() > MAX_PATH => Err(serde::de::Error::custom(format!(
            "a path of {} bytes; the kernel takes {MAX_PATH} at most",
            path.len()
        ))),
        path => Ok(path),
    }
}

fn bounded_ips<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
    let ips = Vec::<IpAddr>::deserialize(deserializer)?;
    let ipv6 = ips.iter().filter(|ip| ip.is_ipv6()).count();
    if ipv6 > 1 || ips.len() - ipv6 > 1 {
        return Err(serde::de::Error::custom(
            "two addresses of one family; a pod has one of each",
        ));
    }
    Ok(ips)
}

/// Namespace and name of a pod, as a runtime passes them in `CNI_ARGS`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// `K8S_POD_NAMESPACE`.
    #[serde(deserialize_with = "bounded_name")]
    pub namespace: String,
    /// `K8S_POD_NAME`.
    #[serde(deserialize_with = "bounded_name")]
    pub name: String,
}

/// Longest name of a pod or namespace, in bytes (RFC 1123 subdomain).
const MAX_NAME: usize = 253;

/// A name is kept on disk for as long as the lease.
fn bounded_name<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let name = String::deserialize(deserializer)?;
    if name.len() <= MAX_NAME {
        return Ok(name);
    }
    Err(serde::de::Error::custom(format!(
        "a name of {} bytes; names of Kubernetes have {MAX_NAME} at most",
        name.len()
    )))
}

/// A line from agent to client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`VERSION`] of the agent.
    pub version: u32,
    /// The answer.
    #[serde(flatten)]
    pub answer: Answer,
}

impl Reply {
    /// A reply of this version.
    #[must_use]
    pub fn new(answer: Answer) -> Self {
        Self {
            version: VERSION,
            answer,
        }
    }
}

/// What an agent can answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "camelCase")]
pub enum Answer {
    /// To [`Call::Allocate`]; the lease is on disk.
    Allocated(Allocation),
    /// To [`Call::Release`]; the release is on disk.
    Released,
    /// To [`Call::Ready`]: it would.
    Ready,
    /// To [`Call::Lease`].
    Lease(Lease),
    /// To [`Call::Tidy`].
    Tidied,
    /// To [`Call::Status`].
    Status(Box<Status>),
    /// To [`Call::Frontends`].
    Frontends(FrontendRows),
    /// To [`Call::Pods`].
    Pods(PodRows),
    /// To [`Call::Trace`]. It has a version of its own, so it is not beside that of the reply.
    Trace {
        /// The way of the packet.
        trace: Box<Trace>,
    },
    /// The call failed and changed nothing.
    Error(CallError),
}

/// The network of one attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Allocation {
    /// One host address (prefix length 32 or 128) for each family, IPv4 first.
    pub addresses: Vec<IpNetwork>,
    /// MTU for the pod's interface, in bytes.
    pub mtu: u32,
    /// Whether the lease is older than this call: whoever fails afterwards must not end
    /// it, for a pod may live by it. An agent that does not know this leaves it out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub renewed: bool,
}

impl Allocation {
    /// The bare addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.addresses.iter().map(IpNetwork::ip)
    }
}

/// What an attachment has been leased.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// One host address for each family, IPv4 first; none where there is no lease.
    pub addresses: Vec<IpNetwork>,
    /// Ports of the node that lead to the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<HostPort>,
}

/// Why a call failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: the object, what is wrong with it, and the remedy.
    pub message: String,
}

/// Kinds of failure that a client may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ErrorCode {
    /// The line was no request, or of a version that the agent does not speak.
    BadRequest,
    /// The agent cannot do it yet; ask again shortly.
    NotReady,
    /// Every address of a pod range is leased.
    PoolExhausted,
    /// An address that was asked for is leased to another, or no pod range offers it.
    AddressTaken,
    /// To [`Call::Ready`]: pods that are there may be cut off as well.
    Disconnected,
    /// Another pod or a Service has a port that was asked for.
    PortTaken,
    /// This version does not serve what was asked for.
    Unsupported,
    /// The agent could not write to its disk, or another fault of its own.
    Internal,
}
