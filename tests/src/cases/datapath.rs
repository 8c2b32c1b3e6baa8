//! What is programmed reads back, and packets go where it says.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::pod::Pod;
use crate::sock::TRANSPORTS;
use crate::{dump, golden, wait};

const EVERY_FEATURE: &str = include_str!("../../golden/every-feature.manifests.yaml");

/// A Service with all that there is, read back by the operators' tools.
pub(super) fn every_feature(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    node.write_manifest("every-feature.yaml", EVERY_FEATURE)?;
    let read_back = || -> anyhow::Result<()> {
        golden::check("every-feature.ipvs.txt", &dump::ipvs(node.netns())?)?;
        golden::check("every-feature.addr.json", &dump::addresses(node.netns())?)?;
        golden::check(
            "every-feature.nft.json",
            &dump::nft(node.netns(), "ferrule")?,
        )
    };
    // Only what is there in full is worth a comparison.
    world::wait_for_ipvs(&node, "six virtual services", |table| {
        let services = table.lines().filter(|line| !line.starts_with(' '));
        services.count() == 6
    })?;
    wait::until_ok("the golden state", wait::SETTLED, read_back)?;
    node.remove_manifest("every-feature.yaml")?;
    world::wait_for_ipvs(&node, "no virtual service", str::is_empty)?;
    wait::until_ok("no VIP", wait::SETTLED, || {
        let vips = dump::vips(node.netns())?;
        ensure!(vips.is_empty(), "{vips:?}");
        Ok(())
    })
}

/// Requests of a pod are spread evenly over two pods, which see its own address.
pub(super) fn balances_to_both(context: &mut Context) -> anyhow::Result<()> {
    const REQUESTS: usize = 8;
    let node = world::started_node(context)?;
    let backends = ["backend-1", "backend-2"]
        .iter()
        .map(|name| Backend::create(context, &node, name))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let client = Pod::added(context, &node, "client")?;
    let pods: Vec<&Pod> = backends.iter().map(|backend| &backend.pod).collect();
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &pods)?)?;
    world::wait_for_ipvs(&node, "both backends everywhere", |table| {
        table.matches("Masq").count() == 8
    })?;
    for vip in world::vips(10) {
        for transport in TRANSPORTS {
            let mut answers: BTreeMap<String, usize> = BTreeMap::new();
            for _ in 0..REQUESTS {
                let to = SocketAddr::new(vip, 80);
                let (by, saw) = world::ask(client.netns(), transport, to)?;
                ensure!(
                    saw.ip() == client.ip_like(vip)?,
                    "{by} saw {saw} instead of the pod"
                );
                *answers.entry(by).or_default() += 1;
            }
            let even = answers.len() == 2 && answers.values().all(|n| *n == REQUESTS / 2);
            ensure!(even, "{transport:?} {vip}: {answers:?}");
        }
    }
    node.check_alive()
}
