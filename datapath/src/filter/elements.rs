//! Elements of the guard's sets, over netlink.

use std::net::IpAddr;

use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_netlink::{Error, Protocol as Netlink, RawMessage, Socket};
use netlink_packet_core::{Emitable as _, NLM_F_CREATE, NlaBuffer, NlasIterator, Parseable as _};
use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, SetElementAttribute, SetElementList,
};

/// `NFNL_SUBSYS_NFTABLES << 8`.
const NFTABLES: u16 = 10 << 8;

/// `NFT_MSG_*SETELEM`.
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

/// `NFPROTO_INET`.
const FAMILY_INET: u8 = 1;

/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;

/// Elements in one message; keeps it far below the 64 kB that an attribute can have.
const MAX_ELEMENTS: usize = 512;

/// An element of one of our sets; which one follows from its kind and family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// Of `vips4` or `vips6`.
    Vip(IpAddr),
    /// Of `frontends4` or `frontends6`.
    Frontend(FrontendAddr),
}

/// Our sets, for reading and writing.
#[derive(Debug)]
pub struct Elements {
    socket: Socket,
    table: String,
}

/// The four sets.
const SETS: [&str; 4] = ["vips4", "vips6", "frontends4", "frontends6"];

impl Element {
    fn set(&self) -> &'static str {
        match self {
            Self::Vip(IpAddr::V4(_)) => "vips4",
            Self::Vip(IpAddr::V6(_)) => "vips6",
            Self::Frontend(addr) if addr.ip.is_ipv4() => "frontends4",
            Self::Frontend(_) => "frontends6",
        }
    }

    /// The key: the parts one after the other, each padded to 4 bytes.
    fn key(&self) -> Vec<u8> {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        match self {
            Self::Vip(ip) => octets(*ip),
            Self::Frontend(addr) => {
                let mut key = octets(addr.ip);
                let [high, low] = addr.port.to_be_bytes();
                key.extend([addr.protocol.number(), 0, 0, 0, high, low, 0, 0]);
                key
            }
        }
    }

    /// `None` for a key that is not of the set's type, which the kernel would not have taken.
    fn from_key(set: &str, key: &[u8]) -> Option<Self> {
        let (ip, rest): (IpAddr, &[u8]) = if set.ends_with('4') {
            let (ip, rest) = key.split_first_chunk::<4>()?;
            ((*ip).into(), rest)
        } else {
            let (ip, rest) = key.split_first_chunk::<16>()?;
            ((*ip).into(), rest)
        };
        if set.starts_with("vips") {
            return Some(Self::Vip(ip));
        }
        let protocol = Protocol::from_number(*rest.first()?)?;
        let port = u16::from_be_bytes(*rest.get(4..)?.first_chunk::<2>()?);
        Some(Self::Frontend(FrontendAddr::new(ip, port, protocol)))
    }
}

impl Elements {
    /// Opens a socket to the nftables of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open(table: &str) -> Result<Self, Error> {
        Ok(Self {
            socket: Socket::open(Netlink::Netfilter)?,
            table: table.to_owned(),
        })
    }

    /// Every element of our sets.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete. [`Error::is_not_found`] when
    /// the table or a set does not exist.
    pub async fn list(&self) -> Result<Vec<Element>, Error> {
        let mut elements = Vec::new();
        for set in SETS {
            let question = self.message(GET_ELEMENT, set, &[]);
            for answer in self.socket.dump(question).await? {
                read(set, &answer, &mut elements)?;
            }
        }
        Ok(elements)
    }

    /// Adds elements. Those that are there already are fine. The i-th result is
    /// that of the i-th element.
    pub async fn add(&self, elements: &[Element]) -> Vec<Result<(), Error>> {
        self.carry_out(NEW_ELEMENT, NLM_F_CREATE, elements).await
    }

    /// Removes elements. Those that are gone already are fine. The i-th result
    /// is that of the i-th element.
    pub async fn remove(&self, elements: &[Element]) -> Vec<Result<(), Error>> {
        self.carry_out(DELETE_ELEMENT, 0, elements).await
    }

    /// All in one transaction; where the kernel refuses that, one by one, to
    /// find which of them it is.
    async fn carry_out(
        &self,
        kind: u16,
        flags: u16,
        elements: &[Element],
    ) -> Vec<Result<(), Error>> {
        let mut messages = Vec::new();
        for set in SETS {
            let of_set: Vec<Element> = elements
                .iter()
                .copied()
                .filter(|element| element.set() == set)
                .collect();
            for chunk in of_set.chunks(MAX_ELEMENTS) {
                messages.push((self.message(kind, set, chunk), flags));
            }
        }
        match self.socket.transaction(messages).await {
            Ok(()) => vec![Ok(()); elements.len()],
            Err(error) if error.leaves_doubt() => vec![Err(error); elements.len()],
            Err(_refused) => {
                let mut results = Vec::with_capacity(elements.len());
                for element in elements {
                    results.push(self.carry_out_one(kind, flags, *element).await);
                }
                results
            }
        }
    }

    async fn carry_out_one(&self, kind: u16, flags: u16, element: Element) -> Result<(), Error> {
        let message = self.message(kind, element.set(), &[element]);
        match self.socket.transaction(vec![(message, flags)]).await {
            Err(error) if kind == NEW_ELEMENT && error.already_exists() => Ok(()),
            Err(error) if kind == DELETE_ELEMENT && error.is_not_found() => Ok(()),
            other => other,
        }
    }

    fn message(&self, kind: u16, set: &str, elements: &[Element]) -> RawMessage {
        let mut attributes = vec![
            SetElementList::Table(self.table.clone()),
            SetElementList::Set(set.to_owned()),
        ];
        if !elements.is_empty() {
            let elements = elements.iter().map(|element| {
                let key = DataAttribute::Value(element.key());
                ListAttribute::Element(vec![SetElementAttribute::Key(key)])
            });
            attributes.push(SetElementList::Elements(elements.collect()));
        }
        let attributes = attributes.as_slice();
        let mut body = vec![0; HEADER + attributes.buffer_len()];
        body[0] = FAMILY_INET;
        attributes.emit(&mut body[HEADER..]);
        RawMessage::new(NFTABLES | kind, body)
    }
}

fn read(set: &str, answer: &RawMessage, elements: &mut Vec<Element>) -> Result<(), Error> {
    let attributes = answer
        .body
        .get(HEADER..)
        .ok_or_else(|| Error::Decode("a set element message without its header".to_owned()))?;
    for attribute in NlasIterator::new(attributes) {
        let attribute: NlaBuffer<&[u8]> = attribute?;
        let SetElementList::Elements(list) = SetElementList::parse(&attribute)? else {
            continue;
        };
        for item in list {
            let ListAttribute::Element(fields) = item else {
                continue;
            };
            let key = fields.iter().find_map(|field| match field {
                SetElementAttribute::Key(DataAttribute::Value(key)) => Some(key),
                _ => None,
            });
            let element = key.and_then(|key| Element::from_key(set, key));
            elements.push(element.ok_or_else(|| {
                Error::Decode(format!("an element of set {set} has a key of another type"))
            })?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back() {
        for ip in ["10.96.0.10", "fd00::10"] {
            let ip: IpAddr = ip.parse().unwrap();
            let mut elements = vec![Element::Vip(ip)];
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                elements.push(Element::Frontend(FrontendAddr::new(ip, 53, protocol)));
            }
            for element in elements {
                let read = Element::from_key(element.set(), &element.key());
                assert_eq!(read, Some(element));
            }
        }
        assert_eq!(Element::from_key("vips6", &[1, 2, 3, 4]), None);
        assert_eq!(
            Element::from_key("frontends4", &[10, 0, 0, 1, 6, 0, 0, 0]),
            None
        );
    }
}
