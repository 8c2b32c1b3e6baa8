//! Virtual services.

use std::fmt;

use ferrule_model::address::{Family, FrontendAddr, Protocol};
use ferrule_model::service::ServiceKey;
use ferrule_netlink::Error;
use netlink_packet_core::DefaultNla;

use super::attribute::{
    Attributes, each, nested, put_address, put_family, put_port, put_text, put_u16, put_u32,
    required,
};
use super::stats::{self, Stats};

/// `IPVS_CMD_ATTR_SERVICE`.
const SERVICE: u16 = 1;

/// `IPVS_SVC_ATTR_*`.
const FAMILY: u16 = 1;
const PROTOCOL: u16 = 2;
const ADDRESS: u16 = 3;
const PORT: u16 = 4;
const MARK: u16 = 5;
const SCHEDULER: u16 = 6;
const FLAGS: u16 = 7;
const TIMEOUT: u16 = 8;
const NETMASK: u16 = 9;
const STATS: u16 = 10;
const ENGINE: u16 = 11;
const STATS64: u16 = 12;

fn put_key(key: &ServiceKey, attributes: &mut Attributes) {
    put_family(attributes, FAMILY, key.family());
    match key {
        ServiceKey::Address(addr) => {
            put_u16(attributes, PROTOCOL, addr.protocol.number().into());
            put_address(attributes, ADDRESS, addr.ip);
            put_port(attributes, PORT, addr.port);
        }
        ServiceKey::Mark { mark, .. } => put_u32(attributes, MARK, *mark),
    }
}

/// The nested attribute that names the service and says nothing else.
pub(super) fn emit_key(key: &ServiceKey) -> DefaultNla {
    let mut attributes = Attributes::new();
    put_key(key, &mut attributes);
    nested(SERVICE, &attributes)
}

/// `IP_VS_SVC_F_*`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceFlags(u32);

impl ServiceFlags {
    /// Connections of one client go to one real server.
    pub const PERSISTENT: Self = Self(0x1);
    /// The kernel's own: the service is in its table.
    pub const HASHED: Self = Self(0x2);
    /// Each UDP packet is scheduled for itself.
    pub const ONE_PACKET: Self = Self(0x4);
    /// What the scheduler makes of it (`sh`: fallback; `mh`: fallback).
    pub const SCHEDULER_1: Self = Self(0x8);
    /// What the scheduler makes of it (`sh`, `mh`: the port counts too).
    pub const SCHEDULER_2: Self = Self(0x10);
    /// What the scheduler makes of it.
    pub const SCHEDULER_3: Self = Self(0x20);

    /// Whether all bits of `other` are set.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits as `linux/ip_vs.h` has them.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Flags of these bits, also such as this version does not know.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }
}

impl std::ops::BitOr for ServiceFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for ServiceFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// What can be set on a virtual service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSettings {
    /// Name of the scheduler, such as `rr`.
    pub scheduler: String,
    /// Flags; they are set exactly, [`ServiceFlags::HASHED`] stays the kernel's.
    pub flags: ServiceFlags,
    /// How long persistence lasts, in seconds; 0 without.
    pub timeout: u32,
    /// Prefix length by which persistence groups clients.
    pub prefix: u8,
    /// Persistence engine (`sip`), if any.
    pub engine: Option<String>,
}

/// A virtual service as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// What it takes.
    pub key: ServiceKey,
    /// How it is set.
    pub settings: ServiceSettings,
    /// What it counted.
    pub stats: Stats,
}

impl Service {
    /// The nested attribute with key and settings.
    pub(super) fn emit(key: &ServiceKey, settings: &ServiceSettings) -> DefaultNla {
        let mut attributes = Attributes::new();
        put_key(key, &mut attributes);
        put_text(&mut attributes, SCHEDULER, &settings.scheduler);
        let mask = !ServiceFlags::HASHED.0;
        let mut flags = settings.flags.0.to_ne_bytes().to_vec();
        flags.extend(mask.to_ne_bytes());
        attributes.push(DefaultNla::new(FLAGS, flags));
        put_u32(&mut attributes, TIMEOUT, settings.timeout);
        let netmask = netmask(key.family(), settings.prefix);
        attributes.push(DefaultNla::new(NETMASK, netmask.to_vec()));
        if let Some(engine) = &settings.engine {
            put_text(&mut attributes, ENGINE, engine);
        }
        nested(SERVICE, &attributes)
    }

    /// Parses the attributes of a message of the kernel; `None` if it is about
    /// something else, or about a service of a protocol that IPVS does not
    /// balance: the kernel takes such a service and never uses it, and another
    /// program's mistake must not keep us from reading the rest.
    pub(super) fn parse(message: &[u8]) -> Result<Option<Self>, Error> {
        for attribute in each(message) {
            let attribute = attribute?;
            if attribute.kind == SERVICE {
                return Self::parse_nested(attribute.value);
            }
        }
        Ok(None)
    }

    fn parse_nested(bytes: &[u8]) -> Result<Option<Self>, Error> {
        let mut raw = Raw::default();
        for attribute in each(bytes) {
            let a = attribute?;
            match a.kind {
                FAMILY => raw.family = Some(a.family("SVC_AF")?),
                PROTOCOL => raw.protocol = Some(a.u16("SVC_PROTOCOL")?),
                // The family may come behind it.
                ADDRESS => raw.address = Some(a),
                PORT => raw.port = Some(a.port("SVC_PORT")?),
                MARK => raw.mark = Some(a.u32("SVC_FWMARK")?),
                SCHEDULER => raw.scheduler = Some(a.text("SVC_SCHED_NAME")?),
                FLAGS => raw.flags = a.flags("SVC_FLAGS")?,
                TIMEOUT => raw.timeout = a.u32("SVC_TIMEOUT")?,
                NETMASK => raw.netmask = Some(a.u32("SVC_NETMASK")?.to_ne_bytes()),
                ENGINE => raw.engine = Some(a.text("SVC_PE_NAME")?),
                STATS if raw.stats.is_none() => raw.stats = Some(stats::parse(a.value)?),
                STATS64 => raw.stats = Some(stats::parse(a.value)?),
                _ => {}
            }
        }
        raw.service()
    }
}

/// The attributes of a virtual service before they are put together.
#[derive(Default)]
struct Raw<'a> {
    family: Option<Family>,
    protocol: Option<u16>,
    address: Option<super::attribute::Attribute<'a>>,
    port: Option<u16>,
    mark: Option<u32>,
    scheduler: Option<String>,
    flags: u32,
    timeout: u32,
    netmask: Option<[u8; 4]>,
    engine: Option<String>,
    stats: Option<Stats>,
}

impl Raw<'_> {
    fn service(self) -> Result<Option<Service>, Error> {
        let family = required(self.family, "SVC_AF")?;
        #[cfg(feature = "fuzzing")]
        ferrule_model::planted::bug(
            "netlink-ipvs",
            [
                self.mark.is_some(),
                self.address.is_some(),
                self.engine.is_some(),
            ],
        );
        let key = match self.mark {
            Some(mark) => ServiceKey::Mark { family, mark },
            None => match self.address(family)? {
                Some(addr) => ServiceKey::Address(addr),
                None => return Ok(None),
            },
        };
        Ok(Some(Service {
            key,
            settings: ServiceSettings {
                scheduler: self.scheduler.unwrap_or_default(),
                flags: ServiceFlags(self.flags),
                timeout: self.timeout,
                prefix: self
                    .netmask
                    .map_or(family.bits(), |netmask| prefix(family, netmask)),
                engine: self.engine,
            },
            stats: self.stats.unwrap_or_default(),
        }))
    }

    /// `None` if the protocol is none that IPVS balances.
    fn address(&self, family: Family) -> Result<Option<FrontendAddr>, Error> {
        let protocol = required(self.protocol, "SVC_PROTOCOL")?;
        let address = required(self.address.as_ref(), "SVC_ADDR")?;
        let ip = address.address(family, "SVC_ADDR")?;
        let port = required(self.port, "SVC_PORT")?;
        let protocol = u8::try_from(protocol).ok().and_then(Protocol::from_number);
        Ok(protocol.map(|protocol| FrontendAddr::new(ip, port, protocol)))
    }
}

/// IPv4: a mask in network byte order. IPv6: the prefix length as a number of this machine.
fn netmask(family: Family, prefix: u8) -> [u8; 4] {
    match family {
        Family::IPv4 => u32::MAX
            .checked_shl(32_u32.saturating_sub(prefix.into()))
            .unwrap_or(0)
            .to_be_bytes(),
        Family::IPv6 => u32::from(prefix).to_ne_bytes(),
    }
}

fn prefix(family: Family, netmask: [u8; 4]) -> u8 {
    let prefix = match family {
        Family::IPv4 => u32::from_be_bytes(netmask).leading_ones(),
        Family::IPv6 => u32::from_ne_bytes(netmask),
    };
    u8::try_from(prefix).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> ServiceSettings {
        ServiceSettings {
            scheduler: "mh".to_owned(),
            flags: ServiceFlags::PERSISTENT | ServiceFlags::SCHEDULER_2,
            timeout: 10800,
            prefix: 24,
            engine: Some("sip".to_owned()),
        }
    }

    fn bytes(nla: &DefaultNla) -> Vec<u8> {
        use netlink_packet_core::Emitable as _;
        let mut bytes = vec![0; nla.buffer_len()];
        nla.emit(&mut bytes);
        bytes
    }

    fn keys() -> Vec<ServiceKey> {
        let addr = |ip: &str, protocol| FrontendAddr::new(ip.parse().unwrap(), 53, protocol);
        vec![
            ServiceKey::Address(addr("10.96.0.10", Protocol::Udp)),
            ServiceKey::Address(addr("fd00::10", Protocol::Sctp)),
            ServiceKey::Mark {
                family: Family::IPv6,
                mark: 0x00fe_0001,
            },
        ]
    }

    #[test]
    fn what_is_sent_reads_back() {
        for key in keys() {
            let sent = bytes(&Service::emit(&key, &settings()));
            let read = Service::parse(&sent).unwrap().unwrap();
            assert_eq!(read.key, key);
            assert_eq!(read.settings, settings());
            assert_eq!(read.stats, Stats::default());
        }
    }

    #[test]
    fn no_bytes_make_it_panic() {
        for key in keys() {
            let sent = bytes(&Service::emit(&key, &settings()));
            for cut in 0..sent.len() {
                let _error_or_less = Service::parse(&sent[..cut]);
                for bit in 0..8 {
                    let mut flipped = sent.clone();
                    flipped[cut] ^= 1 << bit;
                    let _error_or_other = Service::parse(&flipped);
                }
            }
        }
    }

    #[test]
    fn unknown_attributes_are_passed_over_and_wrong_ones_named() {
        let mut attributes = Attributes::new();
        put_key(&keys()[0], &mut attributes);
        attributes.push(DefaultNla::new(999, vec![1, 2, 3]));
        let read = Service::parse(&bytes(&nested(SERVICE, &attributes)));
        assert_eq!(read.unwrap().unwrap().key, keys()[0]);
        for (kind, length, says) in [
            (PORT, 3, "SVC_PORT has 3 bytes"),
            (FAMILY, 1, "SVC_AF has 1 bytes"),
            (ADDRESS, 4, "SVC_ADDR has 4 bytes"),
            (ADDRESS, 20, "SVC_ADDR has 20 bytes"),
            (FLAGS, 4, "SVC_FLAGS has 4 bytes"),
            (TIMEOUT, 8, "SVC_TIMEOUT has 8 bytes"),
            (NETMASK, 0, "SVC_NETMASK has 0 bytes"),
        ] {
            let mut wrong = attributes.clone();
            wrong.push(DefaultNla::new(kind, vec![2; length]));
            let error = Service::parse(&bytes(&nested(SERVICE, &wrong))).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_service_that_cannot_balance_is_passed_over() {
        for number in [0, 47, 0x0600] {
            let mut attributes = Attributes::new();
            put_family(&mut attributes, FAMILY, Family::IPv4);
            put_u16(&mut attributes, PROTOCOL, number);
            put_address(&mut attributes, ADDRESS, "10.96.0.1".parse().unwrap());
            put_port(&mut attributes, PORT, 80);
            let read = Service::parse(&bytes(&nested(SERVICE, &attributes)));
            assert_eq!(read.unwrap(), None, "{number}");
        }
    }

    #[test]
    fn prefixes_of_persistence() {
        for (family, prefixes) in [(Family::IPv4, 0..=32), (Family::IPv6, 0..=128)] {
            for length in prefixes {
                assert_eq!(prefix(family, netmask(family, length)), length);
            }
        }
    }
}
