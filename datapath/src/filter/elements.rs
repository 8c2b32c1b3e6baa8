//! Elements of the guard's sets, over netlink.

use std::net::IpAddr;

use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_netlink::{Error, Protocol as Netlink, RawMessage, Socket};
use netlink_packet_core::{Emitable as _, NLM_F_CREATE, NlasIterator};
use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, SetElementAttribute, SetElementFlags, SetElementList,
};

/// `NFNL_SUBSYS_NFTABLES << 8`.
pub(super) const NFTABLES: u16 = 10 << 8;

/// `NFT_MSG_*SETELEM`.
const NEW_ELEMENT: u16 = 12;
pub(super) const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

/// `NFPROTO_INET`.
pub(super) const FAMILY_INET: u8 = 1;

/// Length of `struct nfgenmsg`.
pub(super) const HEADER: usize = 4;

/// `NFTA_SET_ELEM_LIST_ELEMENTS`, `NFTA_LIST_ELEM`, `NFTA_SET_ELEM_KEY`, `…_FLAGS`, `NFTA_DATA_VALUE`.
pub(super) const LIST_ELEMENTS: u16 = 3;
pub(super) const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const FLAGS: u16 = 3;
const DATA_VALUE: u16 = 1;

/// `NFT_SET_ELEM_CATCHALL`.
const CATCH_ALL: u32 = 2;

/// Length of `struct nlattr`.
pub(super) const ATTRIBUTE_HEADER: usize = 4;

/// Elements in one message; keeps it far below the 64 kB that an attribute can have.
const MAX_ELEMENTS: usize = 512;

/// Elements in one transaction. It is one datagram, which must fit into the send
/// buffer, also where we may not raise that beyond the usual 208 kB.
const MAX_TRANSACTION: usize = 2048;

/// An element of one of our sets; which one follows from its kind and family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// Of `vips4` or `vips6`.
    Vip(IpAddr),
    /// Of `frontends4` or `frontends6`.
    Frontend(FrontendAddr),
    /// Of `external4` or `external6`.
    External(FrontendAddr),
    /// Of `preserved4` or `preserved6`.
    Preserved(FrontendAddr),
    /// Of `hairpins4` or `hairpins6`: the address as source and as destination.
    Hairpin(IpAddr),
}

/// An element of one of our sets that we never make, and so another's doing: a
/// protocol that Services do not have, a pair of two addresses, or the one that
/// stands for every key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Strange {
    set: &'static str,
    /// `None` for the one that stands for every key.
    key: Option<Vec<u8>>,
}

impl Strange {
    /// The set that it is in.
    #[must_use]
    pub fn set(&self) -> &'static str {
        self.set
    }

    fn attributes(&self) -> Vec<SetElementAttribute> {
        vec![match &self.key {
            Some(key) => SetElementAttribute::Key(DataAttribute::Value(key.clone())),
            None => SetElementAttribute::Flags(SetElementFlags::from_bits_retain(CATCH_ALL)),
        }]
    }
}

/// Our sets, for reading and writing.
#[derive(Debug)]
pub struct Elements {
    socket: Socket,
    table: String,
}

/// All of them.
const SETS: [&str; 10] = [
    "vips4",
    "vips6",
    "frontends4",
    "frontends6",
    "external4",
    "external6",
    "preserved4",
    "preserved6",
    "hairpins4",
    "hairpins6",
];

impl Element {
    pub(super) fn set(&self) -> &'static str {
        match self {
            Self::Vip(IpAddr::V4(_)) => "vips4",
            Self::Vip(IpAddr::V6(_)) => "vips6",
            Self::Frontend(addr) if addr.ip.is_ipv4() => "frontends4",
            Self::Frontend(_) => "frontends6",
            Self::External(addr) if addr.ip.is_ipv4() => "external4",
            Self::External(_) => "external6",
            Self::Preserved(addr) if addr.ip.is_ipv4() => "preserved4",
            Self::Preserved(_) => "preserved6",
            Self::Hairpin(IpAddr::V4(_)) => "hairpins4",
            Self::Hairpin(IpAddr::V6(_)) => "hairpins6",
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
            Self::Hairpin(ip) => octets(*ip).repeat(2),
            Self::Frontend(addr) | Self::External(addr) | Self::Preserved(addr) => {
                let mut key = octets(addr.ip);
                let [high, low] = addr.port.to_be_bytes();
                key.extend([addr.protocol.number(), 0, 0, 0, high, low, 0, 0]);
                key
            }
        }
    }

    /// The key as the program reads it.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Vip(ip) => ip.to_string(),
            Self::Hairpin(ip) => format!("{ip} . {ip}"),
            Self::Frontend(addr) | Self::External(addr) | Self::Preserved(addr) => {
                format!("{} . {} . {}", addr.ip, addr.protocol.number(), addr.port)
            }
        }
    }

    /// `None` for a key that we never make.
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
        if set.starts_with("hairpins") {
            let element = Self::Hairpin(ip);
            return (element.key() == key).then_some(element);
        }
        let protocol = Protocol::from_number(*rest.first()?)?;
        let port = u16::from_be_bytes(*rest.get(4..)?.first_chunk::<2>()?);
        let addr = FrontendAddr::new(ip, port, protocol);
        Some(if set.starts_with("external") {
            Self::External(addr)
        } else if set.starts_with("preserved") {
            Self::Preserved(addr)
        } else {
            Self::Frontend(addr)
        })
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

    /// Every element of our sets, strange ones aside.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete. [`Error::is_not_found`] when
    /// the table or a set does not exist.
    pub async fn list(&self) -> Result<Vec<Element>, Error> {
        self.list_all().await.map(|(elements, _)| elements)
    }

    /// Every element of our sets, and those in them that are another's.
    ///
    /// # Errors
    /// As [`Elements::list`].
    pub async fn list_all(&self) -> Result<(Vec<Element>, Vec<Strange>), Error> {
        let (mut elements, mut strange) = (Vec::new(), Vec::new());
        for set in SETS {
            let question = self.message(GET_ELEMENT, set, &[]);
            for answer in self.socket.dump(question).await? {
                read(set, &answer, &mut elements, &mut strange)?;
            }
        }
        Ok((elements, strange))
    }

    /// Removes what is another's from our sets. What is gone already is fine.
    ///
    /// # Errors
    /// The first refusal.
    pub async fn remove_strange(&self, strange: &[Strange]) -> Result<(), Error> {
        for one in strange {
            let message = self.encode(DELETE_ELEMENT, one.set, vec![one.attributes()]);
            match self.socket.transaction(vec![(message, 0)]).await {
                Err(error) if !error.is_not_found() => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
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

    async fn carry_out(
        &self,
        kind: u16,
        flags: u16,
        elements: &[Element],
    ) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(elements.len());
        for part in elements.chunks(MAX_TRANSACTION) {
            match self.carry_out_part(kind, flags, part).await {
                Ok(part) => results.extend(part),
                Err(error) if error.leaves_doubt() => {
                    // No more is begun.
                    results.resize(elements.len(), Err(error));
                    break;
                }
                Err(error) => results.resize(results.len() + part.len(), Err(error)),
            }
        }
        results
    }

    /// All in one transaction. Where the kernel refuses that, it is asked about
    /// each element on its own, again in one transaction, for each costs
    /// milliseconds; and what it would take is sent once more, without the rest.
    async fn carry_out_part(
        &self,
        kind: u16,
        flags: u16,
        elements: &[Element],
    ) -> Result<Vec<Result<(), Error>>, Error> {
        let together = self.messages(kind, flags, elements);
        match self.socket.transaction(together).await {
            Ok(()) => return Ok(vec![Ok(()); elements.len()]),
            Err(error) if error.leaves_doubt() => return Err(error),
            Err(_refused) => {}
        }
        let each = elements
            .iter()
            .map(|element| (self.message(kind, element.set(), &[*element]), flags));
        let results = self.socket.transaction_each(each.collect()).await?;
        let good: Vec<Element> = elements
            .iter()
            .zip(&results)
            .filter(|(_, result)| result.is_ok())
            .map(|(element, _)| *element)
            .collect();
        if good.len() < elements.len() {
            self.socket
                .transaction(self.messages(kind, flags, &good))
                .await?;
        }
        Ok(results
            .into_iter()
            .map(|result| match result {
                Err(error) if kind == NEW_ELEMENT && error.already_exists() => Ok(()),
                Err(error) if kind == DELETE_ELEMENT && error.is_not_found() => Ok(()),
                other => other,
            })
            .collect())
    }

    /// The elements, set by set.
    fn messages(&self, kind: u16, flags: u16, elements: &[Element]) -> Vec<(RawMessage, u16)> {
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
        messages
    }

    fn message(&self, kind: u16, set: &str, elements: &[Element]) -> RawMessage {
        let keys = elements.iter().map(|element| {
            let key = DataAttribute::Value(element.key());
            vec![SetElementAttribute::Key(key)]
        });
        self.encode(kind, set, keys.collect())
    }

    fn encode(&self, kind: u16, set: &str, elements: Vec<Vec<SetElementAttribute>>) -> RawMessage {
        let mut attributes = vec![
            SetElementList::Table(self.table.clone()),
            SetElementList::Set(set.to_owned()),
        ];
        if !elements.is_empty() {
            let elements = elements.into_iter().map(ListAttribute::Element);
            attributes.push(SetElementList::Elements(elements.collect()));
        }
        let attributes = attributes.as_slice();
        let mut body = vec![0; HEADER + attributes.buffer_len()];
        body[0] = FAMILY_INET;
        attributes.emit(&mut body[HEADER..]);
        RawMessage::new(NFTABLES | kind, body)
    }
}

/// Reads the elements of a message.
///
/// The parser of `netlink-packet-netfilter` writes the whole list into the text of
/// an error that nearly never happens, once for each element: 15 s for 30,000.
fn read(
    set: &'static str,
    answer: &RawMessage,
    elements: &mut Vec<Element>,
    strange: &mut Vec<Strange>,
) -> Result<(), Error> {
    let attributes = answer
        .body
        .get(HEADER..)
        .ok_or_else(|| Error::Decode("a set element message without its header".to_owned()))?;
    for list in nested(attributes, LIST_ELEMENTS) {
        for element in nested(list?, ELEMENT) {
            let element = element?;
            let key = nested(element, KEY).next().transpose()?;
            let Some(key) = key else {
                let flags = nested(element, FLAGS).next().transpose()?;
                let flags = flags.and_then(|flags| flags.try_into().ok());
                if flags.is_none_or(|flags| u32::from_be_bytes(flags) & CATCH_ALL == 0) {
                    return Err(malformed(set));
                }
                #[cfg(feature = "fuzzing")]
                ferrule_model::planted::bug(
                    "netlink-nft",
                    [set.len() > 4, !set.is_empty(), strange.is_empty()],
                );
                strange.push(Strange { set, key: None });
                continue;
            };
            let value = nested(key, DATA_VALUE).next().transpose()?;
            let value = value.filter(|value| value.len() == key_length(set));
            let value = value.ok_or_else(|| malformed(set))?;
            match Element::from_key(set, value) {
                Some(element) => elements.push(element),
                None => strange.push(Strange {
                    set,
                    key: Some(value.to_vec()),
                }),
            }
        }
    }
    Ok(())
}

fn malformed(set: &str) -> Error {
    Error::Decode(format!("an element of set {set} has a key of another type"))
}

/// In bytes, as the set's type says.
fn key_length(set: &str) -> usize {
    let ip = if set.ends_with('4') { 4 } else { 16 };
    match set {
        "vips4" | "vips6" => ip,
        "hairpins4" | "hairpins6" => 2 * ip,
        _ => ip + 8,
    }
}

/// Values of the attributes of a kind.
fn nested(attributes: &[u8], kind: u16) -> impl Iterator<Item = Result<&[u8], Error>> {
    NlasIterator::new(attributes).filter_map(move |attribute| match attribute {
        Ok(attribute) if attribute.kind() == kind => {
            let end = usize::from(attribute.length());
            let value = attribute.into_inner().get(ATTRIBUTE_HEADER..end);
            Some(Ok(value.unwrap_or_default()))
        }
        Ok(_) => None,
        Err(error) => Some(Err(error.into())),
    })
}

/// What is read as an element, written and read again is the same.
#[cfg(feature = "fuzzing")]
pub(super) fn fuzz(set: u8, answer: &RawMessage) {
    let set = SETS[usize::from(set) % SETS.len()];
    let (mut elements, mut strange) = (Vec::new(), Vec::new());
    if read(set, answer, &mut elements, &mut strange).is_err() {
        return;
    }
    assert!(elements.len() + strange.len() <= answer.body.len());
    for element in elements {
        assert_eq!(element.set(), set);
        assert_eq!(Element::from_key(set, &element.key()), Some(element));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_read_back() {
        for ip in ["10.96.0.10", "fd00::10"] {
            let ip: IpAddr = ip.parse().unwrap();
            let mut elements = vec![Element::Vip(ip), Element::Hairpin(ip)];
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let addr = FrontendAddr::new(ip, 53, protocol);
                elements.extend([
                    Element::Frontend(addr),
                    Element::External(addr),
                    Element::Preserved(addr),
                ]);
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

    #[test]
    fn what_cannot_be_read_is_an_error_and_never_fewer_elements() {
        // nfgenmsg, then list { element { key { value 10.96.0.10 } } }.
        let good = [
            1, 0, 0, 0, 20, 0, 3, 0x80, 16, 0, 1, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 10, 96, 0, 10,
        ];
        let read_vips = |body: &[u8]| {
            let mut elements = Vec::new();
            let message = RawMessage::new(0, body.to_vec());
            read("vips4", &message, &mut elements, &mut Vec::new()).map(|()| elements)
        };
        let ip: IpAddr = "10.96.0.10".parse().unwrap();
        assert_eq!(read_vips(&good).unwrap(), [Element::Vip(ip)]);
        for cut in (8..good.len()).step_by(4) {
            assert!(read_vips(&good[..cut]).is_err(), "{cut}");
        }
        // Every length field, too large and too small.
        for place in [4, 8, 12, 16] {
            for length in [0, 3, 4, 255] {
                let mut bad = good;
                bad[place] = length;
                let result = read_vips(&bad);
                let empty_list = place == 4 && length == 4;
                assert!(
                    result.is_err() || empty_list,
                    "{place} {length}: {result:?}"
                );
            }
        }
        let message = RawMessage::new(0, good.to_vec());
        let error = read("frontends4", &message, &mut Vec::new(), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("another type"), "{error}");
    }
}
