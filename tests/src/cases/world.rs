//! The address plan and the manifests that the tests of services share.
//!
//! One plan for all: pods 10.244.1.0/24 and `fd00:10:244:1::/64`, VIPs
//! 10.96.0.0/16 and `fd00:10:96::/112`, a client outside in 192.0.2.0/24 and
//! `2001:db8::/64`. The second node's pods are 10.244.2.0/24 and
//! `fd00:10:244:2::/64`; what else there is beside two nodes says [`super::segment`].

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, bail};

use crate::context::Context;
use crate::dump;
use crate::link::{End, batch, veth};
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{ANSWER, Outcome, Request, SILENCE, Server, Transport};
use crate::wait;

/// Port of the servers in pods.
pub(super) const TARGET: u16 = 8080;

/// The VIPs of the n-th Service, IPv4 first.
pub(super) fn vips(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::V4(Ipv4Addr::new(10, 96, 0, number)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, number.into())),
    ]
}

/// A dual-stack ClusterIP Service with TCP and UDP on one port number, as YAML.
pub(super) fn service(name: &str, number: u8, port: u16) -> String {
    service_of_type("ClusterIP", name, number, port, "")
}

/// Likewise of type `NodePort`, with one node port for both transports.
pub(super) fn node_port_service(name: &str, number: u8, port: u16, node_port: u16) -> String {
    let node_port = format!(", nodePort: {node_port}");
    service_of_type("NodePort", name, number, port, &node_port)
}

fn service_of_type(kind: &str, name: &str, number: u8, port: u16, more: &str) -> String {
    let [v4, v6] = vips(number);
    format!(
        "apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
spec:
  type: {kind}
  clusterIP: {v4}
  clusterIPs: [{v4}, {v6:?}]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  ports:
    - {{name: tcp, protocol: TCP, port: {port}, targetPort: {TARGET}{more}}}
    - {{name: udp, protocol: UDP, port: {port}, targetPort: {TARGET}{more}}}
",
        v6 = v6.to_string()
    )
}

/// An endpoint of a Service: its addresses, one of each family, and its node if
/// it is on one.
pub(super) struct Endpoint<'a> {
    pub(super) ips: &'a [IpAddr],
    pub(super) node: Option<&'a str>,
    pub(super) conditions: &'a str,
}

/// Conditions of an endpoint that takes connections.
pub(super) const READY: &str = "ready: true";

/// The EndpointSlices of such a Service, one for each family, as YAML, with pods
/// of the first node.
pub(super) fn slices(service: &str, pods: &[&Pod]) -> anyhow::Result<String> {
    let of_pods = pods.iter().map(|pod| Endpoint {
        ips: pod.ips(),
        node: Some("node-a"),
        conditions: READY,
    });
    endpoint_slices(service, &of_pods.collect::<Vec<_>>())
}

/// Likewise with endpoints wherever they are.
pub(super) fn endpoint_slices(service: &str, endpoints: &[Endpoint<'_>]) -> anyhow::Result<String> {
    let mut yaml = String::new();
    for (family, like) in [("IPv4", vips(0)[0]), ("IPv6", vips(0)[1])] {
        write!(
            yaml,
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {service}-{}
  namespace: default
  labels:
    kubernetes.io/service-name: {service}
addressType: {family}
ports:
  - {{name: tcp, protocol: TCP, port: {TARGET}}}
  - {{name: udp, protocol: UDP, port: {TARGET}}}
endpoints:
",
            family.to_lowercase()
        )?;
        if endpoints.is_empty() {
            yaml.truncate(yaml.trim_end().len());
            yaml.push_str(" []\n");
        }
        for Endpoint {
            ips,
            node,
            conditions,
        } in endpoints
        {
            let ip = ip_like(ips, like)?.to_string();
            let node = node.map_or(String::new(), |node| format!(", nodeName: {node}"));
            writeln!(
                yaml,
                "  - {{addresses: [{ip:?}], conditions: {{{conditions}}}{node}}}"
            )?;
        }
    }
    Ok(yaml)
}

/// The one of the family of another.
fn ip_like(ips: &[IpAddr], other: IpAddr) -> anyhow::Result<IpAddr> {
    let mut ips = ips.iter().copied();
    ips.find(|ip| ip.is_ipv4() == other.is_ipv4())
        .with_context(|| format!("no address of {other}'s family"))
}

/// A pod with a server on [`TARGET`] for each transport and family, which
/// answers with the pod's name.
#[derive(Debug)]
pub(super) struct Backend {
    pub(super) pod: Pod,
    pub(super) servers: Vec<Server>,
}

impl Backend {
    pub(super) fn create(context: &Context, node: &Node, name: &str) -> anyhow::Result<Self> {
        let pod = Pod::added(context, node, name)?;
        let servers = Server::everywhere(pod.netns(), name, TARGET)?;
        Ok(Self { pod, servers })
    }
}

/// A started node.
pub(super) fn started_node(context: &Context) -> anyhow::Result<Node> {
    let node = Node::create(context, "node-a")?;
    node.start()?;
    Ok(node)
}

/// A client beyond the node, which knows the way to every VIP and pod.
pub(crate) fn outside(context: &Context, node: &Node) -> anyhow::Result<Netns> {
    let client = context.netns("outside")?;
    veth(
        End {
            namespace: node.netns(),
            device: "uplink",
            addresses: &["192.0.2.1/24", "2001:db8::1/64"],
        },
        End {
            namespace: &client,
            device: "eth0",
            addresses: &["192.0.2.2/24", "2001:db8::2/64"],
        },
    )?;
    batch(
        &client,
        [
            "route add 0.0.0.0/0 via 192.0.2.1",
            "route add ::/0 via 2001:db8::1",
        ],
    )?;
    Ok(client)
}

/// Waits until a service answers on both families and transports from a namespace.
pub(super) fn wait_for_service(from: &Netns, number: u8, port: u16) -> anyhow::Result<()> {
    for vip in vips(number) {
        for transport in crate::sock::TRANSPORTS {
            wait::until_ok("an answer of the service", wait::SETTLED, || {
                let to = SocketAddr::new(vip, port);
                match Request::new(transport, to).send(from, SILENCE)? {
                    Outcome::Answered { .. } => Ok(()),
                    other => bail!("{transport:?} {to}: {other:?}"),
                }
            })?;
        }
    }
    Ok(())
}

/// Asks a service once and returns who answered and whom it saw.
pub(super) fn ask(
    from: &Netns,
    transport: Transport,
    to: SocketAddr,
) -> anyhow::Result<(String, SocketAddr)> {
    match Request::new(transport, to).send(from, ANSWER)? {
        Outcome::Answered { by, saw } => Ok((by, saw)),
        other => bail!("{transport:?} {to}: {other:?}"),
    }
}

/// Waits until the kernel's IPVS table is what `expected` says of it. A backend of which a
/// connection was begun and given up drains for a minute: IPVS counts that one as active.
pub(super) fn wait_for_ipvs(
    node: &Node,
    what: &str,
    expected: impl Fn(&str) -> bool,
) -> anyhow::Result<String> {
    wait::until_ok(what, wait::SETTLED, || {
        node.check_alive()?;
        let table = dump::ipvs(node.netns())?;
        if !expected(&table) {
            let leaving = dump::leaving(node.netns())?;
            let log = node.log()?;
            let last: Vec<&str> = log.lines().rev().take(8).collect();
            bail!(
                "leaving:\n{leaving}the agent's last words:\n{}\nIPVS:\n{table}",
                last.join("\n")
            );
        }
        Ok(table)
    })
}

/// Waits until a virtual service such as `TCP 10.96.0.10:80` has counted a
/// connection, and returns the count. Kernels from 6.2 on add up every two seconds.
pub(super) fn wait_for_count(node: &Node, service: &str) -> anyhow::Result<u64> {
    wait::for_some("a connection that counts", wait::SETTLED, || {
        let count = dump::connections(node.netns(), service)?;
        Ok(count.filter(|count| *count > 0))
    })
}
