//! A status as metrics.

use std::collections::BTreeMap;

use ferrule_api::status::{Health, Status};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// A status as a source of metrics.
#[derive(Debug)]
pub(super) struct Exposed(pub(super) Status);

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
        pod_addresses(status, &mut encoder)?;
        no_local_endpoints(status, &mut encoder)
    }
}

/// kube-proxy's, whose name ends like a counter's: it is a number of the moment.
fn no_local_endpoints(
    status: &Status,
    encoder: &mut DescriptorEncoder,
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Service ports with policy Local whose endpoints are all on other nodes",
        None,
        MetricType::Gauge,
    )?;
    for (policy, number) in &status.programmed.no_local_endpoints {
        let labels = [("traffic_policy", policy.as_str())];
        let number = i64::try_from(*number).unwrap_or(i64::MAX);
        ConstGauge::new(number).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
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
    (
        "ferrule_draining_backends",
        "Real servers that take no new connections and have old ones",
        |s| count(s.draining.backends),
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
        "ferrule_stale_flows_forgotten",
        "Entries of connection tracking that led to backends which are gone",
        |s| s.draining.forgotten_flows,
    ),
    (
        "ferrule_stale_flow_failures",
        "Times that such entries could not be looked for",
        |s| s.draining.failed,
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
        "ferrule_drains_ended",
        "Leaving backends that lost their place",
        "reason",
        |s| &s.draining.ended,
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
        "ferrule_kubernetes_events",
        "Kubernetes Events about Services",
        "outcome",
        |s| &s.events,
    ),
    (
        "ferrule_pods_tidied",
        "Leases and pods' interfaces that were put in agreement",
        "what",
        |s| &s.pods.tidied,
    ),
];
