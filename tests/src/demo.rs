//! The demonstration: a node, three pods and a Service, made, called, scaled
//! and removed, with the real agent and plugin on a real kernel.
//!
//! It says what it does as it goes, and fails when something is not as it says.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};

use crate::cases::world;
use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{Outcome, Request, Server, Transport};
use crate::wait;

/// The manifests of `examples/`, as they are in the repository.
const NODE: &str = include_str!("../../examples/node.yaml");
const WEB: &str = include_str!("../../examples/web.yaml");

/// What they say.
const VIPS: [&str; 2] = ["10.96.0.10", "fd00:10:96::10"];
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// Calls over each family.
const CALLS: usize = 6;

/// Shows everything.
///
/// # Errors
/// What did not go as it should.
pub fn run(out: &mut impl Write) -> anyhow::Result<()> {
    let folder = std::env::temp_dir().join(format!("ferrule-demo-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let shown = show(&folder, &mut Teller { out, chapter: 0 });
    std::fs::remove_dir_all(&folder)?;
    shown
}

fn show(folder: &Path, teller: &mut Teller<'_, impl Write>) -> anyhow::Result<()> {
    let context = Context::new("demo", folder.to_owned())?;
    teller.title("Ferrule: from nothing to a balanced Service and back")?;

    teller.chapter("A node", "a network namespace with the agent in it")?;
    let node = Node::create(&context, "node-a")?;
    let outside = world::outside(&context, &node)?;
    node.write_manifest("node.yaml", NODE)?;
    teller.command("ferrule-agent run --manifests examples --node node-a")?;
    node.start()?;
    wait::until_ok("the VIP device", wait::SETTLED, || {
        let links = node.netns().links()?;
        ensure!(links.iter().any(|link| link == "kube-ipvs0"), "{links:?}");
        Ok(())
    })?;
    teller.done("it listens, the guard is in place, kube-ipvs0 waits for VIPs")?;

    teller.chapter(
        "Three pods",
        "the plugin is called as a container runtime calls it",
    )?;
    let web1 = add(&context, &node, teller, "web-1")?;
    let web2 = add(&context, &node, teller, "web-2")?;
    let client = add(&context, &node, teller, "client")?;
    teller.done("each has one address of each family, leased on disk before it was told")?;

    teller.chapter(
        "A Service with two backends",
        "examples/web.yaml goes into the folder",
    )?;
    let started = Instant::now();
    node.write_manifest("web.yaml", WEB)?;
    let mut backends = vec![backend(&web1)?, backend(&web2)?];
    call_until(&client, &["web-1", "web-2"])?;
    teller.done(&format!("it balances {}", after(started)))?;
    teller.kernel("ipvsadm -Ln", &node.netns().output("ipvsadm", &["-Ln"])?)?;

    teller.chapter("Calls", "from pod client to the ClusterIPs")?;
    calls(&client, teller, &["web-1", "web-2"])?;
    teller.done("the backends saw the client's own address")?;

    teller.chapter(
        "The guard",
        "the node's own port 22 is not to be had through a VIP",
    )?;
    guard(&node, &client, &outside, teller)?;

    teller.chapter("Scaling", "a pod more, and two lines more in web.yaml")?;
    let web3 = add(&context, &node, teller, "web-3")?;
    backends.push(backend(&web3)?);
    let started = Instant::now();
    node.write_manifest("web.yaml", &scaled(&web3)?)?;
    call_until(&client, &["web-1", "web-2", "web-3"])?;
    teller.done(&format!("web-3 answers {}", after(started)))?;
    calls(&client, teller, &["web-1", "web-2", "web-3"])?;

    teller.chapter("Status", "what an operator asks first")?;
    let program = context.binary("ferrule-agent")?;
    let program = program.to_str().context("a path in UTF-8")?;
    let socket = node.socket();
    let socket = socket.to_str().context("a path in UTF-8")?;
    let text = node
        .netns()
        .output(program, &["status", "--socket", socket])?;
    teller.kernel("ferrule-agent status", &text)?;

    teller.chapter("Everything removed", "pods, Service, agent")?;
    drop(backends);
    for pod in [&web1, &web2, &web3, &client] {
        pod.del(&node)?;
    }
    teller.done("four times DEL")?;
    node.remove_manifest("web.yaml")?;
    node.stop()?;
    teller.command("ferrule-agent cleanup")?;
    let cleanup = context.binary("ferrule-agent")?;
    let mut cleanup = node.netns().spawn(Command::new(cleanup).arg("cleanup"))?;
    ensure!(cleanup.wait(wait::SETTLED)?.success(), "cleanup failed");
    nothing_left(&node, teller)?;
    teller.title("That is all. `make test` proves it; ARCHITECTURE.md explains it.")
}

fn add(
    context: &Context,
    node: &Node,
    teller: &mut Teller<'_, impl Write>,
    name: &str,
) -> anyhow::Result<Pod> {
    let pod = Pod::added(context, node, name)?;
    let ips: Vec<String> = pod.ips().iter().map(ToString::to_string).collect();
    teller.line(&format!("CNI ADD {name:<8} {}", ips.join("  ")))?;
    Ok(pod)
}

/// A server in a pod, which answers with the pod's name.
fn backend(pod: &Pod) -> anyhow::Result<Vec<Server>> {
    Server::everywhere(pod.netns(), pod.name(), TARGET)
}

fn vips() -> anyhow::Result<Vec<IpAddr>> {
    VIPS.iter().map(|ip| Ok(ip.parse()?)).collect()
}

fn call(client: &Pod, vip: IpAddr) -> anyhow::Result<(String, SocketAddr)> {
    let request = Request::new(Transport::Tcp, SocketAddr::new(vip, PORT));
    match request.send(client.netns(), wait::SETTLED)? {
        Outcome::Answered { by, saw } => Ok((by, saw)),
        other => anyhow::bail!("a call of {vip}: {other:?}"),
    }
}

/// Calls until every backend has answered over both families.
fn call_until(client: &Pod, names: &[&str]) -> anyhow::Result<()> {
    for vip in vips()? {
        wait::until_ok("every backend answers", wait::SETTLED, || {
            let mut answered = Vec::new();
            for _ in names {
                answered.push(call(client, vip)?.0);
            }
            let all = names.iter().all(|name| answered.iter().any(|a| a == name));
            ensure!(all, "only {answered:?} answered");
            Ok(())
        })?;
    }
    Ok(())
}

fn calls(client: &Pod, teller: &mut Teller<'_, impl Write>, names: &[&str]) -> anyhow::Result<()> {
    for vip in vips()? {
        let own = client.ip_like(vip)?;
        let mut answers = Vec::new();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..CALLS {
            let (by, saw) = call(client, vip)?;
            ensure!(saw.ip() == own, "{by} saw {saw} instead of {own}");
            *counts.entry(by.clone()).or_default() += 1;
            answers.push(by);
        }
        let balanced = counts.values().all(|count| *count == CALLS / names.len());
        ensure!(
            balanced && counts.len() == names.len(),
            "not balanced: {counts:?}"
        );
        let to = SocketAddr::new(vip, PORT).to_string();
        teller.line(&format!("{to:<20} → {}", answers.join(" ")))?;
    }
    Ok(())
}

/// Probes a port of the node that listens on every address.
fn guard(
    node: &Node,
    client: &Pod,
    outside: &Netns,
    teller: &mut Teller<'_, impl Write>,
) -> anyhow::Result<()> {
    let _daemon = Server::everywhere(node.netns(), "daemon", 22)?;
    let probe = |from: &Netns, to: IpAddr| {
        Request::new(Transport::Tcp, SocketAddr::new(to, 22)).send(from, wait::SETTLED)
    };
    let direct = probe(outside, "192.0.2.1".parse()?)?;
    ensure!(
        matches!(direct, Outcome::Answered { .. }),
        "directly: {direct:?}"
    );
    teller.line("the node's address, port 22  → answered (it does listen)")?;
    for vip in vips()? {
        for (who, from) in [("pod", client.netns()), ("node", node.netns())] {
            let outcome = probe(from, vip)?;
            ensure!(outcome == Outcome::Refused, "{who} to {vip}: {outcome:?}");
        }
        let to = SocketAddr::new(vip, 22).to_string();
        teller.line(&format!(
            "{to:<20}         → refused, to a pod and to the node itself"
        ))?;
    }
    teller.done("an open port of the host stays out of reach through a VIP")
}

/// The manifest with one endpoint more in each slice.
fn scaled(pod: &Pod) -> anyhow::Result<String> {
    let mut text = String::new();
    for line in WEB.lines() {
        writeln!(text, "{line}")?;
        for (vip, last) in [
            (VIPS[0], "[10.244.1.3]"),
            (VIPS[1], "[\"fd00:10:244:1::3\"]"),
        ] {
            if line.ends_with(last) {
                let ip = pod.ip_like(vip.parse()?)?.to_string();
                writeln!(text, "    nodeName: node-a\n  - addresses: [{ip:?}]")?;
            }
        }
    }
    Ok(text)
}

fn after(started: Instant) -> String {
    format!(
        "{:.1} s after the file was written",
        started.elapsed().as_secs_f32()
    )
}

/// Looks that nothing of ours is in the kernel or on the disk any more.
fn nothing_left(node: &Node, teller: &mut Teller<'_, impl Write>) -> anyhow::Result<()> {
    let links = node.netns().links()?;
    ensure!(
        links.iter().all(|link| link == "lo" || link == "uplink"),
        "links are left: {links:?}"
    );
    let services = node.netns().output("ipvsadm", &["-Sn"])?;
    ensure!(services.trim().is_empty(), "services are left: {services}");
    let rules = node.netns().output("nft", &["list", "ruleset"])?;
    ensure!(rules.trim().is_empty(), "rules are left: {rules}");
    let routes = node
        .netns()
        .output("ip", &["route", "show", "table", "all", "proto", "101"])?;
    ensure!(routes.trim().is_empty(), "routes are left: {routes}");
    let queue = std::fs::read_dir(node.state().join("releases")).map_or(0, Iterator::count);
    ensure!(queue == 0, "releases wait in the queue");
    teller.done("no link, no address, no route, no rule, no virtual service of ours is left")
}

/// Tells what happens, for people.
struct Teller<'a, W> {
    out: &'a mut W,
    chapter: u32,
}

impl<W: Write> Teller<'_, W> {
    fn title(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.out, "\n\x1b[1m{text}\x1b[0m")?;
        Ok(())
    }

    fn chapter(&mut self, name: &str, about: &str) -> anyhow::Result<()> {
        self.chapter += 1;
        let chapter = self.chapter;
        writeln!(
            self.out,
            "\n\x1b[1;36m{chapter}  {name}\x1b[0m \x1b[2m— {about}\x1b[0m"
        )?;
        self.out.flush().context("standard output")
    }

    fn line(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.out, "   {text}")?;
        self.out.flush().context("standard output")
    }

    fn command(&mut self, text: &str) -> anyhow::Result<()> {
        self.line(&format!("\x1b[2m$ {text}\x1b[0m"))
    }

    fn done(&mut self, text: &str) -> anyhow::Result<()> {
        self.line(&format!("\x1b[32m✓\x1b[0m {text}"))
    }

    fn kernel(&mut self, command: &str, text: &str) -> anyhow::Result<()> {
        self.command(command)?;
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            self.line(&format!("\x1b[2m{}\x1b[0m", line.trim_end()))?;
        }
        Ok(())
    }
}
