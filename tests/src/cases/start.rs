//! An agent that cannot start says why in one sentence, and leaves everything as
//! it was. Those who ask before are told the same.

mod full;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use redb::{Database, TableDefinition};
use serde_json::Value;

pub(super) use self::full::every_write_can_fail;
use super::audit::status;
use crate::context::Context;
use crate::disk::Disk;
use crate::node::Node;
use crate::pod::Pod;
use crate::process::Process;
use crate::wait;

/// How long an agent may take to find out that it cannot start: ten seconds of
/// patience with another, and then some.
const REFUSAL: Duration = Duration::from_mins(1);

/// Nobody's user.
const NOBODY: u32 = 65534;

/// A bad situation.
struct Situation<'a> {
    what: &'a str,
    /// Arguments in the place of the node's, by their option.
    instead: Vec<(&'a str, PathBuf)>,
    user: Option<u32>,
    /// What the sentence must say.
    says: &'a [&'a str],
}

impl<'a> Situation<'a> {
    fn new(what: &'a str, instead: Vec<(&'a str, PathBuf)>, says: &'a [&'a str]) -> Self {
        Self {
            what,
            instead,
            user: None,
            says,
        }
    }
}

/// In each bad situation: exit status 1, one line of the log, and nothing changed
/// on the disk or in the kernel.
pub(super) fn refused_in_one_sentence(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let place = context.folder().join("place");
    fs::create_dir(&place)?;
    let file = place.join("file");
    fs::write(&file, "precious")?;
    fs::create_dir(place.join("folder"))?;
    let broken = place.join("config.yaml");
    fs::write(
        &broken,
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\nx: 1\n",
    )?;
    let disk = Disk::create(&place.join("disk"), 64 * 1024)?;
    disk.set_read_only(true)?;
    let long = place.join("x".repeat(108));
    let situations = [
        Situation::new(
            "a long path",
            vec![("--socket", long)],
            &["bytes", "107", "--socket"],
        ),
        Situation::new(
            "a file in the socket's place",
            vec![("--socket", file.clone())],
            &["a file that is no socket", "left as it is"],
        ),
        Situation::new(
            "a folder in the socket's place",
            vec![("--socket", place.join("folder"))],
            &["is a folder"],
        ),
        Situation::new(
            "a socket below a file",
            vec![("--socket", file.join("agent.sock"))],
            &["cannot be written to", "--socket"],
        ),
        Situation::new(
            "a file in the state folder's place",
            vec![("--state-dir", file.clone())],
            &["cannot be written to", "move aside"],
        ),
        Situation::new(
            "a read-only disk",
            vec![("--state-dir", place.join("disk/state"))],
            &["Read-only file system", "mount it for writing"],
        ),
        Situation::new(
            "a wrong configuration",
            vec![("--config", broken)],
            &["config.yaml", "line 3: x"],
        ),
        Situation::new(
            "a kubeconfig that is none",
            vec![("--kubeconfig", file)],
            &["kubeconfig", "kubectl can work with"],
        ),
        Situation {
            user: Some(NOBODY),
            ..Situation::new(
                "no rights",
                Vec::new(),
                &["lacks CAP_NET_ADMIN", "run ferrule-agent as root"],
            )
        },
    ];
    for situation in &situations {
        refused(context, &node, situation)?;
    }
    Ok(())
}

/// Lease files that cannot be believed are named and stay byte for byte.
pub(super) fn a_lease_file_in_doubt_is_left_alone(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    node.start()?;
    let pod = Pod::added(context, &node, "pod")?;
    node.stop()?;
    let path = node.state().join("leases.redb");
    let good = fs::read(&path)?;
    let text = pod.ips()[0].to_string();
    let at = good
        .windows(text.len())
        .rposition(|window| window == text.as_bytes())
        .context("the address stands in the file")?;
    let mut flipped = good.clone();
    flipped[at] ^= 1;
    let mut format = good.clone();
    format[64] = 9;
    format[192] = 9;
    let damaged = &["leases.redb is damaged", "left as it is", "drain the node"][..];
    let newer = &["knows up to", "install the release"][..];
    for (what, bytes, says) in [
        ("garbage", b"garbage".to_vec(), damaged),
        ("nothing", Vec::new(), damaged),
        ("a half", good[..good.len() / 2].to_vec(), damaged),
        ("a flipped bit", flipped, damaged),
        ("a newer format", format, newer),
        ("a newer version", versioned(context, &good)?, newer),
    ] {
        fs::write(&path, bytes)?;
        refused(context, &node, &Situation::new(what, Vec::new(), says))?;
    }
    fs::write(&path, good)?;
    node.start()?;
    pod.del(&node)?;
    Ok(())
}

/// The file as a later release would write it.
fn versioned(context: &Context, good: &[u8]) -> anyhow::Result<Vec<u8>> {
    let path = context.folder().join("newer.redb");
    fs::write(&path, good)?;
    let database = Database::open(&path)?;
    let write = database.begin_write()?;
    let table: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
    write.open_table(table)?.insert("version", 2)?;
    write.commit()?;
    drop(database);
    Ok(fs::read(&path)?)
}

/// A second agent gets neither state folder, socket, table nor device of the
/// first, which goes on as before; in another namespace it gets the same names.
pub(super) fn a_second_agent_is_refused(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    // Where there is such a module; the agent would load it later.
    let _none = Command::new("modprobe").arg("ip_vs").output();
    node.start()?;
    // It listens before it has made its settings, which it notes on disk.
    wait::until_ok("the first agent's settings", wait::SETTLED, || {
        let record = fs::read_to_string(node.state().join("sysctls.json"))?;
        ensure!(record.contains("ipv6/conf/all/forwarding"), "{record}");
        // Those of IPVS come last, where it is.
        let ipvs = node.netns().sysctl("ipv4/vs/conntrack").is_ok();
        let is_made = record.contains("vs/expire_quiescent_template");
        let device = node
            .netns()
            .links()?
            .iter()
            .any(|name| name == "kube-ipvs0");
        ensure!(!ipvs || (is_made && device), "{record}");
        Ok(())
    })?;
    let own = |name: &str| context.folder().join(name);
    let state = ("--state-dir", own("state"));
    let socket = ("--socket", own("agent.sock"));
    let table = ("--nft-table", PathBuf::from("other"));
    let device = ("--vip-device", PathBuf::from("other0"));
    for (what, instead, says) in [
        ("folder", vec![&socket, &table, &device], "state folder"),
        (
            "socket",
            vec![&state, &table, &device],
            "another agent listens on",
        ),
        (
            "table",
            vec![&state, &socket, &device],
            "nftables table ferrule",
        ),
        (
            "device",
            vec![&state, &socket, &table],
            "VIP device kube-ipvs0",
        ),
    ] {
        let instead = instead.into_iter().cloned().collect();
        refused(
            context,
            &node,
            &Situation::new(what, instead, &[says, "stop "]),
        )?;
        let _made_for_it = fs::remove_dir(&state.1);
    }
    node.check_alive()?;
    let elsewhere = Node::create(context, "node-b")?;
    elsewhere.start()?;
    // A stranger who takes the name keeps no agent from starting.
    elsewhere.stop()?;
    let name = "ferrule-agent/--nft-table/ferrule";
    // A program that the agent has started may have its sockets for a moment longer.
    let _stranger = wait::for_some("the name of the stopped agent", wait::SETTLED, || {
        Ok(elsewhere.netns().run(|| as_nobody(name)).ok())
    })?;
    elsewhere.start()?;
    ensure!(
        elsewhere.log()?.contains("a stranger's socket"),
        "the log does not tell"
    );
    node.check_alive()
}

/// A socket of another user under an abstract name.
fn as_nobody(name: &str) -> anyhow::Result<UnixListener> {
    use std::os::linux::net::SocketAddrExt as _;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    let user = rustix::process::Uid::from_raw(NOBODY);
    // Of this thread alone, which ends with this.
    rustix::thread::set_thread_res_uid(user, user, user)?;
    Ok(UnixListener::bind_addr(&address)?)
}

/// `check` tells what is there as it is, changes nothing, and may be asked by
/// anybody and beside an agent.
pub(super) fn a_check_changes_nothing(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let before = everything(context, &node)?;
    let told = check(context, &node, None)?;
    ensure!(
        everything(context, &node)? == before,
        "the check changed something"
    );
    for (check, result, words) in [
        ("rights", "ok", "CAP_NET_ADMIN"),
        ("state folder", "ok", "will be made"),
        ("lease file", "ok", "will be made"),
        ("socket", "ok", "is free"),
        ("agent", "ok", "none runs"),
        ("configuration", "ok", "none is given"),
        ("manifests", "ok", "can be read"),
        ("Node object", "ok", "node-a is among"),
        ("CNI plugin", "ok", "for CNI 0."),
        ("CNI configuration", "warning", "has none"),
        ("nftables", "ok", "takes our ruleset"),
    ] {
        expect(&told, check, result, words)?;
    }
    let told = check(context, &node, Some(NOBODY))?;
    expect(&told, "rights", "failed", "user 65534")?;
    expect(&told, "nftables", "warning", "only root")?;
    node.write_manifest("broken.yaml", "kind: [")?;
    node.write_config("apiVersion: x\n")?;
    let told = check(context, &node, None)?;
    expect(&told, "configuration", "failed", "apiVersion")?;
    fs::remove_file(node.state().with_file_name("config.yaml"))?;
    let told = check(context, &node, None)?;
    expect(&told, "manifests", "warning", "broken.yaml")?;
    node.remove_manifest("broken.yaml")?;
    node.start()?;
    let told = check(context, &node, None)?;
    expect(&told, "lease file", "ok", "open in an agent that runs")?;
    expect(&told, "socket", "ok", "an agent listens")?;
    expect(&told, "agent", "ok", "one runs, process ")?;
    node.kill9()?;
    // A child of it that was about to become another program may have its lock a moment longer.
    wait::until_ok("an agent that is gone", wait::SETTLED, || {
        let told = check(context, &node, None)?;
        expect(&told, "lease file", "ok", "is sound: version 1, leases: 0")?;
        expect(&told, "socket", "ok", "was left by an agent that is gone")
    })
}

/// A node that lacks IPVS says so in `status`, with what to do for good; one that
/// has all passes the check.
pub(super) fn what_the_kernel_lacks_is_told(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    let told = check(context, &node, None)?;
    let lacks = told
        .iter()
        .any(|row| row["check"] == "IPVS" && row["result"] == "failed");
    node.start()?;
    if lacks {
        expect(&told, "IPVS", "failed", "no IPVS")?;
        expect(&told, "VIP device", "failed", "no dummy devices")?;
        wait::until_ok("a problem in status", wait::SETTLED, || {
            let told = status(context, &node)?["problems"].to_string();
            ensure!(told.contains("this kernel has no IPVS"), "{told}");
            ensure!(told.contains("/etc/modules-load.d/ferrule.conf"), "{told}");
            Ok(())
        })?;
    } else {
        let failed: Vec<&Value> = told
            .iter()
            .filter(|row| row["result"] == "failed")
            .collect();
        ensure!(failed.is_empty(), "{failed:#?}");
        wait::until_ok("a healthy node", wait::SETTLED, || {
            let told = status(context, &node)?;
            ensure!(told["health"] == "healthy", "{told:#}");
            Ok(())
        })?;
    }
    node.stop()
}

fn expect(told: &[Value], check: &str, result: &str, words: &str) -> anyhow::Result<()> {
    let row = told
        .iter()
        .find(|row| row["check"] == check)
        .with_context(|| format!("no check {check:?} in {told:#?}"))?;
    let found = row["found"].as_str().unwrap_or_default();
    ensure!(
        row["result"] == result && found.contains(words),
        "{check}: {row:#}"
    );
    let silent = row["remedy"].as_str().unwrap_or_default().is_empty();
    ensure!(result == "ok" || !silent, "no remedy: {row:#}");
    Ok(())
}

/// What `check` prints as JSON.
fn check(context: &Context, node: &Node, user: Option<u32>) -> anyhow::Result<Vec<Value>> {
    let binary = context.binary("ferrule-agent")?;
    let plugins = binary.parent().context("a folder")?.to_owned();
    let mut command = arguments(context, node, "check", &[])?;
    command.args(["--output", "json"]);
    command.arg("--cni-bin-dir").arg(plugins);
    command.arg("--cni-conf-dir").arg(node.manifests());
    if let Some(user) = user {
        command.uid(user);
    }
    let output = node.netns().run(|| Ok(command.output()?))?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let failed = rows.iter().any(|row| row["result"] == "failed");
    let code = output.status.code();
    ensure!(
        code == Some(i32::from(failed)),
        "exit status {code:?}: {rows:#?}"
    );
    Ok(rows)
}

/// The agent's command line for a node.
fn arguments(
    context: &Context,
    node: &Node,
    verb: &str,
    instead: &[(&str, PathBuf)],
) -> anyhow::Result<Command> {
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .arg(verb)
        .args(["--node", node.netns().name(), "--metrics", "none"]);
    let mut options: BTreeMap<&str, PathBuf> = BTreeMap::from([
        ("--manifests", node.manifests()),
        ("--state-dir", node.state()),
        ("--socket", node.socket()),
    ]);
    let config = node.state().with_file_name("config.yaml");
    if config.exists() {
        options.insert("--config", config);
    }
    options.extend(instead.iter().cloned());
    for (option, value) in options {
        command.arg(option).arg(value);
    }
    command.env("NO_COLOR", "1").stdin(Stdio::null());
    Ok(command)
}

fn refused(context: &Context, node: &Node, situation: &Situation<'_>) -> anyhow::Result<()> {
    let what = situation.what;
    let before = everything(context, node)?;
    let log = context.folder().join("refused.log");
    let mut command = arguments(context, node, "run", &situation.instead)?;
    let file = File::create(&log)?;
    command.stdout(file.try_clone()?).stderr(file);
    if let Some(user) = situation.user {
        command.uid(user);
    }
    let mut agent: Process = node.netns().spawn(&mut command)?;
    let status = agent.wait(REFUSAL).with_context(|| what.to_owned())?;
    let said = fs::read_to_string(&log)?;
    fs::remove_file(&log)?;
    ensure!(status.code() == Some(1), "{what}: {status}: {said}");
    let errors: Vec<&str> = said.lines().filter(|line| line.contains("ERROR")).collect();
    let [sentence] = errors[..] else {
        bail!("{what}: not one sentence: {said}");
    };
    for words in situation.says {
        ensure!(
            sentence.contains(words),
            "{what}: {words:?} is not in {sentence}"
        );
    }
    let after = everything(context, node)?;
    ensure!(
        after == before,
        "{what}: changed from {before:#?} to {after:#?}"
    );
    Ok(())
}

/// Everything that a start could change: files, and the network's devices, tables
/// and settings.
fn everything(context: &Context, node: &Node) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    walk(context.folder(), &mut found)?;
    found.insert(
        "links".to_owned(),
        node.netns().links()?.join(" ").into_bytes(),
    );
    let tables = node.netns().output("nft", &["list", "tables"])?;
    found.insert("tables".to_owned(), tables.into_bytes());
    let forwarding = node.netns().sysctl("ipv4/ip_forward")?;
    found.insert("forwarding".to_owned(), forwarding.into_bytes());
    Ok(found)
}

fn walk(folder: &Path, found: &mut BTreeMap<String, Vec<u8>>) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let kind = fs::symlink_metadata(&path)?.file_type();
        let name = path.display().to_string();
        if kind.is_dir() {
            found.insert(name, b"folder".to_vec());
            walk(&path, found)?;
        } else if path.extension().is_none_or(|extension| extension != "log") {
            let bytes = if kind.is_file() {
                fs::read(&path).unwrap_or_default()
            } else {
                Vec::new()
            };
            found.insert(name, bytes);
        }
    }
    Ok(())
}
