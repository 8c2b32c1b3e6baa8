//! A real container runtime uses the plugin: containerd, with the list that the
//! documentation shows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::world::{self, Endpoint, READY, TARGET};
use crate::context::Context;
use crate::node::Node;
use crate::runtime::{Container, Runtime};
use crate::wait;

/// A container that only waits.
const IDLE: &str = "exec sleep 100000";

/// A container that tells its name to whoever asks.
fn server(name: &str) -> String {
    format!("echo {name} >/run/name; exec httpd -f -p {TARGET} -h /run")
}

/// Two servers, a client, a Service: the client is answered by both, by both
/// families, and nothing is left when the containers are gone.
pub(super) fn containers_call_a_service(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let runtime = Runtime::start(context, &node)?;
    let names = ["red", "blue"];
    let mut containers = names
        .iter()
        .map(|name| runtime.launch(name, &server(name)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    containers.push(runtime.launch("client", IDLE)?);
    for container in &mut containers {
        container.wait_until_it_runs()?;
    }
    let leases = leases(context, &node)?;
    ensure!(leases.len() == containers.len(), "{leases:?}");
    let ips = names.map(|name| leases.get(&runtime.container_id(name)));
    let endpoints = ips.map(|ips| Endpoint {
        ips: ips.map_or(&[], Vec::as_slice),
        node: Some("node-a"),
        conditions: READY,
    });
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    let slices = world::endpoint_slices("web", &endpoints)?;
    node.write_manifest("slices.yaml", &slices)?;
    let client = containers.last().context("the client")?;
    for vip in world::vips(10) {
        wait::until_ok("the Service", wait::SETTLED, || {
            client.fetch(vip, 80, "name")
        })?;
        let answers = [
            client.fetch(vip, 80, "name")?,
            client.fetch(vip, 80, "name")?,
        ];
        let answers: BTreeSet<_> = answers.iter().map(String::as_str).collect();
        ensure!(answers == BTreeSet::from(names), "{vip}: {answers:?}");
    }
    remove_all(containers)?;
    nothing_left(context, &node, &runtime)
}

/// The leases that the agent tells of, by container.
pub(super) fn leases(
    context: &Context,
    node: &Node,
) -> anyhow::Result<BTreeMap<String, Vec<IpAddr>>> {
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .args(["status", "pods", "-o", "json", "--interval", "0"])
        .arg("--socket")
        .arg(node.socket())
        .stdin(Stdio::null());
    let text = node.netns().run(|| crate::netns::check(&mut command))?;
    let told: Value = serde_json::from_str(&text)?;
    let rows = told["pods"].as_array().context("no pods")?;
    rows.iter()
        .map(|row| {
            let id = row["containerId"].as_str().context("no containerId")?;
            let ips = row["addresses"].as_array().context("no addresses")?;
            let ips = ips
                .iter()
                .map(|ip| Ok(ip.as_str().context("an address")?.parse()?))
                .collect::<anyhow::Result<_>>()?;
            Ok((id.to_owned(), ips))
        })
        .collect()
}

fn remove_all(containers: Vec<Container<'_>>) -> anyhow::Result<()> {
    containers.into_iter().try_for_each(Container::remove)
}

/// No container, no device, no lease.
fn nothing_left(context: &Context, node: &Node, runtime: &Runtime<'_>) -> anyhow::Result<()> {
    let containers = runtime.containers()?;
    ensure!(containers.is_empty(), "left in containerd: {containers:?}");
    let mut links = node.netns().links()?;
    links.retain(|link| link.starts_with("fer"));
    ensure!(links.is_empty(), "left on the node: {links:?}");
    wait::until_ok("the end of every lease", wait::SETTLED, || {
        let leases = leases(context, node)?;
        ensure!(leases.is_empty(), "{leases:?}");
        Ok(())
    })?;
    node.check_alive()
}

/// A runtime's containers outlive the agent, and are known to the next one. What
/// happened meanwhile ends well: a container that was started is refused in
/// words that say what to do, and one that was removed gives its address back.
pub(super) fn a_restarted_agent_knows_its_containers(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let runtime = Runtime::start(context, &node)?;
    let mut kept = runtime.launch("kept", &server("kept"))?;
    let mut removed = runtime.launch("removed", IDLE)?;
    kept.wait_until_it_runs()?;
    removed.wait_until_it_runs()?;
    let before = leases(context, &node)?;
    ensure!(before.len() == 2, "{before:?}");

    node.kill9()?;
    let refused = runtime.launch("late", IDLE)?.wait_until_it_fails()?;
    ensure!(
        refused.contains("\"ferrule\" failed (add)") && refused.contains("ferrule-agent"),
        "{refused}"
    );
    removed.remove()?;

    node.start()?;
    let id = runtime.container_id("kept");
    wait::until_ok("the lease of what runs, alone", wait::SETTLED, || {
        let now = leases(context, &node)?;
        ensure!(now.len() == 1 && now.get(&id) == before.get(&id), "{now:?}");
        Ok(())
    })?;
    let mut late = runtime.launch("late", IDLE)?;
    late.wait_until_it_runs()?;
    for ip in before.get(&id).context("the lease of kept")? {
        let answer = late.fetch(*ip, TARGET, "name")?;
        ensure!(answer == "kept", "{ip}: {answer}");
    }
    remove_all(vec![kept, late])?;
    nothing_left(context, &node, &runtime)
}

/// A node that starts: twenty containers at once, each with addresses of its own.
pub(super) fn twenty_at_once(context: &mut Context) -> anyhow::Result<()> {
    const CONTAINERS: usize = 20;
    let node = world::started_node(context)?;
    let runtime = Runtime::start(context, &node)?;
    let mut containers = (0..CONTAINERS)
        .map(|number| runtime.launch(&format!("c{number}"), IDLE))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for container in &mut containers {
        container.wait_until_it_runs()?;
    }
    let leases = leases(context, &node)?;
    let ips: BTreeSet<_> = leases.values().flatten().collect();
    ensure!(
        leases.len() == CONTAINERS && ips.len() == 2 * CONTAINERS,
        "{leases:?}"
    );
    remove_all(containers)?;
    nothing_left(context, &node, &runtime)
}
