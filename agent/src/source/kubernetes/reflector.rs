//! Follows all objects of one kind: list, then watch, for ever.
//!
//! What is listed is told as it comes; that something is gone is told only when
//! a list is whole, or the server says so of the object itself. Where the stream
//! breaks off, or says something that makes no sense, it is asked for again from
//! the last version that was understood, so that nothing is lost in between.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use bytes::BytesMut;
use ferrule_model::cluster::Event;
use ferrule_model::kube::{Kind, ObjectKey};
use ferrule_model::names::ObjectName;
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use kube_client::client::Body;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::servers::{Failure, Servers};
use super::wire::{self, Frame, Item};

/// Objects of one page.
const PAGE: usize = 500;

/// Most bytes of a page, and of a list from a server that knows no pages.
const LONGEST_PAGE: usize = 512 * 1024 * 1024;

/// Most bytes of an event; an object has 1.5 MB at most, and as much again of
/// what the server adds.
const LONGEST_FRAME: usize = 16 * 1024 * 1024;

/// How long a watch lasts before it is asked for anew: so a connection that is
/// dead at the other end does not go unnoticed for long.
const WATCH: (u64, u64) = (45, 60);

/// How much longer than that a server may be silent.
const SILENCE: Duration = Duration::from_secs(10);

/// How long a server that was asked for a streaming list may be silent within it.
const STREAMING_SILENCE: Duration = Duration::from_secs(10);

/// How long the body of a list may pause.
const PAGE_SILENCE: Duration = Duration::from_secs(30);

/// Pause after a failure: doubles from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Longest that a server may ask to be left alone.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(2);

/// How long a server without the kind is not asked again.
const UNKNOWN_KIND: Duration = Duration::from_mins(10);

/// Failures at one version after which everything is listed anew.
const STUCK: u32 = 3;

/// Events that are told at a time.
const BATCH: usize = 512;

/// What a reflector tells.
#[derive(Debug)]
pub(super) struct News {
    pub(super) kind: Kind,
    pub(super) events: Vec<Event>,
    pub(super) state: State,
    pub(super) seen: Instant,
}

/// The server is away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Away {
    /// Since when, in seconds since 1970.
    pub(super) since: u64,
    /// What happened at the last try.
    pub(super) words: String,
}

/// How a reflector fares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// A list was whole once.
    pub(super) listed: bool,
    /// Whether it does not hear from the server.
    pub(super) away: Option<Away>,
    /// Objects that cannot be read, and why.
    pub(super) unreadable: BTreeMap<ObjectName, String>,
}

/// Whether the server can list by watching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Streaming {
    Unknown,
    Yes,
    No,
}

/// What ended a list or a watch before its time.
#[derive(Debug)]
enum Broken {
    /// It is tried again.
    Failed(Failure),
    /// The version is too old: everything must be listed anew.
    Gone,
    /// The server does not have the kind.
    NoSuchKind(Failure),
    /// Nobody listens to us any more.
    Unheard,
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        match failure.code {
            Some(StatusCode::GONE) => Self::Gone,
            Some(StatusCode::NOT_FOUND) => Self::NoSuchKind(failure),
            _ => Self::Failed(failure),
        }
    }
}

/// Follows one kind.
pub(super) struct Reflector {
    kind: Kind,
    servers: Servers,
    out: mpsc::Sender<News>,
    /// What the receiver was told of, by name.
    known: BTreeSet<ObjectName>,
    /// The version up to which everything was told.
    version: Option<String>,
    streaming: Streaming,
    /// Whether lists are asked for page by page.
    paging: bool,
    state: State,
    told: State,
    events: Vec<Event>,
    seen: Instant,
}

impl Reflector {
    pub(super) fn new(kind: Kind, servers: Servers, out: mpsc::Sender<News>) -> Self {
        Self {
            kind,
            servers,
            out,
            known: BTreeSet::new(),
            version: None,
            streaming: Streaming::Unknown,
            paging: true,
            state: State::default(),
            told: State::default(),
            events: Vec::new(),
            seen: Instant::now(),
        }
    }

    /// Follows until nobody listens.
    pub(super) async fn run(mut self) {
        let mut pause = BACKOFF.0;
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let before = self.version.clone();
            let outcome = match self.version.clone() {
                None => self.list().await,
                Some(version) => self.watch(version).await,
            };
            let moved = self.version != before;
            if moved {
                failures = 0;
            }
            let wait = match outcome {
                Ok(()) => {
                    self.state.away = None;
                    if moved || began.elapsed() >= BACKOFF.0 {
                        pause = BACKOFF.0;
                        Duration::ZERO
                    } else {
                        // A server that ends every watch at once is not asked in a circle.
                        grow(&mut pause)
                    }
                }
                Err(Broken::Unheard) => return,
                Err(Broken::Gone) => {
                    debug!(kind = %self.kind, "the watch is too old, everything is listed anew");
                    if self.version.take().is_none() {
                        // Within a list: pages that outlive their state. All at once, then.
                        self.paging = false;
                    }
                    grow(&mut pause)
                }
                // A server that has told of some has the kind, whatever it says now.
                Err(Broken::NoSuchKind(failure))
                    if self.kind == Kind::ServiceCidr && self.known.is_empty() =>
                {
                    debug!(kind = %self.kind, "not served: {}", failure.words);
                    if self.finish_list(&BTreeSet::new(), None).await.is_err() {
                        return;
                    }
                    self.state.away = None;
                    UNKNOWN_KIND
                }
                Err(Broken::NoSuchKind(failure) | Broken::Failed(failure)) => {
                    failures += 1;
                    if failures >= STUCK && self.version.is_some() {
                        failures = 0;
                        self.version = None;
                    }
                    let before = self.state.away.take();
                    self.state.away = Some(Away {
                        since: before.map_or_else(now, |away| away.since),
                        words: failure.words,
                    });
                    let asked = failure.retry_after.unwrap_or_default();
                    grow(&mut pause).max(asked.min(LONGEST_RETRY_AFTER))
                }
            };
            if self.flush().await.is_err() {
                return;
            }
            sleep(wait).await;
        }
    }

    async fn list(&mut self) -> Result<(), Broken> {
        if self.streaming != Streaming::No {
            match self.list_streaming().await {
                Err(Broken::Failed(failure)) if self.streaming == Streaming::Unknown => {
                    // A server that knows the parameters has shown so by its first list. One
                    // that does not refuses them, or never says that the list is whole.
                    debug!(kind = %self.kind, "no streaming list: {}", failure.words);
                    if !matches!(
                        failure.code,
                        None | Some(StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
                    ) {
                        return Err(Broken::Failed(failure));
                    }
                    self.streaming = Streaming::No;
                }
                other => return other,
            }
        }
        self.list_pages().await
    }

    async fn list_streaming(&mut self) -> Result<(), Broken> {
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&sendInitialEvents=true\
             &resourceVersionMatch=NotOlderThan&timeoutSeconds={}",
            path(self.kind),
            watch_time(),
        );
        let answer = self.servers.get(&path).await?;
        let mut frames = Frames::new(answer.into_body());
        let mut fresh = BTreeSet::new();
        loop {
            let line = match frames.next(STREAMING_SILENCE).await {
                Ok(Some(line)) => line,
                Ok(None) => return Err(failed("the list ended before it was whole")),
                Err(words) => {
                    self.servers.broke_off();
                    return Err(failed(&words));
                }
            };
            match wire::frame(self.kind, &line).map_err(|words| failed(&words))? {
                Frame::Applied(item) => {
                    fresh.insert(item.key.name.clone());
                    self.applied(item).await?;
                }
                Frame::Deleted(item) => {
                    fresh.remove(&item.key.name);
                    self.deleted(item.key.name).await?;
                }
                Frame::Bookmark {
                    resource_version,
                    initial_end: true,
                } => {
                    self.streaming = Streaming::Yes;
                    self.finish_list(&fresh, Some(resource_version)).await?;
                    // The same stream goes on as the watch.
                    return self.follow(frames).await;
                }
                Frame::Bookmark { .. } => {}
                Frame::Error(status) => return Err(of_status(&status)),
            }
        }
    }

    async fn list_pages(&mut self) -> Result<(), Broken> {
        let mut fresh = BTreeSet::new();
        let mut next: Option<String> = None;
        loop {
            let limit = self.paging.then(|| format!("limit={PAGE}"));
            let token = next
                .as_ref()
                .map(|token| format!("continue={}", escape(token)));
            let query: Vec<String> = limit.into_iter().chain(token).collect();
            let path = format!("{}?{}", path(self.kind), query.join("&"));
            let answer = self.servers.get(&path).await?;
            let body = match whole(answer.into_body()).await {
                Ok(body) => body,
                Err(words) => {
                    self.servers.broke_off();
                    return Err(failed(&words));
                }
            };
            let page = wire::page(self.kind, &body).map_err(|words| failed(&words))?;
            drop(body);
            for item in page.items {
                fresh.insert(item.key.name.clone());
                self.applied(item).await?;
            }
            match page.next {
                Some(token) if Some(&token) == next.as_ref() => {
                    return Err(failed("a page of the list is its own next page"));
                }
                Some(token) => next = Some(token),
                None => {
                    self.paging = true;
                    return self.finish_list(&fresh, Some(page.resource_version)).await;
                }
            }
        }
    }

    /// What was known and is not in a whole list is gone.
    async fn finish_list(
        &mut self,
        fresh: &BTreeSet<ObjectName>,
        version: Option<String>,
    ) -> Result<(), Broken> {
        let gone: Vec<ObjectName> = self.known.difference(fresh).cloned().collect();
        for name in gone {
            self.deleted(name).await?;
        }
        self.state.unreadable.retain(|name, _| fresh.contains(name));
        self.version = version;
        if !self.state.listed {
            info!(kind = %self.kind, objects = fresh.len(), "listed");
        }
        self.state.listed = true;
        self.state.away = None;
        self.flush().await
    }

    async fn watch(&mut self, version: String) -> Result<(), Broken> {
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={}",
            path(self.kind),
            escape(&version),
            watch_time(),
        );
        let answer = self.servers.get(&path).await?;
        self.state.away = None;
        self.follow(Frames::new(answer.into_body())).await
    }

    async fn follow(&mut self, mut frames: Frames) -> Result<(), Broken> {
        loop {
            // What has come is told before it is waited for more.
            let longest = Duration::from_secs(WATCH.1) + SILENCE;
            if !frames.has_line() {
                self.flush().await?;
            }
            let line = match frames.next(longest).await {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(()),
                Err(words) => {
                    self.servers.broke_off();
                    return Err(failed(&words));
                }
            };
            match wire::frame(self.kind, &line).map_err(|words| failed(&words))? {
                Frame::Applied(item) => {
                    self.version = Some(item.resource_version.clone());
                    self.applied(item).await?;
                }
                Frame::Deleted(item) => {
                    self.version = Some(item.resource_version);
                    self.deleted(item.key.name).await?;
                }
                Frame::Bookmark {
                    resource_version, ..
                } => self.version = Some(resource_version),
                Frame::Error(status) => return Err(of_status(&status)),
            }
        }
    }

    async fn applied(&mut self, item: Item) -> Result<(), Broken> {
        let name = item.key.name;
        match item.object {
            Ok(object) => {
                self.state.unreadable.remove(&name);
                self.known.insert(name);
                self.tell(Event::Applied(object)).await
            }
            // Its last good state stays.
            Err(words) => {
                self.state.unreadable.insert(name, words);
                Ok(())
            }
        }
    }

    async fn deleted(&mut self, name: ObjectName) -> Result<(), Broken> {
        self.state.unreadable.remove(&name);
        if !self.known.remove(&name) {
            return Ok(());
        }
        let kind = self.kind;
        self.tell(Event::Deleted(ObjectKey { kind, name })).await
    }

    async fn tell(&mut self, event: Event) -> Result<(), Broken> {
        if self.events.is_empty() {
            self.seen = Instant::now();
        }
        self.events.push(event);
        if self.events.len() >= BATCH {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        if self.events.is_empty() && self.state == self.told {
            return Ok(());
        }
        let news = News {
            kind: self.kind,
            events: std::mem::take(&mut self.events),
            state: self.state.clone(),
            seen: self.seen,
        };
        self.told = self.state.clone();
        self.out.send(news).await.map_err(|_| Broken::Unheard)
    }
}

fn failed(words: &str) -> Broken {
    Broken::Failed(Failure::new(words.to_owned()))
}

fn of_status(status: &wire::Status) -> Broken {
    if status.code == StatusCode::GONE.as_u16() || status.reason == "Expired" {
        return Broken::Gone;
    }
    let wire::Status {
        code,
        reason,
        message,
    } = status;
    failed(&format!(
        "the server gave the watch up: {code} {reason}: {message}"
    ))
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Returns the pause with a random part, and doubles it.
fn grow(pause: &mut Duration) -> Duration {
    let now = *pause;
    *pause = (now * 2).min(BACKOFF.1);
    now.mul_f64(0.5 + fastrand::f64())
}

/// Not the same at every node: so they do not all ask at once.
fn watch_time() -> u64 {
    fastrand::u64(WATCH.0..=WATCH.1)
}

fn path(kind: Kind) -> &'static str {
    match kind {
        Kind::Service => "/api/v1/services",
        Kind::EndpointSlice => "/apis/discovery.k8s.io/v1/endpointslices",
        Kind::Node => "/api/v1/nodes",
        Kind::ServiceCidr => "/apis/networking.k8s.io/v1/servicecidrs",
    }
}

/// A value for the query of a URL: what is not certain to be harmless is written by its number.
fn escape(value: &str) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            let _a_string_has_room = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// The whole body of an answer.
async fn whole(mut body: Body) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    loop {
        let frame = timeout(PAGE_SILENCE, body.frame())
            .await
            .map_err(|_| format!("a list paused for more than {PAGE_SILENCE:?}"))?;
        let Some(frame) = frame else {
            return Ok(bytes);
        };
        let frame = frame.map_err(|error| super::servers::chain(&error))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > LONGEST_PAGE {
            return Err(format!("a list of more than {LONGEST_PAGE} bytes"));
        }
        bytes.extend_from_slice(&data);
    }
}

/// The lines of a body.
struct Frames {
    body: Body,
    buffer: BytesMut,
    /// Up to where there is no end of line.
    searched: usize,
}

impl Frames {
    fn new(body: Body) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
        }
    }

    fn end_of_line(&mut self) -> Option<usize> {
        let end = self.buffer[self.searched..]
            .iter()
            .position(|b| *b == b'\n');
        let end = end.map(|end| end + self.searched);
        self.searched = end.unwrap_or(self.buffer.len());
        end
    }

    /// Whether the next line is here already.
    fn has_line(&mut self) -> bool {
        self.end_of_line().is_some()
    }

    /// The next line; `None` at the end. What is left behind the last line was
    /// cut off, and is no line.
    async fn next(&mut self, longest: Duration) -> Result<Option<BytesMut>, String> {
        loop {
            if let Some(end) = self.end_of_line() {
                let mut line = self.buffer.split_to(end + 1);
                self.searched = 0;
                line.truncate(end);
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            let frame = timeout(longest, self.body.frame())
                .await
                .map_err(|_| format!("the server was silent for {longest:?}"))?;
            let Some(frame) = frame else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| super::servers::chain(&error))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if self.buffer.len() + data.len() > LONGEST_FRAME + 1 {
                return Err(format!("an event of more than {LONGEST_FRAME} bytes"));
            }
            self.buffer.extend_from_slice(&data);
        }
    }
}
