//! What must hold for any facts in any order.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

#[path = "properties/kernel.rs"]
mod kernel;
#[path = "properties/world.rs"]
mod world;

use std::collections::BTreeSet;
use std::time::Instant;

use ferrule_model::address::{Family, FrontendAddr, Protocol};
use ferrule_model::cluster::Event;
use ferrule_model::desired::{Desired, Frontend, FrontendKind, Scope};
use ferrule_model::diff::{diff, diff_all};
use ferrule_model::drain::Server;
use ferrule_model::kube::{Kind, Object, ObjectKey};
use ferrule_model::names::ObjectName;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::{ServiceKey, VirtualService};
use proptest::prelude::*;

use self::kernel::{carry_out, every_key, observed, wanted};
use self::world::{Told, World, events, facts, remaining};

/// Backends of a virtual service by mark keep their connections as long as the frontends that
/// led to it lead nowhere else.
fn check_marked(
    desired: &Desired,
    key: ServiceKey,
    service: &VirtualService,
    before: &Observed,
    kernel: &Observed,
) -> Result<(), TestCaseError> {
    let ServiceKey::Mark { family, mark } = key else {
        return Ok(());
    };
    let marks = before.marks.iter();
    let marked = marks.filter(|(addr, of)| **of == mark && Family::of(addr.ip) == family);
    let mut frontends = marked.map(|(addr, _)| *addr);
    let elsewhere = |addr: &FrontendAddr| {
        desired.virtual_service(&(*addr).into()).is_some()
            || desired.mark(addr).is_some()
            || desired.is_health_check(addr)
    };
    let is_wanted = desired.marked_service(&key).is_some();
    let tcp = |addr: &FrontendAddr| addr.protocol == Protocol::Tcp;
    let Some(addr) = frontends.find(|addr| tcp(addr) && (is_wanted || !elsewhere(addr))) else {
        return Ok(());
    };
    let wanted = desired.marked_service(&key).unwrap_or_default();
    // A mark that another service port has now.
    let passed = is_wanted && desired.mark(&addr) != Some(mark);
    for backend in service.servers.keys().filter(|_| !passed) {
        let weight = wanted.servers.get(backend).copied().unwrap_or(0);
        let now = kernel
            .services
            .get(&key)
            .and_then(|s| s.servers.get(backend));
        prop_assert_eq!(now, Some(&weight), "{} of {} at {}", backend, key, addr);
        let proven = owns_virtual_service(&key, &kernel.proofs(&[]));
        prop_assert!(proven, "{} without a proof", key);
        prop_assert_eq!(
            kernel.closed.contains(&addr),
            !is_wanted,
            "new ones at {}",
            addr
        );
    }
    Ok(())
}

proptest! {
    #[test]
    fn facts_in_any_order_give_the_same_state(
        events in events(),
        order in any::<prop::sample::Index>(),
    ) {
        let mut told = World::new();
        for event in &events {
            told.take(event.clone());
        }
        let mut objects = remaining(&events);
        let middle = order.index(objects.len() + 1);
        objects.rotate_left(middle);
        objects.reverse();
        let mut listed = World::new();
        for event in objects {
            listed.take(event);
        }
        prop_assert_eq!(told.desired, listed.desired);
    }

    #[test]
    fn the_diff_applied_to_what_is_observed_gives_what_is_desired(
        events in events(),
        observed in observed(),
    ) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        let mut kernel = observed;
        let changes = diff_all(&world.desired, &kernel);
        carry_out(&world.desired, &mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&world.desired));
        prop_assert_eq!(diff_all(&world.desired, &kernel), vec![]);
    }

    #[test]
    fn frontends_are_listed_once_in_order_and_under_who_holds_them(
        events in events(),
        from in 0..5_u8,
    ) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        let desired = &world.desired;
        let listed: Vec<FrontendAddr> = desired.frontends().map(|(addr, _)| addr).collect();
        let held = every_key().into_iter().filter(|addr| desired.frontend(addr).is_some());
        prop_assert_eq!(&listed, &held.collect::<Vec<_>>());

        let mut of_services = BTreeSet::new();
        for (service, frontends) in desired.frontends_by_service(None) {
            for (addr, frontend) in frontends {
                prop_assert_eq!(&frontend.holder, service);
                prop_assert_eq!(desired.frontend(&addr), Some(frontend));
                prop_assert!(of_services.insert(addr), "{} twice", addr);
            }
        }
        let pods: BTreeSet<_> = desired.host_ports().map(|(addr, _)| addr).collect();
        prop_assert_eq!(&of_services | &pods, listed.into_iter().collect());
        prop_assert!(of_services.is_disjoint(&pods));

        let from = ObjectName::new("default", format!("s{from}"));
        let names = |from| desired.frontends_by_service(from).map(|(name, _)| name);
        let rest: Vec<_> = names(None).filter(|name| **name >= from).collect();
        prop_assert_eq!(names(Some(&from)).collect::<Vec<_>>(), rest);
    }

    #[test]
    fn the_scope_of_a_step_has_the_step(events in events(), kernel in observed()) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        for change in diff_all(&world.desired, &kernel) {
            let mut scope = Scope::default();
            scope.insert_change(&change);
            let changes = diff(&world.desired, &kernel, &scope);
            prop_assert!(changes.contains(&change), "{change}: {scope:?}");
        }
    }

    #[test]
    fn addresses_that_come_and_go_leave_no_trace(
        before in events(),
        facts in facts(),
        after in events(),
        later in self::facts(),
        observed in observed(),
    ) {
        let mut moved = World::new();
        let mut scope = Scope::default();
        let mut kernel = wanted(&moved.desired);
        for event in &before {
            scope.merge(moved.take(event.clone()));
        }
        scope.merge(moved.desired.set_facts(&moved.cluster, facts.clone()));
        for event in &after {
            scope.merge(moved.take(event.clone()));
        }
        let changes = diff(&moved.desired, &kernel, &scope);
        carry_out(&moved.desired, &mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&moved.desired));

        let mut fresh = World::new();
        fresh.desired.set_facts(&fresh.cluster, facts);
        for event in before.into_iter().chain(after) {
            fresh.take(event);
        }
        prop_assert_eq!(&fresh.desired, &moved.desired);
        let mut kernel = observed;
        let changes = diff_all(&fresh.desired, &kernel);
        for change in &changes {
            kernel.record(change);
        }
        prop_assert_eq!(kernel, wanted(&fresh.desired));

        // Nothing but other addresses, or another decision how VIPs are bound.
        let mut kernel = wanted(&moved.desired);
        let scope = moved.desired.set_facts(&moved.cluster, later);
        let changes = diff(&moved.desired, &kernel, &scope);
        carry_out(&moved.desired, &mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&moved.desired));
    }

    #[test]
    fn a_change_at_a_time_ends_where_a_full_comparison_ends(events in events()) {
        let mut world = World::new();
        let mut kernel = Observed::default();
        for event in events {
            let scope = world.take(event);
            let changes = diff(&world.desired, &kernel, &scope);
            carry_out(&world.desired, &mut kernel, &changes)?;
            prop_assert_eq!(&kernel, &wanted(&world.desired));
        }
    }

    #[test]
    fn what_leaves_keeps_its_connections_until_they_end(events in events()) {
        let mut world = World::new();
        let mut kernel = Observed::default();
        let now = Instant::now();
        for event in events {
            let before = kernel.clone();
            let mut scope = world.take(event);
            world.desired.drain(&kernel, &mut scope, now);
            let changes = diff(&world.desired, &kernel, &scope);
            carry_out(&world.desired, &mut kernel, &changes)?;
            prop_assert_eq!(diff_all(&world.desired, &kernel), vec![]);
            for (key, service) in &before.services {
                let Some(addr) = key.address().filter(|addr| addr.protocol == Protocol::Tcp) else {
                    continue;
                };
                if world.desired.is_health_check(&addr) {
                    continue;
                }
                let stays = |backend| !scope.ended.contains(&(*key, backend));
                let kept = service.servers.keys().copied().filter(|backend| stays(*backend));
                let wanted = world.desired.virtual_service(key).unwrap_or_default();
                for backend in kept {
                    let weight = wanted.servers.get(&backend).copied().unwrap_or(0);
                    let now = kernel.services.get(key).and_then(|s| s.servers.get(&backend));
                    prop_assert_eq!(now, Some(&weight), "{} of {}", backend, addr);
                    prop_assert!(kernel.is_bound(addr.ip) || !before.is_bound(addr.ip));
                    let proven = owns_virtual_service(key, &kernel.proofs(&[]));
                    prop_assert!(proven, "{} without a proof", key);
                    let refused = kernel.leaving.contains(&addr);
                    prop_assert_eq!(refused, wanted.servers.is_empty(), "new ones at {}", addr);
                }
            }
            for (key, service) in &before.services {
                check_marked(&world.desired, *key, service, &before, &kernel)?;
            }
        }
        let leaving: Vec<Server> = world.desired.drains().live().map(|(s, _)| *s).collect();
        let mut scope = Scope::default();
        for server in leaving {
            world.desired.end_drain(&server);
            scope.insert_service(server.0);
        }
        world.desired.drain(&kernel, &mut scope, now);
        let changes = diff(&world.desired, &kernel, &scope);
        carry_out(&world.desired, &mut kernel, &changes)?;
        prop_assert_eq!(&kernel, &wanted(&world.desired));
        world.desired.drain(&kernel, &mut scope, now);
        prop_assert!(world.desired.drains().is_empty());
    }

    #[test]
    fn an_address_has_one_holder_and_each_loser_is_told(events in events()) {
        let mut world = World::new();
        for event in events {
            world.take(event);
        }
        let mut holders: BTreeSet<FrontendAddr> = BTreeSet::new();
        for (addr, frontend) in world.desired.frontends() {
            let Frontend { holder, kind, .. } = frontend;
            prop_assert!(holders.insert(addr));
            if *kind == FrontendKind::HostPort {
                // Any Service that asks for it is told that it has lost.
                let words = format!(": {addr} is held by a host port of {}", frontend.object());
                let services = world.cluster.services().map(|(name, _)| name);
                let mut alone = World::new();
                for service in services {
                    let object = world.cluster.service(service).unwrap().clone();
                    alone.take(Told::Event(Event::Applied(Box::new(Object::Service(object)))));
                    if alone.desired.frontend(&addr).is_none() {
                        continue;
                    }
                    alone.take(Told::Event(Event::Deleted(ObjectKey {
                        kind: Kind::Service,
                        name: service.clone(),
                    })));
                    let said = world.desired.conditions_of(service);
                    prop_assert!(said.iter().any(|c| c.message.contains(&words)), "{:?}", said);
                }
                continue;
            }
            let said = world.desired.conditions_of(holder);
            let words = format!(": {addr} is held by");
            prop_assert!(!said.iter().any(|c| c.message.contains(&words)), "{:?}", said);
        }
    }
}
