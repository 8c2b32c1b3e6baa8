//! From the text of a manifest to objects, one YAML document at a time.
//!
//! Documents are told apart before they are parsed, so that a mistake in one
//! does not take the others of its file along.

use std::fmt;

use ferrule_model::kube::{Kind, Object, ObjectKey, namespace};
use ferrule_model::names::ObjectName;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_saphyr::{Options, UserMessageFormatter, options};

/// Most nodes and parser events of one document. The parser's own limit would
/// refuse a `kind: List` of a few thousand objects; the size of a file is
/// bounded already, and aliases, which are what can blow a document up, keep
/// the parser's limits.
const MAX_NODES: usize = 64 * 1024 * 1024;

/// What is wrong with one document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DocumentError {
    /// Line in the file, from 1.
    pub(crate) line: u64,
    /// The object, where its kind and name could be read.
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

/// What tells an object from others. Every value may be null or absent: most
/// documents are none of our business, whatever stands in them.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    metadata: Option<NameOnly>,
}

#[derive(Debug, Default, Deserialize)]
struct NameOnly {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    namespace: Option<String>,
}

/// The items of a `kind: List`, each as a document of its own.
#[derive(Debug, Deserialize)]
struct List<T> {
    #[serde(default)]
    items: Option<Vec<T>>,
}

/// Parses a whole file of YAML or JSON.
pub(crate) fn parse(text: &str) -> Parsed {
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
    if let Err(error) = parse_into(document, &mut parsed) {
        parsed.errors.push(error);
    }
    parsed
}

fn parse_into(document: &str, parsed: &mut Parsed) -> Result<(), DocumentError> {
    let meta: TypeMeta = typed(document, None).map_err(|error| DocumentError {
        message: if error.syntax || !error.field.is_empty() {
            error.message
        } else {
            "is no Kubernetes object; write a mapping with apiVersion and kind".to_owned()
        },
        ..error
    })?;
    let kind = meta.kind.unwrap_or_default();
    let api_version = meta.api_version.unwrap_or_default();
    for (field, value) in [("kind", &kind), ("apiVersion", &api_version)] {
        if value.is_empty() {
            return Err(DocumentError {
                line: 1,
                field: field.to_owned(),
                message: "is missing; every Kubernetes object has it".to_owned(),
                ..DocumentError::default()
            });
        }
    }
    if kind == "List" && api_version == "v1" {
        return parse_list(document, parsed);
    }
    // Other kinds and API groups are none of our business.
    let Some(kind) = Kind::from_type_meta(&api_version, &kind) else {
        return Ok(());
    };
    let key = key_of(kind, meta.metadata.unwrap_or_default())?;
    parsed
        .objects
        .push(typed_object(kind, document, Some(&key))?);
    Ok(())
}

fn key_of(kind: Kind, metadata: NameOnly) -> Result<ObjectKey, DocumentError> {
    let name = metadata.name.unwrap_or_default();
    if name.is_empty() {
        return Err(DocumentError {
            line: 1,
            field: "metadata.name".to_owned(),
            message: format!("is missing in a {kind}"),
            ..DocumentError::default()
        });
    }
    let namespace = match kind {
        Kind::Node | Kind::ServiceCidr => "",
        Kind::Service | Kind::EndpointSlice => namespace(metadata.namespace.as_deref()),
    };
    Ok(ObjectKey {
        kind,
        name: ObjectName::new(namespace, name),
    })
}

/// A list's items are written out again, one by one, so that a mistake in one
/// of them leaves the others alone; the line is then that of the list.
fn parse_list(document: &str, parsed: &mut Parsed) -> Result<(), DocumentError> {
    let list: List<serde_json::Value> = typed(document, None)?;
    for (index, item) in list.items.unwrap_or_default().iter().enumerate() {
        let of_item = parse_document(&item.to_string());
        parsed.objects.extend(of_item.objects);
        let errors = of_item.errors.into_iter();
        parsed.errors.extend(errors.map(|error| DocumentError {
            line: 1,
            item: if error.item.is_empty() {
                format!("items[{index}]")
            } else {
                format!("items[{index}].{}", error.item)
            },
            ..error
        }));
    }
    Ok(())
}

fn typed_object(
    kind: Kind,
    document: &str,
    key: Option<&ObjectKey>,
) -> Result<Object, DocumentError> {
    Ok(match kind {
        Kind::Service => Object::Service(typed(document, key)?),
        Kind::EndpointSlice => Object::EndpointSlice(typed(document, key)?),
        Kind::Node => Object::Node(typed(document, key)?),
        Kind::ServiceCidr => Object::ServiceCidr(typed(document, key)?),
    })
}

fn parser_options() -> Options {
    options! {
        budget: serde_saphyr::budget! {
            max_events: 2 * MAX_NODES,
            max_nodes: MAX_NODES,
        },
    }
}

/// One document as a value; what is wrong with it has its line and field.
///
/// # Errors
/// When it is no YAML or no `T`; `key` is the object that is named then.
pub(crate) fn typed<T: DeserializeOwned>(
    document: &str,
    key: Option<&ObjectKey>,
) -> Result<T, DocumentError> {
    let mut field = String::new();
    let result = serde_saphyr::with_deserializer_from_str_with_options(
        document,
        parser_options(),
        |deserializer| {
            serde_path_to_error::deserialize(deserializer).map_err(|error| {
                let path = error.path().to_string();
                field = if path == "." { String::new() } else { path };
                error.into_inner()
            })
        },
    );
    result.map_err(|error: serde_saphyr::Error| {
        let error = error.without_snippet();
        // The parser's other words tell a programmer which of its options to set.
        let text = error.render_with_formatter(&UserMessageFormatter);
        // The parser's words end with the place within the document, which is told apart already.
        let words = text.lines().next().unwrap_or_default();
        let words = words
            .split_once(" at line ")
            .map_or(words, |(words, _)| words);
        let anything: Result<IgnoredAny, serde_saphyr::Error> =
            serde_saphyr::from_str_with_options(document, parser_options());
        let syntax = anything.is_err();
        DocumentError {
            line: error.location().map_or(1, |location| location.line()),
            object: key.cloned().map(Box::new),
            item: String::new(),
            // Where the parser stood when the text ended being YAML says nothing.
            field: if syntax { String::new() } else { field },
            message: words.to_owned(),
            syntax,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "\
# a comment before the first document
---
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: null
spec:
  clusterIP: 10.96.0.10
  ports:
    - port: 80
---
apiVersion: v1
kind: Service
metadata:
  name: bad
  namespace: shop
spec:
  ports:
    - name: http
      port: 80
    - name: https
      port: 70000
--- # a ConfigMap is none of our business
apiVersion: v1
kind: ConfigMap
data: {text: \"x\"}
";

    #[test]
    fn a_mistake_leaves_the_other_documents_alone() {
        let parsed = parse(TWO);
        let names: Vec<String> = parsed.objects.iter().map(|o| o.key().to_string()).collect();
        assert_eq!(names, ["Service default/web"]);
        let [error] = parsed.errors.as_slice() else {
            panic!("{:?}", parsed.errors);
        };
        assert_eq!(error.line, 23, "{error}");
        assert_eq!(error.field, "spec.ports[1].port", "{error}");
        assert_eq!(
            error.object.as_ref().unwrap().to_string(),
            "Service shop/bad"
        );
        assert!(error.message.contains("70000"), "{error}");
    }

    #[test]
    fn broken_yaml_is_named_by_its_line() {
        let parsed = parse("apiVersion: v1\nkind: Service\nmetadata: {name: x\nspec: [\n");
        assert!(parsed.objects.is_empty());
        let [error] = parsed.errors.as_slice() else {
            panic!("{:?}", parsed.errors);
        };
        assert!(error.line >= 3, "{error}");
        assert_eq!(error.object, None);
    }

    #[test]
    fn lists_json_and_missing_fields() {
        let list = r#"{"apiVersion":"v1","kind":"List","items":[
            {"apiVersion":"v1","kind":"Node","metadata":{"name":"a"},"spec":{"podCIDRs":["10.1.0.0/24"]}},
            {"apiVersion":"v1","kind":"Service","metadata":{"name":"b"},"spec":{"ports":[{"port":"no"}]}},
            {"apiVersion":"v1","kind":"Service","metadata":{}}
        ]}"#;
        let parsed = parse(list);
        assert_eq!(parsed.objects.len(), 1);
        let places: Vec<(&str, &str)> = parsed
            .errors
            .iter()
            .map(|e| (&*e.item, &*e.field))
            .collect();
        assert_eq!(
            places,
            [
                ("items[1]", "spec.ports[0].port"),
                ("items[2]", "metadata.name")
            ]
        );
        assert_eq!(
            parse("kind: Service\nmetadata: {name: x}\n").errors[0].field,
            "apiVersion"
        );
        assert_eq!(parse("---\n---\n# nothing\n...\n"), Parsed::default());
    }

    #[test]
    fn what_the_api_writes_as_null_is_absent() {
        let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s\n  \
                    labels: null\naddressType: IPv4\nendpoints: null\nports: null\n";
        let parsed = parse(text);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        assert_eq!(parsed.objects.len(), 1);
        let text = "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  labels: {app: }\n  \
                    annotations:\n    note:\n    ferrule.io/scheduler: ~\n";
        let parsed = parse(text);
        assert!(parsed.errors.is_empty(), "{:?}", parsed.errors);
        let [Object::Service(service)] = parsed.objects.as_slice() else {
            panic!("{:?}", parsed.objects);
        };
        assert_eq!(service.metadata.labels["app"], "");
        assert_eq!(service.metadata.annotations["ferrule.io/scheduler"], "");
    }
}
