//! A long random walk: manifests change and change again, and after each batch
//! the kernel holds what `ferrule-agent plan` says of the same folder.

pub(super) mod objects;
pub(super) mod tables;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use ferrule_api::status::{FrontendRow, Status};
use ferrule_api::{Answer, Call, Client};

use self::objects::Cluster;
use super::soak::{self, say};
use super::world;
use crate::context::Context;
use crate::node::Node;
use crate::process::Usage;
use crate::random::{self, Random};
use crate::wait;

/// Repeats a walk.
const SEED: &str = "FERRULE_WALK_SEED";

/// How many changes it has.
const CHANGES: &str = "FERRULE_WALK_CHANGES";

/// Changes unless told otherwise: an emulated machine makes ten in a second.
const USUAL: u64 = 250;

/// Fewest and most changes of a batch.
const BATCH: (usize, usize) = (80, 120);

/// Fewest and most batches before memory is measured: what is kept once (buffers,
/// the largest table that there was) has been kept then.
const WARM_UP: (usize, usize) = (3, 20);

/// What is in the folder whenever memory is measured.
const POPULATION: u64 = 1;

/// Memory at the end may be more than this part of what it was, in percent.
const GROWN: u64 = 105;

/// Longest that a batch may take on an emulated machine.
const SETTLED: Duration = Duration::from_mins(3);

/// Longest that a walk of so many changes may take, in minutes.
pub(super) fn minutes() -> u64 {
    let changes = random::from_environment(CHANGES);
    10 + changes.ok().flatten().unwrap_or(USUAL) / 400
}

/// After each batch of changes the kernel is as planned, to the last element;
/// the agent never mistook its own work for another's, and takes no more
/// memory for the same objects after all changes than before.
pub(super) fn kernel_equals_plan(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    let changes = random::from_environment(CHANGES)?.unwrap_or(USUAL);
    say(&format!("{SEED}={seed} {CHANGES}={changes}"))?;
    walk(context, seed, usize::try_from(changes)?).with_context(|| format!("{SEED}={seed}"))
}

fn walk(context: &Context, seed: u64, wanted: usize) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let _outside = world::outside(context, &node)?;
    node.remove_manifest("node.yaml")?;
    let agent = context.binary("ferrule-agent")?;
    let plan = || soak::plan(&agent, &node);
    let mut walker = Walker {
        node: &node,
        plan: &plan,
        cluster: Cluster::new(),
        random: Random::new(seed),
        lines: 0,
    };
    walker.write()?;
    node.start()?;
    walker.compare().context("at the start")?;
    for _ in 0..(wanted / 1000).clamp(WARM_UP.0, WARM_UP.1) {
        walker.step(BATCH.1)?;
    }
    let before = walker.memory()?;
    let (mut made, mut batches, start) = (0, 0, Instant::now());
    while made < wanted {
        let most = BATCH.0 + walker.random.below(BATCH.1 - BATCH.0 + 1);
        made += walker
            .step(most.min(wanted - made))
            .with_context(|| format!("after {made} changes"))?;
        batches += 1;
        if batches % 10 == 0 {
            let Usage {
                resident,
                anonymous,
                ..
            } = node.usage()?;
            let took = start.elapsed().as_secs();
            say(&format!(
                "{made} changes, {took} s, {resident} KiB, {anonymous} of them its own"
            ))?;
        }
    }
    let took = start.elapsed().as_secs_f64();
    let after = walker.memory()?;
    say(&format!(
        "{made} changes in {batches} batches, {took:.0} s, {} lines compared; memory {} KiB, then \
         {} KiB; of its own {} KiB, then {} KiB",
        walker.lines, before.resident, after.resident, before.anonymous, after.anonymous
    ))?;
    soak::not_grown(before, after, GROWN)?;
    no_errors(&node)?;
    node.check_alive()?;
    node.stop()?;
    walker.sees_a_difference()
}

/// An operation of the kernel that failed and went well at the second try is
/// one that should not have been asked for.
fn no_errors(node: &Node) -> anyhow::Result<()> {
    let log = node.log()?;
    let errors: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" ERROR "))
        // A program that takes half a minute is the emulated machine's fault.
        .filter(|line| !line.contains("did not end within"))
        .collect();
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(())
}

struct Walker<'a> {
    node: &'a Node,
    plan: &'a dyn Fn() -> anyhow::Result<String>,
    cluster: Cluster,
    random: Random,
    /// Lines of tables that were compared so far.
    lines: usize,
}

impl Walker<'_> {
    /// One batch; returns how many objects it changed.
    fn step(&mut self, most: usize) -> anyhow::Result<usize> {
        let made = self.cluster.change(most, &mut self.random);
        self.apply()?;
        Ok(made)
    }

    fn apply(&mut self) -> anyhow::Result<()> {
        self.write()?;
        self.compare()
    }

    fn write(&mut self) -> anyhow::Result<()> {
        for (file, text) in self.cluster.files().iter().enumerate() {
            self.node.write_manifest(&format!("{file}.yaml"), text)?;
        }
        Ok(())
    }

    /// Every file was read when its marker is programmed; what else stood in it
    /// was taken in with the marker, and is done when nothing waits any more.
    fn settle(&self) -> anyhow::Result<Box<Status>> {
        let marks = self.cluster.marks();
        wait::until_ok("every file is read", SETTLED, || {
            self.node.check_alive()?;
            let rows = self.first_frontends()?;
            let programmed: BTreeSet<&str> = rows
                .iter()
                .filter(|row| row.programmed)
                .map(|row| row.address.as_str())
                .collect();
            let mut missing = marks.iter();
            let missing = missing.find(|mark| !programmed.contains(mark.as_str()));
            ensure!(missing.is_none(), "{missing:?} is not programmed");
            Ok(())
        })?;
        let known = self.cluster.counts();
        let routes = tables::routes(&self.cluster.nodes(), self.node.netns().name()).len();
        wait::until_ok("nothing waits", SETTLED, || {
            let status = self.status()?;
            ensure!(status.programmed.pending == 0, "{:?}", status.problems);
            ensure!(status.problem_count == 0, "{:#?}", status.problems);
            let source = &status.source;
            let counts = objects::Counts {
                services: source.services,
                slices: source.endpoint_slices,
                nodes: source.nodes,
            };
            ensure!(counts == known, "{counts:?} instead of {known:?}");
            ensure!(
                status.programmed.routes == routes,
                "{} routes instead of {routes}",
                status.programmed.routes,
            );
            Ok(status)
        })
    }

    /// Compares the kernel with the plan, once: the agent has said that it is done.
    fn compare(&mut self) -> anyhow::Result<()> {
        let status = self.settle()?;
        // What another changed: here there is none, so it took its own work for it.
        ensure!(status.drift.repaired.is_empty(), "{:#?}", status.drift);
        soak::as_planned(&self.difference()?)
    }

    fn difference(&mut self) -> anyhow::Result<Vec<String>> {
        let wanted = tables::of_plan(&(self.plan)()?, &self.cluster.nodes())?;
        let found = tables::of_kernel(self.node.netns())?;
        self.lines += wanted.len();
        Ok(tables::difference(&wanted, &found))
    }

    /// Without an agent that puts it right, what another takes away is missed.
    fn sees_a_difference(&mut self) -> anyhow::Result<()> {
        let marks = self.cluster.marks();
        let mark = marks.first().context("there is a marker")?;
        let mark = mark.trim_end_matches("/TCP");
        self.node.netns().output("ipvsadm", &["-D", "-t", mark])?;
        let difference = self.difference()?;
        let expected = [
            format!("- TCP {mark} rr"),
            format!("- TCP {mark} rr -> 10.244.200.1:8080 Masq 1"),
        ];
        ensure!(difference == expected, "{difference:#?}");
        Ok(())
    }

    /// The markers are among them: their namespace comes first.
    fn first_frontends(&self) -> anyhow::Result<Vec<FrontendRow>> {
        let first = Call::Frontends { after: None };
        match Client::connect(&self.node.socket(), wait::SETTLED)?.call(first)? {
            Answer::Frontends(part) => Ok(part.rows),
            other => bail!("{other:?}"),
        }
    }

    fn status(&self) -> anyhow::Result<Box<Status>> {
        match Client::connect(&self.node.socket(), wait::SETTLED)?.call(Call::Status)? {
            Answer::Status(status) => Ok(status),
            other => bail!("{other:?}"),
        }
    }

    /// Memory for one and the same population.
    fn memory(&mut self) -> anyhow::Result<Usage> {
        self.cluster.clear();
        self.apply().context("nothing but the node")?;
        self.cluster.fill(POPULATION);
        self.apply().context("the population that is measured")?;
        soak::memory(self.node)
    }
}
