//! The calls of a table, and what is wrong with what became of them.
//!
//! A row calls over each of its transports to each of its addresses, one call after the
//! other until every backend that must answer has, or one has that must not. Rows between
//! which time passes are phases, one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use ferrule_model::view::NodeView;

use super::cast::{self, Cast};
use super::health;
use super::table::{Expected, How, Row, Source};
use crate::sock::{ANSWER, Outcome, Request, Transport};

/// How long a call that must vanish is given. All do so at the same time, and that they
/// were dropped, not slow, the counters of our table say.
const SILENCE: Duration = Duration::from_millis(1500);

/// How long an answer is waited for where one has been missed before: the scenario has
/// failed, and is to say soon what else went wrong.
const AFTERWARDS: Duration = Duration::from_secs(2);

/// Calls for each backend before it is given up: not every scheduler takes turns.
const PATIENCE: usize = 12;

/// Calls by one client that must all get to one backend.
const LOYALTY: usize = 20;

/// Calls where nobody in particular has to answer.
const SAMPLE: usize = 6;

/// One row over one transport to one address.
struct Series<'a> {
    row: &'a Row,
    transport: Transport,
    to: SocketAddr,
    view: &'a NodeView,
}

/// What became of the calls that were made.
struct Call {
    word: String,
    outcome: anyhow::Result<Outcome>,
}

/// Who answered a client last, over a transport at an address.
type Former = BTreeMap<(String, Transport, SocketAddr), String>;

/// What became of a table.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// How many calls vanished, as they had to.
    pub(super) drops: u64,
    /// How many series of calls there were, and how many of them were as they must be.
    pub(super) made: usize,
    pub(super) right: usize,
    /// What was wrong, by the line of the table.
    pub(super) wrong: Vec<(usize, String)>,
}

impl Report {
    /// The number of dropped calls, if nothing was wrong.
    pub(super) fn verdict(self) -> anyhow::Result<u64> {
        let complaints: Vec<String> = self.wrong.into_iter().map(|(_, words)| words).collect();
        ensure!(
            complaints.is_empty(),
            "{} of {}:\n{}",
            complaints.len(),
            self.made,
            complaints.join("\n")
        );
        Ok(self.drops)
    }
}

/// Makes all calls.
pub(super) fn check(rows: &[Row], cast: &Cast, view: &NodeView) -> Report {
    let mut report = Report::default();
    let mut former = Former::new();
    for phase in rows.chunk_by(|_, next| next.wait.is_zero()) {
        thread::sleep(phase.first().map_or(Duration::ZERO, |row| row.wait));
        check_phase(phase, cast, view, &mut former, &mut report);
    }
    report
}

fn check_phase(
    rows: &[Row],
    cast: &Cast,
    view: &NodeView,
    former: &mut Former,
    report: &mut Report,
) {
    let series: Vec<Series<'_>> = rows
        .iter()
        .flat_map(|row| {
            row.calls().map(move |(transport, to)| Series {
                row,
                transport,
                to,
                view,
            })
        })
        .collect();
    let outcomes = call_all(&series, cast);
    let seen: BTreeMap<String, SocketAddr> =
        cast.seen().map(|seen| (seen.word, seen.from)).collect();
    let mut latter = Former::new();
    for (series, calls) in series.iter().zip(outcomes) {
        report.made += 1;
        report.drops += u64::from(series.row.expected == Expected::Dropped);
        let complaint = match calls {
            Ok(calls) => {
                if let Some(by) = calls.iter().rev().find_map(Call::answered_by) {
                    latter.insert(series.key(), by.to_owned());
                }
                let before = former.get(&series.key()).map(String::as_str);
                series.complaint(&calls, &seen, before)
            }
            Err(error) => Some(format!("{error:#}")),
        };
        let Some(complaint) = complaint else {
            report.right += 1;
            continue;
        };
        let Series {
            row, transport, to, ..
        } = series;
        let words = format!(
            "packets.txt:{}: {} to {}, {transport:?} {to}: {complaint}",
            row.line, row.client, row.target
        );
        report.wrong.push((row.line, words));
    }
    former.extend(latter);
}

/// Makes the calls of every series. Those that balance over one transport and family
/// take turns: two clients at a time could step in time with a ring of backends, and
/// meet the same one each time. Those that must vanish all wait at the same time.
fn call_all(series: &[Series<'_>], cast: &Cast) -> Vec<anyhow::Result<Vec<Call>>> {
    let mut lanes: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (place, series) in series.iter().enumerate() {
        let vanishes = matches!(series.row.expected, Expected::Dropped | Expected::Lost);
        let alone = vanishes.then_some(place);
        let lane = (series.transport, series.to.is_ipv4(), alone);
        lanes.entry(lane).or_default().push(place);
    }
    let run = |place: usize, limit| -> anyhow::Result<Vec<Call>> {
        let series = series.get(place).context("a lane is of series")?;
        cast.member(client(series.row))?
            .run(|| Ok(series.run(limit)))
    };
    let run_lane = |lane: &[usize]| {
        let (mut limit, mut done) = (ANSWER, Vec::new());
        for place in lane {
            let calls = run(*place, limit);
            if calls.as_ref().map_or(true, |calls| timed_out(calls)) {
                limit = AFTERWARDS;
            }
            done.push(calls);
        }
        done
    };
    let run_lane = &run_lane;
    let mut outcomes = BTreeMap::new();
    thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .values()
            .map(|lane| scope.spawn(move || run_lane(lane)))
            .collect();
        for (thread, lane) in threads.into_iter().zip(lanes.values()) {
            let of_lane = thread.join().unwrap_or_default();
            outcomes.extend(lane.iter().zip(of_lane));
        }
    });
    let taken = (0..series.len()).map(|place| outcomes.remove(&place));
    taken
        .map(|calls| calls.unwrap_or_else(|| Err(anyhow!("the client panicked"))))
        .collect()
}

fn timed_out(calls: &[Call]) -> bool {
    let mut outcomes = calls.iter().map(|call| &call.outcome);
    outcomes.any(|outcome| matches!(outcome, Ok(Outcome::TimedOut)))
}

/// In whose namespace a row's client is.
fn client(row: &Row) -> &str {
    match row.client.as_str() {
        "host-a" => "node-a",
        "host-b" => "node-b",
        other => other,
    }
}

impl Call {
    fn answered_by(&self) -> Option<&str> {
        match &self.outcome {
            Ok(Outcome::Answered { by, .. }) => Some(by),
            Ok(Outcome::Refused | Outcome::Unreachable | Outcome::TimedOut) | Err(_) => None,
        }
    }
}

impl Series<'_> {
    fn key(&self) -> (String, Transport, SocketAddr) {
        (self.row.client.clone(), self.transport, self.to)
    }

    /// Calls from the namespace of the calling thread.
    fn run(&self, limit: Duration) -> Vec<Call> {
        let mut calls = Vec::new();
        let mut answered = BTreeSet::new();
        let (most, limit) = match &self.row.expected {
            Expected::Refused | Expected::Says(_) => (1, limit),
            Expected::Dropped | Expected::Lost => (1, SILENCE),
            // A pair of addresses and ports is known for a while.
            Expected::Answered(..) if self.row.port.is_some() => (1, limit),
            Expected::Answered(How::Each, backends) => (PATIENCE * backends.len(), limit),
            Expected::Answered(How::Same | How::Still | How::Other, _) => (LOYALTY, limit),
            Expected::Answered(How::Within, _) => (SAMPLE, limit),
        };
        while calls.len() < most {
            let mut request = Request::new(self.transport, self.to).bound_to(self.row.port);
            if self.transport == Transport::Sctp {
                // A socket that is not bound tells its peer all of the host's addresses.
                request = request.bound_to_ip(self.own());
            }
            let outcome = match self.row.expected {
                Expected::Says(_) => health::ask(self.to, limit),
                Expected::Answered(..) | Expected::Refused | Expected::Dropped | Expected::Lost => {
                    request.send_here(limit)
                }
            };
            let word = request.word;
            let call = Call { word, outcome };
            let by = call.answered_by().map(str::to_owned);
            calls.push(call);
            // One that went wrong is enough.
            let Some(by) = by else { break };
            answered.insert(by);
            if let Expected::Answered(How::Each, backends) = &self.row.expected
                && calls.len() >= 2 * backends.len()
                && backends.keys().all(|name| answered.contains(name))
            {
                break;
            }
        }
        calls
    }

    /// The client's own address.
    fn own(&self) -> Option<IpAddr> {
        let ips = cast::ips(&self.row.client)?;
        ips.into_iter().find(|ip| ip.is_ipv4() == self.to.is_ipv4())
    }

    /// What is wrong with the calls; `before`: who answered this client before the last wait.
    fn complaint(
        &self,
        calls: &[Call],
        seen: &BTreeMap<String, SocketAddr>,
        before: Option<&str>,
    ) -> Option<String> {
        let mut answered: BTreeMap<&str, usize> = BTreeMap::new();
        for call in calls {
            let outcome = match &call.outcome {
                Ok(outcome) => outcome,
                Err(error) => return Some(format!("{error:#}")),
            };
            if let Outcome::Answered { by, .. } = outcome {
                *answered.entry(by).or_default() += 1;
            }
            if let Some(complaint) = self.complaint_of(outcome) {
                let arrived = seen.get(&call.word);
                let arrived = arrived.map_or("nothing arrived".to_owned(), |from| {
                    format!("it arrived from {from}")
                });
                return Some(format!("{complaint}; {arrived}"));
            }
        }
        let Expected::Answered(how, backends) = &self.row.expected else {
            return None;
        };
        match how {
            How::Each if answered.len() < backends.len() => {
                Some(format!("not all of them answered: {answered:?}"))
            }
            How::Same | How::Still | How::Other if answered.len() != 1 => {
                Some(format!("more than one answered: {answered:?}"))
            }
            How::Still | How::Other if before.is_none() => {
                Some("nobody answered before a wait".to_owned())
            }
            How::Still if !before.is_some_and(|by| answered.contains_key(by)) => {
                Some(format!("{answered:?} answered, and {before:?} before"))
            }
            How::Other if before.is_some_and(|by| answered.contains_key(by)) => {
                Some(format!("{before:?} answered as before"))
            }
            How::Each | How::Same | How::Within | How::Still | How::Other => None,
        }
    }

    fn complaint_of(&self, outcome: &Outcome) -> Option<String> {
        match (&self.row.expected, outcome) {
            (Expected::Refused, Outcome::Refused)
            | (Expected::Dropped | Expected::Lost, Outcome::TimedOut)
            | (Expected::Lost, Outcome::Unreachable) => None,
            (Expected::Says(words), Outcome::Answered { by, .. }) => {
                (words != by).then(|| format!("it says {by}"))
            }
            // A process of the node learns at once that its datagram was dropped.
            (Expected::Dropped, Outcome::Unreachable) if self.row.client == cast::NODE => None,
            (Expected::Answered(_, backends), Outcome::Answered { by, saw }) => {
                match backends.get(by) {
                    None => Some(format!("{by} answered (it saw {saw})")),
                    Some(sources) => self.complaint_of_source(by, *saw, sources),
                }
            }
            (
                Expected::Refused
                | Expected::Dropped
                | Expected::Lost
                | Expected::Says(_)
                | Expected::Answered(..),
                other,
            ) => Some(format!("{other:?}")),
        }
    }

    fn complaint_of_source(&self, by: &str, saw: SocketAddr, sources: &[Source]) -> Option<String> {
        let like = |ips: [IpAddr; 2]| ips.into_iter().find(|ip| ip.is_ipv4() == saw.is_ipv4());
        let mut ips = sources.iter().filter_map(|source| match source {
            Source::Client => like(cast::ips(&self.row.client)?),
            Source::Node => like(cast::ips(cast::NODE)?),
            Source::Target => Some(self.to.ip()),
        });
        if !ips.any(|ip| ip == saw.ip()) {
            return Some(format!("{by} saw {saw}, which is not {sources:?}"));
        }
        let replaced = Some(saw.ip()) != self.own() && client(self.row) != cast::NODE;
        let may_be_node_port = self.view.policy().node_ports.contains(&saw.port());
        (replaced && may_be_node_port)
            .then(|| format!("{by} saw {saw}, whose port may be a node port"))
    }
}

#[cfg(test)]
mod tests {
    use ferrule_model::network::Policy;

    use super::super::table;
    use super::*;

    /// What is wrong with answers of these backends, which saw these addresses.
    fn complaint(row: &str, outcomes: &[Outcome]) -> Option<String> {
        let rows = table::parse(row, &[]).unwrap();
        let view = NodeView::new(cast::NODE, Policy::default());
        let (transport, to) = rows[0].calls().next().unwrap();
        let series = Series {
            row: &rows[0],
            transport,
            to,
            view: &view,
        };
        let calls: Vec<Call> = outcomes
            .iter()
            .map(|outcome| Call {
                word: String::new(),
                outcome: Ok(outcome.clone()),
            })
            .collect();
        series.complaint(&calls, &BTreeMap::new(), Some("a1"))
    }

    fn by(name: &str, saw: &str) -> Outcome {
        Outcome::Answered {
            by: name.to_owned(),
            saw: saw.parse().unwrap(),
        }
    }

    #[test]
    fn every_deviation_is_a_complaint() {
        let (a1, b1) = (by("a1", "192.0.2.2:9"), by("b1", "192.0.2.1:9"));
        let each = "outside tcp4 node-a:30080 a1=client,b1 node-a";
        let same = "outside tcp4 node-a:30080 same:a1=client,b1 node-a";
        let within = "outside tcp4 node-a:30080 within:a1=client,b1 node-a";
        let refused = "outside tcp4 node-a:30080 refused";
        let dropped = "outside tcp4 node-a:30080 dropped";
        let lost = "outside tcp4 node-a:30080 lost";
        let still = "outside tcp4 node-a:30080 still:a1=client,b1 node-a";
        let other = "outside tcp4 node-a:30080 other:a1=client,b1 node-a";
        let says = "outside tcp4 node-a:32000 200/2";
        for (row, outcomes) in [
            (each, vec![a1.clone(), b1.clone(), a1.clone()]),
            (same, vec![b1.clone(), b1.clone()]),
            (within, vec![b1.clone()]),
            (refused, vec![Outcome::Refused]),
            (dropped, vec![Outcome::TimedOut]),
            (lost, vec![Outcome::TimedOut]),
            (lost, vec![Outcome::Unreachable]),
            (still, vec![a1.clone(), a1.clone()]),
            (other, vec![b1.clone(), b1.clone()]),
            (says, vec![by("200/2", "192.0.2.2:9")]),
            (
                "node-a udp4 node-a:30080 dropped",
                vec![Outcome::Unreachable],
            ),
            (
                "node-a tcp4 node-a:80 a1 node-a",
                vec![by("a1", "192.0.2.1:30000")],
            ),
            (
                "outside tcp4 10.96.0.1:80 a1 target",
                vec![by("a1", "10.96.0.1:9")],
            ),
        ] {
            assert_eq!(complaint(row, &outcomes), None, "{row}");
        }
        for (row, outcomes) in [
            (each, vec![a1.clone(), a1.clone()]),
            (each, vec![a1.clone(), b1.clone(), by("a2", "192.0.2.2:9")]),
            (each, vec![a1.clone(), by("b1", "192.0.2.2:9")]),
            (each, vec![a1.clone(), by("b1", "192.0.2.1:30000")]),
            (each, vec![a1.clone(), Outcome::Refused]),
            (each, vec![]),
            (same, vec![a1.clone(), b1.clone()]),
            (within, vec![by("a2", "192.0.2.1:9")]),
            (refused, vec![a1.clone()]),
            (refused, vec![Outcome::TimedOut]),
            (refused, vec![Outcome::Unreachable]),
            (dropped, vec![a1.clone()]),
            (dropped, vec![Outcome::Refused]),
            (dropped, vec![Outcome::Unreachable]),
            (lost, vec![Outcome::Refused]),
            (lost, vec![a1.clone()]),
            (still, vec![b1.clone()]),
            (still, vec![a1.clone(), b1.clone()]),
            (other, vec![a1.clone()]),
            (says, vec![by("503/0", "192.0.2.2:9")]),
            (says, vec![Outcome::Refused]),
        ] {
            assert!(complaint(row, &outcomes).is_some(), "{row}: {outcomes:?}");
        }
    }
}
