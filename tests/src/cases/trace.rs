//! `trace --live` finds what is broken on a packet's way, and nothing else.

use std::net::IpAddr;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::world::{self, Backend, Endpoint};
use crate::context::Context;
use crate::node::Node;
use crate::pod::Pod;
use crate::wait;

/// An audit that is nearly asleep: what a test breaks is to stay broken for some seconds.
const CONFIG: &str = "apiVersion: ferrule.io/v1alpha1
kind: AgentConfiguration
auditBudgetPercent: 0.001
";

/// How often something is broken again that the agent has put right meanwhile.
const ATTEMPTS: usize = 8;

const VIP: &str = "10.96.0.10:80/tcp";
const VIP6: &str = "[fd00:10:96::a]:80/tcp";
const NODE_PORT: &str = "192.0.2.1:30080/udp";
const BALANCER: &str = "203.0.113.20:80/tcp";

/// Something that another does to the kernel, and what a trace says of it.
struct Damage {
    /// What is called.
    to: &'static str,
    /// `BACKEND` is the address of one, `HANDLE` that of the guard's last rule.
    command: &'static str,
    /// What undoes it, as far as the agent has not.
    undo: &'static str,
    step: &'static str,
    /// How the sentence begins.
    says: &'static str,
}

const DAMAGES: &[Damage] = &[
    Damage {
        to: VIP,
        command: "nft delete element inet ferrule vips4 { 10.96.0.10 }",
        undo: "nft add element inet ferrule vips4 { 10.96.0.10 }",
        step: "guard",
        says: "VIP 10.96.0.10 is not in set vips4.",
    },
    Damage {
        to: VIP,
        command: "nft delete element inet ferrule frontends4 { 10.96.0.10 . 6 . 80 }",
        undo: "nft add element inet ferrule frontends4 { 10.96.0.10 . 6 . 80 }",
        step: "frontend",
        says: "10.96.0.10:80/TCP is not in set frontends4.",
    },
    Damage {
        to: NODE_PORT,
        command: "nft delete element inet ferrule external4 { 192.0.2.1 . 17 . 30080 }",
        undo: "nft add element inet ferrule external4 { 192.0.2.1 . 17 . 30080 }",
        step: "frontend",
        says: "192.0.2.1:30080/UDP is not in set external4.",
    },
    Damage {
        to: VIP,
        command: "ipvsadm -d -t 10.96.0.10:80 -r BACKEND:8080",
        undo: "ipvsadm -a -t 10.96.0.10:80 -r BACKEND:8080 -m -w 1",
        step: "backends",
        says: "Real server BACKEND:8080 is missing in virtual service 10.96.0.10:80/TCP.",
    },
    Damage {
        to: VIP,
        command: "ipvsadm -e -t 10.96.0.10:80 -r BACKEND:8080 -m -w 0",
        undo: "ipvsadm -e -t 10.96.0.10:80 -r BACKEND:8080 -m -w 1",
        step: "backends",
        says: "Real server BACKEND:8080 of virtual service 10.96.0.10:80/TCP has weight 0; it \
               should have 1.",
    },
    Damage {
        to: VIP,
        command: "ipvsadm -E -t 10.96.0.10:80 -s rr -p 60",
        undo: "ipvsadm -E -t 10.96.0.10:80 -s rr",
        step: "service",
        says: "Virtual service 10.96.0.10:80/TCP has scheduler rr, persistence of 60 s; it should \
               have scheduler rr.",
    },
    Damage {
        to: BALANCER,
        command: "nft delete element inet ferrule marks4 { 203.0.113.20 . 6 . 80 }",
        undo: "",
        step: "mark",
        says: "Clients within the cluster of 203.0.113.20:80/TCP get no mark by map marks4; it \
               should be mark 0xfe",
    },
    Damage {
        to: BALANCER,
        command: "nft delete element inet ferrule admitted4 { 10.0.0.0/8 . 203.0.113.20 . 6 . 80 }",
        undo: "nft add element inet ferrule admitted4 { 10.0.0.0/8 . 203.0.113.20 . 6 . 80 }",
        step: "admission",
        says: "203.0.113.20:80/TCP: 1 of its source ranges are not in set admitted4",
    },
    Damage {
        to: NODE_PORT,
        command: "ipvsadm -D -u 192.0.2.1:30080",
        undo: "",
        step: "service",
        says: "There is no virtual service 192.0.2.1:30080/UDP.",
    },
    Damage {
        to: VIP6,
        command: "sysctl -w net.ipv6.conf.kube-ipvs0.disable_ipv6=1",
        undo: "sysctl -w net.ipv6.conf.kube-ipvs0.disable_ipv6=0",
        step: "vip",
        says: "VIP fd00:10:96::a is not bound to this node; it should be (address of the VIP \
               device).",
    },
    Damage {
        to: VIP,
        command: "nft delete rule inet ferrule guard-remote handle HANDLE",
        undo: "",
        step: "ruleset",
        says: "A rule, chain or set of nftables table ferrule is another than was loaded.",
    },
];

/// The agent repairs what is broken, some of it at once: each damage is done until the
/// trace was quicker.
pub(super) fn live_names_the_broken_step(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.write_config(CONFIG)?;
    node.start()?;
    let _outside = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::node_port_service("web", 10, 80, 30_080))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    node.write_manifest("far.yaml", &balanced())?;
    let elsewhere: [IpAddr; 2] = ["10.244.2.5".parse()?, "fd00:10:244:2::5".parse()?];
    let endpoints = [(backend.pod.ips(), "node-a"), (&elsewhere[..], "node-b")];
    let endpoints = endpoints.map(|(ips, node)| Endpoint {
        ips,
        node: Some(node),
        conditions: world::READY,
    });
    let slices = world::endpoint_slices("far", &endpoints)?;
    node.write_manifest("far-slices.yaml", &slices)?;
    world::wait_for_service(client.netns(), 10, 80)?;
    let ips = client.ips().iter().map(ToString::to_string);
    let from: Vec<String> = ips.collect();
    let at = backend.pod.ips().first().context("an address")?.to_string();
    for to in [VIP, VIP6, NODE_PORT, BALANCER] {
        wait_until_whole(context, &node, &from, to)?;
    }
    for damage in DAMAGES {
        let told =
            break_until_told(context, &node, &from, &at, damage).with_context(|| damage.command)?;
        ensure!(told.contains("Remedy: "), "no remedy: {told}");
        // The agent may have been quicker.
        let _undone = run(&node, &damage.undo.replace("BACKEND", &at));
        wait_until_whole(context, &node, &from, damage.to).with_context(|| damage.command)?;
    }
    let wrong = trace(
        context,
        &node,
        "192.0.2.1",
        VIP,
        &["--live", "--device", "eth0"],
    )?;
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    ensure!(
        wrong.status.code() == Some(2) && said.contains("device: 192.0.2.1 is an address of this"),
        "{}: {said}",
        wrong.status
    );
    Ok(())
}

/// Does a damage until a trace names it; returns what that says to people then.
fn break_until_told(
    context: &Context,
    node: &Node,
    from: &[String],
    backend: &str,
    damage: &Damage,
) -> anyhow::Result<String> {
    let says = damage.says.replace("BACKEND", backend);
    let mut last = String::new();
    for _ in 0..ATTEMPTS {
        let mut command = damage.command.replace("BACKEND", backend);
        if command.contains("HANDLE") {
            command = command.replace("HANDLE", &last_rule(node)?);
        }
        // Where it is broken still, it cannot be broken again.
        let _broken = run(node, &command);
        let output = trace(
            context,
            node,
            of_family(from, damage.to)?,
            damage.to,
            &["--live", "--json"],
        )?;
        let text = trace(
            context,
            node,
            of_family(from, damage.to)?,
            damage.to,
            &["--live"],
        )?;
        let told: Value = serde_json::from_slice(&output.stdout)?;
        let checks = told["live"]["checks"].as_array().context("checks")?;
        let broken: Vec<&Value> = checks.iter().filter(|check| check["ok"] == false).collect();
        last = format!("{}: {broken:?}", output.status);
        let named = broken.iter().any(|check| {
            let mut sentences = check["says"].as_array().into_iter().flatten();
            check["step"] == damage.step && sentences.any(|sentence| begins(sentence, &says))
        });
        let others = broken
            .iter()
            .any(|check| check["step"] != damage.step && check["step"] != "agent");
        if named && !others && output.status.code() == Some(1) && text.status.code() == Some(1) {
            return Ok(String::from_utf8(text.stdout)?);
        }
    }
    bail!("after {ATTEMPTS} times no trace says {says:?} alone: {last}")
}

fn begins(sentence: &Value, words: &str) -> bool {
    sentence
        .as_str()
        .is_some_and(|sentence| sentence.starts_with(words))
}

/// A Service with policy Local and source ranges: its clients within the cluster have a mark.
fn balanced() -> String {
    let more =
        "LoadBalancer\n  externalTrafficPolicy: Local\n  loadBalancerSourceRanges: [10.0.0.0/8]";
    let service =
        world::service("far", 20, 80).replace("type: ClusterIP", &format!("type: {more}"));
    format!("{service}status: {{loadBalancer: {{ingress: [{{ip: 203.0.113.20}}]}}}}\n")
}

fn of_family<'a>(from: &'a [String], to: &str) -> anyhow::Result<&'a str> {
    let mut from = from
        .iter()
        .filter(|ip| ip.contains(':') == to.starts_with('['));
    Ok(from.next().context("an address of the family")?)
}

fn wait_until_whole(
    context: &Context,
    node: &Node,
    from: &[String],
    to: &str,
) -> anyhow::Result<()> {
    let from = of_family(from, to)?;
    // Virtual services are compared every 30 s, and the table no sooner here.
    wait::until_ok("a way without a broken step", wait::SETTLED * 3, || {
        let output = trace(context, node, from, to, &["--live"])?;
        ensure!(
            output.status.success(),
            "{}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    })
}

fn trace(
    context: &Context,
    node: &Node,
    from: &str,
    to: &str,
    more: &[&str],
) -> anyhow::Result<Output> {
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .args(["trace", "--from", from, "--to", to])
        .args(more)
        .arg("--socket")
        .arg(node.socket())
        .stdin(Stdio::null());
    node.netns().run(|| Ok(command.output()?))
}

/// Runs a command of words with blanks between them; what stands in braces is one word.
fn run(node: &Node, command: &str) -> anyhow::Result<String> {
    let (before, element) = command.split_once('{').unwrap_or((command, ""));
    let element = format!("{{{element}");
    let mut words: Vec<&str> = before.split_whitespace().collect();
    if element.len() > 1 {
        words.push(&element);
    }
    match words.split_first() {
        Some((program, arguments)) => node.netns().output(program, arguments),
        None => Ok(String::new()),
    }
}

/// The handle of the last rule of the guard.
fn last_rule(node: &Node) -> anyhow::Result<String> {
    let chain = ["-a", "list", "chain", "inet", "ferrule", "guard-remote"];
    let listed = node.netns().output("nft", &chain)?;
    let (_, handle) = listed
        .rsplit_once("# handle ")
        .context("a rule has a handle")?;
    let end = handle.find(|char: char| !char.is_ascii_digit());
    Ok(handle[..end.unwrap_or(handle.len())].to_owned())
}
