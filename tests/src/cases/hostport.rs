//! Host ports of pods: the CNI capability `portMappings`.
//!
//! The node has two devices with addresses, as in `cases::nodeport`. The client
//! beyond has a route to pods; a host port never needs it, and its pod sees the
//! client all the same.

use std::net::{IpAddr, SocketAddr};
use std::thread::{self, ScopedJoinHandle};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::audit::wait_for_status;
use super::rows::{self, Row, Target};
use super::world;
use crate::context::Context;
use crate::link::batch;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::{Pod, Reply};
use crate::sock::{Server, Transport, WILDCARDS};
use crate::{dump, golden, wait};

/// A port on every address, and one on [`UPLINK`]'s IPv4 address alone.
const PORT: u16 = 18_080;
const NARROW: u16 = 18_081;

/// Code of an ADD that asks for what another has, and of one that should be tried again.
const TAKEN: u64 = 101;
const TRY_AGAIN: u64 = 11;

/// The node's addresses on its two devices.
const UPLINK: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const SECOND: [&str; 2] = ["203.0.113.1", "2001:db8:203::1"];

/// The client beyond.
const OUTSIDE: [&str; 2] = ["192.0.2.2", "2001:db8::2"];

/// Both transports and families, on each address of the node as it comes and
/// goes, for everyone: beyond the node, on it, in another pod and in the pod
/// itself. The pod sees who calls, where it is not itself.
pub(super) fn answered_on_every_node_address(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let (node, outside, own) = (&scene.node, &scene.outside, &scene.own);
    let client = Pod::added(context, node, "client")?;
    // A process of the node listens there too, and gets nothing.
    let at = own.iter().map(|ip| SocketAddr::new(*ip, PORT));
    let _host = Server::at(node.netns(), "host", &at.collect::<Vec<_>>())?;
    let mapped = Mapped::create(context, node, "mapped", &everywhere())?;
    let sctp = WILDCARDS.into_iter().map(|ip| {
        let address = SocketAddr::new(ip, world::TARGET);
        Server::start(mapped.pod.netns(), "mapped", Transport::Sctp, address)
    });
    let _sctp: Vec<Server> = sctp.collect::<anyhow::Result<_>>()?;
    let beyond = ips(OUTSIDE)?;
    let target = || Target::new("the host port", own, PORT);
    let narrow = |what: &str, ips: &[IpAddr]| Target::new(what, ips, NARROW);
    // The first calls come at once: when ADD has answered, the ports are there.
    let rows = [
        Row::answered(outside, target(), "mapped", &beyond),
        Row::answered(client.netns(), target(), "mapped", client.ips()),
        Row::answered(node.netns(), target(), "mapped", own),
        Row::masqueraded(mapped.pod.netns(), target(), "mapped", own),
        Row::answered(
            outside,
            narrow("the one address", &own[..1]),
            "mapped",
            &beyond,
        ),
        Row::refused(outside, narrow("another address", &own[1..])),
    ];
    rows::check(&rows, &mapped.servers)?;
    for (ip, client) in own.iter().zip(beyond.iter().cycle()) {
        let to = SocketAddr::new(*ip, PORT);
        let (by, saw) = world::ask(outside, Transport::Sctp, to)?;
        ensure!(by == "mapped" && saw.ip() == *client, "{by} saw {saw}");
    }

    let late = ips(["192.0.2.101", "2001:db8::101"])?;
    let late_row = || Target::new("a new address", &late, PORT);
    change_addresses(node, "add", " nodad")?;
    wait::until_ok("the new addresses", wait::SETTLED, || {
        let rows = [Row::answered(outside, late_row(), "mapped", &beyond)];
        rows::check(&rows, &mapped.servers)
    })?;
    change_addresses(node, "del", "")?;
    wait::until_ok("their end", wait::SETTLED, || {
        let table = dump::ipvs(node.netns())?;
        ensure!(!table.contains("192.0.2.101"), "IPVS:\n{table}");
        ensure!(!table.contains("2001:db8::101"), "IPVS:\n{table}");
        Ok(())
    })?;
    rows::check(&rows, &mapped.servers)?;
    node.check_alive()
}

fn change_addresses(node: &Node, verb: &str, more: &str) -> anyhow::Result<()> {
    batch(
        node.netns(),
        [
            format!("addr {verb} 192.0.2.101/24 dev uplink"),
            format!("addr {verb} 2001:db8::101/64 dev uplink{more}"),
        ],
    )
}

/// A port that a pod or a Service has is refused to another, who is told, and
/// nothing of whose stays; of many at once one gets it. A Service that comes
/// later is told, and gets the port when the pod has gone.
pub(super) fn conflicts_are_errors(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let node = &scene.node;
    let backend = Mapped::create(context, node, "backend", &json!([]))?;
    let pods: Vec<Pod> = (0..8)
        .map(|n| unadded(context, &format!("racer-{n}"), &everywhere()))
        .collect::<anyhow::Result<_>>()?;
    let replies = thread::scope(|scope| {
        let calls: Vec<_> = pods
            .iter()
            .map(|pod| scope.spawn(|| pod.call(node, "ADD", &[])))
            .collect();
        let joined = calls.into_iter().map(ScopedJoinHandle::join);
        joined.collect::<Result<Vec<_>, _>>()
    });
    let replies = replies.map_err(|_| anyhow::anyhow!("a caller panicked"))?;
    let mut holder = None;
    for (pod, reply) in pods.iter().zip(replies) {
        let reply = reply?;
        if reply.status.success() {
            ensure!(holder.replace(pod).is_none(), "two have the port");
            continue;
        }
        ensure!(reply.code() == Some(TAKEN), "{reply:?}");
        let words = format!("host port {PORT}/TCP is held by pod default/racer-");
        ensure!(message(&reply).contains(&words), "{reply:?}");
    }
    let holder = holder.context("nobody has the port")?;
    leases(context, node, 2)?;

    node.write_manifest("web.yaml", &world::node_port_service("web", 10, 80, PORT))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    let conflict = format!("192.0.2.1:{PORT}/TCP is held by a host port of pod default/racer-");
    wait_for_status(context, node, "the Service's condition", |told| {
        told["conditions"].to_string().contains(&conflict)
    })?;
    let servers = Server::everywhere(holder.netns(), "holder", world::TARGET)?;
    let target = || Target::new("the port", &scene.own, PORT);
    // A node port would be masqueraded.
    let beyond = ips(OUTSIDE)?;
    let by_pod = [Row::answered(&scene.outside, target(), "holder", &beyond)];
    rows::check(&by_pod, &servers)?;

    // The other way round: the Service has it, and a pod is refused.
    holder.del(node)?;
    let by_service = [Row::masqueraded(
        &scene.outside,
        target(),
        "backend",
        &scene.own,
    )];
    wait::until_ok("the Service to have its port", wait::SETTLED, || {
        rows::check(&by_service, &backend.servers)
    })?;
    let late = unadded(context, "late", &everywhere())?;
    let before = state(node)?;
    let reply = late.call(node, "ADD", &[])?;
    ensure!(reply.code() == Some(TAKEN), "{reply:?}");
    let words = format!("host port {PORT}/TCP is the node port of Service default/web");
    ensure!(message(&reply).contains(&words), "{reply:?}");
    unchanged(&before, &state(node)?)?;
    leases(context, node, 1)?;
    // An address that the node may get yet.
    let away = json!([{"hostPort": 1234, "containerPort": 80, "hostIP": "192.0.2.99"}]);
    let away = unadded(context, "away", &away)?;
    let reply = away.call(node, "ADD", &[])?;
    ensure!(reply.code() == Some(TRY_AGAIN), "{reply:?}");
    ensure!(message(&reply).contains("192.0.2.99"), "{reply:?}");
    leases(context, node, 1)?;
    batch(node.netns(), ["addr add 192.0.2.99/24 dev uplink"])?;
    let mut away = away;
    away.add(node)?;
    node.check_alive()
}

/// `kill -9` and a new start: no call fails, the tables are adopted. An agent
/// that has not read everything yet still gives a port from one pod to the next.
pub(super) fn of_a_killed_agent_goes_on(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let (node, outside) = (&scene.node, &scene.outside);
    let mapped = Mapped::create(context, node, "mapped", &everywhere())?;
    let before = state(node)?;
    let ask_all = || {
        let target = Target::new("the host port", &scene.own, PORT);
        let rows = [Row::answered(outside, target, "mapped", &ips(OUTSIDE)?)];
        rows::check(&rows, &mapped.servers)
    };
    for _ in 0..2 {
        node.kill9()?;
        ask_all().context("without an agent")?;
        node.start()?;
        ask_all().context("with the new agent")?;
        // A change that shows in the kernel proves that it is past its first pass.
        node.write_manifest("other.yaml", &world::service("other", 11, 80))?;
        wait_for_vips(node, 2)?;
        ask_all().context("after its first pass")?;
        node.remove_manifest("other.yaml")?;
        wait_for_vips(node, 0)?;
    }
    unchanged(&before, &state(node)?)?;

    node.kill9()?;
    node.overwrite_manifest("broken.yaml", "metadata: [")?;
    node.start()?;
    wait_for_status(context, node, "that a file cannot be read", |told| {
        told["source"]["complete"] == false
    })?;
    mapped.pod.del(node)?;
    let next = Mapped::create(context, node, "next", &everywhere())?;
    let target = Target::new("the host port", &scene.own, PORT);
    let rows = [Row::answered(outside, target, "next", &ips(OUTSIDE)?)];
    rows::check(&rows, &next.servers)?;
    node.check_alive()
}

/// After DEL, be it with the agent away, the port is the node's own again and
/// nothing of it is left.
pub(super) fn gone_after_del(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let (node, outside) = (&scene.node, &scene.outside);
    // What stays is the same for both.
    let _other = Mapped::create(context, node, "other", &json!([]))?;
    let before = state(node)?;
    let target = || Target::new("the host port", &scene.own, PORT);
    let refused = [Row::refused(outside, target())];
    let answered =
        |by| Ok::<_, anyhow::Error>([Row::answered(outside, target(), by, &ips(OUTSIDE)?)]);
    rows::check(&refused, [])?;
    for (name, away) in [("first", false), ("second", true)] {
        let mapped = Mapped::create(context, node, name, &everywhere())?;
        rows::check(&answered(name)?, &mapped.servers)?;
        let with = state(node)?;
        ensure!(unchanged(&before, &with).is_err(), "it shows nowhere");
        if away {
            node.kill9()?;
        }
        mapped.pod.del(node)?;
        if away {
            node.start()?;
        }
        wait::until_ok("the end of the port", wait::SETTLED, || {
            unchanged(&before, &state(node)?)
        })?;
        rows::check(&refused, [])?;
    }
    // A process of the node has the port again.
    let at = scene.own.iter().map(|ip| SocketAddr::new(*ip, PORT));
    let host = Server::at(node.netns(), "host", &at.collect::<Vec<_>>())?;
    rows::check(&answered("host")?, &host)?;
    node.check_alive()
}

/// Where services cannot be programmed, an ADD with host ports says so and leaves
/// nothing, and one without works.
pub(super) fn not_where_services_cannot_be(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let _outside = world::outside(context, &node)?;
    // Whatever the kernel has: a device of that name that is no dummy is another's.
    let foreign = "link add kube-ipvs0 type veth peer name foreign";
    batch(node.netns(), [foreign])?;
    node.start()?;
    let _plain = Pod::added(context, &node, "plain")?;
    let mapped = unadded(context, "mapped", &everywhere())?;
    let words = "services cannot be programmed";
    wait::until_ok("an ADD that says what is missing", wait::SETTLED, || {
        let reply = mapped.call(&node, "ADD", &[])?;
        ensure!(reply.code() == Some(TRY_AGAIN), "{reply:?}");
        ensure!(message(&reply).contains(words), "{reply:?}");
        Ok(())
    })?;
    leases(context, &node, 1)
}

/// A node with two devices, and a client beyond.
struct Scene {
    own: Vec<IpAddr>,
    outside: Netns,
    node: Node,
}

impl Scene {
    fn build(context: &Context) -> anyhow::Result<Self> {
        let node = Node::create(context, "node-a")?;
        let outside = world::outside(context, &node)?;
        batch(
            node.netns(),
            [
                "link add second type dummy".to_owned(),
                format!("addr add {}/24 dev second", SECOND[0]),
                format!("addr add {}/64 dev second nodad", SECOND[1]),
                "link set dev second up".to_owned(),
            ],
        )?;
        node.start()?;
        // The first start loads modules; an ADD that is called once must not meet that.
        wait::until_ok("an agent that has the kernel", wait::SETTLED, || {
            node.check_alive()?;
            ensure!(node.log()?.contains("the kernel's state was adopted"));
            Ok(())
        })?;
        Ok(Self {
            own: [ips(UPLINK)?, ips(SECOND)?].concat(),
            outside,
            node,
        })
    }
}

/// A pod with host ports, and a server in it for each transport and family.
struct Mapped {
    pod: Pod,
    servers: Vec<Server>,
}

impl Mapped {
    fn create(
        context: &Context,
        node: &Node,
        name: &str,
        mappings: &Value,
    ) -> anyhow::Result<Self> {
        let mut pod = unadded(context, name, mappings)?;
        // The servers first: the first call comes right behind the ADD.
        let servers = Server::everywhere(pod.netns(), name, world::TARGET)?;
        pod.add(node)?;
        Ok(Self { pod, servers })
    }
}

fn unadded(context: &Context, name: &str, mappings: &Value) -> anyhow::Result<Pod> {
    let config = json!({ "portMappings": mappings });
    Ok(Pod::create(context, name)?.with_runtime_config(config))
}

/// Both transports on every address, and on one alone.
fn everywhere() -> Value {
    let entry = |port: u16, protocol: &str, ip: &str| {
        json!({
            "hostPort": port,
            "containerPort": world::TARGET,
            "protocol": protocol,
            "hostIP": ip,
        })
    };
    json!([
        entry(PORT, "tcp", ""),
        entry(PORT, "UDP", ""),
        entry(PORT, "SCTP", ""),
        entry(NARROW, "tcp", UPLINK[0]),
        entry(NARROW, "udp", UPLINK[0]),
    ])
}

fn message(reply: &Reply) -> &str {
    let message = reply.output.as_ref().and_then(|said| said["msg"].as_str());
    message.unwrap_or_default()
}

/// What of the agent's is in the kernel for services.
fn state(node: &Node) -> anyhow::Result<[String; 2]> {
    let netns = node.netns();
    Ok([dump::ipvs(netns)?, dump::nft(netns, "ferrule")?])
}

fn unchanged(before: &[String; 2], after: &[String; 2]) -> anyhow::Result<()> {
    for (before, after) in before.iter().zip(after) {
        ensure!(before == after, "{}", golden::difference(before, after));
    }
    Ok(())
}

fn leases(context: &Context, node: &Node, number: u64) -> anyhow::Result<()> {
    let what = format!("{number} leases");
    wait_for_status(context, node, &what, |told| {
        told["pods"]["leases"] == number
    })
}

fn wait_for_vips(node: &Node, number: usize) -> anyhow::Result<()> {
    wait::until_ok("VIPs", wait::SETTLED, || {
        let vips = dump::vips(node.netns())?;
        ensure!(vips.len() == number, "{vips:?}");
        Ok(())
    })
}

fn ips(texts: [&str; 2]) -> anyhow::Result<[IpAddr; 2]> {
    Ok([texts[0].parse()?, texts[1].parse()?])
}
