//! `ferrule-agent`: runs on each node, programs its services and hands out pod
//! addresses.
//!
//! Facts come from a [`source`], go through `ferrule_model` to what is desired,
//! and [`reconcile`] brings the kernel there. Beside that, [`server`] answers
//! the CNI plugin from [`leases`]. [`status`] is another command: it asks a
//! running agent how it fares.

mod check;
mod clock;
mod config;
mod desk;
mod hostports;
mod housekeeping;
mod leases;
mod links;
mod lock;
mod memory;
mod metrics;
mod plan;
mod pods;
mod reconcile;
mod server;
mod settings;
mod source;
mod status;
mod uplink;

use std::fs;
use std::io::IsTerminal as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::info;
use tracing_subscriber::EnvFilter;

use crate::check::LEASE_FILE;
use crate::config::Config;
use crate::desk::Desk;
use crate::leases::Leases;
use crate::lock::{LockError, Owned};
use crate::pods::Pods;
use crate::reconcile::{Asker, Reconciler};
use crate::server::Server;
use crate::settings::{CleanupSettings, Cli, Command, LogFormat, RunSettings};
use crate::source::Sources;
use crate::source::kubernetes::{Credentials, ServiceAccount};

/// Questions that wait for the reconciler; who asks more waits.
const QUERIES: usize = 16;

fn main() -> ExitCode {
    memory::share_one_heap();
    let cli = Cli::parse();
    match cli.command {
        Command::Run(settings) => in_runtime(cli.log_format, run(settings)),
        Command::Cleanup(settings) => in_runtime(cli.log_format, cleanup(settings)),
        Command::Status(settings) => status::run(&settings),
        Command::Plan(settings) => plan::run(&settings),
        Command::Check(settings) => check::run(&settings, |config| sources(&settings.run, config)),
    }
}

/// Runs a command that touches the node: with its log and a runtime.
fn in_runtime(
    log_format: LogFormat,
    command: impl Future<Output = anyhow::Result<()>>,
) -> ExitCode {
    start_log(log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let outcome = runtime
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(command));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_env("FERRULE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}

async fn run(settings: RunSettings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Whatever can keep the agent from running is found out before anything is changed.
    let config = check::before_start(&settings)?;
    let (source_name, updates, source) = sources(&settings, &config)
        .follow()
        .await
        .map_err(anyhow::Error::msg)?;
    let node_settings: ferrule_datapath::Settings = settings.node_settings.clone().into();
    let owned = own(&node_settings)?;
    make_private_folder(&settings.state_dir)?;
    let leases = Leases::open(&settings.state_dir.join(LEASE_FILE))?;
    info!(leases = leases.count(), node = settings.node, "starting");
    let server = Server::bind(&settings.socket)?;
    for listener in owned {
        tokio::spawn(lock::turn_away(listener));
    }
    let mtu = match settings.mtu {
        Some(mtu) => mtu,
        None => uplink::mtu().await,
    };
    // Pods need this even where services cannot be programmed.
    if let Err(error) = ferrule_datapath::ensure_forwarding(&node_settings.sysctl_root) {
        tracing::error!("pods cannot reach beyond this node: {error}");
    }
    let sysctl_root = node_settings.sysctl_root.clone();
    let pods = Arc::new(Pods::new(leases, settings.state_dir.clone(), mtu));
    let reconciler = Reconciler::new(
        &settings.node,
        node_settings,
        &config,
        Arc::clone(&pods),
        source_name,
    );
    let (asker, queries) = mpsc::channel(QUERIES);
    let reconciler = tokio::spawn(reconciler.run(updates, queries));
    let desk = Arc::new(Desk::new(Arc::clone(&pods), Asker::new(asker), sysctl_root));
    tokio::spawn(metrics::serve(settings.metrics.0, Arc::clone(&desk)));
    let queue = tokio::spawn(Arc::clone(&pods).drain_queue());
    let house = tokio::spawn(housekeeping::keep(Arc::clone(&pods)));
    tokio::select! {
        () = server.serve(desk) => {}
        _ = terminate.recv() => info!("asked to stop; services and pods stay as they are"),
        _ = interrupt.recv() => info!("asked to stop; services and pods stay as they are"),
        result = source => {
            result.context("the source of facts ended")?;
            anyhow::bail!("the source of facts ended");
        }
        result = reconciler => result.context("the reconciler ended")?,
        result = queue => result.context("the release queue ended")?,
        result = house => result.context("the housekeeping ended")?,
    }
    Ok(())
}

/// Takes what only one agent of a network namespace may own.
fn own(settings: &ferrule_datapath::Settings) -> Result<Vec<UnixListener>, LockError> {
    let table = Owned::table(&settings.nft_table).take()?;
    let device = Owned::device(settings.vip_device.as_str()).take()?;
    Ok([table, device].into_iter().flatten().collect())
}

/// A cluster is followed if it is named, and if nothing else is.
fn sources(settings: &RunSettings, config: &Config) -> Sources {
    let in_cluster = settings.in_cluster || settings.manifests.is_none();
    let credentials = match &settings.kubeconfig {
        Some(path) => Some(Credentials::Kubeconfig(path.clone())),
        None => in_cluster.then(|| {
            Credentials::ServiceAccount(ServiceAccount::of_pod(
                settings.service_account_dir.clone(),
            ))
        }),
    };
    Sources {
        manifests: settings.manifests.clone(),
        credentials,
        api_servers: config.api_servers.clone(),
    }
}

async fn cleanup(settings: CleanupSettings) -> anyhow::Result<()> {
    ferrule_datapath::cleanup(settings.node_settings.into())
        .await
        .context("not everything could be removed")?;
    info!("services, VIPs and the guard of this node are removed");
    Ok(())
}

fn make_private_folder(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make folder {}", path.display()))
}
