//! `ferrule-agent`: runs on each node, programs its services and hands out pod
//! addresses.
//!
//! Facts come from a [`source`], go through `ferrule_model` to what is desired,
//! and [`reconcile`] brings the kernel there. Beside that, [`server`] answers
//! the CNI plugin from [`leases`]. [`status`] is another command: it asks a
//! running agent how it fares; so does [`trace`], what becomes of a packet.

mod check;
mod clock;
mod config;
mod desk;
mod events;
mod health;
mod healthz;
mod hostports;
mod housekeeping;
mod http;
mod leases;
mod links;
mod lock;
mod memory;
mod metrics;
mod plain_file;
mod plan;
mod pods;
mod programming;
mod reconcile;
mod reload;
mod server;
mod settings;
mod source;
mod status;
mod supervisor;
mod trace;
mod uplink;

use std::fs;
use std::io::IsTerminal as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser as _;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tracing::info;
use tracing_subscriber::EnvFilter;

use crate::check::LEASE_FILE;
use crate::config::Config;
use crate::desk::Desk;
use crate::events::Events;
use crate::leases::Leases;
use crate::lock::{LockError, Owned};
use crate::metrics::{Configuration, Face};
use crate::pods::Pods;
use crate::programming::Programming;
use crate::reconcile::{Asker, Reconciler};
use crate::server::Server;
use crate::settings::{CleanupSettings, Cli, Command, ListenAddress, LogFormat, RunSettings};
use crate::source::Sources;
use crate::source::kubernetes::{Credentials, ServiceAccount};

/// Where metrics are served unless somebody says otherwise.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// Likewise the node's health: at every address of both families.
const HEALTHZ: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 10256);

/// The file in the state folder that says which sysctls were changed.
const SYSCTL_RECORD: &str = "sysctls.json";

/// Questions that wait for the reconciler; who asks more waits.
const QUERIES: usize = 16;

fn main() -> ExitCode {
    memory::share_one_heap();
    let cli = Cli::parse();
    match cli.command {
        Command::Run(settings) => {
            start_log(cli.log_format, level(settings.verbosity));
            in_runtime(run(settings))
        }
        Command::Cleanup(settings) => {
            start_log(cli.log_format, "info");
            in_runtime(cleanup(settings))
        }
        Command::Status(settings) => status::run(&settings),
        Command::Plan(settings) => plan::run(&settings),
        Command::Trace(settings) => trace::run(&settings),
        Command::Check(settings) => check::run(&settings, |config| sources(&settings.run, config)),
    }
}

/// Runs a command that touches the node: with a runtime.
fn in_runtime(command: impl Future<Output = anyhow::Result<()>>) -> ExitCode {
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

/// The level of the log that a number means to Kubernetes: manifests give 2 as the usual one.
fn level(verbosity: u8) -> &'static str {
    match verbosity {
        0..=3 => "info",
        4 => "debug",
        5.. => "trace",
    }
}

fn start_log(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_env("FERRULE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
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

/// Takes all descriptors that the agent may have: connections to it must not leave it without.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, "the number of descriptors stays at {:?}", limit.current);
    }
}

async fn run(settings: RunSettings) -> anyhow::Result<()> {
    raise_descriptors();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let hangup = signal(SignalKind::hangup())?;
    // Whatever can keep the agent from running is found out before anything is changed.
    let (config, node) = check::before_start(&settings)?;
    let followed = sources(&settings, &config)
        .follow()
        .await
        .map_err(anyhow::Error::msg)?;
    let mut node_settings: ferrule_datapath::Settings = settings.node_settings.clone().into();
    node_settings.sysctls.record = Some(settings.state_dir.join(SYSCTL_RECORD));
    let owned = own(&node_settings)?;
    make_private_folder(&settings.state_dir)?;
    let leases = Leases::open(&settings.state_dir.join(LEASE_FILE))?;
    info!(leases = leases.count(), node, "starting");
    let server = Server::bind(&settings.socket)?;
    for listener in owned {
        tokio::spawn(lock::turn_away(listener));
    }
    let mtu = match settings.mtu {
        Some(mtu) => mtu,
        None => uplink::mtu().await,
    };
    // Pods need this even where services cannot be programmed.
    if let Err(error) = ferrule_datapath::ensure_forwarding(&node_settings.sysctls) {
        tracing::error!("pods cannot reach beyond this node: {error}");
    }
    let sysctls = node_settings.sysctls.clone();
    let pods = Arc::new(Pods::new(leases, settings.state_dir.clone(), mtu));
    let programming = Arc::new(Programming::new(config.kube_proxy.sync_period));
    let reconciler = Reconciler::new(
        &node,
        node_settings,
        &config,
        Arc::clone(&pods),
        followed.name,
        Events::start(followed.servers, &node),
        Arc::clone(&programming),
    );
    let (asker, queries) = mpsc::channel(QUERIES);
    let reconciler = tokio::spawn(reconciler.run(followed.updates, queries));
    let asker = Asker::new(asker);
    let (holds, held) = watch::channel(config.clone());
    tokio::spawn(reload::follow(
        settings.clone(),
        hangup,
        holds,
        asker.clone(),
    ));
    let desk = Arc::new(Desk::new(Arc::clone(&pods), asker, sysctls));
    face(&settings, held, &node, &desk, &programming);
    tokio::spawn(supervisor::tell(Arc::clone(&programming)));
    let queue = tokio::spawn(Arc::clone(&pods).drain_queue());
    let house = tokio::spawn(housekeeping::keep(Arc::clone(&pods)));
    tokio::select! {
        () = server.serve(desk) => {}
        _ = terminate.recv() => info!("asked to stop; services and pods stay as they are"),
        _ = interrupt.recv() => info!("asked to stop; services and pods stay as they are"),
        result = followed.task => {
            result.context("the source of facts ended")?;
            anyhow::bail!("the source of facts ended");
        }
        result = reconciler => result.context("the reconciler ended")?,
        result = queue => result.context("the release queue ended")?,
        result = house => result.context("the housekeeping ended")?,
    }
    Ok(())
}

/// Serves what kube-proxy serves, where it does or where somebody says.
fn face(
    settings: &RunSettings,
    held: watch::Receiver<Config>,
    node: &str,
    desk: &Arc<Desk>,
    programming: &Arc<Programming>,
) {
    let address = |given: Option<ListenAddress>, of_file: Option<SocketAddr>, usual| {
        given.map_or(of_file.or(Some(usual)), |given| given.0)
    };
    let of_file = held.borrow().kube_proxy.clone();
    let healthz = address(settings.healthz, of_file.healthz, HEALTHZ);
    let metrics = address(settings.metrics, of_file.metrics, METRICS);
    tokio::spawn(healthz::serve(healthz, Arc::clone(programming)));
    let face = Face {
        desk: Arc::clone(desk),
        programming: Arc::clone(programming),
        configuration: Configuration {
            held,
            node: node.to_owned(),
            healthz,
            metrics,
        },
    };
    tokio::spawn(metrics::serve(metrics, face));
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
    let credentials = match check::kubeconfig(settings, config) {
        Some(path) => Some(Credentials::Kubeconfig(path.to_owned())),
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
    let config = Config::read(settings.config.as_deref())?;
    let mut node_settings: ferrule_datapath::Settings = settings.node_settings.into();
    node_settings.excluded = config.kube_proxy.excluded;
    node_settings.sysctls.record = Some(settings.state_dir.join(SYSCTL_RECORD));
    // It would make anew what is removed here, but for the settings that are put back.
    let _nobody_else = own(&node_settings).context("nothing is removed; stop the agent first")?;
    ferrule_datapath::cleanup(node_settings)
        .await
        .context("not everything could be removed")?;
    info!("services, VIPs and the guard of this node are removed, and its sysctls are put back");
    Ok(())
}

fn make_private_folder(path: &Path) -> anyhow::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make folder {}", path.display()))
}
