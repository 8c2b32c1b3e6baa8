//! What the targets call. Every function takes what a fuzzer made up, and panics
//! where something holds that must not.

use ferrule_api::Call;
use ferrule_api::status::MAX_TEXT;
use ferrule_model::cluster::Event;
use ferrule_model::kube::{Kind, Object};
use ferrule_model::network::Policy;
use ferrule_model::plan::Plan;
use ferrule_model::view::NodeView;
use ferrule_netlink::RawMessage;

use crate::source::document;
use crate::source::wire::{self, Frame};
use crate::{links, request};

/// Kinds of object that are watched.
const KINDS: [Kind; 4] = [
    Kind::Service,
    Kind::EndpointSlice,
    Kind::Node,
    Kind::ServiceCidr,
];

/// Longest words about one mistake: they stand in logs and in `status`.
const MAX_WORDS: usize = 4096;

/// A line that a client of the socket sent.
///
/// # Panics
/// Where something is wrong with the agent.
pub fn request(line: &[u8]) {
    match request::parse(line) {
        Ok(request) => {
            let again = ferrule_api::encode(&request).expect("a line");
            assert_eq!(request::parse(&again).expect("what was written"), request);
            let attachment = match request.call {
                Call::Allocate(wanted) => {
                    assert!(wanted.ips.len() <= 2, "{:?}", wanted.ips);
                    wanted.attachment
                }
                Call::Release { attachment } | Call::Lease { attachment } => attachment,
                _ => return,
            };
            assert!(!attachment.interface.as_str().contains(['/', '\0']));
        }
        Err(error) => {
            assert!(error.message.len() <= MAX_TEXT + '…'.len_utf8());
        }
    }
}

/// The text of a manifest, and what a node makes of its objects.
///
/// # Panics
/// Where something is wrong with the agent.
pub fn manifest(text: &str) {
    let parsed = document::parse(text);
    // YAML takes a carriage return for the end of a line, too.
    let lines = text.matches(['\n', '\r']).count() as u64 + 1;
    for error in &parsed.errors {
        assert!((1..=lines).contains(&error.line), "{error}");
        assert!(!error.message.is_empty());
        assert!(!error.message.contains("panicked"), "{error}");
        assert!(
            error.message.len() <= MAX_WORDS,
            "{} bytes",
            error.message.len()
        );
    }
    planned(parsed.objects);
}

/// Frames of a watch, a line each; the first byte says over which kind.
///
/// # Panics
/// Where something is wrong with the agent.
pub fn watch(input: &[u8]) {
    let Some((kind, lines)) = kind(input) else {
        return;
    };
    let mut view = NodeView::new("here", Policy::default());
    for line in lines.split(|byte| *byte == b'\n') {
        match wire::frame(kind, line) {
            Ok(Frame::Applied(item)) => {
                assert_eq!(item.key.kind, kind);
                assert!(!item.resource_version.is_empty());
                if let Ok(object) = item.object {
                    assert_eq!(object.key(), item.key);
                    view.take([Event::Applied(object)]);
                }
            }
            Ok(Frame::Deleted(item)) => {
                view.take([Event::Deleted(item.key)]);
            }
            Ok(Frame::Bookmark {
                resource_version,
                initial_end: _,
            }) => assert!(
                !resource_version.is_empty(),
                "a bookmark without its version"
            ),
            Ok(Frame::Error(status)) => drop(status),
            Err(words) => bounded(&words),
        }
    }
    let _plan = Plan::new(&view, Vec::new());
}

/// A part of a list, or an error in its place; the first byte says of which kind.
///
/// # Panics
/// Where something is wrong with the agent.
pub fn list(input: &[u8]) {
    let Some((kind, body)) = kind(input) else {
        return;
    };
    let status = wire::status(500, body);
    assert!(status.message.len() <= MAX_WORDS);
    match wire::page(kind, body) {
        Ok(page) => {
            assert!(page.next.is_some() || !page.resource_version.is_empty());
            let mut objects = Vec::new();
            for item in page.items {
                match item.object {
                    Ok(object) => {
                        assert_eq!(object.key(), item.key);
                        objects.push(*object);
                    }
                    Err(words) => bounded(&words),
                }
            }
            planned(objects);
        }
        Err(words) => bounded(&words),
    }
}

/// A message about a device or a route.
pub fn link(message_type: u16, body: &[u8]) {
    links::read_any(&RawMessage {
        message_type,
        body: body.to_vec(),
    });
}

fn kind(input: &[u8]) -> Option<(Kind, &[u8])> {
    let (first, rest) = input.split_first()?;
    Some((KINDS[usize::from(*first) % KINDS.len()], rest))
}

fn bounded(words: &str) {
    assert!(!words.is_empty());
    assert!(words.len() <= MAX_WORDS, "{} bytes", words.len());
}

/// The same facts give the same plan in whatever order they come.
fn planned(objects: Vec<Object>) {
    let mut view = NodeView::new("here", Policy::default());
    view.take(
        objects
            .iter()
            .cloned()
            .map(|object| Event::Applied(Box::new(object))),
    );
    let plan = Plan::new(&view, Vec::new());
    // Of two objects with one name the last one counts, so only what is single may change places.
    let keys: std::collections::BTreeSet<_> = objects.iter().map(Object::key).collect();
    if keys.len() == objects.len() {
        let mut turned = NodeView::new("here", Policy::default());
        for object in objects.into_iter().rev() {
            turned.take([Event::Applied(Box::new(object))]);
        }
        assert_eq!(Plan::new(&turned, Vec::new()), plan);
    }
    for key in keys {
        view.take([Event::Deleted(key)]);
    }
    let left = Plan::new(&view, Vec::new());
    assert!(left.frontends.is_empty(), "{:?}", left.frontends);
}
