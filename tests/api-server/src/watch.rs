//! A watch: what happens from a version on, for a while.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use crate::body::{Body, Part};
use crate::store::Resource;
use crate::{ApiServer, lock};

/// What is watched.
pub(crate) struct Order {
    pub(crate) resource: Resource,
    /// The version behind which it begins; `None`: all there is, first.
    pub(crate) from: Option<u64>,
    /// Whether a bookmark says that all there is was sent.
    pub(crate) initial_end: bool,
    pub(crate) bookmarks: bool,
    pub(crate) lasts: Duration,
}

/// Starts it.
pub(crate) fn start(
    server: Arc<ApiServer>,
    order: Order,
    news: watch::Receiver<u64>,
    ended: impl Future<Output = ()> + Send + 'static,
) -> Body {
    let (sender, body) = Body::channel(16);
    tokio::spawn(async move {
        tokio::select! {
            _the_client_is_gone = run(&server, &order, news, &sender) => {}
            () = ended => {}
        }
    });
    body
}

async fn run(
    server: &ApiServer,
    order: &Order,
    mut news: watch::Receiver<u64>,
    out: &mpsc::Sender<Part>,
) -> Result<(), mpsc::error::SendError<Part>> {
    let end = Instant::now() + order.lasts;
    let mut version = if let Some(version) = order.from {
        version
    } else {
        let (objects, version) = {
            let store = lock(&server.store);
            (store.all(order.resource), store.version())
        };
        for object in objects {
            out.send(event("ADDED", &object)).await?;
        }
        if order.initial_end {
            out.send(bookmark(order.resource, version, true)).await?;
        }
        version
    };
    loop {
        news.borrow_and_update();
        let (changes, now) = {
            let store = lock(&server.store);
            (store.since(version, order.resource), store.version())
        };
        let Some(changes) = changes else {
            let status = json!({
                "kind": "Status",
                "apiVersion": "v1",
                "status": "Failure",
                "reason": "Expired",
                "message": format!("too old resource version: {version} ({now})"),
                "code": 410,
            });
            return out.send(event("ERROR", &status)).await;
        };
        for change in changes {
            out.send(event(change.what, &change.object)).await?;
        }
        version = now;
        if let Ok(Ok(())) = timeout_at(end, news.changed()).await {
            continue;
        }
        if order.bookmarks {
            out.send(bookmark(order.resource, version, false)).await?;
        }
        return Ok(());
    }
}

fn event(what: &str, object: &Value) -> Part {
    // The API writes the type first.
    let object = object.to_string();
    Part::Bytes(format!("{{\"type\":\"{what}\",\"object\":{object}}}\n").into())
}

fn bookmark(resource: Resource, version: u64, initial_end: bool) -> Part {
    let mut metadata = json!({"resourceVersion": version.to_string(), "creationTimestamp": null});
    if initial_end {
        metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
    }
    let object = json!({
        "kind": resource.kind(),
        "apiVersion": resource.api_version(),
        "metadata": metadata,
    });
    event("BOOKMARK", &object)
}
