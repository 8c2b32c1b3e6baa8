//! Metrics over HTTP.
//!
//! They are made from the same answer as `status`, when they are asked for: so
//! the two never disagree, and nothing is counted twice. docs/status.md lists them.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ferrule_api::status::{Health, Status};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info};

use crate::desk::Desk;

/// Connections that are served at the same time.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may take for its request, and a connection altogether.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_mins(1);

/// Pause before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// `Content-Type` of the exposition format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until the program ends. A port that is taken is no reason for the agent to stop.
pub(crate) async fn serve(address: Option<SocketAddr>, desk: Arc<Desk>) {
    let Some(address) = address else {
        return;
    };
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                error!(%address, %error, "metrics cannot be served; free the port, or give another by --metrics");
                sleep(RETRY).await;
            }
        }
    };
    info!(%address, "metrics are served");
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let Ok((stream, _)) = listener.accept().await else {
            sleep(Duration::from_millis(100)).await;
            continue;
        };
        let desk = Arc::clone(&desk);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let desk = Arc::clone(&desk);
                async move { Ok::<_, Infallible>(answer(&request, &desk).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            match timeout(CONNECTION_TIMEOUT, connection).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => debug!(%error, "connection for metrics ended"),
            }
            drop(place);
        });
    }
}

async fn answer(request: &Request<Incoming>, desk: &Desk) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
    }
    let Some(status) = desk.status().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "the agent is busy\n");
    };
    match text(*status) {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            let kind = header::HeaderValue::from_static(OPEN_METRICS);
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            response
        }
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot be written\n"),
    }
}

fn plain(status: StatusCode, words: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(words));
    *response.status_mut() = status;
    response
}

/// The exposition of a status.
fn text(status: Status) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposed(status)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

/// A status as a source of metrics.
#[derive(Debug)]
struct Exposed(Status);

impl Collector for Exposed {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let status = &self.0;
        for (name, help, value) in GAUGES {
            let metric = ConstGauge::new(value(status));
            let descriptor = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(descriptor)?;
        }
        for (name, help, value) in SPANS {
            if let Some(value) = value(status) {
                let metric = ConstGauge::new(value);
                let kind = metric.metric_type();
                metric.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
            }
        }
        for (name, help, value) in COUNTERS {
            let metric = ConstCounter::new(value(status));
            let descriptor = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(descriptor)?;
        }
        for (name, help, label, values) in FAMILIES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (key, value) in values(status) {
                let labels = [(*label, key.as_str())];
                ConstCounter::new(*value).encode(family.encode_family(&labels)?)?;
            }
        }
        pod_addresses(status, &mut encoder)
    }
}

fn pod_addresses(status: &Status, encoder: &mut DescriptorEncoder) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "ferrule_pod_addresses",
        "Addresses of pod ranges",
        None,
        MetricType::Gauge,
    )?;
    for range in &status.pods.ranges {
        for (state, number) in [("used", range.used), ("free", range.free)] {
            let labels = [("range", range.range.as_str()), ("state", state)];
            let number = i64::try_from(number).unwrap_or(i64::MAX);
            ConstGauge::new(number).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Name, help, value.
type Metric<T> = (&'static str, &'static str, fn(&Status) -> T);

/// Name, help, label, values by label.
type Family = (
    &'static str,
    &'static str,
    &'static str,
    fn(&Status) -> &BTreeMap<String, u64>,
);

const GAUGES: &[Metric<i64>] = &[
    ("ferrule_healthy", "1 when there is no problem", |s| {
        i64::from(s.health == Health::Healthy)
    }),
    ("ferrule_problems", "Problems of this node", |s| {
        count(s.problem_count)
    }),
    ("ferrule_conditions", "Objects served only in part", |s| {
        count(s.condition_count)
    }),
    (
        "ferrule_source_complete",
        "1 when every source was read once",
        |s| i64::from(s.source.complete),
    ),
    ("ferrule_services", "Services with a frontend", |s| {
        count(s.programmed.services)
    }),
    ("ferrule_frontends", "Frontends", |s| {
        count(s.programmed.frontends)
    }),
    (
        "ferrule_frontends_rejecting",
        "Frontends without a usable endpoint",
        |s| count(s.programmed.rejecting),
    ),
    ("ferrule_node_ports", "Frontends on node ports", |s| {
        count(s.programmed.node_ports)
    }),
    (
        "ferrule_host_ports",
        "Frontends on host ports of pods",
        |s| count(s.programmed.host_ports),
    ),
    ("ferrule_vips", "Addresses on the VIP device", |s| {
        count(s.programmed.vips)
    }),
    ("ferrule_virtual_services", "IPVS virtual services", |s| {
        count(s.programmed.virtual_services)
    }),
    ("ferrule_real_servers", "IPVS real servers", |s| {
        count(s.programmed.real_servers)
    }),
    ("ferrule_node_routes", "Routes to other nodes' pods", |s| {
        count(s.programmed.routes)
    }),
    (
        "ferrule_changes_pending",
        "Addresses that wait to be changed",
        |s| count(s.programmed.pending),
    ),
    ("ferrule_pod_leases", "Pod interfaces with a lease", |s| {
        count(s.pods.leases)
    }),
];

const SPANS: &[Metric<Option<f64>>] = &[
    (
        "ferrule_audit_round_seconds",
        "Duration of the last full round over real servers",
        |s| s.audit.last_round,
    ),
    (
        "ferrule_audit_round_estimate_seconds",
        "Duration of a full round at the present pace",
        |s| s.audit.round_estimate,
    ),
    (
        "ferrule_last_change_seconds",
        "From the change of facts to the kernel, of the last change",
        |s| s.last_change.as_ref().map(|change| change.seen_to_kernel),
    ),
];

const COUNTERS: &[Metric<u64>] = &[
    (
        "ferrule_audit_rounds",
        "Full rounds over real servers",
        |s| s.audit.rounds,
    ),
    (
        "ferrule_failed_operations",
        "Operations of the kernel that failed",
        |s| s.failed_operations,
    ),
    (
        "ferrule_socket_calls",
        "Calls answered over the socket",
        |s| s.socket.calls,
    ),
    (
        "ferrule_socket_bad_requests",
        "Lines over the socket that were no request",
        |s| s.socket.bad_requests,
    ),
    (
        "ferrule_socket_refused_connections",
        "Connections of users that may not ask",
        |s| s.socket.refused_connections,
    ),
];

const FAMILIES: &[Family] = &[
    (
        "ferrule_drift_repaired",
        "What others changed and was put right",
        "kind",
        |s| &s.drift.repaired,
    ),
    (
        "ferrule_packets_refused",
        "Packets refused by our rules",
        "counter",
        |s| &s.packets.counters,
    ),
    (
        "ferrule_connections_masqueraded",
        "Connections whose source was replaced",
        "reason",
        |s| &s.packets.masqueraded,
    ),
    (
        "ferrule_pods_tidied",
        "Leases and pods' interfaces that were put in agreement",
        "what",
        |s| &s.pods.tidied,
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of docs/status.md names each metric.
    #[test]
    fn every_metric_is_documented() {
        let docs = include_str!("../../docs/status.md");
        let names = GAUGES.iter().map(|m| m.0).chain(SPANS.iter().map(|m| m.0));
        for name in names.chain(["ferrule_pod_addresses"]) {
            assert!(docs.contains(&format!("`{name}")), "{name}");
        }
        for name in COUNTERS
            .iter()
            .map(|m| m.0)
            .chain(FAMILIES.iter().map(|m| m.0))
        {
            assert!(docs.contains(&format!("`{name}_total")), "{name}_total");
        }
    }
}
