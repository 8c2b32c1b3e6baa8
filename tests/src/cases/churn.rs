//! Pods come and go while agent and plugins are killed at random points; what
//! is left is put right by GC and by the agent itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ferrule_api::status::PodRow;
use ferrule_api::{Answer, Call, Client};
use serde_json::{Value, json};

use super::pods::{fill, host_ends, nothing_left};
use crate::context::Context;
use crate::node::Node;
use crate::pod::{Pod, Reply};
use crate::random::{self, Random};
use crate::wait;

/// Repeats a run, as far as threads let it be repeated.
const SEED: &str = "FERRULE_CHURN_SEED";

/// How many calls of the plugin it has.
const CALLS: &str = "FERRULE_CHURN_CALLS";

const USUAL: u64 = 400;

const WORKERS: usize = 16;

/// Longest time after which a call is killed, in microseconds: an ADD takes about
/// two milliseconds on an idle machine, a DEL thirty.
const LONGEST: usize = 40_000;

/// Longest that a run of so many calls may take, in minutes.
pub(super) fn minutes() -> u64 {
    let calls = random::from_environment(CALLS);
    10 + calls.ok().flatten().unwrap_or(USUAL) / 200
}

/// What all workers share.
struct World<'a> {
    context: &'a Context,
    node: &'a Node,
    /// Whose address is in use, from the result of ADD to the begin of DEL.
    in_use: Mutex<BTreeMap<IpAddr, String>>,
    calls: AtomicUsize,
    killed: AtomicUsize,
    wanted: usize,
}

/// No address is in use twice, and after GC no lease and no interface is left
/// but those of the pods that live.
pub(super) fn killed_at_random(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    let wanted = usize::try_from(random::from_environment(CALLS)?.unwrap_or(USUAL))?;
    // Room for those whose DEL never comes: one cycle in ten of ADD and DEL.
    let node = Node::create(context, "node-a")?;
    node.start()?;
    Pod::added(context, &node, "first")?.del(&node)?;
    let world = World {
        context,
        node: &node,
        in_use: Mutex::default(),
        calls: AtomicUsize::new(0),
        killed: AtomicUsize::new(0),
        wanted,
    };
    let (live, deaths) = run(&world, seed).with_context(|| format!("{SEED}={seed}"))?;
    let mut out = std::io::stdout();
    writeln!(
        out,
        "     {SEED}={seed} {CALLS}={wanted}: {} calls, {} of them killed, {deaths} deaths of the agent, {} pods live at the end",
        world.calls.load(Ordering::Relaxed),
        world.killed.load(Ordering::Relaxed),
        live.len()
    )?;
    let valid: Vec<&Pod> = live.iter().collect();
    let caller = Pod::create(context, "caller")?;
    gc(&node, &caller, &valid)?;
    only_these_are_left(&node, &valid)?;
    for pod in &live {
        pod.del(&node)?;
    }
    only_these_are_left(&node, &[])
}

/// All workers and the agent's killer; returns the pods that live and how often the agent died.
fn run(world: &World<'_>, seed: u64) -> anyhow::Result<(Vec<Pod>, usize)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let killer = scope.spawn(|| -> anyhow::Result<usize> {
            let mut random = Random::new(seed ^ 0xdead);
            let mut deaths = 0;
            while !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(u64::try_from(random.below(1500))?));
                world.node.kill9()?;
                world.node.start()?;
                deaths += 1;
            }
            Ok(deaths)
        });
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                let random = Random::new(seed.wrapping_add(u64::try_from(number).unwrap_or(0)));
                scope.spawn(move || work(world, number, random))
            })
            .collect();
        let mut live = Vec::new();
        let mut results = Vec::new();
        for worker in workers {
            match worker.join() {
                Ok(Ok(pod)) => live.extend(pod),
                Ok(Err(error)) => results.push(error),
                Err(_) => bail!("a worker panicked"),
            }
        }
        over.store(true, Ordering::Relaxed);
        let deaths = match killer.join() {
            Ok(deaths) => deaths?,
            Err(_) => bail!("the killer panicked"),
        };
        match results.pop() {
            Some(error) => Err(error),
            None => Ok((live, deaths)),
        }
    })
}

/// One worker's pods, one after the other; the last may live on.
fn work(world: &World<'_>, number: usize, mut random: Random) -> anyhow::Result<Option<Pod>> {
    let mut containers = 0_usize;
    let mut name = || {
        containers += 1;
        format!("w{number}-{containers}")
    };
    let mut pod = Pod::create(world.context, &name())?;
    let mut lives = false;
    while world.calls.load(Ordering::Relaxed) < world.wanted {
        lives = world.add(&mut pod, &mut random)?;
        if lives && random.chance(30) {
            thread::sleep(Duration::from_millis(u64::try_from(random.below(50))?));
        }
        world.forget(&pod);
        if random.chance(10) {
            // A node's runtime that lost all memory of it: the namespace goes, no DEL comes.
            pod = Pod::create(world.context, &name())?;
            lives = false;
            continue;
        }
        while !world.del(&pod, &mut random)? {}
        pod.becomes(&name());
        lives = false;
    }
    // What lives on was added in peace.
    if !lives && random.chance(50) {
        let added = wait::until_ok("an address", wait::SETTLED, || {
            let reply = pod.call(world.node, "ADD", &[])?;
            if reply.status.success() {
                pod.take_result(reply)?;
                return Ok(());
            }
            pod.del(world.node)?;
            bail!("not yet: {reply:?}")
        });
        added?;
        world.note(&pod)?;
        return Ok(Some(pod));
    }
    pod.del(world.node)?;
    Ok(None)
}

impl World<'_> {
    fn call(&self, pod: &Pod, verb: &str, random: &mut Random) -> anyhow::Result<Reply> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if !random.chance(40) {
            return pod.call(self.node, verb, &[]);
        }
        let after = Duration::from_micros(u64::try_from(random.below(LONGEST))?);
        let reply = pod.call_and_kill(self.node, verb, after)?;
        if reply.was_killed() {
            self.killed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(reply)
    }

    /// Whether the pod lives now.
    fn add(&self, pod: &mut Pod, random: &mut Random) -> anyhow::Result<bool> {
        let reply = self.call(pod, "ADD", random)?;
        if !reply.status.success() {
            return Ok(false);
        }
        pod.take_result(reply)?;
        self.note(pod)?;
        Ok(true)
    }

    /// Whether it was carried out to its end.
    fn del(&self, pod: &Pod, random: &mut Random) -> anyhow::Result<bool> {
        let reply = self.call(pod, "DEL", random)?;
        if reply.was_killed() {
            return Ok(false);
        }
        reply.result()?;
        Ok(true)
    }

    fn note(&self, pod: &Pod) -> anyhow::Result<()> {
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        for ip in pod.ips() {
            let before = in_use.insert(*ip, pod.container().to_owned());
            ensure!(
                before.is_none(),
                "{ip} of {} is also {before:?}'s",
                pod.container()
            );
        }
        Ok(())
    }

    fn forget(&self, pod: &Pod) {
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        in_use.retain(|_, holder| holder != pod.container());
    }
}

/// Calls GC as a runtime that knows these pods.
pub(super) fn gc(node: &Node, caller: &Pod, valid: &[&Pod]) -> anyhow::Result<()> {
    let list: Vec<Value> = valid
        .iter()
        .map(|pod| json!({"containerID": pod.container(), "ifname": "eth0"}))
        .collect();
    let fields = json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": list});
    let output = caller.gc(node, &fields)?.result()?;
    ensure!(output.is_none(), "GC printed {output:?}");
    Ok(())
}

/// Leases and interfaces are those of these pods.
fn only_these_are_left(node: &Node, valid: &[&Pod]) -> anyhow::Result<()> {
    let leased: BTreeSet<String> = leases(node)?
        .into_iter()
        .map(|row| row.container_id)
        .collect();
    let wanted: BTreeSet<String> = valid.iter().map(|pod| pod.container().to_owned()).collect();
    ensure!(
        leased == wanted,
        "leases of {leased:?} instead of {wanted:?}"
    );
    let links = host_ends(node)?;
    ensure!(
        links.len() == valid.len(),
        "{} links: {links:?}",
        links.len()
    );
    Ok(())
}

/// Every lease, as the agent tells them.
pub(super) fn leases(node: &Node) -> anyhow::Result<Vec<PodRow>> {
    let mut client = Client::connect(&node.socket(), Duration::from_secs(30))?;
    let mut rows = Vec::new();
    let mut after = None;
    loop {
        match client.call(Call::Pods { after })? {
            Answer::Pods(mut page) => {
                rows.append(&mut page.rows);
                match page.next {
                    None => return Ok(rows),
                    next => after = next,
                }
            }
            other => bail!("pods: {other:?}"),
        }
    }
}

/// An agent that finds pods without leases gives them theirs, before it gives
/// anybody an address; STATUS and GC go on as before.
pub(super) fn lost_leases_are_adopted(context: &mut Context) -> anyhow::Result<()> {
    const LIVE: usize = 3;
    let ranges = ["10.244.1.0/29", "fd00:10:244:1::/125"];
    let node = Node::with_pod_ranges(context, "node-a", &ranges)?;
    node.start()?;
    let pods = (0..LIVE)
        .map(|index| Pod::added(context, &node, &format!("old-{index}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    node.kill9()?;
    fs::remove_file(node.state().join("leases.redb"))?;
    node.start()?;
    // Two addresses of five are left, and no pod gets one that is in use.
    let mut new = vec![
        Pod::added(context, &node, "new-0")?,
        Pod::added(context, &node, "new-1")?,
    ];
    let distinct: BTreeSet<IpAddr> = pods
        .iter()
        .chain(&new)
        .flat_map(Pod::ips)
        .copied()
        .collect();
    ensure!(distinct.len() == 10, "{distinct:?}");
    let status = json!({"cniVersion": "1.1.0"});
    let full = new[0].call_with(&node, "STATUS", &status)?;
    ensure!(full.code() == Some(50), "STATUS of a full node: {full:?}");
    let third = Pod::create(context, "new-2")?.call(&node, "ADD", &[])?;
    ensure!(third.code() == Some(11), "ADD on a full node: {third:?}");
    // The network stands in the alias, so GC knows what was adopted.
    gc(&node, &pods[0], &[&pods[0], &new[1]])?;
    only_these_are_left(&node, &[&pods[0], &new[1]])?;
    let ready = new[0].call_with(&node, "STATUS", &status)?.result()?;
    ensure!(ready.is_none(), "{ready:?}");
    // One address of a pod's own choice, and one that another has.
    let ip = new[0].ips()[0];
    let asked = json!({"runtimeConfig": {"ips": [ip.to_string()]}});
    let reply = new[0].call_with(&node, "ADD", &asked)?;
    new[0].take_result(reply)?;
    ensure!(
        new[0].ips().contains(&ip),
        "{:?} without {ip}",
        new[0].ips()
    );
    let taken = pods[1].call_with(&node, "ADD", &asked)?;
    ensure!(taken.code() == Some(101), "{taken:?}");
    for pod in pods.iter().chain(&new) {
        pod.del(&node)?;
    }
    nothing_left(&node)?;
    fill(context, &node, 5)
}

/// Where the routes to pods were lost with the leases, the pods themselves tell their
/// addresses; a pod whose alias does not tell its container keeps its addresses all the
/// same, without a lease. No other pod gets any of them.
pub(super) fn lost_leases_and_routes(context: &mut Context) -> anyhow::Result<()> {
    let ranges = ["10.244.1.0/29", "fd00:10:244:1::/125"];
    let node = Node::with_pod_ranges(context, "node-a", &ranges)?;
    node.start()?;
    let told = Pod::added(context, &node, "told")?;
    // Too long for an alias.
    let mut untold = Pod::create(context, "untold")?.with_container("x".repeat(250));
    untold.add(&node)?;
    node.kill9()?;
    fs::remove_file(node.state().join("leases.redb"))?;
    for family in ["-4", "-6"] {
        node.netns()
            .output("ip", &[family, "route", "flush", "proto", "101"])?;
    }
    ensure!(routes_to(&node, &told)? == 0, "the routes are still there");
    node.start()?;
    let mut pods = vec![told, untold];
    for index in 0..3 {
        pods.push(Pod::added(context, &node, &format!("new-{index}"))?);
    }
    let distinct: BTreeSet<IpAddr> = pods.iter().flat_map(Pod::ips).copied().collect();
    ensure!(distinct.len() == 10, "{distinct:?}");
    let full = Pod::create(context, "new-3")?.call(&node, "ADD", &[])?;
    ensure!(full.code() == Some(11), "ADD on a full node: {full:?}");
    let problems = problems(&node)?;
    let named = problems.iter().any(|problem| {
        let mut ips = pods[1].ips().iter();
        ips.any(|ip| problem.contains(&format!("{ip} at fer")))
    });
    ensure!(named, "status says nothing of it: {problems:#?}");
    // A look puts right what has a lease by now, and gives free what is gone.
    gc(&node, &pods[0], &pods.iter().collect::<Vec<_>>())?;
    ensure!(routes_to(&node, &pods[0])? == 2, "no routes to a live pod");
    let untold = pods.remove(1);
    untold.del(&node)?;
    gc(&node, &pods[0], &pods.iter().collect::<Vec<_>>())?;
    pods.push(Pod::added(context, &node, "new-4")?);
    pods.iter().try_for_each(|pod| pod.del(&node))?;
    nothing_left(&node)?;
    fill(context, &node, 5)
}

/// How many of a pod's addresses the node has a route of the plugin to.
fn routes_to(node: &Node, pod: &Pod) -> anyhow::Result<usize> {
    let mut text = String::new();
    for family in ["-4", "-6"] {
        let arguments = [family, "route", "show", "proto", "101"];
        text += &node.netns().output("ip", &arguments)?;
    }
    let first = text.lines().filter_map(|line| line.split(' ').next());
    let to: BTreeSet<&str> = first.collect();
    let ips = pod.ips().iter().map(ToString::to_string);
    Ok(ips.filter(|ip| to.contains(ip.as_str())).count())
}

/// What `status` says is wrong.
fn problems(node: &Node) -> anyhow::Result<Vec<String>> {
    wait::until_ok("a status", wait::SETTLED, || {
        let mut client = Client::connect(&node.socket(), Duration::from_secs(30))?;
        match client.call(Call::Status)? {
            Answer::Status(status) => {
                let problems = status.problems.into_iter();
                Ok(problems.map(|problem| problem.problem).collect())
            }
            other => bail!("status: {other:?}"),
        }
    })
}

/// What nobody calls for is put right by the agent itself, once no ADD can be
/// under way any more; a pod that lives is not touched. (Minutes pass, so the
/// clock must be one that skips idle time.)
pub(super) fn what_is_left_behind_is_put_right(context: &mut Context) -> anyhow::Result<()> {
    const STEP: Duration = Duration::from_secs(10);
    const STEPS: usize = 60;
    let node = Node::create(context, "node-a")?;
    node.start()?;
    let live = Pod::added(context, &node, "live")?;
    let cut_off = Pod::added(context, &node, "cut-off")?;
    for ip in cut_off.ips() {
        let family = if ip.is_ipv6() { "-6" } else { "-4" };
        node.netns()
            .output("ip", &[family, "route", "del", &ip.to_string()])?;
    }
    let half = Pod::create(context, "half")?;
    let killed = half.call(&node, "ADD", &[("FERRULE_FAULT_STEP", "link-made")])?;
    ensure!(killed.was_killed(), "{killed:?}");
    // Its namespace goes with it, and the veth; the shaper stays.
    let mut gone = Pod::create(context, "gone")?;
    let limits =
        json!({"runtimeConfig": {"bandwidth": {"egressRate": 8_000_000, "egressBurst": 800_000}}});
    let reply = gone.call_with(&node, "ADD", &limits)?;
    gone.take_result(reply)?;
    drop(gone);
    ensure!(leases(&node)?.len() == 4);
    ensure!(shapers(&node)?.len() == 1, "{:?}", shapers(&node)?);
    let right = || -> anyhow::Result<()> {
        only_these_are_left(&node, &[&live, &cut_off])?;
        ensure!(shapers(&node)?.is_empty(), "{:?}", shapers(&node)?);
        for ip in cut_off.ips() {
            let family = if ip.is_ipv6() { "-6" } else { "-4" };
            let to = ["route", "show", "proto", "101"];
            let routes = node.netns().output("ip", &[&[family][..], &to].concat())?;
            ensure!(
                routes.contains(&ip.to_string()),
                "no route to {ip} in {routes}"
            );
        }
        Ok(())
    };
    // At once nothing may be taken but the shaper: an ADD could be at work.
    ensure!(leases(&node)?.len() == 4, "{:?}", leases(&node)?);
    let mut last = right();
    for _ in 0..STEPS {
        if last.is_ok() {
            break;
        }
        thread::sleep(STEP);
        last = right();
    }
    last?;
    ensure!(live.netns().links()?.contains(&"eth0".to_owned()));
    live.del(&node)?;
    cut_off.del(&node)?;
    nothing_left(&node)
}

/// Devices that shape what comes from pods.
fn shapers(node: &Node) -> anyhow::Result<Vec<String>> {
    let mut links = node.netns().links()?;
    links.retain(|link| link.starts_with("feb"));
    Ok(links)
}
