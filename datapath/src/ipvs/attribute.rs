//! Reading and writing attributes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferrule_model::address::Family;
use ferrule_netlink::Error;
use netlink_packet_core::{DefaultNla, Emitable as _, NLA_F_NESTED, NlasIterator};

/// `AF_INET` and `AF_INET6`.
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Length of `struct nlattr`.
const HEADER: usize = 4;

/// Length of `union nf_inet_addr`, which holds addresses of either family.
const ADDRESS: usize = 16;

/// Attributes of a message or of a nested attribute, to be sent.
pub(super) type Attributes = Vec<DefaultNla>;

/// One attribute that was received.
pub(super) struct Attribute<'a> {
    pub(super) kind: u16,
    pub(super) value: &'a [u8],
}

/// Splits a message or the value of a nested attribute.
pub(super) fn each(bytes: &[u8]) -> impl Iterator<Item = Result<Attribute<'_>, Error>> {
    NlasIterator::new(bytes).map(|attribute| {
        let attribute = attribute?;
        let (kind, end) = (attribute.kind(), usize::from(attribute.length()));
        let value = attribute.into_inner().get(HEADER..end).unwrap_or_default();
        Ok(Attribute { kind, value })
    })
}

impl Attribute<'_> {
    fn fixed<const N: usize>(&self, name: &str) -> Result<[u8; N], Error> {
        self.value.try_into().map_err(|_| {
            Error::Decode(format!(
                "attribute {name} has {} bytes instead of {N}",
                self.value.len()
            ))
        })
    }

    pub(super) fn u8(&self, name: &str) -> Result<u8, Error> {
        self.fixed(name).map(u8::from_ne_bytes)
    }

    pub(super) fn u16(&self, name: &str) -> Result<u16, Error> {
        self.fixed(name).map(u16::from_ne_bytes)
    }

    /// A port: 16 bits in network byte order.
    pub(super) fn port(&self, name: &str) -> Result<u16, Error> {
        self.fixed(name).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&self, name: &str) -> Result<u32, Error> {
        self.fixed(name).map(u32::from_ne_bytes)
    }

    pub(super) fn u64(&self, name: &str) -> Result<u64, Error> {
        self.fixed(name).map(u64::from_ne_bytes)
    }

    /// A text that ends with the value or with its first zero.
    pub(super) fn text(&self, name: &str) -> Result<String, Error> {
        let text = self
            .value
            .split(|byte| *byte == 0)
            .next()
            .unwrap_or_default();
        std::str::from_utf8(text)
            .map(str::to_owned)
            .map_err(|_| Error::Decode(format!("attribute {name} is no UTF-8 text")))
    }

    /// An address of a family that another attribute names. The kernel sends 16
    /// bytes for either family.
    pub(super) fn address(&self, family: Family, name: &str) -> Result<IpAddr, Error> {
        let bytes = self.fixed::<ADDRESS>(name)?;
        Ok(match (family, bytes) {
            (Family::IPv4, [a, b, c, d, ..]) => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            (Family::IPv6, bytes) => IpAddr::V6(Ipv6Addr::from(bytes)),
        })
    }

    /// `struct ip_vs_flags`: the flags, and a mask that says nothing in what is received.
    pub(super) fn flags(&self, name: &str) -> Result<u32, Error> {
        let [a, b, c, d, ..] = self.fixed::<8>(name)?;
        Ok(u32::from_ne_bytes([a, b, c, d]))
    }

    pub(super) fn family(&self, name: &str) -> Result<Family, Error> {
        match self.u16(name)? {
            AF_INET => Ok(Family::IPv4),
            AF_INET6 => Ok(Family::IPv6),
            other => Err(Error::Decode(format!(
                "attribute {name}: {other} is no address family that IPVS has"
            ))),
        }
    }
}

/// An attribute that must be there.
pub(super) fn required<T>(value: Option<T>, name: &str) -> Result<T, Error> {
    value.ok_or_else(|| Error::Decode(format!("attribute {name} is missing")))
}

pub(super) fn put_u8(attributes: &mut Attributes, kind: u16, value: u8) {
    attributes.push(DefaultNla::new(kind, vec![value]));
}

pub(super) fn put_u16(attributes: &mut Attributes, kind: u16, value: u16) {
    attributes.push(DefaultNla::new(kind, value.to_ne_bytes().to_vec()));
}

pub(super) fn put_port(attributes: &mut Attributes, kind: u16, value: u16) {
    attributes.push(DefaultNla::new(kind, value.to_be_bytes().to_vec()));
}

pub(super) fn put_u32(attributes: &mut Attributes, kind: u16, value: u32) {
    attributes.push(DefaultNla::new(kind, value.to_ne_bytes().to_vec()));
}

pub(super) fn put_text(attributes: &mut Attributes, kind: u16, value: &str) {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    attributes.push(DefaultNla::new(kind, bytes));
}

pub(super) fn put_address(attributes: &mut Attributes, kind: u16, value: IpAddr) {
    let mut bytes = match value {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    bytes.resize(ADDRESS, 0);
    attributes.push(DefaultNla::new(kind, bytes));
}

pub(super) fn put_family(attributes: &mut Attributes, kind: u16, value: Family) {
    let number = match value {
        Family::IPv4 => AF_INET,
        Family::IPv6 => AF_INET6,
    };
    put_u16(attributes, kind, number);
}

pub(super) fn nested(kind: u16, attributes: &Attributes) -> DefaultNla {
    let attributes = attributes.as_slice();
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}
