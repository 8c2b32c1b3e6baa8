//! Entries of connection tracking: those that keep a flow at a backend that is gone, and
//! those that tell whether one that leaves is still talked to.
//!
//! IPVS forgets the connection to a removed real server at its next packet, and drops that
//! packet where connection tracking knows it: a client of UDP that keeps its port loses a
//! datagram. Without the entry that packet already goes to another backend.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};
use ferrule_netlink::{Error, Protocol as Netlink, RawMessage, Socket};
use netlink_packet_core::{DefaultNla, Emitable as _, NlasIterator};

/// `NFNL_SUBSYS_CTNETLINK << 8`, `IPCTNL_MSG_CT_*`.
const CONNTRACK: u16 = 1 << 8;
const GET: u16 = CONNTRACK | 1;
const DELETE: u16 = CONNTRACK | 2;

/// Length of `struct nfgenmsg`.
const HEADER: usize = 4;

/// `CTA_*` of `linux/netfilter/nfnetlink_conntrack.h`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_STATE: u16 = 4;
const ID: u16 = 12;
const ZONE: u16 = 18;
const FILTER: u16 = 25;
/// `CTA_TUPLE_*`.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
/// `CTA_IP_*`.
const V4_SOURCE: u16 = 1;
const V4_DESTINATION: u16 = 2;
const V6_SOURCE: u16 = 3;
const V6_DESTINATION: u16 = 4;
/// `CTA_PROTO_*`.
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE: u16 = 2;
const PROTO_DESTINATION: u16 = 3;
/// `CTA_PROTOINFO_TCP`, `CTA_PROTOINFO_TCP_STATE`.
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_LAST_ACK`, `TIME_WAIT`, `CLOSE`: neither side will say anything more.
const ENDED: [u8; 3] = [6, 7, 8];
/// `CTA_FILTER_ORIG_FLAGS`, and its flags: of the source's and the destination's address, of
/// the protocol's number, of the source's and the destination's port.
const FILTER_ORIGINAL: u16 = 1;
const BY_SOURCE: u32 = 1;
const BY_DESTINATION: u32 = 1 << 1;
const BY_PROTOCOL: u32 = 1 << 3;
const BY_SOURCE_PORT: u32 = 1 << 4;
const BY_DESTINATION_PORT: u32 = 1 << 5;
/// `IPS_SEEN_REPLY`.
const ANSWERED: u32 = 1 << 1;

/// `NLA_F_NESTED`, and what of a kind is no flag.
const NESTED: u16 = 1 << 15;
const KIND: u16 = 0x3fff;

/// `AF_INET`, `AF_INET6`.
const INET: u8 = 2;
const INET6: u8 = 10;

/// The table of one network namespace.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
}

impl Conntrack {
    /// Opens a socket to the connection tracking of the calling thread's network namespace.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::open(Netlink::Netfilter)?;
        Ok(Self { socket })
    }

    /// Forgets the connections to these frontends that were led to these backends, and
    /// returns how many there were. The kernel looks through its table once for each
    /// frontend, and returns what is about it.
    ///
    /// # Errors
    /// [`Error`]; what comes behind it was not looked at.
    pub async fn forget(
        &self,
        gone: &BTreeSet<(FrontendAddr, BackendAddr)>,
    ) -> Result<usize, Error> {
        let mut by_frontend: BTreeMap<FrontendAddr, BTreeSet<BackendAddr>> = BTreeMap::new();
        for (frontend, backend) in gone {
            by_frontend.entry(*frontend).or_default().insert(*backend);
        }
        let mut forgotten = 0;
        for (frontend, backends) in by_frontend {
            let mut orders = Vec::new();
            for answer in self.socket.dump(question(&frontend)).await? {
                if let Some(entry) = Entry::read(&answer.body)
                    && entry.destination == frontend_key(&frontend)
                    && entry
                        .backend
                        .is_some_and(|backend| backends.contains(&backend))
                {
                    orders.push((RawMessage::new(DELETE, entry.order(family(&frontend))), 0));
                }
            }
            forgotten += self.remove(orders).await?;
        }
        Ok(forgotten)
    }
}

type Key = (IpAddr, u8, u16);

impl Conntrack {
    /// Forgets what a backend sent from its port and nobody answered, and returns how many there
    /// were. An answer that was on its way when its flow was forgotten stands as a flow of its own
    /// for half a minute (`nf_conntrack_udp_timeout`): a flow of the same client that comes back
    /// to this backend has the same addresses in its answers, and the kernel drops each of its
    /// packets for that.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn forget_strays(
        &self,
        protocol: Protocol,
        backend: &BackendAddr,
    ) -> Result<usize, Error> {
        let key = (backend.ip, protocol.number(), backend.port);
        let mut orders = Vec::new();
        for answer in self.socket.dump(question_of(key)).await? {
            if let Some(entry) = Entry::read(&answer.body)
                && entry.source == Some(key)
                && entry.status.is_some_and(|status| status & ANSWERED == 0)
            {
                let order = entry.order(family_of(backend.ip));
                orders.push((RawMessage::new(DELETE, order), 0));
            }
        }
        self.remove(orders).await
    }

    /// Carries out removals, and returns how many entries were there still.
    async fn remove(&self, orders: Vec<(RawMessage, u16)>) -> Result<usize, Error> {
        let mut removed = 0;
        for result in self.socket.batch(orders).await {
            match result {
                Ok(()) => removed += 1,
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Backends with connections of TCP to a frontend that have not ended in both directions.
    /// IPVS counts the half closed ones with those that have ended.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open_to(&self, frontend: &FrontendAddr) -> Result<BTreeSet<BackendAddr>, Error> {
        let answers = self.socket.dump(question(frontend)).await?;
        let entries = answers
            .iter()
            .filter_map(|answer| Entry::read(&answer.body));
        let open = entries.filter(|entry| {
            let ended = entry.state.is_some_and(|state| ENDED.contains(&state));
            entry.destination == frontend_key(frontend) && !ended
        });
        Ok(open.filter_map(|entry| entry.backend).collect())
    }
}

fn frontend_key(frontend: &FrontendAddr) -> Key {
    (frontend.ip, frontend.protocol.number(), frontend.port)
}

fn family(frontend: &FrontendAddr) -> u8 {
    family_of(frontend.ip)
}

fn family_of(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { INET } else { INET6 }
}

/// Everything whose original source is this.
fn question_of((ip, number, port): Key) -> RawMessage {
    let source = match ip {
        IpAddr::V4(ip) => DefaultNla::new(V4_SOURCE, ip.octets().to_vec()),
        IpAddr::V6(ip) => DefaultNla::new(V6_SOURCE, ip.octets().to_vec()),
    };
    let number = DefaultNla::new(PROTO_NUMBER, vec![number]);
    let port = DefaultNla::new(PROTO_SOURCE, port.to_be_bytes().to_vec());
    let tuple = [
        nested(TUPLE_IP, &[source]),
        nested(TUPLE_PROTO, &[number, port]),
    ];
    let flags = filter(ip, BY_SOURCE, BY_PROTOCOL | BY_SOURCE_PORT);
    let attributes = [nested(ORIGINAL, &tuple), nested(FILTER, &[flags])];
    RawMessage::new(GET, body(family_of(ip), &attributes))
}

/// Everything whose original destination is the frontend.
fn question(frontend: &FrontendAddr) -> RawMessage {
    let ip = match frontend.ip {
        IpAddr::V4(ip) => DefaultNla::new(V4_DESTINATION, ip.octets().to_vec()),
        IpAddr::V6(ip) => DefaultNla::new(V6_DESTINATION, ip.octets().to_vec()),
    };
    let number = DefaultNla::new(PROTO_NUMBER, vec![frontend.protocol.number()]);
    let port = DefaultNla::new(PROTO_DESTINATION, frontend.port.to_be_bytes().to_vec());
    let tuple = [
        nested(TUPLE_IP, &[ip]),
        nested(TUPLE_PROTO, &[number, port]),
    ];
    let flags = filter(
        frontend.ip,
        BY_DESTINATION,
        BY_PROTOCOL | BY_DESTINATION_PORT,
    );
    let attributes = [nested(ORIGINAL, &tuple), nested(FILTER, &[flags])];
    RawMessage::new(GET, body(family(frontend), &attributes))
}

/// Which parts of the tuple count. Older kernels return all entries but those of an address of
/// IPv6 (seen with 6.1): there more than what is asked for is returned, which is looked through
/// anyway.
fn filter(ip: IpAddr, by_address: u32, by_ports: u32) -> DefaultNla {
    let flags = match ip {
        IpAddr::V4(_) => by_address | by_ports,
        IpAddr::V6(_) => by_ports,
    };
    DefaultNla::new(FILTER_ORIGINAL, flags.to_ne_bytes().to_vec())
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; inner.buffer_len()];
    inner.emit(&mut value);
    DefaultNla::new(kind | NESTED, value)
}

fn body(family: u8, attributes: &[DefaultNla]) -> Vec<u8> {
    let mut body = vec![0; HEADER + attributes.buffer_len()];
    body[0] = family;
    attributes.emit(&mut body[HEADER..]);
    body
}

/// What of an entry matters.
struct Entry {
    destination: Key,
    source: Option<Key>,
    /// `enum ip_conntrack_status`.
    status: Option<u32>,
    /// Where answers come from: the backend, as IPVS has written it.
    backend: Option<BackendAddr>,
    /// `enum tcp_conntrack`.
    state: Option<u8>,
    /// The attributes by which it is told from every other.
    names: Vec<(u16, Vec<u8>)>,
}

impl Entry {
    /// `None` for what is no connection between ports.
    fn read(message: &[u8]) -> Option<Self> {
        let (mut destination, mut backend, mut state) = (None, None, None);
        let (mut source, mut status, mut names) = (None, None, Vec::new());
        for (kind, value) in attributes(message.get(HEADER..)?) {
            match kind {
                ORIGINAL => {
                    destination = tuple(&value, V4_DESTINATION, V6_DESTINATION, PROTO_DESTINATION);
                    source = tuple(&value, V4_SOURCE, V6_SOURCE, PROTO_SOURCE);
                }
                REPLY => {
                    let key = tuple(&value, V4_SOURCE, V6_SOURCE, PROTO_SOURCE);
                    backend = key.map(|(ip, _, port)| BackendAddr::new(ip, port));
                }
                STATUS => status = <[u8; 4]>::try_from(&*value).ok().map(u32::from_be_bytes),
                PROTOCOL_STATE => state = tcp_state(&value),
                _ => {}
            }
            match kind {
                ORIGINAL => names.push((kind | NESTED, value)),
                ID | ZONE => names.push((kind, value)),
                _ => {}
            }
        }
        Some(Self {
            destination: destination?,
            source,
            status,
            backend,
            state,
            names,
        })
    }

    fn order(self, family: u8) -> Vec<u8> {
        let names = self.names.into_iter();
        let names: Vec<_> = names
            .map(|(kind, value)| DefaultNla::new(kind, value))
            .collect();
        body(family, &names)
    }
}

/// Address, protocol and port of one side of a tuple.
fn tuple(value: &[u8], v4: u16, v6: u16, port: u16) -> Option<Key> {
    let (mut ip, mut number, mut at) = (None, None, None);
    for (kind, value) in attributes(value) {
        for (inner, value) in attributes(&value) {
            match kind {
                TUPLE_IP if inner == v4 => {
                    ip = <[u8; 4]>::try_from(value).ok().map(IpAddr::from);
                }
                TUPLE_IP if inner == v6 => {
                    ip = <[u8; 16]>::try_from(value).ok().map(IpAddr::from);
                }
                TUPLE_PROTO if inner == PROTO_NUMBER => number = value.first().copied(),
                TUPLE_PROTO if inner == port => {
                    at = <[u8; 2]>::try_from(value).ok().map(u16::from_be_bytes);
                }
                _ => {}
            }
        }
    }
    Some((ip?, number?, at?))
}

fn tcp_state(value: &[u8]) -> Option<u8> {
    let tcp = attributes(value)
        .into_iter()
        .find(|(kind, _)| *kind == TCP)?;
    let state = attributes(&tcp.1).into_iter();
    state
        .filter(|(kind, _)| *kind == TCP_STATE)
        .find_map(|(_, value)| value.first().copied())
}

/// The attributes as far as they can be read.
fn attributes(bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let attributes = NlasIterator::new(bytes).map_while(Result::ok);
    attributes
        .map(|attribute| (attribute.kind() & KIND, attribute.value().to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(frontend: &FrontendAddr, backend: BackendAddr) -> Vec<u8> {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let port = |kind, port: u16| DefaultNla::new(kind, port.to_be_bytes().to_vec());
        let number = || DefaultNla::new(PROTO_NUMBER, vec![frontend.protocol.number()]);
        let (source, destination) = if frontend.ip.is_ipv4() {
            (V4_SOURCE, V4_DESTINATION)
        } else {
            (V6_SOURCE, V6_DESTINATION)
        };
        let original = [
            nested(
                TUPLE_IP,
                &[DefaultNla::new(destination, octets(frontend.ip))],
            ),
            nested(
                TUPLE_PROTO,
                &[number(), port(PROTO_DESTINATION, frontend.port)],
            ),
        ];
        let reply = [
            nested(TUPLE_IP, &[DefaultNla::new(source, octets(backend.ip))]),
            nested(TUPLE_PROTO, &[number(), port(PROTO_SOURCE, backend.port)]),
        ];
        let attributes = [
            nested(ORIGINAL, &original),
            nested(REPLY, &reply),
            DefaultNla::new(ID, vec![1, 2, 3, 4]),
            nested(
                PROTOCOL_STATE,
                &[nested(TCP, &[DefaultNla::new(TCP_STATE, vec![7])])],
            ),
        ];
        body(family(frontend), &attributes)
    }

    #[test]
    fn an_entry_tells_what_was_called_and_who_answers() {
        for (ip, backend) in [("10.96.0.10", "10.244.1.11"), ("fd00:96::a", "fd00:244::b")] {
            let frontend = FrontendAddr::new(ip.parse().unwrap(), 53, Protocol::Udp);
            let backend = BackendAddr::new(backend.parse().unwrap(), 5353);
            let read = Entry::read(&entry(&frontend, backend)).unwrap();
            assert_eq!(read.destination, frontend_key(&frontend));
            assert_eq!(read.backend, Some(backend));
            assert_eq!(read.state, Some(7));
            let kinds: Vec<u16> = read.names.iter().map(|(kind, _)| *kind).collect();
            assert_eq!(kinds, [ORIGINAL | NESTED, ID]);
        }
    }

    #[test]
    fn what_is_cut_off_is_no_entry() {
        let frontend = FrontendAddr::new("10.96.0.10".parse().unwrap(), 53, Protocol::Udp);
        let backend = BackendAddr::new("10.244.1.11".parse().unwrap(), 5353);
        let whole = entry(&frontend, backend);
        for end in 0..40 {
            assert!(Entry::read(&whole[..end]).is_none(), "{end}");
        }
    }
}
