//! A pod: a namespace whose network the real plugin makes, called as a
//! container runtime calls it.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;
use crate::wait;

/// How long an ADD may be put off by an agent that is not ready.
const READY: Duration = Duration::from_mins(1);

/// The specification's code for "try again later".
const TRY_AGAIN: u64 = 11;

/// A pod. Dropping it takes its namespace away, as a runtime does after DEL.
#[derive(Debug)]
pub struct Pod {
    netns: Netns,
    container: String,
    plugin: PathBuf,
    extra: Value,
    ips: Vec<IpAddr>,
    /// `runtimeConfig` of the network configuration.
    runtime_config: Option<Value>,
}

/// What a call of the plugin ended with.
#[derive(Debug)]
pub struct Reply {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output: a result, an error object, or nothing.
    pub output: Option<Value>,
    /// Standard error.
    pub complaint: String,
}

impl Reply {
    /// The code of the error object.
    #[must_use]
    pub fn code(&self) -> Option<u64> {
        self.output.as_ref()?.get("code")?.as_u64()
    }

    /// The result of a call that worked.
    ///
    /// # Errors
    /// With all that the plugin said, when it did not.
    pub fn result(self) -> anyhow::Result<Option<Value>> {
        if self.status.success() {
            return Ok(self.output);
        }
        bail!(
            "the plugin failed with {}: {} {}",
            self.status,
            self.output.unwrap_or_default(),
            self.complaint
        )
    }

    /// Whether the plugin was killed, by itself or another.
    #[must_use]
    pub fn was_killed(&self) -> bool {
        self.status.signal().is_some()
    }
}

impl Pod {
    /// A pod without a network; its name is also its container's.
    ///
    /// # Errors
    /// When the plugin has not been built, or the namespace cannot be made.
    pub fn create(context: &Context, name: &str) -> anyhow::Result<Self> {
        Ok(Self {
            netns: context.netns(name)?,
            container: name.to_owned(),
            plugin: context.binary("ferrule")?,
            extra: json!({}),
            ips: Vec::new(),
            runtime_config: None,
        })
    }

    /// What the runtime asks for beside the network, such as `portMappings`.
    #[must_use]
    pub fn with_runtime_config(mut self, config: Value) -> Self {
        self.runtime_config = Some(config);
        self
    }

    /// Has the container another ID than the pod's name.
    #[must_use]
    pub fn with_container(mut self, id: String) -> Self {
        self.container = id;
        self
    }

    /// A pod with its network.
    ///
    /// # Errors
    /// As [`Pod::create`] and [`Pod::add`].
    pub fn added(context: &Context, node: &Node, name: &str) -> anyhow::Result<Self> {
        let mut pod = Self::create(context, name)?;
        pod.add(node)?;
        Ok(pod)
    }

    /// Sets further fields of the network configuration, for the calls to come.
    pub fn configure(&mut self, extra: Value) {
        self.extra = extra;
    }

    /// Has the network made, again and again while the answer is "try again
    /// later", as kubelet does. The addresses are [`Pod::ips`] from then on.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn add(&mut self, node: &Node) -> anyhow::Result<Value> {
        let reply = wait::for_some("an agent that is ready", READY, || {
            let reply = self.call(node, "ADD", &[])?;
            Ok((reply.code() != Some(TRY_AGAIN)).then_some(reply))
        })?;
        self.take_result(reply)
    }

    /// Has the network made in one call, for better or worse.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn add_once(&mut self, node: &Node) -> anyhow::Result<Value> {
        let reply = self.call(node, "ADD", &[])?;
        self.take_result(reply)
    }

    /// Takes the addresses of a result.
    ///
    /// # Errors
    /// When the call failed.
    pub fn take_result(&mut self, reply: Reply) -> anyhow::Result<Value> {
        let result = reply.result()?.context("ADD printed no result")?;
        self.ips = addresses(&result)?;
        Ok(result)
    }

    /// Has the network removed; to be called as often as one likes.
    ///
    /// # Errors
    /// When the plugin fails.
    pub fn del(&self, node: &Node) -> anyhow::Result<()> {
        let output = self.call(node, "DEL", &[])?.result()?;
        ensure!(output.is_none(), "DEL printed {output:?}");
        Ok(())
    }

    /// Calls the plugin in the namespace of the node.
    ///
    /// # Errors
    /// When it cannot be started or its output is no JSON.
    pub fn call(
        &self,
        node: &Node,
        verb: &str,
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Reply> {
        self.converse(node, verb, &json!({}), environment, None)
    }

    /// Likewise with further fields of the network configuration.
    ///
    /// # Errors
    /// As [`Pod::call`].
    pub fn call_with(&self, node: &Node, verb: &str, fields: &Value) -> anyhow::Result<Reply> {
        self.converse(node, verb, fields, &[], None)
    }

    /// Likewise, and kills the plugin after a while, if it has not ended by then.
    /// What it had printed counts only if it ended by itself.
    ///
    /// # Errors
    /// As [`Pod::call`].
    pub fn call_and_kill(&self, node: &Node, verb: &str, after: Duration) -> anyhow::Result<Reply> {
        self.converse(node, verb, &json!({}), &[], Some(after))
    }

    fn converse(
        &self,
        node: &Node,
        verb: &str,
        fields: &Value,
        environment: &[(&str, &str)],
        kill_after: Option<Duration>,
    ) -> anyhow::Result<Reply> {
        let mut config = json!({
            "cniVersion": "1.0.0",
            "name": "ferrule",
            "type": "ferrule",
            "agentSocket": node.socket(),
            "stateDir": node.state(),
        });
        if let Some(runtime) = &self.runtime_config {
            config["runtimeConfig"] = runtime.clone();
        }
        let extra = self.extra.as_object().into_iter().flatten();
        let fields = fields.as_object().context("fields are an object")?;
        for (name, value) in extra.chain(fields) {
            config[name] = value.clone();
        }
        let name = &self.container;
        let mut command = Command::new(&self.plugin);
        // A runtime's own environment is of no use to the plugin; neither is ours.
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", name)
            .env("CNI_NETNS", self.netns.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", self.plugin.parent().context("a folder")?)
            .env(
                "CNI_ARGS",
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name}"),
            )
            .envs(environment.iter().copied());
        let output = node
            .netns()
            .run(|| converse(&mut command, &config.to_string(), kill_after))
            .with_context(|| format!("{verb} of {name}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let text = if output.status.signal().is_some() {
            ""
        } else {
            text.trim()
        };
        Ok(Reply {
            status: output.status,
            output: if text.is_empty() {
                None
            } else {
                let value = serde_json::from_str(text);
                Some(value.with_context(|| format!("the plugin printed {text:?}"))?)
            },
            complaint: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Calls GC, which is about no pod, with these fields of the network configuration.
    ///
    /// # Errors
    /// As [`Pod::call`].
    pub fn gc(&self, node: &Node, fields: &Value) -> anyhow::Result<Reply> {
        let absent = [
            ("CNI_CONTAINERID", ""),
            ("CNI_IFNAME", ""),
            ("CNI_NETNS", ""),
        ];
        self.converse(node, "GC", fields, &absent, None)
    }

    /// From now on this is another container in the same namespace.
    pub fn becomes(&mut self, container: &str) {
        container.clone_into(&mut self.container);
        self.ips.clear();
    }

    /// Its addresses, IPv4 first.
    #[must_use]
    pub fn ips(&self) -> &[IpAddr] {
        &self.ips
    }

    /// Its address of the family of another.
    ///
    /// # Errors
    /// When it has none.
    pub fn ip_like(&self, other: IpAddr) -> anyhow::Result<IpAddr> {
        self.ips
            .iter()
            .copied()
            .find(|ip| ip.is_ipv4() == other.is_ipv4())
            .with_context(|| format!("{} has no address of {other}'s family", self.name()))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.netns.name()
    }

    /// The ID of its container.
    #[must_use]
    pub fn container(&self) -> &str {
        &self.container
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }
}

/// Lines of `ferrule --fault-steps`: a verb and the name of a step of it.
///
/// # Errors
/// When the plugin was built without the feature `fault-injection`.
pub fn fault_steps(context: &Context) -> anyhow::Result<Vec<(String, String)>> {
    let mut command = Command::new(context.binary("ferrule")?);
    let text = crate::netns::check(command.arg("--fault-steps"))
        .context("the plugin under test needs the feature fault-injection")?;
    text.lines()
        .map(|line| match line.split_once(' ') {
            Some((verb, step)) => Ok((verb.to_owned(), step.to_owned())),
            None => bail!("{line:?} is not a verb and a step"),
        })
        .collect()
}

fn converse(
    command: &mut Command,
    input: &str,
    kill_after: Option<Duration>,
) -> anyhow::Result<std::process::Output> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that ends before it reads is judged by how it ended.
        let _broken_pipe = stdin.write_all(input.as_bytes());
    }
    if let Some(after) = kill_after {
        std::thread::sleep(after);
        // One that has ended is not waited for yet, so its number is its own.
        child.kill()?;
    }
    Ok(child.wait_with_output()?)
}

fn addresses(result: &Value) -> anyhow::Result<Vec<IpAddr>> {
    let mut ips = result["ips"]
        .as_array()
        .with_context(|| format!("no ips in {result}"))?
        .iter()
        .map(|ip| {
            let text = ip["address"].as_str().context("no address")?;
            let (ip, _) = text.split_once('/').context("no prefix length")?;
            Ok(ip.parse()?)
        })
        .collect::<anyhow::Result<Vec<IpAddr>>>()?;
    ips.sort();
    Ok(ips)
}
