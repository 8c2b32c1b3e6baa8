//! The result of ADD, in the format of each version of the specification.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::check::maybe;
use crate::config::{invalid, typed};
use crate::failure::Failure;
use crate::pair::{self, Pair};
use crate::version::SpecVersion;

/// What the plugin before us had made: `prevResult`, in the format of the version
/// that we answer in, which the runtime sees to. It becomes a part of our own
/// result, so it is looked at before anything is made.
#[derive(Debug, Default)]
pub(crate) struct Before {
    result: Map<String, Value>,
    interfaces: Vec<Value>,
    ips: Vec<Value>,
    routes: Vec<Value>,
}

/// What every runtime reads of an interface.
#[derive(Deserialize)]
struct Interface {
    #[serde(rename = "name")]
    _name: String,
    #[serde(rename = "mac")]
    _mac: Option<String>,
    #[serde(rename = "sandbox")]
    _sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    address: IpNetwork,
    #[serde(default, rename = "gateway", deserialize_with = "maybe")]
    _gateway: Option<IpAddr>,
    interface: Option<usize>,
}

#[derive(Deserialize)]
struct Route {
    #[serde(rename = "dst")]
    _dst: IpNetwork,
    #[serde(default, rename = "gw", deserialize_with = "maybe")]
    _gw: Option<IpAddr>,
}

impl Before {
    /// Reads `prevResult`.
    ///
    /// # Errors
    /// When it is no result; the field is named.
    pub(crate) fn read(version: SpecVersion, previous: Option<&Value>) -> Result<Self, Failure> {
        let mut result = match previous {
            None => Map::from_iter([("dns".to_owned(), json!({}))]),
            Some(Value::Object(previous)) => previous.clone(),
            Some(_) => return Err(no_result("prevResult", "is not an object")),
        };
        let interfaces = take(&mut result, "interfaces")?;
        each::<Interface>("interfaces", &interfaces)?;
        let mut ips = take(&mut result, "ips")?;
        let addresses = each::<Ip>("ips", &ips)?;
        for (position, (ip, address)) in ips.iter_mut().zip(addresses).enumerate() {
            if let Some(index) = address.interface
                && index >= interfaces.len()
            {
                let field = format!("prevResult.ips[{position}].interface");
                let words = format!("is {index}, and there are {} interfaces", interfaces.len());
                return Err(no_result(&field, &words));
            }
            if let Some(ip) = ip.as_object_mut() {
                set_family(version, ip, address.address);
            }
        }
        let routes = take(&mut result, "routes")?;
        each::<Route>("routes", &routes)?;
        Ok(Self {
            result,
            interfaces,
            ips,
            routes,
        })
    }
}

/// A list of a result; one that is missing is empty.
fn take(result: &mut Map<String, Value>, name: &str) -> Result<Vec<Value>, Failure> {
    match result.remove(name) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(no_result(&format!("prevResult.{name}"), "is not a list")),
    }
}

/// The elements of a list, as far as we look at them.
fn each<T: for<'de> Deserialize<'de>>(list: &str, items: &[Value]) -> Result<Vec<T>, Failure> {
    let read = |(position, item): (usize, &Value)| {
        let field = format!("prevResult.{list}[{position}]");
        if item.is_object() {
            typed(&field, item)
        } else {
            Err(no_result(&field, "is not an object"))
        }
    };
    items.iter().enumerate().map(read).collect()
}

/// Before 1.0.0 an address has to say its family; since then it must not.
fn set_family(version: SpecVersion, ip: &mut Map<String, Value>, address: IpNetwork) {
    if version < SpecVersion::V1_0_0 {
        let family = if address.is_ipv6() { "6" } else { "4" };
        ip.insert("version".to_owned(), family.into());
    } else {
        ip.remove("version");
    }
}

fn no_result(field: &str, problem: &str) -> Failure {
    invalid(format!(
        "{field} of the network configuration {problem}: it must be the result of the plugin before ferrule"
    ))
}

/// What ADD prints: what we made, behind what the plugin before us had made.
/// `netns` is the path as the runtime gave it.
pub(crate) fn added(version: SpecVersion, pair: &Pair, netns: &str, before: Before) -> Value {
    let Before {
        mut result,
        mut interfaces,
        mut ips,
        mut routes,
    } = before;
    let made = made(version, pair, netns, interfaces.len() + 1);
    interfaces.extend(made.interfaces);
    ips.extend(made.ips);
    routes.extend(made.routes);
    result.insert("cniVersion".to_owned(), version.to_string().into());
    result.insert("interfaces".to_owned(), interfaces.into());
    result.insert("ips".to_owned(), ips.into());
    result.insert("routes".to_owned(), routes.into());
    result.into()
}

/// What we made, as it stands in a result.
struct Made {
    interfaces: Vec<Value>,
    ips: Vec<Value>,
    routes: Vec<Value>,
}

/// What we made; `pod_end` is the position of the pod's end among all interfaces.
fn made(version: SpecVersion, pair: &Pair, netns: &str, pod_end: usize) -> Made {
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
            set_family(version, &mut ip, *address);
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
    Made {
        interfaces: vec![host, pod],
        ips,
        routes,
    }
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::{Attachment, ContainerId, IfName, NetworkName};

    use super::*;
    use crate::failure::Code;

    fn behind(version: SpecVersion, previous: Option<&Value>) -> Result<Value, Failure> {
        let attachment = Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let network = NetworkName::try_from("pods".to_owned()).unwrap();
        let addresses = ["10.0.0.2/32", "fd00::2/128"].map(|text| text.parse().unwrap());
        let pair = Pair::new(&attachment, &network, 1450, addresses.to_vec());
        let before = Before::read(version, previous)?;
        Ok(added(version, &pair, "/run/netns/x", before))
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
            (json!({"interfaces": [5]}), "prevResult.interfaces[0] of"),
            (json!({"interfaces": [["eth0"]]}), "[0] of"),
            (json!({"interfaces": [{}]}), "prevResult.interfaces[0] of"),
            (
                json!({"ips": [{"address": "zz"}]}),
                "prevResult.ips[0].address of",
            ),
            (json!({"ips": [{}]}), "prevResult.ips[0] of"),
            (
                json!({"ips": [{"address": "10.9.0.2/24", "interface": 99}]}),
                "prevResult.ips[0].interface of the network configuration is 99",
            ),
            (
                json!({"routes": [{"dst": "0.0.0.0/0"}, {"dst": "x"}]}),
                "prevResult.routes[1].dst of",
            ),
            (
                json!({"routes": [{"dst": "0.0.0.0/0", "gw": 1}]}),
                "prevResult.routes[0].gw of",
            ),
        ] {
            let failure = behind(SpecVersion::V1_0_0, Some(&wrong)).unwrap_err();
            assert_eq!(failure.code(), Code::InvalidConfiguration, "{failure}");
            assert!(failure.to_string().contains(field), "{failure}");
        }
        let nulls = json!({"interfaces": null, "ips": null, "routes": null});
        assert!(behind(SpecVersion::V1_0_0, Some(&nulls)).is_ok());
        // So Go writes an address that there is not.
        let empty = json!({"routes": [{"dst": "0.0.0.0/0", "gw": ""}]});
        assert!(behind(SpecVersion::V1_0_0, Some(&empty)).is_ok());
    }

    #[test]
    fn the_family_of_what_was_before_us_is_told_as_the_version_has_it() {
        for (version, given, family) in [
            (SpecVersion::V0_4_0, Value::Null, json!("6")),
            (SpecVersion::V0_4_0, json!("6"), json!("6")),
            (SpecVersion::V1_0_0, json!("6"), Value::Null),
        ] {
            let before = json!({"ips": [{"address": "fd09::2/64", "version": given}]});
            let result = behind(version, Some(&before)).unwrap();
            assert_eq!(result["ips"][0]["version"], family, "{version}");
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
