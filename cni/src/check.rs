//! The verb CHECK: is the pod's network still what ADD reported?
//!
//! Compared are the interfaces, their MACs and MTUs, the pod's addresses, its routes and
//! its neighbour entries for the gateways, and the host's routes to it; and with what the
//! agent has leased, the addresses and the host ports. Of what other plugins of the list
//! made, only that their routes are there. Nothing is repaired.

use std::net::IpAddr;
use std::path::Path;

use ferrule_model::names::Attachment;
use ferrule_model::ownership;
use ipnetwork::IpNetwork;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::agent;
use crate::config::{Config, typed};
use crate::failure::{Code, Failure};
use crate::kernel::{Kernel, Link};
use crate::netns::Netns;
use crate::pair;
use crate::ports;
use crate::shaper::Shaper;

/// The parts of a result that we compare; plugins after us may have added to
/// it what we know nothing of.
#[derive(Debug, Deserialize)]
pub(crate) struct Previous {
    #[serde(default, deserialize_with = "list")]
    interfaces: Vec<Interface>,
    #[serde(default, deserialize_with = "list")]
    ips: Vec<Ip>,
    #[serde(default, deserialize_with = "list")]
    routes: Vec<Route>,
}

#[derive(Debug, Deserialize)]
struct Interface {
    name: String,
    mac: Option<String>,
    /// Since 1.1.0.
    mtu: Option<u32>,
    /// Empty or absent for the node's own.
    sandbox: Option<String>,
}

impl Interface {
    fn is_in_a_pod(&self) -> bool {
        self.sandbox.as_ref().is_some_and(|path| !path.is_empty())
    }
}

#[derive(Debug, Deserialize)]
struct Ip {
    address: IpNetwork,
    #[serde(default, deserialize_with = "maybe")]
    gateway: Option<IpAddr>,
    interface: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct Route {
    dst: IpNetwork,
    #[serde(default, deserialize_with = "maybe")]
    gw: Option<IpAddr>,
}

impl Route {
    fn is_default(&self) -> bool {
        self.dst.prefix() == 0
    }

    /// Whether ADD of ours has made it.
    fn is_ours(&self) -> bool {
        self.is_default() && self.gw == Some(pair::gateway(self.dst.ip()))
    }
}

/// A list, which may be `null`.
fn list<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// An address, which is empty where there is none.
pub(crate) fn maybe<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<IpAddr>, D::Error> {
    let text: Option<String> = Option::deserialize(deserializer)?;
    match text.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(D::Error::custom),
    }
}

/// Compares; the failure names every difference.
pub(crate) async fn run(
    config: &Config,
    attachment: &Attachment,
    netns: &Path,
) -> Result<(), Failure> {
    let previous = previous(config)?;
    let netns = Netns::open(netns)?;
    let host = Kernel::open()?;
    let pod = netns.inside(Kernel::open)??;
    let mut differences = Vec::new();
    let host_end = check_host(&host, attachment, &previous, &mut differences).await?;
    if let Some(link) = &host_end {
        let limits = config.bandwidth.limits(config.mtu()?.unwrap_or_default())?;
        let shaper = Shaper::new(attachment, None, 0, limits);
        shaper
            .check(&host, attachment, link, &mut differences)
            .await?;
    }
    let pod_end = check_pod(&pod, attachment, &previous, &mut differences).await?;
    if let (Some(link), Some(host_end)) = (&pod_end, &host_end) {
        check_mtu(link, host_end, &mut differences);
        check_gateways(
            &pod,
            attachment,
            &previous,
            [link, host_end],
            &mut differences,
        )
        .await?;
    }
    let seen = check_lease(config, attachment, &previous, &mut differences);
    if differences.is_empty() {
        // What is amiss for sure is told before what could not be seen.
        seen?;
    }
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Differs,
        format!(
            "the network of {attachment} is not what ADD made: {}; restart the pod",
            differences.join(", ")
        ),
    ))
}

/// What ADD reported, as the runtime passes it on.
pub(crate) fn previous(config: &Config) -> Result<Previous, Failure> {
    let value = config.previous.as_ref().ok_or_else(|| {
        Failure::new(
            Code::InvalidConfiguration,
            "CHECK needs the prevResult of ADD in the network configuration: the runtime has to pass it",
        )
    })?;
    typed("prevResult", value)
}

impl Previous {
    /// Our addresses: those on the pod's interface. Of those that name none, which the
    /// specification allows, those with our gateway.
    pub(crate) fn addresses(&self, attachment: &Attachment) -> impl Iterator<Item = IpNetwork> {
        self.ips.iter().filter_map(move |ip| {
            #[cfg(feature = "fuzzing")]
            ferrule_model::planted::bug(
                "cni-config",
                [
                    ip.address.is_ipv6(),
                    ip.interface.is_some(),
                    ip.interface
                        .is_some_and(|index| index > self.interfaces.len()),
                ],
            );
            let interface = match ip.interface {
                None => {
                    let ours = ip.gateway == Some(pair::gateway(ip.address.ip()));
                    return ours.then_some(ip.address);
                }
                Some(index) => self.interfaces.get(index)?,
            };
            let ours = interface.is_in_a_pod() && interface.name == attachment.interface.as_str();
            ours.then_some(ip.address)
        })
    }

    /// Whether the pod's interface was reported.
    fn names(&self, interface: &str) -> bool {
        let mut interfaces = self.interfaces.iter();
        interfaces.any(|i| i.name == interface && i.is_in_a_pod())
    }

    /// What was reported of an interface, in a pod or on the node.
    fn interface(&self, name: &str, in_a_pod: bool) -> Option<&Interface> {
        let mut interfaces = self.interfaces.iter();
        interfaces.find(|i| i.name == name && i.is_in_a_pod() == in_a_pod)
    }

    /// The MAC that was reported of an interface.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn mac(&self, name: &str, in_a_pod: bool) -> Option<&str> {
        self.interface(name, in_a_pod)?.mac.as_deref()
    }
}

/// Whether an interface is up and has the MAC and MTU that were reported.
fn check_link(link: &Link, reported: Option<&Interface>, differences: &mut Vec<String>) {
    if !link.up {
        differences.push(format!("interface {} is down", link.name));
    }
    if let (Some(reported), Some(mtu)) = (reported.and_then(|r| r.mtu), link.mtu)
        && reported != mtu
    {
        differences.push(format!(
            "interface {} has MTU {mtu} instead of {reported}",
            link.name
        ));
    }
    if let (Some(reported), Some(mac)) = (reported.and_then(|r| r.mac.as_deref()), link.mac)
        && !reported.eq_ignore_ascii_case(&mac.to_string())
    {
        differences.push(format!(
            "interface {} has MAC {mac} instead of {reported}",
            link.name
        ));
    }
}

async fn check_host(
    host: &Kernel,
    attachment: &Attachment,
    previous: &Previous,
    differences: &mut Vec<String>,
) -> Result<Option<Link>, Failure> {
    let name = ownership::host_veth_name(attachment);
    let found = host.link(name.as_str()).await?;
    let link = match found {
        Some(link) if link.is_host_end_of(attachment) => link,
        Some(link) if link.is_altered_end_of(attachment) => {
            differences.push(format!(
                "interface {name} of the node has the alias {:?}",
                link.alias()
            ));
            return Ok(None);
        }
        Some(_) | None => {
            differences.push(format!("interface {name} of the node is missing"));
            return Ok(None);
        }
    };
    check_link(&link, previous.interface(&link.name, false), differences);
    for address in previous.addresses(attachment) {
        let way = host.way_to(address.ip()).await?;
        if way.is_none_or(|(interface, _)| interface != link.index) {
            differences.push(format!(
                "the node's route to {} does not lead to {name}",
                address.ip()
            ));
        }
    }
    Ok(Some(link))
}

async fn check_pod(
    pod: &Kernel,
    attachment: &Attachment,
    previous: &Previous,
    differences: &mut Vec<String>,
) -> Result<Option<Link>, Failure> {
    let name = attachment.interface.as_str();
    let Some(link) = pod.link(name).await? else {
        differences.push(format!("interface {name} of the pod is missing"));
        return Ok(None);
    };
    if !previous.names(name) {
        differences.push(format!("prevResult has no interface {name} of the pod"));
    }
    check_link(&link, previous.interface(&link.name, true), differences);
    let present = pod.addresses(link.index).await?;
    for address in previous.addresses(attachment) {
        if !present.contains(&address) {
            differences.push(format!("address {address} of the pod is missing"));
        }
    }
    check_routes(pod, &link, previous, differences).await?;
    Ok(Some(link))
}

/// A packet that is longer than the node's end takes is dropped there. A plugin behind us
/// may have made the pod's smaller, and only since 1.1.0 it can tell.
fn check_mtu(link: &Link, host_end: &Link, differences: &mut Vec<String>) {
    if let (Some(mtu), Some(most)) = (link.mtu, host_end.mtu)
        && mtu > most
    {
        differences.push(format!(
            "interface {} has MTU {mtu}, and its end on the node {most}",
            link.name
        ));
    }
}

/// Nobody answers for the gateways, so without these entries the pod is cut off.
async fn check_gateways(
    pod: &Kernel,
    attachment: &Attachment,
    previous: &Previous,
    [link, host_end]: [&Link; 2],
    differences: &mut Vec<String>,
) -> Result<(), Failure> {
    let present = pod.neighbours(link.index).await?;
    for address in previous.addresses(attachment) {
        let gateway = pair::gateway(address.ip());
        let found = present.iter().find(|(ip, _)| *ip == gateway);
        let mac = found.map(|(_, mac)| *mac);
        let (Some(mac), Some(right)) = (mac, host_end.mac) else {
            differences.push(format!(
                "the pod's neighbour entry for {gateway} is missing"
            ));
            continue;
        };
        if mac != right {
            differences.push(format!(
                "the pod's neighbour entry for {gateway} has MAC {mac} instead of {right}"
            ));
        }
    }
    Ok(())
}

/// Ours must be the one that is used, and others' must be there.
async fn check_routes(
    pod: &Kernel,
    link: &Link,
    previous: &Previous,
    differences: &mut Vec<String>,
) -> Result<(), Failure> {
    if previous.routes.is_empty() {
        return Ok(());
    }
    let present = pod.routes().await?;
    for route in &previous.routes {
        let same_family =
            |other: &&Route| other.is_default() && other.dst.is_ipv4() == route.dst.is_ipv4();
        let alone = previous.routes.iter().filter(same_family).count() == 1;
        let as_it_was = if route.is_ours() && alone {
            // A lookup of an address that no other route can match shows which is used.
            let way = pod.way_to(somewhere(route.dst.ip())).await?;
            way == Some((link.index, route.gw))
        } else {
            // Another plugin's may come before ours, by its metric or its table.
            let of = route.is_ours().then_some(link.index);
            present.iter().any(|way| way.is(route.dst, route.gw, of))
        };
        if !as_it_was {
            differences.push(format!(
                "the pod's route to {} is missing or another",
                route.dst
            ));
        }
    }
    Ok(())
}

/// Whether the agent has leased the pod's addresses to it, and its host ports:
/// without a lease another pod may get them.
fn check_lease(
    config: &Config,
    attachment: &Attachment,
    previous: &Previous,
    differences: &mut Vec<String>,
) -> Result<(), Failure> {
    let ports = ports::read(config.port_mappings.as_ref())?;
    let Some(lease) = agent::lease_of(config, attachment)? else {
        return Ok(());
    };
    if lease.addresses.is_empty() {
        let words = "the agent has no lease for it, so another pod may get its addresses";
        differences.push(words.to_owned());
        return Ok(());
    }
    for address in previous.addresses(attachment) {
        if !lease.addresses.contains(&address) {
            let leased: Vec<_> = lease.addresses.iter().map(ToString::to_string).collect();
            let leased = leased.join(" and ");
            differences.push(format!(
                "address {address} is not leased to it, but {leased}"
            ));
        }
    }
    for port in ports.iter().filter(|port| !lease.ports.contains(port)) {
        differences.push(format!(
            "host port {}/{} is not leased to it with container port {}",
            port.host_port, port.protocol, port.container_port
        ));
    }
    Ok(())
}

/// An address that only a default route leads to, from the ranges set aside
/// for documentation (RFC 5737, RFC 3849).
fn somewhere(family: IpAddr) -> IpAddr {
    match family {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 1]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    }
}
