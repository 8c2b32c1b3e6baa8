//! Nothing that listens on the node is reachable through a VIP.
//!
//! A VIP is a local address of the node, so without a guard each socket that
//! listens on all addresses answers on every VIP (kubernetes #72236). Each
//! probe is made twice, with the guard and with it taken away: the second time
//! it arrives, which shows that the first time it was the guard that held it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, ensure};

use super::world::{self, Backend};
use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{Outcome, Request, SILENCE, Seen, Server, TRANSPORTS, Transport, send_all};
use crate::{dump, wait};

/// The service's own port; its target port; one that is privileged; one of the
/// node's own; one in the range of ephemeral ports.
const PORTS: [u16; 5] = [80, world::TARGET, 53, 10_250, 40_000];

/// Numbers of the Services: with a backend, and without any.
const SERVED: u8 = 10;
const EMPTY: u8 = 11;

/// Processes of the node stay out of reach from a pod, from outside and from
/// the node itself, on any port, over both transports and families.
pub(super) fn host_ports_hide_behind_vips(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let client = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    let pod = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::service("web", SERVED, 80))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    node.write_manifest("empty.yaml", &world::service("empty", EMPTY, 80))?;
    node.write_manifest("empty-slices.yaml", &world::slices("empty", &[])?)?;
    let mut servers = Vec::new();
    for port in PORTS {
        servers.extend(Server::everywhere(node.netns(), "host", port)?);
    }
    world::wait_for_service(pod.netns(), SERVED, 80)?;
    let vantages = [
        ("a pod", pod.netns()),
        ("outside", &client),
        ("the node", node.netns()),
    ];
    // The listeners do work: by the node's own addresses they are reached.
    let own: [IpAddr; 2] = ["192.0.2.1".parse()?, "2001:db8::1".parse()?];
    for (vantage, netns) in vantages {
        let reached = reach(netns, &own, &servers)?;
        let expected = own.len() * TRANSPORTS.len() * PORTS.len();
        ensure!(reached.len() == expected, "from {vantage}: {reached:?}");
    }

    // Only a VIP that is bound to the node can lead to it.
    let bound = dump::vips(node.netns())?;
    for vip in world::vips(SERVED) {
        ensure!(bound.contains(&vip), "{vip} is not bound: {bound:?}");
    }
    let all = [world::vips(SERVED), world::vips(EMPTY)].concat();
    for (vantage, netns) in vantages {
        let reached = reach(netns, &all, &servers)?;
        ensure!(reached.is_empty(), "reached from {vantage}: {reached:?}");
    }

    // An agent that is gone cannot put the guard back.
    node.kill9()?;
    node.netns()
        .output("nft", &["delete", "table", "inet", "ferrule"])?;
    for (vantage, netns) in vantages {
        let reached = reach(netns, &bound, &servers)?;
        for (transport, to) in targets(&bound) {
            // IPVS takes what is for the service itself.
            let served = to.port() == 80 && world::vips(SERVED).contains(&to.ip());
            let expected = !served;
            ensure!(
                reached.contains(&(transport, to)) == expected,
                "without the guard, from {vantage}, {transport:?} {to}: reached is {}",
                !expected
            );
        }
    }
    wait::until_ok("the guard of a new agent", wait::SETTLED, || {
        if node.check_alive().is_err() {
            node.start()?;
        }
        for (vantage, netns) in vantages {
            let reached = reach(netns, &all, &servers)?;
            ensure!(
                reached.is_empty(),
                "still reached from {vantage}: {reached:?}"
            );
        }
        Ok(())
    })
}

fn targets(ips: &[IpAddr]) -> Vec<(Transport, SocketAddr)> {
    let mut targets = Vec::new();
    for ip in ips {
        for transport in TRANSPORTS {
            targets.extend(PORTS.map(|port| (transport, SocketAddr::new(*ip, port))));
        }
    }
    targets
}

/// Which of the targets have brought a request to one of the servers; whether
/// the answer found its way back does not matter.
fn reach(
    from: &Netns,
    ips: &[IpAddr],
    servers: &[Server],
) -> anyhow::Result<BTreeSet<(Transport, SocketAddr)>> {
    let requests: Vec<Request> = targets(ips)
        .into_iter()
        .map(|(transport, to)| Request::new(transport, to))
        .collect();
    send_all(from, &requests, SILENCE)?;
    let seen: BTreeSet<String> = servers
        .iter()
        .flat_map(Server::seen)
        .map(|Seen { word, .. }| word)
        .collect();
    Ok(requests
        .into_iter()
        .filter(|request| seen.contains(&request.word))
        .map(|request| (request.transport, request.to))
        .collect())
}

/// A process of the node that listens on the very port of a Service is not
/// reached through its VIP at any moment, while the Service comes and goes and
/// the agent is killed on the way.
pub(super) fn no_moment_is_open(context: &mut Context) -> anyhow::Result<()> {
    const CYCLES: usize = 2;
    /// Short: what is not answered was dropped or the VIP is not there.
    const PROBE: Duration = Duration::from_millis(500);
    let node = world::started_node(context)?;
    let client = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    let pod = Pod::added(context, &node, "client")?;
    let servers = Server::everywhere(node.netns(), "host", 80)?;
    let slices = world::slices("web", &[&backend.pod])?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> anyhow::Result<()> {
        let probes: Vec<_> = [pod.netns(), &client, node.netns()]
            .into_iter()
            .flat_map(|from| targets_of(&world::vips(SERVED), 80).map(|target| (from, target)))
            .map(|(from, (transport, to))| {
                let done = &done;
                scope.spawn(move || -> anyhow::Result<usize> {
                    let mut answered = 0;
                    while !done.load(Ordering::Relaxed) {
                        let outcome = Request::new(transport, to).send(from, PROBE)?;
                        answered += usize::from(matches!(outcome, Outcome::Answered { .. }));
                        // The agent has to go on beside a dozen of these.
                        thread::sleep(Duration::from_millis(5));
                    }
                    Ok(answered)
                })
            })
            .collect();
        let cycled = (0..CYCLES).try_for_each(|cycle| cycle_once(&node, &slices, cycle));
        done.store(true, Ordering::Relaxed);
        let mut answered = 0;
        for probe in probes {
            answered += probe.join().map_err(|_| anyhow!("a prober panicked"))??;
        }
        cycled?;
        ensure!(answered > 0, "the probes never met the Service");
        Ok(())
    })?;
    let seen: Vec<Seen> = servers.iter().flat_map(Server::seen).collect();
    ensure!(seen.is_empty(), "the host's process got {seen:?}");
    node.check_alive()
}

/// The Service comes and goes once; in some cycles the agent dies on the way.
fn cycle_once(node: &Node, slices: &str, cycle: usize) -> anyhow::Result<()> {
    node.write_manifest("web-slices.yaml", slices)?;
    node.write_manifest("web.yaml", &world::service("web", SERVED, 80))?;
    if cycle % 4 == 1 {
        // While it is being made, with luck; the next agent finds what is there.
        thread::sleep(Duration::from_millis(120));
        node.kill9()?;
        node.start()?;
    }
    world::wait_for_ipvs(node, "the Service", |table| table.contains("10.96.0.10:80"))?;
    node.remove_manifest("web.yaml")?;
    if cycle % 4 == 3 {
        thread::sleep(Duration::from_millis(120));
        node.kill9()?;
        node.start()?;
    }
    world::wait_for_ipvs(node, "its end", |table| !table.contains("10.96.0.10:80"))?;
    Ok(())
}

/// One port of each VIP over each transport.
fn targets_of(ips: &[IpAddr; 2], port: u16) -> [(Transport, SocketAddr); 4] {
    let [v4, v6] = ips.map(|ip| SocketAddr::new(ip, port));
    let [a, b] = TRANSPORTS;
    [(a, v4), (b, v4), (a, v6), (b, v6)]
}
