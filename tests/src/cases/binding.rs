//! VIPs bound by an address, a route or on a device: what is served, by which source,
//! who is told of it on a link, and how one way takes the place of another.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context as _, ensure};
use ferrule_datapath::filter::counters::VIA_VIP;

use super::load::Load;
use super::world::{self, Backend};
use crate::context::Context;
use crate::dump::{self, Table};
use crate::link::batch;
use crate::netns::Netns;
use crate::node::{self, Node};
use crate::pod::Pod;
use crate::sock::{ANSWER, Connection, Outcome, Request, SILENCE, TRANSPORTS, Transport};
use crate::wait;

/// Ways to bind VIPs, each with its lines of the configuration.
const ADDRESS: &str = "vipBinding: address\n";
const ROUTE: &str = "vipBinding: route\n";
const DEVICE: &str = "vipBinding: device\nvipDevice: uplink\n";

/// The node's own addresses.
const OWN: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// A node with a Service, its backend, a client pod and a client outside.
struct Scene {
    // Before the node: pods end first.
    client: Pod,
    _backend: Backend,
    outside: Netns,
    node: Node,
}

impl Scene {
    fn build(context: &Context, way: &str) -> anyhow::Result<Self> {
        let node = Node::create(context, "node-a")?;
        let addresses = OWN.map(|own| ("InternalIP", own));
        let object = node::manifest("node-a", &node::POD_RANGES, &addresses);
        node.write_manifest("node.yaml", &object)?;
        configure(&node, way)?;
        let outside = world::outside(context, &node)?;
        node.start()?;
        let backend = Backend::create(context, &node, "backend")?;
        let client = Pod::added(context, &node, "client")?;
        let service = world::node_port_service("web", 10, 80, 30_080);
        node.write_manifest("web.yaml", &service)?;
        node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
        world::wait_for_service(client.netns(), 10, 80)?;
        Ok(Self {
            client,
            _backend: backend,
            outside,
            node,
        })
    }

    /// Starts the agent anew, to bind VIPs another way, and waits until they are bound
    /// that way alone.
    fn switch(&self, way: &str) -> anyhow::Result<()> {
        configure(&self.node, way)?;
        self.node.start()?;
        self.wait_for(way)
    }

    fn wait_for(&self, way: &str) -> anyhow::Result<()> {
        let vips = world::vips(10).map(|vip| vip.to_string());
        wait::until_ok("VIPs bound one way alone", wait::SETTLED, || {
            self.node.check_alive()?;
            let [addresses, routes, aliases] = self.bound()?;
            let all = format!("{addresses:?}\n{routes:?}\n{aliases:?}");
            for (bound, of_way) in [(addresses, ADDRESS), (routes, ROUTE), (aliases, DEVICE)] {
                let is_vip = |line: &String| vips.iter().any(|vip| first_word(line) == vip);
                let count = bound.iter().filter(|line| is_vip(line)).count();
                let expected = if way == of_way { vips.len() } else { 0 };
                ensure!(count == expected, "{way}: {all}");
            }
            let device = self
                .node
                .netns()
                .links()?
                .contains(&dump::VIP_DEVICE.to_owned());
            ensure!(device == (way == ADDRESS), "{way}, and device: {device}");
            Ok(())
        })
    }

    /// By address, by route, on a device.
    fn bound(&self) -> anyhow::Result<[Vec<String>; 3]> {
        let netns = self.node.netns();
        let vips = dump::vips(netns)?;
        let vips = vips.iter().map(ToString::to_string).collect();
        let bound = [vips, dump::vip_routes(netns)?, dump::aliases(netns)?];
        let ours = |line: &String| !FOREIGN.iter().any(|theirs| line.starts_with(theirs));
        Ok(bound.map(|bound| bound.into_iter().filter(ours).collect()))
    }

    fn clients(&self) -> [(&'static str, &Netns); 3] {
        [
            ("outside", &self.outside),
            ("pod", self.client.netns()),
            ("node", self.node.netns()),
        ]
    }
}

fn first_word(line: &str) -> &str {
    line.split(' ').next().unwrap_or_default()
}

fn configure(node: &Node, way: &str) -> anyhow::Result<()> {
    node.write_config(&format!(
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n{way}"
    ))
}

fn own(like: IpAddr) -> anyhow::Result<IpAddr> {
    Ok(OWN[usize::from(like.is_ipv6())].parse()?)
}

/// Every frontend for every client, and whom the backend sees.
pub(super) fn every_way_serves_every_client(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, ADDRESS)?;
    for way in [ADDRESS, ROUTE, DEVICE] {
        if way != ADDRESS {
            scene.node.stop()?;
            scene.switch(way)?;
        }
        scene.wait_for(way)?;
        for vip in world::vips(10) {
            for transport in TRANSPORTS {
                let to = SocketAddr::new(vip, 80);
                let node_port = SocketAddr::new(own(vip)?, 30_080);
                for (who, from) in scene.clients() {
                    let context = || format!("{who} by {way}");
                    let (_, saw) = world::ask(from, transport, to).with_context(context)?;
                    let expected = match who {
                        "outside" => None,
                        "pod" => Some(scene.client.ip_like(vip)?),
                        _ => Some(own(vip)?),
                    };
                    let right = expected.is_none_or(|expected| saw.ip() == expected);
                    ensure!(right, "{who} by {way}: {to} saw {saw}");
                    world::ask(from, transport, node_port).with_context(context)?;
                    let other = Request::new(transport, SocketAddr::new(vip, 81));
                    let outcome = other.send(from, ANSWER)?;
                    ensure!(outcome == Outcome::Refused, "{who} by {way}: {outcome:?}");
                }
            }
        }
    }
    Ok(())
}

/// With a route a process of the node calls by the node's address, and nothing has to be
/// put in its place; with an address it calls by the VIP.
pub(super) fn a_route_gives_processes_of_the_node_their_source(
    context: &mut Context,
) -> anyhow::Result<()> {
    let scene = Scene::build(context, ROUTE)?;
    for (way, by_vip) in [(ROUTE, false), (ADDRESS, true)] {
        if way != ROUTE {
            scene.node.stop()?;
            scene.switch(way)?;
        }
        scene.wait_for(way)?;
        let before = Table::list(scene.node.netns(), "ferrule")?.packets(VIA_VIP)?;
        for vip in world::vips(10) {
            let to = SocketAddr::new(vip, 80);
            let source = scene.node.netns().run(|| chosen_source(to))?;
            let expected = if by_vip { vip } else { own(vip)? };
            ensure!(source == expected, "{way}: {to} is called from {source}");
            world::ask(scene.node.netns(), Transport::Tcp, to)?;
        }
        let after = Table::list(scene.node.netns(), "ferrule")?.packets(VIA_VIP)?;
        ensure!((after > before) == by_vip, "{way}: {before}, then {after}");
    }
    Ok(())
}

/// The source that the kernel chooses; nothing is sent.
fn chosen_source(to: SocketAddr) -> anyhow::Result<IpAddr> {
    let any = crate::sock::WILDCARDS[usize::from(to.is_ipv6())];
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}

/// One way takes the place of another, and the third that of it, and so on, while every
/// kind of client calls all the time, and with agents that are killed in the middle.
pub(super) fn a_switch_under_load_loses_nothing(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, ADDRESS)?;
    let node = &scene.node;
    // So many that a switch takes its time, and an agent is killed in it.
    node.write_manifest("many.yaml", &many())?;
    wait::until_ok("every VIP", wait::SETTLED * 4, || {
        let bound = dump::vips(node.netns())?.len();
        ensure!(bound == 2 * usize::from(MANY) + 2, "{bound}");
        Ok(())
    })?;
    let foreign = Foreign::make(node.netns())?;
    let mut connections = Vec::new();
    for (_, from) in scene.clients() {
        for vip in world::vips(10) {
            connections.push(Connection::open(from, SocketAddr::new(vip, 80))?);
        }
    }
    let loads = scene.clients().map(|(_, from)| Load::start(from, &[10]));
    let loads = loads.into_iter().collect::<anyhow::Result<Vec<Load>>>()?;
    let settle = || loads.iter().try_for_each(|load| load.wait_for_rounds(3));
    settle()?;
    for way in [ROUTE, DEVICE, ADDRESS] {
        node.kill9()?;
        configure(node, way)?;
        node.start()?;
        // A part of the VIPs is bound anew, whichever.
        wait::until_ok("the beginning of the switch", wait::SETTLED, || {
            node.check_alive()?;
            let [addresses, routes, aliases] = scene.bound()?.map(|bound| bound.len());
            let begun = match way {
                ADDRESS => addresses,
                ROUTE => routes,
                _ => aliases,
            };
            ensure!(begun > 0, "{addresses} {routes} {aliases}");
            Ok(())
        })?;
        node.kill9()?;
        scene.switch(way).with_context(|| way.to_owned())?;
        wait_for_all(&scene, way)?;
        settle()?;
        foreign
            .check(node.netns())
            .with_context(|| way.to_owned())?;
    }
    for load in loads {
        load.stop()?;
    }
    for connection in &mut connections {
        let outcome = connection.ask("still there?", ANSWER)?;
        let answered = matches!(outcome, Outcome::Answered { .. });
        ensure!(answered, "an open connection ended: {outcome:?}");
    }
    a_gap_would_have_shown(&scene)
}

/// The same load notices a VIP that is not bound for a moment.
fn a_gap_would_have_shown(scene: &Scene) -> anyhow::Result<()> {
    let node = &scene.node;
    node.kill9()?;
    for (who, from) in scene.clients() {
        let load = Load::start(from, &[10])?;
        load.wait_for_rounds(1)?;
        let [v4, v6] = world::vips(10);
        batch(
            node.netns(),
            [
                format!("addr del {v4}/32 dev kube-ipvs0"),
                format!("addr del {v6}/128 dev kube-ipvs0"),
            ],
        )?;
        // Whatever the load does ends with the first request that fails.
        load.wait_for_rounds(1_000)?;
        ensure!(load.stop().is_err(), "{who} did not notice");
        node.start()?;
        world::wait_for_service(scene.client.netns(), 10, 80)?;
        node.kill9()?;
    }
    Ok(())
}

const MANY: u8 = 60;

/// Services without endpoints.
fn many() -> String {
    let services = (0..MANY).map(|number| world::service(&format!("s{number}"), 20 + number, 80));
    services.collect::<Vec<_>>().join("---\n")
}

fn wait_for_all(scene: &Scene, way: &str) -> anyhow::Result<()> {
    wait::until_ok("every VIP bound one way alone", wait::SETTLED, || {
        let all = 2 * usize::from(MANY) + 2;
        let [addresses, routes, aliases] = scene.bound()?.map(|bound| bound.len());
        let found = [addresses, routes, aliases];
        let expected = [ADDRESS, ROUTE, DEVICE].map(|of_way| if way == of_way { all } else { 0 });
        ensure!(found == expected, "{way}: {found:?}");
        Ok(())
    })
}

/// How addresses of another program begin.
const FOREIGN: [&str; 2] = ["10.96.9.", "fd00:10:96::9:"];

/// Routes and addresses of another program, like ours and not ours.
struct Foreign {
    routes: [String; 2],
    addresses: String,
}

impl Foreign {
    fn make(netns: &Netns) -> anyhow::Result<Self> {
        batch(
            netns,
            [
                "route add local 10.96.9.1 dev lo table local proto static",
                "route add local 10.96.9.2 dev uplink table local proto 101",
                "route add local fd00:10:96::9:1 dev lo table local proto static",
                "addr add 10.96.9.3/32 dev uplink",
                "addr add fd00:10:96::9:3/128 dev uplink nodad noprefixroute",
            ],
        )?;
        Self::look(netns)
    }

    fn look(netns: &Netns) -> anyhow::Result<Self> {
        let keep = |text: &str| -> String {
            let lines = text.lines();
            let theirs = lines.filter(|line| FOREIGN.iter().any(|word| line.contains(word)));
            theirs.collect::<Vec<_>>().join("\n")
        };
        let routes = |family| netns.output("ip", &["-N", family, "route", "show", "table", "255"]);
        Ok(Self {
            routes: [keep(&routes("-4")?), keep(&routes("-6")?)],
            addresses: keep(&netns.output("ip", &["-o", "addr", "show"])?),
        })
    }

    fn check(&self, netns: &Netns) -> anyhow::Result<()> {
        let now = Self::look(netns)?;
        let same = now.routes == self.routes && now.addresses == self.addresses;
        ensure!(
            same,
            "{:?} {:?}\n{:?} {:?}",
            self.routes,
            self.addresses,
            now.routes,
            now.addresses
        );
        Ok(())
    }
}

/// Who asks on a link for a VIP is not answered, nothing says by itself where it is, and
/// nobody is asked in its name.
pub(super) fn no_neighbour_learns_of_a_vip(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, ADDRESS)?;
    on_link(&scene)?;
    for way in [ADDRESS, ROUTE, DEVICE] {
        if way != ADDRESS {
            scene.node.stop()?;
            scene.switch(way)?;
        }
        scene.wait_for(way)?;
        let learnt = provoke(&scene).with_context(|| way.to_owned())?;
        ensure!(learnt.is_empty(), "{way}: the link knows {learnt:?}");
    }
    // Once more without the rules, to see that all this would have told.
    scene.node.kill9()?;
    for chain in [
        "arp ferrule silence",
        "arp ferrule announcements",
        "inet ferrule guard-local",
    ] {
        let words: Vec<&str> = ["flush", "chain"]
            .into_iter()
            .chain(chain.split(' '))
            .collect();
        scene.node.netns().output("nft", &words)?;
    }
    let learnt = provoke(&scene)?;
    for vip in world::vips(10) {
        for how in ["asked", "announced", "solicited"] {
            let told = learnt.contains(&(how, vip));
            ensure!(told, "{vip} is not {how}; {learnt:?}");
        }
    }
    Ok(())
}

/// The client beyond the node believes what it hears.
fn on_link(scene: &Scene) -> anyhow::Result<()> {
    let set = |netns: &Netns, key: &str, value: &str| -> anyhow::Result<()> {
        let path = format!("/proc/sys/net/{key}");
        netns.run(|| std::fs::write(&path, value).with_context(|| path.clone()))
    };
    for key in [
        "ipv4/conf/eth0/arp_accept",
        "ipv6/conf/eth0/forwarding",
        "ipv6/conf/eth0/accept_untracked_na",
    ] {
        set(&scene.outside, key, "1")?;
    }
    for key in [
        "ipv4/conf/uplink/arp_notify",
        "ipv6/conf/uplink/ndisc_notify",
    ] {
        set(scene.node.netns(), key, "1")?;
    }
    Ok(())
}

/// Does what could tell a neighbour where a VIP is, and returns which it then knows.
fn provoke(scene: &Scene) -> anyhow::Result<Vec<(&'static str, IpAddr)>> {
    let (node, outside) = (scene.node.netns(), &scene.outside);
    let mut learnt = Vec::new();
    let mut take = |how: &'static str| -> anyhow::Result<()> {
        learnt.extend(known_vips(outside)?.into_iter().map(|vip| (how, vip)));
        batch(outside, ["neigh flush dev eth0 nud all"])
    };
    take("before")?;
    // The device gets another number, and the node says which addresses it has there.
    let mac = new_mac(&scene.node)?;
    batch(node, [format!("link set dev uplink address {mac}")])?;
    wait::until_ok("the announcement of an address", wait::SETTLED, || {
        let known = neighbours(outside)?;
        for own in OWN {
            ensure!(known.contains(&own.parse()?), "{known:?}");
        }
        Ok(())
    })?;
    std::thread::sleep(SILENCE);
    take("announced")?;
    // The client asks for the VIP itself.
    let [v4, v6] = world::vips(10);
    let ways = [
        format!("route add {v4}/32 dev eth0"),
        format!("route add {v6}/128 dev eth0"),
    ];
    batch(outside, &ways)?;
    for vip in world::vips(10) {
        Request::new(Transport::Tcp, SocketAddr::new(vip, 80)).send(outside, SILENCE)?;
    }
    take("asked")?;
    batch(outside, ways.map(|way| way.replace("add", "del")))?;
    // The node asks for the client, to answer in the name of a VIP: the client knows the node
    // without having asked, so that the node does not know the client by that.
    let by_hand = OWN.map(|own| format!("neigh replace {own} lladdr {mac} dev eth0 nud permanent"));
    batch(outside, &by_hand)?;
    for vip in world::vips(10) {
        batch(node, ["neigh flush dev uplink nud all"])?;
        world::ask(outside, Transport::Tcp, SocketAddr::new(vip, 80))?;
    }
    take("solicited")?;
    Ok(learnt)
}

/// A hardware address that the device has not.
fn new_mac(node: &Node) -> anyhow::Result<String> {
    let arguments = ["-o", "link", "show", "dev", "uplink"];
    let text = node.netns().output("ip", &arguments)?;
    let mut words = text.split_whitespace();
    words.find(|word| *word == "link/ether");
    let old = words.next().context("no link/ether")?;
    let end = if old.ends_with('1') { '2' } else { '1' };
    Ok(format!("02:00:00:00:00:0{end}"))
}

/// Neighbours whose place on the link is known.
fn neighbours(netns: &Netns) -> anyhow::Result<Vec<IpAddr>> {
    let text = netns.output("ip", &["neigh", "show", "dev", "eth0"])?;
    let known = text.lines().filter(|line| line.contains("lladdr"));
    known.map(|line| Ok(first_word(line).parse()?)).collect()
}

fn known_vips(netns: &Netns) -> anyhow::Result<Vec<IpAddr>> {
    let vips = world::vips(10);
    let known = neighbours(netns)?.into_iter();
    Ok(known.filter(|ip| vips.contains(ip)).collect())
}

/// What another removes is made again, and the source follows the node's addresses.
pub(super) fn what_others_undo_is_made_again(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, ROUTE)?;
    scene.wait_for(ROUTE)?;
    let netns = scene.node.netns();
    let [v4, v6] = world::vips(10);
    let by_own = [
        format!("{v4} dev lo src {}", OWN[0]),
        format!("{v6} dev lo src {}", OWN[1]),
    ];
    let wait_for_routes = |what: &str, expected: &[String]| {
        wait::until_ok(what, wait::SETTLED, || {
            let routes = dump::vip_routes(netns)?;
            ensure!(routes == expected, "{routes:?}");
            Ok(())
        })
    };
    wait_for_routes("routes", &by_own)?;
    batch(
        netns,
        [
            format!("route del local {v4} dev lo table local"),
            format!("route del local {v6} dev lo table local"),
        ],
    )?;
    wait_for_routes("routes again", &by_own)?;
    // The kernel takes routes, or their source, with the address that is their source.
    batch(
        netns,
        [
            "addr del 192.0.2.1/24 dev uplink",
            "addr add 192.0.2.1/24 dev uplink",
            "addr del 2001:db8::1/64 dev uplink",
            "addr add 2001:db8::1/64 dev uplink nodad",
        ],
    )?;
    wait_for_routes("routes with the address that came back", &by_own)?;
    batch(
        netns,
        [
            "addr add 192.0.3.9/24 dev uplink",
            "addr add 2001:db8::9/64 dev uplink nodad",
            "addr del 192.0.2.1/24 dev uplink",
            "addr del 2001:db8::1/64 dev uplink",
        ],
    )?;
    let by_other = by_own.each_ref().map(|route| {
        let route = route.replace(OWN[0], "192.0.3.9");
        route.replace(OWN[1], "2001:db8::9")
    });
    wait_for_routes("routes with another source", &by_other)?;
    batch(
        netns,
        [
            "addr add 192.0.2.1/24 dev uplink",
            "addr add 2001:db8::1/64 dev uplink nodad",
            "link set dev lo down",
            "link set dev lo up",
        ],
    )?;
    wait_for_routes("routes by the address of the Node object", &by_own)?;
    scene.node.stop()?;
    scene.switch(DEVICE)?;
    batch(
        netns,
        [
            format!("addr del {v4}/32 dev uplink"),
            format!("addr del {v6}/128 dev uplink"),
        ],
    )?;
    scene.wait_for(DEVICE)?;
    // IPv6 addresses go with a device that goes down.
    batch(
        netns,
        ["link set dev uplink down", "link set dev uplink up"],
    )?;
    scene.wait_for(DEVICE)?;
    world::wait_for_service(scene.client.netns(), 10, 80)
}

/// Nothing is left of any way.
pub(super) fn cleanup_removes_every_binding(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, ROUTE)?;
    let foreign = Foreign::make(scene.node.netns())?;
    let agent = context.binary("ferrule-agent")?;
    for way in [ROUTE, DEVICE] {
        if way != ROUTE {
            scene.switch(way)?;
        }
        scene.wait_for(way)?;
        scene.node.kill9()?;
        scene
            .node
            .netns()
            .output(&agent.to_string_lossy(), &["cleanup"])?;
        let [addresses, routes, aliases] = scene.bound()?.map(|bound| bound.len());
        let left = [addresses, routes, aliases];
        ensure!(left == [0, 0, 0], "{way}: {left:?}");
        foreign.check(scene.node.netns())?;
    }
    Ok(())
}
