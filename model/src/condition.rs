//! What was skipped or honoured only in part, and why.

use std::fmt;

use crate::kube::ObjectKey;

/// Why an object is not served as it asks. The texts never change: people
/// script against them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Another Service, or a pod by a host port, holds the same address, port and protocol.
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
    /// The object cannot be read: a field holds what it cannot.
    InvalidObject,
    /// There is no Node object of this node's name.
    NodeMissing,
    /// Two manifests define the object; the last one counts.
    DuplicateObject,
    /// A ServiceCIDR's or configuration's range is no network.
    InvalidRange,
    /// Another program's route leads to a Node's pods.
    RouteConflict,
    /// A Node shares no link with this one, so that we make no route to its pods.
    NoSharedLink,
    /// The operator does not allow the address for external IPs.
    AddressNotAllowed,
    /// A node has the address. It stays that node's, which serves the Service there.
    AddressOfNode,
    /// The Service has no ClusterIP of the address's family.
    FamilyMismatch,
    /// An annotation says nothing that we know.
    InvalidAnnotation,
    /// A field holds a value out of its range.
    InvalidValue,
    /// The kernel of this node lacks the scheduler.
    SchedulerMissing,
}

impl Reason {
    /// Every reason, in the order of the documentation (docs/plan.md).
    pub const ALL: [Self; 18] = [
        Self::AddressConflict,
        Self::InvalidAddress,
        Self::InvalidPort,
        Self::InvalidPodRange,
        Self::DuplicatePort,
        Self::Unsupported,
        Self::InvalidObject,
        Self::NodeMissing,
        Self::DuplicateObject,
        Self::InvalidRange,
        Self::RouteConflict,
        Self::NoSharedLink,
        Self::AddressNotAllowed,
        Self::AddressOfNode,
        Self::FamilyMismatch,
        Self::InvalidAnnotation,
        Self::InvalidValue,
        Self::SchedulerMissing,
    ];

    /// The text that stands for it in every output.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AddressConflict => "AddressConflict",
            Self::InvalidAddress => "InvalidAddress",
            Self::InvalidPort => "InvalidPort",
            Self::InvalidPodRange => "InvalidPodRange",
            Self::DuplicatePort => "DuplicatePort",
            Self::Unsupported => "Unsupported",
            Self::InvalidObject => "InvalidObject",
            Self::NodeMissing => "NodeMissing",
            Self::DuplicateObject => "DuplicateObject",
            Self::InvalidRange => "InvalidRange",
            Self::RouteConflict => "RouteConflict",
            Self::NoSharedLink => "NoSharedLink",
            Self::AddressNotAllowed => "AddressNotAllowed",
            Self::AddressOfNode => "AddressOfNode",
            Self::FamilyMismatch => "FamilyMismatch",
            Self::InvalidAnnotation => "InvalidAnnotation",
            Self::InvalidValue => "InvalidValue",
            Self::SchedulerMissing => "SchedulerMissing",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_listed_once() {
        // A new variant fails to compile here: add it to `Reason::ALL` too.
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            let place = match reason {
                Reason::AddressConflict => 0,
                Reason::InvalidAddress => 1,
                Reason::InvalidPort => 2,
                Reason::InvalidPodRange => 3,
                Reason::DuplicatePort => 4,
                Reason::Unsupported => 5,
                Reason::InvalidObject => 6,
                Reason::NodeMissing => 7,
                Reason::DuplicateObject => 8,
                Reason::InvalidRange => 9,
                Reason::RouteConflict => 10,
                Reason::NoSharedLink => 11,
                Reason::AddressNotAllowed => 12,
                Reason::AddressOfNode => 13,
                Reason::FamilyMismatch => 14,
                Reason::InvalidAnnotation => 15,
                Reason::InvalidValue => 16,
                Reason::SchedulerMissing => 17,
            };
            assert_eq!(place, index, "{reason}");
            assert_eq!(format!("{reason:?}"), reason.name());
        }
    }
}
