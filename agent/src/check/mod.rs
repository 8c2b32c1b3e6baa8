//! The checks of a start: what must hold before the agent touches anything.
//!
//! `ferrule-agent check` makes all of them and prints a table; nothing is changed,
//! and it may be done without root and while an agent runs. `run` makes those
//! first without which it cannot go on, so that both say the same sentences. What
//! a running agent can do without (IPVS, the program `nft`, a Node object) is no
//! reason to end for `run`: it goes on with what works, and `status` names the rest.

mod cni;
mod configuration;
mod features;
mod folder;
mod foreign;
mod kernel;
mod modules;
mod report;
mod rights;
pub(crate) mod socket;
mod sources;
mod state;
mod sysctls;

use std::process::ExitCode;

pub(crate) use self::configuration::kubeconfig;
pub(crate) use self::state::LEASE_FILE;
use anyhow::bail;
use ferrule_datapath::Settings;
use tracing::{info, warn};

use crate::config::Config;
use crate::lock::Owned;
use crate::settings::{CheckSettings, RunSettings};
use crate::source::Sources;
use crate::source::kubernetes::chain;

const AGENT: &str = "agent";

/// Exit code when a check failed.
const FAILURE: u8 = 1;

/// Exit code when the result could not be written, and clap's own.
const USAGE: u8 = 2;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// As it should be.
    Ok,
    /// The agent works, less well or not for long.
    Warning,
    /// The agent does not start, or serves only a part.
    Failed,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) check: &'static str,
    /// How it ended.
    pub(crate) result: Outcome,
    /// What is there.
    pub(crate) found: String,
    /// What to do; empty where there is nothing.
    pub(crate) remedy: String,
}

impl Finding {
    /// As it should be.
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, found, "")
    }

    /// Something is not well.
    pub(crate) fn new(
        check: &'static str,
        result: Outcome,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            check,
            result,
            found: found.into(),
            remedy: remedy.into(),
        }
    }

    /// Of an error that ends with its remedy behind a semicolon.
    pub(crate) fn of_error(check: &'static str, result: Outcome, error: &str) -> Self {
        let (found, remedy) = error.split_once("; ").unwrap_or((error, ""));
        Self::new(check, result, found, remedy)
    }

    /// For the log.
    fn sentence(&self) -> String {
        let Self { found, remedy, .. } = self;
        if remedy.is_empty() {
            found.clone()
        } else {
            format!("{found}; {remedy}")
        }
    }
}

/// For `run`: reads the configuration, finds the node's name, and makes the checks without which
/// it cannot go on. Nothing is changed.
///
/// # Errors
/// The first thing that keeps the agent from starting, with its remedy.
pub(crate) fn before_start(settings: &RunSettings) -> anyhow::Result<(Config, String)> {
    let config = Config::read(settings.config.as_deref())?;
    let name = config.node_name(settings.node.as_deref());
    let name = name.map_err(anyhow::Error::msg)?;
    for note in configuration::notes(settings, &config) {
        info!("kube-proxy's configuration: {note}");
    }
    if let Some(fault) = configuration::kubeconfig_fault(settings, &config) {
        bail!(fault);
    }
    let node: Settings = settings.node_settings.clone().into();
    let findings = [
        features::vip_device(&node, &config.policy.vip_binding),
        rights::check(),
        kernel::version(),
        state::folder(&settings.state_dir),
        socket::check_patiently(&settings.socket),
    ];
    let filter = sysctls::reverse_path_filter(&node.sysctls.root);
    for finding in findings.into_iter().chain(filter) {
        match finding.result {
            Outcome::Ok => {}
            Outcome::Warning => warn!("{}", finding.sentence()),
            Outcome::Failed => bail!("{}", finding.sentence()),
        }
    }
    Ok((config, name))
}

/// The command `check`. `sources` are those that `run` would follow with a configuration.
pub(crate) fn run(settings: &CheckSettings, sources: impl Fn(&Config) -> Sources) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let findings = match runtime {
        Ok(runtime) => runtime.block_on(everything(settings, sources)),
        Err(error) => vec![Finding::new(
            "check",
            Outcome::Failed,
            error.to_string(),
            "",
        )],
    };
    let worst = findings.iter().map(|finding| finding.result).max();
    match report::print(&findings, settings.output) {
        Err(_) => ExitCode::from(USAGE),
        Ok(()) if worst == Some(Outcome::Failed) => ExitCode::from(FAILURE),
        Ok(()) => ExitCode::SUCCESS,
    }
}

async fn everything(
    settings: &CheckSettings,
    sources: impl Fn(&Config) -> Sources,
) -> Vec<Finding> {
    let run = &settings.run;
    let mut node: Settings = run.node_settings.clone().into();
    let config = Config::read(run.config.as_deref());
    let scheduling = config.as_ref().map(|config| &config.policy.scheduling);
    let scheduler = scheduling.map_or("rr", |scheduling| scheduling.scheduler.name());
    if let Ok(config) = &config {
        node.vip_binding = config.policy.vip_binding.clone();
        node.excluded.clone_from(&config.kube_proxy.excluded);
        node.connection_table_bits = config.connection_table_bits;
    }
    let mut findings = vec![rights::check(), kernel::version()];
    if settings.load_modules {
        ferrule_datapath::modules::load(node.connection_table_bits).await;
    }
    let modules = modules::look(node.load_modules, scheduler);
    findings.push(modules.finding);
    findings.extend(modules::connection_table(node.connection_table_bits));
    let harmless = modules.asking_is_harmless || settings.load_modules;
    findings.push(features::program(&node).await);
    findings.extend(features::kernel(&node, harmless).await);
    findings.extend(sysctls::check(&node.sysctls.root));
    findings.push(state::folder(&run.state_dir));
    findings.extend(state::lease_file(&run.state_dir));
    findings.push(socket::check_beside_an_agent(&run.socket));
    findings.push(agent(&node));
    match config {
        Ok(config) => {
            findings.extend(configuration::findings(run, &config));
            if let Ok(name) = config.node_name(run.node.as_deref())
                && configuration::kubeconfig_fault(run, &config).is_none()
            {
                findings.extend(sources::check(&sources(&config), &name, &config).await);
            }
        }
        Err(error) => findings.push(configuration::unreadable(&chain(&error))),
    }
    findings.extend(cni::check(&settings.cni_bin_dir, &settings.cni_conf_dir).await);
    findings.extend(foreign::check(&node).await);
    findings
}

/// Whether an agent owns the table or the device. It does no harm if it is the one
/// that was meant, which only who asks can know.
fn agent(settings: &Settings) -> Finding {
    let table = Owned::table(&settings.nft_table).agent();
    let device = Owned::device(settings.vip_device.as_str()).agent();
    match table.or(device) {
        None => Finding::ok(AGENT, "none runs in this network namespace"),
        Some(pid) => Finding::ok(AGENT, format!("one runs, process {pid}")),
    }
}
