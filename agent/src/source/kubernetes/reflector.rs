//! Follows all objects of one kind: list, then watch, for ever.
//!
//! What is listed is told as it comes; that something is gone is told only when
//! a list is whole, or the server says so of the object itself. Where the stream
//! breaks off, or says something that makes no sense, it is asked for again from
//! the last version that was understood, so that nothing is lost in between.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use ferrule_api::status::cut;
use ferrule_model::cluster::Event;
use ferrule_model::kube::{Kind, ObjectKey};
use ferrule_model::names::ObjectName;
use hyper::StatusCode;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use super::failure::{Cause, Failure};
use super::servers::{Asked, Servers};
use super::stream::{Frames, whole};
use super::wire::{self, Frame, Item};

/// Objects of one page.
const PAGE: usize = 500;

/// Most pages of a list, and most objects. A cluster has some hundred thousand at
/// most; a server that goes on is none.
const MOST_PAGES: usize = 10_000;
const MOST_OBJECTS: usize = 1_000_000;

/// How long a watch lasts before it is asked for anew: so a connection that is
/// dead at the other end does not go unnoticed for long.
const WATCH: (u64, u64) = (45, 60);

/// How much longer than that a server may be silent.
const SILENCE: Duration = Duration::from_secs(10);

/// How long a server that was asked for a streaming list may be silent within it.
const STREAMING_SILENCE: Duration = Duration::from_secs(10);

/// Pause after a failure: doubles from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Longest that a server may ask to be left alone.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(2);

/// How long a server without the kind is not asked again.
const UNKNOWN_KIND: Duration = Duration::from_mins(10);

/// A watch of this length did its work, whatever ended it.
const LASTING: Duration = Duration::from_secs(10);

/// How long a server may take to tell a whole list by watching.
const LONGEST_LIST: Duration = Duration::from_mins(10);

/// How long a watch must stand before a server that was away counts as back, if it
/// has nothing to tell.
const SETTLED: Duration = Duration::from_secs(2);

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
    /// What to do about it.
    pub(super) remedy: String,
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
    /// It did so, and then failed so many times in a row.
    Yes(u32),
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
    /// It seems not to list by watching.
    NotStreamed(Failure),
    /// Nobody listens to us any more.
    Unheard,
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        match failure.cause {
            Cause::Refused(StatusCode::GONE) => Self::Gone,
            Cause::Refused(StatusCode::NOT_FOUND) => Self::NoSuchKind(failure),
            Cause::Unreachable
            | Cause::Untrusted
            | Cause::Refused(_)
            | Cause::TooNew
            | Cause::Nonsense => Self::Failed(failure),
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

/// Whether a list is one that a cluster can have.
fn bounded(fresh: &BTreeSet<ObjectName>) -> Result<(), Failure> {
    if fresh.len() <= MOST_OBJECTS {
        return Ok(());
    }
    Err(Failure::nonsense(format!(
        "a list of more than {MOST_OBJECTS} objects"
    )))
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
        // How often in a row a version was too old almost at once.
        let mut gone = 0_u32;
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
            if before.is_some() && began.elapsed() >= LASTING {
                gone = 0;
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
                    gone = gone.saturating_add(1);
                    if gone >= STUCK {
                        let before = self.state.away.take();
                        self.state.away = Some(Away {
                            since: before.map_or_else(now, |away| away.since),
                            words: "the server says of every version that it is too old".to_owned(),
                            remedy: "see what ails the API server, or name another in apiServer"
                                .to_owned(),
                        });
                    }
                    // Each list that works makes the pause short again.
                    let mut pause =
                        (BACKOFF.0 * 2_u32.saturating_pow(gone.min(20) - 1)).min(BACKOFF.1);
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
                Err(
                    Broken::NoSuchKind(failure)
                    | Broken::NotStreamed(failure)
                    | Broken::Failed(failure),
                ) => {
                    failures += u32::from(failure.is_of_version());
                    if failures >= STUCK && self.version.is_some() {
                        failures = 0;
                        self.version = None;
                    }
                    let before = self.state.away.take();
                    self.state.away = Some(Away {
                        since: before.map_or_else(now, |away| away.since),
                        words: shortened(failure.words),
                        remedy: failure.remedy,
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
                Err(Broken::NotStreamed(failure)) => {
                    debug!(kind = %self.kind, "no streaming list: {}", failure.words);
                    self.streaming = match self.streaming {
                        // Another server may be asked by now, or it was not its day.
                        Streaming::Yes(failures)
                            if failures + 1 < STUCK && !is_refusal(failure.cause) =>
                        {
                            Streaming::Yes(failures + 1)
                        }
                        Streaming::Yes(_) | Streaming::Unknown | Streaming::No => Streaming::No,
                    };
                    if self.streaming != Streaming::No {
                        return Err(Broken::Failed(failure));
                    }
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
        // A server that knows the parameters shows so by its list. One that does not
        // refuses them, or never says that the list is whole.
        let (body, asked) = match self.servers.get(&path).await {
            Err(failure) if is_refusal(failure.cause) => return Err(Broken::NotStreamed(failure)),
            other => other?,
        };
        let mut frames = Frames::new(body);
        let mut fresh = BTreeSet::new();
        let began = Instant::now();
        loop {
            if began.elapsed() > LONGEST_LIST {
                let words = format!("a list that is not whole after {LONGEST_LIST:?}");
                let failure = self.servers.broke_off(&asked, Failure::nonsense(words));
                return Err(Broken::NotStreamed(failure));
            }
            let line = match frames.next(STREAMING_SILENCE).await {
                Ok(Some(line)) => line,
                Ok(None) => {
                    let words = "the list ended before it was whole".to_owned();
                    let failure = asked.named(Failure::new(Cause::Unreachable, words));
                    return Err(Broken::NotStreamed(failure));
                }
                Err(failure) => {
                    let failure = self.servers.broke_off(&asked, failure);
                    return Err(Broken::NotStreamed(failure));
                }
            };
            match wire::frame(self.kind, &line)
                .map_err(|words| Broken::NotStreamed(asked.named(Failure::nonsense(words))))?
            {
                Frame::Applied(item) => {
                    fresh.insert(item.key.name.clone());
                    self.applied(item).await?;
                    bounded(&fresh).map_err(|failure| Broken::NotStreamed(asked.named(failure)))?;
                }
                Frame::Deleted(item) => {
                    fresh.remove(&item.key.name);
                    self.deleted(item.key.name).await?;
                }
                Frame::Bookmark {
                    resource_version,
                    initial_end: true,
                } => {
                    self.streaming = Streaming::Yes(0);
                    self.finish_list(&fresh, Some(resource_version)).await?;
                    // The same stream goes on as the watch.
                    return self.follow(frames, asked).await;
                }
                Frame::Bookmark { .. } => {}
                Frame::Error(status) => return Err(of_status(&status)),
            }
        }
    }

    async fn list_pages(&mut self) -> Result<(), Broken> {
        let mut fresh = BTreeSet::new();
        let mut next: Option<String> = None;
        for _ in 0..MOST_PAGES {
            let limit = self.paging.then(|| format!("limit={PAGE}"));
            let token = next
                .as_ref()
                .map(|token| format!("continue={}", escape(token)));
            let query: Vec<String> = limit.into_iter().chain(token).collect();
            let path = format!("{}?{}", path(self.kind), query.join("&"));
            let (body, asked) = self.servers.get(&path).await?;
            let body = match whole(body).await {
                Ok(body) => body,
                Err(failure) => {
                    let failure = self.servers.broke_off(&asked, failure);
                    return Err(Broken::Failed(failure));
                }
            };
            let page = wire::page(self.kind, &body)
                .map_err(|words| Broken::Failed(asked.named(Failure::nonsense(words))))?;
            drop(body);
            for item in page.items {
                fresh.insert(item.key.name.clone());
                self.applied(item).await?;
            }
            bounded(&fresh).map_err(|failure| Broken::Failed(asked.named(failure)))?;
            match page.next {
                Some(token) if Some(&token) == next.as_ref() => {
                    let words = "a page of the list is its own next page".to_owned();
                    return Err(Broken::Failed(Failure::nonsense(words)));
                }
                Some(token) => next = Some(token),
                None => {
                    self.paging = true;
                    return self.finish_list(&fresh, Some(page.resource_version)).await;
                }
            }
        }
        let words = format!("a list of more than {MOST_PAGES} pages");
        Err(Broken::Failed(Failure::nonsense(words)))
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
        let (body, asked) = self.servers.get(&path).await?;
        self.follow(Frames::new(body), asked).await
    }

    async fn follow(&mut self, mut frames: Frames, asked: Asked) -> Result<(), Broken> {
        loop {
            // What has come is told before it is waited for more.
            let longest = Duration::from_secs(WATCH.1) + SILENCE;
            if !frames.has_line() {
                self.flush().await?;
            }
            // A server that answers and breaks off is away still; one that has nothing to
            // tell is not.
            let next = if self.state.away.is_some() {
                let Ok(next) = timeout(SETTLED, frames.next(longest)).await else {
                    self.state.away = None;
                    continue;
                };
                next
            } else {
                frames.next(longest).await
            };
            let line = match next {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(()),
                Err(failure) => {
                    let failure = self.servers.broke_off(&asked, failure);
                    return Err(Broken::Failed(failure));
                }
            };
            let frame = wire::frame(self.kind, &line)
                .map_err(|words| Broken::Failed(asked.named(Failure::nonsense(words))))?;
            if !matches!(frame, Frame::Error(_)) {
                self.state.away = None;
            }
            match frame {
                Frame::Applied(Item {
                    resource_version, ..
                })
                | Frame::Deleted(Item {
                    resource_version, ..
                }) if self.is_past(&resource_version) => {
                    // What stands behind it may be older than what was told, and what
                    // was left out between the two will not come again.
                    debug!(kind = %self.kind, "events come out of order: {resource_version}");
                    return Err(Broken::Gone);
                }
                Frame::Applied(item) => {
                    self.version = Some(item.resource_version.clone());
                    self.applied(item).await?;
                }
                Frame::Deleted(item) => {
                    self.version = Some(item.resource_version);
                    self.deleted(item.key.name).await?;
                }
                // It only says what need not be asked for again.
                Frame::Bookmark {
                    resource_version, ..
                } if self.is_past(&resource_version) => {}
                Frame::Bookmark {
                    resource_version, ..
                } => self.version = Some(resource_version),
                Frame::Error(status) => return Err(of_status(&status)),
            }
        }
    }

    /// Whether a version comes before the one up to which everything was told.
    /// Versions that are no numbers cannot be compared.
    fn is_past(&self, version: &str) -> bool {
        let told = self.version.as_deref().map(str::parse::<u64>);
        match (version.parse::<u64>(), told) {
            (Ok(version), Some(Ok(told))) => version < told,
            (Ok(_) | Err(_), _) => false,
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
                self.state.unreadable.insert(name, shortened(words));
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

/// Whether a server refuses parameters that it does not know, or does not serve.
fn is_refusal(cause: Cause) -> bool {
    matches!(
        cause,
        Cause::Refused(StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY)
    )
}

fn of_status(status: &wire::Status) -> Broken {
    if status.code == StatusCode::GONE.as_u16() || status.reason == "Expired" {
        return Broken::Gone;
    }
    let cause = match StatusCode::from_u16(status.code) {
        _ if status.is_too_new() => Cause::TooNew,
        Ok(code) => Cause::Refused(code),
        Err(_) => Cause::Nonsense,
    };
    let wire::Status {
        code,
        reason,
        message,
        ..
    } = status;
    let words = format!("the server gave the watch up: {code} {reason}: {message}");
    Broken::Failed(Failure::new(cause, words))
}

/// A server's own words may be long, and stand in the log and in `status`.
fn shortened(mut words: String) -> String {
    cut(&mut words);
    words
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
