//! What becomes of each field of kube-proxy's configuration.
//!
//! [`FIELDS`] is the one list: the lines that an agent says about its file are made of it, and
//! docs/configuration.md has a row for each.

use serde_json::Value;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is heeded.
    Heeded,
    /// It is heeded, and this is worth a word where it is set.
    HeededBut(&'static str),
    /// It has no effect, and this is what happens instead.
    Instead(&'static str),
}

/// A field by its path, kube-proxy's own defaults as they are written, and its fate.
pub(super) type Field = (&'static str, &'static [&'static str], Fate);

use Fate::{Heeded, HeededBut, Instead};

const AT_ONCE: &str = "changes are applied at once";
const ALL_THE_TIME: &str = "changes are applied at once, and the kernel is compared all the time; \
                            /healthz fails when a change has waited for twice as long";
const BY_WATCH: &str = "no effect: objects are followed by watching them, as JSON, without a limit \
                        of requests a second";
const OTHER_MODE: &str = "no effect: it is of another mode of kube-proxy, and services are \
                          programmed into IPVS";
const NO_MARK: &str = "no effect: whose source is replaced is asked of connection tracking, and no \
                       packet gets a mark for it";
const OUTDATED: &str = "no effect: it is of a kube-proxy that had a mode userspace";

/// Every field of `kubeproxy.config.k8s.io/v1alpha1` up to Kubernetes 1.36, and some that it
/// had before. A field that is none of them is told as unknown.
pub(super) const FIELDS: &[Field] = &[
    ("apiVersion", &[], Heeded),
    ("kind", &[], Heeded),
    ("mode", &[], Heeded),
    ("hostnameOverride", &[], Heeded),
    (
        "bindAddress",
        &["0.0.0.0", "::"],
        Instead(
            "no effect: the node's addresses are those that the machine and its Node object have",
        ),
    ),
    (
        "bindAddressHardFail",
        &[],
        Instead("no effect: a port that is taken is tried again, and never ends the agent"),
    ),
    ("healthzBindAddress", &[], Heeded),
    ("metricsBindAddress", &[], Heeded),
    ("clusterCIDR", &[], Heeded),
    ("detectLocalMode", &[], Heeded),
    ("detectLocal.bridgeInterface", &[], Heeded),
    ("detectLocal.interfaceNamePrefix", &[], Heeded),
    ("nodePortAddresses", &[], Heeded),
    ("clientConnection.kubeconfig", &[], Heeded),
    (
        "clientConnection.acceptContentTypes",
        &[],
        Instead(BY_WATCH),
    ),
    (
        "clientConnection.contentType",
        &["application/vnd.kubernetes.protobuf", "application/json"],
        Instead(BY_WATCH),
    ),
    ("clientConnection.qps", &["5", "5.0"], Instead(BY_WATCH)),
    ("clientConnection.burst", &["10"], Instead(BY_WATCH)),
    ("configSyncPeriod", &["15m0s", "15m"], Instead(BY_WATCH)),
    ("ipvs.scheduler", &[], Heeded),
    ("ipvs.excludeCIDRs", &[], Heeded),
    ("ipvs.strictARP", &[], Heeded),
    ("ipvs.tcpTimeout", &[], Heeded),
    ("ipvs.tcpFinTimeout", &[], Heeded),
    ("ipvs.udpTimeout", &[], Heeded),
    ("ipvs.syncPeriod", &["30s"], HeededBut(ALL_THE_TIME)),
    ("ipvs.minSyncPeriod", &["1s"], Instead(AT_ONCE)),
    ("iptables.masqueradeAll", &[], Heeded),
    ("iptables.masqueradeBit", &["14"], Instead(NO_MARK)),
    (
        "iptables.localhostNodePorts",
        &["false"],
        Instead(
            "no effect: node ports are not served at 127.0.0.1, nor are they by kube-proxy's IPVS mode",
        ),
    ),
    ("iptables.syncPeriod", &["30s"], Instead(OTHER_MODE)),
    ("iptables.minSyncPeriod", &["1s"], Instead(OTHER_MODE)),
    (
        "nftables.masqueradeAll",
        &[],
        HeededBut("it counts where mode is nftables, as iptables.masqueradeAll does elsewhere"),
    ),
    ("nftables.masqueradeBit", &["14"], Instead(NO_MARK)),
    ("nftables.syncPeriod", &["30s"], Instead(OTHER_MODE)),
    ("nftables.minSyncPeriod", &["1s"], Instead(OTHER_MODE)),
    ("conntrack.maxPerCore", &[], Heeded),
    ("conntrack.min", &[], Heeded),
    ("conntrack.tcpEstablishedTimeout", &[], Heeded),
    ("conntrack.tcpCloseWaitTimeout", &[], Heeded),
    ("conntrack.udpTimeout", &[], Heeded),
    ("conntrack.udpStreamTimeout", &[], Heeded),
    (
        "conntrack.tcpBeLiberal",
        &[],
        Instead(
            "no effect: set net.netfilter.nf_conntrack_tcp_be_liberal=1 yourself where you need it",
        ),
    ),
    (
        "conntrack.max",
        &[],
        Instead("no effect: maxPerCore and min say it, as with kube-proxy"),
    ),
    (
        "enableProfiling",
        &[],
        Instead("no effect: the agent serves no profiles"),
    ),
    (
        "showHiddenMetricsForVersion",
        &[],
        Instead("no effect: no metric is hidden"),
    ),
    (
        "oomScoreAdj",
        &["-999"],
        Instead(
            "no effect: give it to whatever starts the agent (OOMScoreAdjust= of a unit, a priority class of a pod)",
        ),
    ),
    (
        "featureGates",
        &[],
        Instead("no effect: they turn on or off parts of kube-proxy"),
    ),
    (
        "logging",
        &["text"],
        Instead("no effect: --v and FERRULE_LOG set the level of the log, --log-format its form"),
    ),
    ("portRange", &[], Instead(OUTDATED)),
    ("udpIdleTimeout", &["250ms"], Instead(OUTDATED)),
    ("resourceContainer", &["/kube-proxy"], Instead(OUTDATED)),
    ("winkernel", &[], Instead("no effect: it is for Windows")),
    (
        "windowsRunAsService",
        &[],
        Instead("no effect: it is for Windows"),
    ),
];

/// Longest value that is repeated in a line.
const MAX_SHOWN: usize = 60;

/// Fields that have fields of their own.
pub(super) const GROUPS: [&str; 6] = [
    "clientConnection",
    "conntrack",
    "detectLocal",
    "iptables",
    "ipvs",
    "nftables",
];

/// A line for each field that is set and does not do what it does with kube-proxy, in the
/// order of the file's names.
pub(super) fn lines(file: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    collect("", file, &mut lines);
    lines.extend(of_another_mode(file));
    lines
}

/// Fields that are heeded, and not with the mode that stands beside them.
fn of_another_mode(file: &Value) -> Vec<String> {
    let text = |field: &str| file.get(field).and_then(Value::as_str).unwrap_or_default();
    let is_nftables = text("mode") == "nftables";
    let local = text("detectLocalMode");
    let fields = [
        (
            "/iptables/masqueradeAll",
            !is_nftables,
            "mode is nftables, and nftables.masqueradeAll counts",
        ),
        (
            "/detectLocal/bridgeInterface",
            local == "BridgeInterface",
            "it counts where detectLocalMode is BridgeInterface",
        ),
        (
            "/detectLocal/interfaceNamePrefix",
            local == "InterfaceNamePrefix",
            "it counts where detectLocalMode is InterfaceNamePrefix",
        ),
    ];
    let idle = fields.into_iter().filter(|(_, counts, _)| !counts);
    let set = idle.filter_map(|(pointer, _, words)| {
        let value = file
            .pointer(pointer)
            .filter(|value| !is_default(value, &[]))?;
        let path = pointer.trim_start_matches('/').replace('/', ".");
        Some(format!("{}: no effect: {words}", shown(&path, value)))
    });
    set.collect()
}

fn collect(path: &str, value: &Value, lines: &mut Vec<String>) {
    let Value::Object(entries) = value else {
        return;
    };
    for (name, value) in entries {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        let within = format!("{path}.");
        match FIELDS.iter().find(|(known, ..)| *known == path) {
            Some((_, defaults, fate)) => match fate {
                Heeded => {}
                HeededBut(words) | Instead(words) => {
                    if !is_default(value, defaults) {
                        lines.push(format!("{}: {words}", shown(&path, value)));
                    }
                }
            },
            None if FIELDS.iter().any(|(known, ..)| known.starts_with(&within)) => {
                collect(&path, value, lines);
            }
            None => lines.push(format!(
                "{}: no effect: this release of Ferrule does not know the field; see that it is spelled as kube-proxy has it",
                shown(&path, value)
            )),
        }
    }
}

/// Whether a value is as if it were not there: zero, empty, null, or kube-proxy's own default.
fn is_default(value: &Value, defaults: &[&str]) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => defaults.contains(&"true"),
        Value::Number(number) => {
            number.as_f64() == Some(0.0) || defaults.contains(&number.to_string().as_str())
        }
        Value::String(text) => {
            matches!(text.as_str(), "" | "0" | "0s") || defaults.contains(&text.as_str())
        }
        Value::Array(values) => values.is_empty(),
        Value::Object(entries) => entries.values().all(|value| is_default(value, defaults)),
    }
}

fn shown(path: &str, value: &Value) -> String {
    let text = match value {
        Value::Object(_) | Value::Array(_) => return path.to_owned(),
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
    };
    if text.len() > MAX_SHOWN {
        return path.to_owned();
    }
    format!("{path} is {text}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_zero_empty_null_or_kube_proxys_default_has_no_line() {
        let file = json!({
            "bindAddress": "0.0.0.0", "configSyncPeriod": "15m0s", "oomScoreAdj": null,
            "clientConnection": {"qps": 5, "burst": 0, "contentType": ""},
            "logging": {"flushFrequency": 0, "options": {"json": {"infoBufferSize": "0"}}},
            "winkernel": {"enableDSR": false, "sourceVip": ""},
            "ipvs": {"scheduler": "lc", "syncPeriod": "30s"},
        });
        assert_eq!(lines(&file), Vec::<String>::new());
    }

    #[test]
    fn every_other_field_has_a_line_with_its_path() {
        for (path, _, fate) in FIELDS {
            let mut file = json!("7m0s");
            for name in path.rsplit('.') {
                file = json!({ name: file });
            }
            let mut lines = Vec::new();
            collect("", &file, &mut lines);
            match fate {
                Heeded => assert!(lines.is_empty(), "{lines:?}"),
                HeededBut(words) | Instead(words) => {
                    assert_eq!(lines, [format!("{path} is 7m0s: {words}")]);
                }
            }
        }
    }

    #[test]
    fn what_another_field_makes_idle_is_said() {
        let file = json!({
            "mode": "nftables",
            "detectLocalMode": "BridgeInterface",
            "iptables": {"masqueradeAll": true},
            "detectLocal": {"bridgeInterface": "cni0", "interfaceNamePrefix": "veth"},
        });
        assert_eq!(
            lines(&file),
            [
                "iptables.masqueradeAll is true: no effect: mode is nftables, and nftables.masqueradeAll counts",
                "detectLocal.interfaceNamePrefix is veth: no effect: it counts where detectLocalMode is InterfaceNamePrefix",
            ]
        );
        let file =
            json!({"iptables": {"masqueradeAll": true}, "detectLocal": {"bridgeInterface": ""}});
        assert_eq!(lines(&file), Vec::<String>::new());
    }

    #[test]
    fn unknown_fields_are_named_wherever_they_are() {
        let file = json!({"ipvs": {"masqueradeAll": true}, "shiny": {"new": null}});
        let lines = lines(&file);
        assert!(lines[0].starts_with("ipvs.masqueradeAll is true: no effect"));
        assert!(lines[1].starts_with("shiny: no effect"), "{lines:?}");
    }

    /// docs/configuration.md has a row for each field, and no other.
    #[test]
    fn every_field_is_documented() {
        let docs = include_str!("../../../../docs/configuration.md");
        let (_, table) = docs.split_once("| field of kube-proxy |").unwrap();
        let table = table.split_once("\n\n").map_or(table, |(table, _)| table);
        let mut documented = BTreeSet::new();
        for row in table.lines().skip(2) {
            let cell = row.trim_start_matches('|').split('|').next().unwrap();
            documented.extend(cell.split('`').skip(1).step_by(2).map(str::to_owned));
        }
        let fields: BTreeSet<String> = FIELDS.iter().map(|(path, ..)| (*path).to_owned()).collect();
        assert_eq!(documented, fields);
    }
}
