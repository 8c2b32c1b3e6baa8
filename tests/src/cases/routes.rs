//! Routes to other nodes' pods, through the node that has them.

use anyhow::{Context as _, ensure};

use super::segment::{
    self, NODE_A, NODE_B, OUTSIDE, POD_RANGES_B, TwoNodes, node_manifest, routes, wait_for_routes,
};
use crate::context::Context;
use crate::link::batch;
use crate::node::{Node, POD_RANGES, manifest};
use crate::pod::Pod;
use crate::sock::{ANSWER, Outcome, Request, Server, TRANSPORTS};
use crate::{dump, wait};

/// Pod ranges of nodes that exist as objects only.
const POD_RANGES_C: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];
const POD_RANGES_D: [&str; 2] = ["10.244.4.0/24", "fd00:10:244:4::/64"];

/// They are there in both families, follow the other node's address, go with its
/// object, also while no agent runs, and leave the routes to the node's own pods.
pub(super) fn follow_the_other_node(context: &mut Context) -> anyhow::Result<()> {
    const MOVED: u8 = 33;
    let TwoNodes { a, b, .. } = &started(context)?;
    let pod = Pod::added(context, a, "pod-a")?;
    let other = Pod::added(context, b, "pod-b")?;
    let own = own_routes(a)?;
    ensure!(own.len() == pod.ips().len(), "{own:?}");
    let _servers = Server::everywhere(other.netns(), "pod-b", 8080)?;
    for ip in other.ips() {
        for transport in TRANSPORTS {
            let request = Request::new(transport, (*ip, 8080).into());
            match request.send(pod.netns(), ANSWER)? {
                Outcome::Answered { by, saw } if by == "pod-b" => ensure!(
                    saw.ip() == pod.ip_like(*ip)?,
                    "pod-a to pod-b, {request:?}: it saw {saw}"
                ),
                outcome => anyhow::bail!("pod-a to pod-b, {request:?}: {outcome:?}"),
            }
        }
    }

    let moved = node_manifest("node-b", &POD_RANGES_B, MOVED);
    a.write_manifest("node-b.yaml", &moved)?;
    wait_for_routes(a, &routes(&POD_RANGES_B, MOVED))?;
    a.remove_manifest("node-b.yaml")?;
    wait_for_routes(a, &[])?;
    a.write_manifest("node-b.yaml", &moved)?;
    wait_for_routes(a, &routes(&POD_RANGES_B, MOVED))?;

    a.stop()?;
    let left = segment::routes_by_others(a)?;
    ensure!(
        left == routes(&POD_RANGES_B, MOVED),
        "without an agent {left:?}"
    );
    a.remove_manifest("node-b.yaml")?;
    a.start()?;
    wait_for_routes(a, &[])?;
    ensure!(
        own_routes(a)? == own,
        "was {own:?}, is {:?}",
        own_routes(a)?
    );
    // The other node has seen nothing of all that.
    wait_for_routes(b, &routes(&POD_RANGES, NODE_A))
}

/// Someone else's route to a node's pods stays, and is told; without it there is ours.
pub(super) fn foreign_ones_are_left_alone(context: &mut Context) -> anyhow::Result<()> {
    let TwoNodes { a, .. } = &started(context)?;
    let ours = routes(&POD_RANGES_B, NODE_B);
    let by = segment::ips(OUTSIDE);
    let foreign: Vec<String> = POD_RANGES_C
        .iter()
        .zip(by)
        .map(|(range, by)| format!("{range} via {by} dev {} proto 4", segment::DEVICE))
        .collect();
    let lines = |verb: &'static str| {
        let ranges = POD_RANGES_C.iter().zip(by);
        ranges.map(move |(range, by)| format!("route {verb} {range} via {by} proto static"))
    };
    batch(a.netns(), lines("add"))?;
    a.write_manifest(
        "node-c.yaml",
        &node_manifest("node-c", &POD_RANGES_C, NODE_B),
    )?;
    for range in POD_RANGES_C {
        wait_for_log(a, range)?;
    }
    // A change that shows is proof that the agent is past it.
    a.remove_manifest("node-b.yaml")?;
    wait_for_routes(a, &[])?;
    let check = || -> anyhow::Result<()> {
        let all = dump::routes(a.netns())?;
        let to_c = |route: &&String| POD_RANGES_C.iter().any(|range| route.contains(range));
        let found: Vec<_> = all.iter().filter(to_c).cloned().collect();
        ensure!(found == foreign, "expected {foreign:#?} of {all:#?}");
        Ok(())
    };
    check()?;
    a.kill9()?;
    a.write_manifest(
        "node-b.yaml",
        &node_manifest("node-b", &POD_RANGES_B, NODE_B),
    )?;
    a.start()?;
    wait_for_routes(a, &ours)?;
    check().context("after the agent's return")?;
    a.remove_manifest("node-c.yaml")?;
    a.remove_manifest("node-b.yaml")?;
    wait_for_routes(a, &[])?;
    check().context("after the end of the node")?;

    batch(a.netns(), lines("del"))?;
    a.write_manifest(
        "node-c.yaml",
        &node_manifest("node-c", &POD_RANGES_C, NODE_B),
    )?;
    wait_for_routes(a, &routes(&POD_RANGES_C, NODE_B))
}

/// A node on no network of ours gets no route, and is told; no other's suffer.
pub(super) fn none_to_a_node_beyond(context: &mut Context) -> anyhow::Result<()> {
    let TwoNodes { a, .. } = &started(context)?;
    let addresses = [
        ("InternalIP", "203.0.113.9"),
        ("InternalIP", "2001:db8:203::9"),
    ];
    let beyond = manifest("node-d", &POD_RANGES_D, &addresses);
    a.write_manifest("node-d.yaml", &beyond)?;
    wait_for_log(a, "node-d")?;
    let third = node_manifest("node-c", &POD_RANGES_C, NODE_B);
    a.write_manifest("node-c.yaml", &third)?;
    let [b4, b6] = routes(&POD_RANGES_B, NODE_B);
    let [c4, c6] = routes(&POD_RANGES_C, NODE_B);
    wait_for_routes(a, &[&b4, &c4, &b6, &c6].map(String::clone))?;
    // Nothing but the link was missing.
    batch(
        a.netns(),
        [
            "addr add 203.0.113.1/24 dev uplink",
            "addr add 2001:db8:203::1/64 dev uplink nodad",
        ],
    )?;
    let moved = manifest("node-d", &POD_RANGES_D, &[addresses[1], addresses[0]]);
    a.write_manifest("node-d.yaml", &moved)?;
    let [d4, d6] = POD_RANGES_D;
    let d4 = format!("{d4} via 203.0.113.9 dev {} proto 101", segment::DEVICE);
    let d6 = format!("{d6} via 2001:db8:203::9 dev {} proto 101", segment::DEVICE);
    wait_for_routes(a, &[b4, c4, d4, b6, c6, d6])
}

fn started(context: &Context) -> anyhow::Result<TwoNodes> {
    let nodes = segment::two_nodes(context)?;
    nodes.start()?;
    Ok(nodes)
}

/// Routes of ours that lead to the node's own pods.
fn own_routes(node: &Node) -> anyhow::Result<Vec<String>> {
    let mut all = dump::routes(node.netns())?;
    all.retain(|route| route.contains(" dev fer") && route.ends_with(" proto 101"));
    Ok(all)
}

fn wait_for_log(node: &Node, what: &str) -> anyhow::Result<()> {
    wait::until_ok(&format!("{what} in the log"), wait::SETTLED, || {
        node.check_alive()?;
        let log = node.log()?;
        let told = log.lines().any(|line| {
            line.contains(what) && (line.contains(" WARN ") || line.contains(" INFO "))
        });
        ensure!(told, "no line of the log names it");
        Ok(())
    })
}
