//! How a verb fails: the error object of the CNI specification.
//!
//! Modules have errors of their own; each says here which code it is to a
//! runtime. The message names the object, what is wrong with it, and the
//! remedy, since it is what `kubectl describe pod` shows.

use std::fmt;

use serde_json::{Value, json};

use crate::version::SpecVersion;

/// Longest message, in bytes: runtimes write it into logs and events.
const MAX_MESSAGE: usize = 1024;

/// Error codes: those of the specification, and from 100 ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Code {
    /// `cniVersion` is none of ours.
    IncompatibleVersion = 1,
    /// A field of the network configuration asks for what we do not serve.
    UnsupportedField = 2,
    /// The container, or its namespace, does not exist. The runtime need not
    /// call DEL.
    UnknownContainer = 3,
    /// A `CNI_*` variable is missing or wrong.
    InvalidEnvironment = 4,
    /// Reading, writing, or an operation of the kernel failed.
    Io = 5,
    /// Standard input is no JSON.
    Decode = 6,
    /// A field of the network configuration is wrong.
    InvalidConfiguration = 7,
    /// The agent is not there, not ready, or has no address left.
    TryAgainLater = 11,
    /// To STATUS: an ADD would fail now.
    NotAvailable = 50,
    /// To STATUS: and pods that are there may be cut off.
    Disconnected = 51,
    /// The agent refused, or answered what makes no sense.
    Agent = 100,
    /// Something else has the name, address or port that we need.
    Taken = 101,
    /// CHECK found another state than ADD left.
    Differs = 102,
}

/// A failed verb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    code: Code,
    message: String,
    details: Vec<String>,
}

impl Failure {
    /// A failure without details.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message = message.into();
        // It may quote what came in, which may be a megabyte of configuration.
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        Self {
            code,
            message,
            details: Vec::new(),
        }
    }

    /// Adds sentences to `details`, such as what could not be undone.
    #[must_use]
    pub(crate) fn with_details(mut self, details: impl IntoIterator<Item = String>) -> Self {
        self.details.extend(details);
        self
    }

    #[cfg(test)]
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The object for standard output.
    pub(crate) fn reply(&self, version: SpecVersion) -> Value {
        json!({
            "cniVersion": version.to_string(),
            "code": self.code as u32,
            "msg": self.message,
            "details": self.details.join("; "),
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_quotes_its_input_has_an_end() {
        let failure = Failure::new(Code::Decode, "ä".repeat(1_000_000));
        let reply = failure.reply(SpecVersion::NEWEST);
        let message = reply["msg"].as_str().unwrap();
        assert!(message.ends_with("ä…") && message.len() <= MAX_MESSAGE + 3);
    }
}
