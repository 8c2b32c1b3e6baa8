//! The agent may die, stop and come back; traffic does not notice.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, bail, ensure};

use super::world::{self, Backend};
use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{ANSWER, Connection, Outcome, TRANSPORTS};
use crate::{dump, wait};

const COUNTED: &str = "TCP 10.96.0.10:80";

/// A node with a Service, a backend and a client, in use.
struct Scene {
    node: Node,
    client: Pod,
    backend: Backend,
}

impl Scene {
    fn build(context: &Context) -> anyhow::Result<Self> {
        let node = world::started_node(context)?;
        let backend = Backend::create(context, &node, "backend")?;
        let client = Pod::added(context, &node, "client")?;
        for (name, number) in [("web", 10), ("other", 11)] {
            node.write_manifest(&format!("{name}.yaml"), &world::service(name, number, 80))?;
            let slices = world::slices(name, &[&backend.pod])?;
            node.write_manifest(&format!("{name}-slices.yaml"), &slices)?;
            world::wait_for_service(client.netns(), number, 80)?;
        }
        // From here on a service that is made anew shows by a count that falls.
        world::wait_for_count(&node, COUNTED)?;
        Ok(Self {
            node,
            client,
            backend,
        })
    }

    fn ask_all(&self) -> anyhow::Result<()> {
        for vip in world::vips(10) {
            for transport in TRANSPORTS {
                world::ask(self.client.netns(), transport, SocketAddr::new(vip, 80))?;
            }
        }
        Ok(())
    }

    fn connections(&self) -> anyhow::Result<Vec<Connection>> {
        world::vips(10)
            .iter()
            .map(|vip| Connection::open(self.client.netns(), SocketAddr::new(*vip, 80)))
            .collect()
    }

    fn state(&self) -> anyhow::Result<[String; 3]> {
        let netns = self.node.netns();
        Ok([
            dump::ipvs(netns)?,
            dump::addresses(netns)?,
            dump::nft(netns, "ferrule")?,
        ])
    }
}

/// `kill -9` and a new start: the tables are adopted, not rebuilt. At no moment
/// is a virtual service missing, its count never falls, connections live on.
pub(super) fn a_killed_agent_is_not_missed(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let mut connections = scene.connections()?;
    let before = scene.state()?;
    let over = AtomicBool::new(false);
    thread::scope(|scope| -> anyhow::Result<()> {
        let watch = scope.spawn(|| watch_count(scene.node.netns(), &over));
        let mut restarts = || -> anyhow::Result<()> {
            for _ in 0..3 {
                scene.node.kill9()?;
                scene.ask_all().context("without an agent")?;
                scene.node.start()?;
                scene.ask_all().context("with the new agent")?;
                ask_on(&mut connections)?;
                wait_until_it_takes_changes(&scene)?;
            }
            Ok(())
        };
        let outcome = restarts();
        over.store(true, Ordering::Relaxed);
        match watch.join() {
            Ok(looks) => ensure!(looks? > 3, "the table was hardly looked at"),
            Err(_) => bail!("the watch panicked"),
        }
        outcome
    })?;
    let after = scene.state()?;
    ensure!(after == before, "before {before:#?}\nafter {after:#?}");
    ask_on(&mut connections)
}

/// SIGTERM leaves the datapath in place.
pub(super) fn a_stopped_agent_leaves_everything(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let mut connections = scene.connections()?;
    let before = scene.state()?;
    scene.node.stop()?;
    let after = scene.state()?;
    ensure!(after == before, "before {before:#?}\nafter {after:#?}");
    scene.ask_all()?;
    ask_on(&mut connections)?;
    ensure!(
        scene.node.netns().links()?.len() > 3,
        "the pods' links are gone"
    );
    scene.node.start()?;
    wait_until_it_takes_changes(&scene)?;
    ask_on(&mut connections)
}

/// What was deleted and written while no agent ran is caught up with at the
/// start; what stayed the same is not touched.
pub(super) fn what_changed_meanwhile_is_caught_up(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let counted = dump::connections(scene.node.netns(), COUNTED)?;
    scene.node.kill9()?;
    scene.node.remove_manifest("other.yaml")?;
    scene.node.remove_manifest("other-slices.yaml")?;
    let node = &scene.node;
    node.write_manifest("new.yaml", &world::service("new", 12, 80))?;
    let slices = world::slices("new", &[&scene.backend.pod])?;
    node.write_manifest("new-slices.yaml", &slices)?;
    node.start()?;
    world::wait_for_service(scene.client.netns(), 12, 80)?;
    world::wait_for_ipvs(node, "the end of what was deleted", |table| {
        !table.contains("10.96.0.11:") && !table.contains("96::b]:")
    })?;
    wait::until_ok("the end of its VIPs", wait::SETTLED, || {
        let vips = dump::vips(node.netns())?;
        ensure!(vips.len() == 4, "{vips:?}");
        Ok(())
    })?;
    let still = dump::connections(node.netns(), COUNTED)?;
    ensure!(still >= counted, "counted {counted:?}, then {still:?}");
    scene.ask_all()
}

/// Looks at a virtual service until told that it is over; returns how often.
fn watch_count(node: &Netns, over: &AtomicBool) -> anyhow::Result<u32> {
    let (mut looks, mut last) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        let now = dump::connections(node, COUNTED)?
            .with_context(|| format!("{COUNTED} was missing after {looks} looks"))?;
        ensure!(now >= last, "{COUNTED} counted {last}, then {now}");
        (looks, last) = (looks + 1, now);
    }
    Ok(looks)
}

/// A change that shows in the kernel proves that the agent is past its first pass.
fn wait_until_it_takes_changes(scene: &Scene) -> anyhow::Result<()> {
    let node = &scene.node;
    node.write_manifest("probe.yaml", &world::service("probe", 99, 80))?;
    let slices = world::slices("probe", &[&scene.backend.pod])?;
    node.write_manifest("probe-slices.yaml", &slices)?;
    world::wait_for_service(scene.client.netns(), 99, 80)?;
    node.remove_manifest("probe.yaml")?;
    node.remove_manifest("probe-slices.yaml")?;
    world::wait_for_ipvs(node, "the end of the probe", |table| {
        !table.contains("10.96.0.99:") && !table.contains("96::63]:")
    })?;
    wait::until_ok("the end of its VIPs", wait::SETTLED, || {
        let vips = dump::vips(node.netns())?;
        ensure!(vips.len() == 4, "{vips:?}");
        Ok(())
    })
}

fn ask_on(connections: &mut [Connection]) -> anyhow::Result<()> {
    for connection in connections {
        match connection.ask("still there?", ANSWER)? {
            Outcome::Answered { .. } => {}
            other => bail!("an open connection ended: {other:?}"),
        }
    }
    Ok(())
}
