//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ferrule_api::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use ferrule_model::names::{IfName, NameError};
use ferrule_model::ownership::{NFT_TABLE, VIP_DEVICE};

/// Node networking for Kubernetes: services through kernel IPVS, and pod addresses.
#[derive(Debug, Parser)]
#[command(name = "ferrule-agent", version)]
pub(crate) struct Cli {
    /// How the log is written.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "text",
        help = "How the log is written; FERRULE_LOG sets its level (error, warn, info, debug, trace)"
    )]
    pub(crate) log_format: LogFormat,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How a log line looks.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the agent of one node until it is told to stop.
    Run(RunSettings),
    /// Remove the services, VIPs and the guard of this node, and nothing that is not ours.
    Cleanup(CleanupSettings),
    /// Show how the agent of this node fares; exits with 0 when healthy, 1 when degraded, 2 without an answer.
    Status(StatusSettings),
    /// Show what a node would program, from manifests alone: without root, without touching a kernel.
    Plan(PlanSettings),
    /// Check whether this node is fit for the agent, without changing anything; exits with 0 when it is, also with
    /// warnings, and 1 when a check failed.
    Check(CheckSettings),
}

/// Settings of `check`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CheckSettings {
    #[command(flatten)]
    pub(crate) run: RunSettings,
    /// Where the container runtime looks for plugins.
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    pub(crate) cni_bin_dir: PathBuf,
    /// Where the container runtime looks for network configurations.
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    pub(crate) cni_conf_dir: PathBuf,
    /// Load kernel modules first, as `run` does; this is all that is ever changed.
    #[arg(long, conflicts_with = "no_load_modules")]
    pub(crate) load_modules: bool,
    /// How it is shown.
    #[arg(long, short, value_enum, default_value = "text")]
    pub(crate) output: Output,
}

/// Settings of `plan`.
#[derive(Clone, Debug, Args)]
pub(crate) struct PlanSettings {
    /// Folder with Kubernetes manifests, YAML or JSON.
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: PathBuf,
    /// Name of the node.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    pub(crate) node: String,
    /// Configuration file of the agent.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Show what would change if the manifests were those of another folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) diff: Option<PathBuf>,
    /// How it is shown.
    #[arg(long, short, value_enum, default_value = "json")]
    pub(crate) output: PlanOutput,
}

/// How a plan is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PlanOutput {
    /// For programs and reviews; docs/plan.md describes it.
    Json,
    /// For people.
    Table,
}

/// Settings of `run`.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunSettings {
    /// Folder with Kubernetes manifests (Service, EndpointSlice, Node), YAML or JSON; it is watched.
    /// Without --kubeconfig and --in-cluster they are all there is.
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: Option<PathBuf>,
    /// Credentials for the cluster's API.
    #[arg(long, value_name = "FILE", conflicts_with = "in_cluster")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Follow the cluster's API as the service account of the agent's pod, which is what it does
    /// without --manifests and --kubeconfig.
    #[arg(long)]
    pub(crate) in_cluster: bool,
    /// Where the pod has `token` and `ca.crt` of its service account; both may change at any time.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/run/secrets/kubernetes.io/serviceaccount"
    )]
    pub(crate) service_account_dir: PathBuf,
    /// Name of this node, as its Node object has it.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    pub(crate) node: String,
    /// Configuration file; without one everything has its default (docs/configuration.md).
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where metrics are served over HTTP, at /metrics; `none` turns it off.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:10249", value_parser = listen_address)]
    pub(crate) metrics: ListenAddress,
    /// Where leases are kept; must survive a restart of the node.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub(crate) state_dir: PathBuf,
    /// Where the agent listens for the plugin.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// MTU of pods' interfaces; the default is that of the device with the default route.
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1280..=65535))]
    pub(crate) mtu: Option<u32>,
    #[command(flatten)]
    pub(crate) node_settings: NodeSettings,
}

/// Settings of `cleanup`.
#[derive(Clone, Debug, Args)]
pub(crate) struct CleanupSettings {
    #[command(flatten)]
    pub(crate) node_settings: NodeSettings,
}

/// Settings of `status`.
///
/// They hold for its listings too, and may stand before or behind their names.
#[derive(Clone, Debug, Args)]
pub(crate) struct StatusSettings {
    /// Where the agent listens.
    #[arg(long, global = true, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// How it is shown.
    #[arg(long, short, global = true, value_enum, default_value = "text")]
    pub(crate) output: Output,
    /// Whether text is coloured; auto: on a terminal, unless `NO_COLOR` is set.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "auto",
        value_name = "WHEN"
    )]
    pub(crate) color: ColorChoice,
    /// A list instead of the whole.
    #[command(subcommand)]
    pub(crate) listing: Option<Listing>,
}

/// Lists that `status` can show.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Listing {
    /// List the frontends of Services, and what passes through each.
    Services(ListingSettings),
    /// List the interfaces of pods, and what passes through each.
    Pods(ListingSettings),
}

/// Settings of a listing.
#[derive(Clone, Debug, Args)]
pub(crate) struct ListingSettings {
    /// Time between the two looks from which rates are told; 0 looks once and tells totals.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub(crate) interval: Duration,
}

/// How `status` shows what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs; docs/status.md names the fields.
    Json,
}

/// When text is coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ColorChoice {
    /// On a terminal, unless `NO_COLOR` is set.
    Auto,
    /// Also into a pipe.
    Always,
    /// Not even on a terminal.
    Never,
}

/// How our things in the kernel are called.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeSettings {
    /// The dummy device that carries the VIPs.
    #[arg(long, value_name = "NAME", default_value = VIP_DEVICE, value_parser = if_name)]
    vip_device: IfName,
    /// Our nftables table.
    #[arg(long, value_name = "NAME", default_value = NFT_TABLE)]
    nft_table: String,
    /// The program that loads our base ruleset.
    #[arg(long, value_name = "PATH", default_value = "nft")]
    nft_program: PathBuf,
    /// Do not load kernel modules; say which are missing instead.
    #[arg(long)]
    no_load_modules: bool,
}

/// Where something is served, if anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ListenAddress(pub(crate) Option<SocketAddr>);

fn node_name(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("give the name of the Node object, as `kubectl get nodes` shows it".to_owned());
    }
    Ok(text.to_owned())
}

fn listen_address(text: &str) -> Result<ListenAddress, String> {
    if text == "none" {
        return Ok(ListenAddress(None));
    }
    text.parse()
        .map(|address| ListenAddress(Some(address)))
        .map_err(|_| {
            format!("{text:?} is no address with a port, such as 127.0.0.1:10249, nor `none`")
        })
}

fn if_name(text: &str) -> Result<IfName, NameError> {
    IfName::try_from(text.to_owned())
}

/// Longest time between two looks, in seconds.
const MAX_INTERVAL: f64 = 3600.0;

fn interval(text: &str) -> Result<Duration, String> {
    let wrong = || format!("give seconds from 0 to {MAX_INTERVAL}, such as 0.5");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    if !(0.0..=MAX_INTERVAL).contains(&seconds) {
        return Err(wrong());
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| wrong())
}

impl From<NodeSettings> for ferrule_datapath::Settings {
    fn from(settings: NodeSettings) -> Self {
        Self {
            vip_device: settings.vip_device,
            nft_table: settings.nft_table,
            sysctl_root: PathBuf::from("/proc/sys"),
            load_modules: !settings.no_load_modules,
            nft_program: settings.nft_program,
        }
    }
}
