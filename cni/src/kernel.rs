//! The few questions and orders that the plugin has for the kernel, over a
//! netlink socket that belongs to one namespace.

use std::net::IpAddr;

use ferrule_model::names::{Attachment, NetworkName};
use ferrule_model::ownership;
use ferrule_netlink::{Error, Protocol, Socket, route};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute};
use rustix::io::Errno;

use crate::failure::{Code, Failure};
use crate::pair::{self, Mac, Order};

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
    alias: Option<String>,
    veth: bool,
}

impl Link {
    fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
                LinkAttribute::Address(bytes) => {
                    link.mac = bytes.as_slice().try_into().ok().map(Mac);
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        link
    }

    /// Whether this is the host's end of the attachment's veth.
    pub(crate) fn is_host_end_of(&self, attachment: &Attachment) -> bool {
        let mac = self.mac.map(|Mac(bytes)| bytes);
        self.veth && ownership::owns_host_veth(attachment, &self.name, self.alias.as_deref(), mac)
    }
}

impl Link {
    /// Whose host end this is, and of which network, where its alias proves it.
    pub(crate) fn read_alias(&self) -> Option<(Attachment, Option<NetworkName>)> {
        let alias = self.alias.as_deref().filter(|_| self.veth)?;
        ownership::read_host_veth(&self.name, alias)
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
        let found = self.ask(pair::get_link(name)).await;
        match found {
            Ok(messages) => Ok(messages.iter().find_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(Link::parse(link)),
                _ => None,
            })),
            Err(error) if error.is_not_found() => Ok(None),
            Err(source) => Err(KernelError::Look {
                what: format!("interface {name}"),
                source,
            }),
        }
    }

    /// Every veth whose name begins like those of our host ends.
    pub(crate) async fn host_ends(&self) -> Result<Vec<Link>, KernelError> {
        let failed = |source| KernelError::Look {
            what: "interfaces".to_owned(),
            source,
        };
        let dump = self.socket.dump(route::encode(pair::get_links()));
        let answers = dump.await.map_err(failed)?;
        // A device of a kind that cannot be decoded is none of ours.
        let links = answers.iter().filter_map(|raw| match route::decode(raw) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Some(Link::parse(&link)),
            _ => None,
        });
        Ok(links
            .filter(|link| link.veth && link.name.starts_with(ownership::HOST_VETH_PREFIX))
            .collect())
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

    /// Removes an interface; one that is gone already is fine.
    pub(crate) async fn delete(&self, link: &Link) -> Result<(), KernelError> {
        self.delete_all(&[link]).await.into_iter().collect()
    }

    /// Removes interfaces, each with a result of its own; one that is gone already is fine.
    pub(crate) async fn delete_all(&self, links: &[&Link]) -> Vec<Result<(), KernelError>> {
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
