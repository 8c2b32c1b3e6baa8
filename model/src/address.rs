//! Addresses of frontends and backends, and the one way to parse an address.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Address family. Every frontend and every backend belongs to exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Family {
    /// Internet Protocol version 4.
    IPv4,
    /// Internet Protocol version 6.
    IPv6,
}

impl Family {
    /// Both families, in the order in which they appear in every output.
    pub const ALL: [Self; 2] = [Self::IPv4, Self::IPv6];

    /// The family of `address`.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::IPv4,
            IpAddr::V6(_) => Self::IPv6,
        }
    }

    /// Bits in an address of this family, which is the prefix length of a host route.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::IPv4 => 32,
            Self::IPv6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IPv4 => "IPv4",
            Self::IPv6 => "IPv6",
        })
    }
}

/// Transport protocol of a service port.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// The Kubernetes API's default.
    #[default]
    #[serde(alias = "")]
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

impl Protocol {
    /// IANA protocol number, as in an IP header.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The protocol with this IANA number, if services can have it.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            132 => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Where clients reach a service: the key of an IPVS virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FrontendAddr {
    /// The VIP (or node address).
    pub ip: IpAddr,
    /// Port, in host byte order.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
}

impl FrontendAddr {
    /// Puts the three together.
    #[must_use]
    pub fn new(ip: IpAddr, port: u16, protocol: Protocol) -> Self {
        Self { ip, port, protocol }
    }

    /// All of one address, for looking them up in order.
    pub(crate) fn all_at(ip: IpAddr) -> RangeInclusive<Self> {
        Self::new(ip, 0, Protocol::Tcp)..=Self::new(ip, u16::MAX, Protocol::Sctp)
    }
}

impl fmt::Display for FrontendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}:{}/{}", self.port, self.protocol),
            IpAddr::V6(ip) => write!(f, "[{ip}]:{}/{}", self.port, self.protocol),
        }
    }
}

/// Where a backend listens: an IPVS real server within its virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendAddr {
    /// Address of the pod or host.
    pub ip: IpAddr,
    /// Port, in host byte order.
    pub port: u16,
}

impl BackendAddr {
    /// The first one in order.
    pub(crate) const LEAST: Self = Self {
        ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        port: 0,
    };

    /// Puts the two together.
    #[must_use]
    pub fn new(ip: IpAddr, port: u16) -> Self {
        Self { ip, port }
    }
}

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            IpAddr::V4(ip) => write!(f, "{ip}:{}", self.port),
            IpAddr::V6(ip) => write!(f, "[{ip}]:{}", self.port),
        }
    }
}

/// Why a text is not an address that Ferrule serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither dotted decimal nor RFC 4291 text.
    #[error("is not an IP address")]
    NotAnAddress,
    /// `::ffff:a.b.c.d`: ambiguous between the families, refused by the Kubernetes API too.
    #[error("is an IPv4-mapped IPv6 address, write it as plain IPv4")]
    Mapped,
    /// Loopback, multicast, unspecified, broadcast or IPv6 link-local.
    #[error("is not a unicast address that other hosts can reach")]
    NotUnicast,
}

/// Parses an address as the Kubernetes API writes it.
///
/// Leading zeros in IPv4 octets are decimal, never octal, as in objects that
/// old API servers accepted (`010.0.0.1` is `10.0.0.1`).
///
/// # Errors
/// [`AddressError`] says what is wrong; the text itself is left to the caller,
/// who knows the object and field.
pub fn parse_address(text: &str) -> Result<IpAddr, AddressError> {
    match parse_any(text)? {
        IpAddr::V4(ip)
            if ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_broadcast() =>
        {
            Err(AddressError::NotUnicast)
        }
        IpAddr::V6(ip)
            if ip.is_unspecified()
                || ip.is_loopback()
                || ip.is_multicast()
                || ip.is_unicast_link_local() =>
        {
            Err(AddressError::NotUnicast)
        }
        address => Ok(address),
    }
}

/// Likewise, whatever the address is for.
pub(crate) fn parse_any(text: &str) -> Result<IpAddr, AddressError> {
    let address = if text.contains(':') {
        text.parse().map_err(|_| AddressError::NotAnAddress)?
    } else {
        IpAddr::V4(parse_ipv4(text).ok_or(AddressError::NotAnAddress)?)
    };
    match address {
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Err(AddressError::Mapped),
        address => Ok(address),
    }
}

fn parse_ipv4(text: &str) -> Option<std::net::Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        let digits = part.trim_start_matches('0');
        if part.is_empty() || part.len() > 16 || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *octet = if digits.is_empty() {
            0
        } else {
            digits.parse().ok()?
        };
    }
    parts.next().is_none().then(|| octets.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_the_api_writes_them() {
        let cases: [(&str, Result<&str, AddressError>); 12] = [
            ("10.96.0.1", Ok("10.96.0.1")),
            ("010.096.000.001", Ok("10.96.0.1")),
            ("fd00:0:0::A", Ok("fd00::a")),
            ("::ffff:10.0.0.1", Err(AddressError::Mapped)),
            ("10.0.0", Err(AddressError::NotAnAddress)),
            ("10.0.0.1.2", Err(AddressError::NotAnAddress)),
            ("10.0.0.256", Err(AddressError::NotAnAddress)),
            ("10.0.0.+1", Err(AddressError::NotAnAddress)),
            ("None", Err(AddressError::NotAnAddress)),
            ("127.0.0.1", Err(AddressError::NotUnicast)),
            ("fe80::1", Err(AddressError::NotUnicast)),
            ("ff02::1", Err(AddressError::NotUnicast)),
        ];
        for (text, expected) in cases {
            let got = parse_address(text).map(|ip| ip.to_string());
            assert_eq!(got, expected.map(str::to_owned), "{text}");
        }
    }
}
