//! Negative controls: users' pains, had with a straightforward IPVS set-up.
//!
//! Each takes rows of a scenario's own table, makes [`straightforward`] of the scenario's
//! objects instead of what Ferrule makes of them, and must see the calls go wrong in the way
//! that users reported. So the scenarios are known to be able to fail; that they pass with
//! ours is shown where they run themselves. The numbers are those of the list of pains.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

use super::cast::{self, Cast};
use super::straightforward::{self, Families};
use super::{LIMIT, Row, Scenario, calls, departure, folder};
use crate::context::Context;
use crate::runner::{Group, Test};
use crate::sock::{Outcome, Request, TRANSPORTS};

const PREFIX: &str = "control/";

/// Those that are no rows of a table, and whose objects they take.
const VIP_AS_SOURCE: &str = "pain-2-the-kernel-chooses-the-vip-as-source";
const BY_ROUTE: &str = "a_node_process_calls_as_itself_where_vips_are_bound_by_route";
const FOREIGN_CHAIN: &str = "pain-20-a-foreign-chain-swallows-node-ports";
const NAMED_CHAIN: &str = "a_foreign_chain_that_drops_is_named";

/// A pain, and where it shows.
struct Control {
    /// Its test, behind [`PREFIX`].
    name: &'static str,
    scenario: &'static str,
    families: Families,
    /// Client and target of rows that go wrong, and words of what becomes of their calls.
    wrong: &'static [(&'static str, &'static str, &'static str)],
    /// Client and target of a row of which calls are right all the same: services do work.
    right: (&'static str, &'static str),
}

const CONTROLS: [Control; 10] = [
    Control {
        name: "pain-1-host-ports-are-reachable-through-a-cluster-ip",
        scenario: "other_ports_of_a_vip_are_refused",
        families: Families::Both,
        wrong: &[
            ("client-a", "web:10250", r#"by: "kubelet""#),
            ("node-a", "web:10250", r#"by: "kubelet""#),
            ("outside", "web/external:10250", r#"by: "kubelet""#),
        ],
        right: ("outside", "node-a:10250"),
    },
    Control {
        name: "pain-5-weights-stay-at-zero-after-a-restart",
        scenario: "weights_left_at_zero_are_put_right",
        families: Families::Both,
        wrong: &[("client-a", "web:80", "nothing arrived")],
        // Nothing works here.
        right: ("", ""),
    },
    Control {
        name: "pain-9-a-new-source-port-is-a-node-port",
        scenario: "a_new_source_port_is_never_a_node_port",
        families: Families::Both,
        wrong: &[("outside", "node-a:30080", ":30123")],
        // The same befalls each row.
        right: ("", ""),
    },
    Control {
        name: "pain-10-a-vip-with-policy-local-is-out-of-reach-from-within",
        scenario: "local_policy_without_local_endpoint_drops",
        families: Families::Both,
        wrong: &[
            ("client-a", "node-a:30080", "nothing arrived"),
            ("client-a", "web/balancer:80", "nothing arrived"),
            ("node-a", "web/balancer:80", "nothing arrived"),
        ],
        right: ("client-a", "web:80"),
    },
    Control {
        name: "pain-11-wrong-endpoints-under-policy-local",
        scenario: "external_local_policy_splits_internal_and_external_clients",
        families: Families::Both,
        wrong: &[
            ("client-a", "node-a:30080", "not all of them answered"),
            ("client-a", "web/balancer:80", "not all of them answered"),
        ],
        right: ("outside", "node-a:30080"),
    },
    Control {
        name: "pain-17-an-address-of-a-node-is-taken-for-a-vip",
        scenario: "the_address_of_another_node_is_left_to_it",
        families: Families::Both,
        wrong: &[("node-a", "node-b:8080", "a1")],
        right: ("client-a", "web:8080"),
    },
    Control {
        name: "pain-18-a-balancer-is-short-circuited",
        scenario: "ip_mode_vip_is_as_if_unset",
        families: Families::Both,
        wrong: &[(
            "outside",
            "198.51.100.12:80,[2001:db8:198::12]:80",
            r#"by: "a1""#,
        )],
        right: ("outside", "198.51.100.10:80,[2001:db8:198::10]:80"),
    },
    Control {
        name: "pain-19-a-node-answers-arp-for-a-vip",
        scenario: "nobody_answers_for_a_vip_on_the_segment",
        families: Families::Both,
        wrong: &[
            ("external", "web/balancer:80", r#"by: "a1""#),
            ("external", "web/external:80", r#"by: "a1""#),
        ],
        right: ("outside", "web/balancer:80"),
    },
    Control {
        name: "pain-21-a-family-is-forgotten",
        scenario: "families_keep_apart",
        families: Families::First,
        wrong: &[("client-a", "six:80", "TimedOut")],
        right: ("client-a", "web:80"),
    },
    Control {
        name: "pain-22-source-ranges-do-not-hold-for-the-node",
        scenario: "source_ranges_hold_for_the_node_itself",
        families: Families::Both,
        wrong: &[("node-a", "web/balancer:80", "Answered")],
        right: ("outside", "web/balancer:80"),
    },
];

/// Each control's name, and the scenario that passes with ours.
pub(super) fn listed() -> Vec<(&'static str, &'static str)> {
    let by_table = CONTROLS.iter();
    let mut listed: Vec<_> = by_table
        .map(|control| (control.name, control.scenario))
        .collect();
    listed.push((VIP_AS_SOURCE, BY_ROUTE));
    listed.push((FOREIGN_CHAIN, NAMED_CHAIN));
    let number = |name: &str| {
        name.split('-')
            .nth(1)
            .and_then(|number| number.parse::<u8>().ok())
    };
    listed.sort_by_key(|(name, _)| number(name));
    listed
}

/// A test for each.
pub(super) fn tests() -> Vec<Test> {
    let test = |name: String, run| Test {
        name: name.leak(),
        group: Group::Ipvs,
        limit: LIMIT,
        run,
    };
    let by_table = CONTROLS.iter();
    let mut tests: Vec<Test> = by_table
        .map(|control| test(format!("{PREFIX}{}", control.name), run as fn(&mut _) -> _))
        .collect();
    tests.push(test(
        format!("{PREFIX}{VIP_AS_SOURCE}"),
        the_vip_is_the_source,
    ));
    tests.push(test(
        format!("{PREFIX}{FOREIGN_CHAIN}"),
        a_foreign_chain_swallows_node_ports,
    ));
    for (name, run) in departure::CONTROLS {
        tests.push(test(format!("{PREFIX}{name}"), run));
    }
    tests
}

fn run(context: &mut Context) -> anyhow::Result<()> {
    let name = context.name().strip_prefix(PREFIX);
    let control = CONTROLS.iter().find(|control| Some(control.name) == name);
    let control = control.context("no control's test")?;
    let scenario = Scenario::read(&folder().join(control.scenario))?;
    let named = |client: &str, target: &str| -> Vec<Row> {
        let rows = scenario.rows.iter();
        let rows = rows.filter(|row| row.client == client && row.target == target);
        rows.cloned().collect()
    };
    let wrong = control
        .wrong
        .iter()
        .map(|(client, target, _)| named(client, target));
    let wrong: Vec<Vec<Row>> = wrong.collect();
    let (client, target) = control.right;
    let right = named(client, target);
    let rows = [wrong.concat(), right.clone()].concat();
    let cast = assemble(context, &scenario, control.families)?;
    let report = calls::check(&rows, &cast, &scenario.view()?);
    let heard = |rows: &[Row]| -> Vec<&str> {
        let of_rows = |line: usize| rows.iter().any(|row| row.line == line);
        let heard = report.wrong.iter().filter(|(line, _)| of_rows(*line));
        heard.map(|(_, words)| words.as_str()).collect()
    };
    for ((client, target, words), rows) in control.wrong.iter().zip(&wrong) {
        let heard = heard(rows);
        ensure!(
            heard.iter().any(|complaint| complaint.contains(words)),
            "{client} to {target}: not {words:?}, but {heard:?}"
        );
    }
    let heard = heard(&right);
    // Not all need be right: of a forgotten family nothing is, and over IPv6 masquerade takes
    // a VIP for the source that is nearest to a pod.
    let calls = right.iter().flat_map(Row::calls).count();
    ensure!(
        right.is_empty() || heard.len() < calls,
        "it does not work at all: {heard:?}"
    );
    Ok(())
}

pub(super) fn assemble(
    context: &Context,
    scenario: &Scenario,
    families: Families,
) -> anyhow::Result<Cast> {
    let cast = Cast::assemble(context, scenario.calls_sctp())?;
    scenario.prepare(&cast)?;
    straightforward::set_up(context.folder(), &cast, &scenario.objects, families)?;
    scenario.restore(&cast)?;
    straightforward::start_again(context.folder(), &cast, &scenario.objects, families)?;
    Ok(cast)
}

/// Pain 2: a process of the node that calls a cluster address has that very address as its
/// own. Where no rule repairs that, the backend answers to an address that it has no way to.
fn the_vip_is_the_source(context: &mut Context) -> anyhow::Result<()> {
    let scenario = Scenario::read(&folder().join(BY_ROUTE))?;
    let cast = assemble(context, &scenario, Families::Both)?;
    let rows = scenario.rows.iter().filter(|row| row.client == cast::NODE);
    let calls: Vec<SocketAddr> = rows.flat_map(Row::calls).map(|(_, to)| to).collect();
    ensure!(!calls.is_empty(), "the node calls nothing");
    cast.node().run(|| {
        for to in calls {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            let own = socket.local_addr()?.ip();
            ensure!(own == to.ip(), "{own} is the source of a call to {to}");
        }
        Ok(())
    })
}

/// Pain 20: the calls are lost while the foreign chain is there, and only then.
fn a_foreign_chain_swallows_node_ports(context: &mut Context) -> anyhow::Result<()> {
    let scenario = Scenario::read(&folder().join(NAMED_CHAIN))?;
    let cast = assemble(context, &scenario, Families::Both)?;
    let outside = cast.member("outside")?;
    let all = |expected: fn(&Outcome) -> bool, limit: Duration| -> anyhow::Result<()> {
        for transport in TRANSPORTS {
            for ip in cast::ips(cast::NODE).into_iter().flatten() {
                let to = SocketAddr::new(ip, 30_080);
                let outcome = Request::new(transport, to).send(outside, limit)?;
                if !expected(&outcome) {
                    bail!("{transport:?} {to}: {outcome:?}");
                }
            }
        }
        Ok(())
    };
    let limit = Duration::from_millis(1500);
    all(|outcome| *outcome == Outcome::TimedOut, limit).context("behind the chain")?;
    let node = cast.node();
    node.output("nft", &["delete", "table", "inet", "host-firewall"])?;
    let answered =
        |outcome: &Outcome| matches!(outcome, Outcome::Answered { by, .. } if by == "a1");
    all(answered, crate::sock::ANSWER).context("without the chain")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_control_names_rows_of_a_scenario() {
        for control in &CONTROLS {
            let scenario = Scenario::read(&folder().join(control.scenario)).unwrap();
            let targets = control
                .wrong
                .iter()
                .map(|(client, target, _)| (*client, *target));
            let right = Some(control.right).filter(|(client, _)| !client.is_empty());
            for (client, target) in targets.chain(right) {
                let mut rows = scenario.rows.iter();
                let found = rows.any(|row| row.client == client && row.target == target);
                assert!(found, "{}: {client} {target}", control.name);
            }
        }
    }

    #[test]
    fn names_of_controls_are_theirs() {
        let names: std::collections::BTreeSet<_> = tests().iter().map(|test| test.name).collect();
        assert_eq!(names.len(), CONTROLS.len() + 2 + departure::CONTROLS.len());
    }
}
