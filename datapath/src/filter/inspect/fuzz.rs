//! A way in for the fuzz targets (`fuzz/`): nftables that answer anything.

use super::super::elements;
use super::{
    CHAIN_MOVING, Counters, FAMILY_INET, GENERATION_ID, SET_FLAGS, Table, attributes_of,
    element_hashes, find, hash_without, number, read_counter, rule_hash, table_flags,
};
use ferrule_netlink::RawMessage;
use std::collections::BTreeMap;

/// The table that answers are asked about.
const TABLE: Table<'_> = Table {
    family: FAMILY_INET,
    name: "ferrule",
};

/// Elements of one of our sets.
///
/// # Panics
/// Where something is wrong with the codec.
pub fn elements(set: u8, body: &[u8]) {
    elements::fuzz(set, &message(body));
}

/// Everything else that is asked for.
///
/// # Panics
/// Where something is wrong with the codec.
pub fn table(body: &[u8]) {
    let message = message(body);
    let mut hashes = Vec::new();
    let _refused = element_hashes(&message, &mut hashes);
    assert!(hashes.len() <= body.len());
    let _refused = table_flags(std::slice::from_ref(&message), TABLE);
    let mut counters = Counters::new();
    if read_counter(&message, TABLE, &mut counters).is_ok() {
        assert!(counters.len() <= 1);
    }
    let Ok(attributes) = attributes_of(&message) else {
        return;
    };
    for kind in [GENERATION_ID, SET_FLAGS] {
        let _refused = find(attributes, kind).and_then(|value| value.map(number).transpose());
    }
    if let Ok(Some(attributes)) = TABLE.attributes(&message) {
        let none = BTreeMap::new();
        let rule = rule_hash(attributes, &none);
        let chain = hash_without(attributes, &CHAIN_MOVING);
        // Both look at every attribute, so that both find what is malformed in the frame.
        assert!(rule.is_err() || chain.is_ok());
    }
}

fn message(body: &[u8]) -> RawMessage {
    RawMessage {
        message_type: 0,
        body: body.to_vec(),
    }
}
