//! The result of ADD, in the format of each version of the specification.

use serde_json::{Map, Value, json};

use crate::pair::{self, Pair};
use crate::version::SpecVersion;

/// Position of the pod's end among the interfaces.
const POD_END: usize = 1;

/// What ADD prints. `netns` is the path as the runtime gave it.
pub(crate) fn added(version: SpecVersion, pair: &Pair, netns: &str) -> Value {
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
            ip.insert("interface".to_owned(), POD_END.into());
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
    json!({
        "cniVersion": version.to_string(),
        "interfaces": [host, pod],
        "ips": ips,
        "routes": routes,
        "dns": {},
    })
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::{Attachment, ContainerId, IfName};

    use super::*;

    fn result(version: SpecVersion) -> Value {
        let attachment = Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let addresses = ["10.0.0.2/32", "fd00::2/128"].map(|text| text.parse().unwrap());
        added(
            version,
            &Pair::new(&attachment, 1450, addresses.to_vec()),
            "/run/netns/x",
        )
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
