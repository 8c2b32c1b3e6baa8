//! A disk that is full, at whatever write.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ferrule_api::{Answer, Call, CallError, Client, ErrorCode, Wanted};
use ferrule_model::names::{Attachment, ContainerId, IfName};

use super::status;
use crate::context::Context;
use crate::disk::Disk;
use crate::node::Node;
use crate::pod::Pod;
use crate::random::{self, Random};
use crate::wait;

/// Repeats the calls.
const SEED: &str = "FERRULE_DISK_SEED";

/// How much room the state folder has, in bytes.
const ROOM: usize = 512 * 1024;

/// How often the disk is filled, each time with another rest, in pages.
const STAGES: usize = 48;
const RESTS: usize = 16;

/// Calls while the disk is full.
const CALLS: usize = 12;

/// Longest that a call may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// While calls come and go the disk fills up at any write: each call works or is
/// told that the disk is full, and once there is room all is well without a
/// restart. No address is given twice and no lease is lost, also by an agent that
/// is killed meanwhile. So it is with the queue of releases.
pub(in crate::cases) fn every_write_can_fail(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    writeln!(std::io::stdout(), "     {SEED}={seed}")?;
    let node = Node::create(context, "node-a")?;
    let disk = Disk::create(&node.state(), ROOM)?;
    first_start(context, &node, &disk)?;
    queue(context, &node, &disk)?;
    let mut runtime = Runtime {
        random: Random::new(seed),
        held: BTreeMap::new(),
        doubtful: BTreeSet::new(),
        next: 0,
        tally: [0; 2],
    };
    for stage in 0..STAGES {
        runtime
            .stage(&node, &disk, stage)
            .with_context(|| format!("stage {stage}, {SEED}={seed}"))?;
    }
    let [worked, failed] = runtime.tally;
    writeln!(
        std::io::stdout(),
        "     full: {worked} calls worked, {failed} were told"
    )?;
    ensure!(worked > 50 && failed > 50, "that shows little");
    node.stop()
}

/// No lease file, and no room for one: the agent runs, says so, and goes on by itself.
fn first_start(context: &Context, node: &Node, disk: &Disk) -> anyhow::Result<()> {
    disk.fill_but(0)?;
    node.start()?;
    let socket = node.socket();
    let error = wait::for_some("an error", wait::SETTLED, || {
        match allocate(&socket, "first")? {
            Answer::Error(error) if is_not_ready(&error) => Ok(None),
            Answer::Error(error) => Ok(Some(error)),
            other => bail!("on a full disk: {other:?}"),
        }
    })?;
    // To be tried again, and no ADD would work now.
    ensure!(error.code == ErrorCode::NotReady, "{error:?}");
    ensure!(error.message.contains("the disk is full"), "{error}");
    match ask(&socket, Call::Ready)? {
        Answer::Error(error) => ensure!(error.message.contains("the disk is full"), "{error}"),
        other => bail!("ready on a full disk: {other:?}"),
    }
    wait::until_ok("a problem in status", wait::SETTLED, || {
        let told = status(context, node)?["problems"].to_string();
        ensure!(
            told.contains("no address can be leased or released"),
            "{told}"
        );
        Ok(())
    })?;
    disk.free()?;
    // Without a pod that comes or goes.
    wait::until_ok("no problem in status", wait::SETTLED, || {
        let told = status(context, node)?["problems"].to_string();
        ensure!(!told.contains("no address can be leased"), "{told}");
        Ok(())
    })?;
    ensure!(ask(&socket, Call::Ready)? == Answer::Ready, "not ready");
    let mut pod = Pod::create(context, "first")?;
    pod.add(node)?;
    pod.del(node)
}

/// Without an agent and without room a DEL fails, names the disk, and works later.
fn queue(context: &Context, node: &Node, disk: &Disk) -> anyhow::Result<()> {
    let mut pod = Pod::create(context, "queued")?;
    pod.add(node)?;
    node.kill9()?;
    let mut told = 0;
    for pages in 0..3 {
        disk.fill_but(pages)?;
        let reply = pod.call(node, "DEL", &[])?;
        if let Err(error) = reply.result() {
            let words = format!("{error:#}");
            ensure!(
                words.contains("releases") && words.contains("No space left"),
                "{words}"
            );
            told += 1;
        }
    }
    ensure!(told > 0, "the disk was not full");
    disk.free()?;
    pod.del(node)?;
    start(node)?;
    wait::until_ok("the queued release", wait::SETTLED, || {
        let leases = leases(&node.socket())?;
        ensure!(leases.is_empty(), "{leases:?}");
        Ok(())
    })
}

/// What a container runtime knows.
struct Runtime {
    random: Random,
    held: BTreeMap<String, Vec<IpAddr>>,
    /// Containers of calls that failed; to be released until that works.
    doubtful: BTreeSet<String>,
    next: u32,
    /// Calls on the full disk that worked, and that failed.
    tally: [u32; 2],
}

impl Runtime {
    fn stage(&mut self, node: &Node, disk: &Disk, stage: usize) -> anyhow::Result<()> {
        let socket = node.socket();
        if stage.is_multiple_of(2) {
            // A file that has pages to spare fails no longer; a new one does.
            self.anew(node, stage / 2 % 5)?;
        }
        disk.fill_but(stage / 2 % RESTS)?;
        for call in 0..CALLS {
            let worked = self.call(&socket)?;
            self.tally[usize::from(!worked)] += 1;
            if call == CALLS / 2 && stage.is_multiple_of(3) {
                restart(node).context("on a full disk")?;
            }
        }
        disk.free()?;
        // Without a restart.
        for container in std::mem::take(&mut self.doubtful) {
            let answer = ask(&socket, release(&container)?)?;
            ensure!(answer == Answer::Released, "{container}: {answer:?}");
        }
        ensure!(self.add(&socket)?, "there is room");
        ensure!(
            leases(&socket)? == self.held,
            "{:?} and {:?}",
            leases(&socket)?,
            self.held
        );
        if stage.is_multiple_of(4) {
            restart(node)?;
            ensure!(leases(&socket)? == self.held, "after a restart");
        }
        Ok(())
    }

    /// Another node in the same place, with so many leases.
    fn anew(&mut self, node: &Node, count: usize) -> anyhow::Result<()> {
        node.stop()?;
        fs::remove_file(node.state().join("leases.redb"))?;
        self.held.clear();
        start(node)?;
        for _ in 0..count {
            ensure!(self.add(&node.socket())?, "there is room");
        }
        Ok(())
    }

    /// Whether it worked.
    fn call(&mut self, socket: &Path) -> anyhow::Result<bool> {
        let held: Vec<String> = self.held.keys().cloned().collect();
        if held.is_empty() || (held.len() < 60 && self.random.below(3) > 0) {
            return self.add(socket);
        }
        let container = self.random.pick(&held).clone();
        self.held.remove(&container);
        match ask(socket, release(&container)?)? {
            Answer::Released => Ok(true),
            answer => {
                self.doubtful.insert(container);
                told(&answer)
            }
        }
    }

    fn add(&mut self, socket: &Path) -> anyhow::Result<bool> {
        self.next += 1;
        let container = format!("c{}", self.next);
        let answer = wait::for_some("a ready agent", wait::SETTLED, || {
            Ok(match allocate(socket, &container)? {
                Answer::Error(error) if is_not_ready(&error) => None,
                answer => Some(answer),
            })
        })?;
        let Answer::Allocated(allocation) = answer else {
            self.doubtful.insert(container);
            return told(&answer);
        };
        let ips: Vec<IpAddr> = allocation.ips().collect();
        for (other, theirs) in &self.held {
            let twice = ips.iter().any(|ip| theirs.contains(ip));
            ensure!(!twice, "{ips:?} is {other}'s and was given to {container}");
        }
        self.held.insert(container, ips);
        Ok(true)
    }
}

fn restart(node: &Node) -> anyhow::Result<()> {
    node.kill9()?;
    start(node)
}

/// Starts the agent and waits until it answers: a child of one that was killed may
/// still listen, and never does.
fn start(node: &Node) -> anyhow::Result<()> {
    node.start()?;
    wait::until_ok("an answer", wait::SETTLED, || {
        ask(&node.socket(), Call::Status).map(drop)
    })
}

/// Whether the agent has yet to look around, which a disk that is full is not.
fn is_not_ready(error: &CallError) -> bool {
    error.code == ErrorCode::NotReady && !error.message.contains("the disk is full")
}

/// A failure is told as what it is.
fn told(answer: &Answer) -> anyhow::Result<bool> {
    match answer {
        Answer::Error(error) if error.message.contains("the disk is full") => Ok(false),
        other => bail!("a full disk is told as {other:?}"),
    }
}

fn attachment(container: &str) -> anyhow::Result<Attachment> {
    Ok(Attachment {
        container_id: ContainerId::try_from(container.to_owned())?,
        interface: IfName::try_from("eth0".to_owned())?,
    })
}

fn release(container: &str) -> anyhow::Result<Call> {
    Ok(Call::Release {
        attachment: attachment(container)?,
    })
}

fn allocate(socket: &Path, container: &str) -> anyhow::Result<Answer> {
    let call = Call::Allocate(Box::new(Wanted::new(attachment(container)?)));
    ask(socket, call)
}

fn ask(socket: &Path, call: Call) -> anyhow::Result<Answer> {
    Ok(Client::connect(socket, PATIENCE)?.call(call)?)
}

/// Every lease as the agent has it on disk.
fn leases(socket: &Path) -> anyhow::Result<BTreeMap<String, Vec<IpAddr>>> {
    let mut found = BTreeMap::new();
    let mut after = None;
    loop {
        let Answer::Pods(page) = ask(socket, Call::Pods { after })? else {
            bail!("no list of pods");
        };
        for row in page.rows {
            let ips: Result<Vec<IpAddr>, _> = row.addresses.iter().map(|ip| ip.parse()).collect();
            found.insert(row.container_id, ips?);
        }
        after = page.next;
        if after.is_none() {
            return Ok(found);
        }
    }
}
