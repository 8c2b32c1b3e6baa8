//! Each packet has one verdict, and it is the one that the specification's rules give.
//!
//! The oracle here reads the Services and their slices, slowly and in the words of the
//! specification; the model's verdict follows what is programmed. Neither knows the other.

#![expect(
    clippy::unwrap_used,
    reason = "a test fails by panicking; only the bodies of #[test] functions are exempt by configuration"
)]

mod oracle;
mod world;

use ferrule_model::address::Family;
use ferrule_model::plan::Plan;
use ferrule_model::verdict::{Masquerade, Packet, Source, Steps, Verdict, steps, verdict};
use ferrule_model::view::NodeView;
use proptest::prelude::*;

use oracle::Said;
use world::{Call, Client, World, wish, world};

/// The verdict as the oracle words it, with what is expected of each source.
fn agree(given: &Verdict, said: &Said) -> Result<(), TestCaseError> {
    let source = |source: Source, rows: &[Masquerade]| match source {
        Source::Kept => rows.is_empty(),
        Source::Replaced(why) => rows.contains(&why),
    };
    let same = match (given, said) {
        (Verdict::Forwarded(leads), Said::Forwarded(backends)) => {
            leads.keys().eq(backends.keys())
                && leads
                    .values()
                    .zip(backends.values())
                    .all(|(lead, (weight, rows))| {
                        lead.weight == *weight && source(lead.source, rows)
                    })
        }
        (Verdict::Refused(_), Said::Refused)
        | (Verdict::Unallocated, Said::Unallocated)
        | (Verdict::Served, Said::Served) => true,
        (Verdict::Dropped(loss), Said::Dropped(why)) => loss == why,
        (Verdict::Passed(seen), Said::Passed(rows)) => source(*seen, rows),
        (
            Verdict::Forwarded(_)
            | Verdict::Refused(_)
            | Verdict::Unallocated
            | Verdict::Served
            | Verdict::Dropped(_)
            | Verdict::Passed(_),
            _,
        ) => false,
    };
    prop_assert!(same, "{:?}, and the specification says {:?}", given, said);
    Ok(())
}

fn packet(world: &World, call: &Call) -> Packet<'static> {
    // The kernel takes a VIP for the source of a process that calls it.
    let from_vip = call.client == Client::Node && world.is_vip(call.target.ip);
    Packet {
        source: if from_vip { call.target.ip } else { call.who },
        device: call.device,
        target: call.target,
    }
}

fn judged(world: &World, view: &NodeView, call: &Call) -> Verdict {
    verdict(view.desired(), &view.source_nat(), &packet(world, call))
}

/// The rows of a plan foresee how the call fares: its backends, and why its source is replaced.
fn is_foreseen(plan: &Plan, call: &Call, steps: &Steps<'_>) -> Result<(), TestCaseError> {
    let Verdict::Forwarded(leads) = &steps.verdict else {
        return Ok(());
    };
    let target = call.target;
    let clients = if steps.within.is_some() {
        "internal"
    } else {
        "external"
    };
    let mut rows = plan.frontends.iter().filter(|row| {
        (row.address, row.port_number, row.protocol) == (target.ip, target.port, target.protocol)
            && (row.clients == "any" || row.clients == clients)
    });
    let (Some(row), None) = (rows.next(), rows.next()) else {
        return Err(TestCaseError::fail("there is not one row for it"));
    };
    let service = steps.service.as_ref().map(|(_, service)| service);
    let scheduler = service.map(|service| service.scheduling.scheduler.name());
    prop_assert_eq!(scheduler, Some(row.scheduler.as_str()));
    for (backend, lead) in leads {
        let mut backends = row.backends.iter();
        prop_assert!(backends.any(|row| (row.address, row.port) == (backend.ip, backend.port)));
        match lead.source {
            // The second follows from how the kernel chooses a source.
            Source::Kept | Source::Replaced(Masquerade::ViaVip) => {}
            Source::Replaced(why) => {
                let all = row.masquerade == ["all"];
                let said = row.masquerade.contains(&why.name());
                prop_assert!(all || said, "{why:?}, and the row says {row:?}");
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn every_packet_has_the_verdict_that_the_specification_gives(
        world in world(),
        wishes in prop::collection::vec(wish(), 24),
    ) {
        let view = world.view();
        for call in wishes.iter().map(|wish| wish.directed(&view)) {
            let given = judged(&world, &view, &call);
            if let Verdict::Forwarded(leads) = &given {
                prop_assert!(!leads.is_empty());
                let mut backends = leads.keys();
                prop_assert!(backends.all(|b| Family::of(b.ip) == Family::of(call.target.ip)));
            }
            agree(&given, &world.says(&call)).map_err(|error| {
                TestCaseError::fail(format!("{call:?}: {error}"))
            })?;
        }
    }

    #[test]
    fn a_plan_says_of_every_packet_that_is_forwarded_how_it_fares(
        world in world(),
        wishes in prop::collection::vec(wish(), 24),
    ) {
        let view = world.view();
        let plan = Plan::new(&view, []);
        let nat = view.source_nat();
        for call in wishes.iter().map(|wish| wish.directed(&view)) {
            let packet = packet(&world, &call);
            let steps = steps(view.desired(), &nat, &packet);
            is_foreseen(&plan, &call, &steps).map_err(|error| {
                TestCaseError::fail(format!("{call:?}: {error}: {steps:?}"))
            })?;
        }
    }
}
