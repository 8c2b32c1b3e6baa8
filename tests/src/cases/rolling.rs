//! A Service of twenty backends is rolled under load, with an agent that is killed in the
//! middle of each round: no request fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use serde_json::Value;

use super::segment;
use super::world;
use crate::context::Context;
use crate::dump;
use crate::link::{End, batch, veth};
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::random::{self, Random};
use crate::sock::{ANSWER, Connection, Outcome, Request, Server, Transport};
use crate::wait;

/// Rounds where nobody asks for another number.
const USUAL: u64 = 5;
const ROUNDS: &str = "FERRULE_ROLLING_ROUNDS";
const SEED: &str = "FERRULE_ROLLING_SEED";

/// Backends of the Service, and how many are replaced at a time.
const BACKENDS: u16 = 20;
const AT_ONCE: u16 = 5;

/// Connections that stay open.
const KEPT: usize = 4;

/// After this a datagram is sent once more, as resolvers do.
const RESEND: Duration = Duration::from_secs(1);

pub(super) fn minutes() -> u64 {
    let rounds = random::from_environment(ROUNDS);
    15 + 2 * rounds.ok().flatten().unwrap_or(USUAL)
}

/// Where the pods are: another node, which is a router with all their addresses.
struct Farm {
    netns: Netns,
    servers: BTreeMap<u16, Vec<Server>>,
}

/// Addresses of the n-th pod. They come round: the kernel's connections to one that had an
/// address before are long gone.
fn ips(number: u16) -> [IpAddr; 2] {
    let place = 10 + u8::try_from(number % 200).unwrap_or(0);
    [
        IpAddr::V4(Ipv4Addr::new(10, 244, 2, place)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x244, 2, 0, 0, 0, place.into())),
    ]
}

fn name(number: u16) -> String {
    format!("b{number}")
}

impl Farm {
    fn create(context: &Context, node: &Node) -> anyhow::Result<Self> {
        let netns = context.netns("node-b")?;
        let [a4, a6] = segment::ips(segment::NODE_A).map(|ip| ip.to_string());
        let [b4, b6] = segment::ips(segment::NODE_B).map(|ip| ip.to_string());
        let with = |ip: &str, prefix: u8| format!("{ip}/{prefix}");
        let (a4_, a6_) = (with(&a4, 24), with(&a6, 64));
        let (b4_, b6_) = (with(&b4, 24), with(&b6, 64));
        veth(
            End {
                namespace: node.netns(),
                device: "uplink",
                addresses: &[&a4_, &a6_],
            },
            End {
                namespace: &netns,
                device: "eth0",
                addresses: &[&b4_, &b6_],
            },
        )?;
        batch(
            &netns,
            [
                format!("route add 0.0.0.0/0 via {a4}"),
                format!("route add ::/0 via {a6}"),
                "route add local 10.244.2.0/24 dev lo".to_owned(),
                "route add local fd00:10:244:2::/64 dev lo".to_owned(),
            ],
        )?;
        let servers = BTreeMap::new();
        Ok(Self { netns, servers })
    }

    fn start(&mut self, number: u16) -> anyhow::Result<()> {
        let name = name(number);
        let at = ips(number).map(|ip| SocketAddr::new(ip, world::TARGET));
        let mut servers = Vec::new();
        // Bound by the network's route already; a socket wants an address, and at once.
        batch(
            &self.netns,
            ips(number).map(|ip| match ip {
                IpAddr::V4(ip) => format!("address replace {ip}/32 dev lo"),
                IpAddr::V6(ip) => format!("address replace {ip}/128 dev lo nodad"),
            }),
        )?;
        servers.extend(Server::at(&self.netns, &name, &at)?);
        self.servers.insert(number, servers);
        Ok(())
    }

    /// Waits until a pod has read every datagram that has come to it.
    fn settle(&self, number: u16) -> anyhow::Result<()> {
        for ip in ips(number) {
            let to = SocketAddr::new(ip, world::TARGET);
            let outcome = Request::new(Transport::Udp, to).send(&self.netns, ANSWER)?;
            ensure!(
                matches!(outcome, Outcome::Answered { .. }),
                "{to}: {outcome:?}"
            );
        }
        Ok(())
    }

    /// Datagrams that a pod has got.
    fn datagrams(&self, number: u16) -> usize {
        let servers = self.servers.get(&number).map_or(&[][..], Vec::as_slice);
        // The servers of each transport stand together, TCP first.
        let of_udp = servers.iter().skip(servers.len() / 2);
        of_udp.map(|server| server.seen().len()).sum()
    }
}

/// What clients and who rolls know of one another.
#[derive(Default)]
struct Shared {
    done: AtomicBool,
    /// Pods that are about to end: as a server says by `Connection: close`.
    ending: Mutex<BTreeSet<String>>,
    /// By whom the connections that stay open were last answered.
    held: Mutex<BTreeMap<usize, String>>,
    requests: AtomicUsize,
    resent: AtomicUsize,
    /// Restarts of the agent.
    killed: AtomicU32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Client = JoinHandle<anyhow::Result<anyhow::Result<()>>>;

impl Shared {
    fn goes_on(&self) -> bool {
        !self.done.load(Ordering::Relaxed)
    }

    fn count(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        // An emulated machine has not many packets to give, and others to serve.
        thread::sleep(Duration::from_millis(50));
    }

    /// New connections, one after the other.
    fn connect(&self, to: SocketAddr) -> anyhow::Result<()> {
        while self.goes_on() {
            match Request::new(Transport::Tcp, to).send_here(ANSWER)? {
                Outcome::Answered { .. } => self.count(),
                other => bail!("a new connection to {to}: {other:?}"),
            }
        }
        Ok(())
    }

    /// A connection that is used again and again, as long as its server does not end.
    fn keep(&self, number: usize, to: SocketAddr) -> anyhow::Result<()> {
        while self.goes_on() {
            let mut connection = Connection::open_from_here(to)?;
            while self.goes_on() {
                let by = match connection.ask("kept", ANSWER)? {
                    Outcome::Answered { by, .. } => by,
                    other => bail!("a kept connection to {to}: {other:?}"),
                };
                self.count();
                let closes = lock(&self.ending).contains(&by);
                lock(&self.held).insert(number, by);
                if closes {
                    break;
                }
            }
            drop(connection);
            lock(&self.held).remove(&number);
        }
        Ok(())
    }

    /// Datagrams from one port.
    fn flow(&self, to: SocketAddr) -> anyhow::Result<()> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(RESEND))?;
        while self.goes_on() {
            let mut tries = 0;
            while !answered(&socket)? {
                tries += 1;
                self.resent.fetch_add(1, Ordering::Relaxed);
                ensure!(tries < 3, "a flow of UDP to {to} gets no answer");
            }
            self.count();
        }
        Ok(())
    }

    fn start(shared: &Arc<Self>, from: &Netns) -> anyhow::Result<Vec<Client>> {
        let mut clients = Vec::new();
        for (index, vip) in world::vips(10).into_iter().enumerate() {
            let to = SocketAddr::new(vip, 80);
            for work in 0..2 + KEPT / 2 {
                let shared = Arc::clone(shared);
                clients.push(from.thread(move || match work {
                    0 => shared.connect(to),
                    1 => shared.flow(to),
                    _ => shared.keep(index * KEPT + work, to),
                })?);
            }
        }
        Ok(clients)
    }
}

fn answered(socket: &UdpSocket) -> anyhow::Result<bool> {
    socket.send(b"flow\n")?;
    match socket.recv(&mut [0; 128]) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The Service's slices with these pods, those of `ending` on their way out.
fn slices(ready: &BTreeSet<u16>, ending: &BTreeSet<u16>) -> anyhow::Result<String> {
    let of = |number: &u16, conditions| (ips(*number), conditions);
    let ready = ready.iter().map(|number| of(number, world::READY));
    let out = "ready: false, serving: true, terminating: true";
    let all: Vec<_> = ready.chain(ending.iter().map(|n| of(n, out))).collect();
    let endpoints: Vec<_> = all
        .iter()
        .map(|(ips, conditions)| world::Endpoint {
            ips,
            node: Some("node-b"),
            conditions,
        })
        .collect();
    world::endpoint_slices("web", &endpoints)
}

/// Waits until `status` says that the Service is in the kernel with these pods.
fn wait_for(context: &Context, node: &Node, pods: &BTreeSet<u16>) -> anyhow::Result<()> {
    wait::until_ok("status of a step", wait::SETTLED, || {
        let mut command = Command::new(context.binary("ferrule-agent")?);
        command
            .args(["status", "services", "-o", "json", "--interval", "0"])
            .arg("--socket")
            .arg(node.socket())
            .stdin(Stdio::null());
        let output = node.netns().run(|| Ok(command.output()?))?;
        let told: Value = serde_json::from_slice(&output.stdout).with_context(|| {
            let said = String::from_utf8_lossy(&output.stderr);
            format!("status ended with {}: {said}", output.status)
        })?;
        let rows = told["services"].as_array().context("services")?;
        let all = rows.iter().all(|row| {
            row["backends"].as_u64() == u64::try_from(pods.len()).ok() && row["programmed"] == true
        });
        // Of each transport and family one.
        ensure!(all && rows.len() == 4, "{told:#}");
        Ok(())
    })
}

/// What `status` has told: the kernel leads new connections and datagrams to these pods alone.
fn check(node: &Node, pods: &BTreeSet<u16>) -> anyhow::Result<()> {
    let mut wanted = BTreeSet::new();
    for ip in pods.iter().flat_map(|number| ips(*number)) {
        let mut line = String::new();
        write!(line, "-> {} Masq 1", SocketAddr::new(ip, world::TARGET))?;
        wanted.insert(line);
    }
    let table = dump::ipvs(node.netns())?;
    let (tcp, udp) = table.split_once("\nUDP").unwrap_or((&table, ""));
    for part in [tcp, udp] {
        let lines = part.lines().map(str::trim).filter(|l| l.starts_with("->"));
        // Of TCP those that drain stay with weight 0.
        let taking: BTreeSet<String> = lines
            .filter(|line| !line.ends_with(" 0"))
            .map(str::to_owned)
            .collect();
        ensure!(taking == wanted, "{taking:?} instead of {wanted:?}");
    }
    ensure!(!udp.contains(" Masq 0"), "{udp}");
    Ok(())
}

pub(super) fn no_request_fails(context: &mut Context) -> anyhow::Result<()> {
    let rounds = random::from_environment(ROUNDS)?.unwrap_or(USUAL);
    let seed = random::seed(SEED)?;
    eprintln!("     {SEED}={seed} {ROUNDS}={rounds}");
    let mut random = Random::new(seed);
    let node = Node::create(context, "node-a")?;
    let mut farm = Farm::create(context, &node)?;
    let ranges = segment::POD_RANGES_B;
    let node_b = segment::node_manifest("node-b", &ranges, segment::NODE_B);
    node.write_manifest("node-b.yaml", &node_b)?;
    node.start()?;
    let client = Pod::added(context, &node, "client")?;
    let mut ready: BTreeSet<u16> = (0..BACKENDS).collect();
    for number in &ready {
        farm.start(*number)?;
    }
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("slices.yaml", &slices(&ready, &BTreeSet::new())?)?;
    wait_for(context, &node, &ready)?;
    check(&node, &ready)?;
    world::wait_for_service(client.netns(), 10, 80)?;

    let shared = Arc::new(Shared::default());
    let clients = Shared::start(&shared, client.netns())?;
    let mut next = BACKENDS;
    for round in 0..rounds {
        // The agent dies at some moment of the round.
        let moment = Duration::from_millis(u64::try_from(random.below(5_000))?);
        thread::scope(|scope| -> anyhow::Result<()> {
            let killer = scope.spawn(|| -> anyhow::Result<()> {
                thread::sleep(moment);
                node.kill9()?;
                node.start()?;
                shared.killed.fetch_add(1, Ordering::Relaxed);
                Ok(())
            });
            for _ in 0..BACKENDS / AT_ONCE {
                step(context, &node, &mut farm, &shared, &mut ready, &mut next)
                    .with_context(|| format!("round {round}"))?;
            }
            killer.join().map_err(|_| anyhow!("the killer panicked"))?
        })?;
        ensure!(
            clients.iter().all(|client| !client.is_finished()),
            "a client gave up in round {round}"
        );
    }
    shared.done.store(true, Ordering::Relaxed);
    for client in clients {
        client
            .join()
            .map_err(|_| anyhow!("a client panicked"))???;
    }
    eprintln!(
        "     {rounds} rounds, {} requests, {} datagrams were sent again, the agent was killed {} times",
        shared.requests.load(Ordering::Relaxed),
        shared.resent.load(Ordering::Relaxed),
        shared.killed.load(Ordering::Relaxed)
    );
    Ok(())
}

/// Some pods take the place of the oldest ones.
fn step(
    context: &Context,
    node: &Node,
    farm: &mut Farm,
    shared: &Shared,
    ready: &mut BTreeSet<u16>,
    next: &mut u16,
) -> anyhow::Result<()> {
    let new: BTreeSet<u16> = (*next..*next + AT_ONCE).collect();
    *next += AT_ONCE;
    for number in &new {
        farm.start(*number)?;
    }
    ready.extend(&new);
    // `status` tells their number, so that it is another when the old ones are gone.
    node.write_manifest("slices.yaml", &slices(ready, &BTreeSet::new())?)?;
    wait_for(context, node, ready)?;
    let old: BTreeSet<u16> = ready.iter().take(AT_ONCE.into()).copied().collect();
    ready.retain(|number| !old.contains(number));
    node.write_manifest("slices.yaml", &slices(ready, &old)?)?;
    wait_for(context, node, ready)?;
    // From here on no datagram goes to them. Those that are there are read before the next one.
    for number in &old {
        farm.settle(*number)?;
    }
    let before: Vec<usize> = old.iter().map(|number| farm.datagrams(*number)).collect();
    lock(&shared.ending).extend(old.iter().map(|number| name(*number)));
    wait::until_ok("the clients of pods that end", wait::SETTLED, || {
        let held = lock(&shared.held);
        let here = held.values().any(|by| old.iter().any(|n| name(*n) == *by));
        ensure!(!here || shared.done.load(Ordering::Relaxed), "{held:?}");
        Ok(())
    })?;
    thread::sleep(Duration::from_millis(300));
    let after: Vec<usize> = old.iter().map(|number| farm.datagrams(*number)).collect();
    check(node, ready)?;
    ensure!(
        before == after,
        "datagrams went to removed backends: {before:?} {after:?}"
    );
    node.write_manifest("slices.yaml", &slices(ready, &BTreeSet::new())?)?;
    for number in &old {
        farm.servers.remove(number);
    }
    Ok(())
}
