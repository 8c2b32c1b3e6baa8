//! A pod's limits hold, in both directions and by both families.
//!
//! What a limit is worth shows only against a clock that does not wobble, so
//! this runs where the clock counts instructions.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::pods::nothing_left;
use super::world;
use crate::context::Context;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::ANSWER;

/// Bits a second.
const SLOW: u32 = 20_000_000;
const FAST: u32 = 100_000_000;

/// What a pod without limits reaches at least: so far above them that a limit
/// that is not there is not missed.
const UNLIMITED: f64 = 5.0 * FAST as f64;

/// How long a transfer is measured. What passes at once at its beginning, 50 ms
/// at the rate or 128 KiB, must not count for much.
const MEASURED: Duration = Duration::from_secs(2);

/// How long one is, so that everything it takes has been read from disk.
const WARM_UP: Duration = Duration::from_millis(200);

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToPod,
    FromPod,
}

/// What containerd makes of a pod's annotations: a burst that nobody asked for.
fn limits(to_pod: u32, from_pod: u32) -> Value {
    json!({"runtimeConfig": {"bandwidth": {
        "ingressRate": to_pod, "ingressBurst": u32::MAX,
        "egressRate": from_pod, "egressBurst": u32::MAX,
    }}})
}

/// Within 20 % of the limit, and without one far above; CHECK agrees, and after
/// DEL there is no qdisc and no device.
pub(super) fn shaped_both_ways(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.start()?;
    // A node has addresses of its own, which it calls pods from.
    let _uplink = world::outside(context, &node)?;
    let free = Pod::added(context, &node, "free")?;
    for way in [Way::ToPod, Way::FromPod] {
        for ip in free.ips() {
            rate(&node, &free, *ip, way, WARM_UP)?;
            let rate = told(&node, &free, *ip, way, WARM_UP)?;
            ensure!(
                rate > UNLIMITED,
                "{way:?} {ip}: only {rate} without a limit"
            );
        }
    }
    free.del(&node)?;
    for (name, to_pod, from_pod) in [("slow", SLOW, FAST), ("fast", FAST, SLOW)] {
        let mut pod = Pod::create(context, name)?;
        let mut config = limits(to_pod, from_pod);
        pod.configure(config.clone());
        config["prevResult"] = pod.add(&node)?;
        for (way, limit) in [(Way::ToPod, to_pod), (Way::FromPod, from_pod)] {
            let limit = f64::from(limit);
            for ip in pod.ips() {
                let rate = told(&node, &pod, *ip, way, MEASURED)?;
                ensure!(
                    (0.8 * limit..1.2 * limit).contains(&rate),
                    "{way:?} {ip}: {rate} bits a second where {limit} are the limit"
                );
            }
        }
        pod.configure(config);
        pod.call(&node, "CHECK", &[])?.result()?;
        pod.del(&node)?;
        nothing_left(&node)?;
        let qdiscs = node.netns().output("tc", &["qdisc", "show"])?;
        for kind in ["tbf", "ingress"] {
            ensure!(!qdiscs.contains(kind), "left on the node: {qdiscs}");
        }
    }
    node.check_alive()
}

/// The rate, told to whoever reads the log.
fn told(node: &Node, pod: &Pod, ip: IpAddr, way: Way, time: Duration) -> anyhow::Result<f64> {
    let rate = rate(node, pod, ip, way, time)?;
    let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
    writeln!(
        io::stderr(),
        "     pod {}, {way:?}, {family}: {:.2} Mbit/s",
        pod.name(),
        rate / 1e6
    )?;
    Ok(rate)
}

/// Bits a second of one TCP stream between node and pod, without headers, by
/// the receiver's clock from the first byte on.
fn rate(node: &Node, pod: &Pod, ip: IpAddr, way: Way, time: Duration) -> anyhow::Result<f64> {
    let listener = pod
        .netns()
        .run(|| Ok(TcpListener::bind(SocketAddr::new(ip, 0))?))?;
    let address = listener.local_addr()?;
    let on_node = node
        .netns()
        .run(|| Ok(TcpStream::connect_timeout(&address, ANSWER)?))?;
    let (in_pod, _) = listener.accept()?;
    let (sender, receiver) = match way {
        Way::ToPod => (on_node, in_pod),
        Way::FromPod => (in_pod, on_node),
    };
    sender.set_write_timeout(Some(ANSWER))?;
    receiver.set_read_timeout(Some(ANSWER))?;
    thread::scope(|scope| {
        // It ends when the receiver has closed.
        scope.spawn(move || flood(sender));
        drain(receiver, time).with_context(|| format!("{way:?} {ip}"))
    })
}

fn flood(mut sender: TcpStream) {
    let bytes = vec![0; 64 * 1024];
    while sender.write_all(&bytes).is_ok() {}
}

fn drain(mut receiver: TcpStream, time: Duration) -> anyhow::Result<f64> {
    let mut bytes = vec![0; 256 * 1024];
    let first = receiver.read(&mut bytes)?;
    ensure!(first > 0, "the sender has closed");
    let start = Instant::now();
    let mut total = 0_u32;
    loop {
        let length = receiver.read(&mut bytes)?;
        ensure!(length > 0, "the sender has closed");
        total = total.saturating_add(u32::try_from(length)?);
        let elapsed = start.elapsed();
        if elapsed >= time {
            return Ok(f64::from(total) * 8.0 / elapsed.as_secs_f64());
        }
    }
}
