//! kube-proxy's own configuration, taken as it is.
//!
//! Zero, empty and null are defaults, as kube-proxy has it: its files are full of them. A field
//! that is not known is no error here but a line that names it: a newer kube-proxy has new
//! fields, and its file has to start an agent all the same. So has one whose effect is another
//! with Ferrule ([`fields`] says which).

#[path = "kube_proxy/duration.rs"]
mod duration;
#[path = "kube_proxy/fields.rs"]
mod fields;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ferrule_datapath::ipvs::Timeouts;
use ferrule_datapath::tuning::{Conntrack, Tuning};
use ferrule_model::network::Policy;
use ipnetwork::IpNetwork;
use serde::Deserialize;

use self::duration::GoDuration;
pub(super) use self::duration::written;
use super::{Config, DetectLocalOptions, addresses, detect_local, networks, scheduling};
use crate::source::document;

/// `apiVersion` and `kind` of the file.
pub(super) const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
pub(super) const KIND: &str = "KubeProxyConfiguration";

/// Keys of a `ConfigMap` that holds it: kubeadm's, that of EKS, and what charts write.
const KEYS: [&str; 5] = [
    "config.conf",
    "config",
    "config.yaml",
    "kube-proxy-config.yaml",
    "kube-proxy.yaml",
];

/// Ports of health and metrics where an address names none.
const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;

/// Longest span of time that every kernel counts: it does so in ticks, of which there are up to
/// 1,000 a second.
const LONGEST: Duration = Duration::from_secs(2_147_483);

/// kube-proxy's defaults.
const SYNC_PERIOD: Duration = Duration::from_secs(30);
const MAX_PER_CORE: u32 = 32_768;
const MIN: u32 = 131_072;
const TCP_ESTABLISHED: Duration = Duration::from_hours(24);
const TCP_CLOSE_WAIT: Duration = Duration::from_hours(1);

/// What only kube-proxy's file can say; the default is that of an agent without one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KubeProxy {
    /// Whether there is such a file.
    pub(crate) is_read: bool,
    /// `mode` as it is written.
    pub(crate) mode: String,
    /// Name of the node.
    pub(crate) node: Option<String>,
    /// Credentials for the cluster's API.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Where metrics are served.
    pub(crate) metrics: Option<SocketAddr>,
    /// Where the node's health is told.
    pub(crate) healthz: Option<SocketAddr>,
    /// A change that waits for twice as long makes the node unhealthy.
    pub(crate) sync_period: Duration,
    /// Kernel settings.
    pub(crate) tuning: Tuning,
    /// How long IPVS remembers connections.
    pub(crate) timeouts: Timeouts,
    /// Where other programs may have virtual services.
    pub(crate) excluded: Vec<IpNetwork>,
}

impl Default for KubeProxy {
    fn default() -> Self {
        Self {
            is_read: false,
            mode: String::new(),
            node: None,
            kubeconfig: None,
            metrics: None,
            healthz: None,
            sync_period: SYNC_PERIOD,
            tuning: Tuning::default(),
            timeouts: Timeouts::default(),
            excluded: Vec::new(),
        }
    }
}

/// What is read of the file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    #[serde(default)]
    hostname_override: Option<String>,
    #[serde(default)]
    healthz_bind_address: Option<String>,
    #[serde(default)]
    metrics_bind_address: Option<String>,
    #[serde(default)]
    client_connection: Option<ClientConnection>,
    #[serde(default, rename = "clusterCIDR")]
    cluster_cidr: Option<String>,
    #[serde(default)]
    detect_local_mode: Option<String>,
    #[serde(default)]
    detect_local: Option<DetectLocalOptions>,
    #[serde(default)]
    node_port_addresses: Option<Vec<String>>,
    #[serde(default)]
    mode: Option<String>,
    #[serde(default)]
    ipvs: Option<Ipvs>,
    #[serde(default)]
    iptables: Option<OtherMode>,
    #[serde(default)]
    nftables: Option<OtherMode>,
    #[serde(default)]
    conntrack: Option<ConntrackFile>,
}

#[derive(Debug, Default, Deserialize)]
struct ClientConnection {
    #[serde(default)]
    kubeconfig: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ipvs {
    #[serde(default)]
    scheduler: Option<String>,
    #[serde(default, rename = "excludeCIDRs")]
    exclude_cidrs: Option<Vec<String>>,
    #[serde(default, rename = "strictARP")]
    strict_arp: Option<bool>,
    #[serde(default)]
    sync_period: Option<GoDuration>,
    #[serde(default)]
    tcp_timeout: Option<GoDuration>,
    #[serde(default)]
    tcp_fin_timeout: Option<GoDuration>,
    #[serde(default)]
    udp_timeout: Option<GoDuration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OtherMode {
    #[serde(default)]
    masquerade_all: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConntrackFile {
    #[serde(default)]
    max_per_core: Option<i32>,
    #[serde(default)]
    min: Option<i32>,
    #[serde(default)]
    tcp_established_timeout: Option<GoDuration>,
    #[serde(default)]
    tcp_close_wait_timeout: Option<GoDuration>,
    #[serde(default)]
    udp_timeout: Option<GoDuration>,
    #[serde(default)]
    udp_stream_timeout: Option<GoDuration>,
}

/// A `ConfigMap`.
#[derive(Debug, Default, Deserialize)]
struct ConfigMap {
    #[serde(default)]
    data: Option<BTreeMap<String, String>>,
}

/// The text within a `ConfigMap`.
///
/// # Errors
/// What is missing.
pub(super) fn within_config_map(text: &str) -> Result<String, String> {
    let map: Option<ConfigMap> = document::typed(text).map_err(|error| error.to_string())?;
    let data = map.and_then(|map| map.data).unwrap_or_default();
    let text = KEYS.iter().find_map(|key| data.get(*key));
    text.cloned().ok_or_else(|| {
        let mut keys = KEYS.to_vec();
        let last = keys.pop().unwrap_or_default();
        format!(
            "data: the ConfigMap has none of {} and {last}; give the one of kube-proxy, or the file itself",
            keys.join(", ")
        )
    })
}

/// Reads the file.
///
/// # Errors
/// Field and remedy.
pub(super) fn parse(text: &str) -> Result<Config, String> {
    let value: serde_json::Value = document::typed(text).map_err(|error| error.to_string())?;
    for field in fields::GROUPS {
        if value.get(field).is_some_and(serde_json::Value::is_array) {
            return Err(format!(
                "{field}: is a list; write its fields below it, such as {field}: {{…}}"
            ));
        }
    }
    let file: Option<File> = document::typed(text).map_err(|error| error.to_string())?;
    let file = file.unwrap_or_default();
    let mode = file.mode.unwrap_or_default();
    let mut notes = Vec::from_iter(about_mode(&mode)?);
    notes.extend(fields::lines(&value));
    let cluster = super::comma_separated(file.cluster_cidr.as_deref().unwrap_or_default());
    let of_mode = match mode.as_str() {
        "nftables" => file.nftables,
        _ => file.iptables,
    };
    let ipvs = file.ipvs.unwrap_or_default();
    let local = file.detect_local.unwrap_or_default();
    let cluster_cidrs = networks("clusterCIDR", &cluster)?;
    let local_mode = file.detect_local_mode.unwrap_or_default();
    let policy = Policy {
        detect_local: detect_local(&local_mode, local, !cluster_cidrs.is_empty())?,
        cluster_cidrs,
        node_port_addresses: addresses(&file.node_port_addresses.unwrap_or_default())?,
        masquerade_all: of_mode
            .and_then(|mode| mode.masquerade_all)
            .unwrap_or(false),
        scheduling: scheduling(ipvs.scheduler.as_deref().unwrap_or_default(), &[])
            .map_err(|error| format!("ipvs.{error}"))?,
        ..Policy::default()
    };
    let kubeconfig = file.client_connection.and_then(|of| of.kubeconfig);
    let excluded = ipvs.exclude_cidrs.unwrap_or_default();
    let mut span = |field: &str, written: Option<GoDuration>| {
        let (span, note) = bounded(field, written.unwrap_or_default().0);
        notes.extend(note);
        span
    };
    let kube_proxy = KubeProxy {
        is_read: true,
        mode,
        node: file.hostname_override.as_deref().and_then(host_name),
        kubeconfig: kubeconfig
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        metrics: bind_address(
            "metricsBindAddress",
            file.metrics_bind_address.as_deref(),
            METRICS_PORT,
        )?,
        healthz: bind_address(
            "healthzBindAddress",
            file.healthz_bind_address.as_deref(),
            HEALTHZ_PORT,
        )?,
        sync_period: Some(span("ipvs.syncPeriod", ipvs.sync_period))
            .filter(|period| !period.is_zero())
            .unwrap_or(SYNC_PERIOD),
        tuning: Tuning {
            strict_arp: ipvs.strict_arp.unwrap_or(false),
            conntrack: conntrack(&file.conntrack.unwrap_or_default(), &mut span)?,
            ..Tuning::default()
        },
        timeouts: Timeouts {
            tcp: span("ipvs.tcpTimeout", ipvs.tcp_timeout),
            tcp_fin: span("ipvs.tcpFinTimeout", ipvs.tcp_fin_timeout),
            udp: span("ipvs.udpTimeout", ipvs.udp_timeout),
        },
        excluded: networks("ipvs.excludeCIDRs", &excluded)?,
    };
    Ok(Config {
        policy,
        kube_proxy,
        notes,
        ..Config::default()
    })
}

/// A line where the file asks for another mode than the one there is.
fn about_mode(mode: &str) -> Result<Option<String>, String> {
    match mode {
        "ipvs" => Ok(None),
        "" => Ok(Some(
            "mode is empty, which kube-proxy takes for iptables: services are programmed into IPVS"
                .to_owned(),
        )),
        "iptables" | "nftables" => Ok(Some(format!(
            "mode is {mode}: services are programmed into IPVS"
        ))),
        other => Err(format!(
            "mode: {other:?} is none that kube-proxy has on Linux; write ipvs"
        )),
    }
}

/// A name as kube-proxy makes it of what it is told, or of the machine's.
pub(super) fn host_name(text: &str) -> Option<String> {
    let name = text.trim().to_lowercase();
    (!name.is_empty()).then_some(name)
}

/// A span of time that the kernel takes, and a line where another one is written.
fn bounded(field: &str, span: Duration) -> (Duration, Option<String>) {
    if span <= LONGEST {
        return (span, None);
    }
    let note = format!(
        "{field} is {}: {} in its place, the longest that every kernel takes",
        written(span),
        written(LONGEST)
    );
    (LONGEST, Some(note))
}

/// What is absent or null has kube-proxy's default, and zero leaves the kernel's.
fn conntrack(
    file: &ConntrackFile,
    mut span: impl FnMut(&str, Option<GoDuration>) -> Duration,
) -> Result<Conntrack, String> {
    let or = |written: Option<GoDuration>, usual| Some(written.unwrap_or(GoDuration(usual)));
    let count = |field: &str, written: Option<i32>, default: u32| match written {
        None => Ok(default),
        Some(number) => u32::try_from(number).map_err(|_| {
            format!(
                "conntrack.{field}: {number} is no number of connections; write 0 to leave the \
                 kernel's limit, or more"
            )
        }),
    };
    Ok(Conntrack {
        max_per_core: count("maxPerCore", file.max_per_core, MAX_PER_CORE)?,
        min: count("min", file.min, MIN)?,
        tcp_established: span(
            "conntrack.tcpEstablishedTimeout",
            or(file.tcp_established_timeout, TCP_ESTABLISHED),
        ),
        tcp_close_wait: span(
            "conntrack.tcpCloseWaitTimeout",
            or(file.tcp_close_wait_timeout, TCP_CLOSE_WAIT),
        ),
        udp: span("conntrack.udpTimeout", file.udp_timeout),
        udp_stream: span("conntrack.udpStreamTimeout", file.udp_stream_timeout),
    })
}

/// An address with a port, or an address that gets the usual one.
fn bind_address(field: &str, text: Option<&str>, port: u16) -> Result<Option<SocketAddr>, String> {
    let text = text.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(ip, port)));
    }
    let address: Option<SocketAddr> = text.parse().ok();
    let address = address.filter(|address| address.port() != 0);
    address.map(Some).ok_or_else(|| {
        format!("{field}: {text:?} is no address with a port; write one such as 0.0.0.0:{port}")
    })
}

#[cfg(test)]
#[path = "kube_proxy/tests.rs"]
mod tests;
