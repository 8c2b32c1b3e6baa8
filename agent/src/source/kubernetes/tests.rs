//! The source against a server that behaves, and one that does not. Nothing
//! goes over a network, and time passes as soon as everybody waits for it.

mod nonsense;
mod order;
mod secure;
mod size;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use ferrule_api_server::{ApiServer, Fault, Faults, Key, RESOURCES, Resource, Streaming};
use ferrule_model::cluster::Event;
use ferrule_model::kube::{Kind, Object, ObjectKey};
use ferrule_model::names::ObjectName;
use kube_client::Client;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::servers::Servers;
use super::{Report, Update, run, wire};

fn client(server: &Arc<ApiServer>) -> Client {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    Client::new(service, "default")
}

fn node(name: &str, number: u32) -> Value {
    json!({
        "kind": "Node", "apiVersion": "v1", "metadata": {"name": name},
        "spec": {"podCIDR": format!("10.{}.{}.0/24", number / 256 % 256, number % 256)},
    })
}

fn range(name: &str, number: u32) -> Value {
    json!({
        "kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1", "metadata": {"name": name},
        "spec": {"cidrs": [format!("10.{number}.0.0/16")]},
    })
}

fn service(name: &str, number: u32) -> Value {
    json!({
        "kind": "Service", "apiVersion": "v1", "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "clusterIP": format!("10.96.{}.{}", number / 256 % 256, number % 256),
            "ports": [{"port": 80, "protocol": "TCP"}],
        },
    })
}

/// What the source told, put together.
struct Listener {
    updates: mpsc::Receiver<Update>,
    task: JoinHandle<()>,
    objects: BTreeMap<ObjectKey, Object>,
    complete: bool,
    report: Report,
    /// Objects that it said are gone, in order.
    gone: Vec<ObjectKey>,
    /// Events that came.
    events: usize,
}

impl Listener {
    fn new(servers: Servers) -> Self {
        let (sender, updates) = mpsc::channel(4);
        Self {
            updates,
            task: tokio::spawn(run(servers, sender)),
            objects: BTreeMap::new(),
            complete: false,
            report: Report::default(),
            gone: Vec::new(),
            events: 0,
        }
    }

    fn to(server: &Arc<ApiServer>) -> Self {
        Self::new(Servers::of(vec![("test".to_owned(), client(server))]))
    }

    fn take(&mut self, update: Update) {
        assert!(
            update.complete || !self.complete,
            "complete once, complete for good"
        );
        self.complete = update.complete;
        if let Some(report) = update.report {
            self.report = report;
        }
        self.events += update.events.len();
        for event in update.events {
            match event {
                Event::Applied(object) => {
                    self.objects.insert(object.key(), *object);
                }
                Event::Deleted(key) => {
                    assert!(self.objects.remove(&key).is_some(), "{key} was never told");
                    self.gone.push(key);
                }
            }
        }
    }

    /// Listens until what it was told is what the server has.
    async fn until_equal(&mut self, server: &ApiServer) {
        let patience = Duration::from_hours(1);
        let equal = timeout(patience, async {
            while !(self.complete && self.objects == truth(server)) {
                let update = self.updates.recv().await.expect("the source goes on");
                self.take(update);
            }
        });
        assert!(
            equal.await.is_ok(),
            "{:#?}\ninstead of\n{:#?}",
            self.objects.keys(),
            server.objects().keys()
        );
    }

    /// Listens for a while.
    async fn listen(&mut self, span: Duration) {
        let end = tokio::time::Instant::now() + span;
        while let Ok(update) = tokio::time::timeout_at(end, self.updates.recv()).await {
            self.take(update.expect("the source goes on"));
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn kind_of(resource: Resource) -> Kind {
    match resource {
        Resource::Services => Kind::Service,
        Resource::EndpointSlices => Kind::EndpointSlice,
        Resource::Nodes => Kind::Node,
        Resource::ServiceCidrs => Kind::ServiceCidr,
    }
}

fn key_of(key: &Key) -> ObjectKey {
    ObjectKey {
        kind: kind_of(key.resource),
        name: ObjectName::new(&*key.namespace, &*key.name),
    }
}

/// What the server has, decoded as a single page.
fn truth(server: &ApiServer) -> BTreeMap<ObjectKey, Object> {
    let mut objects = BTreeMap::new();
    for (key, value) in server.objects() {
        let kind = kind_of(key.resource);
        let list = json!({
            "kind": format!("{kind}List"), "metadata": {"resourceVersion": "1"}, "items": [value],
        });
        let page = wire::page(kind, list.to_string().as_bytes()).unwrap();
        let [item] = page.items.try_into().unwrap();
        objects.insert(item.key, *item.object.unwrap());
    }
    objects
}

#[tokio::test(start_paused = true)]
async fn what_the_server_has_is_told_however_it_lists() {
    for streaming in [Streaming::Served, Streaming::Refused, Streaming::Ignored] {
        let server = ApiServer::new(streaming);
        for number in 0..1203 {
            server.put(service(&format!("s{number}"), number)).unwrap();
        }
        server.put(node("a", 1)).unwrap();
        let mut listener = Listener::to(&server);
        listener.until_equal(&server).await;
        assert_eq!(listener.objects.len(), 1204, "{streaming:?}");
        let key = server.put(service("new", 7)).unwrap();
        server.put(service("s5", 9999)).unwrap();
        listener.until_equal(&server).await;
        server.delete(&key);
        listener.until_equal(&server).await;
        assert_eq!(listener.gone, [key_of(&key)], "{streaming:?}");
        // Watches end and are asked for again; nothing is told twice as gone.
        listener.listen(Duration::from_mins(10)).await;
        server.put(node("b", 2)).unwrap();
        listener.until_equal(&server).await;
        assert_eq!(listener.report, Report::default(), "{streaming:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_went_while_nobody_looked_is_told_as_gone() {
    let server = ApiServer::new(Streaming::Served);
    let key = server.put(node("a", 1)).unwrap();
    server.put(node("b", 2)).unwrap();
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    // Away: every request is refused, and the watches of before end.
    server.set_faults(Faults::these(vec![Fault::Status(503, None); 10_000]));
    listener.listen(Duration::from_mins(5)).await;
    assert!(
        !listener.report.troubles.is_empty(),
        "nobody said that it is away"
    );
    assert!(listener.complete, "what is known stays known");
    server.delete(&key);
    server.compact();
    listener.listen(Duration::from_mins(5)).await;
    server.set_faults(Faults::none());
    listener.until_equal(&server).await;
    assert_eq!(listener.gone, [key_of(&key)]);
    listener.listen(Duration::from_mins(2)).await;
    assert_eq!(listener.report, Report::default());
}

#[tokio::test(start_paused = true)]
async fn an_object_that_cannot_be_read_hides_no_other() {
    let server = ApiServer::new(Streaming::Served);
    server.put(service("good", 1)).unwrap();
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    let before = listener.objects.clone();
    let mut bad = service("good", 2);
    bad["spec"]["ports"][0]["port"] = json!("eighty");
    server.put(bad).unwrap();
    let mut bad = service("bad", 3);
    bad["spec"]["type"] = json!("Unheard");
    let bad = server.put(bad).unwrap();
    server.put(node("a", 1)).unwrap();
    listener.listen(Duration::from_secs(5)).await;
    assert_eq!(
        listener.objects.len(),
        2,
        "the good one as it was, and the node"
    );
    assert!(
        before
            .iter()
            .all(|(key, object)| listener.objects[key] == *object)
    );
    let troubles: Vec<(&str, &str)> = listener
        .report
        .troubles
        .iter()
        .map(|trouble| {
            (
                &*trouble.object,
                trouble.problem.split(": ").next().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        troubles,
        [
            ("Service shop/bad", "spec.type"),
            ("Service shop/good", "spec.ports[0].port")
        ]
    );
    server.put(service("good", 4)).unwrap();
    server.delete(&bad);
    listener.until_equal(&server).await;
    listener.listen(Duration::from_secs(5)).await;
    assert_eq!(listener.report, Report::default());
    assert_eq!(listener.gone, [], "a bad object was never there");
}

#[tokio::test(start_paused = true)]
async fn another_server_is_asked_when_one_is_silent() {
    let dead = ApiServer::new(Streaming::Served);
    dead.set_faults(Faults::these(vec![Fault::Silent; 1000]));
    let alive = ApiServer::new(Streaming::Served);
    alive.put(node("a", 1)).unwrap();
    let mut listener = Listener::new(Servers::of(vec![
        ("dead".to_owned(), client(&dead)),
        ("alive".to_owned(), client(&alive)),
    ]));
    let start = tokio::time::Instant::now();
    listener.until_equal(&alive).await;
    assert!(
        start.elapsed() < Duration::from_mins(2),
        "{:?}",
        start.elapsed()
    );
}

/// Thousands of random steps: objects come, change and go while requests go
/// wrong in every way. Nothing is told as gone that was never deleted, and once
/// the server behaves, the truth is told.
#[tokio::test(start_paused = true)]
async fn a_server_that_misbehaves_is_outlived() {
    let seed = match std::env::var("FERRULE_API_SEED") {
        Ok(text) if !text.is_empty() => text.parse().unwrap(),
        _ => fastrand::u64(..1_000_000_000),
    };
    writeln!(std::io::stdout(), "FERRULE_API_SEED={seed}").unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..6 {
        let streaming = [Streaming::Served, Streaming::Refused, Streaming::Ignored][round % 3];
        let server = ApiServer::new(streaming);
        let mut listener = Listener::to(&server);
        server.set_faults(Faults::often(60, random.u64(..)));
        for step in 0..600 {
            let number = random.u32(0..200);
            match random.u32(0..10) {
                0..4 => drop(server.put(service(&format!("s{number}"), random.u32(..)))),
                4..6 if number < 20 => drop(server.put(range(&format!("r{number}"), number))),
                4..6 => drop(server.put(node(&format!("n{number}"), random.u32(..)))),
                6..9 => {
                    let keys: Vec<Key> = server.objects().into_keys().collect();
                    if !keys.is_empty() {
                        server.delete(&keys[random.usize(..keys.len())]);
                    }
                }
                _ => server.compact(),
            }
            let pause = Duration::from_millis(random.u64(0..4000));
            listener.listen(pause).await;
            for key in listener.gone.drain(..) {
                let deleted = RESOURCES.iter().any(|resource| {
                    kind_of(*resource) == key.kind
                        && server.was_deleted(&Key {
                            resource: *resource,
                            namespace: key.name.namespace.clone(),
                            name: key.name.name.clone(),
                        })
                });
                assert!(
                    deleted,
                    "{key} was told as gone at step {step}, seed {seed}"
                );
            }
        }
        server.set_faults(Faults::none());
        listener.until_equal(&server).await;
        listener.listen(Duration::from_mins(5)).await;
        assert_eq!(listener.report, Report::default(), "seed {seed}");
    }
}

#[test]
fn a_bookmark_without_its_version_is_no_bookmark() {
    let frame = |version: &str| {
        let event =
            json!({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}});
        wire::frame(Kind::Service, event.to_string().as_bytes())
    };
    assert!(frame("12").is_ok());
    let words = frame("").unwrap_err();
    assert!(words.contains("metadata.resourceVersion"), "{words}");
}
