//! A straightforward IPVS set-up, as kube-proxy's IPVS mode had it: every address on
//! kube-ipvs0, a virtual service for each frontend, one set of endpoints for all clients, a
//! mark and a masquerade rule. It is what scenarios must be able to fail with.
//!
//! It has none of what Ferrule adds: no guard of VIPs, no silence in ARP, no second virtual
//! service for clients within the cluster, no repair of weights.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ferrule_model::address::Protocol;
use ferrule_model::kube::{AddressType, EndpointSlice, Object, Service, ServicePort};

use super::cast::{self, Cast};
use super::kernel;
use crate::dump::VIP_DEVICE;

/// The mark of packets that are to be masqueraded, kube-proxy's.
const MASQUERADE: &str = "0x4000";

/// Which families are programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Families {
    Both,
    /// That of `spec.clusterIPs[0]`, as where a proxy takes a Service to have one family.
    First,
}

/// What is to be made, in the languages of the programs that make it.
#[derive(Debug, Default)]
struct Orders {
    addresses: BTreeSet<IpAddr>,
    ipvs: String,
    marks: String,
    drops: String,
}

/// Makes it on node-a.
pub(super) fn set_up(
    folder: &Path,
    cast: &Cast,
    objects: &[Object],
    families: Families,
) -> anyhow::Result<()> {
    let orders = Orders::new(objects, families)?;
    let node = cast.node();
    let file = |name: &str, text: &str| -> anyhow::Result<String> {
        let path = folder.join(name);
        fs::write(&path, text)?;
        Ok(path.to_string_lossy().into_owned())
    };
    let mut links = format!("link add {VIP_DEVICE} type dummy\n");
    for ip in &orders.addresses {
        let length = if ip.is_ipv4() { "32" } else { "128 nodad" };
        writeln!(links, "addr add {ip}/{length} dev {VIP_DEVICE}")?;
    }
    node.output("ip", &["-batch", &file("links", &links)?])?;
    orders.add_missing(folder, cast)?;
    node.run(|| {
        for (key, value) in [
            ("ipv4/vs/conntrack", "1"),
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
        ] {
            fs::write(Path::new("/proc/sys/net").join(key), value)?;
        }
        Ok(())
    })?;
    node.output("nft", &["-f", &file("rules", &orders.rules())?])?;
    Ok(())
}

/// What such an agent does when it starts again: what IPVS has already stays as it is.
pub(super) fn start_again(
    folder: &Path,
    cast: &Cast,
    objects: &[Object],
    families: Families,
) -> anyhow::Result<()> {
    Orders::new(objects, families)?.add_missing(folder, cast)
}

/// The lines whose service and server are not there yet, whatever weight they have.
fn missing(wanted: &str, present: &str) -> String {
    let key = |line: &str| line.split(" -s ").next().unwrap_or_default().to_owned();
    let key = |line: &str| key(line).split(" -m").next().unwrap_or_default().to_owned();
    let present: BTreeSet<String> = present.lines().map(key).collect();
    let lines = wanted.lines().filter(|line| !present.contains(&key(line)));
    lines.flat_map(|line| [line, "\n"]).collect()
}

impl Orders {
    fn new(objects: &[Object], families: Families) -> anyhow::Result<Self> {
        let mut orders = Self::default();
        for object in objects {
            if let Object::Service(service) = object {
                orders.add(service, objects, families)?;
            }
        }
        Ok(orders)
    }

    fn add_missing(&self, folder: &Path, cast: &Cast) -> anyhow::Result<()> {
        let present = cast.node().output("ipvsadm", &["-S", "-n"])?;
        let file = folder.join("ipvs");
        fs::write(&file, missing(&self.ipvs, &present))?;
        kernel::restore(cast.node(), &file)
    }
    fn add(
        &mut self,
        service: &Service,
        objects: &[Object],
        families: Families,
    ) -> anyhow::Result<()> {
        let spec = &service.spec;
        let cluster = parsed(&spec.cluster_ips);
        let first = cluster.first().map(IpAddr::is_ipv4);
        let meant = |ip: &&IpAddr| families == Families::Both || Some(ip.is_ipv4()) == first;
        let balancers = parsed(
            service
                .status
                .load_balancer
                .ingress
                .iter()
                .map(|entry| &entry.ip),
        );
        let external = [parsed(&spec.external_ips), balancers.clone()].concat();
        let local = spec.external_traffic_policy == "Local";
        for port in &spec.ports {
            for ip in cluster.iter().filter(meant) {
                self.addresses.insert(*ip);
                let at = SocketAddr::new(*ip, port.port);
                self.serve(at, port, &backends(service, port, objects, *ip, false))?;
                // The kernel chooses the VIP as the source of the node's own processes.
                writeln!(self.marks, "{} {ip} {}", source(*ip), mark())?;
            }
            let node_ports = cast::ips(cast::NODE).into_iter().flatten();
            let node_ports = node_ports.filter(|_| port.node_port != 0);
            let frontends = external.iter().map(|ip| SocketAddr::new(*ip, port.port));
            let node_ports: Vec<SocketAddr> = node_ports
                .map(|ip| SocketAddr::new(ip, port.node_port))
                .collect();
            self.addresses.extend(external.iter().filter(meant));
            for at in frontends.chain(node_ports).filter(|at| meant(&&at.ip())) {
                self.serve(at, port, &backends(service, port, objects, at.ip(), local))?;
                if !local {
                    writeln!(self.marks, "{} {}", called(at, port), mark())?;
                }
            }
            for ip in &balancers {
                let ranges = &spec.load_balancer_source_ranges;
                let like = ranges
                    .iter()
                    .filter(|range| range.contains(':') != ip.is_ipv4());
                let like: Vec<&str> = like.map(String::as_str).collect();
                if !like.is_empty() {
                    let at = SocketAddr::new(*ip, port.port);
                    let others = source(*ip).to_owned() + " != { " + &like.join(", ") + " }";
                    writeln!(self.drops, "{} {others} drop", called(at, port))?;
                }
            }
        }
        Ok(())
    }

    fn serve(
        &mut self,
        at: SocketAddr,
        port: &ServicePort,
        backends: &[SocketAddr],
    ) -> std::fmt::Result {
        let option = match port.protocol {
            Protocol::Tcp => "-t",
            Protocol::Udp => "-u",
            Protocol::Sctp => "--sctp-service",
        };
        writeln!(self.ipvs, "-A {option} {at} -s rr")?;
        for backend in backends {
            writeln!(self.ipvs, "-a {option} {at} -r {backend} -m -w 1")?;
        }
        Ok(())
    }

    fn rules(&self) -> String {
        let Self { marks, drops, .. } = self;
        format!(
            "table inet straightforward {{\n\
            chain prerouting {{ type filter hook prerouting priority -100;\n{drops}{marks}}}\n\
            chain output {{ type filter hook output priority -150;\n{marks}}}\n\
            chain postrouting {{ type nat hook postrouting priority 100;\n\
            meta mark and {MASQUERADE} != 0 masquerade\n}}\n}}\n"
        )
    }
}

fn mark() -> String {
    format!("meta mark set meta mark or {MASQUERADE}")
}

fn source(like: IpAddr) -> &'static str {
    if like.is_ipv4() {
        "ip saddr"
    } else {
        "ip6 saddr"
    }
}

fn called(at: SocketAddr, port: &ServicePort) -> String {
    let family = if at.is_ipv4() { "ip" } else { "ip6" };
    let protocol = port.protocol.to_string().to_lowercase();
    format!("{family} daddr {} {protocol} dport {}", at.ip(), at.port())
}

fn parsed<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
    let texts = texts.into_iter();
    texts.filter_map(|text| text.parse().ok()).collect()
}

/// The ready endpoints of a port, of one family; of this node alone under policy Local.
fn backends(
    service: &Service,
    port: &ServicePort,
    objects: &[Object],
    like: IpAddr,
    local: bool,
) -> Vec<SocketAddr> {
    let of_service = |slice: &&EndpointSlice| {
        let of_family = match slice.address_type {
            AddressType::IPv4 => like.is_ipv4(),
            AddressType::IPv6 => like.is_ipv6(),
            AddressType::Fqdn => false,
        };
        let named = slice.service();
        of_family && named.is_some_and(|named| named.name == service.metadata.name)
    };
    let slices = objects.iter().filter_map(|object| match object {
        Object::EndpointSlice(slice) => Some(slice),
        Object::Service(_) | Object::Node(_) | Object::ServiceCidr(_) => None,
    });
    let mut backends = Vec::new();
    for slice in slices.filter(of_service) {
        let mut ports = slice.ports.iter();
        let number = ports.find(|other| other.name == port.name && other.protocol == port.protocol);
        let Some(number) = number.and_then(|port| port.port) else {
            continue;
        };
        for endpoint in &slice.endpoints {
            let here = endpoint.node_name.as_deref() == Some(cast::NODE);
            let ready = endpoint.conditions.ready.unwrap_or(true);
            let ip = endpoint
                .addresses
                .first()
                .and_then(|text| text.parse().ok());
            if let Some(ip) = ip.filter(|_| ready && (here || !local)) {
                backends.push(SocketAddr::new(ip, number));
            }
        }
    }
    backends
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_not_added_again() {
        let wanted = "-A -t 10.96.0.1:80 -s rr\n-a -t 10.96.0.1:80 -r 10.244.1.2:8080 -m -w 1\n\
            -a -t 10.96.0.1:80 -r 10.244.1.3:8080 -m -w 1\n";
        let present = "-A -t 10.96.0.1:80 -s wrr\n-a -t 10.96.0.1:80 -r 10.244.1.2:8080 -m -w 0\n";
        let left = "-a -t 10.96.0.1:80 -r 10.244.1.3:8080 -m -w 1\n";
        assert_eq!(missing(wanted, present), left);
    }
}
