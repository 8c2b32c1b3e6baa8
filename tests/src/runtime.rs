//! A container runtime on a node: containerd and runc as the distribution ships
//! them, with containers that get their network from the plugin.
//!
//! `ctr run --cni` reads fixed folders (`/etc/cni/net.d`, `/opt/cni/bin`) and
//! everything here leaves traces below `/run` and `/var/lib`. So a runtime sees
//! those folders of its own, in a mount namespace that ends with it: the machine
//! sees none of this, and its file tree may be read-only. Images are not needed:
//! all containers share one folder, with busybox in it, as their root.

use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::fs::statfs;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use serde_json::{Value, json};

use crate::context::Context;
use crate::netns;
use crate::node::Node;
use crate::process::Process;
use crate::wait;

/// How long containerd may take to start, and a container to start or to end:
/// some ten programs of many megabytes, which an emulated machine reads first.
const PATIENCE: Duration = Duration::from_mins(3);

/// How long processes may take to be gone that were killed.
const DEATH: Duration = Duration::from_secs(10);

/// The list that an operator installs; the one that the documentation shows.
const CONFLIST: &str = include_str!("../../examples/10-ferrule.conflist");

/// What a container can call.
const APPLETS: [&str; 4] = ["sh", "httpd", "nc", "sleep"];

/// A running containerd. Dropping it ends it and every container.
#[derive(Debug)]
pub struct Runtime<'a> {
    containerd: Process,
    node: &'a Node,
    folder: PathBuf,
    logs: PathBuf,
    namespace: String,
}

impl<'a> Runtime<'a> {
    /// Starts containerd in the namespace of the node, with our plugin and the
    /// list of the documentation installed.
    ///
    /// # Errors
    /// When it or the plugin is missing, or it takes too long.
    pub fn start(context: &Context, node: &'a Node) -> anyhow::Result<Self> {
        let folder = context.folder().join("containerd");
        install(context, node, &folder)?;
        make_root(&folder.join("rootfs"))?;
        fs::write(folder.join("config.toml"), config(&folder))?;
        let log = File::create(context.folder().join("containerd.log"))?;
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(folder.join("config.toml"))
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let containerd = node.netns().run(|| {
            take_own_view(&folder)?;
            Process::spawn(&mut command)
        })?;
        let mut runtime = Self {
            containerd,
            node,
            folder,
            logs: context.folder().to_owned(),
            // Also the name of a cgroup, which is the machine's: other runs have others.
            namespace: format!("ferrule-{}", std::process::id()),
        };
        wait::until_ok("an answer of containerd", PATIENCE, || {
            if let Some(status) = runtime.containerd.ended()? {
                bail!("containerd ended at its start: {status}");
            }
            ensure!(runtime.socket().exists(), "no socket");
            runtime.run_ctr(&["version"]).map(drop)
        })?;
        Ok(runtime)
    }

    /// Starts a container that runs a shell script, without waiting for it.
    ///
    /// # Errors
    /// When there is no `ctr`.
    pub fn launch(&self, name: &str, script: &str) -> anyhow::Result<Container<'_>> {
        let log = self.logs.join(format!("{name}.log"));
        let output = File::create(&log)?;
        let mut command = self.ctr();
        command
            // No shares: not every machine lets the one hierarchy control the CPU.
            .args(["run", "--rm", "--cni", "--cpu-shares", "0"])
            .args(["--read-only", "--rootfs"])
            .arg(self.folder.join("rootfs"))
            .args([name, "/bin/sh", "-c"])
            .arg(format!("echo {READY}; {script}"))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        Ok(Container {
            ctr: self.within(|| Process::spawn(&mut command))?,
            runtime: self,
            name: name.to_owned(),
            log,
        })
    }

    /// What the plugin gets as `CNI_CONTAINERID` of a container.
    #[must_use]
    pub fn container_id(&self, name: &str) -> String {
        format!("{}-{name}", self.namespace)
    }

    /// Names of the containers that it knows.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn containers(&self) -> anyhow::Result<Vec<String>> {
        let text = self.run_ctr(&["containers", "list", "--quiet"])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    fn socket(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command
            .arg("--address")
            .arg(self.socket())
            .args(["--namespace", &self.namespace])
            .env_clear()
            .env("PATH", PATH);
        command
    }

    fn run_ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.within(|| netns::check(self.ctr().args(arguments)))
    }

    /// Runs `work` on a thread that sees what containerd sees.
    fn within<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let view = File::open(format!("/proc/{}/ns/mnt", self.containerd.id()))?;
        self.node.netns().run(|| {
            // SAFETY: the thread's own root and working folder concern no other
            // thread; only sharing them stands in the way of the next step.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
            move_into_link_name_space(view.as_fd(), Some(LinkNameSpaceType::Mount))
                .context("enter the runtime's mount namespace")?;
            work()
        })
    }

    /// Ends what containerd leaves running by design: containers and their shims.
    fn end_containers(&self) -> anyhow::Result<()> {
        let tasks = self.folder.join("state/io.containerd.runtime.v2.task");
        let tasks = tasks.join(&self.namespace);
        for task in fs::read_dir(tasks)?.flatten() {
            let pid = fs::read_to_string(task.path().join("init.pid"))?;
            kill(&pid);
        }
        let socket = self.socket().display().to_string();
        for entry in fs::read_dir("/proc")?.flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            if command.contains("containerd-shim") && command.contains(&socket) {
                kill(&entry.file_name().to_string_lossy());
            }
        }
        Ok(())
    }

    /// runc leaves the cgroup of the namespace, and those of containers that it
    /// was not asked to delete.
    fn remove_cgroups(&self) -> anyhow::Result<()> {
        let cgroup = Path::new(CGROUPS).join(&self.namespace);
        self.within(|| {
            // Those who were killed leave it when they are dead.
            wait::until_ok("an empty cgroup", DEATH, || remove_cgroup(&cgroup))
        })
    }
}

impl Drop for Runtime<'_> {
    fn drop(&mut self) {
        // Nothing runs after a test that passed. After another what is left must
        // not outlive it, and there is nobody to tell what could not be ended.
        let _nothing_ran = self.end_containers();
        let _still_in_use = self.remove_cgroups();
    }
}

/// A container, run by a `ctr` that removes it and its network when it ends.
#[derive(Debug)]
pub struct Container<'a> {
    ctr: Process,
    runtime: &'a Runtime<'a>,
    name: String,
    log: PathBuf,
}

impl Container<'_> {
    /// Waits until its script runs, which is after its network has been made.
    ///
    /// # Errors
    /// When it ended, with all that was said, or takes too long.
    pub fn wait_until_it_runs(&mut self) -> anyhow::Result<()> {
        wait::for_some("a container that runs", PATIENCE, || {
            let said = fs::read_to_string(&self.log)?;
            if let Some(status) = self.ctr.ended()? {
                bail!("container {}: {status}: {said}", self.name);
            }
            Ok(said.contains(READY).then_some(()))
        })
    }

    /// Waits until the runtime gives up on it, and returns what it said. The name
    /// is free then.
    ///
    /// # Errors
    /// When it runs, or takes too long.
    pub fn wait_until_it_fails(mut self) -> anyhow::Result<String> {
        let status = self.ctr.wait(PATIENCE)?;
        let said = fs::read_to_string(&self.log)?;
        ensure!(
            !status.success() && !said.contains(READY),
            "container {} was started: {said}",
            self.name
        );
        // ctr itself cannot delete what it has created and not started.
        let runtime = self.runtime;
        runtime.run_ctr(&["tasks", "delete", "--force", &self.name])?;
        runtime.run_ctr(&["containers", "delete", &self.name])?;
        Ok(said)
    }

    /// Fetches a page from within it. With `nc`, because the `wget` of a static
    /// busybox looks numbers up as names, with libraries that are not there.
    ///
    /// # Errors
    /// When nobody answers, or not with a page.
    pub fn fetch(&self, ip: IpAddr, port: u16, page: &str) -> anyhow::Result<String> {
        let script = format!("printf 'GET /{page} HTTP/1.0\\r\\n\\r\\n' | nc -w 20 {ip} {port}");
        let exec = ["tasks", "exec", "--exec-id", "fetch", &self.name];
        let shell = ["/bin/sh", "-c", &script];
        let answer = self.runtime.run_ctr(&[exec.as_slice(), &shell].concat())?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200 ") => Ok(body.trim().to_owned()),
            _ => bail!("{ip}:{port} said {answer:?}"),
        }
    }

    /// Kills it, and waits until the runtime has taken its network away.
    ///
    /// # Errors
    /// When the runtime complains, or takes too long.
    pub fn remove(mut self) -> anyhow::Result<()> {
        let kill = ["tasks", "kill", "--signal", "SIGKILL", &self.name];
        self.runtime.run_ctr(&kill)?;
        let status = self.ctr.wait(PATIENCE)?;
        let said = fs::read_to_string(&self.log)?;
        // ctr hands on the status of what was killed, whatever became of the network.
        ensure!(
            status.code() == Some(KILLED) && said.trim() == READY,
            "removal of container {}: {status}: {said}",
            self.name
        );
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a container says first.
const READY: &str = "ready";

/// What a shell tells of a process that SIGKILL has ended.
const KILLED: i32 = 128 + 9;

/// Where a runtime sees cgroups, and the kernel's number of the one hierarchy's
/// file system (`CGROUP2_SUPER_MAGIC` in linux/magic.h).
const CGROUPS: &str = "/sys/fs/cgroup";
const CGROUP2: rustix::fs::FsWord = 0x6367_7270;

/// containerd looks for its shim and for runc there, and the shim for itself.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The plugin and its list, below folders named as those they are laid over.
fn install(context: &Context, node: &Node, folder: &Path) -> anyhow::Result<()> {
    let (etc, opt) = (folder.join("etc/cni/net.d"), folder.join("opt/cni/bin"));
    fs::create_dir_all(&etc)?;
    fs::create_dir_all(&opt)?;
    fs::copy(context.binary("ferrule")?, opt.join("ferrule"))?;
    let mut list: Value = serde_json::from_str(CONFLIST)?;
    list["plugins"][0]["agentSocket"] = json!(node.socket());
    list["plugins"][0]["stateDir"] = json!(node.state());
    fs::write(etc.join("10-ferrule.conflist"), list.to_string())?;
    Ok(())
}

/// What a container sees as its root.
fn make_root(root: &Path) -> anyhow::Result<()> {
    for folder in ["bin", "dev", "etc", "proc", "run", "sys"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let busybox = netns::check(Command::new("sh").args(["-c", "command -v busybox"]))?;
    fs::copy(busybox.trim(), root.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

/// Kubernetes' interface and the image stores are not used, and take time to start.
fn config(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "version = 2
root = \"{folder}/root\"
state = \"{folder}/state\"
disabled_plugins = [\"io.containerd.grpc.v1.cri\"]
[grpc]
address = \"{folder}/c.sock\"
[ttrpc]
address = \"{folder}/t.sock\"
"
    )
}

/// Gives the calling thread, and what it starts, a view of the machine in which
/// the plugin is installed and whatever else is written goes with the view.
fn take_own_view(folder: &Path) -> anyhow::Result<()> {
    // SAFETY: as in `netns::unshare_network`: no descriptors are unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.context("unshare mounts")?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    for name in ["etc", "opt"] {
        // Without an upper folder, because an overlay cannot be one, which /tmp may be.
        let options = format!("lowerdir={}:/{name}\0", folder.join(name).display());
        let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes())?;
        let at = format!("/{name}");
        mount("overlay", &at, "overlay", MountFlags::empty(), options)
            .with_context(|| format!("lay the plugin's files over {at}"))?;
    }
    for at in ["/run", "/var/lib"] {
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), None)
            .with_context(|| format!("an empty {at}"))?;
    }
    // The one hierarchy, on machines as well that use the old ones.
    if statfs(CGROUPS)?.f_type != CGROUP2 {
        mount("cgroup2", CGROUPS, "cgroup2", MountFlags::empty(), None).context("cgroups")?;
    }
    Ok(())
}

fn remove_cgroup(path: &Path) -> anyhow::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    Ok(fs::remove_dir(path)?)
}

fn kill(pid: &str) {
    if let Some(pid) = pid.trim().parse().ok().and_then(Pid::from_raw) {
        let _gone = kill_process(pid, Signal::KILL);
    }
}
