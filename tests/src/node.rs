//! A node: a namespace in which the real agent runs.
//!
//! The agent is known by its command line only. Folder of manifests, socket and
//! state are the node's own, so several nodes fit on one machine.

use std::fs::{self, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::Signal;

use crate::api::Api;
use crate::context::Context;
use crate::netns::Netns;
use crate::process::{Process, Usage};
use crate::wait;

/// How long the agent may take to start or to stop.
const AGENT: Duration = Duration::from_mins(1);

/// The pod ranges of a node unless a test wants others.
pub const POD_RANGES: [&str; 2] = ["10.244.1.0/24", "fd00:10:244:1::/64"];

/// The address of the Service `kubernetes` in a pod's environment.
pub const KUBERNETES: &str = "10.96.0.1";

/// The Node object of a node with these pod ranges and addresses, as YAML.
/// An address is its type and itself, such as `("InternalIP", "192.0.2.1")`.
#[must_use]
pub fn manifest(name: &str, ranges: &[&str], addresses: &[(&str, &str)]) -> String {
    let ranges: Vec<String> = ranges.iter().map(|range| format!("{range:?}")).collect();
    let addresses: Vec<String> = addresses
        .iter()
        .map(|(kind, address)| format!("{{type: {kind}, address: {address:?}}}"))
        .collect();
    format!(
        "apiVersion: v1
kind: Node
metadata:
  name: {name}
spec:
  podCIDRs: [{}]
status:
  addresses: [{}]
",
        ranges.join(", "),
        addresses.join(", ")
    )
}

/// A node. Dropping it kills the agent and takes the namespace away.
#[derive(Debug)]
pub struct Node {
    // Fields are dropped in order: the agent before its namespace.
    agent: Mutex<Option<Process>>,
    netns: Netns,
    folder: PathBuf,
    program: PathBuf,
}

impl Node {
    /// A node with the default pod ranges whose agent does not run yet.
    ///
    /// # Errors
    /// When the agent has not been built, or the namespace cannot be made.
    pub fn create(context: &Context, name: &str) -> anyhow::Result<Self> {
        Self::with_pod_ranges(context, name, &POD_RANGES)
    }

    /// Likewise with other pod ranges.
    ///
    /// # Errors
    /// As [`Node::create`].
    pub fn with_pod_ranges(context: &Context, name: &str, ranges: &[&str]) -> anyhow::Result<Self> {
        let folder = context.folder().join(format!("{name}.d"));
        fs::create_dir_all(folder.join("manifests"))?;
        let node = Self {
            agent: Mutex::new(None),
            netns: context.netns(name)?,
            folder,
            program: context.binary("ferrule-agent")?,
        };
        node.write_manifest("node.yaml", &manifest(name, ranges, &[]))?;
        Ok(node)
    }

    /// Starts the agent, with what [`Node::write_config`] wrote, and waits until
    /// it takes calls.
    ///
    /// # Errors
    /// When it runs already, ends, or takes too long.
    pub fn start(&self) -> anyhow::Result<()> {
        let mut running = self.agent();
        ensure!(running.is_none(), "the agent was started before");
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file())?;
        let mut command = Command::new(&self.program);
        command.arg("run");
        if self.service_account().exists() {
            command
                .arg("--in-cluster")
                .arg("--service-account-dir")
                .arg(self.service_account())
                .env("KUBERNETES_SERVICE_HOST", KUBERNETES)
                .env("KUBERNETES_SERVICE_PORT", "443");
        } else if self.kubeconfig().exists() {
            command.arg("--kubeconfig").arg(self.kubeconfig());
        } else {
            command.arg("--manifests").arg(self.manifests());
        }
        command
            .args(["--node", self.netns.name()])
            .arg("--state-dir")
            .arg(self.state())
            .arg("--socket")
            .arg(self.socket());
        if self.config().exists() {
            command.arg("--config").arg(self.config());
        }
        command
            .env("FERRULE_LOG", "debug")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut agent = self.netns.spawn(&mut command)?;
        let socket = self.socket();
        wait::for_some("the agent's socket", AGENT, || {
            if let Some(status) = agent.ended()? {
                bail!("the agent ended at its start: {status}");
            }
            Ok(UnixStream::connect(&socket).ok())
        })?;
        *running = Some(agent);
        Ok(())
    }

    /// Asks the agent to end, and checks that it does so in peace.
    ///
    /// # Errors
    /// When it does not run, reports a failure or takes too long.
    pub fn stop(&self) -> anyhow::Result<()> {
        let mut agent = self.take_agent()?;
        agent.signal(Signal::TERM)?;
        let status = agent.wait(AGENT)?;
        ensure!(status.success(), "the agent ended with {status} on SIGTERM");
        Ok(())
    }

    /// Has the agent read its configuration.
    ///
    /// # Errors
    /// When it does not run.
    pub fn hangup(&self) -> anyhow::Result<()> {
        let mut running = self.agent();
        running
            .as_mut()
            .context("the agent does not run")?
            .signal(Signal::HUP)
    }

    /// Ends the agent at whatever instruction it is.
    ///
    /// # Errors
    /// When it does not run any more.
    pub fn kill9(&self) -> anyhow::Result<()> {
        self.take_agent()?.kill9()
    }

    /// Checks that the agent has not ended by itself.
    ///
    /// # Errors
    /// When it has.
    pub fn check_alive(&self) -> anyhow::Result<()> {
        let mut running = self.agent();
        let agent = running.as_mut().context("the agent does not run")?;
        match agent.ended()? {
            Some(status) => bail!("the agent ended: {status}"),
            None => Ok(()),
        }
    }

    /// Writes the agent's configuration, which takes effect at its next start.
    /// A node without one has an agent without `--config`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_config(&self, yaml: &str) -> anyhow::Result<()> {
        let path = self.config();
        fs::write(&path, yaml).with_context(|| format!("write {}", path.display()))
    }

    /// From its next start on the agent follows the [`Api`] in its namespace
    /// instead of manifests.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn follow_api(&self) -> anyhow::Result<()> {
        self.follow(&Api::kubeconfig(), "")
    }

    /// Likewise with another kubeconfig, and `ca.crt` beside it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn follow(&self, kubeconfig: &str, authority: &str) -> anyhow::Result<()> {
        fs::write(self.folder.join("ca.crt"), authority)?;
        Ok(fs::write(self.kubeconfig(), kubeconfig)?)
    }

    /// From its next start on the agent is a pod of the cluster with a service
    /// account, in whose environment the API is at [`KUBERNETES`].
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn follow_as_pod(&self, authority: &str, token: &str) -> anyhow::Result<()> {
        fs::create_dir_all(self.service_account())?;
        fs::write(self.service_account().join("ca.crt"), authority)?;
        Ok(fs::write(self.service_account().join("token"), token)?)
    }

    /// The folder of the service account.
    #[must_use]
    pub fn service_account(&self) -> PathBuf {
        self.folder.join("serviceaccount")
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    /// What the kernel tells of the agent's process, by its identifier.
    ///
    /// # Errors
    /// When it does not run.
    pub fn usage(&self) -> anyhow::Result<Usage> {
        let pid = self
            .agent()
            .as_ref()
            .context("the agent does not run")?
            .id();
        Usage::of(pid)
    }

    /// Writes a manifest as an editor does: whole, under another name, then renamed.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write_manifest(&self, name: &str, yaml: &str) -> anyhow::Result<()> {
        let path = self.manifests().join(name);
        let draft = self.folder.join("draft");
        fs::write(&draft, yaml)?;
        fs::rename(&draft, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Writes a manifest in place, so that a reader may see half of it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn overwrite_manifest(&self, name: &str, yaml: &str) -> anyhow::Result<()> {
        let path = self.manifests().join(name);
        fs::write(&path, yaml).with_context(|| format!("write {}", path.display()))
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn remove_manifest(&self, name: &str) -> anyhow::Result<()> {
        let path = self.manifests().join(name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// What the agent logged since the node was made.
    ///
    /// # Errors
    /// When it was never started.
    pub fn log(&self) -> anyhow::Result<String> {
        fs::read_to_string(self.log_file()).context("the agent's log")
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where the agent listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// Where agent and plugin keep what survives a restart.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The folder of manifests that the agent watches.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.folder.join("manifests")
    }

    fn config(&self) -> PathBuf {
        self.folder.join("config.yaml")
    }

    fn log_file(&self) -> PathBuf {
        let folder = self.folder.parent().unwrap_or(Path::new("/"));
        folder.join(format!("{}.log", self.netns.name()))
    }

    fn take_agent(&self) -> anyhow::Result<Process> {
        self.agent().take().context("the agent does not run")
    }

    fn agent(&self) -> MutexGuard<'_, Option<Process>> {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
