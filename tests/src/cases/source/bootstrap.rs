//! A node that starts without cluster addresses, one of which is the API's own.
//!
//! ```text
//!        192.0.2.0/24
//!   ──┬─────────┬─────────┬──  a bridge in `switch`
//!    .1        .11       .12
//!  node-a   control-a  control-b
//! ```
//!
//! The hosts of the control plane have no way to pods: what they answer arrives
//! because pods come to them with the node's address.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use ferrule_api_server::{ApiServer, Authority, Streaming, Validity};

use super::super::audit::wait_for_status as wait_for;
use super::super::segment::{self, NODE_A, plug};
use super::super::soak::say;
use super::super::world;
use crate::api::{self, Api};
use crate::context::Context;
use crate::link::batch;
use crate::netns::Netns;
use crate::node::{KUBERNETES, Node, POD_RANGES};
use crate::pod::Pod;
use crate::wait;

/// Their numbers on the segment.
const CONTROL: [u8; 2] = [11, 12];

/// The port of the API there.
const PORT: u16 = 6443;

/// How long a server may be dead before another is asked, and what that takes
/// on an emulated machine: the kernel notices within half a minute.
const NOTICED: Duration = Duration::from_secs(150);

/// The agent asks its way to the API that makes cluster addresses work, and
/// pods then reach the API by its cluster address.
pub(in crate::cases) fn starts_without_cluster_addresses(
    context: &mut Context,
) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let switch = context.netns("switch")?;
    let control = [context.netns("control-a")?, context.netns("control-b")?];
    let bridge = "link add segment type bridge mcast_snooping 0";
    batch(&switch, [bridge, "link set dev segment up"])?;
    plug(&switch, node.netns(), NODE_A)?;
    for (host, number) in control.iter().zip(CONTROL) {
        plug(&switch, host, number)?;
    }
    // What it has no other way to goes to a router that is not there.
    batch(node.netns(), ["route add 0.0.0.0/0 via 192.0.2.2"])?;

    let authority = Authority::new("cluster")?;
    let identity = authority.signs(&["kubernetes.default.svc", KUBERNETES], Validity::Now)?;
    let server = ApiServer::new(Streaming::Served);
    server.set_token(Some("secret"));
    api::put_all(
        &server,
        &segment::node_manifest("node-a", &POD_RANGES, NODE_A),
    )?;
    api::put_all(&server, KUBERNETES_SERVICE)?;
    let mut running = Vec::new();
    for (host, number) in control.iter().zip(CONTROL) {
        let acceptor = identity.acceptor(None)?;
        running.push(Api::start_at(host, &server, at(number, PORT), acceptor)?);
    }

    node.follow_as_pod(&authority.certificate(), "secret")?;
    node.start()?;
    wait_for(context, &node, "that it needs apiServer", |told| {
        let told = told["problems"].to_string();
        told.contains(KUBERNETES) && told.contains("apiServer")
    })?;
    ensure!(server.requests() == 0, "10.96.0.1 led to the API by itself");
    node.stop()?;

    // A host that is not there, a port where nobody listens, the API.
    let addresses = [
        at(99, PORT),
        at(CONTROL[0], PORT + 1),
        at(CONTROL[0], PORT),
        at(CONTROL[1], PORT),
    ];
    let urls = addresses.map(|address| format!("\"https://{address}\""));
    node.write_config(&format!(
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\napiServer: [{}]\n",
        urls.join(", ")
    ))?;
    node.start()?;
    wait_for(context, &node, "everything listed", |told| {
        told["source"]["complete"] == true
    })?;
    let pod = Pod::added(context, &node, "pod")?;
    wait::until_ok("an answer of the API to a pod", wait::SETTLED, || {
        let answer = get(&authority, pod.netns(), "/api/v1/nodes")?;
        ensure!(answer.contains("\"node-a\""), "{answer}");
        Ok(())
    })?;

    one_dies_silently(&node, &switch, &server)?;
    pod.del(&node)?;
    node.stop()
}

/// The server that is asked loses its cable: nothing says so, and watches on it
/// would be silent for a long time.
fn one_dies_silently(node: &Node, switch: &Netns, server: &Arc<ApiServer>) -> anyhow::Result<()> {
    batch(switch, [format!("link set dev port{} down", CONTROL[0])])?;
    let start = Instant::now();
    api::put_all(server, &world::service("news", 30, 80))?;
    wait::until_ok("news by way of the other server", NOTICED, || {
        node.check_alive()?;
        let found = crate::dump::vips(node.netns())?;
        ensure!(found.contains(&world::vips(30)[0]), "{found:?}");
        Ok(())
    })?;
    say(&format!(
        "a dead server was given up after {:.0} s",
        start.elapsed().as_secs_f64()
    ))
}

/// Its endpoints are beyond the pod network, as kubeadm makes them.
const KUBERNETES_SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1]
  ipFamilies: [IPv4]
  ports: [{name: https, protocol: TCP, port: 443, targetPort: 6443}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: kubernetes
  namespace: default
  labels: {kubernetes.io/service-name: kubernetes}
addressType: IPv4
ports: [{name: https, protocol: TCP, port: 6443}]
endpoints:
  - {addresses: [192.0.2.11], conditions: {ready: true}}
  - {addresses: [192.0.2.12], conditions: {ready: true}}
";

fn at(number: u8, port: u16) -> SocketAddr {
    SocketAddr::new(segment::ips(number)[0], port)
}

/// Asks the API by its cluster address, as a client library does.
fn get(authority: &Authority, from: &Netns, path: &str) -> anyhow::Result<String> {
    let ip: IpAddr = KUBERNETES.parse()?;
    from.run(|| {
        let limit = Duration::from_secs(20);
        let stream = TcpStream::connect_timeout(&SocketAddr::new(ip, 443), limit)
            .context("connect to the cluster address")?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {KUBERNETES}\r\nAuthorization: Bearer secret\r\n\
             Connection: close\r\n\r\n"
        );
        authority.converse(stream, KUBERNETES, &request)
    })
}
