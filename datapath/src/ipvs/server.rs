//! Real servers.

use ferrule_model::address::{BackendAddr, Family};
use ferrule_netlink::Error;
use netlink_packet_core::DefaultNla;

use super::attribute::{
    Attribute, Attributes, each, nested, put_address, put_family, put_port, put_u8, put_u16,
    put_u32, required,
};
use super::stats::{self, Stats};

/// `IPVS_CMD_ATTR_DEST`.
const SERVER: u16 = 2;

/// `IPVS_DEST_ATTR_*`.
const ADDRESS: u16 = 1;
const PORT: u16 = 2;
const FORWARD: u16 = 3;
const WEIGHT: u16 = 4;
const UPPER: u16 = 5;
const LOWER: u16 = 6;
const ACTIVE: u16 = 7;
const INACTIVE: u16 = 8;
const PERSISTENT: u16 = 9;
const STATS: u16 = 10;
const FAMILY: u16 = 11;
const STATS64: u16 = 12;
const TUNNEL_TYPE: u16 = 13;
const TUNNEL_PORT: u16 = 14;
const TUNNEL_FLAGS: u16 = 15;

/// `IP_VS_CONN_F_FWD_MASK`.
const FORWARD_MASK: u32 = 0x7;

/// How packets get to a real server; we use NAT only, for the others cannot map ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ForwardMethod {
    /// The destination is rewritten (`-m`).
    #[default]
    Nat,
    /// The real server is this host.
    Local,
    /// Packets are wrapped (`-i`).
    Tunnel,
    /// Only the link-layer destination changes (`-g`).
    DirectRouting,
    /// A method that this version does not know, by its number.
    Other(u8),
}

impl ForwardMethod {
    fn number(self) -> u32 {
        match self {
            Self::Nat => 0,
            Self::Local => 1,
            Self::Tunnel => 2,
            Self::DirectRouting => 3,
            Self::Other(number) => number.into(),
        }
    }

    fn from_flags(flags: u32) -> Self {
        match flags & FORWARD_MASK {
            0 => Self::Nat,
            1 => Self::Local,
            2 => Self::Tunnel,
            3 => Self::DirectRouting,
            other => Self::Other(other.to_le_bytes()[0]),
        }
    }
}

/// How packets are wrapped, with [`ForwardMethod::Tunnel`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnel {
    /// `IP_VS_CONN_F_TUNNEL_TYPE_*`: 0 IPIP, 1 GUE, 2 GRE.
    pub kind: u8,
    /// UDP port of GUE.
    pub port: u16,
    /// `IP_VS_TUNNEL_ENCAP_FLAG_*`.
    pub flags: u16,
}

/// What can be set on a real server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServerSettings {
    /// How packets get there.
    pub forward: ForwardMethod,
    /// Share of new connections; 0 for none.
    pub weight: u32,
    /// Connections above which it gets no more; 0 for no limit.
    pub upper: u32,
    /// Connections below which it gets new ones again.
    pub lower: u32,
    /// How packets are wrapped.
    pub tunnel: Tunnel,
}

impl ServerSettings {
    /// NAT with this weight and no limits.
    #[must_use]
    pub fn nat(weight: u32) -> Self {
        Self {
            weight,
            ..Self::default()
        }
    }
}

/// A real server as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RealServer {
    /// Where it listens.
    pub addr: BackendAddr,
    /// How it is set.
    pub settings: ServerSettings,
    /// Connections that are established.
    pub active: u32,
    /// Other connections.
    pub inactive: u32,
    /// Persistence templates.
    pub persistent: u32,
    /// What it counted.
    pub stats: Stats,
}

impl RealServer {
    /// The nested attribute that names the server and says nothing else.
    pub(super) fn emit_key(addr: &BackendAddr) -> DefaultNla {
        nested(SERVER, &key(addr))
    }

    /// The nested attribute with key and settings.
    pub(super) fn emit(addr: &BackendAddr, settings: &ServerSettings) -> DefaultNla {
        let mut attributes = key(addr);
        put_u32(&mut attributes, FORWARD, settings.forward.number());
        put_u32(&mut attributes, WEIGHT, settings.weight);
        put_u32(&mut attributes, UPPER, settings.upper);
        put_u32(&mut attributes, LOWER, settings.lower);
        if settings.forward == ForwardMethod::Tunnel {
            put_u8(&mut attributes, TUNNEL_TYPE, settings.tunnel.kind);
            put_port(&mut attributes, TUNNEL_PORT, settings.tunnel.port);
            put_u16(&mut attributes, TUNNEL_FLAGS, settings.tunnel.flags);
        }
        nested(SERVER, &attributes)
    }

    /// Parses the attributes of a message of the kernel; `None` if it is about
    /// something else. `family` is that of the virtual service: kernels before
    /// 3.18 do not name the server's own.
    pub(super) fn parse(message: &[u8], family: Family) -> Result<Option<Self>, Error> {
        for attribute in each(message) {
            let attribute = attribute?;
            if attribute.kind == SERVER {
                return Self::parse_nested(attribute.value, family).map(Some);
            }
        }
        Ok(None)
    }

    fn parse_nested(bytes: &[u8], mut family: Family) -> Result<Self, Error> {
        let mut address: Option<Attribute<'_>> = None;
        let mut port = None;
        let mut settings = ServerSettings::default();
        let (mut active, mut inactive, mut persistent) = (0, 0, 0);
        let mut stats = None;
        for attribute in each(bytes) {
            let a = attribute?;
            match a.kind {
                // The family comes behind it.
                ADDRESS => address = Some(a),
                PORT => port = Some(a.port("DEST_PORT")?),
                FORWARD => {
                    settings.forward = ForwardMethod::from_flags(a.u32("DEST_FWD_METHOD")?);
                }
                WEIGHT => settings.weight = a.u32("DEST_WEIGHT")?,
                UPPER => settings.upper = a.u32("DEST_U_THRESH")?,
                LOWER => settings.lower = a.u32("DEST_L_THRESH")?,
                ACTIVE => active = a.u32("DEST_ACTIVE_CONNS")?,
                INACTIVE => inactive = a.u32("DEST_INACT_CONNS")?,
                PERSISTENT => persistent = a.u32("DEST_PERSIST_CONNS")?,
                FAMILY => family = a.family("DEST_ADDR_FAMILY")?,
                TUNNEL_TYPE => settings.tunnel.kind = a.u8("DEST_TUN_TYPE")?,
                TUNNEL_PORT => settings.tunnel.port = a.port("DEST_TUN_PORT")?,
                TUNNEL_FLAGS => settings.tunnel.flags = a.u16("DEST_TUN_FLAGS")?,
                STATS if stats.is_none() => stats = Some(stats::parse(a.value)?),
                STATS64 => stats = Some(stats::parse(a.value)?),
                _ => {}
            }
        }
        let ip = required(address, "DEST_ADDR")?.address(family, "DEST_ADDR")?;
        Ok(Self {
            addr: BackendAddr::new(ip, required(port, "DEST_PORT")?),
            settings,
            active,
            inactive,
            persistent,
            stats: stats.unwrap_or_default(),
        })
    }
}

fn key(addr: &BackendAddr) -> Attributes {
    let mut attributes = Attributes::new();
    put_address(&mut attributes, ADDRESS, addr.ip);
    put_port(&mut attributes, PORT, addr.port);
    put_family(&mut attributes, FAMILY, Family::of(addr.ip));
    attributes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(nla: &DefaultNla) -> Vec<u8> {
        use netlink_packet_core::Emitable as _;
        let mut bytes = vec![0; nla.buffer_len()];
        nla.emit(&mut bytes);
        bytes
    }

    #[test]
    fn what_is_sent_reads_back() {
        let tunnel = ServerSettings {
            forward: ForwardMethod::Tunnel,
            weight: 3,
            upper: 100,
            lower: 90,
            tunnel: Tunnel {
                kind: 1,
                port: 6080,
                flags: 2,
            },
        };
        for settings in [ServerSettings::nat(0), ServerSettings::nat(65535), tunnel] {
            for ip in ["10.1.0.2", "fd00:1::2"] {
                let addr = BackendAddr::new(ip.parse().unwrap(), 8080);
                let sent = bytes(&RealServer::emit(&addr, &settings));
                // The server's own family counts, not the service's.
                let read = RealServer::parse(&sent, Family::IPv4).unwrap().unwrap();
                assert_eq!((read.addr, read.settings), (addr, settings));
                for cut in 0..sent.len() {
                    let _error_or_less = RealServer::parse(&sent[..cut], Family::IPv6);
                }
            }
        }
    }

    #[test]
    fn an_old_kernel_names_no_family() {
        let mut attributes = Attributes::new();
        put_address(&mut attributes, ADDRESS, "fd00:1::2".parse().unwrap());
        put_port(&mut attributes, PORT, 80);
        let sent = bytes(&nested(SERVER, &attributes));
        let read = RealServer::parse(&sent, Family::IPv6).unwrap().unwrap();
        assert_eq!(read.addr.ip.to_string(), "fd00:1::2");
    }
}
