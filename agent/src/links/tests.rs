//! What cannot be decoded is never taken for absent.

use netlink_packet_route::link::LinkFlags;

use super::*;

/// A message of the kernel about a veth.
fn veth(name: &str) -> RawMessage {
    let mut link = LinkMessage::default();
    link.header.index = 7;
    link.header.flags = LinkFlags::Up;
    link.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
    ];
    route::encode(RouteNetlinkMessage::NewLink(link))
}

/// The same with an MTU of one byte behind it.
fn broken(mut message: RawMessage) -> RawMessage {
    let mut attribute = 5_u16.to_ne_bytes().to_vec();
    attribute.extend(4_u16.to_ne_bytes());
    attribute.extend([1, 0, 0, 0]);
    message.body.extend(attribute);
    message
}

#[test]
fn an_interface_that_cannot_be_decoded_is_not_absent() {
    let whole = sorted(&[veth("feraaa")]);
    assert_eq!((whole.ends.len(), whole.unclear.len()), (1, 0));
    for name in ["feraaa", "febaaa"] {
        let seen = sorted(&[broken(veth(name)), veth("ferbbb")]);
        assert_eq!(seen.ends.len(), 1, "{seen:?}");
        assert_eq!(seen.unclear.len(), 1, "{seen:?}");
        assert!(seen.unclear[0].contains(name), "{seen:?}");
    }
    // Of another's it is nobody's concern what it says.
    assert_eq!(sorted(&[broken(veth("eth0"))]), Seen::default());
    // One without a name may be anybody's.
    let mut cut_off = veth("feraaa");
    cut_off.body.truncate(18);
    let mut headless = veth("feraaa");
    headless.body.truncate(3);
    for nameless in [cut_off, headless] {
        assert_eq!(sorted(&[nameless]).unclear.len(), 1);
    }
}

#[test]
fn a_route_that_cannot_be_decoded_is_not_absent() {
    let ip: IpAddr = "10.1.0.2".parse().unwrap();
    let of = |protocol| {
        let message = route::out_of(7, (ip, 32), None, RouteProtocol::Other(protocol));
        route::encode(RouteNetlinkMessage::NewRoute(message))
    };
    assert_eq!(way_to_pod(&of(ROUTE_PROTOCOL)), Ok(Some((7, ip))));
    assert_eq!(way_to_pod(&of(200)), Ok(None));
    // RTA_OIF (4) of one byte.
    assert!(way_to_pod(&broken(of(ROUTE_PROTOCOL))).is_err());
    assert_eq!(way_to_pod(&broken(of(200))), Ok(None), "another's");
}
