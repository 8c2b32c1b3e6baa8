//! Names that must not be confused with one another, checked where they enter.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Namespace and name of a Kubernetes object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
}

impl ObjectName {
    /// Puts the two together.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Why a text cannot be the name it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// CNI specification 1.1.0, `CNI_CONTAINERID`.
    #[error(
        "container id {0:?} must begin with a letter or digit, go on with letters, digits, '.', '_' or '-', and have at most 256 characters"
    )]
    ContainerId(String),
    /// CNI specification 1.1.0, `CNI_IFNAME`; kernel `dev_valid_name()`.
    #[error(
        "interface name {0:?} must have 1 to 15 bytes without '/', ':', '%' or blanks, and not be '.', '..', 'all' or 'default'"
    )]
    IfName(String),
    /// CNI specification 1.1.0, `name` of the network configuration.
    #[error(
        "network name {0:?} must begin with a letter or digit, go on with letters, digits, '.', '_' or '-', and have at most 128 characters"
    )]
    NetworkName(String),
}

/// What container IDs and names of networks are made of.
fn is_cni_word(text: &str) -> bool {
    let mut bytes = text.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
    first && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// Characters of a text that is no name that an error shows: it may be of any length.
const MAX_SHOWN: usize = 64;

fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

/// A container ID as the runtime gives it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Longer IDs are refused: they reach file names and log lines.
    pub const MAX_LEN: usize = 256;

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContainerId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        if is_cni_word(&text) && text.len() <= Self::MAX_LEN {
            Ok(Self(text))
        } else {
            Err(NameError::ContainerId(shown(&text)))
        }
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a CNI network: the `name` of its configuration list. Attachments of several
/// networks may be one agent's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NetworkName(String);

impl NetworkName {
    /// Longer names are refused: they reach the alias of an interface.
    pub const MAX_LEN: usize = 128;

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NetworkName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        if is_cni_word(&text) && text.len() <= Self::MAX_LEN {
            Ok(Self(text))
        } else {
            Err(NameError::NetworkName(text))
        }
    }
}

impl From<NetworkName> for String {
    fn from(name: NetworkName) -> Self {
        name.0
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a network interface, valid for the kernel and for a path below `/proc/sys/net`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName(String);

impl IfName {
    /// `IFNAMSIZ` less the terminating zero.
    pub const MAX_LEN: usize = 15;

    /// Wraps a name that this crate built from letters and digits itself.
    pub(crate) fn from_derived(name: String) -> Self {
        Self(name)
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for IfName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        // To the kernel `%d` is a number of its choice, and other names with '%' are none.
        let forbidden =
            |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control();
        if text.is_empty()
            || text.len() > Self::MAX_LEN
            || text == "."
            || text == ".."
            // Folders of sysctls that are no interface.
            || text == "all"
            || text == "default"
            || text.chars().any(forbidden)
        {
            return Err(NameError::IfName(shown(&text)));
        }
        Ok(Self(text))
    }
}

impl From<IfName> for String {
    fn from(name: IfName) -> Self {
        name.0
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an address is leased to: one interface of one container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Attachment {
    /// The runtime's ID of the pod sandbox.
    pub container_id: ContainerId,
    /// The interface inside the pod, usually `eth0`.
    pub interface: IfName,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.container_id, self.interface)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_outside_are_checked() {
        for good in ["a", "0123abcDEF", "cri-o_1.2"] {
            assert!(ContainerId::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".", "a/b", "a b", "a\n", "ä"] {
            assert!(ContainerId::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        assert!(ContainerId::try_from("a".repeat(257)).is_err());
        assert!(NetworkName::try_from("pods_v4.1-a".to_owned()).is_ok());
        for bad in ["", "-a", "a b", "a/b", &"a".repeat(129)] {
            assert!(NetworkName::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        for good in ["eth0", "net1", "a.b", "exactly15bytes_"] {
            assert!(IfName::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "all",
            "default",
            "a/b",
            "a:b",
            "eth%d",
            "a b",
            "a\tb",
            "sixteen_bytes___",
            "eth0/../../x",
        ] {
            assert!(IfName::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_error_shows_the_beginning_of_what_is_no_name() {
        let long = "ä".repeat(100_000);
        let of_id = ContainerId::try_from(long.clone()).unwrap_err().to_string();
        let of_name = IfName::try_from(long).unwrap_err().to_string();
        for said in [of_id, of_name] {
            assert!(said.contains("äää…") && said.len() < 400, "{said}");
        }
    }
}
