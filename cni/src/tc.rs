//! The messages that make the kernel shape a pod's traffic, and what they are
//! like when the kernel tells them.
//!
//! Nothing here talks to the kernel. Towards the pod a token bucket filter
//! (tbf) stands on the host's end of the veth. What comes from the pod can be
//! queued only where it leaves a device, so it takes a detour: at the ingress
//! of the host's end a filter redirects everything to an ifb device, whose tbf
//! hands it back to where it came from. Both are out of the pod's reach, which
//! a qdisc on its own end would not be.

use netlink_packet_core::{DefaultNla, Nla as _, NlasIterator};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
    TcActionOption, TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage,
    TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use crate::bandwidth::Limit;

/// The kinds, which are also what the kernel calls the modules.
pub(crate) const TBF: &str = "tbf";
pub(crate) const INGRESS: &str = "ingress";

/// How long a packet may wait for tokens before packets are dropped instead:
/// what the reference plugin allows. In parts of a second.
const LATENCY_PER_SECOND: u64 = 40;

/// `TCA_TBF_*` of `linux/pkt_sched.h`.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;

/// `struct tc_ratespec` and `struct tc_tbf_qopt` of the same file: two rates,
/// then limit, buffer and mtu.
const RATE_SPEC: usize = 12;
const TBF_PARAMETERS: usize = 2 * RATE_SPEC + 3 * 4;

/// `TC_LINKLAYER_ETHERNET`: the kernel reckons itself and wants no table of rates.
const LINK_LAYER_ETHERNET: u8 = 1;

/// `ETH_P_ALL`: IPv4, IPv6, ARP, whatever a pod sends.
const EVERY_PROTOCOL: u16 = 3;

/// The ingress qdisc, whose handle is as fixed as its place.
const INGRESS_HANDLE: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0,
};

/// The device's own qdisc.
const ROOT_HANDLE: TcHandle = TcHandle { major: 1, minor: 0 };

fn message(index: u32) -> TcMessage {
    // The kernel's indices are positive ints; the header's type is an accident.
    TcMessage::with_index(i32::try_from(index).unwrap_or(i32::MAX))
}

/// Puts a tbf at the root of a device.
pub(crate) fn add_tbf(index: u32, limit: Limit) -> RouteNetlinkMessage {
    let options = [
        DefaultNla::new(TCA_TBF_PARMS, parameters(limit)),
        // The rate as such: in the parameters there is room for 34 Gbit/s.
        DefaultNla::new(TCA_TBF_RATE64, limit.rate.to_ne_bytes().to_vec()),
        // In bytes: the buffer in the parameters is a time, and ends at 4 s.
        DefaultNla::new(TCA_TBF_BURST, limit.burst.to_ne_bytes().to_vec()),
    ];
    let mut message = message(index);
    message.header.parent = TcHandle::ROOT;
    message.header.handle = ROOT_HANDLE;
    message.attributes = vec![
        TcAttribute::Kind(TBF.to_owned()),
        TcAttribute::Options(options.map(TcOption::Other).to_vec()),
    ];
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// `struct tc_tbf_qopt` without a peak rate.
fn parameters(limit: Limit) -> Vec<u8> {
    let rate = u32::try_from(limit.rate).unwrap_or(u32::MAX);
    let queue = (limit.rate / LATENCY_PER_SECOND).saturating_add(limit.burst.into());
    let queue = u32::try_from(queue).unwrap_or(u32::MAX);
    let mut bytes = vec![0; TBF_PARAMETERS];
    bytes[1] = LINK_LAYER_ETHERNET;
    bytes[8..RATE_SPEC].copy_from_slice(&rate.to_ne_bytes());
    bytes[2 * RATE_SPEC..2 * RATE_SPEC + 4].copy_from_slice(&queue.to_ne_bytes());
    bytes
}

/// Gives a device a place for filters of what it receives.
pub(crate) fn add_ingress(index: u32) -> RouteNetlinkMessage {
    let mut message = message(index);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS_HANDLE;
    message.attributes = vec![TcAttribute::Kind(INGRESS.to_owned())];
    RouteNetlinkMessage::NewQueueDiscipline(message)
}

/// Redirects all that the device `from` receives to the device `to`. u32 is the
/// classifier that kernels have in the first place, and matches all as well as any.
pub(crate) fn add_redirect(from: u32, to: u32) -> RouteNetlinkMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    // No bit of the first word is looked at.
    selector.keys = vec![TcU32Key::default()];
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    let mut message = filter(from);
    message.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Action(vec![action])),
            TcOption::U32(TcFilterU32Option::Selector(selector)),
        ]),
    ];
    RouteNetlinkMessage::NewTrafficFilter(message)
}

/// A filter of priority 1 at the ingress of a device.
fn filter(index: u32) -> TcMessage {
    let mut message = message(index);
    message.header.parent = INGRESS_HANDLE;
    // The protocol is in network order.
    message.header.info = (1 << 16) | u32::from(EVERY_PROTOCOL.to_be());
    message
}

/// Asks for the qdisc at the root of a device.
pub(crate) fn get_root(index: u32) -> RouteNetlinkMessage {
    let mut message = message(index);
    message.header.parent = TcHandle::ROOT;
    RouteNetlinkMessage::GetQueueDiscipline(message)
}

/// Asks for the filters at the ingress of a device; a dump.
pub(crate) fn get_filters(index: u32) -> RouteNetlinkMessage {
    RouteNetlinkMessage::GetTrafficFilter(filter(index))
}

/// The rate of a qdisc, in bytes a second, if it is a tbf.
pub(crate) fn tbf_rate(qdisc: &TcMessage) -> Option<u64> {
    let is_tbf =
        |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == TBF);
    if !qdisc.attributes.iter().any(is_tbf) {
        return None;
    }
    let options = qdisc
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        })?;
    // The decoder knows no tbf and keeps TCA_OPTIONS in one piece.
    let mut rate = None;
    for option in options {
        let TcOption::Other(all) = option else {
            continue;
        };
        let mut bytes = vec![0; all.value_len()];
        all.emit_value(&mut bytes);
        for option in NlasIterator::new(&bytes).flatten() {
            let value = option.value();
            match option.kind() {
                TCA_TBF_PARMS => {
                    let word = value.get(8..RATE_SPEC)?.try_into().ok()?;
                    rate = rate.or(Some(u64::from(u32::from_ne_bytes(word))));
                }
                // The kernel tells it only where the other has no room.
                TCA_TBF_RATE64 => rate = Some(u64::from_ne_bytes(value.try_into().ok()?)),
                _ => {}
            }
        }
    }
    rate
}

/// The device that a filter redirects to, if it does.
pub(crate) fn redirects_to(filter: &TcMessage) -> Option<u32> {
    let options = filter
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
    let actions = options.flatten().filter_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))
            if mirror.eaction == TcMirrorActionType::EgressRedir =>
        {
            Some(mirror.ifindex)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use ferrule_netlink::{RawMessage, route};

    use super::*;

    /// Bytes as hexadecimal digits, in words for people.
    fn bytes(message: RouteNetlinkMessage) -> String {
        let RawMessage { body, .. } = route::encode(message);
        let words = body.chunks(4).map(|word| {
            let word = word.try_into().unwrap();
            format!("{:08x}", u32::from_be_bytes(word))
        });
        words.collect::<Vec<String>>().join(" ")
    }

    fn qdisc(message: RouteNetlinkMessage) -> TcMessage {
        match route::decode(&route::encode(message)).unwrap() {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc) => qdisc,
            other => panic!("{other:?}"),
        }
    }

    const LIMIT: Limit = Limit {
        rate: 1_000_000,
        burst: 200_000,
    };

    /// `tc qdisc add dev v root handle 1: tbf rate 8mbit burst 200000 latency
    /// 25ms` sends the same, but for a table of rates (and the two fields about
    /// it) and the burst as a time besides. Those are for kernels before 3.14.
    #[test]
    fn a_tbf_is_what_tc_makes_it() {
        assert_eq!(
            bytes(add_tbf(7, LIMIT)),
            "00000000 07000000 00000100 ffffffff 00000000 \
             08000100 74626600 40000200 \
             28000100 00010000 00000000 40420f00 00000000 00000000 00000000 \
             e86e0300 00000000 00000000 \
             0c000400 40420f00 00000000 08000600 400d0300"
        );
    }

    /// `tc qdisc add dev v handle ffff: ingress`, to the byte.
    #[test]
    fn an_ingress_is_what_tc_makes_it() {
        assert_eq!(
            bytes(add_ingress(3)),
            "00000000 03000000 0000ffff f1ffffff 00000000 0c000100 696e6772 65737300"
        );
    }

    /// `tc filter add dev v parent ffff: protocol all prio 1 u32 match u32 0 0
    /// action mirred egress redirect dev b`, to the byte.
    #[test]
    fn a_redirection_is_what_tc_makes_it() {
        assert_eq!(
            bytes(add_redirect(3, 4)),
            "00000000 03000000 00000000 0000ffff 00030100 \
             08000100 75333200 60000200 38000700 34000100 0b000100 6d697272 65640000 \
             24000280 20000200 00000000 00000000 04000000 00000000 00000000 01000000 04000000 \
             24000500 01000100 00000000 00000000 00000000 00000000 00000000 00000000 00000000"
        );
    }

    #[test]
    fn rates_read_back_and_have_room() {
        assert_eq!(tbf_rate(&qdisc(add_tbf(7, LIMIT))), Some(1_000_000));
        let fast = Limit {
            rate: u64::MAX / 8,
            burst: u32::MAX,
        };
        assert_eq!(tbf_rate(&qdisc(add_tbf(7, fast))), Some(u64::MAX / 8));
        // All bits set where there is no room: the queue, and the old field of the rate.
        let parameters = parameters(fast);
        assert_eq!(parameters[8..12], [0xff; 4]);
        assert_eq!(parameters[24..28], [0xff; 4]);
        assert_eq!(tbf_rate(&qdisc(add_ingress(7))), None);
    }

    #[test]
    fn redirections_are_recognised() {
        let filter = match route::decode(&route::encode(add_redirect(3, 4))).unwrap() {
            RouteNetlinkMessage::NewTrafficFilter(filter) => filter,
            other => panic!("{other:?}"),
        };
        assert_eq!(redirects_to(&filter), Some(4));
        assert_eq!(redirects_to(&TcMessage::with_index(3)), None);
    }
}
