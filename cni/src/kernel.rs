//! The few questions and orders that the plugin has for the kernel, over a
//! netlink socket that belongs to one namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ferrule_model::names::{Attachment, NetworkName};
use ferrule_model::ownership;
use ferrule_netlink::{Error, Protocol, Socket, route};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_ACK, NLM_F_ECHO, NLM_F_REQUEST};
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::failure::{Code, Failure};
use crate::pair::{self, Mac, Order};
use crate::tc;

/// An operation of the kernel that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    #[error("cannot open a netlink socket: {0}")]
    Open(Error),
    #[error("cannot look for {what}: {source}")]
    Look { what: String, source: Error },
    #[error("cannot {what}: {source}{}", remedy(source))]
    Order { what: String, source: Error },
}

/// What to do about an object that is there already.
fn remedy(source: &Error) -> &'static str {
    if source.already_exists() {
        "; something else made it: find it with `ip -d link` and `ip route`, and remove it if it is a leftover"
    } else {
        ""
    }
}

impl KernelError {
    /// Whether the object to be made was there before.
    pub(crate) fn already_exists(&self) -> bool {
        match self {
            Self::Order { source, .. } => source.already_exists(),
            Self::Open(_) | Self::Look { .. } => false,
        }
    }

    /// Whether the object to be made is of a kind that the kernel does not know
    /// and has no module for: of a device, or of a qdisc, filter or action.
    pub(crate) fn is_unknown_kind(&self) -> bool {
        match self {
            Self::Order { source, .. } => {
                matches!(source.errno(), Some(Errno::OPNOTSUPP | Errno::NOENT))
            }
            Self::Open(_) | Self::Look { .. } => false,
        }
    }
}

impl From<KernelError> for Failure {
    fn from(error: KernelError) -> Self {
        let code = if error.already_exists() {
            Code::Taken
        } else {
            Code::Io
        };
        Self::new(code, error.to_string())
    }
}

/// What we look at in an interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) index: u32,
    pub(crate) up: bool,
    pub(crate) mac: Option<Mac>,
    /// In bytes.
    pub(crate) mtu: Option<u32>,
    alias: Option<String>,
    /// Index of the other end of a veth, in whichever namespace that is.
    peer: Option<u32>,
    /// What this namespace calls that of the other end, if that is another.
    peer_namespace: Option<i32>,
    /// Whether both ends of a veth are up.
    carrier: bool,
    kind: Option<InfoKind>,
}

impl Link {
    pub(crate) fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            carrier: message.header.flags.contains(LinkFlags::LowerUp),
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Address(bytes) => {
                    link.mac = bytes.as_slice().try_into().ok().map(Mac);
                }
                LinkAttribute::Mtu(mtu) => link.mtu = Some(*mtu),
                LinkAttribute::Link(index) => link.peer = Some(*index),
                // A namespace that is going has none.
                LinkAttribute::LinkNetNsId(id) => {
                    link.peer_namespace = Some(*id).filter(|id| *id >= 0);
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind.clone()),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        #[cfg(feature = "fuzzing")]
        ferrule_model::planted::bug(
            "netlink-route",
            [link.is_veth(), link.alias.is_some(), link.mac.is_none()],
        );
        link
    }

    fn is_veth(&self) -> bool {
        self.kind == Some(InfoKind::Veth)
    }

    fn is_ifb(&self) -> bool {
        self.kind == Some(InfoKind::Ifb)
    }

    /// Whether this is the host's end of the attachment's veth.
    pub(crate) fn is_host_end_of(&self, attachment: &Attachment) -> bool {
        let mac = self.mac.map(|Mac(bytes)| bytes);
        self.is_veth()
            && ownership::owns_host_veth(attachment, &self.name, self.alias.as_deref(), mac)
    }

    /// Whether this has name and MAC of the host's end of the attachment's veth,
    /// but no longer its alias.
    pub(crate) fn is_altered_end_of(&self, attachment: &Attachment) -> bool {
        let mac = self.mac.map(|Mac(bytes)| bytes);
        self.is_veth()
            && ownership::resembles_host_veth(attachment, &self.name, mac)
            && !self.is_host_end_of(attachment)
    }

    /// Whether this and `end`, in another namespace, name one another as ends of a veth.
    pub(crate) fn is_peer_of(&self, end: &Link) -> bool {
        self.is_veth()
            && end.is_veth()
            && self.peer == Some(end.index)
            && end.peer == Some(self.index)
    }

    /// The alias, empty if there is none.
    pub(crate) fn alias(&self) -> &str {
        self.alias.as_deref().unwrap_or_default()
    }

    /// Whether this is the device that shapes what comes from the attachment.
    pub(crate) fn is_shaper_of(&self, attachment: &Attachment) -> bool {
        let mac = self.mac.map(|Mac(bytes)| bytes);
        self.is_ifb() && ownership::owns_shaper(attachment, &self.name, self.alias.as_deref(), mac)
    }
}

impl Link {
    /// Whose device this is, and of which network, where its alias proves it.
    pub(crate) fn read_alias(&self) -> Option<(Attachment, Option<NetworkName>)> {
        ownership::read_alias(&self.name, self.alias.as_deref()?)
    }

    /// Whether this is a device of the attachment, of either kind.
    pub(crate) fn is_of(&self, attachment: &Attachment) -> bool {
        self.is_host_end_of(attachment) || self.is_shaper_of(attachment)
    }
}

/// What we look at in a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    to: IpNetwork,
    interface: Option<u32>,
    gateway: Option<IpAddr>,
    /// Whether it has several next hops, or one of another family.
    manifold: bool,
}

impl Way {
    fn parse(message: &RouteMessage) -> Option<Self> {
        let any = match message.header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let (mut to, mut interface, mut gateway, mut manifold) = (any, None, None, false);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => to = plain(address)?,
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::Gateway(address) => gateway = plain(address),
                RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) => manifold = true,
                _ => {}
            }
        }
        let to = IpNetwork::new(to, message.header.destination_prefix_length).ok()?;
        Some(Self {
            to,
            interface,
            gateway,
            manifold,
        })
    }

    /// Whether it leads to `to`, and over that gateway and interface where they are given.
    pub(crate) fn is(
        &self,
        to: IpNetwork,
        gateway: Option<IpAddr>,
        interface: Option<u32>,
    ) -> bool {
        (self.to.network(), self.to.prefix()) == (to.network(), to.prefix())
            && (self.manifold || gateway.is_none() || gateway == self.gateway)
            && (interface.is_none() || interface == self.interface)
    }
}

/// A socket into one network namespace.
pub(crate) struct Kernel {
    socket: Socket,
}

impl Kernel {
    /// Opens a socket in the namespace that the calling thread is in.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let socket = Socket::open(Protocol::Route).map_err(KernelError::Open)?;
        Ok(Self { socket })
    }

    /// The interface of a name, if there is one.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<Link>, KernelError> {
        let [link] = self.links([name]).await?;
        Ok(link)
    }

    /// The interfaces of these names, each if there is one; all are asked for at once.
    pub(crate) async fn links<const N: usize>(
        &self,
        names: [&str; N],
    ) -> Result<[Option<Link>; N], KernelError> {
        let questions = names.map(|name| (route::encode(pair::get_link(name)), NLM_F_REQUEST));
        let answers = self.socket.requests(questions.into()).await;
        let mut links = [const { None }; N];
        for ((link, name), answers) in links.iter_mut().zip(names).zip(answers) {
            let failed = |source| KernelError::Look {
                what: format!("interface {name}"),
                source,
            };
            let answers = match answers {
                Err(error) if error.is_not_found() => continue,
                other => other.map_err(failed)?,
            };
            for answer in &answers {
                if let RouteNetlinkMessage::NewLink(message) =
                    route::decode(answer).map_err(failed)?
                {
                    *link = Some(Link::parse(&message));
                }
            }
        }
        Ok(links)
    }

    /// The rate of the token bucket filter at the root of an interface, in
    /// bytes a second; none if something else is there.
    pub(crate) async fn tbf_rate(&self, index: u32) -> Result<Option<u64>, KernelError> {
        let failed = |source| KernelError::Look {
            what: format!("the qdisc of interface {index}"),
            source,
        };
        // Kernels before 6.8 answer the one who asks only if told to.
        let question = (route::encode(tc::get_root(index)), NLM_F_ECHO);
        let answers = match self.socket.request(question.0, question.1).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other.map_err(failed)?,
        };
        for answer in &answers {
            if let RouteNetlinkMessage::NewQueueDiscipline(qdisc) =
                route::decode(answer).map_err(failed)?
            {
                return Ok(tc::tbf_rate(&qdisc));
            }
        }
        Ok(None)
    }

    /// The interfaces to which redirections at the ingress of an interface lead.
    pub(crate) async fn redirects(&self, index: u32) -> Result<Vec<u32>, KernelError> {
        let failed = |source| KernelError::Look {
            what: format!("the filters of interface {index}"),
            source,
        };
        let encoded = route::encode(tc::get_filters(index));
        let mut found = Vec::new();
        let answers = match self.socket.dump(encoded).await {
            Err(error) if error.is_not_found() => return Ok(found),
            other => other.map_err(failed)?,
        };
        for answer in &answers {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) =
                route::decode(answer).map_err(failed)?
            {
                found.extend(tc::redirects_to(&filter));
            }
        }
        Ok(found)
    }

    /// Whether a host's end leads into a namespace that lives, to an interface that is up.
    /// That of a namespace which is going, or of an ADD that was killed before both ends
    /// were up, does not.
    pub(crate) async fn serves_a_pod(&self, end: &Link) -> Result<bool, KernelError> {
        let (true, Some(index), Some(namespace)) = (end.carrier, end.peer, end.peer_namespace)
        else {
            return Ok(false);
        };
        // The kernel keeps what a namespace was called until it has removed all that was in
        // it, but finds none by that any more (`get_net_ns_by_id()`).
        match self.ask(pair::get_link_in(namespace, index)).await {
            Ok(answers) => Ok(!answers.is_empty()),
            Err(error) if error.is_not_found() || error.errno() == Some(Errno::INVAL) => Ok(false),
            Err(source) => Err(KernelError::Look {
                what: format!("the other end of interface {}", end.name),
                source,
            }),
        }
    }

    /// The other end of a veth whose own end is in another namespace, if it is in this one.
    pub(crate) async fn other_end(&self, end: &Link) -> Result<Option<Link>, KernelError> {
        let Some(index) = end.peer else {
            return Ok(None);
        };
        let failed = |source| KernelError::Look {
            what: format!("the other end of interface {}", end.name),
            source,
        };
        let answers = match self.ask(pair::get_link_at(index)).await {
            Err(error) if error.is_not_found() => return Ok(None),
            other => other.map_err(failed)?,
        };
        let links = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(Link::parse(message)),
            _ => None,
        });
        let mut peers = links.filter(|link| link.is_peer_of(end));
        Ok(peers.next())
    }

    /// Every veth.
    pub(crate) async fn veths(&self) -> Result<Vec<Link>, KernelError> {
        let links = self.all_links().await?;
        Ok(links.into_iter().filter(Link::is_veth).collect())
    }

    /// Every interface that can be decoded: one of a kind that cannot is none of ours.
    async fn all_links(&self) -> Result<Vec<Link>, KernelError> {
        let failed = |source| KernelError::Look {
            what: "interfaces".to_owned(),
            source,
        };
        let dump = self.socket.dump(route::encode(pair::get_links()));
        let answers = dump.await.map_err(failed)?;
        let links = answers.iter().filter_map(|raw| match route::decode(raw) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Some(Link::parse(&link)),
            _ => None,
        });
        Ok(links.collect())
    }

    /// Every veth and ifb whose name begins like ours of that kind; veths come first,
    /// because packets are redirected to a shaper until its veth is gone.
    pub(crate) async fn devices(&self) -> Result<Vec<Link>, KernelError> {
        let links = self.all_links().await?;
        let (mut devices, shapers): (Vec<Link>, Vec<Link>) = links
            .into_iter()
            .filter(|link| {
                (link.is_veth() && link.name.starts_with(ownership::HOST_VETH_PREFIX))
                    || (link.is_ifb() && link.name.starts_with(ownership::SHAPER_PREFIX))
            })
            .partition(Link::is_veth);
        devices.extend(shapers);
        Ok(devices)
    }

    /// The addresses on an interface.
    pub(crate) async fn addresses(&self, index: u32) -> Result<Vec<IpNetwork>, KernelError> {
        let failed = |source| KernelError::Look {
            what: "addresses".to_owned(),
            source,
        };
        let encoded = route::encode(pair::get_addresses());
        let mut addresses = Vec::new();
        for raw in self.socket.dump(encoded).await.map_err(failed)? {
            let RouteNetlinkMessage::NewAddress(message) = route::decode(&raw).map_err(failed)?
            else {
                continue;
            };
            if message.header.index != index {
                continue;
            }
            let local = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(ip) => Some(*ip),
                    _ => None,
                });
            let any = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                });
            // IPv6 addresses without a peer have no IFA_LOCAL.
            let network = local
                .or(any)
                .and_then(|ip| IpNetwork::new(ip, message.header.prefix_len).ok());
            addresses.extend(network);
        }
        Ok(addresses)
    }

    /// Interface and gateway that packets for `ip` take; none without a route.
    pub(crate) async fn way_to(
        &self,
        ip: IpAddr,
    ) -> Result<Option<(u32, Option<IpAddr>)>, KernelError> {
        let messages = match self.ask(pair::get_route(ip)).await {
            Ok(messages) => messages,
            Err(error) if is_unreachable(&error) => return Ok(None),
            Err(source) => {
                return Err(KernelError::Look {
                    what: format!("the route to {ip}"),
                    source,
                });
            }
        };
        Ok(messages.iter().find_map(|message| {
            let RouteNetlinkMessage::NewRoute(route) = message else {
                return None;
            };
            let mut interface = None;
            let mut gateway = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => interface = Some(*index),
                    RouteAttribute::Gateway(address) => gateway = plain(address),
                    _ => {}
                }
            }
            interface.map(|interface| (interface, gateway))
        }))
    }

    /// The neighbour entries of an interface that have a MAC.
    pub(crate) async fn neighbours(&self, index: u32) -> Result<Vec<(IpAddr, Mac)>, KernelError> {
        let failed = |source| KernelError::Look {
            what: "neighbour entries".to_owned(),
            source,
        };
        let dump = self.socket.dump(route::encode(pair::get_neighbours()));
        let mut found = Vec::new();
        for raw in dump.await.map_err(failed)? {
            let RouteNetlinkMessage::NewNeighbour(message) = route::decode(&raw).map_err(failed)?
            else {
                continue;
            };
            if message.header.ifindex != index {
                continue;
            }
            let (mut ip, mut mac) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                        ip = Some(IpAddr::from(*v4));
                    }
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                        ip = Some(IpAddr::from(*v6));
                    }
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = bytes.as_slice().try_into().ok().map(Mac);
                    }
                    _ => {}
                }
            }
            found.extend(ip.zip(mac));
        }
        Ok(found)
    }

    /// Every route, of every table. One that cannot be decoded is of no plugin that
    /// reports routes.
    pub(crate) async fn routes(&self) -> Result<Vec<Way>, KernelError> {
        let failed = |source| KernelError::Look {
            what: "routes".to_owned(),
            source,
        };
        let dump = self.socket.dump(route::encode(pair::get_routes()));
        let answers = dump.await.map_err(failed)?;
        let routes = answers.iter().filter_map(|raw| match route::decode(raw) {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Way::parse(&message),
            _ => None,
        });
        Ok(routes.collect())
    }

    /// Sends one question and decodes what comes back.
    async fn ask(&self, question: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let answers = self
            .socket
            .request(route::encode(question), NLM_F_REQUEST)
            .await?;
        answers.iter().map(route::decode).collect()
    }

    /// Carries orders out, in one batch.
    ///
    /// The kernel takes them one by one and goes on after a failure; the first
    /// failure is the one that is returned.
    pub(crate) async fn carry_out(&self, orders: Vec<Order>) -> Result<(), KernelError> {
        let (names, messages): (Vec<_>, Vec<_>) = orders
            .into_iter()
            .map(|order| (order.what, (route::encode(order.message), order.flags)))
            .unzip();
        let results = self.socket.batch(messages).await;
        for (what, result) in names.into_iter().zip(results) {
            result.map_err(|source| KernelError::Order { what, source })?;
        }
        Ok(())
    }

    /// Removes interfaces; those that are gone already are fine.
    pub(crate) async fn delete(&self, links: &[Link]) -> Result<(), KernelError> {
        let all: Vec<&Link> = links.iter().collect();
        self.delete_each(&all).await.into_iter().collect()
    }

    /// Removes interfaces, each with a result of its own; one that is gone already is fine.
    pub(crate) async fn delete_each(&self, links: &[&Link]) -> Vec<Result<(), KernelError>> {
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        let messages = links
            .iter()
            .map(|link| (route::encode(pair::delete_link(link.index)), flags))
            .collect();
        let results = self.socket.batch(messages).await.into_iter();
        let named = links
            .iter()
            .zip(results)
            .map(|(link, result)| match result {
                Err(source) if !source.is_not_found() => Err(KernelError::Order {
                    what: format!("remove interface {}", link.name),
                    source,
                }),
                Ok(()) | Err(_) => Ok(()),
            });
        named.collect()
    }
}

/// A gateway as the standard library has it.
fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// Whether a lookup failed because there is no route.
fn is_unreachable(error: &Error) -> bool {
    matches!(error.errno(), Some(Errno::NETUNREACH | Errno::HOSTUNREACH))
}
