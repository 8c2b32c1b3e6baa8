//! One element of the guard's sets: which set it is in, and its key as the kernel and the
//! program have it. Nothing is sent here.

use std::net::IpAddr;

use ferrule_model::address::{Family, FrontendAddr, Protocol};
use ferrule_model::change::Restriction;
use ferrule_model::ownership::{MARK_BASE, MARK_BITS};
use ferrule_model::service::Mark;
use ipnetwork::IpNetwork;

/// An element of one of our sets; which one follows from its kind and family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// Of `vips4` or `vips6`.
    Vip(IpAddr),
    /// Of `silent4`, in the table of family `arp`.
    Silent(IpAddr),
    /// Of `frontends4` or `frontends6`.
    Frontend(FrontendAddr),
    /// Of `external4` or `external6`.
    External(FrontendAddr),
    /// Of `preserved4` or `preserved6`.
    Preserved(FrontendAddr),
    /// Of `dropped4` or `dropped6`.
    Dropped(FrontendAddr),
    /// Of `leaving4` or `leaving6`: new connections do not reach IPVS.
    Leaving(FrontendAddr),
    /// Of `closed4` or `closed6`: nor do those of clients within the cluster.
    Closed(FrontendAddr),
    /// Of `served4` or `served6`: where a program of this node answers at a VIP.
    Served(FrontendAddr),
    /// Of `limited4` or `limited6`.
    Limited(FrontendAddr),
    /// Of `admitted4` or `admitted6`: who may call a frontend that is limited.
    Admitted(FrontendAddr, IpNetwork),
    /// Of the map `marks4` or `marks6`: the mark of packets of clients within the cluster.
    Marked(FrontendAddr, Mark),
    /// Of `hairpins4` or `hairpins6`: the address as source and as destination.
    Hairpin(IpAddr),
}

/// The one that is not in the table of family `inet`: no rule there sees ARP.
pub(super) const SILENT: &str = "silent4";

impl Element {
    pub(super) fn set(&self) -> &'static str {
        match self {
            Self::Vip(IpAddr::V4(_)) => "vips4",
            Self::Vip(IpAddr::V6(_)) => "vips6",
            Self::Silent(_) => SILENT,
            Self::Frontend(addr) if addr.ip.is_ipv4() => "frontends4",
            Self::Frontend(_) => "frontends6",
            Self::External(addr) if addr.ip.is_ipv4() => "external4",
            Self::External(_) => "external6",
            Self::Preserved(addr) if addr.ip.is_ipv4() => "preserved4",
            Self::Preserved(_) => "preserved6",
            Self::Dropped(addr) if addr.ip.is_ipv4() => "dropped4",
            Self::Dropped(_) => "dropped6",
            Self::Leaving(addr) if addr.ip.is_ipv4() => "leaving4",
            Self::Leaving(_) => "leaving6",
            Self::Closed(addr) if addr.ip.is_ipv4() => "closed4",
            Self::Closed(_) => "closed6",
            Self::Served(addr) if addr.ip.is_ipv4() => "served4",
            Self::Served(_) => "served6",
            Self::Limited(addr) if addr.ip.is_ipv4() => "limited4",
            Self::Limited(_) => "limited6",
            Self::Admitted(addr, _) if addr.ip.is_ipv4() => "admitted4",
            Self::Admitted(..) => "admitted6",
            Self::Marked(addr, _) if addr.ip.is_ipv4() => "marks4",
            Self::Marked(..) => "marks6",
            Self::Hairpin(IpAddr::V4(_)) => "hairpins4",
            Self::Hairpin(IpAddr::V6(_)) => "hairpins6",
        }
    }

    /// The family of the table that its set is in, as the program says it.
    pub(super) fn family(&self) -> &'static str {
        if self.set() == SILENT { "arp" } else { "inet" }
    }

    /// The key: the parts one after the other, each padded to 4 bytes.
    pub(super) fn key(&self) -> Vec<u8> {
        match self {
            Self::Vip(ip) | Self::Silent(ip) => octets(*ip),
            Self::Hairpin(ip) => octets(*ip).repeat(2),
            Self::Frontend(addr)
            | Self::External(addr)
            | Self::Preserved(addr)
            | Self::Dropped(addr)
            | Self::Leaving(addr)
            | Self::Closed(addr)
            | Self::Served(addr)
            | Self::Limited(addr)
            | Self::Marked(addr, _) => frontend_key(addr),
            Self::Admitted(addr, network) => admitted_key(network.network(), addr),
        }
    }

    /// The end of the interval that the key begins, where the set has intervals.
    pub(super) fn key_end(&self) -> Option<Vec<u8>> {
        match self {
            Self::Admitted(addr, network) => Some(admitted_key(network.broadcast(), addr)),
            Self::Vip(_)
            | Self::Silent(_)
            | Self::Hairpin(_)
            | Self::Frontend(_)
            | Self::External(_)
            | Self::Preserved(_)
            | Self::Dropped(_)
            | Self::Leaving(_)
            | Self::Closed(_)
            | Self::Served(_)
            | Self::Limited(_)
            | Self::Marked(..) => None,
        }
    }

    /// What the key leads to, where the set is a map.
    pub(super) fn data(&self) -> Option<Vec<u8>> {
        match self {
            Self::Marked(_, mark) => Some(mark.to_ne_bytes().to_vec()),
            Self::Vip(_)
            | Self::Silent(_)
            | Self::Hairpin(_)
            | Self::Frontend(_)
            | Self::External(_)
            | Self::Preserved(_)
            | Self::Dropped(_)
            | Self::Leaving(_)
            | Self::Closed(_)
            | Self::Served(_)
            | Self::Limited(_)
            | Self::Admitted(..) => None,
        }
    }

    /// The key as the program reads it.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Vip(ip) | Self::Silent(ip) => ip.to_string(),
            Self::Hairpin(ip) => format!("{ip} . {ip}"),
            Self::Frontend(addr)
            | Self::External(addr)
            | Self::Preserved(addr)
            | Self::Dropped(addr)
            | Self::Leaving(addr)
            | Self::Closed(addr)
            | Self::Served(addr)
            | Self::Limited(addr) => frontend_text(addr),
            Self::Marked(addr, mark) => format!("{} : {mark}", frontend_text(addr)),
            Self::Admitted(addr, network) => format!("{network} . {}", frontend_text(addr)),
        }
    }

    /// `None` for a key that we never make. `more` is the end of the interval, or what
    /// the key leads to.
    pub(super) fn from_key(set: &str, key: &[u8], more: Option<&[u8]>) -> Option<Self> {
        let (ip, rest): (IpAddr, &[u8]) = if set.ends_with('4') {
            let (ip, rest) = key.split_first_chunk::<4>()?;
            ((*ip).into(), rest)
        } else {
            let (ip, rest) = key.split_first_chunk::<16>()?;
            ((*ip).into(), rest)
        };
        if set == SILENT {
            return Some(Self::Silent(ip));
        }
        if set.starts_with("vips") {
            return Some(Self::Vip(ip));
        }
        if set.starts_with("hairpins") {
            let element = Self::Hairpin(ip);
            return (element.key() == key).then_some(element);
        }
        if set.starts_with("admitted") {
            return Self::admitted(ip, rest, more?);
        }
        let addr = frontend_of(ip, rest)?;
        if set.starts_with("marks") {
            let mark = Mark::from_ne_bytes(more?.try_into().ok()?);
            return (mark >> MARK_BITS == MARK_BASE >> MARK_BITS)
                .then_some(Self::Marked(addr, mark));
        }
        Some(if set.starts_with("external") {
            Self::External(addr)
        } else if set.starts_with("preserved") {
            Self::Preserved(addr)
        } else if set.starts_with("dropped") {
            Self::Dropped(addr)
        } else if set.starts_with("leaving") {
            Self::Leaving(addr)
        } else if set.starts_with("closed") {
            Self::Closed(addr)
        } else if set.starts_with("served") {
            Self::Served(addr)
        } else if set.starts_with("limited") {
            Self::Limited(addr)
        } else {
            Self::Frontend(addr)
        })
    }

    /// The interval from `first`, with the frontend behind it, to `end`: only whole
    /// networks are ours.
    fn admitted(first: IpAddr, frontend: &[u8], end: &[u8]) -> Option<Self> {
        let (ip, rest): (IpAddr, &[u8]) = if first.is_ipv4() {
            let (ip, rest) = frontend.split_first_chunk::<4>()?;
            ((*ip).into(), rest)
        } else {
            let (ip, rest) = frontend.split_first_chunk::<16>()?;
            ((*ip).into(), rest)
        };
        let addr = frontend_of(ip, rest)?;
        let family = Family::of(first);
        (0..=family.bits()).find_map(|prefix| {
            let network = IpNetwork::new(first, prefix).ok()?;
            let element = Self::Admitted(addr, network);
            let whole = network.network() == first && element.key_end()? == end;
            whole.then_some(element)
        })
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn frontend_key(addr: &FrontendAddr) -> Vec<u8> {
    let mut key = octets(addr.ip);
    let [high, low] = addr.port.to_be_bytes();
    key.extend([addr.protocol.number(), 0, 0, 0, high, low, 0, 0]);
    key
}

fn admitted_key(client: IpAddr, addr: &FrontendAddr) -> Vec<u8> {
    let mut key = octets(client);
    key.extend(frontend_key(addr));
    key
}

fn frontend_text(addr: &FrontendAddr) -> String {
    format!("{} . {} . {}", addr.ip, addr.protocol.number(), addr.port)
}

/// The frontend at `ip` whose protocol and port are the rest of a key.
fn frontend_of(ip: IpAddr, rest: &[u8]) -> Option<FrontendAddr> {
    let protocol = Protocol::from_number(*rest.first()?)?;
    let port = u16::from_be_bytes(*rest.get(4..)?.first_chunk::<2>()?);
    Some(FrontendAddr::new(ip, port, protocol))
}

/// In bytes, as the set's type says.
pub(super) fn key_length(set: &str) -> usize {
    let ip = if set.ends_with('4') { 4 } else { 16 };
    match set {
        "vips4" | "vips6" | SILENT => ip,
        "hairpins4" | "hairpins6" => 2 * ip,
        "admitted4" | "admitted6" => 2 * ip + 8,
        _ => ip + 8,
    }
}

/// Elements that go and come in one transaction, so that no packet meets what is in between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swap {
    pub(super) remove: Vec<Element>,
    pub(super) add: Vec<Element>,
}

impl Swap {
    /// Who may call a frontend.
    #[must_use]
    pub fn of(addr: FrontendAddr, how: &Restriction) -> Self {
        let admitted = |networks: &[IpNetwork]| {
            let networks = networks.iter().copied();
            networks.map(|n| Element::Admitted(addr, n)).collect()
        };
        let mut swap = Self {
            remove: admitted(&how.dismiss),
            add: admitted(&how.admit),
        };
        match how.limit {
            Some(true) => swap.add.push(Element::Limited(addr)),
            Some(false) => swap.remove.push(Element::Limited(addr)),
            None => {}
        }
        swap
    }

    /// The mark of packets of clients within the cluster to a frontend.
    #[must_use]
    pub fn mark(addr: FrontendAddr, from: Option<Mark>, to: Option<Mark>) -> Self {
        let elements = |mark: Option<Mark>| mark.map(|mark| Element::Marked(addr, mark));
        Self {
            remove: elements(from).into_iter().collect(),
            add: elements(to).into_iter().collect(),
        }
    }
}
