//! From the text of a manifest to objects, one YAML document at a time.
//!
//! Documents are told apart before they are parsed, so that a mistake in one
//! does not take the others of its file along.

use std::fmt;

use ferrule_model::kube::{Kind, Object, ObjectKey};
use ferrule_model::names::ObjectName;
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// What is wrong with one document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DocumentError {
    /// Line in the file, from 1.
    pub(crate) line: u64,
    /// The object, where its kind and name could be read.
    pub(crate) object: Option<ObjectKey>,
    /// Path of the field, such as `spec.ports[0].port`; empty where the YAML itself is broken.
    pub(crate) field: String,
    /// What is wrong with it.
    pub(crate) message: String,
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
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

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TypeMeta {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: NameOnly,
}

#[derive(Debug, Default, Deserialize)]
struct NameOnly {
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: Option<String>,
}

/// The items of a `kind: List`, each as a document of its own.
#[derive(Debug, Deserialize)]
struct List<T> {
    items: Vec<T>,
}

/// Parses a whole file of YAML or JSON.
pub(crate) fn parse(text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for (first_line, document) in split(text) {
        if let Err(error) = parse_document(document, &mut parsed) {
            parsed.errors.push(DocumentError {
                line: error.line + first_line - 1,
                ..error
            });
        }
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

fn is_blank(document: &str) -> bool {
    document.lines().all(|line| {
        let line = line.trim_start();
        line.is_empty() || line.starts_with('#') || line.starts_with("...")
    })
}

fn parse_document(document: &str, parsed: &mut Parsed) -> Result<(), DocumentError> {
    let meta: TypeMeta = typed(document, None)?;
    if meta.kind == "List" && meta.api_version == "v1" {
        return parse_list(document, parsed);
    }
    let Some(kind) = Kind::from_type_meta(&meta.api_version, &meta.kind) else {
        if meta.kind.is_empty() || meta.api_version.is_empty() {
            return Err(DocumentError {
                line: 1,
                object: None,
                field: if meta.kind.is_empty() {
                    "kind"
                } else {
                    "apiVersion"
                }
                .to_owned(),
                message: "is missing; every Kubernetes object has it".to_owned(),
            });
        }
        // Other kinds and API groups are none of our business.
        return Ok(());
    };
    let key = key_of(kind, &meta)?;
    parsed
        .objects
        .push(typed_object(kind, document, Some(&key))?);
    Ok(())
}

fn key_of(kind: Kind, meta: &TypeMeta) -> Result<ObjectKey, DocumentError> {
    if meta.metadata.name.is_empty() {
        return Err(DocumentError {
            line: 1,
            object: None,
            field: "metadata.name".to_owned(),
            message: format!("is missing in a {kind}"),
        });
    }
    let namespace = match kind {
        Kind::Node => "",
        Kind::Service | Kind::EndpointSlice => {
            meta.metadata.namespace.as_deref().unwrap_or("default")
        }
    };
    Ok(ObjectKey {
        kind,
        name: ObjectName::new(namespace, &*meta.metadata.name),
    })
}

/// A list's items are written out again, one by one, so that a mistake in one
/// of them leaves the others alone; the line is then that of the list.
fn parse_list(document: &str, parsed: &mut Parsed) -> Result<(), DocumentError> {
    let list: List<serde_json::Value> = typed(document, None)?;
    for (index, item) in list.items.iter().enumerate() {
        if let Err(error) = parse_document(&item.to_string(), parsed) {
            parsed.errors.push(DocumentError {
                line: 1,
                field: format!("items[{index}].{}", error.field),
                ..error
            });
        }
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
    })
}

fn typed<T: DeserializeOwned>(document: &str, key: Option<&ObjectKey>) -> Result<T, DocumentError> {
    let mut field = String::new();
    let result = serde_saphyr::with_deserializer_from_str(document, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            let path = error.path().to_string();
            field = if path == "." { String::new() } else { path };
            error.into_inner()
        })
    });
    result.map_err(|error: serde_saphyr::Error| {
        let error = error.without_snippet();
        let text = error.to_string();
        // The parser's words end with the place within the document, which is told apart already.
        let words = text.lines().next().unwrap_or_default();
        let words = words
            .split_once(" at line ")
            .map_or(words, |(words, _)| words);
        DocumentError {
            line: error.location().map_or(1, |location| location.line()),
            object: key.cloned(),
            field,
            message: words.to_owned(),
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
        let fields: Vec<&str> = parsed.errors.iter().map(|e| e.field.as_str()).collect();
        assert_eq!(
            fields,
            ["items[1].spec.ports[0].port", "items[2].metadata.name"]
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
    }
}
