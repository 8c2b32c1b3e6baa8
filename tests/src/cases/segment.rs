//! Two nodes on one Ethernet segment, with hosts that are no nodes.
//!
//! ```text
//!            192.0.2.0/24, 2001:db8::/64
//!   ──┬─────────┬─────────┬─────────┬─────────┬──  a bridge in `switch`
//!    .1        .2        .3        .4        .5
//!  node-a   outside   node-b   external   trusted
//! ```
//!
//! `outside` is the nodes' default route. Neither it nor `external` has a route to
//! pods or VIPs: what reaches them with such a source is never answered. `trusted`
//! has routes to the pods of both nodes, as a data centre without NAT would.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::ensure;

use crate::context::Context;
use crate::link::{End, batch, veth};
use crate::netns::Netns;
use crate::node::{Node, POD_RANGES, manifest};
use crate::{dump, wait};

/// Pod ranges of the second node.
pub(super) const POD_RANGES_B: [&str; 2] = ["10.244.2.0/24", "fd00:10:244:2::/64"];

/// The hosts' numbers on the segment.
pub(super) const NODE_A: u8 = 1;
pub(super) const OUTSIDE: u8 = 2;
pub(super) const NODE_B: u8 = 3;
pub(super) const EXTERNAL: u8 = 4;
pub(super) const TRUSTED: u8 = 5;

/// The device by which every host is on it.
pub(super) const DEVICE: &str = "uplink";

/// The addresses of a host on the segment, IPv4 first.
pub(super) fn ips(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(192, 0, 2, number)),
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number.into())),
    ]
}

/// The Node object of a node that is at a place of the segment, as YAML.
pub(super) fn node_manifest(name: &str, ranges: &[&str], number: u8) -> String {
    let [v4, v6] = ips(number).map(|ip| ip.to_string());
    manifest(name, ranges, &[("InternalIP", &v4), ("InternalIP", &v6)])
}

/// Everything on the segment.
#[derive(Debug)]
pub(super) struct TwoNodes {
    pub(super) a: Node,
    pub(super) b: Node,
    pub(super) outside: Netns,
    pub(super) external: Netns,
    pub(super) trusted: Netns,
    switch: Netns,
}

/// Two nodes that know each other's Node object. Their agents do not run yet.
pub(super) fn two_nodes(context: &Context) -> anyhow::Result<TwoNodes> {
    let switch = context.netns("switch")?;
    batch(
        &switch,
        [
            "link add segment type bridge mcast_snooping 0",
            "link set dev segment up",
        ],
    )?;
    let nodes = TwoNodes {
        a: Node::create(context, "node-a")?,
        b: Node::with_pod_ranges(context, "node-b", &POD_RANGES_B)?,
        outside: context.netns("outside")?,
        external: context.netns("external")?,
        trusted: context.netns("trusted")?,
        switch,
    };
    for (host, number) in [
        (nodes.a.netns(), NODE_A),
        (&nodes.outside, OUTSIDE),
        (nodes.b.netns(), NODE_B),
        (&nodes.external, EXTERNAL),
        (&nodes.trusted, TRUSTED),
    ] {
        plug(&nodes.switch, host, number)?;
    }
    for node in [&nodes.a, &nodes.b] {
        let by = ips(OUTSIDE);
        batch(node.netns(), [to("0.0.0.0/0", by[0]), to("::/0", by[1])])?;
        node.write_manifest("node.yaml", &node_manifest("node-a", &POD_RANGES, NODE_A))?;
        node.write_manifest(
            "node-b.yaml",
            &node_manifest("node-b", &POD_RANGES_B, NODE_B),
        )?;
    }
    let ways = [(POD_RANGES, NODE_A), (POD_RANGES_B, NODE_B)];
    let ways = ways.into_iter().flat_map(|(ranges, node)| {
        let both = ranges.into_iter().zip(ips(node));
        both.map(|(range, ip)| to(range, ip))
    });
    batch(&nodes.trusted, ways)?;
    Ok(nodes)
}

impl TwoNodes {
    /// Starts both agents and waits for the routes to each other's pods.
    pub(super) fn start(&self) -> anyhow::Result<()> {
        self.a.start()?;
        self.b.start()?;
        wait_for_routes(&self.a, &routes(&POD_RANGES_B, NODE_B))?;
        wait_for_routes(&self.b, &routes(&POD_RANGES, NODE_A))
    }
}

/// The routes to a node's pods, as [`dump::routes`] has them, IPv4 first.
pub(super) fn routes(ranges: &[&str; 2], node: u8) -> [String; 2] {
    let [v4, v6] = ips(node);
    [(ranges[0], v4), (ranges[1], v6)]
        .map(|(range, ip)| format!("{range} via {ip} dev {DEVICE} proto 101"))
}

/// Waits until these are all the routes by way of other hosts that a node has of us.
pub(super) fn wait_for_routes(node: &Node, expected: &[String]) -> anyhow::Result<()> {
    let what = format!("{} to have routes {expected:?}", node.netns().name());
    wait::until_ok(&what, wait::SETTLED, || {
        node.check_alive()?;
        let found = routes_by_others(node)?;
        ensure!(found == expected, "it has {found:#?}");
        Ok(())
    })
}

/// The routes by way of other hosts that a node has of us.
pub(super) fn routes_by_others(node: &Node) -> anyhow::Result<Vec<String>> {
    let mut all = dump::routes(node.netns())?;
    all.retain(|route| route.contains(" via ") && route.ends_with(" proto 101"));
    Ok(all)
}

/// A line of `ip` that adds a route.
pub(super) fn to(range: &str, by: IpAddr) -> String {
    format!("route add {range} via {by}")
}

pub(super) fn plug(switch: &Netns, host: &Netns, number: u8) -> anyhow::Result<()> {
    let [v4, v6] = ips(number);
    let (v4, v6) = (format!("{v4}/24"), format!("{v6}/64"));
    let port = format!("port{number}");
    veth(
        End {
            namespace: host,
            device: DEVICE,
            addresses: &[&v4, &v6],
        },
        End {
            namespace: switch,
            device: &port,
            addresses: &[],
        },
    )?;
    batch(switch, [format!("link set dev {port} master segment")])
}
