//! What our table looks like, over netlink: whether it is still what was loaded,
//! and what its counters say.
//!
//! Everything is compared as the bytes that the kernel dumps: nothing here knows
//! what a rule means, so a rule of any kind is seen. It reads and changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use ferrule_netlink::{Error, RawMessage, Socket};
use netlink_packet_core::{DefaultNla, Emitable as _, NlasIterator};
use sha2::{Digest as _, Sha256};

use super::elements::{
    ATTRIBUTE_HEADER, ELEMENT, FAMILY_ARP, FAMILY_INET, GET_ELEMENT, HEADER, LIST_ELEMENTS,
    NFTABLES,
};

/// `NFT_MSG_*` of `linux/netfilter/nf_tables.h`.
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
const GET_RULE: u16 = 7;
const GET_SET: u16 = 10;
const GET_GENERATION: u16 = 16;
const GET_OBJECT: u16 = 19;

/// `NFTA_GEN_ID`.
const GENERATION_ID: u16 = 1;

/// `NFTA_TABLE_NAME`, and the same number in chains, rules, sets, elements and objects.
const TABLE: u16 = 1;

/// `NFTA_TABLE_FLAGS`.
const TABLE_FLAGS: u16 = 2;

/// `NFTA_CHAIN_NAME`.
const CHAIN_NAME: u16 = 3;

/// `NFTA_CHAIN_HANDLE`, `…_USE`, `…_COUNTERS`, `…_PAD`, `…_ID`: they change with
/// packets, with rules that refer to the chain, or with each load.
const CHAIN_MOVING: [u16; 5] = [2, 6, 8, 9, 11];

/// `NFTA_RULE_CHAIN`, `NFTA_RULE_EXPRESSIONS`.
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;

/// `NFTA_RULE_HANDLE`, `…_POSITION`, `…_PAD`, `…_ID`, `…_POSITION_ID`. The order of
/// the dump says what the position would.
const RULE_MOVING: [u16; 5] = [3, 6, 8, 9, 10];

/// `NFTA_SET_NAME`, `NFTA_SET_FLAGS`.
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;

/// `NFT_SET_ANONYMOUS`: a set that a rule holds in itself, as `{ tcp, udp }`.
const SET_ANONYMOUS: u32 = 1;

/// `NFTA_SET_ID`, `…_PAD`, `…_HANDLE`, and since 6.16 `…_TYPE` (the kernel's own
/// choice of a data structure) and `…_COUNT` (of elements).
const SET_MOVING: [u16; 5] = [10, 14, 16, 19, 20];

/// `NFTA_SET_ELEM_EXPR`, `…_EXPRESSIONS`.
const ELEMENT_EXPRESSION: u16 = 7;
const ELEMENT_EXPRESSIONS: u16 = 11;

/// `NFTA_SET_ELEM_EXPIRATION`, `…_PAD`.
const ELEMENT_MOVING: [u16; 2] = [5, 8];

/// `NFTA_EXPR_NAME`, `NFTA_EXPR_DATA`.
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;

/// Expressions whose data are what packets left behind, and nothing else.
const EXPRESSIONS_MOVING: [&str; 2] = ["counter", "last"];

/// Expressions that name a set, and the attribute: `NFTA_LOOKUP_SET`, `NFTA_OBJREF_SET_NAME`.
const EXPRESSIONS_WITH_SET: [(&str, u16); 2] = [("lookup", 1), ("objref", 4)];

/// `NFTA_OBJ_NAME`, `NFTA_OBJ_TYPE`, `NFTA_OBJ_DATA`.
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;

/// `NFT_OBJECT_COUNTER`.
const COUNTER: u32 = 1;

/// `NFTA_COUNTER_BYTES`, `NFTA_COUNTER_PACKETS`.
const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// How often a look is begun anew when nftables change meanwhile.
const ATTEMPTS: u32 = 5;

type Hash = [u8; 32];

/// Packets and bytes of counters, by their names.
type Counters = BTreeMap<String, (u64, u64)>;

/// A table without what changes by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableState {
    /// Over the table's flags, chains, sets and rules. Loading the same text
    /// again leaves it as it is, and so do elements of named sets, packets and
    /// counters; any other rule, order of rules, chain, policy or set does not.
    /// It is compared on one running kernel only: another dumps other bytes.
    pub fingerprint: [u8; 32],
    /// Names of all its chains, sorted.
    pub chains: Vec<String>,
}

/// The number of the last change to nftables, by whomever, in the socket's
/// network namespace. Asking costs next to nothing.
///
/// # Errors
/// [`Error`].
pub async fn generation(socket: &Socket) -> Result<u32, Error> {
    for answer in socket
        .request(question(FAMILY_INET, GET_GENERATION, &[]), 0)
        .await?
    {
        if let Some(id) = find(attributes_of(&answer)?, GENERATION_ID)? {
            return number(id);
        }
    }
    Err(Error::Decode("a generation without its number".to_owned()))
}

/// The table `name` of family `inet` with the one of family `arp`, or `None` when
/// the first is not there. They are seen as of one moment: where others change nftables meanwhile,
/// they are looked at anew.
///
/// # Errors
/// [`Error`]; [`Error::Interrupted`] when others change nftables all the time.
pub async fn table(socket: &Socket, name: &str) -> Result<Option<TableState>, Error> {
    for _ in 0..ATTEMPTS {
        let before = generation(socket).await?;
        let seen = look_at_both(socket, name).await;
        if seen.as_ref().is_err_and(Error::leaves_doubt) {
            return seen;
        }
        // A refusal as well may come from what was removed while we looked.
        if generation(socket).await? == before {
            return seen;
        }
    }
    Err(Error::Interrupted(ATTEMPTS))
}

/// Packets and bytes of each named counter of the table `name` of family `inet`.
/// A table that does not exist has none.
///
/// # Errors
/// [`Error`]; what is returned is complete.
pub async fn counters(socket: &Socket, name: &str) -> Result<Counters, Error> {
    let table = Table {
        family: FAMILY_INET,
        name,
    };
    let kind = DefaultNla::new(OBJECT_TYPE, COUNTER.to_be_bytes().to_vec());
    let question = table.question(GET_OBJECT, &[table.this(), kind]);
    let mut counters = BTreeMap::new();
    for answer in socket.dump(question).await? {
        read_counter(&answer, table, &mut counters)?;
    }
    Ok(counters)
}

/// What is another's, or no counter, is left out.
fn read_counter(
    answer: &RawMessage,
    table: Table<'_>,
    counters: &mut Counters,
) -> Result<(), Error> {
    let Some(attributes) = table.attributes(answer)? else {
        return Ok(());
    };
    if number(required(attributes, OBJECT_TYPE)?)? != COUNTER {
        return Ok(());
    }
    let data = required(attributes, OBJECT_DATA)?;
    let value = |kind| {
        let bytes = required(data, kind)?.try_into();
        bytes
            .map(u64::from_be_bytes)
            .map_err(|_| Error::Decode("the value of a counter is no 64-bit number".to_owned()))
    };
    let name = text(required(attributes, OBJECT_NAME)?)?.to_owned();
    counters.insert(name, (value(COUNTER_PACKETS)?, value(COUNTER_BYTES)?));
    Ok(())
}

async fn look_at_both(socket: &Socket, name: &str) -> Result<Option<TableState>, Error> {
    let of_family = |family| Table { family, name };
    let Some(mut state) = look(socket, of_family(FAMILY_INET)).await? else {
        return Ok(None);
    };
    let arp = look(socket, of_family(FAMILY_ARP)).await?;
    let mut whole = Canonical::default();
    whole.put(FAMILY_INET.into(), &state.fingerprint);
    if let Some(arp) = arp {
        whole.put(FAMILY_ARP.into(), &arp.fingerprint);
    }
    state.fingerprint = whole.finish();
    Ok(Some(state))
}

/// Reads a table as it is while the dumps go on.
async fn look(socket: &Socket, table: Table<'_>) -> Result<Option<TableState>, Error> {
    let of_this = [table.this()];
    let flags = match socket.request(table.question(GET_TABLE, &of_this), 0).await {
        Ok(answers) => table_flags(&answers, table)?,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut chains = BTreeMap::new();
    for answer in socket.dump(table.question(GET_CHAIN, &[])).await? {
        if let Some(attributes) = table.attributes(&answer)? {
            let chain = text(required(attributes, CHAIN_NAME)?)?;
            chains.insert(chain.to_owned(), hash_without(attributes, &CHAIN_MOVING)?);
        }
    }
    let (sets, anonymous) = sets(socket, table).await?;
    let mut rules: BTreeMap<String, Vec<Hash>> = BTreeMap::new();
    for answer in socket.dump(table.question(GET_RULE, &of_this)).await? {
        if let Some(attributes) = table.attributes(&answer)? {
            let chain = text(required(attributes, RULE_CHAIN)?)?.to_owned();
            let rule = rule_hash(attributes, &anonymous)?;
            rules.entry(chain).or_default().push(rule);
        }
    }
    let mut whole = Canonical::default();
    whole.put(TABLE, &flags);
    whole.put_all(GET_CHAIN, chains.values());
    whole.put_all(GET_SET, &sets);
    for (chain, rules) in &rules {
        whole.put(RULE_CHAIN, chain.as_bytes());
        whole.put_all(GET_RULE, rules);
    }
    Ok(Some(TableState {
        fingerprint: whole.finish(),
        chains: chains.into_keys().collect(),
    }))
}

/// The hashes of the named sets, and for each anonymous set its hash by its name.
///
/// The kernel names anonymous sets by the next free number, which depends on what
/// else was there when the rule was added, so a rule with one is known by what is
/// in it. That never changes while the set exists.
async fn sets(
    socket: &Socket,
    table: Table<'_>,
) -> Result<(BTreeSet<Hash>, BTreeMap<String, Hash>), Error> {
    let of_this = [table.this()];
    let mut named = BTreeSet::new();
    let mut anonymous = BTreeMap::new();
    for answer in socket.dump(table.question(GET_SET, &of_this)).await? {
        let Some(attributes) = table.attributes(&answer)? else {
            continue;
        };
        let flags = find(attributes, SET_FLAGS)?.map(number).transpose()?;
        if flags.unwrap_or(0) & SET_ANONYMOUS == 0 {
            named.insert(hash_without(attributes, &SET_MOVING)?);
            continue;
        }
        let name = text(required(attributes, SET_NAME)?)?;
        let mut skipped = SET_MOVING.to_vec();
        skipped.push(SET_NAME);
        let of_set = [table.this(), DefaultNla::new(SET_NAME, terminated(name))];
        let mut elements = Vec::new();
        for answer in socket.dump(table.question(GET_ELEMENT, &of_set)).await? {
            element_hashes(&answer, &mut elements)?;
        }
        elements.sort_unstable();
        let mut whole = Canonical::default();
        whole.put(GET_SET, &hash_without(attributes, &skipped)?);
        whole.put_all(ELEMENT, &elements);
        anonymous.insert(name.to_owned(), whole.finish());
    }
    Ok((named, anonymous))
}

/// A table that is dormant has every chain and guards nothing.
fn table_flags(answers: &[RawMessage], table: Table<'_>) -> Result<[u8; 4], Error> {
    for answer in answers {
        if let Some(attributes) = table.attributes(answer)? {
            return number(required(attributes, TABLE_FLAGS)?).map(u32::to_be_bytes);
        }
    }
    Err(Error::Decode(format!(
        "no answer about table {}",
        table.name
    )))
}

/// All attributes but some.
fn hash_without(attributes: &[u8], skipped: &[u16]) -> Result<Hash, Error> {
    let mut whole = Canonical::default();
    for attribute in each(attributes) {
        let (kind, value) = attribute?;
        if !skipped.contains(&kind) {
            whole.put(kind, value);
        }
    }
    Ok(whole.finish())
}

fn rule_hash(attributes: &[u8], anonymous: &BTreeMap<String, Hash>) -> Result<Hash, Error> {
    let mut whole = Canonical::default();
    for attribute in each(attributes) {
        match attribute? {
            (RULE_EXPRESSIONS, list) => {
                whole.put(RULE_EXPRESSIONS, &expressions_hash(list, anonymous)?);
            }
            (kind, _) if RULE_MOVING.contains(&kind) => {}
            (kind, value) => whole.put(kind, value),
        }
    }
    Ok(whole.finish())
}

fn element_hashes(answer: &RawMessage, hashes: &mut Vec<Hash>) -> Result<(), Error> {
    let Some(elements) = find(attributes_of(answer)?, LIST_ELEMENTS)? else {
        return Ok(());
    };
    let none = BTreeMap::new();
    for element in each(elements) {
        let (_, attributes) = element?;
        let mut whole = Canonical::default();
        for attribute in each(attributes) {
            match attribute? {
                (ELEMENT_EXPRESSION, expression) => {
                    whole.put(ELEMENT_EXPRESSION, &expression_hash(expression, &none)?);
                }
                (ELEMENT_EXPRESSIONS, list) => {
                    whole.put(ELEMENT_EXPRESSIONS, &expressions_hash(list, &none)?);
                }
                (kind, _) if ELEMENT_MOVING.contains(&kind) => {}
                (kind, value) => whole.put(kind, value),
            }
        }
        hashes.push(whole.finish());
    }
    Ok(())
}

fn expressions_hash(list: &[u8], anonymous: &BTreeMap<String, Hash>) -> Result<Hash, Error> {
    let mut whole = Canonical::default();
    for expression in each(list) {
        let (kind, expression) = expression?;
        whole.put(kind, &expression_hash(expression, anonymous)?);
    }
    Ok(whole.finish())
}

fn expression_hash(expression: &[u8], anonymous: &BTreeMap<String, Hash>) -> Result<Hash, Error> {
    let name = text(required(expression, EXPRESSION_NAME)?)?;
    let mut whole = Canonical::default();
    whole.put(EXPRESSION_NAME, name.as_bytes());
    let data = find(expression, EXPRESSION_DATA)?.unwrap_or_default();
    let set = EXPRESSIONS_WITH_SET.iter().find(|(with, _)| *with == name);
    if let Some((_, set)) = set {
        for attribute in each(data) {
            match attribute? {
                (kind, value) if kind == *set => {
                    let hash = anonymous.get(text(value)?);
                    whole.put(kind, hash.map_or(value, Hash::as_slice));
                }
                (kind, value) => whole.put(kind, value),
            }
        }
    } else if !EXPRESSIONS_MOVING.contains(&name) {
        whole.put(EXPRESSION_DATA, data);
    }
    Ok(whole.finish())
}

/// A hash over pieces, each told apart from the next.
#[derive(Default)]
struct Canonical(Sha256);

impl Canonical {
    fn put(&mut self, kind: u16, value: &[u8]) {
        self.0.update(kind.to_be_bytes());
        self.0.update(value.len().to_be_bytes());
        self.0.update(value);
    }

    fn put_all<'a>(&mut self, kind: u16, hashes: impl IntoIterator<Item = &'a Hash>) {
        let mut all = Self::default();
        for hash in hashes {
            all.put(kind, hash);
        }
        self.put(kind, &all.finish());
    }

    fn finish(self) -> Hash {
        self.0.finalize().into()
    }
}

fn question(family: u8, kind: u16, attributes: &[DefaultNla]) -> RawMessage {
    let mut body = vec![0; HEADER + attributes.buffer_len()];
    body[0] = family;
    attributes.emit(&mut body[HEADER..]);
    RawMessage::new(NFTABLES | kind, body)
}

fn attributes_of(answer: &RawMessage) -> Result<&[u8], Error> {
    let attributes = answer.body.get(HEADER..);
    attributes.ok_or_else(|| Error::Decode("an nftables message without its header".to_owned()))
}

/// One of our two tables.
#[derive(Clone, Copy)]
struct Table<'a> {
    family: u8,
    name: &'a str,
}

impl Table<'_> {
    /// The attribute that asks about what is in it.
    fn this(&self) -> DefaultNla {
        DefaultNla::new(TABLE, terminated(self.name))
    }

    fn question(&self, kind: u16, attributes: &[DefaultNla]) -> RawMessage {
        question(self.family, kind, attributes)
    }

    /// The attributes of what belongs to it, `None` for what belongs to another: not
    /// every kernel keeps to the table that was asked about.
    fn attributes<'a>(&self, answer: &'a RawMessage) -> Result<Option<&'a [u8]>, Error> {
        let attributes = attributes_of(answer)?;
        let same_family = answer.body.first() == Some(&self.family);
        let ours = text(required(attributes, TABLE)?)? == self.name;
        Ok((same_family && ours).then_some(attributes))
    }
}

/// Kind and value of each attribute.
fn each(attributes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Error>> {
    NlasIterator::new(attributes).map(|attribute| {
        let attribute = attribute?;
        let end = usize::from(attribute.length());
        let value = attribute.into_inner().get(ATTRIBUTE_HEADER..end);
        Ok((attribute.kind(), value.unwrap_or_default()))
    })
}

/// The first attribute of a kind. What follows it is read as well, so that what
/// is malformed is always found.
fn find(attributes: &[u8], wanted: u16) -> Result<Option<&[u8]>, Error> {
    let mut found = None;
    for attribute in each(attributes) {
        let (kind, value) = attribute?;
        if kind == wanted && found.is_none() {
            found = Some(value);
        }
    }
    Ok(found)
}

fn required(attributes: &[u8], kind: u16) -> Result<&[u8], Error> {
    find(attributes, kind)?
        .ok_or_else(|| Error::Decode(format!("an nftables message without its attribute {kind}")))
}

fn number(value: &[u8]) -> Result<u32, Error> {
    let bytes = value.try_into();
    bytes
        .map(u32::from_be_bytes)
        .map_err(|_| Error::Decode("an nftables attribute is no 32-bit number".to_owned()))
}

fn text(value: &[u8]) -> Result<&str, Error> {
    let value = value.strip_suffix(&[0]).unwrap_or(value);
    std::str::from_utf8(value)
        .map_err(|_| Error::Decode("a name in nftables is no UTF-8".to_owned()))
}

fn terminated(name: &str) -> Vec<u8> {
    name.bytes().chain([0]).collect()
}

#[cfg(feature = "fuzzing")]
pub mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> Table<'_> {
        Table {
            family: FAMILY_INET,
            name,
        }
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let attribute = DefaultNla::new(kind, value.to_vec());
        let mut bytes = vec![0; attribute.buffer_len()];
        attribute.emit(&mut bytes);
        bytes
    }

    fn expression(name: &str, data: &[u8]) -> Vec<u8> {
        let mut inner = attribute(EXPRESSION_NAME, &terminated(name));
        inner.extend(attribute(EXPRESSION_DATA, data));
        attribute(ELEMENT, &inner)
    }

    fn rule(expressions: &[u8]) -> Vec<u8> {
        let mut bytes = attribute(TABLE, b"t\0");
        bytes.extend(attribute(RULE_CHAIN, b"c\0"));
        bytes.extend(attribute(3, &[0, 0, 0, 0, 0, 0, 0, 9]));
        bytes.extend(attribute(RULE_EXPRESSIONS, expressions));
        bytes
    }

    #[test]
    fn what_packets_change_is_left_out_and_nothing_else() {
        let none = BTreeMap::new();
        let hash =
            |name: &str, data: &[u8]| rule_hash(&rule(&expression(name, data)), &none).unwrap();
        assert_eq!(hash("counter", &[1; 8]), hash("counter", &[2; 8]));
        assert_ne!(hash("counter", &[1; 8]), hash("last", &[1; 8]));
        assert_ne!(hash("meta", &[1; 8]), hash("meta", &[2; 8]));
        let lookup = |set: &[u8]| attribute(1, set);
        let anonymous = |name: &str, hash: u8| BTreeMap::from([(name.to_owned(), [hash; 32])]);
        let hash = |set: &[u8], anonymous| {
            rule_hash(&rule(&expression("lookup", &lookup(set))), &anonymous).unwrap()
        };
        let first = hash(b"__set0\0", anonymous("__set0", 1));
        assert_eq!(first, hash(b"__set1\0", anonymous("__set1", 1)));
        assert_ne!(first, hash(b"__set0\0", anonymous("__set0", 2)));
        assert_ne!(hash(b"a\0", BTreeMap::new()), hash(b"b\0", BTreeMap::new()));
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let good = rule(&expression("lookup", &attribute(1, b"__set0\0")));
        let none = BTreeMap::new();
        assert!(rule_hash(&good, &none).is_ok());
        // Every byte that could be a length, too large and too small.
        for place in 0..good.len() {
            for value in [0, 3, 255] {
                let mut bad = good.clone();
                bad[place] = value;
                // No panic, and what is malformed in its frame is refused.
                let result = rule_hash(&bad, &none);
                if place == 0 {
                    assert!(result.is_err(), "{value}");
                }
            }
        }
        for cut in 1..good.len() {
            // Behind an attribute, with its padding or without.
            let behind = [6, 7, 8, 14, 15, 16, 28].contains(&cut);
            assert_eq!(rule_hash(&good[..cut], &none).is_ok(), behind, "{cut}");
        }
        for body in [&[1, 0][..], &[1, 0, 0, 0], &[1, 0, 0, 0, 9, 0, 1, 0]] {
            let message = RawMessage {
                message_type: 0,
                body: body.to_vec(),
            };
            assert!(table("t").attributes(&message).is_err(), "{body:?}");
            let counter = read_counter(&message, table("t"), &mut Counters::new());
            assert!(counter.is_err(), "{body:?}");
        }
    }

    #[test]
    fn a_counter_is_read_whole_or_not_at_all() {
        let number = |kind, number: u64| attribute(kind, &number.to_be_bytes());
        let object = |parts: &[Vec<u8>]| RawMessage {
            message_type: 0,
            body: [vec![FAMILY_INET, 0, 0, 0], parts.concat()].concat(),
        };
        let data = [number(COUNTER_BYTES, 840), number(COUNTER_PACKETS, 10)].concat();
        let parts = [
            attribute(TABLE, b"t\0"),
            attribute(OBJECT_NAME, b"refused\0"),
            attribute(OBJECT_TYPE, &COUNTER.to_be_bytes()),
            attribute(OBJECT_DATA, &data),
        ];
        let read = |parts: &[Vec<u8>], table| {
            let mut counters = Counters::new();
            read_counter(&object(parts), table, &mut counters).map(|()| counters)
        };
        let expected = Counters::from([("refused".to_owned(), (10, 840))]);
        assert_eq!(read(&parts, table("t")).unwrap(), expected);
        assert!(read(&parts, table("other")).unwrap().is_empty());
        for missing in 0..parts.len() {
            let mut parts = parts.to_vec();
            parts.remove(missing);
            assert!(read(&parts, table("t")).is_err(), "{missing}");
        }
        let short = attribute(OBJECT_DATA, &attribute(COUNTER_BYTES, &[1, 2, 3, 4]));
        let parts = [&parts[..3], &[short]].concat();
        assert!(read(&parts, table("t")).is_err());
    }
}
