//! Negative controls of pains with backends that leave: what ours does is shown by the cases
//! `drain/`, and here what a straightforward IPVS set-up does.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use super::cast::{self, Cast};
use super::control::assemble;
use super::straightforward::Families;
use super::{Row, Scenario, folder};
use crate::context::Context;
use crate::netns::Netns;
use crate::sock::{ANSWER, Connection, Outcome, SILENCE};

/// Whose objects they take: a Service with a backend on each of two nodes.
const SCENARIO: &str = "a_cluster_ip_is_served_to_pods_and_nodes";

type Run = fn(&mut Context) -> anyhow::Result<()>;

/// Name and test of each.
pub(super) const CONTROLS: [(&str, Run); 3] = [
    ("pain-6-connections-are-cut-with-their-service", pain_6),
    ("pain-7-datagrams-go-to-a-backend-that-is-gone", pain_7),
    ("pain-8-a-lost-node-swallows-its-connections", pain_8),
];

struct Scene {
    cast: Cast,
    vips: Vec<SocketAddr>,
}

impl Scene {
    fn build(context: &Context) -> anyhow::Result<Self> {
        let scenario = Scenario::read(&folder().join(SCENARIO))?;
        let cast = assemble(context, &scenario, Families::Both)?;
        let rows = scenario.rows.iter();
        let of_pod = rows.filter(|row| row.client == "client-a" && row.target == "web:80");
        let mut vips: Vec<SocketAddr> = of_pod.flat_map(Row::calls).map(|(_, to)| to).collect();
        vips.sort();
        vips.dedup();
        ensure!(vips.len() == 2, "{vips:?}");
        Ok(Self { cast, vips })
    }

    fn client(&self) -> anyhow::Result<&Netns> {
        self.cast.member("client-a")
    }

    fn ipvsadm(&self, arguments: &[&str]) -> anyhow::Result<()> {
        self.cast.node().output("ipvsadm", arguments).map(drop)
    }
}

/// Where a backend listens, in the family of a VIP.
fn server(backend: &str, vip: &SocketAddr) -> anyhow::Result<String> {
    let ips = cast::ips(backend).context("no such backend")?;
    let mut ips = ips.into_iter();
    let ip = ips.find(|ip| ip.is_ipv4() == vip.is_ipv4());
    let ip = ip.context("no address of the family")?;
    Ok(SocketAddr::new(ip, cast::PORT).to_string())
}

fn ask(connection: &mut Connection) -> anyhow::Result<String> {
    match connection.ask("who", ANSWER)? {
        Outcome::Answered { by, .. } => Ok(by),
        other => bail!("{other:?}"),
    }
}

fn pain_6(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    for vip in &scene.vips {
        let mut connection = Connection::open(scene.client()?, *vip)?;
        ask(&mut connection)?;
        scene.ipvsadm(&["-D", "-t", &vip.to_string()])?;
        let outcome = connection.ask("still-there", SILENCE)?;
        let cut = matches!(outcome, Outcome::Refused | Outcome::TimedOut);
        ensure!(cut, "{vip}: {outcome:?}");
    }
    Ok(())
}

fn pain_7(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    for vip in &scene.vips {
        let socket = scene.client()?.run(|| -> anyhow::Result<UdpSocket> {
            let any = if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(vip)?;
            Ok(socket)
        })?;
        let by = answered(&socket)?.context("no answer at first")?;
        let gone = server(&by, vip)?;
        scene.ipvsadm(&["-d", "-u", &vip.to_string(), "-r", &gone])?;
        // The other backend is there, and each new flow goes to it.
        for _ in 0..3 {
            let answer = answered(&socket)?;
            ensure!(answer.is_none(), "{vip}: answered by {answer:?}");
        }
    }
    Ok(())
}

/// Who answers; `None` where nobody does.
fn answered(socket: &UdpSocket) -> anyhow::Result<Option<String>> {
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.send(b"who\n")?;
    let mut answer = [0; 128];
    match socket.recv(&mut answer) {
        Ok(length) => {
            let text = String::from_utf8_lossy(&answer[..length]);
            Ok(text.split(' ').next().map(str::to_owned))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn pain_8(context: &mut Context) -> anyhow::Result<()> {
    let scene = Scene::build(context)?;
    let mut connections = Vec::new();
    for vip in &scene.vips {
        let mut connection = Connection::open(scene.client()?, *vip)?;
        // One to the backend on the other node.
        while ask(&mut connection)? != "b1" {
            connection = Connection::open(scene.client()?, *vip)?;
        }
        connections.push((vip, connection));
    }
    let lost = scene.cast.member("b1")?;
    lost.output("ip", &["link", "set", "eth0", "down"])?;
    for (vip, mut connection) in connections {
        // What kube-proxy does when the endpoint goes.
        let (at, gone) = (vip.to_string(), server("b1", vip)?);
        scene.ipvsadm(&["-e", "-t", &at, "-r", &gone, "-m", "-w", "0"])?;
        let outcome = connection.ask("anybody-there", SILENCE)?;
        ensure!(outcome == Outcome::TimedOut, "{vip}: {outcome:?}");
    }
    Ok(())
}
