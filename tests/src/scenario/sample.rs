//! Random packets in random clusters: what the model says of each becomes of it in the
//! kernel.
//!
//! The [`cast`] stands once; one cluster after the other is programmed on node-a, each
//! over what the one before has left. The verdicts themselves are held against the
//! specification in `model/tests/verdicts`; here they are held against the kernel.

mod cluster;

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use ferrule_datapath::filter::counters::DROPPED;
use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::plan::Plan;
use ferrule_model::verdict::{Packet, Source, Verdict, verdict};
use ferrule_model::view::NodeView;

use super::cast::{self, Cast};
use super::kernel;
use crate::context::Context;
use crate::dump::Table;
use crate::random::{self, Random};
use crate::sock::{ANSWER, Outcome, Request, Transport};

/// Repeats a sample.
const SEED: &str = "FERRULE_VERDICT_SEED";

/// How many clusters there are in it.
const CLUSTERS: &str = "FERRULE_VERDICT_CLUSTERS";

/// Clusters unless told otherwise.
const USUAL: u64 = 10;

/// Packets in each cluster; all are sent at the same time.
const PACKETS: usize = 12;

/// How often one is sent that is answered: other backends may have the next one.
const TIMES: usize = 3;

/// How long a call that must vanish is given; our counters say that it was dropped.
const SILENCE: Duration = Duration::from_millis(1500);

/// Who calls, and the device by which it comes to node-a.
const CLIENTS: [(&str, Option<&str>); 7] = [
    ("node-a", None),
    ("client-a", Some("ferclient-a")),
    ("a1", Some("fera1")),
    ("a2", Some("fera2")),
    ("client-b", Some("uplink")),
    ("outside", Some("uplink")),
    ("stranger", Some("uplink")),
];

/// Members that listen on their own address, and whether they are on node-a.
const BACKENDS: [(&str, bool); 7] = [
    ("a1", true),
    ("a2", true),
    ("host-a", true),
    ("b1", false),
    ("b2", false),
    ("host-b", false),
    ("external", false),
];

/// One call.
#[derive(Clone, Copy, Debug)]
struct Call {
    client: &'static str,
    packet: Packet<'static>,
}

/// A call, what the model says of it, and who may answer as whom it sees.
struct Trial {
    call: Call,
    verdict: Verdict,
    receivers: BTreeMap<String, Receiver>,
}

/// Who may get a packet.
#[derive(Clone, Copy, Debug)]
struct Receiver {
    sees: IpAddr,
    /// Whether its answer comes back by way of node-a: else the client does not know
    /// who it is that answers.
    answers: bool,
    /// Whether the address that it sees stands for the client's.
    replaced: bool,
}

pub(super) fn packets_fare_as_the_model_says(context: &mut Context) -> anyhow::Result<()> {
    let seed = random::seed(SEED)?;
    let clusters = random::from_environment(CLUSTERS)?.unwrap_or(USUAL);
    writeln!(io::stdout(), "     {SEED}={seed} {CLUSTERS}={clusters}")?;
    let mut random = Random::new(seed);
    let nodes = super::objects(&super::read(&super::folder().join(super::CAST))?)?;
    let cast = Cast::assemble(context, false)?;
    let own = cast.own_addresses()?;
    let (mut drops, mut kinds) = (0, BTreeMap::new());
    for number in 0..clusters {
        let mut view = cluster::view(&mut random, &nodes);
        view.set_own(own.clone());
        let failed = || format!("{SEED}={seed}, cluster {number}");
        kernel::program(cast.node(), &view).with_context(failed)?;
        let trials: Vec<Trial> = (0..PACKETS)
            .map(|_| Trial::new(&mut random, &view))
            .collect::<anyhow::Result<_>>()?;
        for trial in &trials {
            *kinds.entry(trial.kind()).or_insert(0_usize) += 1;
            drops += u64::from(matches!(trial.verdict, Verdict::Dropped(_)));
        }
        let wrong = send_all(&trials, &cast, &view)?;
        if !wrong.is_empty() {
            let plan = serde_json::to_string(&Plan::new(&view, []))?;
            return Err(anyhow!("{}\n{plan}", wrong.join("\n"))).with_context(failed);
        }
    }
    writeln!(io::stdout(), "     {kinds:?}")?;
    let table = Table::list(cast.node(), kernel::TABLE)?;
    let counted = DROPPED.into_iter().map(|counter| table.packets(counter));
    let counted = counted.sum::<anyhow::Result<u64>>()?;
    ensure!(
        counted >= drops,
        "{drops} calls vanished, and the counters know of {counted} dropped packets"
    );
    // A sample of one kind would prove little.
    let missing: Vec<&str> = ["forwarded", "refused", "dropped", "passed"]
        .into_iter()
        .filter(|kind| clusters >= USUAL && !kinds.contains_key(kind))
        .collect();
    ensure!(missing.is_empty(), "no packet was {missing:?}");
    Ok(())
}

/// Sends every packet. Returns what is wrong with what became of them.
fn send_all(trials: &[Trial], cast: &Cast, view: &NodeView) -> anyhow::Result<Vec<String>> {
    let calls: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = trials
            .iter()
            .map(|trial| scope.spawn(move || trial.send(cast)))
            .collect();
        let joined = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
        joined.collect()
    });
    let arrived: BTreeMap<String, IpAddr> = cast
        .seen()
        .map(|seen| (seen.word, seen.from.ip()))
        .collect();
    let mut wrong = Vec::new();
    for (trial, calls) in trials.iter().zip(calls) {
        let calls = calls.map_err(|_| anyhow!("a client panicked"))??;
        let complaints = calls
            .iter()
            .filter_map(|made| trial.complaint(made, &arrived, view));
        wrong.extend(complaints.map(|complaint| {
            let Trial { call, verdict, .. } = trial;
            format!("{call:?}: {complaint}; the model says {verdict:?}")
        }));
    }
    Ok(wrong)
}

/// A call that was made.
struct Made {
    word: String,
    outcome: Outcome,
}

impl Trial {
    /// A random packet, of which it can be told what became.
    fn new(random: &mut Random, view: &NodeView) -> anyhow::Result<Self> {
        let nat = view.source_nat();
        loop {
            let call = cluster::call(random, view)?;
            let verdict = verdict(view.desired(), &nat, &call.packet);
            let receivers = receivers(&call, &verdict)?;
            // Of a handshake whose answer goes astray a server tells nobody.
            let silent = call.packet.target.protocol == Protocol::Tcp
                && receivers.values().any(|receiver| !receiver.answers);
            let nowhere = matches!(verdict, Verdict::Passed(_)) && receivers.is_empty();
            // What a host sends to itself comes by no device.
            let packet = &call.packet;
            let never_leaves = packet.device.is_some() && packet.source == packet.target.ip;
            if !silent && !nowhere && !never_leaves {
                return Ok(Self {
                    call,
                    verdict,
                    receivers,
                });
            }
        }
    }

    fn kind(&self) -> &'static str {
        match self.verdict {
            Verdict::Forwarded(_) => "forwarded",
            Verdict::Refused(_) => "refused",
            Verdict::Dropped(_) => "dropped",
            Verdict::Unallocated => "unallocated",
            Verdict::Served => "served",
            Verdict::Passed(_) => "passed",
        }
    }

    fn send(&self, cast: &Cast) -> anyhow::Result<Vec<Made>> {
        let FrontendAddr { ip, port, protocol } = self.call.packet.target;
        let transport = match protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
            Protocol::Sctp => Transport::Sctp,
        };
        let all_answer = self.receivers.values().all(|receiver| receiver.answers);
        let (times, limit) = match self.verdict {
            Verdict::Forwarded(_) | Verdict::Passed(_) | Verdict::Served if all_answer => {
                (TIMES, ANSWER)
            }
            Verdict::Refused(_) | Verdict::Unallocated => (1, ANSWER),
            Verdict::Forwarded(_) | Verdict::Passed(_) | Verdict::Served | Verdict::Dropped(_) => {
                (1, SILENCE)
            }
        };
        cast.member(self.call.client)?.run(|| {
            let mut calls = Vec::new();
            for _ in 0..times {
                let request = Request::new(transport, SocketAddr::new(ip, port));
                let outcome = request.send_here(limit)?;
                calls.push(Made {
                    word: request.word,
                    outcome,
                });
            }
            Ok(calls)
        })
    }

    fn complaint(
        &self,
        made: &Made,
        arrived: &BTreeMap<String, IpAddr>,
        view: &NodeView,
    ) -> Option<String> {
        let told = format!("{:?}", made.outcome);
        let arrived = arrived.get(&made.word);
        match (&self.verdict, &made.outcome) {
            (
                Verdict::Forwarded(_) | Verdict::Passed(_) | Verdict::Served,
                Outcome::Answered { by, saw },
            ) => match self.receivers.get(by) {
                None => Some(format!("{by} answered, who saw {saw}")),
                Some(receiver) => receiver
                    .complaint(*saw, view)
                    .map(|complaint| format!("{by} {complaint}")),
            },
            // Whose answer goes astray has got the packet all the same.
            (Verdict::Forwarded(_), Outcome::TimedOut) => {
                let mut receivers = self.receivers.values();
                let silent = |sees| receivers.any(|one| !one.answers && one.sees == sees);
                let expected = arrived.copied().is_some_and(silent);
                (!expected).then(|| format!("{told}, and it arrived from {arrived:?}"))
            }
            (Verdict::Refused(_) | Verdict::Unallocated, Outcome::Refused) => {
                arrived.map(|from| format!("it was refused, and arrived from {from}"))
            }
            (Verdict::Dropped(_), Outcome::TimedOut) => {
                arrived.map(|from| format!("it arrived from {from}"))
            }
            // A process of the node learns at once that its datagram was dropped.
            (Verdict::Dropped(_), Outcome::Unreachable) if self.call.client == cast::NODE => None,
            (
                Verdict::Forwarded(_)
                | Verdict::Refused(_)
                | Verdict::Dropped(_)
                | Verdict::Unallocated
                | Verdict::Served
                | Verdict::Passed(_),
                _,
            ) => Some(told),
        }
    }
}

impl Receiver {
    fn complaint(self, saw: SocketAddr, view: &NodeView) -> Option<String> {
        if saw.ip() != self.sees {
            return Some(format!("saw {saw}, not {}", self.sees));
        }
        let may_be_node_port = view.policy().node_ports.contains(&saw.port());
        (self.replaced && may_be_node_port)
            .then(|| format!("saw {saw}, whose port may be a node port"))
    }
}

/// Who may get the packet. For one that passes, nobody, if nobody listens there.
fn receivers(call: &Call, verdict: &Verdict) -> anyhow::Result<BTreeMap<String, Receiver>> {
    let packet = &call.packet;
    let own = cast::ips(cast::NODE).context("there is a node")?;
    let own = own[usize::from(packet.target.ip.is_ipv6())];
    let receiver = |source, here: bool| {
        let (sees, replaced) = match source {
            Source::Kept => (packet.source, false),
            Source::Replaced(_) => (own, true),
        };
        // A pod of node-a has its answers by way of it wherever they come from.
        let on_node = packet.device.is_none_or(|device| device != "uplink");
        Receiver {
            sees,
            answers: replaced || here || on_node,
            replaced,
        }
    };
    let mut receivers = BTreeMap::new();
    match verdict {
        Verdict::Forwarded(leads) => {
            for (addr, lead) in leads {
                let (name, here) = listens(addr.ip, addr.port)?;
                receivers.insert(name.to_owned(), receiver(lead.source, here));
            }
        }
        Verdict::Served => {
            let kubelet = receiver(Source::Kept, true);
            receivers.insert("kubelet".to_owned(), kubelet);
        }
        Verdict::Passed(source) => {
            let at_kubelet = packet.target.ip == own && packet.target.port == cast::KUBELET;
            if at_kubelet {
                receivers.insert("kubelet".to_owned(), receiver(*source, true));
            } else if let Ok((name, here)) = listens(packet.target.ip, packet.target.port) {
                receivers.insert(name.to_owned(), receiver(*source, here));
            }
        }
        Verdict::Refused(_) | Verdict::Dropped(_) | Verdict::Unallocated => {}
    }
    Ok(receivers)
}

/// Which backend listens there, and whether it is on node-a.
fn listens(ip: IpAddr, port: u16) -> anyhow::Result<(&'static str, bool)> {
    let mut backends = BACKENDS.into_iter();
    let at = |name| cast::ips(name).is_some_and(|ips: [IpAddr; 2]| ips.contains(&ip));
    let there = backends.find(|(name, _)| port == cast::PORT && at(name));
    there.with_context(|| format!("nobody listens on {ip}, port {port}"))
}
