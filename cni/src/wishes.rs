//! What a runtime asks for one pod, beyond the network configuration: addresses
//! and a MAC.
//!
//! They come as capabilities in `runtimeConfig`, in `args.cni`, and in
//! `CNI_ARGS`, where older runtimes put them. Only ADD looks at them: a wish
//! that makes no sense is no reason to keep a pod from being deleted.

use std::ffi::OsString;
use std::net::IpAddr;
use std::str::FromStr as _;

use ferrule_model::address::Family;
use ipnetwork::IpNetwork;
use serde::Deserialize;

use crate::config::{Config, invalid};
use crate::environment::{Environment, shortened};
use crate::failure::{Code, Failure};
use crate::pair::Mac;

/// Checked wishes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// Addresses, one of each family at most.
    pub(crate) ips: Vec<IpAddr>,
    /// MAC of the pod's interface.
    pub(crate) mac: Option<Mac>,
}

/// `runtimeConfig`, as far as we serve its capabilities.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RuntimeConfig {
    ips: Option<Vec<String>>,
    mac: Option<String>,
}

/// `args`
#[derive(Debug, Default, Deserialize)]
struct Args {
    cni: Option<CniArgs>,
}

/// `args.cni`, by the conventions of the CNI project.
#[derive(Debug, Default, Deserialize)]
struct CniArgs {
    ips: Option<Vec<String>>,
    mac: Option<String>,
}

impl Wishes {
    /// Reads them from wherever they may stand.
    pub(crate) fn read<L>(config: &Config, environment: &Environment<L>) -> Result<Self, Failure>
    where
        L: Fn(&'static str) -> Option<OsString>,
    {
        let runtime: RuntimeConfig = config.field("runtimeConfig")?.unwrap_or_default();
        let args: Args = config.field("args")?.unwrap_or_default();
        let args = args.cni.unwrap_or_default();
        let mut ips = Vec::new();
        for (field, texts) in [
            ("runtimeConfig.ips", runtime.ips.unwrap_or_default()),
            ("args.cni.ips", args.ips.unwrap_or_default()),
        ] {
            for (position, text) in texts.iter().enumerate() {
                let field = format!("{field}[{position}]");
                add_ip(&mut ips, text).map_err(|problem| {
                    invalid(format!("{field} of the network configuration {problem}"))
                })?;
            }
        }
        for text in environment
            .argument("IP")?
            .iter()
            .flat_map(|list| list.split(','))
        {
            add_ip(&mut ips, text)
                .map_err(|problem| environment_failure(format!("CNI_ARGS: IP {problem}")))?;
        }
        let from_config = [
            ("runtimeConfig.mac", runtime.mac),
            ("args.cni.mac", args.mac),
        ];
        let given = from_config
            .into_iter()
            .find_map(|(field, text)| Some((field, text.filter(|text| !text.is_empty())?)));
        let mac = match given {
            Some((field, text)) => Some(mac(&text).map_err(|problem| {
                invalid(format!("{field} of the network configuration {problem}"))
            })?),
            None => environment
                .argument("MAC")?
                .map(|text| mac(&text))
                .transpose()
                .map_err(|problem| environment_failure(format!("CNI_ARGS: MAC {problem}")))?,
        };
        Ok(Self { ips, mac })
    }
}

fn environment_failure(message: String) -> Failure {
    Failure::new(Code::InvalidEnvironment, message)
}

/// An address with or without a prefix length, which does not matter: a pod's
/// address stands alone.
fn add_ip(ips: &mut Vec<IpAddr>, text: &str) -> Result<(), String> {
    let text = text.trim();
    let parsed = text
        .parse::<IpAddr>()
        .or_else(|_| IpNetwork::from_str(text).map(|network| network.ip()));
    let ip = parsed.map_err(|_| {
        format!(
            "is {:?}: it must be an address, such as 10.244.1.7 or 10.244.1.7/24",
            shortened(text)
        )
    })?;
    if ips.contains(&ip) {
        return Ok(());
    }
    let family = Family::of(ip);
    if let Some(other) = ips.iter().find(|other| Family::of(**other) == family) {
        return Err(format!(
            "is {ip}, but {other} is asked for as well: a pod has one {family} address"
        ));
    }
    ips.push(ip);
    Ok(())
}

fn mac(text: &str) -> Result<Mac, String> {
    let wrong = |why| format!("is {:?}: {why}", shortened(text));
    let mut bytes = [0; 6];
    let mut parts = text.split([':', '-']);
    for byte in &mut bytes {
        // `from_str_radix` takes a sign as well.
        let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let part = parts.next().filter(digits);
        *byte = part
            .and_then(|part| u8::from_str_radix(part, 16).ok())
            .ok_or_else(|| wrong("it must be six bytes, such as 02:42:ac:11:00:02"))?;
    }
    if parts.next().is_some() {
        return Err(wrong("it must be six bytes, such as 02:42:ac:11:00:02"));
    }
    if bytes[0] & 1 == 1 || bytes == [0; 6] {
        return Err(wrong(
            "an interface cannot have a group address or all zeros",
        ));
    }
    Ok(Mac(bytes))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(fields: &Value, arguments: &'static str) -> Result<Wishes, Failure> {
        let mut config = fields.clone();
        config["cniVersion"] = "1.0.0".into();
        let config = Config::parse(config.to_string().as_bytes()).unwrap();
        let environment =
            Environment(|variable| (variable == "CNI_ARGS").then(|| OsString::from(arguments)));
        Wishes::read(&config, &environment)
    }

    #[test]
    fn every_place_is_looked_at() {
        assert_eq!(read(&json!({}), "").unwrap(), Wishes::default());
        let ips = |ips: &[&str]| {
            ips.iter()
                .map(|ip| ip.parse().unwrap())
                .collect::<Vec<IpAddr>>()
        };
        let both = json!({
            "runtimeConfig": {"ips": ["10.1.0.7/24"], "mac": "02:AB:00:00:00:01"},
            "args": {"cni": {"ips": ["fd00::7", "10.1.0.7"], "mac": "02:ab:00:00:00:02"}},
        });
        let wishes = read(&both, "MAC=02:ab:00:00:00:03;IP=10.1.0.7").unwrap();
        assert_eq!(wishes.ips, ips(&["10.1.0.7", "fd00::7"]));
        assert_eq!(wishes.mac, Some(Mac([2, 0xab, 0, 0, 0, 1])));
        let old = read(
            &json!({}),
            "IgnoreUnknown=1;IP=fd00::9,10.1.0.9/16;MAC=02-ab-00-00-00-03",
        );
        let old = old.unwrap();
        assert_eq!(old.ips, ips(&["fd00::9", "10.1.0.9"]));
        assert_eq!(old.mac, Some(Mac([2, 0xab, 0, 0, 0, 3])));
        let nulls = json!({"runtimeConfig": {"ips": null, "mac": ""}, "args": null});
        assert_eq!(read(&nulls, "").unwrap(), Wishes::default());
    }

    #[test]
    fn mistakes_are_named() {
        for (fields, arguments, words) in [
            (
                json!({"runtimeConfig": {"ips": ["x"]}}),
                "",
                "runtimeConfig.ips[0] of",
            ),
            (
                json!({"runtimeConfig": {"ips": "10.0.0.1"}}),
                "",
                "runtimeConfig.ips of",
            ),
            (
                json!({"runtimeConfig": {"ips": ["10.0.0.1", "10.0.0.2"]}}),
                "",
                "one IPv4",
            ),
            (
                json!({"runtimeConfig": {"ips": [7]}}),
                "",
                "runtimeConfig.ips[0] of",
            ),
            (json!({"runtimeConfig": []}), "", "runtimeConfig"),
            (
                json!({"runtimeConfig": {"mac": "01:00:00:00:00:00"}}),
                "",
                "group",
            ),
            (
                json!({"runtimeConfig": {"mac": "00:00:00:00:00:00"}}),
                "",
                "zeros",
            ),
            (
                json!({"runtimeConfig": {"mac": "02:00:00:00:00"}}),
                "",
                "runtimeConfig.mac of",
            ),
            (
                json!({"runtimeConfig": {"mac": "02:00:00:00:00:00:00"}}),
                "",
                "six bytes",
            ),
            (
                json!({"runtimeConfig": {"mac": "2:0:0:0:0:0"}}),
                "",
                "six bytes",
            ),
            (
                json!({"runtimeConfig": {"mac": "+2:00:00:00:00:01"}}),
                "",
                "six bytes",
            ),
            (
                json!({"args": {"cni": {"ips": ["10.0.0.300"]}}}),
                "",
                "args.cni.ips[0] of",
            ),
            (
                json!({"args": {"cni": {"mac": true}}}),
                "",
                "args.cni.mac of",
            ),
            (json!({}), "IP=10", "CNI_ARGS: IP"),
            (json!({}), "MAC=zz:00:00:00:00:00", "CNI_ARGS: MAC"),
        ] {
            let failure = read(&fields, arguments).unwrap_err();
            assert!(
                failure.to_string().contains(words),
                "{fields} {arguments}: {failure}"
            );
        }
    }
}
