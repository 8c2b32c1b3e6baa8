//! What a node has programmed and what a plan says it should have, both as
//! lines: the kernel's words on one side, the plan's rows on the other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, bail};
use serde_json::Value;

use crate::dump;
use crate::netns::Netns;

/// A line for each virtual service, real server, address and element of a set.
pub(in crate::cases) type Tables = BTreeSet<String>;

/// Sets of the filter that belong to Services.
const SETS: [&str; 4] = ["vips", "frontends", "external", "hairpins"];

/// Reads the kernel with the operators' tools.
///
/// # Errors
/// When one of them fails.
pub(in crate::cases) fn of_kernel(node: &Netns) -> anyhow::Result<Tables> {
    let mut tables = Tables::new();
    let mut service = String::new();
    for line in dump::ipvs(node)?.lines() {
        if let Some(server) = line.strip_prefix("  -> ") {
            tables.insert(format!("{service} -> {server}"));
        } else {
            line.clone_into(&mut service);
            tables.insert(service.clone());
        }
    }
    for ip in dump::vips(node)? {
        tables.insert(format!("bound {ip}"));
    }
    for line in dump::nft(node, "ferrule")?.lines() {
        let object: Value = serde_json::from_str(line)?;
        let set = &object["set"];
        let name = set["name"].as_str().unwrap_or_default();
        if !SETS.contains(&name.trim_end_matches(['4', '6'])) {
            continue;
        }
        for element in set["elem"].as_array().into_iter().flatten() {
            let words: Vec<String> = match element["concat"].as_array() {
                Some(parts) => parts.iter().map(plain).collect(),
                None => vec![plain(element)],
            };
            tables.insert(format!("{name} {}", words.join(" ")));
        }
    }
    for family in ["-4", "-6"] {
        let routes = node.output("ip", &[family, "-j", "route", "show", "proto", "101"])?;
        let routes: Vec<Value> = serde_json::from_str(&routes)?;
        for route in routes {
            let (to, via) = (plain(&route["dst"]), plain(&route["gateway"]));
            tables.insert(format!("route {to} via {via}"));
        }
    }
    Ok(tables)
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// What `ferrule-agent plan` says, and beside it what follows from the objects
/// themselves, since a plan has no rows for it: which pods are of this node,
/// and the ways to those of others.
///
/// # Errors
/// When the plan is not of the form that is documented.
pub(in crate::cases) fn of_plan(plan: &str, nodes: &[Value]) -> anyhow::Result<Tables> {
    let plan: Value = serde_json::from_str(plan)?;
    let name = plan["node"].as_str().context("node")?;
    let own_pods = nodes
        .iter()
        .filter(|node| node["metadata"]["name"] == name)
        .flat_map(pod_ranges)
        .collect::<Vec<_>>();
    let mut tables = Tables::new();
    for row in plan["frontends"].as_array().context("frontends")? {
        let ip: IpAddr = row["address"].as_str().context("address")?.parse()?;
        let port = u16::try_from(row["portNumber"].as_u64().context("portNumber")?)?;
        let protocol = row["protocol"].as_str().context("protocol")?;
        let digit = if ip.is_ipv4() { '4' } else { '6' };
        let element = format!("{digit} {ip} {} {port}", protocol.to_lowercase());
        let balanced = match row["action"].as_str() {
            Some("balance") => true,
            Some("reject") => false,
            other => bail!("action {other:?}"),
        };
        match row["kind"].as_str() {
            Some("ClusterIP") => {
                tables.insert(format!("bound {ip}"));
                tables.insert(format!("vips{digit} {ip}"));
                if balanced {
                    tables.insert(format!("frontends{element}"));
                }
            }
            Some("NodePort") => {
                tables.insert(format!("external{element}"));
            }
            other => bail!("kind {other:?}"),
        }
        if !balanced {
            continue;
        }
        let scheduler = row["scheduler"].as_str().context("scheduler")?;
        let service = format!("{protocol} {} {scheduler}", SocketAddr::new(ip, port));
        for backend in row["backends"].as_array().context("backends")? {
            let ip: IpAddr = backend["address"].as_str().context("address")?.parse()?;
            let port = u16::try_from(backend["port"].as_u64().context("port")?)?;
            let to = SocketAddr::new(ip, port);
            tables.insert(format!("{service} -> {to} Masq {}", backend["weight"]));
            let here = own_pods.iter().any(|range| within(ip, range));
            if here || backend["local"] == true {
                tables.insert(format!("hairpins{digit} {ip} {ip}"));
            }
        }
        tables.insert(service);
    }
    tables.extend(routes(nodes, name));
    Ok(tables)
}

fn pod_ranges(node: &Value) -> impl Iterator<Item = &str> {
    let ranges = node["spec"]["podCIDRs"].as_array();
    ranges.into_iter().flatten().filter_map(Value::as_str)
}

/// The walk has ranges /24 and /64 only.
fn within(ip: IpAddr, range: &str) -> bool {
    let network = range.split('/').next().and_then(|text| text.parse().ok());
    match (ip, network) {
        (IpAddr::V4(ip), Some(IpAddr::V4(network))) => ip.octets()[..3] == network.octets()[..3],
        (IpAddr::V6(ip), Some(IpAddr::V6(network))) => ip.octets()[..8] == network.octets()[..8],
        (_, _) => false,
    }
}

/// All nodes of the walk share this one's link.
pub(super) fn routes(nodes: &[Value], own: &str) -> Tables {
    let others = nodes.iter().filter(|node| node["metadata"]["name"] != own);
    let routes = others.flat_map(|node| {
        let addresses: Vec<&str> = node["status"]["addresses"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|address| address["address"].as_str())
            .collect();
        pod_ranges(node).filter_map(move |range| {
            let same_family = |ip: &&&str| ip.contains(':') == range.contains(':');
            let gateway = addresses.iter().find(same_family)?;
            Some(format!("route {range} via {gateway}"))
        })
    });
    routes.collect()
}

/// What only one of two has, with `-` for the first and `+` for the second.
pub(in crate::cases) fn difference(wanted: &Tables, found: &Tables) -> Vec<String> {
    let mut lines: BTreeMap<&str, char> = BTreeMap::new();
    lines.extend(wanted.difference(found).map(|line| (line.as_str(), '-')));
    lines.extend(found.difference(wanted).map(|line| (line.as_str(), '+')));
    let lines = lines.into_iter();
    lines.map(|(line, sign)| format!("{sign} {line}")).collect()
}
