//! Facts from a Kubernetes API instead of manifests.

pub(super) mod bootstrap;
pub(super) mod large;
pub(super) mod misbehaving;
pub(super) mod scenarios;

use std::fs;
use std::sync::Arc;

use anyhow::ensure;
use ferrule_api_server::{ApiServer, Key, Resource, Streaming};
use serde_json::Value;

use super::audit::wait_for_status as wait_for;
use super::world::{self, Backend};
use crate::api::{self, Api};
use crate::context::Context;
use crate::node::{Node, POD_RANGES, manifest};
use crate::pod::Pod;
use crate::{dump, golden, wait};

/// The Node object's ranges reach the plugin; an API that is away is told and hurts nobody.
pub(super) fn the_api_feeds_pods_and_status(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let server = ApiServer::new(Streaming::Served);
    api::put_all(&server, &manifest("node-a", &POD_RANGES, &[]))?;
    api::put_all(&server, &world::service("web", 10, 80))?;
    let running = Api::start(node.netns(), &server)?;
    node.follow_api()?;
    node.start()?;
    let mut pod = Pod::added(context, &node, "pod")?;
    ensure!(pod.ips().len() == 2, "{:?}", pod.ips());
    wait_for(context, &node, "everything listed", |told| {
        let source = &told["source"];
        source["complete"] == true && source["services"] == 1 && source["nodes"] == 1
    })?;
    drop(running);
    let away = |told: &Value| told["problems"].to_string().contains("cannot be followed");
    wait_for(context, &node, "that the API is away", away)?;
    pod.del(&node)?;
    pod.add(&node)?;
    api::put_all(&server, &world::service("other", 11, 80))?;
    let _running = Api::start(node.netns(), &server)?;
    wait_for(context, &node, "that it is back", |told| {
        told["source"]["services"] == 2 && !away(told)
    })
}

/// One and the same state comes from manifests and from an API, and what the API
/// changes reaches the kernel.
pub(super) fn an_api_gives_what_manifests_give(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let client = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    let files = [
        ("web.yaml", world::node_port_service("web", 10, 80, 30_080)),
        ("web-slices.yaml", world::slices("web", &[&backend.pod])?),
        ("empty.yaml", world::service("empty", 11, 80)),
    ];
    for (name, text) in &files {
        node.write_manifest(name, text)?;
    }
    world::wait_for_service(&client, 10, 80)?;
    wait_for(context, &node, "health", |told| told["health"] == "healthy")?;
    let before = state(&node)?;
    node.stop()?;

    let server: Arc<ApiServer> = ApiServer::new(Streaming::Served);
    api::put_all(
        &server,
        &fs::read_to_string(node.manifests().join("node.yaml"))?,
    )?;
    for (_, text) in &files {
        api::put_all(&server, text)?;
    }
    let _running = Api::start(node.netns(), &server)?;
    node.follow_api()?;
    node.start()?;
    wait_for(context, &node, "everything listed", |told| {
        told["source"]["complete"] == true && told["health"] == "healthy"
    })?;
    let after = state(&node)?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "{}", golden::difference(before, after));
    }
    api::put_all(&server, &world::service("new", 12, 80))?;
    api::put_all(&server, &world::slices("new", &[&backend.pod])?)?;
    world::wait_for_service(&client, 12, 80)?;
    server.delete(&Key {
        resource: Resource::Services,
        namespace: "default".to_owned(),
        name: "empty".to_owned(),
    });
    world::wait_for_ipvs(&node, "the end of a Service", |table| {
        table.contains("10.96.0.12:") && table.contains("10.96.0.10:")
    })?;
    wait::until_ok("the end of its VIPs", wait::SETTLED, || {
        ensure!(dump::vips(node.netns())?.len() == 4);
        Ok(())
    })
}

fn state(node: &Node) -> anyhow::Result<[String; 3]> {
    let netns = node.netns();
    Ok([
        dump::ipvs(netns)?,
        dump::addresses(netns)?,
        dump::nft(netns, "ferrule")?,
    ])
}
