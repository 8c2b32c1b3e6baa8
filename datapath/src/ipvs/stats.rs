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

#[cfg(test)]
mod tests {
    use netlink_packet_core::{DefaultNla, Emitable as _};

    use super::*;

    fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
        let mut bytes = vec![0; attributes.buffer_len()];
        attributes.emit(&mut bytes);
        bytes
    }

    #[test]
    fn counters_of_both_widths() {
        let wide = bytes(&[
            DefaultNla::new(1, u64::MAX.to_ne_bytes().to_vec()),
            DefaultNla::new(10, 10_u64.to_ne_bytes().to_vec()),
            DefaultNla::new(11, vec![]),
        ]);
        let stats = parse(&wide).unwrap();
        assert_eq!((stats.connections, stats.byte_rate_out), (u64::MAX, 10));
        let narrow = bytes(&[
            DefaultNla::new(2, u32::MAX.to_ne_bytes().to_vec()),
            DefaultNla::new(4, u64::MAX.to_ne_bytes().to_vec()),
        ]);
        let stats = parse(&narrow).unwrap();
        assert_eq!(
            (stats.packets_in, stats.bytes_in),
            (u32::MAX.into(), u64::MAX)
        );
        let wrong = bytes(&[DefaultNla::new(5, vec![0; 6])]);
        let error = parse(&wrong).unwrap_err().to_string();
        assert!(error.contains("STATS_OUTBYTES has 6 bytes"), "{error}");
    }
}
