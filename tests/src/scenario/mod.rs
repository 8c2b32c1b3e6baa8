//! Scenarios: a folder each below `tests/scenarios`, whose name says what holds.
//!
//! `manifests.yaml` is the cluster, and its head ([`citation`]) cites the row of the service
//! semantics that is shown, from which `docs/semantics.md` is made; `config.yaml`, where there is one, is the agent's
//! configuration; `cast.yaml` other Nodes than all scenarios have; `foreign.nft` what another program has on the node, and `findings.txt` what
//! `ferrule-agent check` says of it; `addresses.txt` what else node-a is called;
//! `before.yaml` the cluster from which the node comes to what `manifests.yaml` asks for, and
//! `before.ipvs` what a former agent then did to IPVS, as `ipvsadm -R` reads it. `packets.txt` is written by hand ([`table`]): who calls what, who answers, whom it sees.
//! `plan.json`, `ipvs.txt`, `sets.txt` and `vips.txt` are what is planned and what the
//! kernel then holds; `UPDATE_GOLDEN=1` writes these four anew and prints what is new.
//!
//! The [`cast`] is the same for all, in fresh namespaces for each. No agent runs: the
//! model and the datapath are called in the node's namespace ([`kernel`]), so that a
//! scenario takes a second or two on an emulated machine.

mod calls;
mod cast;
mod citation;
mod control;
mod departure;
mod health;
mod kernel;
mod sample;
mod semantics;
mod straightforward;
mod table;
mod trace;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ferrule_datapath::filter::counters::DROPPED;
use ferrule_model::cluster::Event;
use ferrule_model::kube::Object;
use ferrule_model::plan::Plan;
use ferrule_model::view::NodeView;

use self::cast::Cast;
use self::citation::Citation;
use self::table::{Expected, Row};
use crate::config::Config;
use crate::context::Context;
use crate::dump::{self, Table};
use crate::process::Process;
use crate::runner::{Group, Test};
use crate::source::document;
use crate::{golden, netns};

/// How long one may take on a slow machine.
const LIMIT: Duration = Duration::from_mins(5);

/// What the names of their tests begin with.
pub(crate) const PREFIX: &str = "scenario/";

/// Node objects and service networks of all scenarios, but for those that have their own.
const CAST: &str = "cast.yaml";

/// Files that a scenario may have.
const FILES: [&str; 13] = [
    "manifests.yaml",
    "config.yaml",
    CAST,
    "foreign.nft",
    "findings.txt",
    "addresses.txt",
    "before.yaml",
    "before.ipvs",
    "packets.txt",
    "plan.json",
    "ipvs.txt",
    "sets.txt",
    "vips.txt",
];

/// A test for each folder.
#[must_use]
pub fn tests() -> Vec<Test> {
    let test = |name: String| Test {
        // There are some hundred, once a run.
        name: format!("{PREFIX}{name}").leak(),
        group: Group::Ipvs,
        limit: LIMIT,
        run,
    };
    let plans = Test {
        name: "plan/of-scenarios-is-what-the-command-prints",
        group: Group::Native,
        limit: LIMIT,
        run: plan_is_what_the_command_prints,
    };
    let page = Test {
        name: "docs/semantics-come-from-the-scenarios",
        group: Group::Native,
        limit: LIMIT,
        run: semantics_come_from_the_scenarios,
    };
    let traces = Test {
        name: "trace/of-scenarios-agree-with-their-packets",
        group: Group::Native,
        limit: LIMIT,
        run: trace::agree_with_their_packets,
    };
    let sample = Test {
        name: "verdict/packets-fare-as-the-model-says",
        group: Group::Ipvs,
        limit: LIMIT,
        run: sample::packets_fare_as_the_model_says,
    };
    let scenarios = names().unwrap_or_default().into_iter().map(test);
    let controls = control::tests().into_iter();
    [plans, page, traces, sample]
        .into_iter()
        .chain(scenarios)
        .chain(controls)
        .collect()
}

/// `docs/semantics.md`, byte for byte; no row of the semantics is without a scenario, and none
/// has two that are the same.
fn semantics_come_from_the_scenarios(_: &mut Context) -> anyhow::Result<()> {
    let mut heads = BTreeMap::new();
    for name in names()? {
        let manifests = read(&folder().join(&name).join("manifests.yaml"))?;
        let head = Citation::parse(&manifests).with_context(|| name.clone())?;
        heads.insert(name, head);
    }
    golden::check_file(&semantics::file(), &semantics::page(&heads)?)?;
    let missing = semantics::missing(&heads);
    ensure!(missing.is_empty(), "no scenario shows {missing:?}");
    let twice = twice()?;
    ensure!(twice.is_empty(), "these have the same content: {twice:?}");
    Ok(())
}

/// Scenarios whose files all have the same content, whatever stands in the head of their manifests.
fn twice() -> anyhow::Result<Vec<Vec<String>>> {
    let mut same: BTreeMap<Vec<(String, String)>, Vec<String>> = BTreeMap::new();
    for name in names()? {
        let scenario = folder().join(&name);
        let mut files = Vec::new();
        for file in FILES.iter().filter(|file| scenario.join(file).exists()) {
            let text = read(&scenario.join(file))?;
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            files.push(((*file).to_owned(), lines.collect::<Vec<_>>().join("\n")));
        }
        same.entry(files).or_default().push(name);
    }
    let names = same.into_values();
    Ok(names.filter(|names| names.len() > 1).collect())
}

/// `plan.json` of every scenario, byte for byte.
fn plan_is_what_the_command_prints(context: &mut Context) -> anyhow::Result<()> {
    let agent = context.binary("ferrule-agent")?;
    let names = names()?;
    ensure!(!names.is_empty(), "there is no scenario");
    let mut wrong = Vec::new();
    for name in names {
        let scenario = folder().join(&name);
        let manifests = context.folder().join(&name);
        fs::create_dir(&manifests)?;
        fs::copy(cast_of(&scenario), manifests.join(CAST))?;
        fs::copy(
            scenario.join("manifests.yaml"),
            manifests.join("manifests.yaml"),
        )?;
        let mut command = Command::new(&agent);
        command.args(["plan", "--node", cast::NODE, "--output", "json"]);
        command.arg("--manifests").arg(&manifests);
        let config = scenario.join("config.yaml");
        if config.exists() {
            command.arg("--config").arg(config);
        }
        let printed = netns::check(&mut command)?;
        if let Err(error) = golden::check_file(&scenario.join("plan.json"), &printed) {
            wrong.push(format!("{error:#}"));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

/// The file of Node objects and service networks that a scenario has.
fn cast_of(scenario: &Path) -> PathBuf {
    let own = scenario.join(CAST);
    if own.exists() {
        own
    } else {
        folder().join(CAST)
    }
}

fn names() -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

fn run(context: &mut Context) -> anyhow::Result<()> {
    let name = context.name();
    let name = name.strip_prefix(PREFIX).context("no scenario's test")?;
    let scenario = Scenario::read(&folder().join(name))?;
    let plan = scenario.view()?;
    let mut json = serde_json::to_string_pretty(&Plan::new(&plan, []))?;
    json.push('\n');
    let cast = Cast::assemble(context, scenario.calls_sctp())?;
    scenario.prepare(&cast)?;
    let view = scenario.program(&cast)?;
    scenario.check_findings(context, &cast)?;
    let agent = scenario.start_agent(context, &cast)?;
    let drops = calls::check(&scenario.rows, &cast, &view).verdict();
    // Both are told: what the kernel holds often says why a packet went astray.
    let counted = scenario.check_dumps(&json, &cast);
    drop(agent);
    let (drops, counted) = match (drops, counted) {
        (drops, Ok(counted)) => (drops?, counted),
        (Ok(_), Err(dumps)) => return Err(dumps),
        (Err(error), Err(dumps)) => bail!("{error:#}\n{dumps:#}"),
    };
    ensure!(
        counted >= drops,
        "{drops} calls vanished, and the counters know of {counted} dropped packets"
    );
    Ok(())
}

/// A folder, read.
struct Scenario {
    folder: PathBuf,
    objects: Vec<Object>,
    config: Config,
    rows: Vec<Row>,
    foreign: Option<PathBuf>,
    /// The cluster as it was before.
    before: Option<Vec<Object>>,
}

impl Scenario {
    fn read(folder: &Path) -> anyhow::Result<Self> {
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            let known = FILES.iter().any(|file| name == *file);
            ensure!(known, "{} is no file of a scenario", name.display());
        }
        let manifests = read(&folder.join("manifests.yaml"))?;
        Citation::parse(&manifests)?;
        let mut objects = objects(&read(&cast_of(folder))?)?;
        objects.extend(self::objects(&manifests)?);
        let rows = table::parse(&read(&folder.join("packets.txt"))?, &objects)?;
        ensure!(!rows.is_empty(), "packets.txt has no packet");
        let existing = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
        let before = existing("before.yaml").map(|path| self::objects(&read(&path)?));
        Ok(Self {
            before: before.transpose()?,
            config: Config::read(existing("config.yaml").as_deref())?,
            foreign: existing("foreign.nft"),
            folder: folder.to_owned(),
            objects,
            rows,
        })
    }

    fn calls_sctp(&self) -> bool {
        self.rows.iter().any(Row::calls_sctp)
    }

    /// What node-a makes of it; as yet without addresses of a machine, as in a plan.
    fn view(&self) -> anyhow::Result<NodeView> {
        self.view_of(&self.objects)
    }

    fn view_of(&self, objects: &[Object]) -> anyhow::Result<NodeView> {
        let mut view = NodeView::new(cast::NODE, self.config.policy.clone());
        view.take(applied(objects));
        ensure!(
            view.cluster().node(cast::NODE).is_some(),
            "there is no Node object of {}",
            cast::NODE
        );
        Ok(view)
    }

    /// What is there before us.
    fn prepare(&self, cast: &Cast) -> anyhow::Result<()> {
        let node = cast.node();
        if let Some(addresses) = self.existing("addresses.txt") {
            let networks = read(&addresses)?;
            let networks = networks.lines().map(str::parse);
            cast.add_addresses(&networks.collect::<Result<Vec<_>, _>>()?)?;
        }
        if let Some(rules) = &self.foreign {
            node.output("nft", &["-f", &rules.to_string_lossy()])?;
        }
        if self.rows.iter().any(|row| !row.wait.is_zero()) {
            // An affinity does not end before the flows that it led.
            node.output("ipvsadm", &["--set", "0", "0", "1"])?;
        }
        Ok(())
    }

    /// Programs the node, by way of what was before where there is such.
    fn program(&self, cast: &Cast) -> anyhow::Result<NodeView> {
        let own = cast.own_addresses()?;
        let Some(before) = &self.before else {
            let mut view = self.view()?;
            view.set_own(own);
            kernel::program(cast.node(), &view)?;
            return Ok(view);
        };
        let of_cast = objects(&read(&cast_of(&self.folder))?)?;
        let mut view = self.view_of(&[of_cast, before.clone()].concat())?;
        view.set_own(own);
        kernel::program(cast.node(), &view)?;
        self.restore(cast)?;
        let gone = before.iter().map(Object::key);
        let gone = gone.filter(|key| self.objects.iter().all(|object| object.key() != *key));
        view.take(gone.map(Event::Deleted).chain(applied(&self.objects)));
        kernel::program(cast.node(), &view)?;
        Ok(view)
    }

    /// What a former agent did to IPVS.
    fn restore(&self, cast: &Cast) -> anyhow::Result<()> {
        match self.existing("before.ipvs") {
            Some(former) => kernel::restore(cast.node(), &former),
            None => Ok(()),
        }
    }

    /// What the agent's check says of the node, as far as `findings.txt` asks.
    fn check_findings(&self, context: &Context, cast: &Cast) -> anyhow::Result<()> {
        let Some(findings) = self.existing("findings.txt") else {
            return Ok(());
        };
        let mut command = Command::new(context.binary("ferrule-agent")?);
        command.args([
            "check",
            "--output",
            "json",
            "--node",
            cast::NODE,
            "--manifests",
        ]);
        command.arg(self.copy_manifests(context)?);
        command
            .arg("--state-dir")
            .arg(context.folder().join("state"));
        command
            .arg("--socket")
            .arg(context.folder().join("agent.sock"));
        // It also says what else is amiss in a virtual machine, and may fail for it.
        let said = cast.node().run(|| Ok(command.output()?))?;
        let said = String::from_utf8_lossy(&said.stdout);
        for finding in read(&findings)?.lines() {
            ensure!(said.contains(finding), "no {finding:?} in:\n{said}");
        }
        Ok(())
    }

    /// The agent itself, where something is asked that only it answers.
    fn start_agent(&self, context: &Context, cast: &Cast) -> anyhow::Result<Option<Process>> {
        let says = |row: &Row| matches!(row.expected, Expected::Says(_));
        if !self.rows.iter().any(says) {
            return Ok(None);
        }
        let config = self.existing("config.yaml");
        let manifests = self.copy_manifests(context)?;
        health::start(context, cast, &manifests, config.as_deref()).map(Some)
    }

    /// The cluster alone, as a folder that the agent can watch.
    fn copy_manifests(&self, context: &Context) -> anyhow::Result<PathBuf> {
        let manifests = context.folder().join("manifests");
        fs::create_dir_all(&manifests)?;
        fs::copy(cast_of(&self.folder), manifests.join(CAST))?;
        let own = "manifests.yaml";
        fs::copy(self.folder.join(own), manifests.join(own))?;
        Ok(manifests)
    }

    fn existing(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.join(name)).filter(|path| path.exists())
    }

    /// Compares what is planned and what the kernel holds. Returns how many packets
    /// our table has dropped.
    fn check_dumps(&self, plan: &str, cast: &Cast) -> anyhow::Result<u64> {
        let node = cast.node();
        let table = Table::list(node, kernel::TABLE)?;
        let dumps = [
            ("plan.json", plan.to_owned()),
            ("ipvs.txt", dump::ipvs(node)?),
            ("sets.txt", table.sets()?),
            ("vips.txt", dump::bindings(node)?),
        ];
        let mut wrong = Vec::new();
        for (name, actual) in dumps {
            if let Err(error) = golden::check_file(&self.folder.join(name), &actual) {
                wrong.push(format!("{error:#}"));
            }
        }
        ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
        let dropped = DROPPED.into_iter().map(|counter| table.packets(counter));
        dropped.sum()
    }
}

fn applied(objects: &[Object]) -> impl Iterator<Item = Event> {
    let objects = objects.iter().cloned().map(Box::new);
    objects.map(Event::Applied)
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

fn objects(text: &str) -> anyhow::Result<Vec<Object>> {
    let parsed = document::parse(text);
    let errors: Vec<String> = parsed.errors.iter().map(ToString::to_string).collect();
    ensure!(errors.is_empty(), "{}", errors.join("\n"));
    Ok(parsed.objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_folder_is_a_scenario_that_can_be_read() {
        let names = names().unwrap();
        assert!(!names.is_empty());
        let mut wrong = Vec::new();
        for name in &names {
            if let Err(error) = Scenario::read(&folder().join(name)) {
                wrong.push(format!("{name}: {error:#}"));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
