//! A Kubernetes API for tests.
//!
//! It holds objects as JSON and serves `list` and `watch` as the API's
//! documentation describes them: pages with `continue`, `resourceVersion`,
//! bookmarks, streaming lists, 410 for what is too old. Events can be created. It serves nothing else,
//! and whom it serves it asks for a token at most. [`Fault`]s make a request go
//! wrong in a way of the test's choice.
//!
//! [`ApiServer::answer`] needs no network; [`serve`] puts it behind HTTP, with the
//! certificate of an [`Authority`] behind TLS.

mod body;
mod certificate;
mod events;
mod fault;
mod serve;
mod store;
mod watch;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::{Request, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::watch as news;

pub use self::body::Body;
pub use self::certificate::{Authority, Identity, Validity};
pub use self::fault::{Fault, Faults};
pub use self::serve::{Acceptor, serve};
pub use self::store::{Key, RESOURCES, Resource};
use self::store::{Page, Store};

/// How the server takes a request for a streaming list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Streaming {
    /// As a server of this age does.
    #[default]
    Served,
    /// As one that knows the parameter and does not do it: 422.
    Refused,
    /// As one that does not know the parameter: an ordinary watch.
    Ignored,
}

/// The server.
#[derive(Debug)]
pub struct ApiServer {
    store: Mutex<Store>,
    changed: news::Sender<u64>,
    faults: Mutex<Faults>,
    streaming: Mutex<Streaming>,
    token: Mutex<Option<String>>,
    events: Mutex<Vec<Value>>,
    requests: AtomicU64,
    lists: AtomicU64,
    faults_made: AtomicU64,
    largest_page: AtomicUsize,
    /// How often all watches were ended.
    watches: news::Sender<u64>,
}

impl ApiServer {
    /// One without objects.
    #[must_use]
    pub fn new(streaming: Streaming) -> Arc<Self> {
        Arc::new(Self {
            store: Mutex::default(),
            changed: news::Sender::new(0),
            faults: Mutex::default(),
            streaming: Mutex::new(streaming),
            token: Mutex::default(),
            events: Mutex::default(),
            requests: AtomicU64::default(),
            lists: AtomicU64::default(),
            faults_made: AtomicU64::default(),
            largest_page: AtomicUsize::default(),
            watches: news::Sender::new(0),
        })
    }

    /// Creates or changes an object, which has kind, `apiVersion` and a name.
    ///
    /// # Errors
    /// When it is of a kind that is not served, or has no name.
    pub fn put(&self, object: Value) -> anyhow::Result<Key> {
        let mut store = lock(&self.store);
        let key = store.put(object)?;
        self.changed.send_replace(store.version());
        Ok(key)
    }

    /// Deletes an object, if it is there.
    pub fn delete(&self, key: &Key) {
        let mut store = lock(&self.store);
        store.delete(key);
        self.changed.send_replace(store.version());
    }

    /// Every object.
    pub fn objects(&self) -> BTreeMap<Key, Value> {
        lock(&self.store).objects()
    }

    /// Whether an object was ever deleted.
    pub fn was_deleted(&self, key: &Key) -> bool {
        lock(&self.store).was_deleted(key)
    }

    /// Forgets what happened before now: whoever watches from an older version,
    /// or is in the middle of a list, gets 410.
    pub fn compact(&self) {
        lock(&self.store).compact();
    }

    /// Ends every watch that goes on, as a server does that is asked to stop.
    pub fn end_watches(&self) {
        self.watches.send_modify(|ended| *ended += 1);
    }

    /// From now on requests go wrong like this.
    pub fn set_faults(&self, faults: Faults) {
        *lock(&self.faults) = faults;
        // What hangs is let go, so that a server that recovers does so.
        self.changed.send_modify(|_| {});
    }

    /// From now on streaming lists are taken like this.
    pub fn set_streaming(&self, streaming: Streaming) {
        *lock(&self.streaming) = streaming;
    }

    /// From now on a request must come with this token.
    pub fn set_token(&self, token: Option<&str>) {
        *lock(&self.token) = token.map(str::to_owned);
    }

    /// How many requests came, whatever became of them.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// How many requests were meant to go wrong.
    pub fn faults_made(&self) -> u64 {
        self.faults_made.load(Ordering::Relaxed)
    }

    /// How many lists were begun and granted, streaming ones among them.
    pub fn lists(&self) -> u64 {
        self.lists.load(Ordering::Relaxed)
    }

    /// Objects in the largest page that was asked for.
    pub fn largest_page(&self) -> usize {
        self.largest_page.load(Ordering::Relaxed)
    }

    /// Answers a request.
    pub async fn answer<B>(self: Arc<Self>, request: Request<B>) -> Response<Body>
    where
        B: hyper::body::Body,
    {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let (fault, patience) = {
            let mut faults = lock(&self.faults);
            (faults.next(), faults.patience)
        };
        self.faults_made
            .fetch_add(u64::from(fault.is_some()), Ordering::Relaxed);
        let hang = async {
            match patience {
                Some(patience) => tokio::time::sleep(patience).await,
                None => std::future::pending().await,
            }
        };
        if let Some(fault) = &fault {
            match fault {
                Fault::Status(code, retry_after) => {
                    return refused(*code, "asked for", *retry_after);
                }
                Fault::Silent => {
                    hang.await;
                    return answer(StatusCode::OK, Body::broken());
                }
                Fault::Late(delay) => {
                    tokio::select! {
                        () = tokio::time::sleep(*delay) => {}
                        () = hang => {}
                    }
                }
                _ => {}
            }
        }
        if let Some(token) = &*lock(&self.token) {
            let wanted = format!("Bearer {token}");
            let given = request.headers().get(header::AUTHORIZATION);
            if given.is_none_or(|given| given.as_bytes() != wanted.as_bytes()) {
                return refused(401, "Unauthorized", None);
            }
        }
        let Some(resource) = Resource::of_path(request.uri().path()) else {
            return self.of_namespace(request).await.unwrap_or_else(|| {
                let words = "the server could not find the requested resource";
                refused(404, words, None)
            });
        };
        let query = Query::parse(request.uri().query().unwrap_or_default());
        if query.get("resourceVersion").is_none() && query.get("continue").is_none() {
            self.lists.fetch_add(1, Ordering::Relaxed);
        }
        let body = if query.has("watch") {
            self.watch(resource, &query)
        } else {
            self.list(resource, &query)
        };
        match body {
            Ok(body) => answer(StatusCode::OK, fault::spoil(body, fault, patience)),
            Err(refusal) => *refusal,
        }
    }

    fn list(&self, resource: Resource, query: &Query) -> Result<Body, Box<Response<Body>>> {
        let limit = query.get("limit").and_then(|limit| limit.parse().ok());
        let page = lock(&self.store).page(resource, limit, query.get("continue"));
        let Page {
            items,
            version,
            next,
        } = page.ok_or_else(|| {
            Box::new(refused(
                410,
                "The provided continue parameter is too old",
                None,
            ))
        })?;
        self.largest_page.fetch_max(items.len(), Ordering::Relaxed);
        let mut metadata = json!({"resourceVersion": version.to_string()});
        if let Some(next) = next {
            metadata["continue"] = json!(next);
        }
        let list = json!({
            "kind": format!("{}List", resource.kind()),
            "apiVersion": resource.api_version(),
            "metadata": metadata,
            "items": items,
        });
        Ok(Body::whole(list.to_string()))
    }

    fn watch(
        self: Arc<Self>,
        resource: Resource,
        query: &Query,
    ) -> Result<Body, Box<Response<Body>>> {
        let streaming = query.get("sendInitialEvents") == Some("true");
        let served = *lock(&self.streaming);
        if streaming && served == Streaming::Refused {
            let words = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch";
            return Err(Box::new(refused(422, words, None)));
        }
        let seconds = query
            .get("timeoutSeconds")
            .and_then(|text| text.parse().ok());
        let from = query
            .get("resourceVersion")
            .and_then(|text| text.parse().ok());
        let order = watch::Order {
            resource,
            from: if streaming { None } else { from },
            initial_end: streaming && served == Streaming::Served,
            bookmarks: query.get("allowWatchBookmarks") == Some("true"),
            lasts: Duration::from_secs(seconds.unwrap_or(300)),
        };
        let news = self.changed.subscribe();
        let mut end = self.watches.subscribe();
        let ended = async move { drop(end.changed().await) };
        Ok(watch::start(self, order, news, ended))
    }
}

fn answer(code: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

fn refused(code: u16, words: &str, retry_after: Option<u64>) -> Response<Body> {
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": words,
        "code": code,
    });
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = answer(code, Body::whole(status.to_string()));
    if let Some(seconds) = retry_after {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

struct Query(BTreeMap<String, String>);

impl Query {
    fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        let pairs = pairs.map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (name.to_owned(), unescape(value))
        });
        Self(pairs.collect())
    }

    fn has(&self, name: &str) -> bool {
        matches!(self.get(name), Some("true" | "1"))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let hex = more.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        let byte = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok());
        if let Some(byte) = byte.filter(|_| *first == b'%') {
            bytes.push(byte);
            rest = &more[2..];
        } else {
            bytes.push(*first);
            rest = more;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
