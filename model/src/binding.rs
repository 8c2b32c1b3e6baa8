//! How a VIP is made an address that this node takes packets for.
//!
//! IPVS takes requests on their way to a local socket, so the kernel must hold a VIP
//! for local. There are three ways to that, of which the operator chooses one; a VIP
//! may be bound in several for as long as a change of mind is carried out.

use std::fmt;
use std::net::IpAddr;

use crate::names::IfName;

/// The way that the operator has chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum VipBinding {
    /// An address of the dummy device.
    #[default]
    Address,
    /// A local route without an address.
    Route,
    /// An address of this device.
    Device(IfName),
}

/// One way in which one VIP is bound, or should be. [`Binding::Address`] is the least.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Binding {
    /// It is an address of the dummy device.
    Address,
    /// A route in the kernel's local table leads to it.
    Route {
        /// The address of the node by which its own processes call; where none is
        /// known, the VIP itself in IPv4, and in IPv6 what the kernel chooses.
        source: Option<IpAddr>,
    },
    /// It is an address of a device that is not ours.
    Alias {
        /// The device.
        device: IfName,
    },
}

impl Binding {
    /// Whether making the other for `ip` undoes this one. The kernel has one route of
    /// IPv6 to a destination over one device; another source takes its place.
    #[must_use]
    pub fn is_replaced_by(&self, other: &Self, ip: IpAddr) -> bool {
        let both_routes = matches!((self, other), (Self::Route { .. }, Self::Route { .. }));
        both_routes && ip.is_ipv6()
    }
}

impl fmt::Display for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address => f.write_str("address of the VIP device"),
            Self::Route {
                source: Some(source),
            } => write!(f, "local route with source {source}"),
            Self::Route { source: None } => f.write_str("local route"),
            Self::Alias { device } => write!(f, "address of {device}"),
        }
    }
}
