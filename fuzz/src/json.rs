//! Changes to JSON that leave it JSON: changes to bytes alone rarely get past the
//! parser of the text to those of its fields.

use serde_json::{Map, Value, json};

/// Fields that the parsers know.
const FIELDS: [&str; 44] = [
    "address",
    "addresses",
    "annotations",
    "answer",
    "apiVersion",
    "attachment",
    "call",
    "capabilities",
    "clusterIP",
    "clusterIPs",
    "cniVersion",
    "code",
    "conditions",
    "continue",
    "dst",
    "endpoints",
    "gw",
    "interface",
    "interfaces",
    "ips",
    "items",
    "k8s.io/initial-events-end",
    "kind",
    "labels",
    "mac",
    "message",
    "metadata",
    "mtu",
    "name",
    "namespace",
    "next",
    "object",
    "pod",
    "podCIDRs",
    "port",
    "ports",
    "prevResult",
    "reason",
    "resourceVersion",
    "routes",
    "rows",
    "spec",
    "type",
    "version",
];

/// Texts that mean something to one of them.
const TEXTS: [&str; 16] = [
    "",
    "true",
    "10.96.0.10",
    "fd00::7/128",
    "0.0.0.0/0",
    "1.1.0",
    "0.4.0",
    "eth0",
    "v1",
    "List",
    "Service",
    "TCP",
    "BOOKMARK",
    "MODIFIED",
    "None",
    "2024-01-02T03:04:05Z",
];

/// Numbers, repeatable by their seed (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        usize::try_from(bits % end.max(1) as u64).unwrap_or(0)
    }

    fn of<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }
}

/// Changes one value of one line. `None` where no JSON is, or it would not fit.
pub(crate) fn mutate(data: &mut [u8], size: usize, most: usize, seed: u32) -> Option<usize> {
    let mut chance = Chance(seed.into());
    let whole = data.get(..size)?;
    // Some targets have a byte in front that chooses.
    let start = usize::from(whole.first().is_some_and(|byte| *byte < 4));
    let (front, text) = whole.split_at(start);
    let lines: Vec<&[u8]> = text.split(|byte| *byte == b'\n').collect();
    let chosen = chance.below(lines.len());
    let mut value: Value = serde_json::from_slice(lines[chosen]).ok()?;
    for _ in 0..=chance.below(3) {
        change(&mut value, &mut chance);
    }
    let line = serde_json::to_vec(&value).ok()?;
    let mut lines = lines;
    lines[chosen] = &line;
    let made = [front, &lines.join(&b'\n')].concat();
    if made.len() > most {
        return None;
    }
    data.get_mut(..made.len())?.copy_from_slice(&made);
    Some(made.len())
}

fn change(value: &mut Value, chance: &mut Chance) {
    let count = nodes(value);
    let other = chance.below(count);
    let other = nth(value, other).cloned().unwrap_or_default();
    let at = chance.below(count);
    let Some(node) = nth(value, at) else {
        return;
    };
    match (chance.below(4), node) {
        (0, node) => *node = other,
        (1, node) => *node = fresh(chance),
        (2, Value::Array(values)) if !values.is_empty() => {
            let index = chance.below(values.len());
            values.remove(index);
        }
        (_, Value::Array(values)) => {
            let index = chance.below(values.len() + 1);
            values.insert(index, other);
        }
        (2, Value::Object(fields)) if !fields.is_empty() => {
            let index = chance.below(fields.len());
            let name = fields.keys().nth(index).cloned();
            fields.remove(&name.unwrap_or_default());
        }
        (_, Value::Object(fields)) => {
            let value = if chance.below(2) == 0 {
                other
            } else {
                fresh(chance)
            };
            fields.insert(chance.of(&FIELDS).to_owned(), value);
        }
        (_, Value::String(text)) => *text = changed(text, chance),
        (_, Value::Number(number)) => {
            let old = number.as_i64().unwrap_or(0);
            let by = [1, -1, old, 1 << 16, -(old / 2), i64::MAX][chance.below(6)];
            *number = old.wrapping_add(by).into();
        }
        (_, node) => *node = fresh(chance),
    }
}

fn fresh(chance: &mut Chance) -> Value {
    match chance.below(9) {
        0 => Value::Null,
        1 => json!(chance.below(2) == 0),
        2 => json!([0, 1, 80, 65_535, 65_536, u64::MAX][chance.below(6)]),
        3 => json!([-1, i64::MIN][chance.below(2)]),
        4 => json!([0.5, 1e300][chance.below(2)]),
        5 => json!([]),
        6 => Value::Object(Map::new()),
        _ => json!(chance.of(&TEXTS)),
    }
}

/// A few bytes of a text more, less or others.
fn changed(text: &str, chance: &mut Chance) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let size = bytes.len();
    bytes.resize(size + 1 + chance.below(16), 0);
    let most = bytes.len();
    let size = libfuzzer_sys::fuzzer_mutate(&mut bytes, size, most);
    bytes.truncate(size);
    String::from_utf8_lossy(&bytes).into_owned()
}

fn children(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    }
}

fn nodes(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(nodes).sum(),
        Value::Object(fields) => fields.values().map(nodes).sum(),
        _ => 0,
    }
}

/// The value at a place, counted from the outside in.
fn nth(value: &mut Value, place: usize) -> Option<&mut Value> {
    let Some(mut place) = place.checked_sub(1) else {
        return Some(value);
    };
    for child in children(value) {
        let within = nodes(child);
        if place < within {
            return nth(child, place);
        }
        place -= within;
    }
    None
}
