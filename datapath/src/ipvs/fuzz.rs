//! A way in for the fuzz targets (`fuzz/`): an IPVS that answers anything.

#![expect(clippy::expect_used, reason = "what panics here is a finding")]

use ferrule_model::address::Family;
use netlink_packet_core::{DefaultNla, Emitable as _};

use super::{Info, RealServer, Service, Timeouts};

fn bytes(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}

/// A virtual service; what is read of one, written and read again is the same.
///
/// # Panics
/// Where something is wrong with the codec.
pub fn service(message: &[u8]) {
    let Ok(Some(service)) = Service::parse(message) else {
        return;
    };
    let again = bytes(&[Service::emit(&service.key, &service.settings)]);
    let again = Service::parse(&again).expect("what was written");
    let again = again.expect("a service");
    assert_eq!((again.key, again.settings), (service.key, service.settings));
}

/// A real server; likewise.
///
/// # Panics
/// Where something is wrong with the codec.
pub fn server(message: &[u8], family: Family) {
    let Ok(Some(server)) = RealServer::parse(message, family) else {
        return;
    };
    let again = bytes(&[RealServer::emit(&server.addr, &server.settings)]);
    let again = RealServer::parse(&again, family).expect("what was written");
    let again = again.expect("a server");
    assert_eq!(again.addr, server.addr);
    if server.settings.forward == super::ForwardMethod::Tunnel {
        assert_eq!(again.settings, server.settings);
    }
}

/// Time-outs and facts about the table.
///
/// # Panics
/// Where something is wrong with the codec.
pub fn facts(message: &[u8]) {
    let _info = Info::parse(message);
    if let Ok(timeouts) = Timeouts::parse(message) {
        let again = Timeouts::parse(&bytes(&timeouts.emit())).expect("what was written");
        assert_eq!(again, timeouts);
    }
}
