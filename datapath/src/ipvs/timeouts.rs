//! Time-outs of connections, and facts about the table.

use std::time::Duration;

use ferrule_netlink::Error;

use super::attribute::{Attributes, each, put_u32, required};

/// `IPVS_CMD_ATTR_TIMEOUT_*`.
const TCP: u16 = 4;
const TCP_FIN: u16 = 5;
const UDP: u16 = 6;

/// `IPVS_INFO_ATTR_*`.
const VERSION: u16 = 1;
const TABLE_SIZE: u16 = 2;

/// How long IPVS remembers an idle connection, in whole seconds. In
/// [`super::Client::set_timeouts`] zero leaves a time-out as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP, established.
    pub tcp: Duration,
    /// TCP after a FIN.
    pub tcp_fin: Duration,
    /// UDP.
    pub udp: Duration,
}

impl Timeouts {
    /// These, and others where one is zero.
    #[must_use]
    pub fn or(&self, others: &Self) -> Self {
        let either = |one: Duration, other| if one.is_zero() { other } else { one };
        Self {
            tcp: either(self.tcp, others.tcp),
            tcp_fin: either(self.tcp_fin, others.tcp_fin),
            udp: either(self.udp, others.udp),
        }
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let mut timeouts = Self::default();
        for attribute in each(bytes) {
            let attribute = attribute?;
            let (field, name) = match attribute.kind {
                TCP => (&mut timeouts.tcp, "TIMEOUT_TCP"),
                TCP_FIN => (&mut timeouts.tcp_fin, "TIMEOUT_TCP_FIN"),
                UDP => (&mut timeouts.udp, "TIMEOUT_UDP"),
                _ => continue,
            };
            *field = Duration::from_secs(attribute.u32(name)?.into());
        }
        Ok(timeouts)
    }

    pub(super) fn emit(&self) -> Attributes {
        let mut attributes = Attributes::new();
        for (kind, value) in [(TCP, self.tcp), (TCP_FIN, self.tcp_fin), (UDP, self.udp)] {
            let seconds = u32::try_from(value.as_secs()).unwrap_or(u32::MAX);
            put_u32(&mut attributes, kind, seconds);
        }
        attributes
    }
}

/// What the kernel says about its IPVS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Version of IPVS: major, minor, patch.
    pub version: (u8, u8, u8),
    /// Buckets of the connection table.
    pub table_size: u32,
}

impl Info {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Error> {
        let (mut version, mut table_size) = (None, None);
        for attribute in each(bytes) {
            let attribute = attribute?;
            match attribute.kind {
                VERSION => version = Some(attribute.u32("INFO_VERSION")?),
                TABLE_SIZE => table_size = Some(attribute.u32("INFO_CONN_TAB_SIZE")?),
                _ => {}
            }
        }
        let [_, major, minor, patch] = required(version, "INFO_VERSION")?.to_be_bytes();
        Ok(Self {
            version: (major, minor, patch),
            table_size: required(table_size, "INFO_CONN_TAB_SIZE")?,
        })
    }
}
