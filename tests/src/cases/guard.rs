//! Nothing that listens on the node is reachable through a VIP.
//!
//! A VIP is a local address of the node, so without a guard each socket that
//! listens on all addresses answers on every VIP (kubernetes #72236). Each
//! probe is made twice, with the guard and with it taken away: the second time
//! it arrives, which shows that the first time it was the guard that held it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::netns::Netns;
use crate::pod::Pod;
use crate::sock::{Request, SILENCE, Seen, Server, TRANSPORTS, Transport, send_all};
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
