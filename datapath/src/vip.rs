//! The device that carries the VIPs.
//!
//! A dummy device, down and without ARP: IPVS takes requests on their way to a
//! local socket, so a VIP must be an address of the node, and of no device that
//! anybody sends on. Addresses are single hosts (/32, /128).

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferrule_model::address::Family;
use ferrule_model::names::IfName;
use ferrule_netlink::{Error, Protocol, Socket, route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::modules;
use crate::routes::forgive;

/// `INFINITY_LIFE_TIME` of `net/addrconf.h`.
pub(crate) const FOREVER: u32 = u32::MAX;

/// Why the device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel refused.
    #[error("cannot {action} device {device}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// On which device.
        device: IfName,
        /// Why not.
        source: Error,
    },
    /// No dummy devices.
    #[error(
        "this kernel has no dummy devices, without which VIPs have no place ({source}); {}",
        modules::remedy(&["dummy"])
    )]
    NoDummy {
        /// What the kernel said.
        source: Error,
    },
    /// The kernel does not note who made an address.
    #[error(
        "Linux {release} cannot tell whose an address of {device} is, so VIPs cannot be bound there; \
         use Linux 5.18 or newer, or another vipBinding: address or route"
    )]
    NoOwner {
        /// The device that VIPs should be bound on.
        device: IfName,
        /// The kernel.
        release: String,
    },
    /// Somebody's device has the name.
    #[error(
        "device {device} exists and is no dummy device; rename it, or give the VIPs another device by --vip-device"
    )]
    Taken {
        /// The device.
        device: IfName,
    },
}

/// The device and the way to its addresses.
#[derive(Debug)]
pub struct VipDevice {
    socket: Socket,
    name: IfName,
    index: u32,
}

impl VipDevice {
    /// Makes the device if it is missing, in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn ensure(name: &IfName) -> Result<Self, DeviceError> {
        if let Some(device) = Self::find(name).await? {
            return Ok(device);
        }
        let failed = |source| DeviceError::Kernel {
            action: "make",
            device: name.clone(),
            source,
        };
        let socket = Socket::open(Protocol::Route).map_err(failed)?;
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.to_string()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]),
        ];
        let order = route::encode(RouteNetlinkMessage::NewLink(link));
        match socket.request(order, NLM_F_CREATE | NLM_F_EXCL).await {
            Ok(_) => {}
            // Made by another since we looked.
            Err(error) if error.already_exists() => {}
            Err(source) if source.errno() == Some(Errno::OPNOTSUPP) => {
                return Err(DeviceError::NoDummy { source });
            }
            Err(error) => return Err(failed(error)),
        }
        Self::find(name).await?.ok_or_else(|| {
            failed(Error::Decode(
                "the device is not there after it was made".to_owned(),
            ))
        })
    }

    /// The device, if it exists.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn find(name: &IfName) -> Result<Option<Self>, DeviceError> {
        let failed = |source| DeviceError::Kernel {
            action: "find",
            device: name.clone(),
            source,
        };
        let socket = Socket::open(Protocol::Route).map_err(failed)?;
        let Some(link) = link_named(&socket, name.as_str()).await.map_err(failed)? else {
            return Ok(None);
        };
        if !is_dummy(&link) {
            return Err(DeviceError::Taken {
                device: name.clone(),
            });
        }
        Ok(Some(Self {
            socket,
            name: name.clone(),
            index: link.header.index,
        }))
    }

    /// Gives the device its name again if another took that. Whether the device still exists.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn take_name_back(&self) -> Result<bool, DeviceError> {
        let failed = |source| DeviceError::Kernel {
            action: "rename",
            device: self.name.clone(),
            source,
        };
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        let question = route::encode(RouteNetlinkMessage::GetLink(link.clone()));
        let answers = match self.socket.request(question, 0).await {
            Ok(answers) => answers,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(failed(error)),
        };
        let Some(answer) = answers.first() else {
            return Ok(false);
        };
        // A device of another kind has got the number meanwhile.
        match route::decode(answer).map_err(failed)? {
            RouteNetlinkMessage::NewLink(found) if is_dummy(&found) => {}
            _ => return Ok(false),
        }
        link.attributes = vec![LinkAttribute::IfName(self.name.to_string())];
        let order = route::encode(RouteNetlinkMessage::SetLink(link));
        match self.socket.request(order, 0).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &IfName {
        &self.name
    }

    /// Its index, which another device of the same name has not.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Every host address on the device; IPv6 link-local ones are the kernel's own.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn addresses(&self) -> Result<BTreeSet<IpAddr>, Error> {
        let mut question = AddressMessage::default();
        question.header.index = self.index;
        let question = route::encode(RouteNetlinkMessage::GetAddress(question));
        let mut addresses = BTreeSet::new();
        for answer in self.socket.dump(question).await? {
            if let RouteNetlinkMessage::NewAddress(message) = route::decode(&answer)? {
                addresses.extend(self.host_address(&message));
            }
        }
        Ok(addresses)
    }

    fn host_address(&self, message: &AddressMessage) -> Option<IpAddr> {
        if message.header.index != self.index {
            return None;
        }
        let ip = address_of(message)?;
        let link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let host = message.header.prefix_len == Family::of(ip).bits();
        (host && !link_local).then_some(ip)
    }

    /// Puts addresses on the device. Those that are there already are fine. The
    /// i-th result is that of the i-th address.
    pub async fn bind(&self, ips: &[IpAddr]) -> Vec<Result<(), Error>> {
        let orders = ips.iter().map(|ip| {
            let message = RouteNetlinkMessage::NewAddress(self.address(*ip));
            (route::encode(message), NLM_F_CREATE | NLM_F_EXCL)
        });
        let results = self.socket.batch(orders.collect()).await;
        forgive(results, Error::already_exists)
    }

    /// Takes addresses off the device. Those that are gone already are fine. The
    /// i-th result is that of the i-th address.
    pub async fn unbind(&self, ips: &[IpAddr]) -> Vec<Result<(), Error>> {
        let orders = ips.iter().map(|ip| {
            let message = RouteNetlinkMessage::DelAddress(self.address(*ip));
            (route::encode(message), 0)
        });
        let results = self.socket.batch(orders.collect()).await;
        forgive(results, Error::is_not_found)
    }

    fn address(&self, ip: IpAddr) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = match ip {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.prefix_len = Family::of(ip).bits();
        message.header.index = self.index;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        // A VIP must not be the source of what has nothing to do with it. Where the device that
        // leads to a pod has no address, the kernel takes one of another device: in IPv4 the first
        // that is not of scope link (inet_select_addr()), in IPv6 the nearest by RFC 6724, unless
        // it is deprecated.
        match ip {
            IpAddr::V4(_) => message.header.scope = AddressScope::Link,
            IpAddr::V6(_) => {
                message.header.scope = AddressScope::Universe;
                // Duplicate address detection would ask on a device that nobody hears.
                message.header.flags = AddressHeaderFlags::Nodad;
                let mut lifetimes = CacheInfo::default();
                lifetimes.ifa_valid = FOREVER;
                message
                    .attributes
                    .push(AddressAttribute::CacheInfo(lifetimes));
            }
        }
        message
    }

    /// Removes the device with its addresses. One that is gone is fine.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove(&self) -> Result<(), Error> {
        let mut link = LinkMessage::default();
        link.header.index = self.index;
        let order = route::encode(RouteNetlinkMessage::DelLink(link));
        match self.socket.request(order, 0).await {
            Err(error) if !error.is_not_found() => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

/// The address that a message is about.
pub(crate) fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut attributes = message.attributes.iter();
    attributes.find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    })
}

fn is_dummy(link: &LinkMessage) -> bool {
    is_of_kind(link, InfoKind::Dummy)
}

/// What the kernel tells of the device of a name, if there is one.
pub(crate) async fn link_named(socket: &Socket, name: &str) -> Result<Option<LinkMessage>, Error> {
    let mut link = LinkMessage::default();
    link.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    let question = route::encode(RouteNetlinkMessage::GetLink(link));
    let answers = match socket.request(question, 0).await {
        Ok(answers) => answers,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    match answers.first().map(route::decode).transpose()? {
        Some(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        Some(_) | None => Ok(None),
    }
}

/// Whether a device is of a kind, by what the kernel tells of it.
pub(crate) fn is_of_kind(link: &LinkMessage, kind: InfoKind) -> bool {
    let kind = LinkInfo::Kind(kind);
    link.attributes.iter().any(
        |attribute| matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&kind)),
    )
}
