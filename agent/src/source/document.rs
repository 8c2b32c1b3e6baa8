//! From the text of a manifest to objects, one YAML document at a time.
//!
//! Documents are told apart before they are parsed, so that a mistake in one
//! does not take the others of its file along.

use std::{fmt, io, thread};

use ferrule_model::kube::{Kind, Object, ObjectKey, namespace};
use ferrule_model::names::ObjectName;
use serde::de::DeserializeOwned;

use super::yaml::{Mistake, Node, STACK};

/// What is wrong with one document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DocumentError {
    /// Line in the file, from 1.
    pub(crate) line: u64,
    /// The object, where its kind and name could be read. Where `syntax` is set,
    /// that is a guess.
    pub(crate) object: Option<Box<ObjectKey>>,
    /// Place within a `kind: List`, such as `items[3]`; empty outside of one.
    pub(crate) item: String,
    /// Path of the field, such as `spec.ports[0].port`; empty where there is none.
    pub(crate) field: String,
    /// What is wrong with it.
    pub(crate) message: String,
    /// The text is no YAML at all.
    pub(crate) syntax: bool,
}

impl DocumentError {
    /// Field and what is wrong with it. An object is found by its name; what has
    /// none is told by its place in the list.
    pub(crate) fn about_field(&self) -> String {
        let item = if self.object.is_none() {
            &self.item
        } else {
            ""
        };
        self.at(item)
    }

    /// The object that the document defines, where that is sure.
    pub(crate) fn definition(&self) -> Option<&ObjectKey> {
        self.object.as_deref().filter(|_| !self.syntax)
    }

    fn at(&self, item: &str) -> String {
        let path: Vec<&str> = [item, &self.field]
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect();
        if path.is_empty() {
            self.message.clone()
        } else {
            format!("{}: {}", path.join("."), self.message)
        }
    }
}

impl From<Mistake> for DocumentError {
    fn from(mistake: Mistake) -> Self {
        Self {
            line: mistake.line,
            field: mistake.field,
            message: mistake.message,
            ..Self::default()
        }
    }
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        f.write_str(&self.at(&self.item))
    }
}

/// Objects of one file, and what could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parsed {
    /// In the order of the file.
    pub(crate) objects: Vec<Object>,
    /// One for each document that is wrong.
    pub(crate) errors: Vec<DocumentError>,
}

/// Parses a whole file of YAML or JSON, on a thread whose stack is large enough.
pub(crate) fn parse(text: &str) -> Parsed {
    let parsed = thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK);
        let reader = thread.spawn_scoped(scope, || parse_here(text))?;
        reader
            .join()
            .map_err(|_| io::Error::other("its reader panicked"))
    });
    parsed.unwrap_or_else(|error| Parsed {
        objects: Vec::new(),
        errors: vec![DocumentError {
            line: 1,
            message: format!("cannot be read: {error}; give the agent room for another thread"),
            syntax: true,
            ..DocumentError::default()
        }],
    })
}

fn parse_here(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    // An editor's byte order mark would hide a `---` behind it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (first_line, document) in split(text) {
        let of_document = parse_document(document);
        parsed.objects.extend(of_document.objects);
        let errors = of_document.errors.into_iter();
        parsed.errors.extend(errors.map(|error| DocumentError {
            line: error.line + first_line - 1,
            ..error
        }));
    }
    parsed
}

/// Splits at `---` in the first column, which YAML reserves for this even
/// inside of a block scalar. Yields each document with its first line's number.
fn split(text: &str) -> Vec<(u64, &str)> {
    let mut documents = Vec::new();
    let mut start = (0, 1);
    let mut offset = 0;
    for (number, line) in (1..).zip(text.split_inclusive('\n')) {
        let rest = line.strip_prefix("---");
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            documents.push((start.1, &text[start.0..offset]));
            // What follows the marker on its line is part of the document: `--- # web`.
            start = (offset + 3, number);
        }
        offset += line.len();
    }
    documents.push((start.1, &text[start.0..]));
    documents.retain(|(_, document)| !is_blank(document));
    documents
}

/// Whether there is no object in it: comments, markers and `%YAML` at most.
fn is_blank(document: &str) -> bool {
    document.lines().all(|line| {
        let content = line.trim_start();
        content.is_empty()
            || content.starts_with('#')
            || content.starts_with("...")
            || line.starts_with('%')
    })
}

fn parse_document(document: &str) -> Parsed {
    let mut parsed = Parsed::default();
    match Node::read(document) {
        Ok(node) => take(&node, None, &mut parsed),
        Err(mistake) => parsed.errors.push(DocumentError {
            object: named_above(document, mistake.line).map(Box::new),
            syntax: true,
            ..DocumentError::from(mistake)
        }),
    }
    parsed
}

/// Takes in a document or an item of a list, which may have its kind from there.
fn take(node: &Node, of_list: Option<Kind>, parsed: &mut Parsed) {
    // Nothing is no mistake: templates often leave it behind.
    if node.is_null() {
        return;
    }
    let taken = match identity(node, of_list) {
        Ok(Identity::Object(key)) => object(node, &key).map(|object| parsed.objects.push(object)),
        Ok(Identity::List(kind)) => take_items(node, kind, parsed),
        Ok(Identity::Foreign) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = taken {
        parsed.errors.push(error);
    }
}

/// Each item by itself, so that a mistake in one of them leaves the others alone.
fn take_items(node: &Node, kind: Option<Kind>, parsed: &mut Parsed) -> Result<(), DocumentError> {
    let (line_of_list, items) = node.items()?;
    for (index, item) in items.iter().enumerate() {
        let mut of_item = Parsed::default();
        take(item, kind, &mut of_item);
        parsed.objects.extend(of_item.objects);
        #[cfg(feature = "fuzzing")]
        for error in &of_item.errors {
            ferrule_model::planted::bug(
                "manifest",
                [index > 0, !error.field.is_empty(), error.line > 6],
            );
        }
        let errors = of_item.errors.into_iter();
        parsed.errors.extend(errors.map(|error| DocumentError {
            item: if error.item.is_empty() {
                format!("items[{index}]")
            } else {
                format!("items[{index}].{}", error.item)
            },
            line: if error.line == 0 {
                line_of_list
            } else {
                error.line
            },
            ..error
        }));
    }
    Ok(())
}

/// What a document is.
enum Identity {
    Object(ObjectKey),
    /// Of the kind that its items need not name, where it is such a list.
    List(Option<Kind>),
    /// Other kinds and API groups are none of our business, whatever stands in them.
    Foreign,
}

fn identity(node: &Node, of_list: Option<Kind>) -> Result<Identity, DocumentError> {
    let wrong = |field: &str, message: &str| DocumentError {
        line: node.line,
        field: field.to_owned(),
        message: message.to_owned(),
        ..DocumentError::default()
    };
    if !node.is_map() {
        let message = "is no Kubernetes object; write a mapping with apiVersion and kind";
        return Err(wrong("", message));
    }
    let kind = node.text("kind", "kind")?;
    let api_version = node.text("apiVersion", "apiVersion")?;
    if let Some(kind_of_list) = of_list
        && kind.is_empty()
    {
        return Ok(Identity::Object(key_of(kind_of_list, node)?));
    }
    for (field, value) in [("kind", &kind), ("apiVersion", &api_version)] {
        if value.is_empty() {
            let message = "is missing; add it, every Kubernetes object has it";
            return Err(wrong(field, message));
        }
    }
    if kind == "List" && api_version == "v1" {
        return Ok(Identity::List(None));
    }
    if let Some(kind) = Kind::of_list(&api_version, &kind) {
        return Ok(Identity::List(Some(kind)));
    }
    match Kind::from_type_meta(&api_version, &kind) {
        Some(kind) => Ok(Identity::Object(key_of(kind, node)?)),
        None => Ok(Identity::Foreign),
    }
}

fn key_of(kind: Kind, node: &Node) -> Result<ObjectKey, DocumentError> {
    let metadata = node.field("metadata")?;
    let text = |field: &str, path: &str| match metadata {
        Some(metadata) => metadata.text(field, path),
        None => Ok(String::new()),
    };
    let name = text("name", "metadata.name")?;
    if name.is_empty() {
        return Err(DocumentError {
            line: node.line,
            field: "metadata.name".to_owned(),
            message: format!("is missing in a {kind}; add it"),
            ..DocumentError::default()
        });
    }
    let written = text("namespace", "metadata.namespace")?;
    let namespace = match kind {
        Kind::Node | Kind::ServiceCidr => "",
        Kind::Service | Kind::EndpointSlice => namespace(Some(&written)),
    };
    Ok(ObjectKey {
        kind,
        name: ObjectName::new(namespace, name),
    })
}

fn object(node: &Node, key: &ObjectKey) -> Result<Object, DocumentError> {
    let object = match key.kind {
        Kind::Service => node.convert().map(Object::Service),
        Kind::EndpointSlice => node.convert().map(Object::EndpointSlice),
        Kind::Node => node.convert().map(Object::Node),
        Kind::ServiceCidr => node.convert().map(Object::ServiceCidr),
    };
    object.map_err(|mistake| DocumentError {
        object: Some(Box::new(key.clone())),
        ..DocumentError::from(mistake)
    })
}

/// The object in whose text `line` stands, as far as what stands above tells.
fn named_above(document: &str, line: u64) -> Option<ObjectKey> {
    let lines: Vec<&str> = document.split_inclusive('\n').collect();
    let count = usize::try_from(line).ok()?.checked_sub(1)?;
    let above = lines.get(..count)?;
    let node = Node::read(&above.concat()).ok()?;
    match identity(&node, None).ok()? {
        Identity::Object(key) => Some(key),
        Identity::List(kind) => {
            let item = node.items().ok()?.1.last()?;
            // A line that is indented no more than the last item begins another one.
            let first = usize::try_from(item.line).ok()?.checked_sub(1)?;
            let within = indentation(lines.get(count)?) > indentation(lines.get(first)?);
            match identity(item, kind).ok()? {
                Identity::Object(key) if within => Some(key),
                Identity::Object(_) | Identity::List(_) | Identity::Foreign => None,
            }
        }
        Identity::Foreign => None,
    }
}

fn indentation(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

/// One document as a value; what is wrong with it has its line and field.
///
/// # Errors
/// When it is no YAML or no `T`.
pub(crate) fn typed<T: DeserializeOwned>(document: &str) -> Result<T, DocumentError> {
    Ok(Node::read(document)?.convert()?)
}

#[cfg(test)]
mod tests;
