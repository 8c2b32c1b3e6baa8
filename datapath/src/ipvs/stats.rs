//! Counters of a virtual service or real server.

use ferrule_netlink::Error;

use super::attribute::{Attribute, each};

/// What was counted, and the rates that the kernel's estimator makes of it
/// (0 with `net.ipv4.vs.run_estimation=0`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections scheduled.
    pub connections: u64,
    /// Packets from clients.
    pub packets_in: u64,
    /// Packets to clients.
    pub packets_out: u64,
    /// Bytes from clients.
    pub bytes_in: u64,
    /// Bytes to clients.
    pub bytes_out: u64,
    /// Connections a second.
    pub connection_rate: u64,
    /// Packets from clients a second.
    pub packet_rate_in: u64,
    /// Packets to clients a second.
    pub packet_rate_out: u64,
    /// Bytes from clients a second.
    pub byte_rate_in: u64,
    /// Bytes to clients a second.
    pub byte_rate_out: u64,
}

/// Parses `IPVS_*_ATTR_STATS64`, in which every counter has 64 bits, or the
/// older `IPVS_*_ATTR_STATS`, in which all but the byte counters have 32.
pub(super) fn parse(bytes: &[u8]) -> Result<Stats, Error> {
    let mut stats = Stats::default();
    for attribute in each(bytes) {
        let attribute = attribute?;
        let (field, name) = match attribute.kind {
            1 => (&mut stats.connections, "STATS_CONNS"),
            2 => (&mut stats.packets_in, "STATS_INPKTS"),
            3 => (&mut stats.packets_out, "STATS_OUTPKTS"),
            4 => (&mut stats.bytes_in, "STATS_INBYTES"),
            5 => (&mut stats.bytes_out, "STATS_OUTBYTES"),
            6 => (&mut stats.connection_rate, "STATS_CPS"),
            7 => (&mut stats.packet_rate_in, "STATS_INPPS"),
            8 => (&mut stats.packet_rate_out, "STATS_OUTPPS"),
            9 => (&mut stats.byte_rate_in, "STATS_INBPS"),
            10 => (&mut stats.byte_rate_out, "STATS_OUTBPS"),
            _ => continue,
        };
        *field = number(&attribute, name)?;
    }
    Ok(stats)
}

fn number(attribute: &Attribute<'_>, name: &str) -> Result<u64, Error> {
    if attribute.value.len() == size_of::<u32>() {
        attribute.u32(name).map(u64::from)
    } else {
        attribute.u64(name)
    }
}
