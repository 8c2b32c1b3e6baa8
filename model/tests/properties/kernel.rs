//! Random states of the kernel, the one that is desired, and a kernel that refuses what the
//! real one would refuse and what would open the node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ferrule_model::address::{BackendAddr, FrontendAddr, Protocol};
use ferrule_model::binding::Binding;
use ferrule_model::change::Change;
use ferrule_model::desired::{Action, Desired, Frontend, FrontendKind};
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::{Scheduler, Scheduling, ServiceKey, VirtualService};
use proptest::prelude::*;

use super::world::{binding, protocol};

pub(super) fn observed() -> impl Strategy<Value = Observed> {
    let ip = prop::sample::select(vec!["10.96.0.1", "10.96.0.2", "10.96.0.9", "fd00::1"])
        .prop_map(|ip| ip.parse::<IpAddr>().unwrap());
    let addr = (
        ip.clone(),
        protocol(),
        prop::sample::select(vec![53_u16, 80, 99]),
    )
        .prop_map(|(ip, protocol, port)| FrontendAddr::new(ip, port, protocol));
    let backend = (0..4_u8, 8000..8002_u16)
        .prop_map(|(host, port)| BackendAddr::new(IpAddr::from([10, 1, 0, host]), port));
    let addr = addr.boxed();
    let service = (
        any::<bool>(),
        prop::collection::btree_map(backend, 0..3_u32, 0..4),
    )
        .prop_map(|(rr, servers)| VirtualService {
            scheduling: Scheduling {
                scheduler: Scheduler::from_name(if rr { "rr" } else { "lblc" }),
                ..Scheduling::default()
            },
            servers,
        });
    (
        prop::collection::btree_set(ip.clone(), 0..4),
        prop::collection::btree_set((ip, binding()), 0..6),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_set(addr.clone(), 0..4),
        prop::collection::btree_map(addr, service, 0..4),
        prop::collection::btree_set((0..4_u8).prop_map(|n| IpAddr::from([10, 1, 0, n])), 0..3),
        observed_filter(),
    )
        .prop_map(
            |(guarded, bound, allowed, external, preserved, services, hairpins, filter)| Observed {
                guarded,
                bound: possible(bound),
                allowed,
                external,
                preserved,
                hairpins,
                services: services
                    .into_iter()
                    .map(|(addr, service)| (addr.into(), service))
                    .collect(),
                ..filter
            },
        )
}

/// The kernel has one route of IPv6 to a destination.
pub(super) fn possible(bound: BTreeSet<(IpAddr, Binding)>) -> BTreeSet<(IpAddr, Binding)> {
    let mut observed = Observed::default();
    for (ip, binding) in bound {
        observed.bind(ip, binding);
    }
    observed.bound
}

/// Who is dropped and who is let in.
pub(super) fn observed_filter() -> impl Strategy<Value = Observed> {
    let ip = prop::sample::select(vec!["10.96.0.1", "10.96.0.2", "fd00::1"]);
    let addr = (ip, prop::sample::select(vec![53_u16, 80]))
        .prop_map(|(ip, port)| FrontendAddr::new(ip.parse().unwrap(), port, Protocol::Tcp))
        .boxed();
    let network = prop::sample::select(vec!["192.0.2.0/24", "10.0.0.0/8", "10.96.0.1/32"])
        .prop_map(|text| text.parse().unwrap());
    let networks = prop::collection::btree_set(network, 1..3);
    (
        prop::collection::btree_set(addr.clone(), 0..3),
        prop::collection::btree_set(addr.clone(), 0..3),
        prop::collection::btree_map(addr, networks, 0..3),
    )
        .prop_map(|(dropped, limited, admitted)| Observed {
            silent: limited
                .iter()
                .map(|addr: &FrontendAddr| addr.ip)
                .filter(IpAddr::is_ipv4)
                .collect(),
            served: dropped.clone(),
            dropped,
            limited,
            admitted,
            ..Observed::default()
        })
}

/// Everything that a Service or a pod of these tests can ask for, in order.
pub(super) fn every_key() -> BTreeSet<FrontendAddr> {
    let ips = ["10.96.0.1", "10.96.0.2", "fd00::1", "fd00::2", "192.0.2.1"];
    let mut keys = BTreeSet::new();
    for ip in ips {
        for port in [53, 80, 30_053, 30_080, 30_999] {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                keys.insert(FrontendAddr::new(ip.parse().unwrap(), port, protocol));
            }
        }
    }
    keys
}

/// What the kernel should look like, straight from the definition.
pub(super) fn wanted(desired: &Desired) -> Observed {
    let balanced = desired
        .frontends()
        .filter_map(|(addr, frontend)| Some((addr.into(), frontend.virtual_service()?)));
    let marked = desired
        .marked()
        .map(|key| (key, desired.marked_service(&key).unwrap()));
    let services: BTreeMap<ServiceKey, VirtualService> = balanced.chain(marked).collect();
    let those = |which: &dyn Fn(&Frontend) -> bool| {
        let frontends = desired.frontends();
        let those = frontends.filter(|(_, frontend)| which(frontend));
        those.map(|(addr, _)| addr).collect()
    };
    Observed {
        guarded: desired.vips().collect(),
        silent: desired.vips().filter(IpAddr::is_ipv4).collect(),
        bound: desired
            .vips()
            .map(|ip| (ip, desired.binding(ip).unwrap()))
            .collect(),
        // Answers come from a VIP whichever of the two virtual services balances.
        allowed: those(&|frontend| {
            let some = frontend.action() == Action::Balance || frontend.internal.is_some();
            frontend.is_vip && some
        }),
        marks: desired
            .frontends()
            .filter(|(_, frontend)| frontend.internal.is_some())
            .map(|(addr, _)| (addr, desired.mark(&addr).unwrap()))
            .collect(),
        external: those(&|frontend| frontend.kind != FrontendKind::ClusterIP),
        preserved: those(&|frontend| frontend.preserves_client),
        dropped: those(&|frontend| frontend.action() == Action::Drop),
        leaving: BTreeSet::new(),
        closed: BTreeSet::new(),
        served: desired.served().collect(),
        limited: those(&|frontend| !frontend.source_ranges.is_empty()),
        admitted: desired
            .frontends()
            .map(|(addr, _)| (addr, desired.admitted(&addr)))
            .filter(|(_, networks)| !networks.is_empty())
            .collect(),
        hairpins: desired.hairpins().collect(),
        services,
    }
}

/// Carries changes out on a kernel that refuses what a real one would refuse,
/// and what would open the node.
pub(super) fn carry_out(
    desired: &Desired,
    observed: &mut Observed,
    changes: &[Change],
) -> Result<(), TestCaseError> {
    for change in changes {
        match change {
            Change::BindVip(ip, _) | Change::RebindVip(ip, _) => {
                prop_assert!(observed.guarded.contains(ip), "{change} without a guard");
                let silent = observed.silent.contains(ip) || ip.is_ipv6();
                prop_assert!(silent, "{change} and answering for it");
            }
            Change::UnguardVip(ip) => {
                prop_assert!(!observed.is_bound(*ip), "{change} while it is bound");
            }
            Change::ReleaseVip(ip, from) => {
                prop_assert!(desired.binding(*ip).as_ref() != Some(from), "{change}");
                observed.record(change);
                let wanted = desired.binding(*ip).unwrap();
                prop_assert!(
                    observed.bindings(*ip).any(|binding| *binding == wanted),
                    "{change} before it is bound anew"
                );
            }
            Change::UnbindVip(ip, _) => {
                // One that stays is that of a frontend at what is an address of the node now.
                let services = observed.services.keys().filter_map(ServiceKey::address);
                let mut gone = services.filter(|addr| desired.frontend(addr).is_none());
                prop_assert!(
                    !gone.any(|addr| addr.ip == *ip),
                    "{change} while it has services"
                );
            }
            Change::AddService(key, _) => {
                prop_assert!(
                    owns_virtual_service(key, &observed.proofs(&[])),
                    "{change} without a proof"
                );
                prop_assert!(!observed.services.contains_key(key), "{change} twice");
                if let Some(addr) = key.address() {
                    let admitted = observed.admitted.get(&addr).cloned().unwrap_or_default();
                    let wanted = desired.admitted(&addr);
                    prop_assert_eq!(&admitted, &wanted, "{} lets others in", change);
                    let limited = observed.limited.contains(&addr);
                    prop_assert_eq!(limited, !admitted.is_empty(), "{} lets others in", change);
                }
            }
            Change::AddServer(key, ..) | Change::UpdateServer(key, ..) => {
                prop_assert!(
                    observed.services.contains_key(key),
                    "{change} without a service"
                );
            }
            Change::RemoveServer(key, _) => {
                observed.record(change);
                let left = observed.services.get(key).map_or(0, |s| s.servers.len());
                prop_assert!(left > 0, "{change} left the service empty");
            }
            Change::RemoveExternal(addr) => {
                prop_assert!(
                    !observed.services.contains_key(&(*addr).into()) || observed.is_bound(addr.ip),
                    "{change} leaves a service without a proof"
                );
            }
            Change::SetMark(addr, former, _) => {
                prop_assert_eq!(observed.marks.get(addr), former.as_ref(), "{}", change);
                observed.record(change);
                for key in observed
                    .services
                    .keys()
                    .filter(|key| key.address().is_none())
                {
                    let proven = owns_virtual_service(key, &observed.proofs(&[]));
                    prop_assert!(proven, "{change} leaves {key} without a proof");
                }
            }
            Change::RemoveService(_)
            | Change::AddDropped(_)
            | Change::AddLeaving(_)
            | Change::RemoveLeaving(_)
            | Change::AddClosed(_)
            | Change::RemoveClosed(_)
            | Change::AddServed(_)
            | Change::RemoveServed(_)
            | Change::RemoveDropped(_)
            | Change::Restrict(..)
            | Change::DisallowFrontend(_)
            | Change::AddExternal(_)
            | Change::AddPreserved(_)
            | Change::RemovePreserved(_)
            | Change::AddHairpin(_)
            | Change::RemoveHairpin(_)
            | Change::GuardVip(_)
            | Change::SilenceVip(_)
            | Change::UnsilenceVip(_)
            | Change::AllowFrontend(_)
            | Change::UpdateService(..) => {}
        }
        observed.record(change);
    }
    Ok(())
}
