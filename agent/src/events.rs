//! Kubernetes Events on the Services whose owner has something to correct.
//!
//! Every node finds the same faults, so an Event's name is made from what it says: one
//! node's is there, the others' are refused as existing already, and that is that. What
//! is told here was logged and stands in `status`; so an Event that cannot be written
//! is counted, shown and forgotten.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ferrule_api::status::Problem;
use ferrule_model::condition::{Condition, Reason};
use ferrule_model::kube::Kind;
use hyper::StatusCode;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::debug;

use crate::source::kubernetes::{Cause, Failure, Servers};

/// Events that wait to be written; what comes beyond is counted and not written.
const QUEUE: usize = 256;

/// Pause before each, of which a random part is taken: so that a whole cluster does not
/// tell the same at the same moment.
const PAUSE: Duration = Duration::from_secs(2);

/// How often one is tried, and the pause between two tries.
const TRIES: u32 = 3;
const RETRY: Duration = Duration::from_secs(10);

/// How long a refusal is told after it happened.
const TOLD: Duration = Duration::from_mins(10);

/// What is told in the field `reportingComponent`.
const COMPONENT: &str = "ferrule.io/agent";

/// How it went so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Written, by us or by another node.
    pub(crate) written: u64,
    /// Not written, for whatever reason.
    pub(crate) lost: u64,
    /// Why the last one was refused, and since and until when that is told.
    trouble: Option<Trouble>,
}

impl Tally {
    /// By name, as `status` has them.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        let counts = [("written", self.written), ("lost", self.lost)];
        counts.map(|(name, count)| (name.to_owned(), count)).into()
    }
}

#[derive(Clone, Debug)]
struct Trouble {
    words: String,
    since: u64,
    last: u64,
}

/// The way to tell.
#[derive(Clone, Debug, Default)]
pub(crate) struct Events {
    queue: Option<mpsc::Sender<Condition>>,
    tally: Arc<Mutex<Tally>>,
}

impl Events {
    /// Begins to write what is told; without a cluster nothing is.
    pub(crate) fn start(servers: Option<Servers>, node: &str) -> Self {
        let Some(servers) = servers else {
            return Self::default();
        };
        let (sender, queue) = mpsc::channel(QUEUE);
        let events = Self {
            queue: Some(sender),
            tally: Arc::default(),
        };
        let writer = Writer {
            servers,
            node: node.to_owned(),
            tally: Arc::clone(&events.tally),
        };
        tokio::spawn(writer.run(queue));
        events
    }

    /// Has a condition written to the Service that it is about, some time soon.
    pub(crate) fn tell(&self, condition: &Condition) {
        let Some(queue) = &self.queue else {
            return;
        };
        // Where a node has an address, nobody has anything to correct.
        let told = condition.reason != Reason::AddressOfNode;
        if condition.object.kind == Kind::Service
            && told
            && queue.try_send(condition.clone()).is_err()
        {
            self.lock().lost += 1;
        }
    }

    /// Whether there is a cluster to tell.
    pub(crate) fn has_cluster(&self) -> bool {
        self.queue.is_some()
    }

    /// How it went so far.
    pub(crate) fn tally(&self) -> Tally {
        self.lock().clone()
    }

    /// Why Events are not written, if they are not.
    pub(crate) fn problem(&self) -> Option<Problem> {
        let tally = self.tally();
        let trouble = tally.trouble?;
        // Nobody tries again before there is something to tell.
        if now() > trouble.last + TOLD.as_secs() {
            return None;
        }
        Some(Problem {
            object: "Kubernetes Events".to_owned(),
            problem: format!("are refused: {}", trouble.words),
            remedy: "let the agent's account create events (docs/kubernetes.md)".to_owned(),
            since: trouble.since,
            attempts: tally.lost,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Writer {
    servers: Servers,
    node: String,
    tally: Arc<Mutex<Tally>>,
}

impl Writer {
    async fn run(self, mut queue: mpsc::Receiver<Condition>) {
        while let Some(condition) = queue.recv().await {
            sleep(PAUSE.mul_f64(fastrand::f64())).await;
            let outcome = self.write_patiently(&condition).await;
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            match outcome {
                Ok(()) => {
                    tally.written += 1;
                    tally.trouble = None;
                }
                Err(failure) => {
                    debug!("no Event about {condition}: {}", failure.words);
                    tally.lost += 1;
                    // That a server cannot be reached is told by who follows it.
                    if matches!(failure.cause, Cause::Refused(code) if code.is_client_error()) {
                        let now = now();
                        let before = tally.trouble.take();
                        tally.trouble = Some(Trouble {
                            words: failure.words,
                            since: before.map_or(now, |before| before.since),
                            last: now,
                        });
                    }
                }
            }
        }
    }

    async fn write_patiently(&self, condition: &Condition) -> Result<(), Failure> {
        let mut tries = 0;
        loop {
            let failure = match self.write(condition).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            tries += 1;
            let hopeless = matches!(failure.cause, Cause::Refused(code)
                if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS);
            if hopeless || tries >= TRIES {
                return Err(failure);
            }
            sleep(
                failure
                    .retry_after
                    .unwrap_or_default()
                    .clamp(RETRY, RETRY * 6),
            )
            .await;
        }
    }

    async fn write(&self, condition: &Condition) -> Result<(), Failure> {
        let name = &condition.object.name;
        // `kubectl describe` asks for the Events of an object by its UID. Who lists needs
        // no other right than that to follow Services.
        let path = format!(
            "/api/v1/namespaces/{}/services?fieldSelector=metadata.name%3D{}&limit=1",
            name.namespace, name.name
        );
        let list: Value = self.servers.read(&path).await?;
        let Some(uid) = list["items"][0]["metadata"]["uid"].as_str() else {
            // It is gone, and nobody will ask.
            return Ok(());
        };
        let path = format!("/api/v1/namespaces/{}/events", name.namespace);
        let event = event(condition, uid, &self.node, Timestamp::now());
        match self.servers.post(&path, &event).await {
            Err(failure) if failure.cause == Cause::Refused(StatusCode::CONFLICT) => Ok(()),
            other => other,
        }
    }
}

/// The Event of a condition; the same at every node but for who tells it, and when.
fn event(condition: &Condition, uid: &str, node: &str, now: Timestamp) -> Event {
    let service = &condition.object.name;
    let reason = condition.reason.name();
    let mut hash = Sha256::new();
    for text in [uid, reason, &condition.message] {
        hash.update(text);
        hash.update([0]);
    }
    let digest: [u8; 32] = hash.finalize().into();
    let mut name = format!("{}.", service.name);
    for byte in &digest[..8] {
        let _a_string_has_room = write!(name, "{byte:02x}");
    }
    let namespace = Some(service.namespace.clone());
    // The API takes whole seconds here.
    let now = Timestamp::from_second(now.as_second()).unwrap_or(now);
    Event {
        metadata: ObjectMeta {
            name: Some(name),
            namespace: namespace.clone(),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace,
            name: Some(service.name.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(condition.message.clone()),
        source: Some(EventSource {
            component: Some(COMPONENT.to_owned()),
            host: Some(node.to_owned()),
        }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node.to_owned()),
        action: Some("Serve".to_owned()),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        count: Some(1),
        ..Event::default()
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use ferrule_api_server::{ApiServer, Fault, Faults, Streaming};
    use ferrule_model::kube::ObjectKey;
    use ferrule_model::names::ObjectName;
    use kube_client::Client;

    use super::*;

    fn servers(server: &Arc<ApiServer>) -> Servers {
        let server = Arc::clone(server);
        let service = tower::service_fn(move |request| {
            let server = Arc::clone(&server);
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        Servers::of(vec![("test".to_owned(), Client::new(service, "default"))])
    }

    fn condition(name: &str, message: &str) -> Condition {
        Condition {
            object: ObjectKey {
                kind: Kind::Service,
                name: ObjectName::new("shop", name),
            },
            reason: Reason::AddressConflict,
            message: message.to_owned(),
        }
    }

    fn with_service(name: &str) -> Arc<ApiServer> {
        let server = ApiServer::new(Streaming::Served);
        let service = serde_json::json!({
            "kind": "Service", "apiVersion": "v1",
            "metadata": {"name": name, "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
        });
        server.put(service).unwrap();
        server
    }

    async fn settled(events: &Events, written: u64, lost: u64) {
        let done = async {
            while (events.tally().written, events.tally().lost) != (written, lost) {
                sleep(Duration::from_millis(100)).await;
            }
        };
        let done = tokio::time::timeout(Duration::from_hours(1), done).await;
        assert!(done.is_ok(), "{:?}", events.tally());
    }

    /// However many nodes find it, there is one Event, which names the Service by UID.
    #[tokio::test(start_paused = true)]
    async fn all_nodes_together_write_one_event() {
        let server = with_service("web");
        let nodes = ["a", "b", "c"].map(|node| Events::start(Some(servers(&server)), node));
        for events in &nodes {
            events.tell(&condition("web", "another holds it"));
            events.tell(&condition("gone", "it is no more"));
            settled(events, 2, 0).await;
            assert_eq!(events.problem(), None);
        }
        let [event] = server.events().try_into().unwrap();
        assert_eq!(event["involvedObject"]["uid"], "uid-1");
        assert_eq!(event["reason"], "AddressConflict");
        assert_eq!(event["message"], "another holds it");
        assert_eq!(event["type"], "Warning");
        nodes[1].tell(&condition("web", "and another"));
        settled(&nodes[1], 3, 0).await;
        assert_eq!(server.events().len(), 2);
    }

    /// What cannot be written is counted; a refusal is told, an outage is waited for.
    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_written_is_counted_and_told() {
        let server = with_service("web");
        let events = Events::start(Some(servers(&server)), "a");
        server.set_faults(Faults::these(vec![Fault::Status(503, None); 2]));
        events.tell(&condition("web", "first"));
        settled(&events, 1, 0).await;
        server.set_faults(Faults::these(vec![Fault::Status(403, None); 1]));
        events.tell(&condition("web", "second"));
        settled(&events, 1, 1).await;
        let problem = events.problem().unwrap();
        assert!(problem.problem.contains("403"), "{problem:?}");
        for _ in 0..2 * QUEUE {
            events.tell(&condition("web", "third"));
        }
        let lost = events.tally().lost;
        assert!(lost > 100, "{lost}");
        settled(&events, 1 + 2 * 256 + 1 - lost, lost).await;
        assert_eq!(events.problem(), None);
        assert_eq!(server.events().len(), 2);
    }
}
