//! Plugins of others follow ours in a list, and get along with what it made.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::runtime::leases;
use super::world::{self, TARGET};
use crate::chain::Chain;
use crate::context::Context;
use crate::dump;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{Server, Transport};

/// Port of the node that `portmap` leads to the pod.
const HOST_PORT: u16 = 8088;

/// A version without CHECK, in which DEL is not told the result.
const OLDEST: &str = "0.3.1";

/// An MTU and a setting that `tuning` makes.
const MTU: u32 = 1400;
const SOMAXCONN: &str = "500";

/// Every version has the plugins accept our result, do their work on our
/// interface, and take it back before ours goes; CHECK passes, and fails when
/// something is missing.
pub(super) fn plugins_of_others_follow(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let outside = world::outside(context, &node)?;
    // Once one pod has come and gone the agent is ready.
    Pod::added(context, &node, "first")?.del(&node)?;
    for version in [OLDEST, "0.4.0", "1.0.0"] {
        follow(context, &node, &outside, version).with_context(|| format!("in {version}"))?;
    }
    node.check_alive()
}

fn follow(context: &Context, node: &Node, outside: &Netns, version: &str) -> anyhow::Result<()> {
    let chain = Chain::new(context, node, version, plugins(node, version))?;
    let pod = context.netns(&format!("pod-{version}"))?;
    let result = chain.add(&pod)?;
    ensure!(result["cniVersion"] == version, "{result}");
    let leased = leases(context, node)?;
    let leased = leased.get(pod.name()).context("no lease")?;
    ensure!(addresses(&result)? == *leased, "{leased:?}: {result}");

    let _servers = Server::everywhere(&pod, "server", TARGET)?;
    for ip in ["192.0.2.1", "2001:db8::1"] {
        let to = SocketAddr::new(ip.parse()?, HOST_PORT);
        let (by, _) = world::ask(outside, Transport::Tcp, to)?;
        ensure!(by == "server", "{to}: {by} answered");
    }
    let shown = pod.output("ip", &["link", "show", "dev", "eth0"])?;
    ensure!(shown.contains(&format!("mtu {MTU} ")), "{shown}");
    ensure!(pod.sysctl("core/somaxconn")? == SOMAXCONN);
    // A queue of bandwidth's, and portmap's and firewall's rules.
    let parts = [" tbf ", &format!("--dport {HOST_PORT} "), "10.244.1."];
    let during = traces(node)?;
    for part in parts {
        ensure!(during.contains(part), "no {part} in {during}");
    }

    if version != OLDEST {
        chain.check(&pod, &result)?;
        pod.output("ip", &["-4", "route", "delete", "default"])?;
        let Err(error) = chain.check(&pod, &result) else {
            anyhow::bail!("CHECK has missed that the default route is gone");
        };
        ensure!(error.to_string().contains("CHECK of ferrule"), "{error:#}");
    }
    chain.del(&pod, &result)?;
    chain.del(&pod, &result).context("DEL again")?;
    ensure!(pod.links()? == ["lo"], "{:?}", pod.links());
    ensure!(leases(context, node)?.is_empty(), "a lease is left");
    let mut links = node.netns().links()?;
    links.retain(|link| link != "lo" && link != "uplink" && link != dump::VIP_DEVICE);
    ensure!(links.is_empty(), "left on the node: {links:?}");
    let after = traces(node)?;
    for part in parts {
        ensure!(!after.contains(part), "{part} is left in {after}");
    }
    Ok(())
}

/// Ours and those of the CNI project that work on a result.
fn plugins(node: &Node, version: &str) -> Vec<Value> {
    let port = json!({"hostPort": HOST_PORT, "containerPort": TARGET, "protocol": "tcp"});
    let mut plugins = vec![
        json!({"type": "ferrule", "agentSocket": node.socket(), "stateDir": node.state()}),
        json!({"type": "portmap", "runtimeConfig": {"portMappings": [port]}}),
        json!({"type": "bandwidth", "ingressRate": 100_000_000, "ingressBurst": 10_000_000,
            "egressRate": 100_000_000, "egressBurst": 10_000_000}),
        json!({"type": "tuning", "mtu": MTU, "sysctl": {"net.core.somaxconn": SOMAXCONN}}),
    ];
    // It came with 0.4.0.
    if version != OLDEST {
        plugins.push(json!({"type": "firewall", "backend": "iptables"}));
    }
    plugins
}

/// What the plugins make on the node beside devices: rules and queues. Empty
/// chains stay when they go.
fn traces(node: &Node) -> anyhow::Result<String> {
    let netns = node.netns();
    let mut traces = String::new();
    for (program, arguments) in [
        ("iptables-save", &[][..]),
        ("ip6tables-save", &[]),
        ("tc", &["qdisc", "show"]),
    ] {
        let text = netns.output(program, arguments)?;
        for line in text.lines().filter(|line| !line.starts_with(['#', ':'])) {
            traces.push_str(line);
            traces.push('\n');
        }
    }
    Ok(traces)
}

fn addresses(result: &Value) -> anyhow::Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().context("no ips")?;
    ips.iter()
        .map(|ip| {
            let text = ip["address"].as_str().context("no address")?;
            let (ip, _) = text.split_once('/').context("no prefix length")?;
            Ok(ip.parse()?)
        })
        .collect()
}
