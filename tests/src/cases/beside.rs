//! Services beside a CNI plugin that is not ours.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context as _, ensure};

use super::world::{self, Endpoint, READY, TARGET};
use crate::context::Context;
use crate::link::{End, batch, veth};
use crate::netns::Netns;
use crate::node::Node;
use crate::sock::{Outcome, Request, SILENCE, Server, TRANSPORTS};

/// Addresses of the bridge in the node's pod ranges, and of the pods on it.
const BRIDGE: [&str; 2] = ["10.244.1.1", "fd00:10:244:1::1"];
const PODS: [(&str, [&str; 2]); 2] = [
    ("bridged-1", ["10.244.1.101", "fd00:10:244:1::101"]),
    ("bridged-2", ["10.244.1.102", "fd00:10:244:1::102"]),
];

/// Whether packets between ports of a bridge pass through netfilter.
const SETTINGS: [&str; 2] = [
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
];

/// Sets them; that they are not there is as good as off.
fn pass_through_netfilter(node: &Netns, yes: bool) -> anyhow::Result<()> {
    node.run(|| {
        for path in SETTINGS {
            if fs::exists(path)? {
                fs::write(path, if yes { "1" } else { "0" })?;
            }
        }
        Ok(())
    })
}

/// A pod as a bridge plugin makes it.
fn plug(context: &Context, node: &Node, number: usize) -> anyhow::Result<Netns> {
    let (name, [v4, v6]) = PODS[number];
    let pod = context.netns(name)?;
    let port = format!("port{number}");
    let addresses = [format!("{v4}/24"), format!("{v6}/64")];
    veth(
        End {
            namespace: node.netns(),
            device: &port,
            addresses: &[],
        },
        End {
            namespace: &pod,
            device: "eth0",
            addresses: &addresses.each_ref().map(String::as_str),
        },
    )?;
    batch(
        node.netns(),
        [
            format!("link set dev {port} master cni0"),
            format!("link set dev {port} type bridge_slave hairpin on"),
        ],
    )?;
    let ways = [("0.0.0.0/0", BRIDGE[0]), ("::/0", BRIDGE[1])];
    batch(
        &pod,
        ways.map(|(to, via)| format!("route add {to} via {via}")),
    )?;
    Ok(pod)
}

/// Pods on one bridge answer each other past IPVS, from an address that the client did not
/// call, unless packets on the bridge pass through netfilter. The agent sees to that.
pub(super) fn pods_on_a_bridge_reach_each_other(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    pass_through_netfilter(node.netns(), false)?;
    batch(
        node.netns(),
        [
            "link add cni0 type bridge mcast_snooping 0".to_owned(),
            format!("addr add {}/24 dev cni0", BRIDGE[0]),
            format!("addr add {}/64 dev cni0 nodad", BRIDGE[1]),
            "link set dev cni0 up".to_owned(),
        ],
    )?;
    let client = plug(context, &node, 0)?;
    let backend = plug(context, &node, 1)?;
    let _servers = Server::everywhere(&backend, PODS[1].0, TARGET)?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    let ips: Vec<IpAddr> = PODS[1]
        .1
        .iter()
        .map(|ip| ip.parse())
        .collect::<Result<_, _>>()?;
    let endpoint = Endpoint {
        ips: &ips,
        node: Some("node-a"),
        conditions: READY,
    };
    node.write_manifest("slices.yaml", &world::endpoint_slices("web", &[endpoint])?)?;
    node.start()?;
    world::wait_for_service(&client, 10, 80)?;
    world::wait_for_service(&backend, 10, 80).context("a pod that calls itself")?;
    // Nobody but the agent has turned it on: without it there is no answer.
    pass_through_netfilter(node.netns(), false)?;
    for vip in world::vips(10) {
        for transport in TRANSPORTS {
            let outcome = Request::new(transport, (vip, 80).into()).send(&client, SILENCE)?;
            let answered = matches!(outcome, Outcome::Answered { .. });
            ensure!(
                !answered,
                "{transport:?} {vip}: the setting does nothing here"
            );
        }
    }
    Ok(())
}
