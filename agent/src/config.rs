//! The configuration file.
//!
//! Everything in it is optional; a field that is absent, empty or null has its
//! default. A field that is not known is an error, because a setting that
//! silently does nothing is worse than an agent that does not start.

#[path = "config/effective.rs"]
mod effective;
#[path = "config/kube_proxy.rs"]
mod kube_proxy;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ferrule_datapath::modules::CONNECTION_TABLE_BITS;
use ferrule_model::binding::VipBinding;
use ferrule_model::names::IfName;
use ferrule_model::network::{DetectLocal, ExternalIps, NodePortAddresses, Policy, parse_network};
use ferrule_model::ownership::is_of_a_pod;
use ferrule_model::scheduling::parse_flags;
use ferrule_model::service::{Scheduler, Scheduling};
use ipnetwork::IpNetwork;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};

pub(crate) use self::kube_proxy::KubeProxy;
use crate::plain_file;
use crate::source::document;

/// Default of `auditBudgetPercent`, in percent of one core.
const AUDIT_BUDGET: f64 = 0.3;

/// Default of `drainSeconds`.
const DRAIN_TIMEOUT: Duration = Duration::from_mins(10);

/// Where the kernel tells the machine's name.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

const API_VERSION: &str = "ferrule.io/v1alpha1";
const KIND: &str = "AgentConfiguration";

/// What the file says, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// What is decided about addresses.
    pub(crate) policy: Policy,
    /// Share of one core that the audit of real servers may take, in percent.
    pub(crate) audit_budget: f64,
    /// How long a backend that is in no slice any more may keep its connections.
    pub(crate) drain_timeout: Duration,
    /// Whether IPVS estimates rates.
    pub(crate) estimation: Estimation,
    /// Binary logarithm of the buckets of IPVS's connection table, where somebody says it.
    pub(crate) connection_table_bits: Option<u8>,
    /// URLs of API servers, instead of the one that comes with the credentials.
    pub(crate) api_servers: Vec<String>,
    /// What only kube-proxy's file can say.
    pub(crate) kube_proxy: KubeProxy,
    /// What is to be said about fields of kube-proxy's file, a line each.
    pub(crate) notes: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            audit_budget: AUDIT_BUDGET,
            drain_timeout: DRAIN_TIMEOUT,
            estimation: Estimation::Auto,
            connection_table_bits: None,
            api_servers: Vec::new(),
            kube_proxy: KubeProxy::default(),
            notes: Vec::new(),
        }
    }
}

/// Whether IPVS estimates rates and adds its counters up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Estimation {
    /// Not where it would hold up packets.
    #[default]
    Auto,
    /// It does.
    Always,
    /// It does not.
    Never,
}

/// What is wrong with the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// It cannot be read.
    #[error("configuration {}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no configuration.
    #[error("configuration {}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Field and remedy.
        message: String,
    },
}

/// What kind of file it is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
}

/// As it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    api_version: Option<String>,
    #[serde(default)]
    kind: Option<String>,
    #[serde(default, rename = "clusterCIDR")]
    cluster_cidr: Option<String>,
    #[serde(default, rename = "serviceCIDRs")]
    service_cidrs: Option<Vec<String>>,
    #[serde(default)]
    node_port_addresses: Option<Vec<String>>,
    #[serde(default, rename = "nonMasqueradeCIDRs")]
    non_masquerade_cidrs: Option<Vec<String>>,
    #[serde(default)]
    masquerade_all: Option<bool>,
    #[serde(default, deserialize_with = "range_text")]
    node_port_range: Option<String>,
    #[serde(default, rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    #[serde(default)]
    scheduler: Option<String>,
    #[serde(default)]
    scheduler_flags: Option<Vec<String>>,
    #[serde(default)]
    service_proxy_name: Option<String>,
    #[serde(default)]
    audit_budget_percent: Option<f64>,
    #[serde(default)]
    drain_seconds: Option<u32>,
    #[serde(default)]
    estimation: Option<String>,
    #[serde(default)]
    connection_table_bits: Option<u8>,
    #[serde(default)]
    api_server: Option<Vec<String>>,
    #[serde(default)]
    detect_local_mode: Option<String>,
    #[serde(default)]
    detect_local: Option<DetectLocalOptions>,
    #[serde(default)]
    vip_binding: Option<String>,
    #[serde(default)]
    vip_device: Option<String>,
}

/// What some modes of telling local clients need; kube-proxy's file has the same.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DetectLocalOptions {
    #[serde(default)]
    bridge_interface: Option<String>,
    #[serde(default)]
    interface_name_prefix: Option<String>,
}

/// A text, with an error that says what a range looks like.
fn range_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    deserializer.deserialize_option(RangeText)
}

struct RangeText;

impl<'de> Visitor<'de> for RangeText {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a range of ports, such as 30000-32767")
    }

    fn visit_none<E>(self) -> Result<Option<String>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<String>, D::Error> {
        deserializer.deserialize_str(self)
    }

    fn visit_str<E>(self, text: &str) -> Result<Option<String>, E> {
        Ok(Some(text.to_owned()))
    }
}

impl Config {
    /// Reads the file; without one everything has its default.
    ///
    /// # Errors
    /// [`ConfigError`], which names file, field and remedy.
    pub(crate) fn read(path: Option<&Path>) -> Result<Self, ConfigError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = plain_file::check(path).and_then(|()| std::fs::read_to_string(path));
        let text = text.map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|message| ConfigError::Invalid {
            path: path.to_owned(),
            message,
        })
    }

    /// Name of the node: that of the command line, of kube-proxy's file, or, with such a file,
    /// of the machine, as kube-proxy has it.
    ///
    /// # Errors
    /// When nobody says.
    pub(crate) fn node_name(&self, given: Option<&str>) -> Result<String, String> {
        let named = given.map(str::to_owned).or_else(|| {
            let kube_proxy = &self.kube_proxy;
            let machine = || {
                let text = fs::read_to_string(HOST_NAME).ok()?;
                kube_proxy::host_name(&text).filter(|_| kube_proxy.is_read)
            };
            kube_proxy.node.clone().or_else(machine)
        });
        named.ok_or_else(|| {
            "the node has no name; give --node NAME, as `kubectl get nodes` shows it".to_owned()
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let head: Option<Head> = document::typed(text).map_err(|error| error.to_string())?;
        let head = head.unwrap_or_default();
        match (head.api_version.as_deref(), head.kind.as_deref()) {
            (Some("v1"), Some("ConfigMap")) => Self::parse(&kube_proxy::within_config_map(text)?),
            (Some(kube_proxy::API_VERSION), Some(kube_proxy::KIND)) => kube_proxy::parse(text),
            _ => Self::parse_own(text),
        }
    }

    fn parse_own(text: &str) -> Result<Self, String> {
        let file: Option<File> = document::typed(text).map_err(|error| error.to_string())?;
        let file = file.unwrap_or_default();
        for (field, value, expected) in [
            ("apiVersion", &file.api_version, API_VERSION),
            ("kind", &file.kind, KIND),
        ] {
            if value.as_deref() != Some(expected) {
                let value = value.as_deref().unwrap_or("absent");
                return Err(format!("{field} is {value}; write {field}: {expected}"));
            }
        }
        let budget = file.audit_budget_percent.unwrap_or(AUDIT_BUDGET);
        if !(budget > 0.0 && budget <= 100.0) {
            return Err(format!(
                "auditBudgetPercent: {budget} is no share of a core; give more than 0 and at most 100"
            ));
        }
        let cluster = comma_separated(&file.cluster_cidr.unwrap_or_default());
        let cluster_cidrs = networks("clusterCIDR", &cluster)?;
        let local = file.detect_local.unwrap_or_default();
        Ok(Self {
            policy: Policy {
                service_cidrs: networks("serviceCIDRs", &file.service_cidrs.unwrap_or_default())?,
                node_port_addresses: addresses(&file.node_port_addresses.unwrap_or_default())?,
                non_masquerade: match file.non_masquerade_cidrs {
                    Some(texts) if !texts.is_empty() => {
                        Some(networks("nonMasqueradeCIDRs", &texts)?)
                    }
                    Some(_) | None => None,
                },
                masquerade_all: file.masquerade_all.unwrap_or(false),
                detect_local: match file.detect_local_mode.as_deref().unwrap_or_default() {
                    "" => None,
                    mode => detect_local(mode, local, !cluster_cidrs.is_empty())?,
                },
                cluster_cidrs,
                node_ports: match file.node_port_range.as_deref() {
                    None | Some("") => Policy::default().node_ports,
                    Some(text) => port_range(text)?,
                },
                external_ips: external_ips(&file.external_ips.unwrap_or_default())?,
                scheduling: scheduling(
                    file.scheduler.as_deref().unwrap_or_default(),
                    &file.scheduler_flags.unwrap_or_default(),
                )?,
                proxy_name: file.service_proxy_name.filter(|name| !name.is_empty()),
                vip_binding: vip_binding(
                    file.vip_binding.as_deref().unwrap_or_default(),
                    file.vip_device.as_deref().unwrap_or_default(),
                )?,
            },
            audit_budget: budget,
            drain_timeout: file
                .drain_seconds
                .map_or(DRAIN_TIMEOUT, |seconds| Duration::from_secs(seconds.into())),
            estimation: estimation(file.estimation.as_deref().unwrap_or_default())?,
            connection_table_bits: table_bits(file.connection_table_bits)?,
            api_servers: file.api_server.unwrap_or_default(),
            ..Self::default()
        })
    }
}

/// A name of a node as kube-proxy makes it of what it is told, by flag or by field.
pub(crate) fn host_name(text: &str) -> Option<String> {
    kube_proxy::host_name(text)
}

fn comma_separated(text: &str) -> Vec<String> {
    let parts = text.split(',').map(str::trim);
    let parts = parts.filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

fn networks(field: &str, texts: &[String]) -> Result<Vec<IpNetwork>, String> {
    texts
        .iter()
        .map(|text| parse_network(text).map_err(|problem| format!("{field}: {problem}")))
        .collect()
}

fn addresses(texts: &[String]) -> Result<NodePortAddresses, String> {
    match texts {
        [] => Ok(NodePortAddresses::All),
        [word] if word == "primary" => Ok(NodePortAddresses::Primary),
        texts if texts.iter().any(|text| text == "primary") => {
            Err("nodePortAddresses: \"primary\" stands beside networks; write it alone".to_owned())
        }
        texts => networks("nodePortAddresses", texts).map(NodePortAddresses::Within),
    }
}

fn external_ips(texts: &[String]) -> Result<ExternalIps, String> {
    match texts {
        [] => Ok(ExternalIps::All),
        [word] if word == "all" => Ok(ExternalIps::All),
        [word] if word == "none" => Ok(ExternalIps::Within(Vec::new())),
        texts if texts.iter().any(|text| text == "all" || text == "none") => Err(
            "externalIPs: \"all\" or \"none\" stands beside networks; write it alone".to_owned(),
        ),
        texts => networks("externalIPs", texts).map(ExternalIps::Within),
    }
}

/// How connections are spread where a Service says nothing. `mh` counts the
/// client's port too unless flags are given, as with kube-proxy.
fn scheduling(scheduler: &str, flags: &[String]) -> Result<Scheduling, String> {
    let mut chosen = Scheduling::default();
    if !scheduler.is_empty() {
        chosen.scheduler = Scheduler::known(scheduler).ok_or_else(|| {
            format!(
                "scheduler: {scheduler:?} is none; write one of {}",
                Scheduler::names()
            )
        })?;
    }
    chosen.scheduler_flags = match (flags, &chosen.scheduler) {
        ([], Scheduler::MaglevHash) => parse_flags("flag-2"),
        (flags, _) => parse_flags(&flags.join(",")),
    }
    .map_err(|word| {
        format!("schedulerFlags: {word:?} is none; write some of flag-1, flag-2, flag-3")
    })?;
    Ok(chosen)
}

/// Which clients of a ClusterIP are within the cluster. Without a mode it is
/// `ClusterCIDR`, and without a cluster CIDR that says nothing.
fn detect_local(
    mode: &str,
    options: DetectLocalOptions,
    has_cluster_cidr: bool,
) -> Result<Option<DetectLocal>, String> {
    let named = |field: &str, name: Option<String>| {
        name.filter(|name| !name.is_empty()).ok_or_else(|| {
            format!("detectLocal.{field}: is empty, and detectLocalMode {mode} needs it; name it")
        })
    };
    match mode {
        "" | "ClusterCIDR" => Ok(has_cluster_cidr.then_some(DetectLocal::ClusterCidr)),
        "NodeCIDR" => Ok(Some(DetectLocal::NodeCidr)),
        "BridgeInterface" => named("bridgeInterface", options.bridge_interface)
            .map(|name| Some(DetectLocal::BridgeInterface(name))),
        "InterfaceNamePrefix" => named("interfaceNamePrefix", options.interface_name_prefix)
            .map(|prefix| Some(DetectLocal::InterfaceNamePrefix(prefix))),
        other => Err(format!(
            "detectLocalMode: {other:?} is none; write one of ClusterCIDR, NodeCIDR, BridgeInterface, \
             InterfaceNamePrefix"
        )),
    }
}

/// How VIPs are bound.
fn vip_binding(way: &str, device: &str) -> Result<VipBinding, String> {
    match (way, device) {
        ("" | "address", "") => Ok(VipBinding::Address),
        ("route", "") => Ok(VipBinding::Route),
        ("device", "") => Err(
            "vipBinding: device binds VIPs on the device that vipDevice names, and it names none; \
             write vipDevice: eth0, or vipBinding: address"
                .to_owned(),
        ),
        ("device", name) => alias_device(name).map(VipBinding::Device),
        ("" | "address" | "route", name) => {
            let way = if way.is_empty() { "address" } else { way };
            Err(format!(
                "vipDevice: {name} is of use with vipBinding: device alone, and vipBinding is {way}; \
                 leave vipDevice out, or write vipBinding: device"
            ))
        }
        (other, _) => Err(format!(
            "vipBinding: {other:?} is none; write address, route or device"
        )),
    }
}

fn estimation(word: &str) -> Result<Estimation, String> {
    match word {
        "" | "auto" => Ok(Estimation::Auto),
        "always" => Ok(Estimation::Always),
        "never" => Ok(Estimation::Never),
        other => Err(format!(
            "estimation: {other:?} is none; write auto, always or never"
        )),
    }
}

fn table_bits(written: Option<u8>) -> Result<Option<u8>, String> {
    match written {
        Some(bits) if !CONNECTION_TABLE_BITS.contains(&bits) => Err(format!(
            "connectionTableBits: {bits} is none that IPVS has; write {} to {}, which are the binary \
             logarithm of the number of buckets",
            CONNECTION_TABLE_BITS.start(),
            CONNECTION_TABLE_BITS.end()
        )),
        written => Ok(written),
    }
}

fn alias_device(name: &str) -> Result<IfName, String> {
    if is_of_a_pod(name) {
        return Err(format!(
            "vipDevice: {name} is like the devices of pods, which come and go; name a device of the \
             node, such as eth0"
        ));
    }
    IfName::try_from(name.to_owned()).map_err(|error| format!("vipDevice: {error}"))
}

fn port_range(text: &str) -> Result<std::ops::RangeInclusive<u16>, String> {
    let wrong = || format!("nodePortRange: {text:?} is no range of ports; write it as 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let number = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
    let (first, last) = (number(first)?, number(last)?);
    if first == 0 || first > last {
        return Err(wrong());
    }
    let range = first..=last;
    let policy = Policy {
        node_ports: range.clone(),
        ..Policy::default()
    };
    // Thousands of connections to one address at a time need thousands of ports.
    if policy.source_ports().len() < 4096 {
        return Err(format!(
            "nodePortRange: {text} leaves no room for the source ports of replaced addresses; \
             give a smaller range"
        ));
    }
    Ok(range)
}

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
