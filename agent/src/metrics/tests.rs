//! The names that dashboards know, and docs/metrics.md.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use super::*;
use crate::programming::Noticed;

/// A status in which every metric has a value, and every label one.
fn status() -> Status {
    let counts = json!({"some": 1});
    let status = json!({
        "health": "healthy", "node": "a", "agentVersion": "0", "started": 0, "now": 0,
        "source": {"name": "", "complete": true, "services": 0, "endpointSlices": 0, "nodes": 0, "serviceCidrs": 0},
        "programmed": {
            "services": 0, "frontends": 0, "rejecting": 0, "vips": 0, "nodePorts": 0,
            "virtualServices": 0, "realServers": 0, "routes": 0, "nodeAddresses": [], "pending": 0,
            "noLocalEndpoints": {"internal": 2, "external": 0},
        },
        "lastChange": {"at": 0, "steps": 0, "seenToKernel": 0.5, "kernel": 0.1},
        "pods": {"leases": 0, "ranges": [{"range": "10.0.0.0/24", "used": 1, "free": 2}], "tidied": counts},
        "drift": {"repaired": counts},
        "audit": {"budgetPercent": 0.3, "done": 0, "total": 0, "rounds": 0, "lastRound": 1.0, "roundEstimate": 1.0},
        "packets": {"counters": counts, "masqueraded": counts},
        "events": counts, "problems": [], "problemCount": 0, "conditions": [], "conditionCount": 0,
    });
    serde_json::from_value(status).unwrap()
}

fn programming() -> Programming {
    let programming = Programming::new(Duration::from_secs(30));
    let noticed = Noticed {
        services: 3,
        slices: 5,
    };
    programming.note_changes(noticed, Instant::now());
    programming.note_trigger("2999-01-01T00:00:00Z");
    programming.note_pass(Duration::from_millis(3), false);
    programming.note_up_to_date();
    programming
}

/// A metric as it is exposed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Metric {
    kind: String,
    labels: BTreeSet<String>,
    help: String,
}

/// What stands in the classic format, by name.
fn exposed(text: &str) -> BTreeMap<String, Metric> {
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            let help = help.strip_suffix('.').unwrap_or(help).to_owned();
            metrics.entry(name.to_owned()).or_default().help = help;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            metrics.get_mut(name).unwrap().kind = kind.to_owned();
        } else {
            let (name, labels) = line.split_once('{').unwrap_or((line, ""));
            let name = name.split(' ').next().unwrap();
            let of_histogram = ["_bucket", "_sum", "_count"];
            let stem = of_histogram.iter().find_map(|end| name.strip_suffix(end));
            let name = stem
                .filter(|stem| metrics.contains_key(*stem))
                .unwrap_or(name);
            let metric = metrics.get_mut(name).unwrap();
            let labels = labels.split_once('}').map_or("", |(labels, _)| labels);
            let labels = labels.split(',').filter_map(|label| label.split_once('='));
            let labels = labels.map(|(name, _)| name.to_owned());
            metric.labels.extend(labels.filter(|name| name != "le"));
        }
    }
    metrics
}

fn all() -> BTreeMap<String, Metric> {
    exposed(&text(status(), &programming()).unwrap())
}

#[test]
fn what_kube_proxys_dashboards_know() {
    let expected = [
        ("network_programming_duration_seconds", "histogram", ""),
        ("proxy_healthz_total", "counter", "code"),
        ("proxy_livez_total", "counter", "code"),
        ("sync_full_proxy_rules_duration_seconds", "histogram", ""),
        ("sync_partial_proxy_rules_duration_seconds", "histogram", ""),
        ("sync_proxy_rules_duration_seconds", "histogram", ""),
        ("sync_proxy_rules_endpoint_changes_pending", "gauge", ""),
        ("sync_proxy_rules_endpoint_changes_total", "counter", ""),
        (
            "sync_proxy_rules_last_queued_timestamp_seconds",
            "gauge",
            "",
        ),
        ("sync_proxy_rules_last_timestamp_seconds", "gauge", ""),
        (
            "sync_proxy_rules_no_local_endpoints_total",
            "gauge",
            "traffic_policy",
        ),
        ("sync_proxy_rules_service_changes_pending", "gauge", ""),
        ("sync_proxy_rules_service_changes_total", "counter", ""),
    ];
    let all = all();
    let found: Vec<(&str, &str, String)> = all
        .iter()
        .filter_map(|(name, metric)| {
            let name = name.strip_prefix("kubeproxy_")?;
            let labels: Vec<&str> = metric.labels.iter().map(String::as_str).collect();
            Some((name, metric.kind.as_str(), labels.join(",")))
        })
        .collect();
    let expected: Vec<(&str, &str, String)> = expected
        .into_iter()
        .map(|(name, kind, labels)| (name, kind, labels.to_owned()))
        .collect();
    assert_eq!(found, expected);
}

/// Bounds as Go writes them: another way to write one is another series.
const OF_PASSES: &str = "0.001 0.002 0.004 0.008 0.016 0.032 0.064 0.128 0.256 0.512 1.024 2.048 \
                         4.096 8.192 16.384";
const OF_PROGRAMMING: &str = "0.25 0.5 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 \
     32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48 49 50 51 52 53 54 55 56 57 58 59 60 65 70 \
     75 80 85 90 95 100 105 110 115 120 150 180 210 240 270 300";

#[test]
fn buckets_are_kube_proxys() {
    let text = text(status(), &programming()).unwrap();
    for (name, expected) in [
        ("sync_proxy_rules_duration_seconds", OF_PASSES),
        ("sync_full_proxy_rules_duration_seconds", OF_PASSES),
        ("sync_partial_proxy_rules_duration_seconds", OF_PASSES),
        ("network_programming_duration_seconds", OF_PROGRAMMING),
    ] {
        let prefix = format!("kubeproxy_{name}_bucket{{le=\"");
        let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
        let bounds: Vec<&str> = lines.map(|line| line.split_once('"').unwrap().0).collect();
        assert_eq!(bounds.join(" "), format!("{expected} +Inf"), "{name}");
    }
}

#[test]
fn what_was_counted_is_told() {
    let text = text(status(), &programming()).unwrap();
    for line in [
        "kubeproxy_sync_proxy_rules_service_changes_total 3",
        "kubeproxy_sync_proxy_rules_service_changes_pending 0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 5",
        "kubeproxy_sync_proxy_rules_duration_seconds_count 1",
        "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 1",
        "kubeproxy_sync_full_proxy_rules_duration_seconds_count 0",
        "kubeproxy_network_programming_duration_seconds_count 1",
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total{traffic_policy=\"internal\"} 2",
        "kubeproxy_proxy_healthz_total{code=\"503\"} 0",
        "ferrule_drift_repaired_total{kind=\"some\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
}

/// A row for each metric of a prefix.
fn table(metrics: &BTreeMap<String, Metric>, prefix: &str) -> String {
    let mut table = "| metric | type | labels | |\n|---|---|---|---|\n".to_owned();
    for (name, metric) in metrics {
        if !name.starts_with(prefix) {
            continue;
        }
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|name| format!("`{name}`"))
            .collect();
        let Metric { kind, help, .. } = metric;
        writeln!(
            table,
            "| `{name}` | {kind} | {} | {help} |",
            labels.join(", ")
        )
        .unwrap();
    }
    table
}

/// The tables of docs/metrics.md are made of what is exposed; `UPDATE_GOLDEN=1` writes them.
#[test]
fn every_metric_is_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    let docs = fs::read_to_string(&path).unwrap();
    let metrics = all();
    let mut wanted = docs.clone();
    for prefix in ["kubeproxy_", "ferrule_"] {
        let (begin, end) = (
            format!("<!-- table: {prefix} -->\n"),
            "<!-- end of table -->",
        );
        let (before, rest) = wanted.split_once(&begin).unwrap();
        let (_, after) = rest.split_once(end).unwrap();
        wanted = format!("{before}{begin}\n{}\n{end}{after}", table(&metrics, prefix));
    }
    let known = |name: &String| name.starts_with("kubeproxy_") || name.starts_with("ferrule_");
    assert!(metrics.keys().all(known), "{:?}", metrics.keys());
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &wanted).unwrap();
        return;
    }
    let difference = similar::TextDiff::from_lines(&docs, &wanted);
    assert!(
        docs == wanted,
        "{}\nUPDATE_GOLDEN=1 cargo nextest run -p ferrule-agent every_metric writes it",
        difference.unified_diff()
    );
}
