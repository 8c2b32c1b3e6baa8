//! The configuration file.
//!
//! Everything in it is optional; a field that is absent, empty or null has its
//! default. A field that is not known is an error, because a setting that
//! silently does nothing is worse than an agent that does not start.

use std::fmt;
use std::path::{Path, PathBuf};

use ferrule_model::network::{NodePortAddresses, Policy, parse_network};
use ipnetwork::IpNetwork;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer};

use crate::source::document;

/// Default of `auditBudgetPercent`, in percent of one core.
const AUDIT_BUDGET: f64 = 0.3;

const API_VERSION: &str = "ferrule.io/v1alpha1";
const KIND: &str = "AgentConfiguration";

/// What the file says, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// What is decided about addresses.
    pub(crate) policy: Policy,
    /// Share of one core that the audit of real servers may take, in percent.
    pub(crate) audit_budget: f64,
    /// URLs of API servers, instead of the one that comes with the credentials.
    pub(crate) api_servers: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            audit_budget: AUDIT_BUDGET,
            api_servers: Vec::new(),
        }
    }
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
    #[serde(default)]
    audit_budget_percent: Option<f64>,
    #[serde(default)]
    api_server: Option<Vec<String>>,
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
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|message| ConfigError::Invalid {
            path: path.to_owned(),
            message,
        })
    }

    fn parse(text: &str) -> Result<Self, String> {
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
        let cluster = file.cluster_cidr.unwrap_or_default();
        let cluster: Vec<String> = cluster
            .split(',')
            .map(str::trim)
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
            .collect();
        Ok(Self {
            policy: Policy {
                cluster_cidrs: networks("clusterCIDR", &cluster)?,
                service_cidrs: networks("serviceCIDRs", &file.service_cidrs.unwrap_or_default())?,
                node_port_addresses: addresses(&file.node_port_addresses.unwrap_or_default())?,
                non_masquerade: match file.non_masquerade_cidrs {
                    Some(texts) if !texts.is_empty() => {
                        Some(networks("nonMasqueradeCIDRs", &texts)?)
                    }
                    Some(_) | None => None,
                },
                masquerade_all: file.masquerade_all.unwrap_or(false),
                node_ports: match file.node_port_range.as_deref() {
                    None | Some("") => Policy::default().node_ports,
                    Some(text) => port_range(text)?,
                },
            },
            audit_budget: budget,
            api_servers: file.api_server.unwrap_or_default(),
        })
    }
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
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n";

    #[test]
    fn absent_empty_and_null_are_defaults() {
        for text in [
            HEAD.to_owned(),
            format!("{HEAD}clusterCIDR: \"\"\nnodePortAddresses: []\nnodePortRange: \"\"\n"),
            format!("{HEAD}clusterCIDR:\nnodePortAddresses: null\nmasqueradeAll: ~\n"),
        ] {
            assert_eq!(Config::parse(&text).unwrap(), Config::default(), "{text}");
        }
        assert_eq!(Config::read(None).unwrap(), Config::default());
    }

    #[test]
    fn every_field_is_read() {
        let text = format!(
            "{HEAD}clusterCIDR: 10.244.0.0/16, fd00::/48\nserviceCIDRs: [10.96.0.0/12]\n\
             nodePortAddresses: [192.0.2.0/24]\nnonMasqueradeCIDRs: [10.0.0.0/8]\n\
             masqueradeAll: true\nnodePortRange: 20000-22767\nauditBudgetPercent: 5\n"
        );
        let config = Config::parse(&text).unwrap();
        assert_eq!(config.policy.cluster_cidrs.len(), 2);
        assert_eq!(config.policy.node_ports, 20_000..=22_767);
        assert!(config.policy.masquerade_all);
        assert!((config.audit_budget - 5.0).abs() < f64::EPSILON);
        assert!(matches!(
            config.policy.node_port_addresses,
            NodePortAddresses::Within(_)
        ));
    }

    #[test]
    fn mistakes_are_named_with_field_and_remedy() {
        let said = |line: &str| Config::parse(&format!("{HEAD}{line}\n")).unwrap_err();
        for (line, words) in [
            ("clusterCIDR: 10.0.0.1", "clusterCIDR: \"10.0.0.1\" is not"),
            ("nodePortAddresses: [primary, 10.0.0.0/8]", "write it alone"),
            ("nodePortRange: 5", "30000-32767"),
            ("nodePortRange: 1024-65535", "smaller range"),
            ("auditBudgetPercent: 0", "auditBudgetPercent"),
            ("clusterCidr: x", "clusterCidr"),
            ("nodePortAddresses: primary", "line 3: nodePortAddresses: "),
            ("nodePortAddresses: [~]", "line 3: nodePortAddresses[0]: "),
            ("masqueradeAll: 1", "line 3: masqueradeAll: "),
            ("auditBudgetPercent: much", "line 3: auditBudgetPercent: "),
            ("masqueradeAll: true\nmasqueradeAll: true", "line 4: "),
        ] {
            let error = said(line);
            assert!(error.contains(words), "{line}: {error}");
            assert!(!error.contains("Option"), "{line}: {error}");
        }
        assert!(
            Config::parse("kind: x\n")
                .unwrap_err()
                .contains("apiVersion")
        );
        assert!(Config::parse("").unwrap_err().contains("apiVersion"));
    }
}
