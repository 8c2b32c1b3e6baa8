//! Whose address a backend sees: the client's own wherever the answer finds its
//! way back, the node's only where it would not.
//!
//! The tables are the contract, row by row; see "Masquerade" among the service
//! semantics. node-a's agent has a configuration, node-b's has the defaults.
//! Nobody outside has a route to pods or VIPs, so a row in which masquerading is
//! missing is not answered, and one in which it is too much sees the wrong address.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, ensure};

use super::rows::{self, Row, Target};
use super::segment::{self, EXTERNAL, NODE_A, NODE_B, TRUSTED, TwoNodes};
use super::world::{self, Backend, Endpoint, READY, TARGET};
use crate::context::Context;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{Server, TRANSPORTS};
use crate::wait;

/// A Service of the scene. All have one port, and the node port that is their
/// number more than 30000.
#[derive(Clone, Copy)]
struct Service {
    name: &'static str,
    number: u8,
}

/// The Services, by where their only backend is: in a pod of node-a or of node-b,
/// beyond the cluster, in the network of node-a or of node-b; the last has two, in
/// a pod of either node.
const NEAR: Service = service("near", 10);
const FAR: Service = service("far", 11);
const BEYOND: Service = service("beyond", 12);
const HOST_A: Service = service("host-a", 13);
const HOST_B: Service = service("host-b", 14);
const MIXED: Service = service("mixed", 15);

const fn service(name: &'static str, number: u8) -> Service {
    Service { name, number }
}

const PORT: u16 = 80;

/// Ports of clients that look like node ports.
const LOOKALIKES: [u16; 3] = [30_000, 31_000, 32_767];

/// What node-a's agent is told: its own list instead of the default one, and
/// `trusted` on it.
const CONFIG: &str = "apiVersion: ferrule.io/v1alpha1
kind: AgentConfiguration
clusterCIDR: \"10.244.0.0/16,fd00:10:244::/48\"
serviceCIDRs: [\"10.96.0.0/16\", \"fd00:10:96::/112\"]
nonMasqueradeCIDRs:
  - 10.244.0.0/16
  - fd00:10:244::/48
  - 10.96.0.0/16
  - fd00:10:96::/112
  - 192.0.2.5/32
  - 2001:db8::5/128
";

/// Calls from outside are masqueraded on a node port, wherever the backend is;
/// those of the node's own pods and processes only where they leave the cluster.
pub(super) fn node_ports(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let [a, b] = [NODE_A, NODE_B].map(segment::ips);
    let (node_a, node_b) = (scene.nodes.a.netns(), scene.nodes.b.netns());
    let (outside, backend) = (&scene.nodes.outside, &scene.backend_a.pod);
    let pod = &scene.client_a;
    let masqueraded = [
        (outside, node_port(NODE_A, NEAR), "backend-a", &a),
        (outside, node_port(NODE_A, FAR), "backend-b", &a),
        (outside, node_port(NODE_A, BEYOND), "external", &a),
        (outside, node_port(NODE_A, HOST_B), "host-b", &a),
        (outside, node_port(NODE_B, NEAR), "backend-a", &b),
        (outside, node_port(NODE_B, FAR), "backend-b", &b),
        // Of the other node's: they are not on the node they call.
        (node_b, node_port(NODE_A, NEAR), "backend-a", &a),
        (node_b, node_port(NODE_A, FAR), "backend-b", &a),
        (pod.netns(), node_port(NODE_B, NEAR), "backend-a", &b),
        (pod.netns(), node_port(NODE_B, FAR), "backend-b", &b),
        // The backend is beyond the cluster, or the client itself.
        (pod.netns(), node_port(NODE_A, BEYOND), "external", &a),
        (backend.netns(), node_port(NODE_A, NEAR), "backend-a", &a),
    ]
    .map(|(from, to, by, saw)| Row::masqueraded(from, to, by, saw));
    let kept = [
        (pod.netns(), node_port(NODE_A, NEAR), "backend-a", pod.ips()),
        (pod.netns(), node_port(NODE_A, FAR), "backend-b", pod.ips()),
        (node_a, node_port(NODE_A, NEAR), "backend-a", &a),
        (node_a, node_port(NODE_A, FAR), "backend-b", &a),
        (node_a, node_port(NODE_A, BEYOND), "external", &a),
    ]
    .map(|(from, to, by, saw)| Row::answered(from, to, by, saw));
    // What is delivered to the node itself comes back to it in any case.
    let either = [segment::ips(segment::OUTSIDE), a].concat();
    let own_host = Row::answered(outside, node_port(NODE_A, HOST_A), "host-a", &either);
    scene.check(masqueraded.into_iter().chain(kept).chain([own_host]))
}

/// Pods are seen as themselves by the pods of a Service, on whichever node, and
/// as the node by backends without a way back to them. Nobody sees a VIP that is
/// not on the same node.
pub(super) fn cluster_ips(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let [a, b] = [NODE_A, NODE_B].map(segment::ips);
    let (node_a, node_b) = (scene.nodes.a.netns(), scene.nodes.b.netns());
    let (backend_a, backend_b) = (scene.backend_a.pod.netns(), scene.backend_b.pod.netns());
    let (pod_a, pod_b) = (&scene.client_a, &scene.client_b);
    let masqueraded = [
        (pod_a.netns(), cluster_ip(BEYOND), "external", &a),
        (pod_a.netns(), cluster_ip(HOST_B), "host-b", &a),
        (pod_b.netns(), cluster_ip(BEYOND), "external", &b),
        (pod_b.netns(), cluster_ip(HOST_A), "host-a", &b),
        (backend_a, cluster_ip(NEAR), "backend-a", &a),
        (backend_b, cluster_ip(FAR), "backend-b", &b),
        (node_a, cluster_ip(FAR), "backend-b", &a),
        (node_a, cluster_ip(BEYOND), "external", &a),
        (node_a, cluster_ip(HOST_B), "host-b", &a),
        (node_b, cluster_ip(NEAR), "backend-a", &b),
    ]
    .map(|(from, to, by, saw)| Row::masqueraded(from, to, by, saw));
    let kept = [
        (pod_a.netns(), cluster_ip(NEAR), "backend-a", pod_a.ips()),
        (pod_a.netns(), cluster_ip(FAR), "backend-b", pod_a.ips()),
        (pod_b.netns(), cluster_ip(NEAR), "backend-a", pod_b.ips()),
        (pod_b.netns(), cluster_ip(FAR), "backend-b", pod_b.ips()),
    ]
    .map(|(from, to, by, saw)| Row::answered(from, to, by, saw));
    // On the node itself the way back is never lost, so either address will do.
    let vip_or_node = [world::vips(NEAR.number), a].concat();
    let pod_or_node = [pod_a.ips(), &a].concat();
    let within = [
        (node_a, cluster_ip(NEAR), "backend-a", &vip_or_node),
        (pod_a.netns(), cluster_ip(HOST_A), "host-a", &pod_or_node),
    ]
    .map(|(from, to, by, saw)| Row::answered(from, to, by, saw));
    scene.check(masqueraded.into_iter().chain(kept).chain(within))?;
    of_two_backends_only_oneself(&scene)
}

/// A backend that calls its own Service is masqueraded towards itself and seen
/// as itself by the other: it is decided anew for each connection.
fn of_two_backends_only_oneself(scene: &Scene) -> anyhow::Result<()> {
    let pod = &scene.backend_a.pod;
    let node = segment::ips(NODE_A);
    for vip in world::vips(MIXED.number) {
        for transport in TRANSPORTS {
            let mut answered = [0; 2];
            for _ in 0..4 {
                let to = SocketAddr::new(vip, PORT);
                let (by, saw) = world::ask(pod.netns(), transport, to)
                    .with_context(|| format!("after {answered:?} of itself and the other"))?;
                let itself = by == "backend-a";
                let expected = if itself { &node[..] } else { pod.ips() };
                ensure!(
                    expected.contains(&saw.ip()),
                    "backend-a to ClusterIP of mixed, {transport:?} {to}: {by} saw {saw}"
                );
                answered[usize::from(!itself)] += 1;
            }
            ensure!(answered == [2, 2], "{transport:?} {vip}: {answered:?}");
        }
    }
    Ok(())
}

/// Without a Service: pods leave the cluster as their node, except to where
/// there is a way back to them.
pub(super) fn no_service_involved(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let [a, b] = [NODE_A, NODE_B].map(segment::ips);
    let (pod_a, pod_b) = (&scene.client_a, &scene.client_b);
    let backend_a = Target::new("backend-a", scene.backend_a.pod.ips(), TARGET);
    let backend_b = Target::new("backend-b", scene.backend_b.pod.ips(), TARGET);
    let node_a = scene.nodes.a.netns();
    let trusted = (&scene.nodes.trusted, segment::ips(TRUSTED));
    let masqueraded = [
        (pod_a.netns(), host("external", EXTERNAL), "external", &a),
        (pod_a.netns(), host("node-b", NODE_B), "host-b", &a),
        (pod_b.netns(), host("external", EXTERNAL), "external", &b),
        // Only node-a's agent was told to trust it.
        (pod_b.netns(), host("trusted", TRUSTED), "trusted", &b),
    ]
    .map(|(from, to, by, saw)| Row::masqueraded(from, to, by, saw));
    let kept = [
        (pod_a.netns(), backend_a.clone(), "backend-a", pod_a.ips()),
        (pod_a.netns(), backend_b.clone(), "backend-b", pod_a.ips()),
        (pod_b.netns(), backend_a.clone(), "backend-a", pod_b.ips()),
        (pod_b.netns(), backend_b.clone(), "backend-b", pod_b.ips()),
        (
            pod_a.netns(),
            host("trusted", TRUSTED),
            "trusted",
            pod_a.ips(),
        ),
        (pod_a.netns(), host("node-a", NODE_A), "host-a", pod_a.ips()),
        // A VIP must not become the source of what is not for it (RFC 6724 likes
        // one that resembles the pod's address).
        (node_a, backend_a.clone(), "backend-a", &a),
        (node_a, backend_b.clone(), "backend-b", &a),
        (trusted.0, backend_a, "backend-a", &trusted.1),
        (trusted.0, backend_b, "backend-b", &trusted.1),
    ]
    .map(|(from, to, by, saw)| Row::answered(from, to, by, saw));
    scene.check(masqueraded.into_iter().chain(kept))
}

/// A masqueraded connection never comes from a port that could be a node port,
/// even where the client's own is one (kubernetes #139276), and two clients with
/// one port do not meet.
pub(super) fn never_from_a_node_port(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let [a, b] = [NODE_A, NODE_B].map(segment::ips);
    let outside = &scene.nodes.outside;
    let (pod, backend) = (scene.client_a.netns(), scene.backend_a.pod.netns());
    // Not the one that asks `external` through a Service: IPVS takes the answers to
    // one port of a client for those of the Service.
    let other = scene.client_b.netns();
    let mut rows = Vec::new();
    for port in LOOKALIKES {
        let masqueraded = [
            (outside, node_port(NODE_A, NEAR), "backend-a", &a),
            (outside, node_port(NODE_A, FAR), "backend-b", &a),
            (outside, node_port(NODE_A, BEYOND), "external", &a),
            (outside, node_port(NODE_B, FAR), "backend-b", &b),
            (pod, cluster_ip(BEYOND), "external", &a),
            (other, host("external", EXTERNAL), "external", &b),
            (pod, node_port(NODE_B, FAR), "backend-b", &b),
            (backend, cluster_ip(NEAR), "backend-a", &a),
            (backend, host("external", EXTERNAL), "external", &a),
            (scene.nodes.a.netns(), cluster_ip(FAR), "backend-b", &a),
        ]
        .map(|(from, to, by, saw)| Row::masqueraded(from, to, by, saw).bound_to(port));
        rows.extend(masqueraded);
    }
    // Both take one port towards one server, one of them must give way.
    for from in [pod, backend] {
        let to = host("external", EXTERNAL);
        rows.push(Row::masqueraded(from, to, "external", &a).bound_to(40_000));
    }
    scene.check(rows)
}

/// `masqueradeAll` is about cluster IPs, and about nothing else.
pub(super) fn all_cluster_ips_when_asked(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let node = segment::ips(NODE_A);
    let pod = &scene.client_a;
    let of_cluster_ips = |saw: &[IpAddr]| {
        [(NEAR, "backend-a"), (FAR, "backend-b")]
            .map(|(service, by)| Row::answered(pod.netns(), cluster_ip(service), by, saw))
    };
    let direct = Target::new("backend-b", scene.backend_b.pod.ips(), TARGET);
    let others = [
        (node_port(NODE_A, NEAR), "backend-a"),
        (node_port(NODE_A, FAR), "backend-b"),
        (direct, "backend-b"),
    ]
    .map(|(to, by)| Row::answered(pod.netns(), to, by, pod.ips()));
    for (config, saw) in [
        (format!("{CONFIG}masqueradeAll: true\n"), &node[..]),
        (CONFIG.to_owned(), pod.ips()),
    ] {
        scene.nodes.a.stop()?;
        scene.nodes.a.write_config(&config)?;
        scene.nodes.a.start()?;
        wait::until_ok("the new configuration", wait::SETTLED, || {
            scene.check(of_cluster_ips(saw))
        })?;
        rows::check(&others, scene.servers())?;
    }
    Ok(())
}

fn cluster_ip(service: Service) -> Target {
    let what = format!("the ClusterIP of {}", service.name);
    Target::new(what, &world::vips(service.number), PORT)
}

fn node_port(node: u8, service: Service) -> Target {
    let name = if node == NODE_A { "node-a" } else { "node-b" };
    let what = format!("node-port {} of {name}", service.name);
    Target::new(what, &segment::ips(node), node_port_of(service))
}

fn node_port_of(service: Service) -> u16 {
    30_000 + u16::from(service.number)
}

fn host(name: &str, number: u8) -> Target {
    Target::new(name, &segment::ips(number), TARGET)
}

/// Two nodes, each with a client and a backend, the Services, and servers on
/// every host.
struct Scene {
    client_a: Pod,
    client_b: Pod,
    backend_a: Backend,
    backend_b: Backend,
    hosts: Vec<Server>,
    nodes: TwoNodes,
}

impl Scene {
    fn build(context: &Context) -> anyhow::Result<Self> {
        let nodes = segment::two_nodes(context)?;
        nodes.a.write_config(CONFIG)?;
        nodes.start()?;
        let mut hosts = Vec::new();
        for (host, name) in [
            (nodes.a.netns(), "host-a"),
            (nodes.b.netns(), "host-b"),
            (&nodes.external, "external"),
            (&nodes.trusted, "trusted"),
        ] {
            hosts.extend(Server::everywhere(host, name, TARGET)?);
        }
        let scene = Self {
            client_a: Pod::added(context, &nodes.a, "client-a")?,
            client_b: Pod::added(context, &nodes.b, "client-b")?,
            backend_a: Backend::create(context, &nodes.a, "backend-a")?,
            backend_b: Backend::create(context, &nodes.b, "backend-b")?,
            hosts,
            nodes,
        };
        let services = scene.services()?;
        for node in [&scene.nodes.a, &scene.nodes.b] {
            node.write_manifest("services.yaml", &services)?;
        }
        wait_for_services(&scene.nodes.a, NODE_A)?;
        wait_for_services(&scene.nodes.b, NODE_B)?;
        Ok(scene)
    }

    fn services(&self) -> anyhow::Result<String> {
        let [beyond, host_a, host_b] = [EXTERNAL, NODE_A, NODE_B].map(segment::ips);
        let on = |ips, node| Endpoint {
            ips,
            node,
            conditions: READY,
        };
        let near = || on(self.backend_a.pod.ips(), Some("node-a"));
        let far = || on(self.backend_b.pod.ips(), Some("node-b"));
        let mut yaml = String::new();
        for (service, endpoints) in [
            (NEAR, vec![near()]),
            (FAR, vec![far()]),
            (BEYOND, vec![on(&beyond, None)]),
            (HOST_A, vec![on(&host_a, Some("node-a"))]),
            (HOST_B, vec![on(&host_b, Some("node-b"))]),
            (MIXED, vec![near(), far()]),
        ] {
            let Service { name, number } = service;
            let node_port = node_port_of(service);
            yaml.push_str(&world::node_port_service(name, number, PORT, node_port));
            yaml.push_str(&world::endpoint_slices(name, &endpoints)?);
            yaml.push_str("---\n");
        }
        Ok(yaml)
    }

    fn servers(&self) -> impl Iterator<Item = &Server> {
        let backends = [&self.backend_a, &self.backend_b];
        let in_pods = backends.into_iter().flat_map(|backend| &backend.servers);
        self.hosts.iter().chain(in_pods)
    }

    fn check<'a>(&self, rows: impl IntoIterator<Item = Row<'a>>) -> anyhow::Result<()> {
        let rows: Vec<Row<'_>> = rows.into_iter().collect();
        rows::check(&rows, self.servers())?;
        self.nodes.a.check_alive()?;
        self.nodes.b.check_alive()
    }
}

/// Waits until every Service has its backends behind cluster IPs and node ports.
fn wait_for_services(node: &Node, number: u8) -> anyhow::Result<()> {
    /// Seven endpoints of each family, over both transports, behind both frontends.
    const BACKENDS: usize = 7 * 2 * 2 * 2;
    world::wait_for_ipvs(node, "all backends behind all frontends", |table| {
        let everywhere = segment::ips(number).into_iter().all(|ip| {
            let node_port = SocketAddr::new(ip, node_port_of(MIXED));
            table.contains(&format!(" {node_port} "))
        });
        let backends = table.lines().filter(|line| line.starts_with(' '));
        everywhere && backends.count() == BACKENDS
    })
    .map(drop)
}
