//! Where kube-proxy was: what its configuration leads to, and what it served.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::audit::status;
use super::world::{self, Backend};
use crate::context::Context;
use crate::http::{self, Answer};
use crate::netns::Netns;
use crate::node::{Node, manifest};
use crate::pod::Pod;
use crate::{dump, wait};

const HEAD: &str =
    "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n";

/// The one complaint that promtool may have: the name is kube-proxy's.
const COMPLAINT: &str = "kubeproxy_sync_proxy_rules_no_local_endpoints_total non-counter metrics \
                         should not have \"_total\" suffix";

fn health(netns: &Netns, path: &str) -> anyhow::Result<Answer> {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 10256);
    http::get(netns, to, path, "")
}

fn ask(netns: &Netns, path: &str, more: &str) -> anyhow::Result<Answer> {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 10249);
    http::get(netns, to, path, more)
}

/// Health by the Node object and by changes that wait, mode, configuration, metrics.
pub(super) fn served_where_kube_proxy_did(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let netns = node.netns();
    node.write_config(&format!(
        "{HEAD}ipvs: {{scheduler: lc, strictARP: true, syncPeriod: 1s}}\n\
         conntrack: {{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n"
    ))?;
    node.start()?;
    wait::until_ok(
        "health of a node that has just started",
        wait::SETTLED,
        || {
            for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                let answer = http::get(netns, SocketAddr::new(ip, 10256), "/healthz", "")?;
                ensure!(answer.status == 200, "{answer:?}");
                let body: Value = serde_json::from_str(&answer.body)?;
                ensure!(body["nodeEligible"] == true, "{body}");
                ensure!(body["lastUpdated"].is_string() && body["currentTime"].is_string());
            }
            Ok(())
        },
    )?;
    wait::until_ok("strict ARP", wait::SETTLED, || {
        for (key, value) in [("arp_ignore", "1"), ("arp_announce", "2")] {
            let found = netns.sysctl(&format!("ipv4/conf/all/{key}"))?;
            ensure!(found.trim() == value, "{key} is {found}");
        }
        Ok(())
    })?;
    let told = status(context, &node)?;
    let told = told["sysctls"].to_string();
    ensure!(told.contains("net.ipv4.conf.all.arp_ignore"), "{told}");

    let leaving = manifest(netns.name(), &crate::node::POD_RANGES, &[]).replace(
        "spec:\n",
        "spec:\n  taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]\n",
    );
    node.write_manifest("node.yaml", &leaving)?;
    wait::until_ok("a node that goes", wait::SETTLED, || {
        let answer = health(netns, "/healthz")?;
        ensure!(answer.status == 503, "{answer:?}");
        ensure!(
            answer.body.contains("\"nodeEligible\": false"),
            "{answer:?}"
        );
        ensure!(health(netns, "/livez")?.status == 200);
        Ok(())
    })?;
    node.write_manifest(
        "node.yaml",
        &manifest(netns.name(), &crate::node::POD_RANGES, &[]),
    )?;
    wait::until_ok("a node that stays", wait::SETTLED, || {
        ensure!(health(netns, "/healthz")?.status == 200);
        Ok(())
    })?;

    ensure!(ask(netns, "/proxyMode", "")?.body == "ipvs");
    ensure!(ask(netns, "/healthz", "")?.body == "ok");
    ensure!(ask(netns, "/", "")?.status == 404);
    let configuration: Value = serde_json::from_str(&ask(netns, "/configz", "")?.body)?;
    let configuration = &configuration["kubeproxy.config.k8s.io"];
    ensure!(
        configuration["ipvs"]["scheduler"] == "lc"
            && configuration["ipvs"]["syncPeriod"] == "1s"
            && configuration["hostnameOverride"] == netns.name()
            && configuration["healthzBindAddress"] == "[::]:10256",
        "{configuration:#}"
    );
    metrics(netns)?;

    // Where the kernel has no IPVS a change waits for good.
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    if !has_ipvs(netns) {
        wait::until_ok("a change that waits", wait::SETTLED, || {
            let metrics = ask(netns, "/metrics", "")?.body;
            ensure!(
                metrics.contains("kubeproxy_sync_proxy_rules_service_changes_pending 1\n"),
                "{metrics}"
            );
            ensure!(health(netns, "/healthz")?.status == 503);
            ensure!(health(netns, "/livez")?.status == 503);
            Ok(())
        })?;
        let metrics = ask(netns, "/metrics", "")?.body;
        ensure!(
            !metrics.contains("kubeproxy_proxy_livez_total{code=\"503\"} 0\n"),
            "{metrics}"
        );
        ensure!(
            metrics.contains("kubeproxy_proxy_livez_total{code=\"503\"}"),
            "{metrics}"
        );
    }
    node.stop()
}

fn has_ipvs(netns: &Netns) -> bool {
    netns.output("ipvsadm", &["-Ln"]).is_ok()
}

/// The format, whatever is accepted, and what promtool says of it.
fn metrics(netns: &Netns) -> anyhow::Result<()> {
    let plain = ask(
        netns,
        "/metrics",
        "Accept: application/openmetrics-text;version=1.0.0,*/*;q=0.1",
    )?;
    ensure!(
        plain
            .head
            .contains("content-type: text/plain; version=0.0.4"),
        "{}",
        plain.head
    );
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("promtool; tests/vm/setup test installs it")?;
    let mut stdin = promtool.stdin.take().context("its input")?;
    stdin.write_all(plain.body.as_bytes())?;
    drop(stdin);
    let output = promtool.wait_with_output()?;
    let said = String::from_utf8([output.stdout, output.stderr].concat())?;
    let others: Vec<&str> = said.lines().filter(|line| *line != COMPLAINT).collect();
    ensure!(others.is_empty(), "promtool: {others:#?}\n{}", plain.body);
    Ok(())
}

/// Time-outs, sysctls, and virtual services of others at addresses that are excluded.
pub(super) fn its_settings_reach_the_kernel(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let netns = node.netns();
    node.write_config(&format!(
        "{HEAD}ipvs: {{strictARP: true, tcpTimeout: 10m0s, tcpFinTimeout: 0s, udpTimeout: 45s, excludeCIDRs: [10.96.0.11/32]}}\n\
         conntrack: {{tcpEstablishedTimeout: 2h0m0s, udpTimeout: 11s}}\n"
    ))?;
    node.start()?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    for number in [10, 11] {
        let name = format!("web-{number}");
        node.write_manifest(&format!("{name}.yaml"), &world::service(&name, number, 80))?;
        // What was caused in times to come is measured as just now.
        let slices = world::slices(&name, &[&backend.pod])?.replace(
            "  labels:\n",
            "  annotations: {endpoints.kubernetes.io/last-change-trigger-time: \"2999-01-01T00:00:00Z\"}\n  labels:\n",
        );
        node.write_manifest(&format!("{name}-slices.yaml"), &slices)?;
        world::wait_for_service(client.netns(), number, 80)?;
    }
    let timeouts = netns.output("ipvsadm", &["-L", "--timeout"])?;
    ensure!(timeouts.trim().ends_with("600 120 45"), "{timeouts}");
    for (key, value) in [
        ("ipv4/conf/all/arp_ignore", "1"),
        ("ipv4/conf/all/arp_announce", "2"),
        ("netfilter/nf_conntrack_tcp_timeout_established", "7200"),
        ("netfilter/nf_conntrack_tcp_timeout_close_wait", "3600"),
        ("netfilter/nf_conntrack_udp_timeout", "11"),
    ] {
        let found = netns.sysctl(key)?;
        ensure!(found.trim() == value, "{key} is {found}");
    }
    counted(netns)?;

    // At both VIPs another program has a virtual service; one of them is shared with it.
    for vip in ["10.96.0.10:443", "10.96.0.11:443"] {
        netns.output("ipvsadm", &["-A", "-t", vip, "-s", "wlc"])?;
    }
    node.kill9()?;
    node.start()?;
    world::wait_for_ipvs(&node, "the end of what only can be ours", |table| {
        !table.contains("10.96.0.10:443")
    })?;
    let table = dump::ipvs(netns)?;
    ensure!(table.contains("TCP 10.96.0.11:443 wlc"), "{table}");
    ensure!(
        table.contains("TCP 10.96.0.11:80 rr"),
        "a Service there is served:\n{table}"
    );
    node.remove_manifest("web-11.yaml")?;
    let table = world::wait_for_ipvs(&node, "the end of the Service there", |table| {
        !table.contains("10.96.0.11:80")
    })?;
    ensure!(table.contains("TCP 10.96.0.11:443 wlc"), "{table}");
    client.del(&node)?;
    backend.pod.del(&node)?;
    node.stop()
}

/// What the passes left in kube-proxy's metrics.
fn counted(netns: &Netns) -> anyhow::Result<()> {
    wait::until_ok("metrics of the passes", wait::SETTLED, || {
        let text = ask(netns, "/metrics", "")?.body;
        let value = |name: &str| -> anyhow::Result<f64> {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("kubeproxy_{name} ")));
            Ok(line.with_context(|| format!("{name}:\n{text}"))?.parse()?)
        };
        let at_least = |name: &str, least: f64| -> anyhow::Result<()> {
            let found = value(name)?;
            ensure!(found >= least, "{name} is {found}");
            Ok(())
        };
        at_least("sync_proxy_rules_service_changes_total", 2.0)?;
        at_least("sync_proxy_rules_endpoint_changes_total", 4.0)?;
        at_least("sync_full_proxy_rules_duration_seconds_count", 1.0)?;
        at_least("sync_partial_proxy_rules_duration_seconds_count", 1.0)?;
        at_least("network_programming_duration_seconds_count", 4.0)?;
        let (synced, queued) = (
            value("sync_proxy_rules_last_timestamp_seconds")?,
            value("sync_proxy_rules_last_queued_timestamp_seconds")?,
        );
        ensure!(queued > 1e9 && synced >= queued, "{synced} {queued}");
        for kind in ["service", "endpoint"] {
            let pending = value(&format!("sync_proxy_rules_{kind}_changes_pending"))?;
            ensure!(pending.abs() < 0.5, "{kind}: {pending}");
        }
        ensure!(health(netns, "/healthz")?.status == 200);
        Ok(())
    })
}
