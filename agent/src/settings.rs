//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ferrule_api::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use ferrule_datapath::Sysctls;
use ferrule_model::address::FrontendAddr;
use ferrule_model::binding::VipBinding;
use ferrule_model::names::{IfName, NameError};
use ferrule_model::ownership::{NFT_TABLE, VIP_DEVICE};
use ferrule_model::trace::{parse_from, parse_to};

use crate::config;

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
    /// Follow a packet through this node: which Service it meets, who decides what, where it goes and as whom; exits
    /// with 0, with 1 when --live finds a step broken, 2 for wrong usage or without an answer.
    Trace(TraceSettings),
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

/// Settings of `trace`.
#[derive(Clone, Debug, Args)]
pub(crate) struct TraceSettings {
    /// The client's address: of a pod, of this node for a process of it, or any other.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_from)]
    pub(crate) from: IpAddr,
    /// What it calls.
    #[arg(
        long,
        value_name = "ADDRESS:PORT/PROTOCOL",
        value_parser = parse_to,
        help = "What it calls, such as 10.96.0.10:80/tcp or [fd00:10:96::a]:53/udp"
    )]
    pub(crate) to: FrontendAddr,
    /// The device by which it comes to this node, where detectLocalMode asks for that; pods of this node
    /// come by their veth.
    #[arg(long, value_name = "NAME", value_parser = if_name)]
    pub(crate) device: Option<IfName>,
    /// Compare each step with the kernel; exits with 1 if one is broken.
    #[arg(long, conflicts_with = "manifests")]
    pub(crate) live: bool,
    /// Show it as JSON; docs/trace.md names the fields.
    #[arg(long)]
    pub(crate) json: bool,
    /// Where the agent listens that is asked.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, conflicts_with = "manifests")]
    pub(crate) socket: PathBuf,
    /// Follow it by what a node would program from these Kubernetes manifests, without an agent; a folder, or a
    /// single file.
    #[arg(long, value_name = "DIR|FILE", requires = "node")]
    pub(crate) manifests: Option<PathBuf>,
    /// Name of the node, with --manifests.
    #[arg(long, value_name = "NAME", value_parser = node_name, requires = "manifests")]
    pub(crate) node: Option<String>,
    /// Configuration file of the agent, with --manifests.
    #[arg(long, value_name = "FILE", requires = "manifests")]
    pub(crate) config: Option<PathBuf>,
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
    /// Name of this node, as its Node object has it; kube-proxy's configuration may name it
    /// instead, or else the machine's name holds with such a file.
    #[arg(long, visible_alias = "hostname-override", value_name = "NAME", value_parser = node_name)]
    pub(crate) node: Option<String>,
    /// Configuration file, also kube-proxy's own; without one everything has its default
    /// (docs/configuration.md).
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where metrics are served over HTTP, at /metrics; `none` turns it off
    /// [default: 127.0.0.1:10249].
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = listen_address)]
    pub(crate) metrics: Option<ListenAddress>,
    /// Where the node's health is told over HTTP, at /healthz and /livez; `none` turns it off
    /// [default: port 10256 of every address].
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = listen_address)]
    pub(crate) healthz: Option<ListenAddress>,
    /// Level of the log, as kube-proxy has it: 4 is debug, 5 and more trace. `FERRULE_LOG` wins.
    #[arg(long = "v", short = 'v', value_name = "LEVEL", default_value = "0")]
    pub(crate) verbosity: u8,
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
    /// Configuration file of the agent, for what it says of virtual services of others.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where the agent kept what it changed.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub(crate) state_dir: PathBuf,
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
    config::host_name(text).ok_or_else(|| {
        "give the name of the Node object, as `kubectl get nodes` shows it".to_owned()
    })
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
            // What the configuration says is put in its place.
            vip_binding: VipBinding::default(),
            nft_table: settings.nft_table,
            sysctls: Sysctls {
                root: PathBuf::from("/proc/sys"),
                // Who knows the state folder says where it is.
                record: None,
            },
            load_modules: !settings.no_load_modules,
            connection_table_bits: None,
            nft_program: settings.nft_program,
            excluded: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kube_proxys_manifests_give_is_taken() {
        for (arguments, node, verbosity) in [
            (&["--hostname-override=a", "--v=2"][..], Some("a"), 2),
            (&["--hostname-override", "a", "--v", "4"], Some("a"), 4),
            (&["--hostname-override= Node-1 "], Some("node-1"), 0),
            (&["--node=Node-1"], Some("node-1"), 0),
            (&["-v", "6"], None, 6),
            (&[], None, 0),
        ] {
            let all = [&["ferrule-agent", "run", "--config", "f"], arguments].concat();
            let Command::Run(settings) = Cli::parse_from(all).command else {
                panic!("another command");
            };
            assert_eq!(settings.node.as_deref(), node, "{arguments:?}");
            assert_eq!(settings.verbosity, verbosity, "{arguments:?}");
        }
    }

    #[test]
    fn where_something_is_served_or_not_at_all() {
        assert_eq!(listen_address("none"), Ok(ListenAddress(None)));
        for text in ["[::]:10256", "192.0.2.1:80"] {
            assert_eq!(
                listen_address(text),
                Ok(ListenAddress(text.parse().ok())),
                "{text}"
            );
        }
        assert!(listen_address("off").is_err_and(|error| error.contains("nor `none`")));
    }
}
