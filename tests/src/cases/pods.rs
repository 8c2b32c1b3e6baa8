//! Pods get their network from the plugin and give it back.
//!
//! None of this needs IPVS: on a kernel without it the agent says so and serves
//! pods all the same.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;

use anyhow::{Context as _, bail, ensure};
use serde_json::json;

use super::world;
use crate::context::Context;
use crate::node::Node;
use crate::pod::{self, Pod};
use crate::sock::{ANSWER, Outcome, Request, Server, TRANSPORTS};
use crate::wait;

/// Two pods reach each other and their node reaches them, by both families; after
/// DEL nothing is left.
pub(super) fn add_and_del(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.start()?;
    // A node has addresses of its own, which it calls pods from.
    let _uplink = world::outside(context, &node)?;
    let client = Pod::added(context, &node, "client")?;
    let server = Pod::added(context, &node, "server")?;
    ensure!(client.ips().len() == 2, "{:?}", client.ips());
    let _in_pod = Server::everywhere(server.netns(), "server", 8080)?;
    for ip in server.ips() {
        for transport in TRANSPORTS {
            let request = Request::new(transport, SocketAddr::new(*ip, 8080));
            let own = SocketAddr::new(client.ip_like(*ip)?, 0);
            answered_to(&request.send(client.netns(), ANSWER)?, "server", own.ip())
                .with_context(|| format!("pod to pod, {request:?}"))?;
            match request.send(node.netns(), ANSWER)? {
                Outcome::Answered { .. } => {}
                other => bail!("node to pod, {request:?}: {other:?}"),
            }
        }
    }
    client.del(&node)?;
    client.del(&node)?;
    server.del(&node)?;
    ensure!(
        client.netns().links()? == ["lo"],
        "{:?}",
        client.netns().links()
    );
    nothing_left(&node)?;
    node.check_alive()
}

/// A reboot: 200 pods at once, each with addresses of its own; then all of them
/// leave at once, and the pool has room for 200 again.
pub(super) fn two_hundred_at_once(context: &mut Context) -> anyhow::Result<()> {
    const PODS: usize = 200;
    let node = Node::create(context, "node-a")?;
    node.start()?;
    // Once one pod has come and gone the agent is ready: from here on no ADD may be put off.
    Pod::added(context, &node, "first")?.del(&node)?;
    let mut pods = (0..PODS)
        .map(|index| Pod::create(context, &format!("pod-{index}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    // 253 addresses: the second time works only if the first 200 leases ended.
    for _ in 0..2 {
        at_once(pods.iter_mut().map(|pod| || pod.add_once(&node).map(drop)))?;
        let distinct: BTreeSet<IpAddr> = pods.iter().flat_map(Pod::ips).copied().collect();
        ensure!(distinct.len() == 2 * PODS, "{} addresses", distinct.len());
        let links = host_ends(&node)?;
        ensure!(links.len() == PODS, "{} links", links.len());
        at_once(pods.iter().map(|pod| || pod.del(&node)))?;
        nothing_left(&node)?;
    }
    Ok(())
}

/// The plugin dies at each of its steps; the next DEL leaves nothing.
pub(super) fn killed_at_any_step(context: &mut Context) -> anyhow::Result<()> {
    // Five addresses: fewer than there are steps, so a lease that stays is missed.
    const ROOM: usize = 5;
    let ranges = ["10.244.1.0/29", "fd00:10:244:1::/125"];
    let node = Node::with_pod_ranges(context, "node-a", &ranges)?;
    node.start()?;
    let steps = pod::fault_steps(context)?;
    ensure!(steps.len() > ROOM, "only {} steps", steps.len());
    for (verb, step) in &steps {
        let killed_and_deleted = || -> anyhow::Result<()> {
            let mut pod = Pod::create(context, &format!("{verb}-{step}").to_lowercase())?;
            // With all that a pod can have.
            pod.configure(json!({"runtimeConfig": {"bandwidth": {
                "ingressRate": 8_000_000, "ingressBurst": 800_000,
                "egressRate": 8_000_000, "egressBurst": 800_000,
            }}}));
            if verb != "ADD" {
                pod.add(&node)?;
            }
            let reply = pod.call(&node, verb, &[("FERRULE_FAULT_STEP", step)])?;
            ensure!(reply.was_killed(), "was not killed: {reply:?}");
            pod.del(&node)?;
            ensure!(
                pod.netns().links()? == ["lo"],
                "pod: {:?}",
                pod.netns().links()
            );
            nothing_left(&node)?;
            // And the name can be used again.
            pod.add(&node)?;
            pod.del(&node)
        };
        killed_and_deleted().with_context(|| format!("killed in {verb} at {step}"))?;
    }
    fill(context, &node, ROOM)
}

/// DEL works while the agent is away; the lease ends when it is back.
pub(super) fn del_without_the_agent(context: &mut Context) -> anyhow::Result<()> {
    const ROOM: usize = 5;
    let ranges = ["10.244.1.0/29", "fd00:10:244:1::/125"];
    let node = Node::with_pod_ranges(context, "node-a", &ranges)?;
    node.start()?;
    let pods = (0..ROOM)
        .map(|index| Pod::added(context, &node, &format!("old-{index}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    node.kill9()?;
    for pod in &pods {
        pod.del(&node)?;
        pod.del(&node)?;
    }
    nothing_left(&node)?;
    node.start()?;
    fill(context, &node, ROOM)
}

/// The agent dies among ADDs and comes back; what was handed out stays distinct.
pub(super) fn agent_killed_among_adds(context: &mut Context) -> anyhow::Result<()> {
    const PODS: usize = 20;
    const DEATHS: usize = 3;
    let node = Node::create(context, "node-a")?;
    node.start()?;
    let mut kept = Vec::new();
    for death in 0..DEATHS {
        let mut pods = (0..PODS)
            .map(|index| Pod::create(context, &format!("pod-{death}-{index}")))
            .collect::<anyhow::Result<Vec<_>>>()?;
        // Once this one has its network, the agent is ready for the others.
        kept.push(Pod::added(context, &node, &format!("first-{death}"))?);
        die_among(&node, &mut pods)?;
        for mut pod in pods {
            // Those whose ADD failed are tried again, as kubelet does: DEL, then ADD.
            if pod.ips().is_empty() {
                pod.del(&node)?;
                pod.add(&node)?;
            }
            kept.push(pod);
        }
        let taken: BTreeSet<IpAddr> = kept.iter().flat_map(Pod::ips).copied().collect();
        ensure!(
            taken.len() == 2 * kept.len(),
            "{} pods share {} addresses",
            kept.len(),
            taken.len()
        );
    }
    node.check_alive()
}

/// Adds pods in parallel and kills the agent when half of them have a device;
/// what fails is left to the caller to see. Then starts it again.
fn die_among(node: &Node, pods: &mut [Pod]) -> anyhow::Result<()> {
    let half = host_ends(node)?.len() + pods.len() / 2;
    thread::scope(|scope| -> anyhow::Result<()> {
        for pod in pods {
            scope.spawn(move || {
                let _tried_again_by_the_caller = pod.add_once(node);
            });
        }
        wait::for_some("half of the pods", wait::SETTLED, || {
            Ok((host_ends(node)?.len() >= half).then_some(()))
        })?;
        node.kill9()
    })?;
    node.start()
}

/// The devices of pods on the node. The agent has one of its own besides.
pub(super) fn host_ends(node: &Node) -> anyhow::Result<Vec<String>> {
    let mut links = node.netns().links()?;
    links.retain(|link| link.starts_with("fer") || link.starts_with("feb"));
    Ok(links)
}

pub(super) fn nothing_left(node: &Node) -> anyhow::Result<()> {
    let links = host_ends(node)?;
    ensure!(links.is_empty(), "left on the node: {links:?}");
    Ok(())
}

/// Fills the pool and empties it: every address can be had.
pub(super) fn fill(context: &Context, node: &Node, room: usize) -> anyhow::Result<()> {
    let mut pods = Vec::new();
    for index in 0..room {
        let mut pod = Pod::create(context, &format!("fill-{index}"))?;
        // A queued release may take the agent a moment.
        wait::until_ok("a free address", wait::SETTLED, || pod.add(node))?;
        pods.push(pod);
    }
    let distinct: BTreeSet<_> = pods.iter().flat_map(Pod::ips).collect();
    ensure!(distinct.len() == 2 * room, "{distinct:?}");
    pods.iter().try_for_each(|pod| pod.del(node))
}

/// Runs all at the same time; the first error counts.
fn at_once<F>(work: impl Iterator<Item = F>) -> anyhow::Result<()>
where
    F: FnOnce() -> anyhow::Result<()> + Send,
{
    thread::scope(|scope| {
        let threads: Vec<_> = work.map(|work| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(_) => bail!("panicked"),
            })
    })
}

fn answered_to(outcome: &Outcome, by_whom: &str, from: IpAddr) -> anyhow::Result<()> {
    match outcome {
        Outcome::Answered { by, saw } if by == by_whom && saw.ip() == from => Ok(()),
        other => bail!("expected an answer of {by_whom} to {from}, got {other:?}"),
    }
}
