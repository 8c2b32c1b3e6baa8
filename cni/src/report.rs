//! The result of ADD, in the format of each version of the specification.

use serde_json::{Map, Value, json};

use crate::config::invalid;
use crate::failure::Failure;
use crate::pair::{self, Pair};
use crate::version::SpecVersion;

/// What ADD prints: what we made, behind what the plugin before us had made.
/// `netns` is the path as the runtime gave it; `previous` is in the format of
/// `version`, which the runtime sees to.
///
/// # Errors
/// When `previous` is no result.
pub(crate) fn added(
    version: SpecVersion,
    pair: &Pair,
    netns: &str,
    previous: Option<&Value>,
) -> Result<Value, Failure> {
    let mut result = match previous {
        None => json!({"dns": {}}),
        Some(previous) if previous.is_object() => previous.clone(),
        Some(_) => return Err(no_result("prevResult", "an object")),
    };
    result["cniVersion"] = version.to_string().into();
    let before = list(&mut result, "interfaces")?.len();
    let made = made(version, pair, netns, before + 1);
    for (name, mut items) in made {
        list(&mut result, name)?.append(&mut items);
    }
    Ok(result)
}

/// A list of a result; one that is missing is empty.
fn list<'a>(result: &'a mut Value, name: &str) -> Result<&'a mut Vec<Value>, Failure> {
    let slot = &mut result[name];
    if slot.is_null() {
        *slot = json!([]);
    }
    slot.as_array_mut()
        .ok_or_else(|| no_result(&format!("prevResult.{name}"), "a list"))
}

fn no_result(field: &str, expected: &str) -> Failure {
    invalid(format!(
        "{field} of the network configuration is not {expected}: it must be the result of the plugin before ferrule"
    ))
}

/// What we made; `pod_end` is the position of the pod's end among all interfaces.
fn made(
    version: SpecVersion,
    pair: &Pair,
    netns: &str,
    pod_end: usize,
) -> [(&'static str, Vec<Value>); 3] {
    let mut host = json!({"name": pair.host_name, "mac": pair.host_mac.to_string()});
    let mut pod = json!({
        "name": pair.pod_name,
        "mac": pair.pod_mac.to_string(),
        "sandbox": netns,
    });
    if version >= SpecVersion::V1_1_0 {
        for end in [&mut host, &mut pod] {
            end["mtu"] = pair.mtu.into();
        }
    }
    let ips: Vec<Value> = pair
        .addresses
        .iter()
        .map(|address| {
            let mut ip = Map::new();
            if version < SpecVersion::V1_0_0 {
                let family = if address.is_ipv6() { "6" } else { "4" };
                ip.insert("version".to_owned(), family.into());
            }
            ip.insert("address".to_owned(), address.to_string().into());
            let gateway = pair::gateway(address.ip()).to_string();
            ip.insert("gateway".to_owned(), gateway.into());
            ip.insert("interface".to_owned(), pod_end.into());
            ip.into()
        })
        .collect();
    let routes: Vec<Value> = pair
        .addresses
        .iter()
        .map(|address| {
            let (destination, length) = pair::everywhere(address.ip());
            json!({
                "dst": format!("{destination}/{length}"),
                "gw": pair::gateway(address.ip()),
            })
        })
        .collect();
    [
        ("interfaces", vec![host, pod]),
        ("ips", ips),
        ("routes", routes),
    ]
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::{Attachment, ContainerId, IfName, NetworkName};

    use super::*;

    fn behind(version: SpecVersion, previous: Option<&Value>) -> Result<Value, Failure> {
        let attachment = Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let network = NetworkName::try_from("pods".to_owned()).unwrap();
        let addresses = ["10.0.0.2/32", "fd00::2/128"].map(|text| text.parse().unwrap());
        let pair = Pair::new(&attachment, &network, 1450, addresses.to_vec());
        added(version, &pair, "/run/netns/x", previous)
    }

    fn result(version: SpecVersion) -> Value {
        behind(version, None).unwrap()
    }

    #[test]
    fn what_was_before_us_stays() {
        let before = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": "tap0", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "10.9.0.2/24", "interface": 0}],
            "dns": {"nameservers": ["10.96.0.10"]},
            "odd": true,
        });
        let result = behind(SpecVersion::V1_0_0, Some(&before)).unwrap();
        assert_eq!(result["interfaces"][0], before["interfaces"][0]);
        assert_eq!(result["interfaces"][2]["name"], "eth0");
        assert_eq!(result["ips"][0], before["ips"][0]);
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["routes"].as_array().unwrap().len(), 2);
        assert_eq!(result["dns"], before["dns"]);
        assert_eq!(result["odd"], true);
        for (wrong, field) in [
            (json!([]), "prevResult of"),
            (json!({"ips": {}}), "prevResult.ips"),
            (json!({"interfaces": "x"}), "prevResult.interfaces"),
        ] {
            let failure = behind(SpecVersion::V1_0_0, Some(&wrong)).unwrap_err();
            assert!(failure.to_string().contains(field), "{failure}");
        }
    }

    #[test]
    fn each_version_has_its_format() {
        for (version, family, mtu) in [
            (SpecVersion::V0_3_1, json!("4"), Value::Null),
            (SpecVersion::V0_4_0, json!("4"), Value::Null),
            (SpecVersion::V1_0_0, Value::Null, Value::Null),
            (SpecVersion::V1_1_0, Value::Null, json!(1450)),
        ] {
            let result = result(version);
            assert_eq!(result["cniVersion"], version.to_string());
            assert_eq!(result["ips"][0]["version"], family);
            assert_eq!(result["interfaces"][1]["mtu"], mtu);
            assert_eq!(result["interfaces"][1]["sandbox"], "/run/netns/x");
            assert_eq!(result["interfaces"][0].get("sandbox"), None);
            assert_eq!(
                result["routes"],
                json!([
                    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                    {"dst": "::/0", "gw": "fe80::1"},
                ])
            );
            assert_eq!(result["ips"][1]["address"], "fd00::2/128");
            assert_eq!(result["ips"][1]["interface"], 1);
        }
    }
}
