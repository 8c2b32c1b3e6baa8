//! A list of plugins, called one after the other as libcni calls them: each gets
//! the result of the one before, DEL goes backwards with the last result.
//!
//! The plugins beside ours are those of the CNI project, as the distribution
//! ships them.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::context::Context;
use crate::netns::Netns;
use crate::node::Node;

/// Where the distribution puts the plugins of the CNI project.
const THEIR_FOLDER: &str = "/usr/lib/cni";

/// A list of plugins in one version of the specification.
#[derive(Debug)]
pub struct Chain<'a> {
    node: &'a Node,
    folders: [PathBuf; 2],
    version: String,
    plugins: Vec<Value>,
}

impl<'a> Chain<'a> {
    /// A list of the plugins with these configurations. One may have a
    /// `runtimeConfig`, as a runtime adds it.
    ///
    /// # Errors
    /// When our plugin has not been built.
    pub fn new(
        context: &Context,
        node: &'a Node,
        version: &str,
        plugins: Vec<Value>,
    ) -> anyhow::Result<Self> {
        let ours = context.binary("ferrule")?;
        let ours = ours.parent().context("a folder")?.to_owned();
        Ok(Self {
            node,
            folders: [ours, THEIR_FOLDER.into()],
            version: version.to_owned(),
            plugins,
        })
    }

    /// Calls ADD of each and returns the last result.
    ///
    /// # Errors
    /// When one fails, with all that it said.
    pub fn add(&self, pod: &Netns) -> anyhow::Result<Value> {
        let mut result = None;
        for plugin in &self.plugins {
            result = self.call(plugin, "ADD", pod, result.as_ref())?;
        }
        result.context("ADD printed no result")
    }

    /// Calls CHECK of each with the last result of ADD; but not of `portmap`,
    /// which looks for the rules of one family in both (containernetworking/plugins#819).
    ///
    /// # Errors
    /// When one fails, with all that it said.
    pub fn check(&self, pod: &Netns, result: &Value) -> anyhow::Result<()> {
        for plugin in self
            .plugins
            .iter()
            .filter(|plugin| plugin["type"] != "portmap")
        {
            self.call(plugin, "CHECK", pod, Some(result))?;
        }
        Ok(())
    }

    /// Calls DEL of each, the last one first.
    ///
    /// # Errors
    /// When one fails, with all that it said.
    pub fn del(&self, pod: &Netns, result: &Value) -> anyhow::Result<()> {
        for plugin in self.plugins.iter().rev() {
            self.call(plugin, "DEL", pod, Some(result))?;
        }
        Ok(())
    }

    fn call(
        &self,
        plugin: &Value,
        verb: &str,
        pod: &Netns,
        previous: Option<&Value>,
    ) -> anyhow::Result<Option<Value>> {
        let kind = plugin["type"].as_str().context("a plugin has a type")?;
        let mut config = plugin.clone();
        config["cniVersion"] = self.version.as_str().into();
        config["name"] = "chain".into();
        // Before 0.4.0 DEL did not know what ADD had said.
        if let Some(previous) = previous
            && !(verb == "DEL" && self.version == "0.3.1")
        {
            config["prevResult"] = previous.clone();
        }
        let mut folders = self.folders.iter().map(|folder| folder.join(kind));
        let program = folders
            .find(|program| program.exists())
            .with_context(|| format!("plugin {kind} is not installed"))?;
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", pod.name())
            .env("CNI_NETNS", pod.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", std::env::join_paths(&self.folders)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = self.node.netns().run(|| {
            let mut child = command.spawn()?;
            let mut stdin = child.stdin.take().context("standard input")?;
            stdin.write_all(config.to_string().as_bytes())?;
            drop(stdin);
            Ok(child.wait_with_output()?)
        })?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!(
                "{verb} of {kind} in {}: {}: {said}{complaint}",
                self.version,
                output.status
            );
        }
        if said.trim().is_empty() {
            return Ok(None);
        }
        let value = serde_json::from_str(&said);
        Ok(Some(
            value.with_context(|| format!("{kind} printed {said:?}"))?,
        ))
    }
}
