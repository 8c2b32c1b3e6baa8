//! Events that come in another order than they happened, and versions that are
//! not to be doubted without a reason.

use super::*;

/// A watch says of an object that it is gone before it says that it came.
#[tokio::test(start_paused = true)]
async fn events_out_of_order_are_not_believed() {
    let server = ApiServer::new(Streaming::Refused);
    server.put(service("first", 1)).unwrap();
    server.set_faults(Faults::these(vec![Fault::Swap(0); 100]));
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    let lists = server.lists();
    let key = server.put(service("short-lived", 2)).unwrap();
    server.delete(&key);
    let start = tokio::time::Instant::now();
    listener.listen(Duration::from_secs(5)).await;
    listener.until_equal(&server).await;
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "a thing that is gone was believed for {:?}",
        start.elapsed()
    );
    assert!(server.lists() > lists, "nothing was asked for anew");
}

/// However long a server is away, a watch goes on from where it was.
#[tokio::test(start_paused = true)]
async fn an_outage_is_no_reason_to_list_anew() {
    let server = ApiServer::new(Streaming::Served);
    server.put(service("first", 1)).unwrap();
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    let lists = server.lists();
    for fault in [
        Fault::Status(503, None),
        Fault::Status(401, None),
        Fault::Status(403, None),
        Fault::Status(429, Some(1)),
        Fault::Silent,
        Fault::Break(0),
    ] {
        server.set_faults(Faults::these(vec![fault.clone(); 10_000]));
        listener.listen(Duration::from_mins(10)).await;
        server.put(service("second", 2)).unwrap();
        server.set_faults(Faults::none());
        listener.until_equal(&server).await;
        assert_eq!(server.lists(), lists, "{fault:?}");
    }
    assert_eq!(listener.gone, []);
}

/// A server that answers, and breaks every answer off, is away all the time; one that
/// is back and has nothing to tell counts as back soon.
#[tokio::test(start_paused = true)]
async fn an_answer_alone_does_not_end_an_outage() {
    let server = ApiServer::new(Streaming::Served);
    server.put(service("first", 1)).unwrap();
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    server.set_faults(Faults::these(vec![Fault::Break(0); 10_000]));
    server.end_watches();
    // When watches are open that will break off, there is something to tell by them.
    listener.listen(Duration::from_secs(10)).await;
    server.put(service("second", 2)).unwrap();
    listener.listen(Duration::from_secs(10)).await;
    let away = |report: &Report| report.troubles.iter().any(|t| t.object == "Kubernetes API");
    assert!(away(&listener.report), "{:?}", listener.report);
    let end = tokio::time::Instant::now() + Duration::from_mins(10);
    while let Ok(update) = tokio::time::timeout_at(end, listener.updates.recv()).await {
        listener.take(update.expect("the source goes on"));
        assert!(away(&listener.report), "it was said to be back");
    }
    server.set_faults(Faults::none());
    listener.until_equal(&server).await;
    // A watch of before breaks off at its bookmark, and there is a pause behind it.
    listener.listen(Duration::from_mins(5)).await;
    assert_eq!(listener.report, Report::default());
}

/// A server that stops to serve streaming lists, or another one that never did.
#[tokio::test(start_paused = true)]
async fn a_server_that_streams_no_longer_is_listed_by_pages() {
    for later in [Streaming::Refused, Streaming::Ignored] {
        let server = ApiServer::new(Streaming::Served);
        server.put(service("first", 1)).unwrap();
        let mut listener = Listener::to(&server);
        listener.until_equal(&server).await;
        server.set_streaming(later);
        server.set_faults(Faults::these(vec![Fault::Status(410, None); 4]));
        listener.listen(Duration::from_mins(2)).await;
        let key = server.put(service("second", 2)).unwrap();
        server.compact();
        server.delete(&key);
        server.put(node("a", 1)).unwrap();
        server.compact();
        let start = tokio::time::Instant::now();
        listener.until_equal(&server).await;
        assert!(start.elapsed() < Duration::from_mins(5), "{later:?}");
        listener.listen(Duration::from_mins(5)).await;
        assert_eq!(listener.report, Report::default(), "{later:?}");
    }
}

/// A server whose every watch is too old at once, and one that refuses every list so,
/// are not asked in a circle, and are told.
#[tokio::test(start_paused = true)]
async fn versions_that_are_always_too_old_are_told_and_not_asked_for_in_a_circle() {
    let server = ApiServer::new(Streaming::Refused);
    server.put(service("a", 1)).unwrap();
    let mut listener = Listener::to(&server);
    listener.until_equal(&server).await;
    server.set_faults(Faults::these(vec![Fault::Status(410, None); 10_000]));
    server.end_watches();
    let before = server.requests();
    listener.listen(Duration::from_mins(5)).await;
    let asked = server.requests() - before;
    assert!(asked < 200, "{asked} requests in five minutes");
    let away = format!("{:?}", listener.report);
    assert!(away.contains("too old"), "{away}");
    server.set_faults(Faults::none());
    listener.listen(Duration::from_mins(5)).await;
    assert_eq!(listener.report, Report::default());
    assert_eq!(listener.gone, []);
}

/// A watch that is silent though its connection stands is given up, and another
/// server is asked, within the time that a watch may last.
#[tokio::test(start_paused = true)]
async fn a_half_open_watch_is_given_up() {
    let store = ApiServer::new(Streaming::Served);
    store.put(node("a", 1)).unwrap();
    // Two ways to one and the same state; the first goes silent in its streams.
    let mut listener = Listener::new(Servers::of(vec![
        ("first".to_owned(), client(&store)),
        ("second".to_owned(), client(&store)),
    ]));
    store.set_faults(Faults::these(vec![Fault::HalfOpen(0); 4]));
    let start = tokio::time::Instant::now();
    listener.until_equal(&store).await;
    assert!(start.elapsed() < Duration::from_mins(2), "as a list");
    store.set_faults(Faults::these(vec![Fault::HalfOpen(0); 4]));
    // The watches of before end by themselves, the next ones are silent.
    listener.listen(Duration::from_secs(61)).await;
    store.put(node("b", 2)).unwrap();
    let start = tokio::time::Instant::now();
    listener.until_equal(&store).await;
    assert!(start.elapsed() < Duration::from_secs(75), "as a watch");
}
