//! Metrics over HTTP, and what kube-proxy serves beside its own.
//!
//! Ours are made from the same answer as `status`, when they are asked for: so the two
//! never disagree, and nothing is counted twice. Those that kube-proxy's dashboards know are
//! counted where things happen ([`Programming`]). docs/metrics.md lists all of them.

mod exposed;
mod format;

use std::net::SocketAddr;
use std::sync::Arc;

use ferrule_api::status::Status;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::sync::watch;

use self::exposed::Exposed;
use self::format::CLASSIC;
use crate::config::Config;
use crate::desk::Desk;
use crate::http::{self, Answer, plain};
use crate::programming::Programming;

/// What is asked when somebody asks.
#[derive(Debug)]
pub(crate) struct Face {
    pub(crate) desk: Arc<Desk>,
    pub(crate) programming: Arc<Programming>,
    /// The configuration that holds.
    pub(crate) configuration: Configuration,
}

/// The configuration, and what the agent has made of the command line.
#[derive(Debug)]
pub(crate) struct Configuration {
    pub(crate) held: watch::Receiver<Config>,
    pub(crate) node: String,
    pub(crate) healthz: Option<SocketAddr>,
    pub(crate) metrics: Option<SocketAddr>,
}

impl Configuration {
    fn effective(&self) -> Value {
        let held = self.held.borrow();
        held.effective(&self.node, self.healthz, self.metrics)
    }
}

/// Serves until the program ends.
pub(crate) async fn serve(address: Option<SocketAddr>, face: Face) {
    let Some(address) = address else {
        return;
    };
    let listener = http::listen(address, "metrics", "--metrics").await;
    let face = Arc::new(face);
    http::serve(listener, move |request, _called| {
        let face = Arc::clone(&face);
        async move { Some(answer(&request, &face).await) }
    })
    .await;
}

async fn answer(request: &Request<Incoming>, face: &Face) -> Answer {
    let path = request.uri().path();
    if !matches!(path, "/metrics" | "/configz" | "/proxyMode" | "/healthz") {
        return plain(
            StatusCode::NOT_FOUND,
            "there are /metrics, /configz, /proxyMode and /healthz\n",
        );
    }
    if !matches!(request.method(), &Method::GET | &Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    match path {
        "/proxyMode" => of_kind("text/plain; charset=utf-8", "ipvs".to_owned()),
        "/healthz" => of_kind("text/plain; charset=utf-8", "ok".to_owned()),
        "/configz" => {
            let text = json!({"kubeproxy.config.k8s.io": face.configuration.effective()});
            of_kind("application/json", text.to_string())
        }
        _ => metrics(face).await,
    }
}

fn of_kind(kind: &'static str, text: String) -> Answer {
    let mut response = Response::new(Full::from(text));
    let kind = header::HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    let no_sniff = header::HeaderValue::from_static("nosniff");
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, no_sniff);
    response
}

/// Whatever a request accepts, as kube-proxy does.
async fn metrics(face: &Face) -> Answer {
    let Some(status) = face.desk.status().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "the agent is busy\n");
    };
    match text(*status, &face.programming) {
        Ok(text) => of_kind(CLASSIC, text),
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot be written\n"),
    }
}

/// The exposition of a status, and of what was counted.
fn text(status: Status, programming: &Programming) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposed(status)));
    programming.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(format::classic(&text))
}

#[cfg(test)]
mod tests;
