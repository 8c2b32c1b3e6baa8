//! Elements of the guard's sets, over netlink.

use ferrule_model::address::Family;
use ferrule_netlink::{Error, Protocol as Netlink, RawMessage, Socket};
use netlink_packet_core::{DefaultNla, Emitable as _, NLM_F_CREATE, NlasIterator};
use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, SetElementAttribute, SetElementFlags, SetElementList,
};

use super::element::{Element, SILENT, Swap, key_length};

/// `NFNL_SUBSYS_NFTABLES << 8`.
pub(super) const NFTABLES: u16 = 10 << 8;

/// `NFT_MSG_*SETELEM`.
const NEW_ELEMENT: u16 = 12;
pub(super) const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

/// `NFPROTO_INET`, `NFPROTO_ARP`.
pub(super) const FAMILY_INET: u8 = 1;
pub(super) const FAMILY_ARP: u8 = 3;

/// Length of `struct nfgenmsg`.
pub(super) const HEADER: usize = 4;

/// `NFTA_SET_ELEM_LIST_ELEMENTS`, `NFTA_LIST_ELEM`, `NFTA_SET_ELEM_KEY`, `…_DATA`,
/// `…_KEY_END`, `…_FLAGS`,
/// `NFTA_DATA_VALUE`.
pub(super) const LIST_ELEMENTS: u16 = 3;
pub(super) const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const DATA: u16 = 2;
const KEY_END: u16 = 10;
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

/// An element of one of our sets that we never make, and so another's doing: a
/// protocol that Services do not have, a pair of two addresses, or the one that
/// stands for every key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Strange {
    set: &'static str,
    /// `None` for the one that stands for every key.
    key: Option<Vec<u8>>,
    /// The end of its interval.
    end: Option<Vec<u8>>,
}

impl Strange {
    /// The set that it is in.
    #[must_use]
    pub fn set(&self) -> &'static str {
        self.set
    }

    fn attributes(&self) -> Vec<SetElementAttribute> {
        match &self.key {
            Some(key) => key_attributes(key.clone(), self.end.clone()),
            None => vec![SetElementAttribute::Flags(
                SetElementFlags::from_bits_retain(CATCH_ALL),
            )],
        }
    }
}

/// Our sets, for reading and writing.
#[derive(Debug)]
pub struct Elements {
    socket: Socket,
    table: String,
}

/// The family of the table that has a set.
pub(super) fn family_of(set: &str) -> u8 {
    if set == SILENT {
        FAMILY_ARP
    } else {
        FAMILY_INET
    }
}

/// All of them.
const SETS: [&str; 25] = [
    "vips4",
    "vips6",
    SILENT,
    "frontends4",
    "frontends6",
    "external4",
    "external6",
    "preserved4",
    "preserved6",
    "dropped4",
    "dropped6",
    "leaving4",
    "leaving6",
    "closed4",
    "closed6",
    "served4",
    "served6",
    "limited4",
    "limited6",
    "admitted4",
    "admitted6",
    "marks4",
    "marks6",
    "hairpins4",
    "hairpins6",
];

fn attributes(element: &Element) -> Vec<SetElementAttribute> {
    let mut attributes = key_attributes(element.key(), element.key_end());
    if let Some(data) = element.data() {
        attributes.push(SetElementAttribute::Data(DataAttribute::Value(data)));
    }
    attributes
}

fn key_attributes(key: Vec<u8>, end: Option<Vec<u8>>) -> Vec<SetElementAttribute> {
    let mut attributes = vec![SetElementAttribute::Key(DataAttribute::Value(key))];
    if let Some(end) = end {
        // In the crate's type this attribute holds attributes of any kind.
        let end = DefaultNla::new(DATA_VALUE, end);
        attributes.push(SetElementAttribute::KeyEnd(vec![end]));
    }
    attributes
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

    /// Which of these elements are there: those that have the key, whatever else they say.
    /// The cost is that of the question, however large the sets are.
    ///
    /// # Errors
    /// As [`Elements::list`], save that an element that is not there is no error.
    pub async fn find(&self, keys: &[Element]) -> Result<Vec<Element>, Error> {
        let mut elements = Vec::new();
        for key in keys {
            let question = self.message(GET_ELEMENT, key.set(), &[*key]);
            match self.socket.request(question, 0).await {
                Ok(answers) => {
                    for answer in answers {
                        read(key.set(), &answer, &mut elements, &mut Vec::new())?;
                    }
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(elements)
    }

    /// Who may call the frontends of a family that are limited; nobody, if there is no such set.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn list_admitted(&self, family: Family) -> Result<Vec<Element>, Error> {
        let set = match family {
            Family::IPv4 => "admitted4",
            Family::IPv6 => "admitted6",
        };
        let question = self.message(GET_ELEMENT, set, &[]);
        let answers = match self.socket.dump(question).await {
            Ok(answers) => answers,
            Err(error) if error.is_not_found() => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut elements = Vec::new();
        for answer in answers {
            read(set, &answer, &mut elements, &mut Vec::new())?;
        }
        Ok(elements)
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

    /// Each swap is one transaction; the i-th result is that of the i-th swap. An
    /// element to remove that is gone, or one to add that overlaps another, fails the
    /// whole: then the kernel is not as the caller believes.
    pub async fn swap(&self, swaps: &[Swap]) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(swaps.len());
        for swap in swaps {
            let mut messages = self.messages(DELETE_ELEMENT, 0, &swap.remove);
            messages.extend(self.messages(NEW_ELEMENT, NLM_F_CREATE, &swap.add));
            results.push(self.socket.transaction(messages).await);
        }
        results
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
        let keys = elements.iter().map(attributes);
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
        body[0] = family_of(set);
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
                strange.push(Strange {
                    set,
                    key: None,
                    end: None,
                });
                continue;
            };
            let value = nested(key, DATA_VALUE).next().transpose()?;
            let value = value.filter(|value| value.len() == key_length(set));
            let value = value.ok_or_else(|| malformed(set))?;
            let value_of = |kind| match nested(element, kind).next().transpose()? {
                Some(data) => nested(data, DATA_VALUE).next().transpose(),
                None => Ok(None),
            };
            let end = value_of(KEY_END)?;
            match Element::from_key(set, value, end.or(value_of(DATA)?)) {
                Some(element) => elements.push(element),
                None => strange.push(Strange {
                    set,
                    key: Some(value.to_vec()),
                    end: end.map(<[u8]>::to_vec),
                }),
            }
        }
    }
    Ok(())
}

fn malformed(set: &str) -> Error {
    Error::Decode(format!("an element of set {set} has a key of another type"))
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
        let more = element.key_end().or(element.data());
        let read = Element::from_key(set, &element.key(), more.as_deref());
        assert_eq!(read, Some(element));
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ferrule_model::address::{Family, FrontendAddr, Protocol};
    use ferrule_model::ownership::MARK_BASE;
    use ipnetwork::IpNetwork;

    use super::*;

    #[test]
    fn keys_read_back() {
        for ip in ["10.96.0.10", "fd00::10"] {
            let ip: IpAddr = ip.parse().unwrap();
            let mut elements = vec![Element::Vip(ip), Element::Hairpin(ip)];
            if ip.is_ipv4() {
                elements.push(Element::Silent(ip));
            }
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let addr = FrontendAddr::new(ip, 53, protocol);
                elements.extend([
                    Element::Frontend(addr),
                    Element::External(addr),
                    Element::Preserved(addr),
                    Element::Dropped(addr),
                    Element::Limited(addr),
                    Element::Served(addr),
                    Element::Marked(addr, MARK_BASE | 7),
                ]);
                for prefix in 0..=Family::of(ip).bits() {
                    let network = IpNetwork::new(ip, prefix).unwrap();
                    let network = IpNetwork::new(network.network(), prefix).unwrap();
                    elements.push(Element::Admitted(addr, network));
                }
            }
            for element in elements {
                let more = element.key_end().or(element.data());
                let read = Element::from_key(element.set(), &element.key(), more.as_deref());
                assert_eq!(read, Some(element));
            }
        }
        assert_eq!(Element::from_key("vips6", &[1, 2, 3, 4], None), None);
        assert_eq!(
            Element::from_key("frontends4", &[10, 0, 0, 1, 6, 0, 0, 0], None),
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
