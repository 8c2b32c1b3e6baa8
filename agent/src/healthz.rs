//! The node's health over HTTP, where kube-proxy tells it: `/healthz` for balancers, `/livez`
//! for whoever would restart the agent.

use std::net::SocketAddr;
use std::sync::Arc;

use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode, header};
use k8s_openapi::jiff::Timestamp;

use crate::http::{self, Answer, plain};
use crate::programming::Programming;

/// Serves until the program ends.
pub(crate) async fn serve(address: Option<SocketAddr>, programming: Arc<Programming>) {
    let Some(address) = address else {
        return;
    };
    let listener = http::listen(address, "the node's health", "--healthz").await;
    http::serve(listener, move |request, _called| {
        let answer = answer(&request, &programming);
        async move { Some(answer) }
    })
    .await;
}

fn answer(request: &Request<Incoming>, programming: &Programming) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, path @ ("/healthz" | "/livez")) => tell(path, programming),
        (_, "/healthz" | "/livez") => plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n"),
        _ => plain(
            StatusCode::NOT_FOUND,
            "health is at /healthz, and at /livez without the state of the Node object\n",
        ),
    }
}

/// What kube-proxy says there: of `/livez` the Node object is no part.
fn tell(path: &str, programming: &Programming) -> Answer {
    let health = programming.health();
    let of_node = path == "/healthz";
    let healthy = health.is_up_to_date && (health.is_eligible || !of_node);
    let answers = if of_node {
        programming.healthz_answers()
    } else {
        programming.livez_answers()
    };
    let (status, code) = if healthy {
        (StatusCode::OK, "200")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "503")
    };
    answers.get_or_create(&[("code", code)]).inc();
    let now = Timestamp::now();
    // Who is healthy has looked just now whether there is something to do.
    let updated = if healthy { Some(now) } else { health.updated };
    let node = if of_node {
        format!(", \"nodeEligible\": {}", health.is_eligible)
    } else {
        String::new()
    };
    let body = format!(
        "{{\"lastUpdated\": \"{}\",\"currentTime\": \"{}\"{node}}}",
        written(updated),
        written(Some(now))
    );
    let mut answer = plain(status, body);
    let headers = answer.headers_mut();
    let json = header::HeaderValue::from_static("application/json");
    headers.insert(header::CONTENT_TYPE, json);
    let no_sniff = header::HeaderValue::from_static("nosniff");
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, no_sniff);
    answer
}

/// As Go writes a time; what never was is its zero.
fn written(time: Option<Timestamp>) -> String {
    time.map_or_else(
        || "0001-01-01 00:00:00 +0000 UTC".to_owned(),
        |time| time.strftime("%Y-%m-%d %H:%M:%S%.f +0000 UTC").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;
    use crate::programming::Noticed;

    async fn ask(path: &str, programming: &Programming) -> (u16, Value) {
        let answer = tell(path, programming);
        assert_eq!(answer.headers()["content-type"], "application/json");
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    #[tokio::test]
    async fn the_node_counts_for_healthz_and_not_for_livez() {
        let programming = Programming::new(Duration::from_secs(30));
        let (status, body) = ask("/healthz", &programming).await;
        assert_eq!((status, &body["nodeEligible"]), (200, &Value::Bool(true)));
        assert_eq!(body["lastUpdated"], body["currentTime"]);
        programming.note_node(true);
        let (status, body) = ask("/healthz", &programming).await;
        assert_eq!((status, &body["nodeEligible"]), (503, &Value::Bool(false)));
        let (status, body) = ask("/livez", &programming).await;
        assert_eq!((status, body.get("nodeEligible")), (200, None));
    }

    #[tokio::test]
    async fn a_change_that_waits_counts_for_both() {
        let programming = Programming::new(Duration::ZERO);
        let noticed = Noticed {
            services: 1,
            slices: 0,
        };
        programming.note_changes(noticed, Instant::now());
        for path in ["/healthz", "/livez"] {
            let (status, body) = ask(path, &programming).await;
            assert_eq!(status, 503, "{path}");
            assert_eq!(body["lastUpdated"], "0001-01-01 00:00:00 +0000 UTC");
        }
        programming.note_up_to_date();
        assert_eq!(ask("/healthz", &programming).await.0, 200);
    }

    #[test]
    fn times_are_written_as_go_does() {
        let time = Timestamp::from_microsecond(1_767_225_600_250_000).unwrap();
        assert_eq!(written(Some(time)), "2026-01-01 00:00:00.25 +0000 UTC");
    }
}
