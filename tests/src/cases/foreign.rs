//! What others made beside us stays as it is.

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::dump;
use crate::link::batch;
use crate::netns::Netns;
use crate::pod::Pod;

/// Foreign virtual services, tables and devices outlive the agent's first pass,
/// its changes, its death and its return.
pub(super) fn objects_survive(context: &mut Context) -> anyhow::Result<()> {
    let node = crate::node::Node::create(context, "node-a")?;
    let netns = node.netns();
    netns.output("ipvsadm", &["-A", "-t", "198.51.100.9:80", "-s", "wlc"])?;
    let server = [
        "-a",
        "-t",
        "198.51.100.9:80",
        "-r",
        "198.51.100.10:8080",
        "-m",
        "-w",
        "7",
    ];
    netns.output("ipvsadm", &server)?;
    netns.output("ipvsadm", &["-A", "-f", "7", "-s", "rr"])?;
    netns.output(
        "nft",
        &["add table inet foreign { set s { type ipv4_addr; elements = { 10.96.0.10 }; }; \
           chain input { type filter hook input priority 10; policy accept; ip daddr @s counter; }; }"],
    )?;
    // The name begins as ours do; the alias that would make it ours is missing.
    batch(
        netns,
        [
            "link add foreign0 type dummy",
            "addr add 198.51.100.9/32 dev foreign0",
            "link add ferabcdefghijkl type dummy",
            "route add unreachable 198.51.100.128/25",
        ],
    )?;
    let before = Foreign::read(netns)?;
    ensure!(before.ipvs.len() == 3, "{:?}", before.ipvs);

    node.start()?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    world::wait_for_service(client.netns(), 10, 80)?;
    before.check(netns, "beside a service of ours")?;
    node.remove_manifest("web.yaml")?;
    world::wait_for_ipvs(&node, "the end of our service", |table| {
        !table.contains("10.96.0.10:")
    })?;
    before.check(netns, "after its end")?;
    node.kill9()?;
    node.start()?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    world::wait_for_service(client.netns(), 10, 80)?;
    before.check(netns, "after the agent's death and return")?;
    client.del(&node)?;
    backend.pod.del(&node)?;
    node.stop()?;
    before.check(netns, "after the agent's end")
}

#[derive(Debug, PartialEq, Eq)]
struct Foreign {
    ipvs: Vec<String>,
    table: String,
    devices: String,
    routes: String,
}

impl Foreign {
    fn read(netns: &Netns) -> anyhow::Result<Self> {
        let ipvs = dump::ipvs(netns)?;
        Ok(Self {
            ipvs: ipvs
                .lines()
                .filter(|line| line.contains("198.51.100.") || line.starts_with("FWM"))
                .map(str::to_owned)
                .collect(),
            table: dump::nft(netns, "foreign")?,
            devices: ["foreign0", "ferabcdefghijkl"]
                .iter()
                .map(|device| netns.output("ip", &["-o", "addr", "show", "dev", device]))
                .collect::<anyhow::Result<_>>()?,
            routes: netns.output("ip", &["route", "show", "198.51.100.128/25"])?,
        })
    }

    fn check(&self, netns: &Netns, when: &str) -> anyhow::Result<()> {
        let now = Self::read(netns)?;
        ensure!(now == *self, "{when}: was {self:#?}, is {now:#?}");
        Ok(())
    }
}
