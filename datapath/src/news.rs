//! What happens to links, addresses and routes, as far as this node cares.

use std::net::IpAddr;

use ferrule_model::binding::Binding;
use ferrule_netlink::{Error, Monitor};
use ipnetwork::IpNetwork;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteHeader, RouteMessage};

use crate::bindings::{is_alias, vip_of};
use crate::routes::{NodeRoute, destination, our_routes};
use crate::vip::address_of;

/// One piece of news.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Something that was not heard: everything may have changed.
    Lost,
    /// A link came, changed or went.
    Link {
        /// Its index.
        index: u32,
        /// Its name, if the kernel said it.
        name: Option<String>,
        /// Whether it is there no more.
        gone: bool,
    },
    /// An address came, changed or went.
    Address {
        /// Index of its link.
        index: u32,
        /// The address, if the kernel said it.
        ip: Option<IpAddr>,
        /// Whether it is there now.
        present: bool,
        /// Whether it is a VIP of ours on a device that is not.
        alias: bool,
    },
    /// A local route of ours to a VIP came, changed or went.
    VipRoute {
        /// The VIP.
        ip: IpAddr,
        /// How it binds that.
        binding: Binding,
        /// Whether it is there now.
        present: bool,
    },
    /// A route of the main table, other than a default route, came, changed or went.
    Route {
        /// Where it leads.
        destination: IpNetwork,
        /// Itself, if it is one of ours to another node's pods.
        ours: Option<NodeRoute>,
        /// Whether it is there now.
        present: bool,
    },
}

/// Hears what happens.
#[derive(Debug)]
pub struct Watch {
    monitor: Monitor,
}

impl Watch {
    /// Listens in the calling thread's network namespace, within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        Ok(Self {
            monitor: Monitor::open()?,
        })
    }

    /// Waits until something happens, and returns it in the order in which it
    /// did. A call that is dropped before it is ready has taken nothing.
    ///
    /// # Errors
    /// [`Error::Closed`] and the like: open another one, everything may have changed.
    pub async fn next(&mut self) -> Result<Vec<News>, Error> {
        match self.monitor.next().await {
            Ok(messages) => Ok(messages.iter().filter_map(news).collect()),
            Err(Error::Overrun | Error::Decode(_)) => Ok(vec![News::Lost]),
            Err(error) => Err(error),
        }
    }
}

/// `None` for what is nobody's concern here.
fn news(message: &RouteNetlinkMessage) -> Option<News> {
    match message {
        RouteNetlinkMessage::NewLink(message) => Some(link(message, false)),
        RouteNetlinkMessage::DelLink(message) => Some(link(message, true)),
        RouteNetlinkMessage::NewAddress(message) => Some(address(message, true)),
        RouteNetlinkMessage::DelAddress(message) => Some(address(message, false)),
        RouteNetlinkMessage::NewRoute(message) => route(message, true),
        RouteNetlinkMessage::DelRoute(message) => route(message, false),
        _ => None,
    }
}

fn link(message: &LinkMessage, gone: bool) -> News {
    let name = message.attributes.iter().find_map(|attribute| {
        let LinkAttribute::IfName(name) = attribute else {
            return None;
        };
        Some(name.clone())
    });
    News::Link {
        index: message.header.index,
        name,
        gone,
    }
}

fn address(message: &AddressMessage, present: bool) -> News {
    News::Address {
        index: message.header.index,
        ip: address_of(message),
        present,
        alias: is_alias(message),
    }
}

fn route(message: &RouteMessage, present: bool) -> Option<News> {
    if message.header.table != RouteHeader::RT_TABLE_MAIN {
        let (ip, binding) = vip_of(message)?;
        return Some(News::VipRoute {
            ip,
            binding,
            present,
        });
    }
    let destination = match destination(message) {
        Ok(destination) => destination?,
        Err(_) => return Some(News::Lost),
    };
    Some(News::Route {
        destination,
        ours: our_routes(message, destination).next(),
        present,
    })
}
