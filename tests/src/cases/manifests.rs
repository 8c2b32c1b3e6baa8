//! Editing the folder of manifests changes the kernel, and only what changed.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::node::Node;
use crate::pod::Pod;
use crate::process::Process;
use crate::sock::Transport;
use crate::{dump, wait};

/// Scaling one Service leaves filter, addresses and another Service alone;
/// deleting it takes away what is its own.
pub(super) fn an_edit_touches_only_what_changed(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let first = Backend::create(context, &node, "backend-1")?;
    let second = Backend::create(context, &node, "backend-2")?;
    let client = Pod::added(context, &node, "client")?;
    for (name, number) in [("still", 10), ("edited", 11)] {
        node.write_manifest(&format!("{name}.yaml"), &world::service(name, number, 80))?;
        let slices = world::slices(name, &[&first.pod])?;
        node.write_manifest(&format!("{name}-slices.yaml"), &slices)?;
        world::wait_for_service(client.netns(), number, 80)?;
    }
    let counted = world::wait_for_count(&node, "TCP 10.96.0.10:80")?;

    let mut monitors = Monitors::start(context, &node)?;
    let both = world::slices("edited", &[&first.pod, &second.pod])?;
    node.write_manifest("edited-slices.yaml", &both)?;
    world::wait_for_ipvs(&node, "the second backend", |table| {
        table.matches("Masq").count() == 4 + 8
    })?;
    let to = SocketAddr::new(world::vips(11)[0], 80);
    wait::until_ok("an answer of the new backend", wait::SETTLED, || {
        let (by, _) = world::ask(client.netns(), Transport::Tcp, to)?;
        ensure!(by == "backend-2", "{by} answered");
        Ok(())
    })?;
    // Filter and addresses do not depend on how many backends there are; only that
    // the new one runs here is noted, for when it calls itself.
    let mut noise = monitors.events(&node)?;
    noise.retain(|event| !event.contains("add element inet ferrule hairpins"));
    ensure!(noise.is_empty(), "scaling changed more: {noise:#?}");

    node.remove_manifest("edited.yaml")?;
    world::wait_for_ipvs(&node, "the end of the service", |table| {
        !table.contains("10.96.0.11:") && !table.contains("96::b]:")
    })?;
    wait::until_ok("the end of its VIPs", wait::SETTLED, || {
        let vips = dump::vips(node.netns())?;
        ensure!(vips.len() == 2, "{vips:?}");
        Ok(())
    })?;
    let events = monitors.events(&node)?;
    ensure!(!events.is_empty(), "the monitors saw nothing at all");
    for event in &events {
        let of_the_other = event.contains("10.96.0.10") || event.contains("fd00:10:96::a");
        ensure!(!of_the_other, "the other service was touched: {event}");
    }
    // A service made anew would count from nothing.
    let still = dump::connections(node.netns(), "TCP 10.96.0.10:80")?;
    ensure!(
        still >= Some(counted),
        "counted {counted:?}, then {still:?}"
    );
    node.check_alive()
}

/// Broken YAML changes nothing and is named with file, line and field; the rest
/// of the folder goes on, and the repaired file takes effect.
pub(super) fn broken_yaml_keeps_the_last_good_state(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let backend = Backend::create(context, &node, "backend-1")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    world::wait_for_service(client.netns(), 10, 80)?;
    let good = dump::ipvs(node.netns())?;

    let wrong_field = world::service("web", 10, 80).replace("port: 80,", "port: eighty,");
    let no_yaml = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: default\n";
    for (broken, field) in [(wrong_field.as_str(), "port"), (no_yaml, "")] {
        node.overwrite_manifest("web.yaml", broken)?;
        wait::until_ok("a complaint", wait::SETTLED, || {
            let log = node.log()?;
            let named = log.lines().any(|line| {
                line.contains("web.yaml") && line.contains("line") && line.contains(field)
            });
            ensure!(
                named,
                "nothing in the log names web.yaml, its line and {field:?}"
            );
            Ok(())
        })?;
        // Another change goes through, so the broken one has been looked at for sure.
        node.write_manifest("other.yaml", &world::service("other", 11, 80))?;
        node.write_manifest("other-slices.yaml", &slices_of(&backend, "other")?)?;
        world::wait_for_ipvs(&node, "the other service", |table| {
            table.contains("10.96.0.11:80")
        })?;
        for line in good.lines() {
            let table = dump::ipvs(node.netns())?;
            ensure!(table.contains(line), "{line} went away:\n{table}");
        }
        node.remove_manifest("other.yaml")?;
        node.remove_manifest("other-slices.yaml")?;
        world::wait_for_ipvs(&node, "the last good state", |table| table == good)?;
    }
    node.overwrite_manifest("web.yaml", &world::service("web", 10, 81))?;
    world::wait_for_service(client.netns(), 10, 81)?;
    world::wait_for_ipvs(&node, "the end of port 80", |table| {
        !table.contains("10.96.0.10:80 ")
    })?;
    node.check_alive()
}

fn slices_of(backend: &Backend, service: &str) -> anyhow::Result<String> {
    world::slices(service, &[&backend.pod])
}

/// `nft monitor` and `ip monitor` in a node.
struct Monitors {
    nft: Monitor,
    ip: Monitor,
    marks: u8,
}

/// A program that writes a line for each event to a file, and how much of it was read.
struct Monitor {
    _running: Process,
    file: PathBuf,
    read: usize,
}

impl Monitors {
    /// Starts them and waits until they listen.
    fn start(context: &Context, node: &Node) -> anyhow::Result<Self> {
        let mut monitors = Self {
            nft: Monitor::start(context, node, "nft", &["monitor"])?,
            ip: Monitor::start(context, node, "ip", &["-o", "monitor", "link", "address"])?,
            marks: 0,
        };
        monitors.events(node)?;
        Ok(monitors)
    }

    /// Events since the last call. A change of our own in both worlds, made
    /// until it is heard, shows that all that came before has been heard too.
    fn events(&mut self, node: &Node) -> anyhow::Result<Vec<String>> {
        self.marks += 1;
        let table = format!("mark{}", self.marks);
        let address = format!("127.9.9.{}/32", self.marks);
        let set = |arguments: &[&str]| node.netns().output(arguments[0], &arguments[1..]);
        let mut events = self
            .nft
            .events_before(&format!("delete table ip {table}"), || {
                set(&["nft", "add", "table", "ip", &table])?;
                set(&["nft", "delete", "table", "ip", &table])
            })?;
        events.extend(self.ip.events_before(&address, || {
            set(&["ip", "addr", "replace", &address, "dev", "lo"])
        })?);
        // "# new generation" follows every transaction, ours and those that changed nothing.
        events.retain(|event| {
            !event.starts_with('#') && !event.contains(" ip mark") && !event.contains("127.9.9.")
        });
        Ok(events)
    }
}

impl Monitor {
    fn start(
        context: &Context,
        node: &Node,
        program: &str,
        arguments: &[&str],
    ) -> anyhow::Result<Self> {
        let file = context.folder().join(format!("{program}-monitor"));
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(fs::File::create(&file)?);
        Ok(Self {
            _running: node.netns().spawn(&mut command)?,
            file,
            read: 0,
        })
    }

    fn events_before(
        &mut self,
        mark: &str,
        make_mark: impl Fn() -> anyhow::Result<String>,
    ) -> anyhow::Result<Vec<String>> {
        let text = wait::until_ok("an event of our own", wait::SETTLED, || {
            make_mark()?;
            let text = fs::read_to_string(&self.file)?;
            let heard = text[self.read..].contains(mark);
            ensure!(heard && text.ends_with('\n'), "not heard: {mark}");
            Ok(text)
        })?;
        let events = text[self.read..].lines().map(str::to_owned).collect();
        self.read = text.len();
        Ok(events)
    }
}
