//! The kernel's state, read back with the tools that operators use, without
//! what differs from run to run: handles, counters, indices, hash order.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use crate::netns::Netns;

/// The device that carries VIPs.
pub const VIP_DEVICE: &str = "kube-ipvs0";

/// `ipvsadm -Ln`: virtual services in order, each with its real servers in
/// order; connection counts are left out.
///
/// # Errors
/// When the kernel has no IPVS.
pub fn ipvs(namespace: &Netns) -> anyhow::Result<String> {
    let mut text = String::new();
    for (service, servers) in virtual_services(namespace, &[])? {
        writeln!(text, "{service}")?;
        for server in servers {
            // -> ADDRESS FORWARD WEIGHT ACTIVE INACTIVE
            let kept: Vec<&str> = server.split_whitespace().take(4).collect();
            writeln!(text, "  {}", kept.join(" "))?;
        }
    }
    Ok(text)
}

/// Real servers of weight 0 and their connections, active and inactive, a line each.
///
/// # Errors
/// When the kernel has no IPVS.
pub fn leaving(namespace: &Netns) -> anyhow::Result<String> {
    let mut text = String::new();
    for (service, servers) in virtual_services(namespace, &[])? {
        for server in servers {
            let words: Vec<&str> = server.split_whitespace().collect();
            if let [_, address, _, "0", active, inactive] = words.as_slice() {
                writeln!(
                    text,
                    "{service} -> {address}: {active} active, {inactive} inactive"
                )?;
            }
        }
    }
    Ok(text)
}

/// Connections counted by a virtual service since it was made, or `None` where
/// there is none. `service` is such as `TCP 10.96.0.10:80`.
///
/// # Errors
/// When the kernel has no IPVS.
pub fn connections(namespace: &Netns, service: &str) -> anyhow::Result<Option<u64>> {
    for (line, _) in virtual_services(namespace, &["--stats", "--exact"])? {
        // PROTOCOL ADDRESS CONNS ...
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [protocol, address, count, ..] = words.as_slice()
            && format!("{protocol} {address}") == service
        {
            return Ok(Some(count.parse()?));
        }
    }
    Ok(None)
}

/// Packets of clients counted by a virtual service since it was made. Where clients
/// use a port again, as those of UDP do by chance, connections are fewer than calls.
///
/// # Errors
/// When the kernel has no IPVS.
pub fn packets(namespace: &Netns, service: &str) -> anyhow::Result<Option<u64>> {
    for (line, _) in virtual_services(namespace, &["--stats", "--exact"])? {
        // PROTOCOL ADDRESS CONNS INPKTS ...
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [protocol, address, _, count, ..] = words.as_slice()
            && format!("{protocol} {address}") == service
        {
            return Ok(Some(count.parse()?));
        }
    }
    Ok(None)
}

fn virtual_services(
    namespace: &Netns,
    options: &[&str],
) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let arguments: Vec<&str> = ["-Ln"].iter().chain(options).copied().collect();
    let text = namespace.output("ipvsadm", &arguments)?;
    let mut services: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut current = None;
    for line in text.lines() {
        let is_service = ["TCP ", "UDP ", "SCTP ", "FWM "]
            .iter()
            .any(|protocol| line.starts_with(protocol));
        if is_service {
            let service = line.split_whitespace().collect::<Vec<_>>().join(" ");
            services.entry(service.clone()).or_default();
            current = Some(service);
        } else if let Some(service) = &current {
            services
                .entry(service.clone())
                .or_default()
                .push(line.trim().to_owned());
        }
    }
    for servers in services.values_mut() {
        servers.sort();
    }
    Ok(services)
}

/// `ip -j addr show dev kube-ipvs0`: the device and its addresses in order.
///
/// # Errors
/// When there is no such device.
pub fn addresses(namespace: &Netns) -> anyhow::Result<String> {
    let device = vip_device(namespace)?;
    let mut addresses = Vec::new();
    for address in device["addr_info"].as_array().into_iter().flatten() {
        let mut kept = json!({
            "family": address["family"],
            "local": address["local"],
            "prefixlen": address["prefixlen"],
            "scope": address["scope"],
        });
        for flag in ["deprecated", "noprefixroute", "nodad", "tentative"] {
            if let Some(value) = address.get(flag) {
                kept[flag] = value.clone();
            }
        }
        addresses.push(kept.to_string());
    }
    addresses.sort();
    let device = json!({
        "ifname": device["ifname"],
        "flags": device["flags"],
        "operstate": device["operstate"],
    });
    Ok(format!("{device}\n{}\n", addresses.join("\n")))
}

/// All that binds VIPs: the VIP device as [`addresses`] has it, local routes of ours,
/// and addresses of single hosts on other devices than that and the loopback device.
///
/// # Errors
/// When `ip` fails.
pub fn bindings(namespace: &Netns) -> anyhow::Result<String> {
    let mut text = String::new();
    if namespace.links()?.iter().any(|link| link == VIP_DEVICE) {
        text.push_str(&addresses(namespace)?);
    }
    for route in vip_routes(namespace)? {
        writeln!(text, "{route}")?;
    }
    for alias in aliases(namespace)? {
        writeln!(text, "{alias}")?;
    }
    Ok(text)
}

/// Local routes of ours, IPv4 first, each as `10.96.0.1 dev lo src 192.0.2.1`.
///
/// # Errors
/// When `ip` fails.
pub fn vip_routes(namespace: &Netns) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let mut arguments = vec!["-j", "-N", family, "route", "show"];
        arguments.extend(["table", "255", "proto", "101"]);
        let text = namespace.output("ip", &arguments)?;
        let routes: Vec<Value> = serde_json::from_str(&text)?;
        for route in &routes {
            let mut line = word(&route["dst"]);
            for (keyword, field) in [("dev", "dev"), ("src", "prefsrc")] {
                if let Some(value) = route.get(field) {
                    write!(line, " {keyword} {}", word(value))?;
                }
            }
            lines.push(line);
        }
    }
    Ok(lines)
}

/// Addresses of single hosts on devices that are not the VIP device or the loopback
/// device, each as `10.96.0.1 dev eth0 scope host`, in order.
///
/// # Errors
/// When `ip` fails.
pub fn aliases(namespace: &Netns) -> anyhow::Result<Vec<String>> {
    let text = namespace.output("ip", &["-j", "addr", "show"])?;
    let devices: Vec<Value> = serde_json::from_str(&text)?;
    let mut lines = Vec::new();
    for device in &devices {
        let name = word(&device["ifname"]);
        if [VIP_DEVICE, "lo"].contains(&&*name) {
            continue;
        }
        for address in device["addr_info"].as_array().into_iter().flatten() {
            if address["prefixlen"] == 32 || address["prefixlen"] == 128 {
                let mut line = format!("{} dev {name}", word(&address["local"]));
                write!(line, " scope {}", word(&address["scope"]))?;
                for flag in ["deprecated", "noprefixroute", "nodad", "tentative"] {
                    if address.get(flag).is_some() {
                        write!(line, " {flag}")?;
                    }
                }
                lines.push(line);
            }
        }
    }
    lines.sort();
    Ok(lines)
}

/// The addresses on the VIP device; none if there is no device.
///
/// # Errors
/// When `ip` fails for another reason.
pub fn vips(namespace: &Netns) -> anyhow::Result<Vec<IpAddr>> {
    if !namespace.links()?.iter().any(|link| link == VIP_DEVICE) {
        return Ok(Vec::new());
    }
    let device = vip_device(namespace)?;
    device["addr_info"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|address| Ok(address["local"].as_str().context("no address")?.parse()?))
        .collect()
}

fn vip_device(namespace: &Netns) -> anyhow::Result<Value> {
    let text = namespace.output("ip", &["-j", "addr", "show", "dev", VIP_DEVICE])?;
    let devices: Vec<Value> = serde_json::from_str(&text)?;
    devices
        .into_iter()
        .find(|device| device["ifname"] == VIP_DEVICE)
        .with_context(|| format!("no {VIP_DEVICE} in {text}"))
}

/// The main table's routes of both families, IPv4 first, each as
/// `10.244.2.0/24 via 192.0.2.3 dev uplink proto 101`, in the kernel's order.
///
/// # Errors
/// When `ip` fails.
pub fn routes(namespace: &Netns) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in ["-4", "-6"] {
        let text = namespace.output("ip", &["-j", "-N", family, "route", "show"])?;
        let routes: Vec<Value> = serde_json::from_str(&text)?;
        for route in &routes {
            let mut line = word(&route["dst"]);
            for (keyword, field) in [("via", "gateway"), ("dev", "dev"), ("proto", "protocol")] {
                if let Some(value) = route.get(field) {
                    write!(line, " {keyword} {}", word(value))?;
                }
            }
            lines.push(line);
        }
    }
    Ok(lines)
}

/// A string or number of JSON without quotation marks.
fn word(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// `nft -j list table inet NAME`: one object a line, elements of sets in order.
///
/// # Errors
/// When there is no such table.
pub fn nft(namespace: &Netns, table: &str) -> anyhow::Result<String> {
    let text = namespace.output("nft", &["-j", "list", "table", "inet", table])?;
    let listing: Value = serde_json::from_str(&text)?;
    let Some(objects) = listing["nftables"].as_array() else {
        bail!("no nftables in {text}");
    };
    let mut lines = String::new();
    for object in objects {
        if object.get("metainfo").is_none() {
            let mut object = object.clone();
            normalise(&mut object);
            writeln!(lines, "{object}")?;
        }
    }
    Ok(lines)
}

/// What `nft -j list table inet NAME` says of sets and counters.
#[derive(Debug)]
pub struct Table(Vec<Value>);

impl Table {
    /// Lists it.
    ///
    /// # Errors
    /// When there is no such table.
    pub fn list(namespace: &Netns, name: &str) -> anyhow::Result<Self> {
        let text = namespace.output("nft", &["-j", "list", "table", "inet", name])?;
        let listing: Value = serde_json::from_str(&text)?;
        let objects = listing["nftables"].as_array().cloned();
        objects
            .map(Self)
            .with_context(|| format!("no nftables in {text}"))
    }

    /// Packets that a counter has counted.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn packets(&self, name: &str) -> anyhow::Result<u64> {
        let counters = self.0.iter().filter_map(|object| object.get("counter"));
        let mut named = counters.filter(|object| object["name"] == name);
        let packets = named.next().and_then(|object| object["packets"].as_u64());
        packets.with_context(|| format!("no counter {name}"))
    }

    /// The elements of its sets and maps, in order, each set with its name; those
    /// without elements are left out.
    ///
    /// # Errors
    /// Never, but writing to a text could.
    pub fn sets(&self) -> anyhow::Result<String> {
        let mut lines = String::new();
        for object in &self.0 {
            let set = ["set", "map"].iter().find_map(|kind| object.get(kind));
            let elements = set.and_then(|set| Some((set, set["elem"].as_array()?)));
            let Some((set, elements)) = elements else {
                continue;
            };
            writeln!(lines, "{}", word(&set["name"]))?;
            let mut elements: Vec<String> = elements.iter().map(Value::to_string).collect();
            elements.sort();
            for element in elements {
                writeln!(lines, "  {element}")?;
            }
        }
        Ok(lines)
    }
}

fn normalise(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.remove("handle");
            if let Some(Value::Object(counter)) = object.get_mut("counter") {
                counter.insert("packets".to_owned(), json!(0));
                counter.insert("bytes".to_owned(), json!(0));
            }
            if let Some(Value::Array(elements)) = object.get_mut("elem") {
                elements.iter_mut().for_each(normalise);
                elements.sort_by_key(Value::to_string);
            }
            object.values_mut().for_each(normalise);
        }
        Value::Array(array) => array.iter_mut().for_each(normalise),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_run_to_run_is_left_out() {
        let mut rule = json!({"rule": {"handle": 7, "expr": [{"counter": {"packets": 3, "bytes": 9}}]},
            "set": {"elem": ["b", "a"]}});
        normalise(&mut rule);
        assert_eq!(
            rule,
            json!({"rule": {"expr": [{"counter": {"packets": 0, "bytes": 0}}]},
                "set": {"elem": ["a", "b"]}})
        );
    }
}
