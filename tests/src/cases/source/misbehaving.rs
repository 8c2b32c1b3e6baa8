//! An API that misbehaves in every way, over TLS, while the cluster changes.
//!
//! Two things must not happen on the way: a Service that exists throughout must
//! never leave the kernel, and the agent must neither end nor grow. The first is
//! seen by three witnesses: clients that call it, its counter, which begins anew
//! with a virtual service that was removed, and the kernel's news of addresses.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use ferrule_api_server::{
    Acceptor, ApiServer, Authority, Faults, Identity, Key, Streaming, Validity,
};
use serde_json::{Value, json};

use super::super::soak::{self, say};
use super::super::walk::objects::Cluster;
use super::super::walk::tables;
use super::super::world::{self, Backend};
use super::scenarios::{key, put};
use crate::api::{ADDRESS, Api, kubeconfig};
use crate::context::Context;
use crate::netns::Netns;
use crate::node::{Node, POD_RANGES, manifest};
use crate::process::{Process, Usage};
use crate::random::{self, Random};
use crate::sock::{TRANSPORTS, Transport};
use crate::{dump, wait};

/// Repeats a run.
const SEED: &str = "FERRULE_API_SEED";

/// How many steps it has.
const STEPS: &str = "FERRULE_API_STEPS";

const USUAL: u64 = 50;

/// Steps after which the server recovers and everything is compared.
const ROUND: u64 = 50;

/// Requests in a hundred that go wrong.
const WRONG: u32 = 50;

/// How long what hangs does so: shorter than the agent's patience, because the
/// clock is a real one.
const HANGS: Duration = Duration::from_millis(700);

/// How long the agent may need for the whole truth once the server behaves. Its
/// longest pause between two tries is 45 s.
const RECOVERED: Duration = Duration::from_mins(4);

/// Memory at the end may be more than this part of what it was, in percent.
const GROWN: u64 = 110;

/// The number of the Service that is always there.
const STEADY: u8 = 200;

/// Its namespace: it stands at the end of each list, where a list that is cut off
/// lacks it.
const LAST: &str = "zoo";

/// Longest that so many steps may take, in minutes.
pub(in crate::cases) fn minutes() -> u64 {
    let steps = random::from_environment(STEPS);
    15 + steps.ok().flatten().unwrap_or(USUAL) / 20
}

/// Whatever the server does, what exists stays; when it recovers, the kernel is
/// as planned from the truth.
pub(in crate::cases) fn outlives_a_misbehaving_api(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    let steps = random::from_environment(STEPS)?.unwrap_or(USUAL);
    say(&format!("{SEED}={seed} {STEPS}={steps}"))?;
    run(context, seed, steps).with_context(|| format!("{SEED}={seed}"))
}

fn run(context: &Context, seed: u64, steps: u64) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let outside = world::outside(context, &node)?;
    let authority = Authority::new("cluster")?;
    let mut trial = Trial {
        node: &node,
        outside: &outside,
        identity: authority.signs(&["127.0.0.1"], Validity::Now)?,
        server: ApiServer::new(Streaming::Served),
        running: None,
        cluster: Cluster::new(),
        steady: Vec::new(),
        held: BTreeMap::new(),
        random: Random::new(seed),
        agent: context.binary("ferrule-agent")?,
        calls: BTreeMap::new(),
    };
    node.remove_manifest("node.yaml")?;
    let url = format!("https://{ADDRESS}");
    let more = ", certificate-authority: ca.crt";
    node.follow(&kubeconfig(&url, more), &authority.certificate())?;
    trial.listen()?;
    trial.change(1)?;
    node.start()?;
    let backend = Backend::create(context, &node, "backend")?;
    trial.add_steady(&backend)?;
    trial.recover().context("at the start")?;
    world::wait_for_service(&outside, STEADY, 80)?;
    let news = News::listen(context, &node)?;

    let (mut before, start) = (None, Instant::now());
    for step in 1..=steps {
        trial.step().with_context(|| format!("at step {step}"))?;
        if step % ROUND == 0 || step == steps {
            let usage = trial
                .look()
                .with_context(|| format!("after {step} steps"))?;
            let first = *before.get_or_insert(usage);
            say(&format!(
                "{step} steps, {} s, {} requests of which {} went wrong; {} KiB, at first {} KiB",
                start.elapsed().as_secs(),
                trial.server.requests(),
                trial.server.faults_made(),
                usage.resident,
                first.resident
            ))?;
            soak::not_grown(first, usage, GROWN)?;
        }
    }
    ensure!(trial.server.faults_made() > steps / 8, "little went wrong");
    news.nothing_steady_went()?;
    trial.counters_are_whole()?;
    node.check_alive()?;
    node.stop()?;
    trial.sees_a_difference()
}

struct Trial<'a> {
    node: &'a Node,
    outside: &'a Netns,
    identity: Identity,
    server: Arc<ApiServer>,
    running: Option<Api>,
    cluster: Cluster,
    /// What never changes.
    steady: Vec<Value>,
    /// What the server has.
    held: BTreeMap<Key, Value>,
    random: Random,
    agent: PathBuf,
    /// How often the steady Service answered, by transport and address.
    calls: BTreeMap<String, u64>,
}

impl Trial<'_> {
    fn listen(&mut self) -> anyhow::Result<()> {
        self.running = None;
        let acceptor: Acceptor = self.identity.acceptor(None)?;
        let api = Api::start_at(self.node.netns(), &self.server, ADDRESS, acceptor)?;
        self.running = Some(api);
        Ok(())
    }

    fn add_steady(&mut self, backend: &Backend) -> anyhow::Result<()> {
        let service = world::service("steady", STEADY, 80);
        let slices = world::slices("steady", &[&backend.pod])?;
        for text in format!("{service}{slices}").split("---\n") {
            let object = serde_saphyr::from_str(text);
            let mut object: Value = object.map_err(|error| anyhow::anyhow!("{text}\n{error}"))?;
            object["metadata"]["namespace"] = json!(LAST);
            self.steady.push(object);
        }
        self.push()
    }

    /// What the cluster is in truth. The node itself stays as it is, for its pod.
    fn truth(&mut self) -> anyhow::Result<BTreeMap<Key, Value>> {
        let text = manifest(
            "node-a",
            &POD_RANGES,
            &[("InternalIP", "192.0.2.1"), ("InternalIP", "2001:db8::1")],
        );
        let node: Value =
            serde_saphyr::from_str(&text).map_err(|error| anyhow::anyhow!("{error}"))?;
        let values = self.cluster.values().into_iter();
        let values = values.chain(self.steady.clone()).chain([node]);
        Ok(values
            .filter_map(|value| Some((key(&value)?, value)))
            .collect())
    }

    fn push(&mut self) -> anyhow::Result<()> {
        let truth = self.truth()?;
        put(&self.server, &mut self.held, truth)
    }

    fn change(&mut self, most: usize) -> anyhow::Result<()> {
        self.cluster.change(most, &mut self.random);
        self.push()
    }

    /// Something changes, something goes wrong, and the steady Service answers.
    fn step(&mut self) -> anyhow::Result<()> {
        let seed = self.random.number();
        self.server
            .set_faults(Faults::often(WRONG, seed).no_longer_than(HANGS));
        let most = 1 + self.random.below(6);
        self.change(most)?;
        match self.random.below(24) {
            0..=5 => self.server.end_watches(),
            // Who watches must list everything anew.
            6..=11 => {
                self.server.compact();
                self.server.end_watches();
            }
            // Connections break, and for a while nobody listens.
            12 => {
                self.running = None;
                thread::sleep(Duration::from_millis(self.number(800)));
                self.listen()?;
            }
            13 => self.server.set_token(Some("another")),
            14 => self.server.set_streaming(Streaming::Ignored),
            15 => self.server.set_streaming(Streaming::Refused),
            16 => self.server.set_streaming(Streaming::Served),
            _ => self.server.set_token(None),
        }
        thread::sleep(Duration::from_millis(self.number(300)));
        self.node.check_alive()?;
        self.call()
    }

    fn number(&mut self, below: usize) -> u64 {
        u64::try_from(self.random.below(below)).unwrap_or_default()
    }

    fn call(&mut self) -> anyhow::Result<()> {
        let transport = *self.random.pick(&TRANSPORTS);
        let to = SocketAddr::new(*self.random.pick(&world::vips(STEADY)), 80);
        let (by, _) = world::ask(self.outside, transport, to).context("the steady Service")?;
        ensure!(by == "backend", "{by} answered");
        let protocol = match transport {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
            Transport::Sctp => "SCTP",
        };
        *self.calls.entry(format!("{protocol} {to}")).or_default() += 1;
        Ok(())
    }

    /// The server behaves; returns when the kernel is what the truth wants.
    fn recover(&mut self) -> anyhow::Result<()> {
        self.server.set_faults(Faults::none());
        self.server.set_token(None);
        self.server.set_streaming(Streaming::Served);
        let truth: Vec<String> = self.held.values().map(Value::to_string).collect();
        self.node
            .write_manifest("truth.yaml", &truth.join("\n---\n"))?;
        wait::until_ok("the kernel is as planned", RECOVERED, || {
            self.node.check_alive()?;
            soak::as_planned(&self.difference()?)
        })
    }

    fn difference(&self) -> anyhow::Result<Vec<String>> {
        let nodes = self.held.values().filter(|value| value["kind"] == "Node");
        let nodes: Vec<Value> = nodes.cloned().collect();
        let wanted = tables::of_plan(&soak::plan(&self.agent, self.node)?, &nodes)?;
        let mut found = tables::of_kernel(self.node.netns())?;
        // The way to the pod here, of which the truth says nothing.
        found.retain(|line| !line.ends_with(" via null"));
        Ok(tables::difference(&wanted, &found))
    }

    /// The whole truth arrives; then memory with one and the same population.
    fn look(&mut self) -> anyhow::Result<Usage> {
        self.recover()?;
        self.cluster.fill(1);
        self.push()?;
        self.recover().context("the population that is measured")?;
        soak::memory(self.node)
    }

    /// A virtual service that was removed and made again has counted less.
    fn counters_are_whole(&self) -> anyhow::Result<()> {
        wait::until_ok("the count of all calls", wait::SETTLED, || {
            self.check_counters()
        })
    }

    fn check_counters(&self) -> anyhow::Result<()> {
        for (service, calls) in &self.calls {
            let namespace = self.node.netns();
            // By chance a client has a port again within minutes: IPVS counts a
            // connection of TCP then, and none of UDP.
            let counted = if service.starts_with("UDP") {
                dump::packets(namespace, service)?
            } else {
                dump::connections(namespace, service)?
            };
            ensure!(
                counted.is_some_and(|counted| counted >= *calls),
                "{service} counted {counted:?} of {calls} calls"
            );
        }
        Ok(())
    }

    /// Without an agent that puts it right, what another takes away is missed.
    fn sees_a_difference(&self) -> anyhow::Result<()> {
        let vip = SocketAddr::new(world::vips(STEADY)[0], 80).to_string();
        self.node.netns().output("ipvsadm", &["-D", "-t", &vip])?;
        let difference = self.difference()?;
        ensure!(difference.len() == 2, "{difference:#?}");
        self.node
            .netns()
            .output("ipvsadm", &["-A", "-t", &vip, "-s", "rr"])?;
        let counted = self.check_counters();
        ensure!(counted.is_err(), "a counter that began anew is not noticed");
        Ok(())
    }
}

/// What the kernel says of addresses that come and go.
struct News {
    listener: Process,
    file: PathBuf,
}

impl News {
    fn listen(context: &Context, node: &Node) -> anyhow::Result<Self> {
        let file = context.folder().join("addresses");
        let mut command = Command::new("ip");
        command
            .args(["-o", "monitor", "address"])
            .stdin(Stdio::null())
            .stdout(File::create(&file)?);
        let listener = node.netns().spawn(&mut command)?;
        Ok(Self { listener, file })
    }

    fn nothing_steady_went(mut self) -> anyhow::Result<()> {
        self.listener.kill9()?;
        let text = fs::read_to_string(&self.file)?;
        let gone: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("Deleted"))
            .collect();
        ensure!(!gone.is_empty(), "nothing was heard of any address");
        let steady = world::vips(STEADY).map(|vip| format!(" {vip}/"));
        let mut lines = gone.iter();
        let steady = lines.find(|line| steady.iter().any(|vip| line.contains(vip)));
        ensure!(steady.is_none(), "{steady:?}");
        Ok(())
    }
}
