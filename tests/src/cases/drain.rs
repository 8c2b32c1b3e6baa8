//! Backends that leave: connections live on, end when nobody is behind them, and flows of
//! UDP move to another backend.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};

use super::world::{self, Backend, Endpoint, READY};
use crate::context::Context;
use crate::dump;
use crate::netns::Netns;
use crate::node::{self, Node};
use crate::pod::Pod;
use crate::sock::{ANSWER, Connection, Outcome, Request, Transport};
use crate::wait;

/// Being ended, with others that are ready: no new connections.
const ENDING: &str = "ready: false, serving: true, terminating: true";

/// Not ready, and not being ended.
const UNREADY: &str = "ready: false, serving: false, terminating: false";

/// Two backends, a client, and a Service of those backends that are listed.
struct Scene {
    client: Pod,
    one: Backend,
    two: Backend,
    node: Node,
}

impl Scene {
    fn build(context: &Context, config: &str) -> anyhow::Result<Self> {
        let node = Node::create(context, "node-a")?;
        if !config.is_empty() {
            node.write_config(&format!(
                "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n{config}"
            ))?;
        }
        node.start()?;
        let one = Backend::create(context, &node, "one")?;
        let two = Backend::create(context, &node, "two")?;
        let client = Pod::added(context, &node, "client")?;
        let scene = Self {
            client,
            one,
            two,
            node,
        };
        scene
            .node
            .write_manifest("web.yaml", &world::service("web", 10, 80))?;
        scene.list(&[(&scene.one, READY)])?;
        world::wait_for_service(scene.client.netns(), 10, 80)?;
        Ok(scene)
    }

    /// Says of which backends the Service is, in which condition.
    fn list(&self, backends: &[(&Backend, &str)]) -> anyhow::Result<()> {
        self.list_on("node-a", backends)
    }

    fn list_on(&self, node: &str, backends: &[(&Backend, &str)]) -> anyhow::Result<()> {
        let endpoints = backends.iter().map(|(backend, conditions)| Endpoint {
            ips: backend.pod.ips(),
            node: Some(node),
            conditions,
        });
        let slices = world::endpoint_slices("web", &endpoints.collect::<Vec<_>>())?;
        self.node.write_manifest("web-slices.yaml", &slices)
    }

    /// A connection to the first backend by each address of the Service.
    fn connections(&self) -> anyhow::Result<Vec<Connection>> {
        connections(self.client.netns(), world::vips(10))
    }

    /// Waits until each of the backend's real servers has this weight, or is not there.
    fn wait_for_weight(&self, backend: &Backend, weight: Option<u32>) -> anyhow::Result<()> {
        let ips = backend.pod.ips();
        world::wait_for_ipvs(&self.node, "weights of a backend", |table| {
            ips.iter().all(|ip| {
                let server = SocketAddr::new(*ip, world::TARGET);
                let start = format!("-> {server} ");
                let of_tcp = table.split("\nUDP").next().unwrap_or_default();
                let mut lines = of_tcp
                    .lines()
                    .filter(|line| line.trim().starts_with(&start));
                match weight {
                    None => lines.next().is_none(),
                    Some(weight) => {
                        lines.all(|line| line.ends_with(&format!(" {weight}")))
                            && of_tcp.contains(&start)
                    }
                }
            })
        })?;
        Ok(())
    }

    /// New connections are answered by this backend alone.
    fn only(&self, name: &str) -> anyhow::Result<()> {
        for vip in world::vips(10) {
            for _ in 0..4 {
                let to = SocketAddr::new(vip, 80);
                let (by, _) = world::ask(self.client.netns(), Transport::Tcp, to)?;
                ensure!(by == name, "{to} was answered by {by}");
            }
        }
        Ok(())
    }
}

fn connections(from: &Netns, vips: [IpAddr; 2]) -> anyhow::Result<Vec<Connection>> {
    let to = vips.map(|vip| SocketAddr::new(vip, 80));
    to.iter().map(|to| Connection::open(from, *to)).collect()
}

fn live(connections: &mut [Connection], by: &str) -> anyhow::Result<()> {
    for connection in connections {
        match connection.ask("still-there", ANSWER)? {
            Outcome::Answered { by: who, .. } if who == by => {}
            other => bail!("{other:?} instead of an answer by {by}"),
        }
    }
    Ok(())
}

/// Each connection is reset, at the second packet at the latest: the first may be lost.
fn reset(connections: &mut [Connection]) -> anyhow::Result<()> {
    for connection in connections {
        let outcome = connection.ask("anybody-there", ANSWER)?;
        ensure!(
            outcome == Outcome::Refused,
            "{outcome:?} instead of a reset"
        );
    }
    Ok(())
}

/// A backend that leaves, comes back and leaves again, and an agent that is killed in the
/// middle of it: nobody who talks to it notices.
pub(super) fn a_connection_outlives_its_endpoint(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, "")?;
    let mut connections = scene.connections()?;
    live(&mut connections, "one")?;
    for listed in [
        vec![(&scene.one, ENDING), (&scene.two, READY)],
        vec![(&scene.one, UNREADY), (&scene.two, READY)],
        vec![(&scene.two, READY)],
    ] {
        scene.list(&listed)?;
        scene.wait_for_weight(&scene.two, Some(1))?;
        // The one that was being ended comes back, or its leaving the slices would tell that
        // its pod is gone.
        scene.wait_for_weight(&scene.one, Some(0))?;
        scene.only("two")?;
        live(&mut connections, "one")?;
        scene.node.kill9()?;
        live(&mut connections, "one").context("without an agent")?;
        scene.node.start()?;
        scene.only("two")?;
        live(&mut connections, "one").context("after a restart")?;
        scene.list(&[(&scene.one, READY), (&scene.two, READY)])?;
        scene.wait_for_weight(&scene.one, Some(1))?;
        live(&mut connections, "one").context("back again")?;
    }
    scene.list(&[(&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    drop(connections);
    scene.wait_for_weight(&scene.one, None)?;
    scene.only("two")
}

/// Of a client that has said everything and waits for the rest of the answer, IPVS counts no
/// active connection.
pub(super) fn a_half_closed_connection_goes_on(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let pod = Pod::added(context, &node, "slow")?;
    let other = Backend::create(context, &node, "other")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    for (ip, vip) in pod.ips().iter().zip(world::vips(10)) {
        let at = SocketAddr::new(*ip, world::TARGET);
        let listener = pod.netns().run(|| Ok(TcpListener::bind(at)?))?;
        node.write_manifest("web-slices.yaml", &world::slices("web", &[&pod])?)?;
        let tcp = |table: &str| table.split("\nUDP").next().unwrap_or_default().to_owned();
        let has = |table: &str, weight: u32| {
            let wanted = format!("-> {at} Masq {weight}");
            tcp(table).lines().any(|line| line.trim() == wanted)
        };
        world::wait_for_ipvs(&node, "the slow one", |t| has(t, 1))?;
        let to = SocketAddr::new(vip, 80);
        let mut asked = client
            .netns()
            .run(|| Ok(TcpStream::connect_timeout(&to, ANSWER)?))?;
        asked.set_read_timeout(Some(ANSWER))?;
        let (mut answering, _) = listener.accept()?;
        answering.set_read_timeout(Some(ANSWER))?;
        asked.shutdown(Shutdown::Write)?;
        ensure!(answering.read(&mut [0])? == 0, "the client has ended");
        node.write_manifest("web-slices.yaml", &world::slices("web", &[&other.pod])?)?;
        world::wait_for_ipvs(&node, "its leaving", |t| has(t, 0))?;
        // Several counts.
        thread::sleep(Duration::from_secs(12));
        answering.write_all(b"late\n")?;
        let mut answer = [0; 5];
        asked.read_exact(&mut answer).context("the late answer")?;
        ensure!(&answer == b"late\n", "{answer:?}");
        drop((answering, asked));
        world::wait_for_ipvs(&node, "its end", |t| !tcp(t).contains(&at.to_string()))?;
    }
    Ok(())
}

/// Of a Service without endpoints, and of one that is deleted: old connections live on, new
/// ones are refused at once.
pub(super) fn the_last_backend_keeps_its_connections(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, "")?;
    let mut connections = scene.connections()?;
    scene.list(&[])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    live(&mut connections, "one")?;
    outlive_the_service(&scene, &mut connections, world::vips(10))?;
    drop(connections);
    wait::until_ok("the end of the Service", wait::SETTLED, || {
        let (table, vips) = (
            dump::ipvs(scene.node.netns())?,
            dump::vips(scene.node.netns())?,
        );
        let gone = world::vips(10).iter().all(|vip| !vips.contains(vip));
        ensure!(gone && !table.contains("10.96.0.10:"), "{vips:?}\n{table}");
        Ok(())
    })
}

/// New connections are refused and old ones live on: without an endpoint, without the Service,
/// and after a restart of the agent.
fn outlive_the_service(
    scene: &Scene,
    open: &mut [Connection],
    vips: [IpAddr; 2],
) -> anyhow::Result<()> {
    refused(scene, vips)?;
    scene.node.remove_manifest("web-slices.yaml")?;
    scene.node.remove_manifest("web.yaml")?;
    let told = world::service("marker", 11, 80);
    scene.node.write_manifest("marker.yaml", &told)?;
    wait::until_ok("the change after the deletion", wait::SETTLED, || {
        let bound = dump::vips(scene.node.netns())?;
        ensure!(bound.contains(&world::vips(11)[0]), "{bound:?}");
        Ok(())
    })?;
    live(open, "one").context("of a deleted Service")?;
    refused(scene, vips)?;
    scene.node.kill9()?;
    scene.node.start()?;
    live(open, "one").context("after a restart")?;
    refused(scene, vips)
}

fn refused(scene: &Scene, vips: [IpAddr; 2]) -> anyhow::Result<()> {
    let clients = [
        ("a pod", scene.client.netns()),
        ("the node", scene.node.netns()),
    ];
    for (who, from) in clients {
        for vip in vips {
            let start = Instant::now();
            let to = SocketAddr::new(vip, 80);
            let outcome = Request::new(Transport::Tcp, to).send(from, ANSWER)?;
            let took = start.elapsed();
            ensure!(
                outcome == Outcome::Refused,
                "{who} to {to}: {outcome:?} after {took:?}"
            );
        }
    }
    Ok(())
}

/// The same at an external address with policy Local: clients within the cluster have a virtual
/// service of their own there, by mark.
pub(super) fn clients_within_the_cluster_keep_theirs(context: &mut Context) -> anyhow::Result<()> {
    let vips: [IpAddr; 2] = ["198.51.100.10".parse()?, "2001:db8:198::10".parse()?];
    let scene = Scene::build(context, "")?;
    let [v4, v6] = vips;
    let spec = format!(
        "spec:\n  externalIPs: [{v4}, {:?}]\n  externalTrafficPolicy: Local\n",
        v6.to_string()
    );
    let service = world::service("web", 10, 80).replace("spec:\n", &spec);
    scene.node.write_manifest("web.yaml", &service)?;
    let by_mark = |table: &str, weight: u32| {
        let marked: Vec<&str> = table.split("FWM").skip(1).collect();
        let lines = marked.iter().flat_map(|service| service.lines());
        let servers = lines.filter(|line| line.trim().starts_with("->"));
        let end = format!(" {weight}");
        // One of each family, and beside them those of UDP.
        servers.filter(|line| line.ends_with(&end)).count() >= 2
    };
    world::wait_for_ipvs(&scene.node, "both by mark", |table| by_mark(table, 1))?;
    let mut open = connections(scene.client.netns(), vips)?;
    live(&mut open, "one")?;
    scene.list(&[(&scene.one, UNREADY)])?;
    world::wait_for_ipvs(&scene.node, "their leaving", |table| by_mark(table, 0))?;
    live(&mut open, "one")?;
    outlive_the_service(&scene, &mut open, vips)?;
    drop(open);
    wait::until_ok("the end of the Service", wait::SETTLED, || {
        let (table, bound) = (
            dump::ipvs(scene.node.netns())?,
            dump::vips(scene.node.netns())?,
        );
        let gone = vips.iter().all(|vip| !bound.contains(vip));
        ensure!(gone && !table.contains("FWM"), "{bound:?}\n{table}");
        Ok(())
    })
}

/// Connections end with a reset when the pod behind them has been ended, when its node is
/// lost, and when the endpoint has been away for as long as is allowed.
pub(super) fn connections_end_with_who_is_behind_them(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, "drainSeconds: 3\n")?;
    let both = [(&scene.one, READY), (&scene.two, READY)];
    let began = |what: &str| -> anyhow::Result<Vec<Connection>> {
        scene.list(&[(&scene.one, READY)])?;
        scene.wait_for_weight(&scene.one, Some(1))?;
        scene
            .wait_for_weight(&scene.two, None)
            .context(what.to_owned())?;
        let mut connections = scene.connections()?;
        live(&mut connections, "one")?;
        scene.list(&both)?;
        scene.wait_for_weight(&scene.two, Some(1))?;
        Ok(connections)
    };
    let mut connections = began("its pod was ended")?;
    scene.list(&[(&scene.one, ENDING), (&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    // Longer than the bound, which does not count while a slice has it.
    thread::sleep(Duration::from_secs(6));
    live(&mut connections, "one")?;
    scene.list(&[(&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, None)?;
    reset(&mut connections).context("its pod was ended")?;

    let mut connections = began("the bound")?;
    scene.list(&[(&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, None)?;
    reset(&mut connections).context("the bound")?;

    let mut connections = began("its node is lost")?;
    scene.list_on("node-b", &[(&scene.one, UNREADY), (&scene.two, READY)])?;
    let node_b = node::manifest("node-b", &["10.244.2.0/24"], &[]);
    scene.node.write_manifest("node-b.yaml", &node_b)?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    live(&mut connections, "one")?;
    let taint = "spec:\n  taints: [{key: node.kubernetes.io/unreachable, effect: NoExecute}]\n";
    let lost = node_b.replace("spec:\n", taint);
    scene.node.write_manifest("node-b.yaml", &lost)?;
    scene.wait_for_weight(&scene.one, None)?;
    reset(&mut connections).context("its node is lost")?;

    let mut connections = began("its pod is removed")?;
    scene.list(&[(&scene.one, UNREADY), (&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    scene.list(&[(&scene.two, READY)])?;
    scene.one.pod.del(&scene.node)?;
    scene.wait_for_weight(&scene.one, None)?;
    reset(&mut connections).context("its pod is removed")
}

/// A client of UDP that keeps its port talks to the next backend as soon as the last one is
/// removed, in both families; without any, it is refused, and answered when there is one.
pub(super) fn a_flow_of_udp_moves(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, "")?;
    for vip in world::vips(10) {
        let to = SocketAddr::new(vip, 80);
        scene.list(&[(&scene.one, READY)])?;
        let flow = scene.client.netns().run(|| Flow::open(to))?;
        wait::until_ok("the first backend", wait::SETTLED, || by(&flow, "one"))?;
        for (listed, name) in [
            (&scene.two, "two"),
            (&scene.one, "one"),
            (&scene.two, "two"),
        ] {
            let over = Arc::new(AtomicBool::new(false));
            let (asked, stop) = (flow.try_clone()?, Arc::clone(&over));
            // Without a pause: the change falls among the questions.
            let asking = scene.client.netns().thread(move || {
                let (mut count, mut lost) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    lost += usize::from(asked.ask(Duration::from_millis(500))?.is_none());
                }
                Ok((count, lost))
            })?;
            scene.list(&[(listed, READY)])?;
            world::wait_for_ipvs(&scene.node, "the change", |table| {
                // The new one comes first, and the old one goes last.
                let has = |part: &str, of: &Backend| {
                    let mut servers = of
                        .pod
                        .ips()
                        .iter()
                        .map(|ip| SocketAddr::new(*ip, world::TARGET));
                    servers.any(|server| part.contains(&format!("-> {server} ")))
                };
                let other = if name == "one" {
                    &scene.two
                } else {
                    &scene.one
                };
                let moved = |udp: &&str| has(udp, listed) && !has(udp, other);
                table.split("\nUDP").skip(1).filter(moved).count() == 2
            })?;
            thread::sleep(Duration::from_secs(1));
            over.store(true, Ordering::Relaxed);
            let outcome = asking.join().map_err(|_| anyhow!("the client panicked"))?;
            let (count, lost): (usize, usize) = outcome.and_then(|inner| inner)?;
            // What is on its way between the removal and the look at its flow is lost; more
            // than a few would be a flow that does not move.
            ensure!(
                lost <= 4,
                "{lost} of {count} were lost on the way to {name}"
            );
            by(&flow, name).with_context(|| {
                let of = |program: &str, arguments: &[&str]| {
                    let told = scene.node.netns().output(program, arguments);
                    told.unwrap_or_else(|error| format!("{error:#}"))
                };
                format!(
                    "{lost} of {count} lost before\n{}\n{}",
                    of("cat", &["/proc/net/ip_vs_conn"]),
                    of("conntrack", &["-L", "-p", "udp"])
                )
            })?;
        }
        scene.list(&[])?;
        wait::until_ok("a refusal", wait::SETTLED, || {
            let answer = flow.ask(Duration::from_secs(2));
            ensure!(answer.is_err(), "{answer:?}");
            Ok(())
        })?;
        scene.list(&[(&scene.one, READY)])?;
        wait::until_ok("an answer again", wait::SETTLED, || by(&flow, "one"))?;
    }
    Ok(())
}

/// By the clock that counts instructions, and so skips what nobody does: the bound of a
/// drain, the end of connections to a lost node, of affinity, and of a flow of UDP.
pub(super) fn time_outs_at_their_length(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context, "")?;
    let sleep = |seconds| thread::sleep(Duration::from_secs(seconds));
    let mut connections = scene.connections()?;
    scene.list(&[(&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    let left = Instant::now();
    // An agent that starts in the middle goes on with what is left of the time.
    sleep(300);
    scene.node.kill9()?;
    scene.node.start()?;
    sleep(290);
    live(&mut connections, "one").context("before the bound")?;
    scene.wait_for_weight(&scene.one, None)?;
    let drained = left.elapsed().as_secs();
    ensure!((595..=630).contains(&drained), "drained for {drained} s");
    reset(&mut connections)?;

    scene.list(&[(&scene.one, READY)])?;
    scene.wait_for_weight(&scene.two, None)?;
    let mut connections = scene.connections()?;
    scene.list_on("node-b", &[(&scene.one, UNREADY), (&scene.two, READY)])?;
    scene.wait_for_weight(&scene.one, Some(0))?;
    let taint = "spec:\n  taints: [{key: node.kubernetes.io/unreachable, effect: NoExecute}]\n";
    let node_b = node::manifest("node-b", &["10.244.2.0/24"], &[]).replace("spec:\n", taint);
    scene.node.write_manifest("node-b.yaml", &node_b)?;
    let lost = Instant::now();
    scene.wait_for_weight(&scene.one, None)?;
    reset(&mut connections)?;
    let lost = lost.elapsed().as_secs();
    ensure!(lost < 30, "reset after {lost} s");
    scene.node.remove_manifest("node-b.yaml")?;

    let [to, _] = world::vips(11).map(|vip| SocketAddr::new(vip, 80));
    let affine = "spec:\n  sessionAffinity: ClientIP\n  \
                  sessionAffinityConfig: {clientIP: {timeoutSeconds: 120}}\n";
    let sticky = world::service("sticky", 11, 80).replace("spec:\n", affine);
    scene.node.write_manifest("sticky.yaml", &sticky)?;
    let slices = world::slices("sticky", &[&scene.one.pod, &scene.two.pod])?;
    scene.node.write_manifest("sticky-slices.yaml", &slices)?;
    world::wait_for_service(scene.client.netns(), 11, 80)?;
    let by = || world::ask(scene.client.netns(), Transport::Tcp, to).map(|(by, _)| by);
    let first = by()?;
    for _ in 0..4 {
        sleep(100);
        let now = by()?;
        ensure!(now == first, "{now} after 100 s, {first} before");
    }
    let mut others = 0;
    for _ in 0..4 {
        sleep(300);
        others += u32::from(by()? != first);
    }
    ensure!(others > 0, "always {first}, 300 s apart");

    let plain = SocketAddr::new(world::vips(10)[0], 80);
    let flow = scene.client.netns().run(|| Flow::open(plain))?;
    wait::until_ok("an answer", wait::SETTLED, || match flow.ask(ANSWER)? {
        Some(_) => Ok(()),
        None => bail!("no answer"),
    })?;
    let entries = || -> anyhow::Result<usize> {
        let table = scene.node.netns().output("ipvsadm", &["-L", "-n", "-c"])?;
        let lines = table.lines().filter(|line| line.starts_with("UDP"));
        Ok(lines.filter(|line| line.contains("10.96.0.10:80")).count())
    };
    sleep(285);
    let before = entries()?;
    sleep(60);
    let after = entries()?;
    ensure!(
        before > 0 && after == 0,
        "{before} entries of UDP, and then {after}"
    );
    eprintln!("     drained for {drained} s, reset after {lost} s");
    Ok(())
}

/// A socket that keeps its port.
struct Flow(UdpSocket);

impl Flow {
    fn open(to: SocketAddr) -> anyhow::Result<Self> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        Ok(Self(socket))
    }

    fn try_clone(&self) -> anyhow::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Who answers; `None` if nobody does in time.
    ///
    /// # Errors
    /// Where it is refused.
    fn ask(&self, limit: Duration) -> anyhow::Result<Option<String>> {
        self.0.set_read_timeout(Some(limit))?;
        self.0.send(b"who\n")?;
        let mut answer = [0; 128];
        match self.0.recv(&mut answer) {
            Ok(length) => {
                let text = String::from_utf8_lossy(&answer[..length]);
                Ok(text.split(' ').next().map(str::to_owned))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn by(flow: &Flow, name: &str) -> anyhow::Result<()> {
    let answer = flow.ask(Duration::from_secs(2))?;
    ensure!(
        answer.as_deref() == Some(name),
        "{answer:?} instead of {name}"
    );
    Ok(())
}
