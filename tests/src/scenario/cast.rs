//! Who takes part in every scenario, and where.
//!
//! ```text
//!             192.0.2.0/24, 2001:db8::/64
//!   ──┬──────────┬─────────┬──────────┬──────────┬──  a bridge in `switch`
//!    .1         .2        .3         .4         .6
//!  node-a     outside   node-b    external   stranger
//!    │                    │
//!  client-a a1 a2       client-b b1 b2
//!  10.244.1.10 .11 .12  10.244.2.10 .11 .12          fd00:10:244:1::10 …
//! ```
//!
//! node-a is under test. node-b is a router with pods, and runs nothing of ours: what it
//! has no route to it sends to node-a. `outside` and `stranger` know by node-a the ways to
//! VIPs, and no way to a pod; `external` takes VIPs to be on the segment, and asks there who
//! has them. So what reaches them from a
//! pod's address goes unanswered. Each backend listens on [`PORT`] of its own address;
//! `kubelet` is a process of node-a that listens on [`KUBELET`] of every address.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::Context as _;
use ferrule_datapath::routes::Routes;
use ferrule_model::source_nat::OwnAddress;
use ipnetwork::IpNetwork;

use super::wire::{End, LOOPBACK, Orders, block_on, descriptor, everywhere, single};
use crate::context::Context;
use crate::netns::Netns;
use crate::sock::{Server, Transport, WILDCARDS};

/// The node under test.
pub(super) const NODE: &str = "node-a";

/// Port of the backends.
pub(super) const PORT: u16 = 8080;

/// Port of a process of node-a.
pub(super) const KUBELET: u16 = 10250;

/// By which a host is on the segment.
const UPLINK: &str = "uplink";

/// Index of the first device, and of the first veth to a pod.
const FIRST: u32 = 100;
const FIRST_POD: u32 = 200;

/// Networks of VIPs: cluster addresses, external ones, those of load balancers.
const VIPS: [(&str, u8); 6] = [
    ("10.96.0.0", 16),
    ("203.0.113.0", 24),
    ("198.51.100.0", 24),
    ("fd00:10:96::", 112),
    ("2001:db8:203::", 64),
    ("2001:db8:198::", 64),
];

const EVERYWHERE: [(&str, u8); 2] = [("0.0.0.0", 0), ("::", 0)];

/// Pod networks and the nodes that have them.
const POD_NETWORKS: [(&str, [(&str, u8); 2]); 2] = [
    ("node-a", [("10.244.1.0", 24), ("fd00:10:244:1::", 64)]),
    ("node-b", [("10.244.2.0", 24), ("fd00:10:244:2::", 64)]),
];

/// The gateway of pods, as our plugin makes it.
const GATEWAYS: [&str; 2] = ["169.254.1.1", "fe80::1"];

/// Someone with a namespace of its own.
struct Member {
    name: &'static str,
    ips: [&'static str; 2],
    /// The node that a pod is on.
    node: Option<&'static str>,
}

const fn host(name: &'static str, ips: [&'static str; 2]) -> Member {
    Member {
        name,
        ips,
        node: None,
    }
}

const fn pod(node: &'static str, name: &'static str, ips: [&'static str; 2]) -> Member {
    Member {
        name,
        ips,
        node: Some(node),
    }
}

const MEMBERS: [Member; 11] = [
    host("node-a", ["192.0.2.1", "2001:db8::1"]),
    host("outside", ["192.0.2.2", "2001:db8::2"]),
    host("node-b", ["192.0.2.3", "2001:db8::3"]),
    host("external", ["192.0.2.4", "2001:db8::4"]),
    host("stranger", ["192.0.2.6", "2001:db8::6"]),
    pod("node-a", "client-a", ["10.244.1.10", "fd00:10:244:1::10"]),
    pod("node-a", "a1", ["10.244.1.11", "fd00:10:244:1::11"]),
    pod("node-a", "a2", ["10.244.1.12", "fd00:10:244:1::12"]),
    pod("node-b", "client-b", ["10.244.2.10", "fd00:10:244:2::10"]),
    pod("node-b", "b1", ["10.244.2.11", "fd00:10:244:2::11"]),
    pod("node-b", "b2", ["10.244.2.12", "fd00:10:244:2::12"]),
];

/// Servers: their name and where they are.
const BACKENDS: [(&str, &str); 7] = [
    ("a1", "a1"),
    ("a2", "a2"),
    ("b1", "b1"),
    ("b2", "b2"),
    ("host-a", "node-a"),
    ("host-b", "node-b"),
    ("external", "external"),
];

/// Whether there is a server of that name.
pub(super) fn is_backend(name: &str) -> bool {
    name == "kubelet" || BACKENDS.iter().any(|(backend, _)| *backend == name)
}

/// The addresses of one who takes part, IPv4 first.
pub(super) fn ips(name: &str) -> Option<[IpAddr; 2]> {
    let name = BACKENDS
        .iter()
        .find(|(backend, _)| *backend == name)
        .map_or(name, |(_, member)| member);
    let member = MEMBERS.iter().find(|member| member.name == name)?;
    let [v4, v6] = member.ips.map(str::parse);
    Some([v4.ok()?, v6.ok()?])
}

fn known(name: &str) -> anyhow::Result<[IpAddr; 2]> {
    ips(name).with_context(|| format!("nobody is called {name}"))
}

/// All of them, where they are, and their servers.
#[derive(Debug)]
pub(super) struct Cast {
    // Before the namespaces: servers end first.
    servers: Vec<Server>,
    members: BTreeMap<&'static str, Netns>,
    switch: Netns,
}

impl Cast {
    /// Makes everything.
    pub(super) fn assemble(context: &Context, sctp: bool) -> anyhow::Result<Self> {
        let bare = |name| Netns::bare(context.folder(), name);
        let mut cast = Self {
            servers: Vec::new(),
            members: BTreeMap::new(),
            switch: bare("switch")?,
        };
        for member in &MEMBERS {
            cast.members.insert(member.name, bare(member.name)?);
        }
        cast.lay_segment()?;
        for node in ["node-a", "node-b"] {
            cast.plug_pods(node)?;
        }
        for member in MEMBERS.iter().filter(|member| member.node.is_none()) {
            cast.address_host(member)?;
        }
        cast.serve(sctp)?;
        Ok(cast)
    }

    /// The bridge, and a veth from it to each host.
    fn lay_segment(&self) -> anyhow::Result<()> {
        let mut orders = Orders::default();
        orders.bridge("segment", FIRST);
        orders.up(FIRST);
        let mut files = Vec::new();
        let hosts = MEMBERS.iter().filter(|member| member.node.is_none());
        for (index, host) in (FIRST + 1..).zip(hosts) {
            let file = self.member(host.name)?.file()?;
            let here = end(&format!("port{index}"), index, 0);
            let there = end(UPLINK, FIRST, u8::try_from(index)?);
            orders.veth(&here, &there, descriptor(&file), Some(FIRST));
            orders.up(index);
            files.push(file);
        }
        orders.carry_out(&self.switch)
    }

    /// The pods of a node, as our plugin makes them: a route and a neighbour entry for
    /// each address, and no address on the node's end.
    fn plug_pods(&self, node: &'static str) -> anyhow::Result<()> {
        let mut of_node = Orders::default();
        let mut files = Vec::new();
        let mut of_pods = Vec::new();
        let pods = MEMBERS.iter().filter(|member| member.node == Some(node));
        for (index, pod) in (FIRST_POD..).zip(pods) {
            let file = self.member(pod.name)?.file()?;
            let number = u8::try_from(index)?;
            let here = end(&format!("fer{}", pod.name), index, number);
            let mut there = end("eth0", FIRST, number);
            there.mac[4] = 1;
            of_node.veth(&here, &there, descriptor(&file), None);
            of_node.up(index);
            let mut of_pod = Orders::default();
            of_pod.setting("ipv6/conf/eth0/accept_dad", "0");
            of_pod.up(LOOPBACK);
            of_pod.up(FIRST);
            for (ip, gateway) in known(pod.name)?.into_iter().zip(GATEWAYS) {
                let gateway: IpAddr = gateway.parse()?;
                of_node.neighbour(index, ip, there.mac);
                of_node.route(index, single(ip), None);
                let (_, length) = single(ip);
                of_pod.address(FIRST, ip, length);
                of_pod.neighbour(FIRST, gateway, here.mac);
                of_pod.route(FIRST, single(gateway), None);
                of_pod.route(FIRST, everywhere(ip), Some(gateway));
            }
            files.push(file);
            of_pods.push((pod.name, of_pod));
        }
        of_node.carry_out(self.member(node)?)?;
        for (pod, orders) in of_pods {
            orders.carry_out(self.member(pod)?)?;
        }
        Ok(())
    }

    fn address_host(&self, member: &Member) -> anyhow::Result<()> {
        let mut orders = Orders::default();
        orders.setting("ipv6/conf/uplink/accept_dad", "0");
        orders.up(LOOPBACK);
        orders.up(FIRST);
        for (ip, length) in known(member.name)?.into_iter().zip([24, 64]) {
            orders.address(FIRST, ip, length);
        }
        match member.name {
            "node-a" => orders.ways_to("outside", &EVERYWHERE)?,
            "node-b" => {
                orders.setting("ipv4/ip_forward", "1");
                orders.setting("ipv4/conf/all/send_redirects", "0");
                orders.setting("ipv6/conf/all/forwarding", "1");
                orders.ways_to("node-a", &EVERYWHERE)?;
            }
            "outside" | "stranger" => orders.ways_to("node-a", &VIPS)?,
            "external" => {
                for (network, length) in VIPS {
                    orders.route(FIRST, (network.parse()?, length), None);
                }
            }
            _ => {}
        }
        for (node, networks) in POD_NETWORKS {
            let other_node = ["node-a", "node-b"].contains(&member.name) && node != member.name;
            if other_node {
                orders.ways_to(node, &networks)?;
            }
        }
        orders.carry_out(self.member(member.name)?)
    }

    fn serve(&mut self, sctp: bool) -> anyhow::Result<()> {
        let mut transports = vec![Transport::Tcp, Transport::Udp];
        if sctp {
            transports.push(Transport::Sctp);
        }
        let mut servers = Vec::new();
        for (name, place) in BACKENDS {
            for ip in known(place)? {
                for transport in &transports {
                    let at = SocketAddr::new(ip, PORT);
                    servers.push(Server::start(self.member(place)?, name, *transport, at)?);
                }
            }
        }
        for ip in WILDCARDS {
            for transport in [Transport::Tcp, Transport::Udp] {
                let at = SocketAddr::new(ip, KUBELET);
                servers.push(Server::start(self.node(), "kubelet", transport, at)?);
            }
        }
        self.servers = servers;
        Ok(())
    }

    /// The namespace of the node under test.
    pub(super) fn node(&self) -> &Netns {
        &self.members[NODE]
    }

    /// The namespace of one who takes part.
    pub(super) fn member(&self, name: &str) -> anyhow::Result<&Netns> {
        let member = self.members.get(name);
        member.with_context(|| format!("nobody is called {name}"))
    }

    /// What arrived from whom, at whichever server.
    pub(super) fn seen(&self) -> impl Iterator<Item = crate::sock::Seen> {
        self.servers.iter().flat_map(Server::seen)
    }

    /// Gives node-a more addresses on the segment.
    pub(super) fn add_addresses(&self, networks: &[IpNetwork]) -> anyhow::Result<()> {
        let mut orders = Orders::default();
        for network in networks {
            orders.address(FIRST, network.ip(), network.prefix());
        }
        orders.carry_out(self.node())
    }

    /// The addresses of node-a as the agent reads them.
    pub(super) fn own_addresses(&self) -> anyhow::Result<Vec<OwnAddress>> {
        let found = self
            .node()
            .run(|| block_on(async { Ok(Routes::open()?.addresses().await?) }))?;
        let own = found.into_iter().map(|address| {
            let link = IpNetwork::new(address.ip, address.prefix)?;
            Ok(OwnAddress {
                ip: address.ip,
                link: IpNetwork::new(link.network(), link.prefix())?,
                device: address.device,
            })
        });
        own.collect()
    }
}

impl Orders {
    /// Routes by way of a host on the segment.
    fn ways_to(&mut self, by: &str, networks: &[(&str, u8)]) -> anyhow::Result<()> {
        for (network, length) in networks {
            let network: IpAddr = network.parse()?;
            let by = known(by)?[usize::from(network.is_ipv6())];
            self.route(FIRST, (network, *length), Some(by));
        }
        Ok(())
    }
}

fn end(name: &str, index: u32, number: u8) -> End {
    End {
        name: name.to_owned(),
        index,
        mac: [2, 0, 0, number, 0, index.to_le_bytes()[0]],
    }
}
