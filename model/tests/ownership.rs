//! What is provably ours: tables of names, numbers and proofs.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

use ferrule_model::address::{Family, FrontendAddr, Protocol};
use ferrule_model::names::{Attachment, ContainerId, IfName, NetworkName};
use ferrule_model::observed::Observed;
use ferrule_model::ownership::{
    Proofs, device_alias, host_veth_mac, host_veth_name, is_alias, owns_node_route,
    owns_virtual_service, pod_veth_mac, read_alias, resembles_host_veth, shaper_mac, shaper_name,
};
use ferrule_model::service::ServiceKey;

fn attachment(container: &str) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(container.to_owned()).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

/// A DEL of a newer version must find the devices that an older one made. What is
/// expected was computed by another program.
#[test]
fn names_and_addresses_are_the_same_for_ever() {
    let a = attachment("abc");
    assert_eq!(host_veth_name(&a).as_str(), "ferhk7thubfn6br");
    assert_eq!(shaper_name(&a).as_str(), "febhk7thubfn6br");
    let mac = |bytes: [u8; 6]| bytes.map(|byte| format!("{byte:02x}")).join(":");
    assert_eq!(mac(host_veth_mac(&a)), "3a:f4:44:ca:d9:e4");
    assert_eq!(mac(pod_veth_mac(&a)), "3a:f4:44:ca:d9:e5");
    assert_eq!(mac(shaper_mac(&a)), "02:49:47:c5:e1:5f");
}

#[test]
fn the_network_stands_in_an_alias_as_long_as_it_fits() {
    let network = NetworkName::try_from("n".repeat(128)).unwrap();
    for (id, fits) in [(112, true), (113, true), (114, false), (115, false)] {
        let a = attachment(&"x".repeat(id));
        let alias = device_alias(&a, Some(&network));
        let read = read_alias(host_veth_name(&a).as_str(), &alias);
        assert_eq!(read, Some((a, fits.then(|| network.clone()))), "{id}");
        assert_eq!(alias.len() == 8 + id + 5 + 129, fits, "{alias}");
    }
}

#[test]
fn an_alias_is_told_by_its_first_word() {
    for alias in ["ferrule abc eth0", "ferrule "] {
        assert!(is_alias(alias), "{alias}");
    }
    for alias in [
        "",
        "ferrule",
        "uplink",
        "my ferrule abc eth0",
        "ferrules abc",
    ] {
        assert!(!is_alias(alias), "{alias}");
    }
}

#[test]
fn name_and_mac_together_are_like_those_of_a_pods_veth() {
    let a = attachment("abc");
    let (name, mac) = (host_veth_name(&a), Some(host_veth_mac(&a)));
    assert!(resembles_host_veth(&a, name.as_str(), mac));
    assert!(!resembles_host_veth(&a, name.as_str(), None));
    assert!(!resembles_host_veth(
        &a,
        name.as_str(),
        Some(pod_veth_mac(&a))
    ));
    assert!(!resembles_host_veth(&a, "eth0", mac));
    assert!(!resembles_host_veth(&attachment("abd"), name.as_str(), mac));
}

#[test]
fn a_virtual_service_is_ours_by_vip_frontend_or_mark() {
    let at = |last, port| FrontendAddr::new([192, 0, 2, last].into(), port, Protocol::Tcp);
    let mark = |family, mark| ServiceKey::Mark { family, mark };
    let proofs = Proofs {
        vips: [at(1, 0).ip].into(),
        frontends: [at(2, 30_080)].into(),
        marks: [mark(Family::IPv4, 7)].into(),
    };
    for (key, ours) in [
        (at(1, 80).into(), true),
        (at(1, 81).into(), true),
        (at(2, 30_080).into(), true),
        (at(2, 80).into(), false),
        (at(3, 30_080).into(), false),
        (mark(Family::IPv4, 7), true),
        (mark(Family::IPv6, 7), false),
        (mark(Family::IPv4, 8), false),
    ] {
        assert_eq!(owns_virtual_service(&key, &proofs), ours, "{key}");
    }
}

#[test]
fn at_an_excluded_address_a_frontend_proves_itself_and_no_other() {
    let at = |last, port| FrontendAddr::new([192, 0, 2, last].into(), port, Protocol::Tcp);
    let observed = Observed {
        guarded: [at(1, 0).ip, at(2, 0).ip].into(),
        allowed: [at(1, 80), at(2, 80)].into(),
        external: [at(3, 30_080)].into(),
        ..Observed::default()
    };
    let excluded = ["192.0.2.2/31".parse().unwrap()];
    for (addr, without, with) in [
        (at(1, 81), true, true),
        (at(2, 80), true, true),
        (at(2, 81), true, false),
        (at(3, 30_080), true, true),
        (at(3, 80), false, false),
    ] {
        let key = addr.into();
        let ours = |excluded: &[_]| owns_virtual_service(&key, &observed.proofs(excluded));
        assert_eq!(ours(&[]), without, "{key}");
        assert_eq!(ours(&excluded), with, "{key}");
    }
}

#[test]
fn a_route_to_another_nodes_pods_has_our_protocol_and_a_gateway() {
    assert!(owns_node_route(101, true));
    assert!(!owns_node_route(101, false), "to a pod of this node");
    assert!(!owns_node_route(4, true), "an operator's");
    assert!(!owns_node_route(4, false));
}
