//! What was skipped or honoured only in part, and why.

use std::fmt;

use crate::kube::ObjectKey;

/// Why an object is not served as it asks. The texts never change: people
/// script against them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Another Service holds the same address, port and protocol.
    AddressConflict,
    /// A field holds something that is no usable address.
    InvalidAddress,
    /// A port number is 0.
    InvalidPort,
    /// A pod range is no network, too small, or of a family that is taken.
    InvalidPodRange,
    /// The same port and protocol stands twice in one Service.
    DuplicatePort,
    /// This version does not serve the field.
    Unsupported,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AddressConflict => "AddressConflict",
            Self::InvalidAddress => "InvalidAddress",
            Self::InvalidPort => "InvalidPort",
            Self::InvalidPodRange => "InvalidPodRange",
            Self::DuplicatePort => "DuplicatePort",
            Self::Unsupported => "Unsupported",
        })
    }
}

/// One such case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Condition {
    /// The object concerned.
    pub object: ObjectKey,
    /// For programs.
    pub reason: Reason,
    /// For people: names the field and the remedy.
    pub message: String,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.object, self.reason, self.message)
    }
}
