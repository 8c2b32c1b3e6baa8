//! The command line.

use std::path::PathBuf;

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
}

/// Settings of `run`.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunSettings {
    /// Folder with Kubernetes manifests (Service, EndpointSlice, Node), YAML or JSON; it is watched.
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: PathBuf,
    /// Name of this node, as its Node object has it.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: String,
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

fn if_name(text: &str) -> Result<IfName, NameError> {
    IfName::try_from(text.to_owned())
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
