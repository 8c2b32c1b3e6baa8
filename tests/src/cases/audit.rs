//! What others change in the kernel is found, put right, and told in `status`
//! and in a metric; what is theirs stays theirs.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use serde_json::Value;

use super::load::Load;
use super::world::{self, Backend};
use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::{dump, wait};

/// A round over real servers must come to its end in a test: half a core, not 0.3 %.
const CONFIG: &str = "apiVersion: ferrule.io/v1alpha1
kind: AgentConfiguration
auditBudgetPercent: 50
";

/// The longest that the audit promises is 30 s, for virtual services; on an
/// emulated machine more.
const PROMISE: Duration = Duration::from_secs(150);

/// Services of two ports and endpoints of each: 400 real servers.
const SERVICES: u8 = 10;
const ENDPOINTS: u8 = 20;

/// What `ferrule-agent status -o json` says.
pub(super) fn status(context: &Context, node: &Node) -> anyhow::Result<Value> {
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .args(["status", "-o", "json", "--socket"])
        .arg(node.socket())
        .stdin(Stdio::null());
    let output = node.netns().run(|| Ok(command.output()?))?;
    serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "status ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
    })
}

/// Waits until something holds of what the agent says of itself.
pub(super) fn wait_for_status(
    context: &Context,
    node: &Node,
    what: &str,
    holds: impl Fn(&Value) -> bool,
) -> anyhow::Result<()> {
    wait::until_ok(what, wait::SETTLED, || {
        let told = status(context, node)?;
        ensure!(holds(&told), "{told:#}");
        Ok(())
    })
}

/// The agent's metrics.
fn metrics(node: &Node) -> anyhow::Result<String> {
    node.netns().run(|| {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 10_249));
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

/// A count of `drift.repaired` and the same in the metric.
fn repaired(context: &Context, node: &Node, kind: &str) -> anyhow::Result<u64> {
    let told = status(context, node)?;
    let count = told["drift"]["repaired"][kind].as_u64().unwrap_or(0);
    let line = format!("ferrule_drift_repaired_total{{kind=\"{kind}\"}} {count}");
    let metrics = metrics(node)?;
    ensure!(
        count == 0 || metrics.contains(&line),
        "no {line:?} in:\n{metrics}"
    );
    Ok(count)
}

/// Everything of ours in the kernel.
fn state(node: &Node) -> anyhow::Result<String> {
    Ok(format!(
        "{}\n{}\n{}",
        dump::ipvs(node.netns())?,
        dump::addresses(node.netns())?,
        dump::nft(node.netns(), "ferrule")?
    ))
}

/// Each kind of damage, one after the other.
pub(super) fn damage_is_put_right(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.write_config(CONFIG)?;
    node.start()?;
    let client = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    node.write_manifest("many.yaml", &many())?;
    world::wait_for_service(&client, 10, 80)?;
    // Their device has an address, which is one of the node's from then on.
    let foreign = Foreign::make(node.netns())?;
    let good = wait::until_ok("400 real servers", wait::SETTLED * 4, || {
        let table = dump::ipvs(node.netns())?;
        let count = table.matches("Masq").count();
        ensure!(count == 404, "{count} real servers");
        let state = state(&node)?;
        ensure!(
            state.contains("theirs0"),
            "the foreign device is not known yet"
        );
        Ok(state)
    })?;
    for damage in DAMAGES {
        let before = repaired(context, &node, damage.kind)?;
        for command in damage.commands {
            let words: Vec<&str> = command.split(' ').collect();
            let (program, arguments) = words.split_first().context("a program")?;
            node.netns().output(program, arguments)?;
        }
        wait::until_ok(damage.what, PROMISE, || {
            let now = state(&node)?;
            ensure!(now == good, "{}", crate::golden::difference(&good, &now));
            let count = repaired(context, &node, damage.kind)?;
            ensure!(
                count > before,
                "status tells of no drift of kind {}",
                damage.kind
            );
            Ok(())
        })?;
        world::wait_for_service(&client, 10, 80)?;
        foreign
            .check(node.netns(), damage.kind == "service")
            .with_context(|| format!("after {}", damage.what))?;
    }
    let told = status(context, &node)?;
    ensure!(told["health"] == "healthy", "{told:#}");
    ensure!(
        told["audit"]["lastRound"].as_f64().is_some(),
        "no round came to its end: {told:#}"
    );
    node.stop()?;
    foreign.check(node.netns(), true)?;
    node.start()?;
    wait::until_ok("a healthy agent", wait::SETTLED, || {
        let told = status(context, &node)?;
        ensure!(told["health"] == "healthy", "{told:#}");
        Ok(())
    })?;
    foreign.check(node.netns(), true)?;
    let log = node.log()?;
    ensure!(
        log.contains("drift: device kube-ipvs0 was gone"),
        "the log does not say what was found"
    );
    Ok(())
}

struct Damage {
    what: &'static str,
    kind: &'static str,
    commands: &'static [&'static str],
}

const DAMAGES: &[Damage] = &[
    Damage {
        what: "the VIP device deleted",
        kind: "device",
        commands: &["ip link del kube-ipvs0"],
    },
    Damage {
        what: "the VIP device renamed",
        kind: "device",
        commands: &["ip link set kube-ipvs0 name theirs1"],
    },
    Damage {
        what: "a VIP taken off its device",
        kind: "address",
        commands: &["ip addr del 10.96.0.10/32 dev kube-ipvs0"],
    },
    Damage {
        what: "another weight for one real server among 400",
        kind: "server",
        commands: &["ipvsadm -e -t 10.96.1.7:80 -r 10.244.9.13:8080 -m -w 7"],
    },
    Damage {
        what: "the nftables table flushed",
        kind: "filter",
        commands: &["nft flush table inet ferrule"],
    },
    Damage {
        what: "the nftables table deleted",
        kind: "filter",
        commands: &["nft delete table inet ferrule"],
    },
    Damage {
        what: "one element removed from our set",
        kind: "filter",
        commands: &["nft delete element inet ferrule vips4 { 10.96.0.10 }"],
    },
    Damage {
        what: "a foreign rule in our table",
        kind: "filter",
        commands: &["nft insert rule inet ferrule guard-remote accept"],
    },
    Damage {
        what: "a foreign chain in our table",
        kind: "filter",
        commands: &["nft add chain inet ferrule theirs"],
    },
    Damage {
        what: "a foreign chain whose name we would not choose",
        kind: "filter",
        commands: &["nft add chain inet ferrule their.chain"],
    },
    Damage {
        what: "a chain of ours at no hook",
        kind: "filter",
        commands: &[
            "nft flush chain inet ferrule guard-remote; delete chain inet ferrule guard-remote; \
             add chain inet ferrule guard-remote",
        ],
    },
    Damage {
        what: "an element that no Service can have",
        kind: "filter",
        commands: &["nft add element inet ferrule frontends4 { 10.96.0.10 . icmp . 80 }"],
    },
    Damage {
        what: "every address in a set of ours",
        kind: "filter",
        commands: &["nft add element inet ferrule vips6 { * }"],
    },
    Damage {
        what: "a pair of two addresses among the hairpins",
        kind: "filter",
        commands: &["nft add element inet ferrule hairpins4 { 10.244.1.2 . 10.244.1.3 }"],
    },
    Damage {
        what: "a scheduler changed",
        kind: "service",
        commands: &["ipvsadm -E -t 10.96.1.7:80 -s wlc"],
    },
    // Last: it takes the foreign service along, which is put there again.
    Damage {
        what: "every virtual service cleared",
        kind: "service",
        commands: &["ipvsadm -C", "ipvsadm -A -t 192.0.2.1:4711 -s wrr"],
    },
];

/// Services whose endpoints nobody listens at.
fn many() -> String {
    let mut yaml = String::new();
    for service in 1..=SERVICES {
        let endpoints: Vec<String> = (1..=ENDPOINTS)
            .map(|host| format!("{{addresses: [10.244.9.{host}], conditions: {{ready: true}}}}"))
            .collect();
        // Writing to a String cannot fail.
        let _ = write!(
            yaml,
            "---
apiVersion: v1
kind: Service
metadata: {{name: many-{service}}}
spec:
  clusterIP: 10.96.1.{service}
  ports: [{{name: a, port: 80}}, {{name: b, port: 81}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: many-{service}
  labels: {{kubernetes.io/service-name: many-{service}}}
addressType: IPv4
ports: [{{name: a, port: 8080}}, {{name: b, port: 8081}}]
endpoints: [{}]
",
            endpoints.join(", ")
        );
    }
    yaml
}

/// Objects of somebody else.
struct Foreign {
    table: String,
    device: String,
    route: String,
}

impl Foreign {
    fn make(netns: &Netns) -> anyhow::Result<Self> {
        for command in [
            "ipvsadm -A -t 192.0.2.1:4711 -s wrr",
            "nft add table inet theirs",
            "nft add chain inet theirs input { type filter hook input priority 0; }",
            "nft add rule inet theirs input counter",
            "ip link add theirs0 type dummy",
            "ip addr add 198.51.100.9/32 dev theirs0",
            "ip link set theirs0 up",
            "ip route add 203.0.113.0/24 dev theirs0 proto static",
        ] {
            let words: Vec<&str> = command.split(' ').collect();
            let (program, arguments) = words.split_first().context("a program")?;
            netns.output(program, arguments)?;
        }
        Self::look(netns)
    }

    fn look(netns: &Netns) -> anyhow::Result<Self> {
        Ok(Self {
            table: dump::nft(netns, "theirs")?,
            device: netns.output("ip", &["-o", "addr", "show", "dev", "theirs0"])?,
            route: netns.output("ip", &["route", "show", "203.0.113.0/24"])?,
        })
    }

    fn check(&self, netns: &Netns, service_may_be_new: bool) -> anyhow::Result<()> {
        let now = Self::look(netns)?;
        ensure!(now.table == self.table, "the foreign table: {}", now.table);
        ensure!(
            now.device == self.device,
            "the foreign device: {}",
            now.device
        );
        ensure!(now.route == self.route, "the foreign route: {}", now.route);
        let table = dump::ipvs(netns)?;
        ensure!(
            table.contains("TCP 192.0.2.1:4711 wrr"),
            "the foreign service is gone{}:\n{table}",
            if service_may_be_new {
                " (or was not put back)"
            } else {
                ""
            }
        );
        Ok(())
    }
}

/// Load goes on while the agent is killed, the manifests change meanwhile, and
/// a new agent takes over: nothing is rebuilt, nobody notices.
pub(super) fn a_change_while_the_agent_is_dead(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let client = Pod::added(context, &node, "client")?;
    let backends = [
        Backend::create(context, &node, "backend-1")?,
        Backend::create(context, &node, "backend-2")?,
        Backend::create(context, &node, "backend-3")?,
    ];
    let [first, second, third] = &backends;
    node.write_manifest("still.yaml", &world::service("still", 10, 80))?;
    node.write_manifest(
        "still-slices.yaml",
        &world::slices("still", &[&first.pod, &second.pod])?,
    )?;
    node.write_manifest("grows.yaml", &world::service("grows", 11, 80))?;
    node.write_manifest("grows-slices.yaml", &world::slices("grows", &[&first.pod])?)?;
    node.write_manifest("shrinks.yaml", &world::service("shrinks", 12, 80))?;
    node.write_manifest(
        "shrinks-slices.yaml",
        &world::slices("shrinks", &[&first.pod, &third.pod])?,
    )?;
    node.write_manifest("goes.yaml", &world::service("goes", 13, 80))?;
    node.write_manifest("goes-slices.yaml", &world::slices("goes", &[&first.pod])?)?;
    for number in [10, 11, 12, 13] {
        world::wait_for_service(client.netns(), number, 80)?;
    }
    let load = Load::start(client.netns(), &[10, 11, 12])?;
    load.wait_for_rounds(3)?;
    world::wait_for_count(&node, "TCP 10.96.0.10:80")?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> anyhow::Result<()> {
        let watch = scope.spawn(|| watch_counter(node.netns(), "TCP 10.96.0.10:80", &done));
        let changed = change_while_dead(&node, &load, [first, second]);
        done.store(true, Ordering::Relaxed);
        let looks = watch.join().map_err(|_| anyhow!("the watch panicked"))?;
        changed?;
        ensure!(looks? > 5, "the table was hardly looked at");
        Ok(())
    })?;
    load.stop()
        .map_err(|error| error.context(connection_tables(&node)))?;
    let told = status(context, &node)?;
    ensure!(told["health"] == "healthy", "{told:#}");
    node.check_alive()
}

/// What the kernel remembers of connections, to explain one that failed.
fn connection_tables(node: &Node) -> String {
    ["/proc/net/ip_vs_conn", "/proc/net/nf_conntrack"]
        .map(|path| match node.netns().output("cat", &[path]) {
            Ok(text) => format!("{path}:\n{text}"),
            Err(error) => format!("{path}: {error:#}"),
        })
        .join("\n")
}

/// Looks at the IPVS table again and again: the service is there, and its
/// counter never falls, as it would if it were made anew.
fn watch_counter(netns: &Netns, service: &str, done: &AtomicBool) -> anyhow::Result<usize> {
    let (mut looks, mut highest) = (0, 0);
    while !done.load(Ordering::Relaxed) {
        let count = dump::connections(netns, service)?;
        let count = count.with_context(|| format!("{service} was gone for a moment"))?;
        ensure!(
            count >= highest,
            "{service} counted {highest}, then {count}"
        );
        highest = count;
        looks += 1;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(looks)
}

fn change_while_dead(
    node: &Node,
    load: &Load,
    [first, second]: [&Backend; 2],
) -> anyhow::Result<()> {
    node.kill9()?;
    node.write_manifest(
        "grows-slices.yaml",
        &world::slices("grows", &[&first.pod, &second.pod])?,
    )?;
    node.write_manifest(
        "shrinks-slices.yaml",
        &world::slices("shrinks", &[&first.pod])?,
    )?;
    node.remove_manifest("goes.yaml")?;
    load.wait_for_rounds(3)?;
    node.start()?;
    world::wait_for_ipvs(node, "the three changes", |table| {
        // Four frontends each: still 2 backends, grows 2, shrinks 1.
        table.matches("Masq").count() == 4 * 5 && !table.contains("10.96.0.13:")
    })?;
    load.wait_for_rounds(3)
}
