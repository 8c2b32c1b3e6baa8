//! The text of one document as a tree, and from the tree to objects.
//!
//! Every object goes this way, whether it stands alone or in a `kind: List`, so
//! that it is the same object in both. Like kubectl, a value is first what YAML
//! takes it for: an unquoted `007` is a number, and no name. A mistake is told
//! with its line and in words for whoever wrote the manifest.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Expected, IntoDeserializer as _, MapAccess, SeqAccess,
    Unexpected, Visitor,
};
use serde::{Deserialize, Deserializer};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Options, Spanned, UserMessageFormatter, options};

/// Most nodes and parser events of one document. The parser's own limit would
/// refuse a `kind: List` of a few thousand objects; the size of a file is
/// bounded already, and aliases, which are what can blow a document up, keep
/// the parser's limits.
const MAX_NODES: usize = 64 * 1024 * 1024;

/// How deep mappings and lists may stand in one another. The schemas of other
/// kinds go deeper than the parser's own limit; [`STACK`] bears this one.
const MAX_DEPTH: usize = 160;

/// Stack of a thread that reads documents, in bytes: more than twice of what the
/// deepest takes without optimization.
pub(super) const STACK: usize = 16 * 1024 * 1024;

/// Characters of a wrong text that are shown.
const MAX_SHOWN: usize = 60;

/// What is wrong with a field.
const TWICE: &str = "stands twice; remove one of the two";
const NAMELESS: &str = "a field has no name; write one before the colon";

/// A value and the line it begins in. A list's entries that are no mappings have
/// none of their own (0): that of the list has to do. To ask the parser for each
/// would take twice the stack, which bounds how deep a document may be.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) line: u64,
    value: Value,
}

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    line: u64,
    /// `None` for what can be no name, such as a list.
    key: Option<String>,
    node: Node,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    /// Line of the document, from 1.
    pub(super) line: u64,
    /// Path of the field, empty where there is none.
    pub(super) field: String,
    /// What is wrong and what to write instead.
    pub(super) message: String,
}

impl Node {
    /// Reads a document.
    ///
    /// # Errors
    /// When it is no YAML.
    pub(super) fn read(document: &str) -> Result<Self, Mistake> {
        let node = serde_saphyr::with_deserializer_from_str_with_options(
            document,
            parser_options(),
            |deserializer| Self::deserialize(deserializer),
        );
        node.map(|node| node.or_at(1))
            .map_err(|error| syntax(&error))
    }

    /// Gives it a line where it has none.
    fn or_at(self, line: u64) -> Self {
        Self {
            line: if self.line == 0 { line } else { self.line },
            ..self
        }
    }

    pub(super) fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    pub(super) fn is_map(&self) -> bool {
        matches!(self.value, Value::Map(_))
    }

    /// The value of a field of a mapping.
    ///
    /// # Errors
    /// When the field stands twice.
    pub(super) fn field(&self, name: &str) -> Result<Option<&Self>, Mistake> {
        let Value::Map(entries) = &self.value else {
            return Ok(None);
        };
        let mut named = entries
            .iter()
            .filter(|entry| entry.key.as_deref() == Some(name));
        let first = named.next();
        match named.next() {
            Some(again) => Err(twice(name.to_owned(), again)),
            None => Ok(first.map(|entry| &entry.node)),
        }
    }

    /// The text of a field, empty where it is absent or null; `path` is the
    /// field's for a message.
    ///
    /// # Errors
    /// When it is something else.
    pub(super) fn text(&self, name: &str, path: &str) -> Result<String, Mistake> {
        let text = self.field(name).and_then(|node| match node {
            Some(node) => node.convert(),
            None => Ok(None),
        });
        let text: Option<String> = text.map_err(|mistake| Mistake {
            field: path.to_owned(),
            ..mistake
        })?;
        Ok(text.unwrap_or_default())
    }

    /// The entries of the field `items` of a mapping; none where it is absent or null.
    /// With them the line of the list, for those that have none of their own.
    ///
    /// # Errors
    /// When it is no list.
    pub(super) fn items(&self) -> Result<(u64, &[Self]), Mistake> {
        match self.field("items")? {
            None => Ok((self.line, &[])),
            Some(node) => match &node.value {
                Value::Null => Ok((node.line, &[])),
                Value::List(items) => Ok((node.line, items)),
                _ => Err(Mistake {
                    line: node.line,
                    field: "items".to_owned(),
                    message: words(node.unexpected(), "a sequence"),
                }),
            },
        }
    }

    /// The value as a `T`.
    ///
    /// # Errors
    /// When it is none, or a field stands twice in it, known to `T` or not.
    pub(super) fn convert<T: DeserializeOwned>(&self) -> Result<T, Mistake> {
        if let Some((line, path, message)) = self.wrong_key() {
            return Err(Mistake {
                line,
                field: written(&path),
                message: message.to_owned(),
            });
        }
        serde_path_to_error::deserialize(self).map_err(|error| {
            let path = error.path().to_string();
            let field = if path == "." { String::new() } else { path };
            let fault = error.into_inner();
            Mistake {
                line: fault.line.unwrap_or(self.line),
                field,
                message: fault.message,
            }
        })
    }

    /// The first field that stands twice or has no name, in this node or below it:
    /// its line, the way to it from the inside out, what is wrong. A path is put
    /// together once there is a mistake: with a long name above many fields, a
    /// path for each would take minutes.
    fn wrong_key(&self) -> Option<(u64, Vec<Step<'_>>, &'static str)> {
        match &self.value {
            Value::Null
            | Value::Bool(_)
            | Value::Unsigned(_)
            | Value::Signed(_)
            | Value::Float(_)
            | Value::Text(_) => None,
            Value::List(nodes) => nodes.iter().enumerate().find_map(|(index, node)| {
                let (line, mut path, message) = node.wrong_key()?;
                path.push(Step::Item(index));
                Some((line, path, message))
            }),
            Value::Map(entries) => {
                let mut known = BTreeSet::new();
                entries.iter().find_map(|entry| {
                    let Some(key) = &entry.key else {
                        return Some((entry.line, Vec::new(), NAMELESS));
                    };
                    let (line, mut path, message) = if known.insert(key) {
                        entry.node.wrong_key()?
                    } else {
                        (entry.line, Vec::new(), TWICE)
                    };
                    path.push(Step::Field(key));
                    Some((line, path, message))
                })
            }
        }
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Unsigned(number) => Unexpected::Unsigned(*number),
            Value::Signed(number) => Unexpected::Signed(*number),
            Value::Float(number) => Unexpected::Float(*number),
            Value::Text(text) => Unexpected::Str(text),
            Value::List(_) => Unexpected::Seq,
            Value::Map(_) => Unexpected::Map,
        }
    }

    fn visit<'de, V: Visitor<'de>>(&'de self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Unsigned(number) => visitor.visit_u64(*number),
            Value::Signed(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(nodes) => visitor.visit_seq(Nodes(nodes.iter())),
            Value::Map(entries) => visitor.visit_map(Entries {
                rest: entries.iter(),
                value: None,
            }),
        }
    }
}

/// One step into a value.
enum Step<'a> {
    Item(usize),
    Field(&'a str),
}

/// The way as people write it.
fn written(inside_out: &[Step<'_>]) -> String {
    let mut path = String::new();
    for step in inside_out.iter().rev() {
        match step {
            Step::Item(index) => path.extend(["[", &index.to_string(), "]"]),
            Step::Field(name) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(name);
            }
        }
    }
    path
}

fn twice(field: String, again: &Entry) -> Mistake {
    Mistake {
        line: again.line,
        field,
        message: TWICE.to_owned(),
    }
}

fn parser_options() -> Options {
    options! {
        budget: serde_saphyr::budget! {
            max_events: 2 * MAX_NODES,
            max_nodes: MAX_NODES,
            max_depth: MAX_DEPTH,
        },
        // Both are mistakes of the object that they stand in, and not of its whole file.
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
    }
}

fn syntax(error: &serde_saphyr::Error) -> Mistake {
    let error = error.without_snippet();
    // The parser's other words tell a programmer which of its options to set.
    let text = error.render_with_formatter(&UserMessageFormatter);
    // The parser's words end with the place within the document, which is told apart already.
    let words = text.lines().next().unwrap_or_default();
    let words = words
        .split_once(" at line ")
        .map_or(words, |(words, _)| words);
    let (words, remedy) = match error {
        serde_saphyr::Error::Budget { .. } => (words, "write less into one document"),
        serde_saphyr::Error::InvalidScalar { .. } => {
            ("a value is not what its tag says", "remove the tag")
        }
        _ => (words, "correct the YAML of this line or of those above it"),
    };
    Mistake {
        line: error.location().map_or(1, |location| location.line()),
        field: String::new(),
        message: format!("{words}; {remedy}"),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let line = match &value {
            Value::Map(entries) => entries.first().map_or(0, |entry| entry.line),
            _ => 0,
        };
        Ok(Self { line, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(number))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Signed(number))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Float(number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut nodes = Vec::new();
        while let Some(node) = access.next_element()? {
            nodes.push(node);
        }
        Ok(Value::List(nodes))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, node)) = access.next_entry::<Spanned<Value>, Node>()? {
            let line = key.referenced.line();
            entries.push(Entry {
                line,
                key: name(key.value),
                node: node.or_at(line),
            });
        }
        Ok(Value::Map(entries))
    }
}

/// A key as JSON has it: kubectl writes numbers and booleans out.
fn name(key: Value) -> Option<String> {
    match key {
        Value::Bool(value) => Some(value.to_string()),
        Value::Unsigned(number) => Some(number.to_string()),
        Value::Signed(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Text(text) => Some(text),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// What a `T` has to say against a value; the line is that of the innermost one.
#[derive(Debug)]
pub(super) struct Fault {
    line: Option<u64>,
    message: String,
}

impl Fault {
    fn new(message: String) -> Self {
        Self {
            line: None,
            message,
        }
    }

    fn at(self, line: u64) -> Self {
        Self {
            line: self.line.or(Some(line).filter(|line| *line != 0)),
            ..self
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::new(words(found, &wanted.to_string()))
    }

    fn invalid_value(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        Self::new(words(found, &wanted.to_string()))
    }

    fn unknown_variant(variant: &str, known: &'static [&'static str]) -> Self {
        Self::new(words(Unexpected::Str(variant), &one_of(known)))
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        let known = known.join(", ");
        Self::new(format!("unknown field `{field}`, expected one of {known}"))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("has no {field}; add the field"))
    }
}

fn one_of(known: &[&str]) -> String {
    // The empty text may stand for the default, but nobody is told to write it.
    let known: Vec<_> = known
        .iter()
        .filter(|name| !name.is_empty())
        .copied()
        .collect();
    format!("one of {}", known.join(", "))
}

/// What stands there, and what to write instead; `wanted` is in the words of serde.
fn words(found: Unexpected<'_>, wanted: &str) -> String {
    let text = match found {
        Unexpected::Str(text) => Some(shown(text)),
        _ => None,
    };
    let there = match found {
        Unexpected::Bool(value) => format!("the boolean {value}"),
        Unexpected::Unsigned(number) => format!("the number {number}"),
        Unexpected::Signed(number) => format!("the number {number}"),
        Unexpected::Float(number) => format!("the number {number:?}"),
        Unexpected::Str(_) => format!("the text {:?}", text.as_deref().unwrap_or_default()),
        Unexpected::Unit => "null".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a mapping".to_owned(),
        other => other.to_string(),
    };
    let scalar = matches!(
        found,
        Unexpected::Bool(_)
            | Unexpected::Unsigned(_)
            | Unexpected::Signed(_)
            | Unexpected::Float(_)
    );
    let remedy = match (wanted, text) {
        ("a string", _) if scalar => {
            return format!("is {there} to YAML, and a text is wanted; write it in quotes");
        }
        ("a string", _) => "a text".to_owned(),
        ("a boolean", _) => "true or false, without quotes".to_owned(),
        ("a sequence", Some(text)) => format!("a list, such as [{text}]"),
        ("a sequence", None) => "a list, each entry on a line of its own behind \"- \"".to_owned(),
        ("a map", _) => "a mapping, each field on a line of its own".to_owned(),
        (number, _) if scalar && let Some(most) = greatest(number) => {
            format!("a whole number, {most} at most")
        }
        ("f32" | "f64" | "i64" | "u64" | "i32" | "u32" | "i16" | "u16" | "i8" | "u8", _) => {
            "a number, without quotes".to_owned()
        }
        (other, _) if other.starts_with("struct ") => {
            "a mapping, each field on a line of its own".to_owned()
        }
        (other, _) => other.to_owned(),
    };
    format!("is {there}; write {remedy}")
}

/// The greatest number of a type of whole ones.
fn greatest(kind: &str) -> Option<u64> {
    match kind {
        "i8" => Some(i8::MAX.unsigned_abs().into()),
        "u8" => Some(u8::MAX.into()),
        "i16" => Some(i16::MAX.unsigned_abs().into()),
        "u16" => Some(u16::MAX.into()),
        "i32" => Some(i32::MAX.unsigned_abs().into()),
        "u32" => Some(u32::MAX.into()),
        "i64" => Some(i64::MAX.unsigned_abs()),
        "u64" => Some(u64::MAX),
        _ => None,
    }
}

/// The beginning of a text that may be as long as its file.
fn shown(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(MAX_SHOWN) {
        None => text.into(),
        Some((end, _)) => {
            let (beginning, _) = text.split_at(end);
            format!("{beginning}…").into()
        }
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.visit(visitor).map_err(|fault| fault.at(self.line))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
        .map_err(|fault| fault.at(self.line))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor
            .visit_newtype_struct(self)
            .map_err(|fault| fault.at(self.line))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.value {
            Value::Text(text) => {
                let variant: StrDeserializer<'_, Fault> = text.as_str().into_deserializer();
                visitor.visit_enum(variant)
            }
            _ => Err(Fault::new(words(self.unexpected(), &one_of(variants)))),
        }
        .map_err(|fault| fault.at(self.line))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes
        byte_buf unit unit_struct seq tuple tuple_struct map struct identifier
    }
}

struct Nodes<'de>(std::slice::Iter<'de, Node>);

impl<'de> SeqAccess<'de> for Nodes<'de> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Fault> {
        self.0.next().map(|node| seed.deserialize(node)).transpose()
    }
}

struct Entries<'de> {
    rest: std::slice::Iter<'de, Entry>,
    value: Option<&'de Node>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Fault> {
        let Some(entry) = self.rest.next() else {
            return Ok(None);
        };
        self.value = Some(&entry.node);
        let key: StrDeserializer<'_, Fault> =
            entry.key.as_deref().unwrap_or_default().into_deserializer();
        let key = seed.deserialize(key);
        key.map(Some).map_err(|fault| fault.at(entry.line))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        match self.value.take() {
            Some(node) => seed.deserialize(node),
            None => Err(Fault::new("a field has no value; write one".to_owned())),
        }
    }
}
