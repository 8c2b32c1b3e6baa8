//! What is asked: which packet.
//!
//! Whoever asks may be anybody: a question is checked where it is read, be it
//! on the command line or from the agent's socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::address::{AddressError, Family, FrontendAddr, Protocol, parse_any};
use crate::names::IfName;

/// Longest text that is quoted of what was given.
const QUOTED: usize = 60;

/// The first packet of a connection, as it is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Asked", into = "Asked")]
pub struct Question {
    /// From where.
    pub from: IpAddr,
    /// Whereto.
    pub to: FrontendAddr,
    /// The device by which it comes, where that was said.
    pub device: Option<IfName>,
}

/// Why a question is none. Each names the argument and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuestionError {
    /// `from` is no address.
    #[error("from: {0:?} {1}; give the client's, such as 10.244.1.7 or fd00:10:244:1::7")]
    From(String, AddressError),
    /// `from` is the address of nobody.
    #[error("from: {0} is the address of no single sender; give the client's")]
    FromNobody(IpAddr),
    /// `to` is no address with port and protocol.
    #[error(
        "to: {0:?} is no address with port and protocol; write 10.96.0.10:80/tcp, or [fd00:10:96::a]:80/tcp; tcp, udp and sctp are served"
    )]
    To(String),
    /// `to` is the address of nobody.
    #[error("to: {0} is the address of no single receiver; give the one that is called")]
    ToNobody(IpAddr),
    /// A packet has one family.
    #[error("to: it is {to} and `from` is {from}; give two addresses of one family")]
    Families {
        /// Of the client.
        from: Family,
        /// Of what it calls.
        to: Family,
    },
    /// What this node sends comes by no device.
    #[error(
        "device: {0} is an address of this node, and what its processes send comes by no device; leave the device out"
    )]
    OwnByDevice(IpAddr),
}

/// A question as it crosses the socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Asked {
    from: String,
    to: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device: Option<IfName>,
}

impl TryFrom<Asked> for Question {
    type Error = QuestionError;

    fn try_from(asked: Asked) -> Result<Self, QuestionError> {
        let from = parse_from(&asked.from)?;
        Self::new(from, parse_to(&asked.to)?, asked.device)
    }
}

impl From<Question> for Asked {
    fn from(question: Question) -> Self {
        Self {
            from: question.from.to_string(),
            to: question.to.to_string(),
            device: question.device,
        }
    }
}

impl Question {
    /// A question about a packet of one family.
    ///
    /// # Errors
    /// [`QuestionError::Families`].
    pub fn new(
        from: IpAddr,
        to: FrontendAddr,
        device: Option<IfName>,
    ) -> Result<Self, QuestionError> {
        let families = (Family::of(from), Family::of(to.ip));
        if families.0 != families.1 {
            let (from, to) = families;
            return Err(QuestionError::Families { from, to });
        }
        Ok(Self { from, to, device })
    }
}

/// Reads the address of a client.
///
/// # Errors
/// [`QuestionError`].
pub fn parse_from(text: &str) -> Result<IpAddr, QuestionError> {
    let ip = parse_any(text).map_err(|error| QuestionError::From(quoted(text), error))?;
    if is_nobody(ip) {
        return Err(QuestionError::FromNobody(ip));
    }
    Ok(ip)
}

/// Reads `10.96.0.10:80/tcp` or `[fd00:10:96::a]:80/tcp`.
///
/// # Errors
/// [`QuestionError`].
pub fn parse_to(text: &str) -> Result<FrontendAddr, QuestionError> {
    let wrong = || QuestionError::To(quoted(text));
    let (socket, protocol) = text.rsplit_once('/').ok_or_else(wrong)?;
    let (ip, port) = socket.rsplit_once(':').ok_or_else(wrong)?;
    let ip = match ip.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').filter(|ip| ip.contains(':')),
        None => Some(ip).filter(|ip| !ip.contains(':')),
    };
    let ip = ip.and_then(|ip| parse_any(ip).ok()).ok_or_else(wrong)?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0);
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp]
        .into_iter()
        .find(|known| known.to_string().eq_ignore_ascii_case(protocol));
    let (port, protocol) = port.zip(protocol).ok_or_else(wrong)?;
    if is_nobody(ip) {
        return Err(QuestionError::ToNobody(ip));
    }
    Ok(FrontendAddr::new(ip, port, protocol))
}

fn is_nobody(ip: IpAddr) -> bool {
    let broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    broadcast || ip.is_unspecified() || ip.is_multicast()
}

fn quoted(text: &str) -> String {
    let mut text = text.to_owned();
    if text.len() > QUOTED {
        text.truncate(text.floor_char_boundary(QUOTED));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_everywhere() {
        for (text, read) in [
            ("10.96.0.10:80/tcp", "10.96.0.10:80/TCP"),
            ("10.96.0.10:53/UDP", "10.96.0.10:53/UDP"),
            ("[fd00:10:96::a]:80/sctp", "[fd00:10:96::a]:80/SCTP"),
            ("127.0.0.1:65535/Tcp", "127.0.0.1:65535/TCP"),
        ] {
            assert_eq!(parse_to(text).unwrap().to_string(), read);
            assert_eq!(parse_to(read).unwrap().to_string(), read, "reads back");
        }
    }

    #[test]
    fn what_is_wrong_names_argument_and_remedy() {
        for wrong in [
            "",
            "10.96.0.10",
            "10.96.0.10:80",
            "10.96.0.10/tcp",
            "10.96.0.10:0/tcp",
            "10.96.0.10:+80/tcp",
            "10.96.0.10:65536/tcp",
            "10.96.0.10:80/icmp",
            "[10.96.0.10]:80/tcp",
            "fd00::a:80/tcp",
            "[fd00::a]80/tcp",
            "[fd00::a:80/tcp",
            "[::ffff:10.0.0.1]:80/tcp",
            "web:80/tcp",
        ] {
            let error = parse_to(wrong).unwrap_err();
            assert_eq!(error, QuestionError::To(wrong.to_owned()));
        }
        let long = parse_to(&"ü".repeat(1000)).unwrap_err().to_string();
        assert!(long.len() < 300, "{long}");
        for (error, words) in [
            (
                parse_from("pod-a").unwrap_err(),
                "from: \"pod-a\" is not an IP address; give the client's, such as 10.244.1.7 or fd00:10:244:1::7",
            ),
            (
                parse_from("::ffff:10.0.0.1").unwrap_err(),
                "from: \"::ffff:10.0.0.1\" is an IPv4-mapped IPv6 address, write it as plain IPv4; give the client's, such as 10.244.1.7 or fd00:10:244:1::7",
            ),
            (
                parse_from("224.0.0.1").unwrap_err(),
                "from: 224.0.0.1 is the address of no single sender; give the client's",
            ),
            (
                parse_to("255.255.255.255:80/tcp").unwrap_err(),
                "to: 255.255.255.255 is the address of no single receiver; give the one that is called",
            ),
            (
                Question::new(
                    [10, 0, 0, 1].into(),
                    parse_to("[fd00::1]:80/tcp").unwrap(),
                    None,
                )
                .unwrap_err(),
                "to: it is IPv6 and `from` is IPv4; give two addresses of one family",
            ),
        ] {
            assert_eq!(error.to_string(), words);
        }
    }
}
