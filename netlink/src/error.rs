//! What can go wrong between us and the kernel.

use std::time::Duration;

use netlink_packet_core::DecodeError;
use rustix::io::Errno;

/// A request that did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The socket could not be made.
    #[error("cannot open a netlink socket: {0}")]
    Open(Errno),
    /// The kernel refused.
    #[error("{errno}{}", reason.as_deref().map(|r| format!(" ({r})")).unwrap_or_default())]
    Refused {
        /// Why, as a number.
        errno: Errno,
        /// Why, in the kernel's own words, where it gives them.
        reason: Option<String>,
    },
    /// No answer came. Whether the request took effect is unknown.
    #[error("the kernel did not answer within {0:?}")]
    Timeout(Duration),
    /// Answers were lost because they came faster than they were read. Whether
    /// the requests took effect is unknown.
    #[error("answers of the kernel were lost (receive buffer overrun)")]
    Overrun,
    /// What was dumped changed meanwhile, again and again.
    #[error("the dump was interrupted by changes {0} times in a row")]
    Interrupted(u32),
    /// The socket is closed.
    #[error("the netlink socket was closed")]
    Closed,
    /// The answer makes no sense.
    #[error("cannot decode the kernel's answer: {0}")]
    Decode(String),
}

impl Error {
    /// The kernel's error number, where it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Open(errno) | Self::Refused { errno, .. } => Some(*errno),
            Self::Timeout(_)
            | Self::Overrun
            | Self::Interrupted(_)
            | Self::Closed
            | Self::Decode(_) => None,
        }
    }

    /// The object that was asked for, or about to be removed, does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self.errno(),
            Some(Errno::NOENT | Errno::SRCH | Errno::NODEV | Errno::ADDRNOTAVAIL | Errno::NXIO)
        )
    }

    /// The object that was to be made exists.
    #[must_use]
    pub fn already_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }

    /// It is not known whether the request took effect: observe before you go on.
    #[must_use]
    pub fn leaves_doubt(&self) -> bool {
        match self {
            Self::Timeout(_) | Self::Overrun | Self::Closed | Self::Decode(_) => true,
            Self::Open(_) | Self::Refused { .. } | Self::Interrupted(_) => false,
        }
    }
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error.to_string())
    }
}
