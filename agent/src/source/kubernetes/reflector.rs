//! Follows all objects of one kind: list, then watch, for ever.
//!
//! What is listed is told as it comes; that something is gone is told only when
//! a list is whole, or the server says so of the object itself. Where the stream
//! breaks off, or says something that makes no sense, it is asked for again from
//! the last version that was understood, so that nothing is lost in between.

mod list;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use ferrule_api::status::cut;
use ferrule_model::cluster::Event;
use ferrule_model::kube::{Kind, ObjectKey};
use ferrule_model::names::ObjectName;
use hyper::StatusCode;
use tokio::sync::mpsc;
use tokio::time::{Instant as Clock, sleep, timeout};
use tracing::debug;

use super::failure::{Cause, Failure};
use super::servers::{Asked, Servers};
use super::stream::Frames;
use super::wire::{self, Frame, Item};

/// Objects of one page.
const PAGE: usize = 500;

/// Most pages of a list, and most objects. A cluster has some hundred thousand at
/// most; a server that goes on is none.
const MOST_PAGES: usize = 10_000;
const MOST_OBJECTS: usize = 1_000_000;

/// Most objects that cannot be read and are kept with the reason; others are counted.
pub(super) const MOST_UNREADABLE: usize = 1000;

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

/// How long pages are asked for after a streaming list failed. Lists are rare, and a
/// server that is updated, or another one, may well do it later.
const PAGES: Duration = Duration::from_mins(10);

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
    /// How many more there are.
    pub(super) unnamed: usize,
}

/// Whether lists are asked for by watching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Streaming {
    /// Nobody knows whether a server does so; it failed so many times in a row.
    Unknown(u32),
    /// A server did so, and then failed so many times in a row.
    Yes(u32),
    /// Pages are asked for until then.
    No(Clock),
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
    /// It does not list by watching, or seems not to: pages may do better.
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
    /// What cannot be read, beyond what the state has.
    unnamed: BTreeSet<ObjectName>,
    /// Most objects of a list.
    most: usize,
    /// Something of the list found no room beside what is known.
    passed_over: bool,
    /// The version up to which everything was told.
    version: Option<String>,
    streaming: Streaming,
    /// Whether lists are asked for page by page.
    paging: bool,
    /// Lists work and watches do not, so that a list alone ends no outage.
    doubted: bool,
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
            unnamed: BTreeSet::new(),
            most: MOST_OBJECTS,
            passed_over: false,
            version: None,
            streaming: Streaming::Unknown(0),
            paging: true,
            doubted: false,
            state: State::default(),
            told: State::default(),
            events: Vec::new(),
            seen: Instant::now(),
        }
    }

    /// One for a cluster of few objects.
    #[cfg(test)]
    pub(super) fn of_at_most(mut self, most: usize) -> Self {
        self.most = most;
        self
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
                    let worked = moved || began.elapsed() >= BACKOFF.0;
                    if !self.doubted {
                        self.state.away = None;
                        if worked {
                            pause = BACKOFF.0;
                        }
                    }
                    if worked {
                        Duration::ZERO
                    } else {
                        // A server that ends every watch at once is not asked in a circle.
                        grow(&mut pause)
                    }
                }
                Err(Broken::Unheard) => return,
                Err(Broken::Gone) => {
                    debug!(kind = %self.kind, "the watch is too old, everything is listed anew");
                    self.version = None;
                    gone = gone.saturating_add(1);
                    if gone >= STUCK {
                        self.doubted = true;
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
                    self.works();
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
                        self.doubted = true;
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

    /// Takes in that a server did not bring its answer to a good end.
    fn broke_off(&self, asked: &Asked, failure: Failure) -> Broken {
        self.servers.broke_off(asked, failure).into()
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
                let settled = if self.doubted { LASTING } else { SETTLED };
                let Ok(next) = timeout(settled, frames.next(longest)).await else {
                    self.works();
                    continue;
                };
                next
            } else {
                frames.next(longest).await
            };
            let line = match next {
                Ok(Some(line)) => line,
                Ok(None) => return Ok(()),
                Err(failure) => return Err(self.broke_off(&asked, failure)),
            };
            let frame = match wire::frame(self.kind, &line) {
                Ok(frame) => frame,
                Err(words) => return Err(self.broke_off(&asked, Failure::nonsense(words))),
            };
            if let Frame::Applied(item) = &frame
                && !self.known.contains(&item.key.name)
                && let Err(failure) = self.bounded(self.known.len() + 1)
            {
                return Err(self.broke_off(&asked, failure));
            }
            if !matches!(frame, Frame::Error(_)) {
                self.works();
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
                Frame::Error(status) => return Err(self.broke_off(&asked, of_status(&status))),
            }
        }
    }

    /// A watch does its work.
    fn works(&mut self) {
        self.doubted = false;
        self.state.away = None;
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

    /// Whether a cluster can have so many objects.
    fn bounded(&self, objects: usize) -> Result<(), Failure> {
        if objects <= self.most {
            return Ok(());
        }
        let words = format!("more than {} objects", self.most);
        Err(Failure::nonsense(words))
    }

    async fn applied(&mut self, item: Item) -> Result<(), Broken> {
        let name = item.key.name;
        match item.object {
            Ok(object) => {
                self.forget_unreadable(&name);
                // What a list that broke off made known is there until one is whole,
                // and each one may have made up other names.
                if self.known.len() >= 2 * self.most && !self.known.contains(&name) {
                    self.passed_over = true;
                    return Ok(());
                }
                self.known.insert(name);
                self.tell(Event::Applied(object)).await
            }
            // Its last good state stays.
            Err(words) => {
                self.unreadable(name, words);
                Ok(())
            }
        }
    }

    fn unreadable(&mut self, name: ObjectName, words: String) {
        let named = &mut self.state.unreadable;
        if named.len() < MOST_UNREADABLE || named.contains_key(&name) {
            self.unnamed.remove(&name);
            named.insert(name, shortened(words));
        } else if self.unnamed.len() < self.most {
            self.unnamed.insert(name);
        }
        self.state.unnamed = self.unnamed.len();
    }

    fn forget_unreadable(&mut self, name: &ObjectName) {
        self.state.unreadable.remove(name);
        self.unnamed.remove(name);
        self.state.unnamed = self.unnamed.len();
    }

    async fn deleted(&mut self, name: ObjectName) -> Result<(), Broken> {
        self.forget_unreadable(&name);
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

/// Whether a server refuses parameters that it does not know or does not serve, or
/// the verb `watch`.
fn is_refusal(cause: Cause) -> bool {
    matches!(
        cause,
        Cause::Refused(
            StatusCode::BAD_REQUEST
                | StatusCode::FORBIDDEN
                | StatusCode::NOT_FOUND
                | StatusCode::METHOD_NOT_ALLOWED
                | StatusCode::GONE
                | StatusCode::UNPROCESSABLE_ENTITY
                | StatusCode::NOT_IMPLEMENTED
        )
    )
}

fn of_status(status: &wire::Status) -> Failure {
    let cause = match StatusCode::from_u16(status.code) {
        _ if status.reason == "Expired" => Cause::Refused(StatusCode::GONE),
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
    Failure::new(cause, words)
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
