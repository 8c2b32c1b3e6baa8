//! Orders to the kernel that make devices, addresses and routes, by system call: a
//! scenario has a dozen namespaces, and each start of `ip` would cost a tenth of a second.
//!
//! Indices of devices are ours to choose in a fresh namespace, so nothing is asked.

use std::fs;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, RawFd};
use std::path::Path;

use anyhow::{Context as _, anyhow};
use ferrule_netlink::{Protocol, RawMessage, Socket, route};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netns::Netns;

/// The loopback device of every namespace.
pub(super) const LOOPBACK: u32 = 1;

const MAKE: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const PUT: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
const SET: u16 = NLM_F_REQUEST | NLM_F_ACK;

/// One end of a link.
#[derive(Clone, Debug)]
pub(super) struct End {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) mac: [u8; 6],
}

/// What is to be made in one namespace, in this order.
#[derive(Debug, Default)]
pub(super) struct Orders {
    messages: Vec<(String, RawMessage, u16)>,
    settings: Vec<(&'static str, &'static str)>,
}

impl Orders {
    /// A setting below `/proc/sys/net`, which is made before anything else.
    pub(super) fn setting(&mut self, key: &'static str, value: &'static str) {
        self.settings.push((key, value));
    }

    pub(super) fn up(&mut self, index: u32) {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.add("up", RouteNetlinkMessage::SetLink(link), SET);
    }

    pub(super) fn bridge(&mut self, name: &str, index: u32) {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Bridge),
                LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::MulticastSnooping(false)])),
            ]),
        ];
        self.add(name, RouteNetlinkMessage::NewLink(link), MAKE);
    }

    /// A veth pair whose other end is in another namespace from the start.
    pub(super) fn veth(&mut self, here: &End, there: &End, other: RawFd, master: Option<u32>) {
        let mut peer = LinkMessage::default();
        peer.header.index = there.index;
        peer.attributes = vec![
            LinkAttribute::IfName(there.name.clone()),
            LinkAttribute::NetNsFd(other),
            LinkAttribute::Address(there.mac.to_vec()),
        ];
        let mut link = LinkMessage::default();
        link.header.index = here.index;
        link.attributes = vec![
            LinkAttribute::IfName(here.name.clone()),
            LinkAttribute::Address(here.mac.to_vec()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        if let Some(master) = master {
            link.attributes.push(LinkAttribute::Controller(master));
        }
        self.add(&here.name, RouteNetlinkMessage::NewLink(link), MAKE);
    }

    pub(super) fn address(&mut self, index: u32, ip: IpAddr, length: u8) {
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        message.header.index = index;
        message.header.prefix_len = length;
        message.header.scope = AddressScope::Universe;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        if ip.is_ipv6() {
            let nodad = AddressAttribute::Flags(AddressFlags::Nodad);
            message.attributes.push(nodad);
        }
        let what = ip.to_string();
        self.add(&what, RouteNetlinkMessage::NewAddress(message), MAKE);
    }

    pub(super) fn neighbour(&mut self, index: u32, ip: IpAddr, mac: [u8; 6]) {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(ip.into()),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let what = format!("the neighbour {ip}");
        self.add(&what, RouteNetlinkMessage::NewNeighbour(message), PUT);
    }

    pub(super) fn route(&mut self, index: u32, to: (IpAddr, u8), gateway: Option<IpAddr>) {
        let message = route::out_of(index, to, gateway, RouteProtocol::Boot);
        let what = format!("the route to {}/{}", to.0, to.1);
        self.add(&what, RouteNetlinkMessage::NewRoute(message), MAKE);
    }

    fn add(&mut self, what: &str, message: RouteNetlinkMessage, flags: u16) {
        let message = route::encode(message);
        self.messages.push((what.to_owned(), message, flags));
    }

    /// Makes everything.
    pub(super) fn carry_out(self, namespace: &Netns) -> anyhow::Result<()> {
        namespace.run(|| {
            for (key, value) in &self.settings {
                let path = Path::new("/proc/sys/net").join(key);
                fs::write(&path, value).with_context(|| format!("write {}", path.display()))?;
            }
            let (whats, messages): (Vec<_>, Vec<_>) = self
                .messages
                .into_iter()
                .map(|(what, message, flags)| (what, (message, flags)))
                .unzip();
            let results = block_on(async {
                let socket = Socket::open(Protocol::Route)?;
                Ok(socket.batch(messages).await)
            })?;
            for (what, result) in whats.iter().zip(results) {
                result.map_err(|error| anyhow!("make {what}: {error}"))?;
            }
            Ok(())
        })
    }
}

/// Runs to its end on the calling thread, whose namespace it is in.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work)
}

/// The number by which the kernel finds a namespace, while the file is open.
pub(super) fn descriptor(file: &fs::File) -> RawFd {
    file.as_raw_fd()
}

/// `0.0.0.0/0` or `::/0`, as `like`.
pub(super) fn everywhere(like: IpAddr) -> (IpAddr, u8) {
    match like {
        IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// The network of one address.
pub(super) fn single(ip: IpAddr) -> (IpAddr, u8) {
    (ip, if ip.is_ipv4() { 32 } else { 128 })
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
