//! Node ports answer on the addresses of the node that they should, and on no other.
//!
//! The node has two devices with addresses: `uplink`, by which the client beyond
//! is reached, and `second`. The client beyond has a route to pods; who is seen by
//! a backend here, and needs to be, `cases::masquerade` tells more about.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::rows::{self, Row, Target};
use super::world::{self, Backend};
use crate::context::Context;
use crate::link::batch;
use crate::netns::Netns;
use crate::node::{Node, POD_RANGES, manifest};
use crate::pod::Pod;
use crate::sock::{Server, TRANSPORTS};
use crate::{dump, wait};

/// Number and node port of the Service with a backend, and of that without.
const WEB: u8 = 10;
const WEB_PORT: u16 = 30_010;
const EMPTY: u8 = 11;
const EMPTY_PORT: u16 = 30_011;

const PORT: u16 = 80;

/// The node's addresses on its two devices, and its link-local one of the first.
const UPLINK: [&str; 2] = ["192.0.2.1", "2001:db8::1"];
const SECOND: [&str; 2] = ["203.0.113.1", "2001:db8:203::1"];
const LINK_LOCAL: &str = "fe80::a";

/// Answered on every address of every device, to everyone, although a process of
/// the node listens there too. Loopback, link-local addresses and VIPs stay the
/// process's own or nobody's.
pub(super) fn answered_on_every_node_address(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, None)?;
    let node = scene.node.netns();
    let own = &scene.own;
    let loopback = ips(["127.0.0.1", "::1"])?;
    let mut listening = on_port([&own[..], &loopback].concat(), WEB_PORT);
    listening.push(link_local(node, "uplink")?);
    let host = Server::at(node, "host", &listening)?;
    let target = || Target::new("the node port", own, WEB_PORT);
    let backend = &scene.backend.pod;
    let mut rows = vec![
        Row::masqueraded(&scene.outside, target(), "backend", own),
        Row::masqueraded(backend.netns(), target(), "backend", own),
        Row::answered(node, target(), "backend", own),
        Row::answered(scene.pod.netns(), target(), "backend", scene.pod.ips()),
    ];
    let target = Target::new("the port on loopback", &loopback, WEB_PORT);
    rows.push(Row::answered(node, target, "host", &loopback));
    for from in [&scene.outside, scene.pod.netns(), node] {
        let target = Target::new("the port on the VIP", &world::vips(WEB), WEB_PORT);
        rows.push(Row::refused(from, target));
    }
    rows::check(&rows, scene.backend.servers.iter().chain(&host))?;
    link_local_is_left_alone(&scene)?;
    scene.node.check_alive()
}

/// What a link-local address gets is for the process of the node.
fn link_local_is_left_alone(scene: &Scene) -> anyhow::Result<()> {
    let to = link_local(&scene.outside, "eth0")?;
    for transport in TRANSPORTS {
        let (by, _) = world::ask(&scene.outside, transport, to)?;
        ensure!(by == "host", "{transport:?} {to}: {by} answered");
    }
    Ok(())
}

/// Addresses that come and go, with or without their device, are followed, and
/// so are the Service's port and type.
pub(super) fn follows_addresses_and_service(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, None)?;
    let (node, outside) = (&scene.node, &scene.outside);
    let late = ips(["192.0.2.101", "2001:db8::101"])?;
    let third = ips(["198.51.100.1", "2001:db8:198::1"])?;
    let web = |name: &str, ips: &[IpAddr]| {
        let own = [ips, &scene.own].concat();
        let target = Target::new(name, ips, WEB_PORT);
        Row::masqueraded(outside, target, "backend", &own)
    };
    batch(
        node.netns(),
        [
            "addr add 192.0.2.101/24 dev uplink",
            "addr add 2001:db8::101/64 dev uplink nodad",
            "link add third type dummy",
            "addr add 198.51.100.1/24 dev third",
            "addr add 2001:db8:198::1/64 dev third nodad",
            "link set dev third up",
        ],
    )?;
    wait_for_frontends(node, &[&scene.own[..], &late, &third].concat())?;
    let rows = [web("a new address", &late), web("a new device", &third)];
    rows::check(&rows, &scene.backend.servers)?;
    batch(
        node.netns(),
        [
            "addr del 192.0.2.101/24 dev uplink",
            "addr del 2001:db8::101/64 dev uplink",
            "link del third",
        ],
    )?;
    wait_for_frontends(node, &scene.own)?;
    let mut before = vec![web("the first addresses", &scene.own)];
    rows::check(&before, &scene.backend.servers)?;

    let other = WEB_PORT + 5;
    node.write_manifest(
        "web.yaml",
        &world::node_port_service("web", WEB, PORT, other),
    )?;
    let target = |port| Target::new(format!("port {port}"), &scene.own, port);
    before = vec![
        Row::masqueraded(outside, target(other), "backend", &scene.own),
        Row::refused(outside, target(WEB_PORT)),
    ];
    wait::until_ok("the other node port", wait::SETTLED, || {
        rows::check(&before, &scene.backend.servers)
    })?;
    node.write_manifest("web.yaml", &world::service("web", WEB, PORT))?;
    wait::until_ok("the end of the node port", wait::SETTLED, || {
        rows::check(
            &[Row::refused(outside, target(other))],
            &scene.backend.servers,
        )
    })?;
    wait_for_frontends(node, &[])?;
    node.check_alive()
}

/// A node port of a Service without endpoints is refused to everyone, although a
/// process of the node listens on that very port: it gets the port before and
/// after, and not meanwhile.
pub(super) fn without_endpoints_refused(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, None)?;
    let listening = on_port(scene.own.clone(), EMPTY_PORT);
    let host = Server::at(scene.node.netns(), "host", &listening)?;
    let vantages = [&scene.outside, scene.pod.netns(), scene.node.netns()];
    let target = || Target::new("the node port", &scene.own, EMPTY_PORT);
    let seen_as = [
        &ips(["192.0.2.2", "2001:db8::2"])?,
        scene.pod.ips(),
        &scene.own,
    ];
    let by_host: Vec<_> = vantages
        .iter()
        .zip(seen_as)
        .map(|(from, saw)| Row::answered(from, target(), "host", saw))
        .collect();
    let refused = vantages.map(|from| Row::refused(from, target()));
    rows::check(&by_host, &host).context("before there is the Service")?;

    let service = world::node_port_service("empty", EMPTY, PORT, EMPTY_PORT);
    scene.node.write_manifest("empty.yaml", &service)?;
    wait::until_ok("the refusal", wait::SETTLED, || {
        rows::check(&refused, &host)
    })?;
    // From here on nothing may get through.
    let got = host.iter().map(|server| server.seen().len()).sum::<usize>();
    rows::check(&refused, &host)?;
    let slices = world::slices("empty", &[&scene.backend.pod])?;
    scene.node.write_manifest("empty-slices.yaml", &slices)?;
    let served = [
        Row::masqueraded(&scene.outside, target(), "backend", &scene.own),
        Row::answered(scene.pod.netns(), target(), "backend", scene.pod.ips()),
        Row::answered(scene.node.netns(), target(), "backend", &scene.own),
    ];
    wait::until_ok("the endpoint", wait::SETTLED, || {
        rows::check(&served, &scene.backend.servers)
    })?;
    scene.node.remove_manifest("empty-slices.yaml")?;
    wait::until_ok("the refusal again", wait::SETTLED, || {
        rows::check(&refused, &host)
    })?;
    let more = host.iter().map(|server| server.seen().len()).sum::<usize>();
    ensure!(got == more, "the process got {} requests", more - got);

    scene.node.remove_manifest("empty.yaml")?;
    wait::until_ok("the end of the Service", wait::SETTLED, || {
        rows::check(&by_host, &host)
    })?;
    scene.node.check_alive()
}

/// `nodePortAddresses` limits node ports to networks, family by family, or to
/// the primary address of the Node object, which is followed.
pub(super) fn limited_to_chosen_addresses(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, Some("[192.0.2.0/24, \"2001:db8::/64\"]"))?;
    let [uplink4, uplink6] = ips(UPLINK)?;
    let [second4, second6] = ips(SECOND)?;
    limited(&scene, "networks", &[uplink4, uplink6], &[second4, second6])?;

    scene.restart("[203.0.113.0/24]")?;
    // What is said of one family leaves the other open.
    let open = [second4, uplink6, second6];
    limited(&scene, "a network of one family", &open, &[uplink4])?;

    scene.restart("[primary]")?;
    let both = [UPLINK, SECOND].concat();
    scene.set_addresses(&both, &[])?;
    let first = [uplink4, uplink6];
    limited(&scene, "primary", &first, &[second4, second6])?;
    scene.set_addresses(&SECOND, &UPLINK)?;
    let first = [second4, second6];
    limited(&scene, "another primary", &first, &[uplink4, uplink6])?;
    scene.set_addresses(&[], &UPLINK)?;
    let first = [uplink4, uplink6];
    limited(&scene, "an external primary", &first, &[second4, second6])?;

    scene.restart("[]")?;
    limited(&scene, "no limit", &scene.own, &[])
}

fn limited(scene: &Scene, what: &str, open: &[IpAddr], closed: &[IpAddr]) -> anyhow::Result<()> {
    wait_for_frontends(&scene.node, open).with_context(|| what.to_owned())?;
    let mut rows = Vec::new();
    for from in [&scene.outside, scene.node.netns()] {
        let target = Target::new(format!("an open address ({what})"), open, WEB_PORT);
        rows.push(Row::answered(from, target, "backend", &scene.own));
        let target = Target::new(format!("a closed address ({what})"), closed, WEB_PORT);
        rows.push(Row::refused(from, target));
    }
    rows::check(&rows, &scene.backend.servers)?;
    scene.node.check_alive()
}

/// A node with two devices, a backend and a client in pods, a client beyond, and
/// the Service.
struct Scene {
    own: Vec<IpAddr>,
    outside: Netns,
    pod: Pod,
    backend: Backend,
    node: Node,
}

impl Scene {
    fn build(context: &Context, addresses: Option<&str>) -> anyhow::Result<Self> {
        let node = Node::create(context, "node-a")?;
        let outside = world::outside(context, &node)?;
        batch(
            node.netns(),
            [
                format!("addr add {LINK_LOCAL}/64 dev uplink nodad"),
                "link add second type dummy".to_owned(),
                format!("addr add {}/24 dev second", SECOND[0]),
                format!("addr add {}/64 dev second nodad", SECOND[1]),
                "link set dev second up".to_owned(),
            ],
        )?;
        batch(&outside, ["addr add fe80::b/64 dev eth0 nodad"])?;
        if let Some(addresses) = addresses {
            node.write_config(&config(addresses))?;
        }
        node.start()?;
        let scene = Self {
            own: [ips(UPLINK)?, ips(SECOND)?].concat(),
            pod: Pod::added(context, &node, "client")?,
            backend: Backend::create(context, &node, "backend")?,
            outside,
            node,
        };
        let service = world::node_port_service("web", WEB, PORT, WEB_PORT);
        scene.node.write_manifest("web.yaml", &service)?;
        let slices = world::slices("web", &[&scene.backend.pod])?;
        scene.node.write_manifest("web-slices.yaml", &slices)?;
        if addresses.is_none() {
            wait_for_frontends(&scene.node, &scene.own)?;
        }
        Ok(scene)
    }

    fn restart(&self, addresses: &str) -> anyhow::Result<()> {
        self.node.stop()?;
        self.node.write_config(&config(addresses))?;
        self.node.start()
    }

    /// Gives the Node object these addresses.
    fn set_addresses(&self, internal: &[&str], external: &[&str]) -> anyhow::Result<()> {
        let internal = internal.iter().map(|ip| ("InternalIP", *ip));
        let external = external.iter().map(|ip| ("ExternalIP", *ip));
        // Whatever is no address of a node must not be taken for one.
        let first = [("Hostname", "node-a")].into_iter();
        let all: Vec<_> = first.chain(external).chain(internal).collect();
        let node = manifest("node-a", &POD_RANGES, &all);
        self.node.write_manifest("node.yaml", &node)
    }
}

fn config(node_port_addresses: &str) -> String {
    format!(
        "apiVersion: ferrule.io/v1alpha1
kind: AgentConfiguration
nodePortAddresses: {node_port_addresses}
"
    )
}

fn ips(texts: [&str; 2]) -> anyhow::Result<[IpAddr; 2]> {
    Ok([texts[0].parse()?, texts[1].parse()?])
}

/// Waits until the node ports are on these addresses and on no others, each with
/// its backend.
fn wait_for_frontends(node: &Node, ips: &[IpAddr]) -> anyhow::Result<()> {
    let port = format!(":{WEB_PORT} ");
    let what = format!("node ports on {ips:?}");
    let mut expected: Vec<String> = Vec::new();
    for ip in ips {
        let at = SocketAddr::new(*ip, WEB_PORT);
        expected.extend(["TCP", "UDP"].map(|transport| format!("{transport} {at} rr")));
    }
    expected.sort();
    wait::until_ok(&what, wait::SETTLED, || {
        node.check_alive()?;
        let table = dump::ipvs(node.netns())?;
        let mut found = Vec::new();
        let mut lines = table.lines().peekable();
        while let Some(line) = lines.next() {
            let backend = lines.peek().is_some_and(|next| next.starts_with(' '));
            if !line.starts_with(' ') && line.contains(&port) && backend {
                found.push(line);
            }
        }
        found.sort_unstable();
        ensure!(found == expected, "IPVS:\n{table}");
        Ok(())
    })
}

fn on_port(ips: Vec<IpAddr>, port: u16) -> Vec<SocketAddr> {
    let with_port = |ip| SocketAddr::new(ip, port);
    ips.into_iter().map(with_port).collect()
}

/// The node's link-local address, by a device of the one who asks.
fn link_local(netns: &Netns, device: &str) -> anyhow::Result<SocketAddr> {
    let text = netns.output("ip", &["-j", "link", "show", "dev", device])?;
    let links: Value = serde_json::from_str(&text)?;
    let index = links[0]["ifindex"].as_u64().context("no index")?;
    let device = u32::try_from(index)?;
    Ok(SocketAddrV6::new(LINK_LOCAL.parse()?, WEB_PORT, 0, device).into())
}
