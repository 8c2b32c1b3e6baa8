//! The unit of `examples/`, as it is, under a systemd of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ferrule_api_server::{ApiServer, Streaming};

use super::world;
use crate::api::{self, Api};
use crate::context::Context;
use crate::dump;
use crate::netns;
use crate::node::{Node, POD_RANGES, manifest};
use crate::process::Process;
use crate::wait;

const UNIT: &str = "ferrule-agent.service";

/// What the agent may be silent for here, in place of minutes.
const SILENCE: Duration = Duration::from_secs(10);

/// For systemd to do something, on a machine that is emulated.
const PATIENCE: Duration = Duration::from_mins(1);

/// Lays the unit and its files over those of the machine, for this process and what it starts.
const INSIDE: &str = r#"
set -e
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$1/etc:/etc" /etc
system=/usr/lib/systemd/system
for place in /run /var/lib /usr/local/bin $system-generators $system/*.wants /etc/systemd/system/*.wants; do
    mount -t tmpfs tmpfs "$place" -o mode=755
done
ln -s "$2" /usr/local/bin/ferrule-agent
grep -q ' /sys/fs/cgroup cgroup2 ' /proc/mounts || mount -t cgroup2 cgroup2 /sys/fs/cgroup
container=ferrule-tests exec /lib/systemd/systemd --system --unit="$3" --log-target=console
"#;

/// A systemd that runs the unit and nothing else.
struct Manager {
    process: Process,
}

impl Manager {
    fn start(context: &Context, node: &Node) -> anyhow::Result<Self> {
        let folder = context.folder().join("systemd");
        install(&folder, &context.folder().join("unit.log"))?;
        let log = fs::File::create(context.folder().join("systemd.log"))?;
        let mut command = Command::new("unshare");
        command
            .args(["--fork", "--kill-child", "--pid", "--mount-proc"])
            .args(["--mount", "--uts", "--ipc", "--cgroup"])
            .args(["bash", "-c", INSIDE, "bash"])
            .args([&folder, &context.binary("ferrule-agent")?])
            .arg(UNIT)
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = node.netns().spawn(&mut command)?;
        Ok(Self { process })
    }

    /// Runs a program beside it.
    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let unshare = self.process.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children"))?;
        let systemd = children.split_whitespace().next().context("no systemd")?;
        let mut command = Command::new("nsenter");
        command
            .args(["--target", systemd, "--mount", "--pid", "--net"])
            .args(arguments);
        netns::check(&mut command)
    }

    fn show(&self, property: &str) -> anyhow::Result<String> {
        let told = self.run(&["systemctl", "show", "--value", "--property", property, UNIT])?;
        Ok(told.trim().to_owned())
    }

    fn wait_until_active(&self) -> anyhow::Result<()> {
        wait::until_ok("an active unit", PATIENCE, || {
            let state = self.show("ActiveState")?;
            let jobs = self.run(&["systemctl", "list-jobs"])?;
            ensure!(state == "active", "{state}\n{jobs}");
            Ok(())
        })
    }
}

/// The unit as an operator installs it, and targets that start nothing else.
fn install(folder: &Path, log: &Path) -> anyhow::Result<()> {
    let units = folder.join("etc/systemd/system");
    let more = units.join(format!("{UNIT}.d"));
    let own = folder.join("etc/ferrule");
    for folder in [&more, &own] {
        fs::create_dir_all(folder)?;
    }
    let examples = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples");
    fs::copy(examples.join(UNIT), units.join(UNIT))?;
    let log = log.display();
    let seconds = SILENCE.as_secs();
    let drop_in = format!(
        "[Service]\nWatchdogSec={seconds}\nStandardOutput=append:{log}\nStandardError=append:{log}\n"
    );
    fs::write(more.join("test.conf"), drop_in)?;
    for target in ["sysinit", "basic", "network-online", "shutdown"] {
        let text = format!("[Unit]\nDescription={target}\nDefaultDependencies=no\n");
        fs::write(units.join(format!("{target}.target")), text)?;
    }
    fs::write(folder.join("etc/machine-id"), "")?;
    fs::write(folder.join("etc/hostname"), "node-a\n")?;
    fs::write(own.join("kubeconfig"), Api::kubeconfig())?;
    fs::write(
        own.join("config.yaml"),
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n",
    )?;
    Ok(())
}

/// It is ready, goes on, is started again when it says nothing any more, and leaves everything
/// as it is when it is stopped.
pub(super) fn the_unit_runs(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let server = ApiServer::new(Streaming::Served);
    api::put_all(&server, &manifest("node-a", &POD_RANGES, &[]))?;
    let add = |name: &str, number: u8| {
        api::put_all(&server, &world::service(name, number, 80))?;
        let ips = ["10.244.2.9".parse()?, "fd00:10:244:2::9".parse()?];
        let endpoint = world::Endpoint {
            ips: &ips,
            node: Some("node-b"),
            conditions: world::READY,
        };
        api::put_all(&server, &world::endpoint_slices(name, &[endpoint])?)
    };
    let programmed = |number: u8| {
        let vip = format!("{}:80", world::vips(number)[0]);
        wait::until_ok("a Service", PATIENCE, || {
            let table = dump::ipvs(node.netns())?;
            ensure!(table.contains(&vip), "no {vip}\n{table}");
            Ok(())
        })
    };
    add("web", 10)?;
    let _api = Api::start(node.netns(), &server)?;
    let manager = Manager::start(context, &node)?;
    wait::until_ok("an answer of systemd", PATIENCE, || manager.show("Id"))?;
    manager.wait_until_active()?;
    programmed(10)?;

    let first = manager.show("MainPID")?;
    manager.run(&["systemctl", "reload", UNIT])?;
    // It says that it is alive.
    thread::sleep(SILENCE * 3 / 2);
    let still = manager.show("MainPID")?;
    ensure!(still == first, "the process was {first} and is {still}");

    manager.run(&["kill", "-STOP", &first])?;
    wait::until_ok("another process", PATIENCE, || {
        let next = manager.show("MainPID")?;
        ensure!(next != first && next != "0", "{next}");
        Ok(())
    })?;
    manager.wait_until_active()?;
    programmed(10).context("of the first process")?;
    add("other", 11)?;
    programmed(11).context("of the second process")?;

    manager.run(&["systemctl", "stop", UNIT])?;
    let (state, result) = (manager.show("ActiveState")?, manager.show("Result")?);
    ensure!(
        (&*state, &*result) == ("inactive", "success"),
        "{state}, {result}"
    );
    programmed(10).context("after the stop")?;
    programmed(11).context("after the stop")
}
