//! What the kernel refuses hurts what it is about, is told, and is tried again.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use super::audit::status;
use super::world::{self, Backend};
use crate::context::Context;
use crate::node::Node;
use crate::{dump, golden, wait};

/// Longer than the longest pause before another try, by what an emulated machine needs.
const RETRIED: Duration = Duration::from_secs(90);

/// Tries in vain while other Services change, so many that the pause has grown to seconds.
const TRIES: u64 = 7;

/// A VIP that cannot be bound is told, other Services are served, and it is tried
/// again in its time though they change all the while.
pub(super) fn other_changes_do_not_put_off_a_retry(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.start()?;
    let client = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    world::wait_for_service(&client, 10, 80)?;
    let good = dump::vips(node.netns())?;
    let no_ipv6 = |value: u8| {
        let setting = format!("net.ipv6.conf.kube-ipvs0.disable_ipv6={value}");
        node.netns().output("sysctl", &["-w", &setting])
    };
    no_ipv6(1)?;
    wait::until_ok("a problem in status", wait::SETTLED, || {
        let told = status(context, &node)?;
        ensure!(told["health"] == "degraded", "{told:#}");
        let told = told["problems"].to_string();
        ensure!(told.contains("cannot bind VIP"), "{told}");
        Ok(())
    })?;
    let mut changes = 0_u8;
    let mut change = || -> anyhow::Result<()> {
        changes = changes.wrapping_add(1);
        node.write_manifest("other.yaml", &other(changes))?;
        let server = format!("10.244.9.{}:8080", changes.max(1));
        world::wait_for_ipvs(&node, "the other Service's change", |table| {
            table.contains(&server)
        })?;
        Ok(())
    };
    let tries = || -> anyhow::Result<u64> {
        let told = status(context, &node)?;
        let problems = told["problems"].as_array().cloned().unwrap_or_default();
        let tries = problems.iter().filter_map(|one| one["attempts"].as_u64());
        Ok(tries.max().unwrap_or(0))
    };
    let began = Instant::now();
    while tries()? < TRIES {
        ensure!(began.elapsed() < RETRIED, "it is not tried again");
        change()?;
    }
    no_ipv6(0)?;
    let start = Instant::now();
    let missing = || -> anyhow::Result<bool> {
        let now = dump::vips(node.netns())?;
        Ok(good.iter().any(|vip| !now.contains(vip)))
    };
    ensure!(missing()?, "nothing was refused");
    while missing()? {
        if start.elapsed() > RETRIED {
            bail!("it was not tried again within {RETRIED:?} among other changes");
        }
        change()?;
        thread::sleep(Duration::from_secs(1));
    }
    node.check_alive()
}

/// A Service of IPv4 alone, whose only endpoint differs each time.
fn other(change: u8) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: other}}
spec:
  clusterIP: 10.96.7.7
  ports: [{{port: 80}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: other
  labels: {{kubernetes.io/service-name: other}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{{addresses: [10.244.9.{}]}}]
",
        change.max(1)
    )
}

/// Pods keep their way out when the Node object goes, and when an agent starts
/// that cannot read it.
pub(super) fn pods_go_on_without_a_node_object(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let _outside = world::outside(context, &node)?;
    let rules = || dump::nft(node.netns(), "ferrule");
    let path = node.manifests().join("node.yaml");
    let manifest = std::fs::read_to_string(path)?;
    wait::until_ok("the rules for the node's uplink", wait::SETTLED, || {
        let rules = rules()?;
        ensure!(
            rules.contains("podEgress") && rules.contains("uplink"),
            "{rules}"
        );
        Ok(())
    })?;
    let before = rules()?;
    let told = |what: &str, holds: &dyn Fn(&serde_json::Value) -> bool| {
        wait::until_ok(what, wait::SETTLED, || {
            let told = status(context, &node)?;
            ensure!(holds(&told), "{told:#}");
            Ok(())
        })
    };
    node.remove_manifest("node.yaml")?;
    told("that the Node object is missing", &|told| {
        told["conditions"].to_string().contains("NodeMissing")
    })?;
    let after = rules()?;
    ensure!(after == before, "{}", golden::difference(&before, &after));
    node.write_manifest("node.yaml", &manifest)?;
    node.kill9()?;
    node.overwrite_manifest("node.yaml", "metadata: [")?;
    node.start()?;
    told("that a file cannot be read", &|told| {
        told["source"]["complete"] == false && told["problemCount"] != 0
    })?;
    // A change that shows in the kernel proves that the agent is past its first pass.
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    wait::until_ok("the VIPs of a new Service", wait::SETTLED, || {
        ensure!(dump::vips(node.netns())?.len() == 2);
        Ok(())
    })?;
    let after = rules()?;
    // Elements of sets follow the Service; rules do not.
    let chains = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.contains("\"rule\""));
        lines.map(str::to_owned).collect()
    };
    ensure!(
        chains(&after) == chains(&before),
        "{}",
        golden::difference(&before, &after)
    );
    node.overwrite_manifest("node.yaml", &manifest)?;
    told("health", &|told| told["health"] == "healthy")
}
