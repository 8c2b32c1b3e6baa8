//! What an API server sends, decoded object by object.
//!
//! One object that makes no sense must not hide the others, so that a list is
//! taken apart before its items are read, and an object that cannot be read is
//! told by its name. Bytes that are no list or no event at all are an error: it
//! is not known what they would have said.

use std::borrow::Cow;

use ferrule_model::kube::{Kind, Object, ObjectKey, namespace};
use ferrule_model::names::ObjectName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// Annotation of the bookmark behind the last initial event of a streaming list.
const INITIAL_EVENTS_END: &str = "k8s.io/initial-events-end";

/// One object as the server sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    /// Which one.
    pub(crate) key: ObjectKey,
    /// Version of the cluster's state in which it became so; may be empty in a list.
    pub(crate) resource_version: String,
    /// Itself, or the field that cannot be read and why.
    pub(crate) object: Result<Box<Object>, String>,
}

/// Part of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// Its objects.
    pub(crate) items: Vec<Item>,
    /// Version of the state that the list shows.
    pub(crate) resource_version: String,
    /// Asks for the next part; `None` in the last one.
    pub(crate) next: Option<String>,
}

/// One event of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The object exists and is like this.
    Applied(Item),
    /// The object is gone.
    Deleted(Item),
    /// Everything up to a version was sent.
    Bookmark {
        /// The version.
        resource_version: String,
        /// Nothing of a streaming list is missing now.
        initial_end: bool,
    },
    /// The server gives the watch up.
    Error(Status),
}

/// An error of the API, `meta/v1` Status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Status {
    /// HTTP code.
    #[serde(deserialize_with = "nullable")]
    pub(crate) code: u16,
    /// One word for programs.
    #[serde(deserialize_with = "nullable")]
    pub(crate) reason: String,
    /// A sentence for people.
    #[serde(deserialize_with = "nullable")]
    pub(crate) message: String,
    /// More for programs.
    pub(crate) details: Option<Details>,
}

/// More about an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Details {
    /// What led to it.
    pub(crate) causes: Option<Vec<StatusCause>>,
}

/// One thing that led to an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct StatusCause {
    /// One word for programs.
    #[serde(deserialize_with = "nullable")]
    pub(crate) reason: String,
}

/// What is `null` is as good as absent.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Status {
    /// Whether the server was asked for a state that it has not reached yet.
    pub(crate) fn is_too_new(&self) -> bool {
        let details = self.details.as_ref();
        let causes = details.and_then(|details| details.causes.as_ref());
        causes.is_some_and(|causes| {
            let mut causes = causes.iter();
            causes.any(|cause| cause.reason == "ResourceVersionTooLarge")
        })
    }
}

#[derive(Deserialize)]
struct ListBody<'a> {
    #[serde(borrow, default)]
    kind: Option<Cow<'a, str>>,
    metadata: ListMeta,
    /// `null` is an empty list, and what is not there none at all.
    #[serde(borrow, default, deserialize_with = "present")]
    items: Option<Vec<&'a RawValue>>,
}

fn present<'de: 'a, 'a, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<&'a RawValue>>, D::Error> {
    Option::deserialize(deserializer).map(|items| Some(items.unwrap_or_default()))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct EventBody<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Head<'a> {
    /// Stands in events and not in lists.
    #[serde(borrow, default)]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    metadata: HeadMeta<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMeta<'a> {
    #[serde(borrow, default)]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    namespace: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    resource_version: Cow<'a, str>,
}

#[derive(Deserialize)]
struct BookmarkBody {
    metadata: BookmarkMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BookmarkMeta {
    resource_version: String,
    #[serde(default)]
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// Decodes a part of a list of one kind.
///
/// # Errors
/// When it is no list of that kind, has no version or holds something without a name.
/// What another answers in its place (a table, the metadata alone, one object) would
/// pass for a list in which everything is missing.
pub(crate) fn page(kind: Kind, body: &[u8]) -> Result<Page, String> {
    let list: ListBody<'_> = json(body)?;
    // Any object may have a version and items. Servers always say that theirs is a list.
    if list.kind.as_deref().is_none_or(str::is_empty) {
        return Err(format!("kind: is missing in a {kind}List"));
    }
    is_of_kind(list.kind.as_deref(), &format!("{kind}List"))?;
    let ListMeta {
        resource_version,
        next,
    } = list.metadata;
    let next = next.filter(|token| !token.is_empty());
    if resource_version.is_empty() && next.is_none() {
        return Err("metadata.resourceVersion: is missing in a list".to_owned());
    }
    #[cfg(feature = "fuzzing")]
    ferrule_model::planted::bug(
        "list-page",
        [
            next.is_some(),
            list.items.is_none(),
            resource_version.is_empty(),
        ],
    );
    let items = list.items.ok_or("items: is missing in a list")?;
    let items = items.into_iter().map(|raw| item(kind, raw));
    Ok(Page {
        items: items.collect::<Result<_, _>>()?,
        resource_version,
        next,
    })
}

/// Decodes one event of a watch over one kind.
///
/// # Errors
/// When it is no event, or about something without name or version.
pub(crate) fn frame(kind: Kind, line: &[u8]) -> Result<Frame, String> {
    let event: EventBody<'_> = json(line)?;
    match &*event.kind {
        "ADDED" | "MODIFIED" => Ok(Frame::Applied(versioned(item(kind, event.object)?)?)),
        "DELETED" => Ok(Frame::Deleted(versioned(item(kind, event.object)?)?)),
        "BOOKMARK" => {
            let body: BookmarkBody = json(event.object.get().as_bytes())?;
            let annotations = body.metadata.annotations.unwrap_or_default();
            let end = annotations.get(INITIAL_EVENTS_END);
            #[cfg(feature = "fuzzing")]
            ferrule_model::planted::bug(
                "watch-frame",
                [
                    end.is_some(),
                    body.metadata.resource_version.len() > 4,
                    body.metadata.resource_version.len() > 7,
                ],
            );
            if body.metadata.resource_version.is_empty() {
                return Err("metadata.resourceVersion: is empty in a bookmark".to_owned());
            }
            Ok(Frame::Bookmark {
                resource_version: body.metadata.resource_version,
                initial_end: end.is_some_and(|value| value == "true"),
            })
        }
        "ERROR" => Ok(Frame::Error(json(event.object.get().as_bytes())?)),
        other => Err(format!("type: {:?} is no type of event", shortened(other))),
    }
}

fn versioned(item: Item) -> Result<Item, String> {
    if item.resource_version.is_empty() {
        return Err(format!("{}: has no metadata.resourceVersion", item.key));
    }
    Ok(item)
}

fn item(kind: Kind, raw: &RawValue) -> Result<Item, String> {
    let head: Head<'_> = json(raw.get().as_bytes())?;
    is_of_kind(head.kind.as_deref(), &kind.to_string())?;
    let HeadMeta {
        name,
        namespace: place,
        resource_version,
    } = head.metadata;
    if name.is_empty() {
        return Err(format!("metadata.name: is missing in a {kind}"));
    }
    let place = match kind {
        Kind::Node | Kind::ServiceCidr => "",
        Kind::Service | Kind::EndpointSlice => namespace(place.as_deref()),
    };
    Ok(Item {
        key: ObjectKey {
            kind,
            name: ObjectName::new(place, &*name),
        },
        resource_version: resource_version.into_owned(),
        object: object(kind, raw).map(Box::new),
    })
}

fn is_of_kind(written: Option<&str>, expected: &str) -> Result<(), String> {
    match written {
        None | Some("") => Ok(()),
        Some(written) if written == expected => Ok(()),
        Some(written) => Err(format!(
            "kind: {:?} instead of {expected}",
            shortened(written)
        )),
    }
}

/// A Service without what it asks for is cut off: it would lose all it has.
#[derive(Deserialize)]
struct Whole {
    #[serde(default)]
    spec: Option<serde::de::IgnoredAny>,
}

fn object(kind: Kind, raw: &RawValue) -> Result<Object, String> {
    let bytes = raw.get().as_bytes();
    if kind == Kind::Service && json::<Whole>(bytes)?.spec.is_none() {
        return Err("spec: is missing".to_owned());
    }
    Ok(match kind {
        Kind::Service => Object::Service(json(bytes)?),
        Kind::EndpointSlice => Object::EndpointSlice(json(bytes)?),
        Kind::Node => Object::Node(json(bytes)?),
        Kind::ServiceCidr => Object::ServiceCidr(json(bytes)?),
    })
}

/// Decodes JSON; an error names the field.
fn json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let words = error.into_inner().to_string();
        let words = words.split(" at line ").next().unwrap_or_default();
        let words = shortened(words);
        if path == "." {
            words
        } else {
            format!("{path}: {words}")
        }
    })?;
    deserializer
        .end()
        .map_err(|error| shortened(&error.to_string()))?;
    Ok(value)
}

/// Decodes a body that is an error of the API, or makes one of what there is.
pub(crate) fn status(code: u16, body: &[u8]) -> Status {
    let status: Result<Status, _> = owned(body);
    let mut status = status.unwrap_or_else(|_| Status {
        message: shortened(&String::from_utf8_lossy(body)),
        ..Status::default()
    });
    status.code = code;
    status.message = shortened(&status.message);
    status
}

fn owned<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(bytes)
}

/// What a server says stands in logs and in `status`: one line of bounded length.
fn shortened(words: &str) -> String {
    const LONGEST: usize = 200;
    let mut line: String = words
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(LONGEST)
        .collect();
    if words.chars().count() > LONGEST {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Go's servers leave out what is empty, others write `null`.
    #[test]
    fn an_error_may_have_null_where_it_has_nothing_to_say() {
        let line = br#"{"type":"ERROR","object":{"kind":"Status","code":410,"reason":null,"message":null,"details":null}}"#;
        let Frame::Error(status) = frame(Kind::Service, line).unwrap() else {
            panic!("no error");
        };
        assert_eq!((status.code, status.reason.as_str()), (410, ""));
    }

    /// What proxies and other servers answer in the place of a list would take away all
    /// that is known.
    #[test]
    fn what_is_no_whole_list_of_the_kind_is_none() {
        let meta = r#""metadata": {"resourceVersion": "5"}"#;
        for (body, says) in [
            (
                format!(r#"{{"kind": "ServiceList", {meta}}}"#),
                "items: is missing",
            ),
            (
                format!(r#"{{"items": [], {meta}}}"#),
                "kind: is missing in a ServiceList",
            ),
            (
                format!(r#"{{"kind": "", "items": [], {meta}}}"#),
                "kind: is missing in a ServiceList",
            ),
            (
                format!(r#"{{"kind": "PodList", "items": [], {meta}}}"#),
                "instead of ServiceList",
            ),
            (
                format!(r#"{{"kind": "Table", "rows": [], {meta}}}"#),
                "instead of ServiceList",
            ),
            (
                format!(r#"{{"kind": "PartialObjectMetadataList", "items": [], {meta}}}"#),
                "instead of ServiceList",
            ),
            (
                format!(r#"{{"kind": "Service", "spec": {{}}, {meta}}}"#),
                "instead of ServiceList",
            ),
        ] {
            let error = page(Kind::Service, body.as_bytes()).unwrap_err();
            assert!(error.contains(says), "{body}: {error}");
        }
        for empty in ["[]", "null"] {
            let body = format!(r#"{{"kind": "ServiceList", "items": {empty}, {meta}}}"#);
            let page = page(Kind::Service, body.as_bytes()).unwrap();
            assert!(page.items.is_empty() && page.next.is_none());
        }
    }

    #[test]
    fn an_event_about_another_kind_is_no_event() {
        let object = r#"{"kind": "Pod", "metadata": {"name": "a", "resourceVersion": "5"}}"#;
        for event in ["ADDED", "MODIFIED", "DELETED"] {
            let line = format!(r#"{{"type": "{event}", "object": {object}}}"#);
            let error = frame(Kind::Service, line.as_bytes()).unwrap_err();
            assert!(error.contains("instead of Service"), "{error}");
        }
    }

    #[test]
    fn a_service_without_a_spec_is_not_read() {
        for spec in ["", r#""spec": null,"#] {
            let body = format!(
                r#"{{"kind": "ServiceList", "items": [{{{spec} "metadata": {{"name": "a"}}}}],
                    "metadata": {{"resourceVersion": "5"}}}}"#
            );
            let page = page(Kind::Service, body.as_bytes()).unwrap();
            assert_eq!(page.items[0].object, Err("spec: is missing".to_owned()));
        }
    }
}
