//! Large clusters. `FERRULE_API_SERVICES` makes them larger.

use std::time::Instant;

use super::*;

/// Services unless told otherwise.
const USUAL: u32 = 5000;

fn slice(number: u32) -> Value {
    let endpoints = (0..3).map(|host| {
        json!({
            "addresses": [format!("10.244.{}.{}", number % 256, host + 1)],
            "conditions": {"ready": true},
            "nodeName": format!("node-{}", number % 100),
        })
    });
    json!({
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1",
        "metadata": {
            "name": format!("s{number}-x"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": format!("s{number}")},
        },
        "addressType": "IPv4", "ports": [{"port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints.collect::<Vec<Value>>(),
    })
}

/// Everything is told once, in bounded bits, and a change costs what a change costs.
#[tokio::test(start_paused = true)]
async fn thousands_of_services_are_told_once() {
    let count = match std::env::var("FERRULE_API_SERVICES") {
        Ok(text) if !text.is_empty() => text.parse().unwrap(),
        _ => USUAL,
    };
    for streaming in [Streaming::Served, Streaming::Refused] {
        let server = ApiServer::new(streaming);
        for number in 0..count {
            server.put(service(&format!("s{number}"), number)).unwrap();
            server.put(slice(number)).unwrap();
        }
        let start = Instant::now();
        let mut listener = Listener::to(&server);
        let all = usize::try_from(count).unwrap() * 2;
        let mut largest = 0;
        while !(listener.complete && listener.objects.len() == all) {
            let update = listener.updates.recv().await.expect("the source goes on");
            largest = largest.max(update.events.len());
            listener.take(update);
        }
        let took = start.elapsed();
        assert_eq!(listener.events, all, "{streaming:?}: each object once");
        assert!(largest <= 512, "{streaming:?}: {largest} events at a time");
        assert!(server.largest_page() <= 500, "{streaming:?}");
        listener.until_equal(&server).await;
        let before = listener.events;
        server.put(service("s7", 77_777)).unwrap();
        listener.listen(Duration::from_mins(3)).await;
        assert_eq!(listener.events, before + 1, "{streaming:?}: one for one");
        let mut out = std::io::stdout();
        writeln!(out, "{count} Services, {streaming:?}: {took:?}").unwrap();
    }
}
