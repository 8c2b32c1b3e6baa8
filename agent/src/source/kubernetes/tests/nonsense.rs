//! Servers that refuse or answer nonsense to some questions and not to others: who is
//! asked next, for what, and how often.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http_body_util::{Either, Full};
use hyper::{Request, Response};
use kube_client::client::Body;

use super::super::reflector::{MOST_UNREADABLE, News, Reflector};
use super::*;

/// Code and body of an answer.
type Answer = (u16, String);

/// What is asked for, told from the query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Page,
    StreamingList,
    Watch,
}

impl Asked {
    fn of(path: &str) -> Self {
        match path {
            _ if path.contains("sendInitialEvents") => Self::StreamingList,
            _ if path.contains("watch=true") => Self::Watch,
            _ => Self::Page,
        }
    }
}

/// A way to a server on which some questions have another answer.
fn client_with(
    server: &Arc<ApiServer>,
    answer: impl Fn(Asked) -> Option<Answer> + Send + 'static,
) -> Client {
    let server = Arc::clone(server);
    let service = tower::service_fn(move |request: Request<Body>| {
        let server = Arc::clone(&server);
        let instead = answer(Asked::of(&request.uri().to_string()));
        async move {
            Ok::<_, Infallible>(match instead {
                Some((code, body)) => Response::builder()
                    .status(code)
                    .body(Either::Right(Full::from(body)))
                    .unwrap(),
                None => server.answer(request).await.map(Either::Left),
            })
        }
    });
    Client::new(service, "default")
}

fn error(code: u16, reason: &str) -> Answer {
    let status = json!({"kind": "Status", "code": code, "reason": reason, "message": "no"});
    let event = json!({"type": "ERROR", "object": status});
    (200, format!("{event}\n"))
}

fn nonsense() -> Answer {
    (200, "<html>\n".to_owned())
}

fn refusal(code: u16) -> Answer {
    (code, String::new())
}

#[tokio::test(start_paused = true)]
async fn another_server_is_asked_after_nonsense_and_an_error_in_the_stream() {
    for streaming in [Streaming::Served, Streaming::Refused] {
        for (asked, bad) in [
            (Asked::StreamingList, nonsense()),
            (Asked::StreamingList, error(500, "InternalError")),
            (Asked::Page, nonsense()),
            (Asked::Watch, nonsense()),
            (Asked::Watch, error(503, "ServiceUnavailable")),
        ] {
            let store = ApiServer::new(streaming);
            store.put(node("a", 1)).unwrap();
            let answers = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&answers);
            let what = format!("{streaming:?}, {asked:?}, {bad:?}");
            let first = client_with(&store, move |question| {
                (question == asked).then(|| {
                    count.fetch_add(1, Ordering::Relaxed);
                    bad.clone()
                })
            });
            let mut listener = Listener::new(Servers::of(vec![
                ("first".to_owned(), first),
                ("second".to_owned(), client(&store)),
            ]));
            let start = tokio::time::Instant::now();
            listener.until_equal(&store).await;
            // Watches end and are asked for again.
            listener.listen(Duration::from_mins(2)).await;
            let lists = store.lists();
            store.put(node("b", 2)).unwrap();
            listener.until_equal(&store).await;
            assert!(start.elapsed() < Duration::from_secs(130), "{what}");
            listener.listen(Duration::from_mins(2)).await;
            assert_eq!(listener.report, Report::default(), "{what}");
            assert_eq!(store.lists(), lists, "{what}: listed anew");
            // Each kind asked it once, at most.
            let answers = answers.load(Ordering::Relaxed);
            assert!(answers <= 4, "{what}: asked {answers} times");
        }
    }
}

/// What a server says within a stream is told with its address.
#[tokio::test(start_paused = true)]
async fn an_error_in_the_stream_names_the_server() {
    let store = ApiServer::new(Streaming::Refused);
    let client = client_with(&store, |asked| {
        (asked == Asked::Watch).then(|| error(500, "InternalError"))
    });
    let mut listener = Listener::new(Servers::of(vec![("only".to_owned(), client)]));
    listener.listen(Duration::from_secs(30)).await;
    let said = format!("{:?}", listener.report);
    assert!(
        said.contains("only: the server gave the watch up: 500 InternalError: no"),
        "{said}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_streaming_list_that_fails_is_asked_for_by_pages() {
    for (bad, most) in [
        (refusal(403), 4),
        (refusal(404), 4),
        (refusal(405), 4),
        (refusal(501), 4),
        (error(500, "InternalError"), 4),
        (error(403, "Forbidden"), 4),
        (error(410, "Expired"), 4),
        // It may be away: that says nothing about streaming lists until it comes often.
        (refusal(504), 12),
    ] {
        let store = ApiServer::new(Streaming::Served);
        store.put(node("a", 1)).unwrap();
        let (broken, answers) = (
            Arc::new(AtomicBool::new(true)),
            Arc::new(AtomicUsize::new(0)),
        );
        let (is_broken, count) = (Arc::clone(&broken), Arc::clone(&answers));
        let what = format!("{bad:?}");
        let client = client_with(&store, move |asked| {
            if asked != Asked::StreamingList {
                return None;
            }
            count.fetch_add(1, Ordering::Relaxed);
            is_broken.load(Ordering::Relaxed).then(|| bad.clone())
        });
        let mut listener = Listener::new(Servers::of(vec![("test".to_owned(), client)]));
        let start = tokio::time::Instant::now();
        listener.until_equal(&store).await;
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        listener.listen(Duration::from_mins(2)).await;
        assert_eq!(listener.report, Report::default(), "{what}");
        // Lists that follow soon are asked for by pages; after a while it is tried again.
        let mut again = async |pause| {
            listener.listen(pause).await;
            store.set_faults(Faults::these(vec![Fault::Status(410, None); 4]));
            store.end_watches();
            listener.listen(Duration::from_mins(1)).await;
            answers.load(Ordering::Relaxed)
        };
        let asked = again(Duration::ZERO).await;
        assert!(asked <= most, "{what}: asked {asked} times");
        broken.store(false, Ordering::Relaxed);
        let later = again(Duration::from_mins(10)).await;
        assert!(later > asked, "{what}: never tried again");
        assert_eq!(listener.report, Report::default(), "{what}");
    }
}

/// Lists work and watches do not: everything is listed ever less often, and it is said
/// all the time.
#[tokio::test(start_paused = true)]
async fn watches_of_nonsense_are_no_reason_to_list_in_a_circle() {
    for bad in [nonsense(), refusal(400), refusal(404)] {
        let store = ApiServer::new(Streaming::Refused);
        store.put(node("a", 1)).unwrap();
        store.put(range("r", 1)).unwrap();
        let broken = Arc::new(AtomicBool::new(true));
        let is_broken = Arc::clone(&broken);
        let what = format!("{bad:?}");
        let client = client_with(&store, move |asked| {
            let spoiled = asked == Asked::Watch && is_broken.load(Ordering::Relaxed);
            spoiled.then(|| bad.clone())
        });
        let mut listener = Listener::new(Servers::of(vec![("test".to_owned(), client)]));
        listener.until_equal(&store).await;
        listener.listen(Duration::from_mins(2)).await;
        let away = |report: &Report| {
            let problems = report.troubles.iter().map(|trouble| &trouble.problem);
            problems.clone().any(|problem| {
                let kinds = ["Node", "Service", "EndpointSlice", "ServiceCIDR"];
                kinds.iter().all(|kind| problem.contains(kind))
            })
        };
        assert!(away(&listener.report), "{what}: {:?}", listener.report);
        let lists = store.lists();
        let end = tokio::time::Instant::now() + Duration::from_mins(10);
        while let Ok(update) = tokio::time::timeout_at(end, listener.updates.recv()).await {
            listener.take(update.expect("the source goes on"));
            assert!(away(&listener.report), "{what}: it was said to be back");
        }
        // Three watches of each kind between two lists, half a minute apart.
        let lists = store.lists() - lists;
        assert!(lists <= 4 * 10, "{what}: {lists} lists in ten minutes");
        // What the lists show is still believed.
        store.put(node("b", 2)).unwrap();
        listener.until_equal(&store).await;
        broken.store(false, Ordering::Relaxed);
        listener.listen(Duration::from_mins(2)).await;
        assert_eq!(listener.report, Report::default(), "{what}");
        assert_eq!(listener.gone, [], "{what}");
    }
}

/// What a reflector told, put together.
struct Told {
    news: mpsc::Receiver<News>,
    objects: BTreeMap<ObjectKey, Object>,
    last: Option<News>,
    most: usize,
}

impl Told {
    fn of(client: Client, kind: Kind, most: usize) -> Self {
        let servers = Servers::of(vec![("test".to_owned(), client)]);
        let (sender, news) = mpsc::channel(4);
        tokio::spawn(Reflector::new(kind, servers, sender).of_at_most(most).run());
        Self {
            news,
            objects: BTreeMap::new(),
            last: None,
            most: 0,
        }
    }

    async fn listen(&mut self, span: Duration) {
        let end = tokio::time::Instant::now() + span;
        while let Ok(news) = tokio::time::timeout_at(end, self.news.recv()).await {
            let mut news = news.expect("the reflector goes on");
            for event in news.events.drain(..) {
                match event {
                    Event::Applied(object) => drop(self.objects.insert(object.key(), *object)),
                    Event::Deleted(key) => drop(self.objects.remove(&key)),
                }
                self.most = self.most.max(self.objects.len());
            }
            self.last = Some(news);
        }
    }
}

/// A made-up node.
fn made_up(number: usize) -> Value {
    let mut node = node(&format!("made-up-{number}"), 1);
    node["metadata"]["resourceVersion"] = json!((100 + number).to_string());
    node
}

/// A server makes up ever more names, in a watch or in lists that it breaks off.
#[tokio::test(start_paused = true)]
async fn made_up_names_are_bounded() {
    const MOST: usize = 10;
    for (asked, bound) in [(Asked::Watch, MOST), (Asked::Page, 2 * MOST)] {
        let store = ApiServer::new(Streaming::Refused);
        store.put(node("a", 1)).unwrap();
        let made = Arc::new(AtomicUsize::new(0));
        let mad = Arc::new(AtomicBool::new(true));
        let (count, is_mad) = (Arc::clone(&made), Arc::clone(&mad));
        let client = client_with(&store, move |question| {
            if question != asked || !is_mad.load(Ordering::Relaxed) {
                return None;
            }
            let nodes = (0..8).map(|_| made_up(count.fetch_add(1, Ordering::Relaxed)));
            Some(match question {
                Asked::Watch => {
                    let events = nodes.map(|node| json!({"type": "ADDED", "object": node}));
                    let lines: Vec<String> = events.map(|event| format!("{event}\n")).collect();
                    (200, lines.concat())
                }
                // One that is its own next page breaks off.
                Asked::Page | Asked::StreamingList => {
                    let list = json!({
                        "kind": "NodeList", "items": nodes.collect::<Vec<Value>>(),
                        "metadata": {"resourceVersion": "9", "continue": "again"},
                    });
                    (200, list.to_string())
                }
            })
        });
        let mut told = Told::of(client, Kind::Node, MOST);
        told.listen(Duration::from_mins(5)).await;
        assert!(made.load(Ordering::Relaxed) > 3 * MOST, "{asked:?}");
        assert!(told.most > MOST / 2, "{asked:?}: {}", told.most);
        assert!(told.most <= bound, "{asked:?}: {} names", told.most);
        let state = told.last.as_ref().map(|news| &news.state);
        assert!(state.is_some_and(|state| state.away.is_some()), "{asked:?}");
        // A whole list makes room for what there is, though there was none for it.
        mad.store(false, Ordering::Relaxed);
        store.set_faults(Faults::these(vec![Fault::Status(410, None)]));
        told.listen(Duration::from_mins(5)).await;
        assert_eq!(told.objects, truth(&store), "{asked:?}");
        assert_eq!(told.last.unwrap().state.away, None, "{asked:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_counted_beyond_a_limit() {
    let store = ApiServer::new(Streaming::Served);
    let names: Vec<String> = (0..MOST_UNREADABLE + 200)
        .map(|number| format!("s{number}"))
        .collect();
    for name in &names {
        let mut bad = service(name, 1);
        bad["spec"]["type"] = json!("Unheard");
        store.put(bad).unwrap();
    }
    let mut told = Told::of(client(&store), Kind::Service, 1_000_000);
    told.listen(Duration::from_secs(5)).await;
    let state = told.last.take().unwrap().state;
    assert_eq!(state.unreadable.len(), MOST_UNREADABLE);
    assert_eq!(state.unnamed, 200);
    let report = super::super::report(&BTreeMap::from([(Kind::Service, state)]));
    let last = report.troubles.last().unwrap();
    let says = format!("{} more cannot be read", names.len() - 50);
    assert!(last.problem.contains(&says), "{last:?}");
    for name in &names {
        store.put(service(name, 1)).unwrap();
    }
    told.listen(Duration::from_secs(5)).await;
    let state = told.last.take().unwrap().state;
    assert_eq!((state.unreadable.len(), state.unnamed), (0, 0));
}
