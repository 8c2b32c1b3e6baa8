//! `trace` of every call of every scenario, held against the row that says what becomes
//! of it: without a kernel, from the manifests alone.
//!
//! The model tells the ways; of one packet for each scenario the command has to tell the
//! same. What a machine alone knows, its further addresses, is told to the model where a
//! scenario has them, and nothing is asked of the command there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use ferrule_model::address::{FrontendAddr, Protocol};
use ferrule_model::names::IfName;
use ferrule_model::source_nat::OwnAddress;
use ferrule_model::trace::{Question, Trace};
use ferrule_model::view::NodeView;
use ipnetwork::IpNetwork;

use super::cast::{self, NODE};
use super::table::{Expected, How, Row, Source};
use super::{CAST, Scenario, cast_of, folder, names, read};
use crate::context::Context;
use crate::netns;
use crate::sock::Transport;

/// Schedulers that lead to some of the backends only until these are full.
const FILLING: [&str; 2] = ["fo", "ovf"];

/// Who may listen where, beside the kubelet of node-a.
const LISTENERS: [&str; 7] = ["a1", "a2", "b1", "b2", "host-a", "host-b", "external"];

/// All of them agree; and not a handful of calls of one kind.
pub(super) fn agree_with_their_packets(context: &mut Context) -> anyhow::Result<()> {
    let agent = context.binary("ferrule-agent")?;
    let mut wrong = Vec::new();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for name in names()? {
        let scenario = Scenario::read(&folder().join(&name))?;
        let view = view(&scenario)?;
        let mut asked = None;
        for row in &scenario.rows {
            for (transport, to) in row.calls() {
                let question = question(&view, row, transport, to)?;
                let trace = Trace::new(&view, &question)?;
                *kinds.entry(trace.outcome.verdict.clone()).or_default() += 1;
                if let Some(complaint) = complaint(row, to, &trace) {
                    wrong.push(format!(
                        "{name}/packets.txt:{}: {} to {to} {transport:?}: {complaint}; trace says {}",
                        row.line,
                        row.client,
                        serde_json::to_string(&trace)?
                    ));
                }
                asked = asked.or(Some((question, trace)));
            }
        }
        if let Some((question, trace)) = asked
            && scenario.existing("addresses.txt").is_none()
        {
            let told = command(context, &agent, &scenario, &name, &question)?;
            if told != trace {
                wrong.push(format!(
                    "{name}: the command says {told:?}, the model {trace:?}"
                ));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    for kind in ["forwarded", "refused", "dropped", "served", "passed"] {
        let number = kinds.get(kind).copied().unwrap_or_default();
        ensure!(number >= 4, "{number} of the calls are {kind}: {kinds:?}");
    }
    Ok(())
}

/// As in a plan; with the machine's addresses where it has more than the Node object says.
fn view(scenario: &Scenario) -> anyhow::Result<NodeView> {
    let mut view = scenario.view()?;
    if let Some(addresses) = scenario.existing("addresses.txt") {
        let ips = cast::ips(NODE).context("there is a node")?;
        let mut networks = Vec::new();
        for (ip, prefix) in ips.into_iter().zip([24, 64]) {
            networks.push(IpNetwork::new(ip, prefix)?);
        }
        for line in read(&addresses)?.lines() {
            networks.push(line.parse()?);
        }
        let own = networks.into_iter().map(|network| {
            Ok(OwnAddress {
                ip: network.ip(),
                link: IpNetwork::new(network.network(), network.prefix())?,
                device: "uplink".to_owned(),
            })
        });
        view.set_own(own.collect::<anyhow::Result<_>>()?);
    }
    Ok(view)
}

fn question(
    view: &NodeView,
    row: &Row,
    transport: Transport,
    to: SocketAddr,
) -> anyhow::Result<Question> {
    let ips = cast::ips(&row.client).context("who calls has addresses")?;
    let from = ips[usize::from(to.is_ipv6())];
    let protocol = match transport {
        Transport::Tcp => Protocol::Tcp,
        Transport::Udp => Protocol::Udp,
        Transport::Sctp => Protocol::Sctp,
    };
    let networks = view.networks();
    let mut here = networks.node_pods.iter();
    let derived = here.any(|network| network.contains(from)) || is_of_node(from);
    let device = (!derived).then(|| IfName::try_from("uplink".to_owned()));
    let to = FrontendAddr::new(to.ip(), to.port(), protocol);
    Ok(Question::new(from, to, device.transpose()?)?)
}

fn is_of_node(ip: IpAddr) -> bool {
    cast::ips(NODE).is_some_and(|ips| ips.contains(&ip))
}

/// Where the trace and the row differ.
fn complaint(row: &Row, to: SocketAddr, trace: &Trace) -> Option<String> {
    let verdict = trace.outcome.verdict.as_str();
    match &row.expected {
        Expected::Answered(how, backends) => {
            let seen = match receivers(trace, to) {
                Ok(seen) => seen,
                Err(complaint) => return Some(complaint),
            };
            complaint_of_receivers(row, to, trace, *how, backends, &seen)
        }
        Expected::Refused => {
            // Where nobody listens the kernel refuses what passes.
            let nobody = verdict == "passed" && listener(to).is_none();
            (verdict != "refused" && !nobody).then(|| "it is refused".to_owned())
        }
        Expected::Dropped => (verdict != "dropped").then(|| "it is dropped".to_owned()),
        // By another program, or for want of a way back: of these a trace knows nothing.
        Expected::Lost => None,
        Expected::Says(words) => {
            let reaches = match words.as_str() {
                "closed" => ["refused", "passed"],
                _ => ["served", "passed"],
            };
            (!reaches.contains(&verdict)).then(|| format!("a health check says {words}"))
        }
    }
}

fn complaint_of_receivers(
    row: &Row,
    to: SocketAddr,
    trace: &Trace,
    how: How,
    backends: &BTreeMap<String, Vec<Source>>,
    seen: &BTreeMap<String, IpAddr>,
) -> Option<String> {
    let expected: BTreeSet<&String> = backends.keys().collect();
    let told: BTreeSet<&String> = seen.keys().collect();
    let balancing = trace.balancing.as_ref();
    let filling = balancing.is_some_and(|how| FILLING.contains(&how.scheduler.as_str()));
    let agrees = match how {
        How::Each if filling => told.is_subset(&expected),
        How::Each => told == expected,
        How::Same | How::Within | How::Still | How::Other => expected.is_subset(&told),
    };
    if !agrees || told.is_empty() {
        return Some(format!("{how:?} of {expected:?} answer, not {told:?}"));
    }
    let wrong = seen.iter().find_map(|(name, ip)| {
        let sources = backends.get(name)?;
        let mut ips = sources.iter().filter_map(|source| match source {
            Source::Client => cast::ips(&row.client).map(|ips| ips[usize::from(to.is_ipv6())]),
            Source::Node => cast::ips(NODE).map(|ips| ips[usize::from(to.is_ipv6())]),
            Source::Target => Some(to.ip()),
        });
        (!ips.any(|known| known == *ip)).then_some((name, ip, sources))
    });
    wrong.map(|(name, ip, sources)| format!("{name} sees {ip}, not {sources:?}"))
}

/// Who gets the packet by the trace, and whom each sees.
fn receivers(trace: &Trace, to: SocketAddr) -> Result<BTreeMap<String, IpAddr>, String> {
    let node = cast::ips(NODE).ok_or("there is no node")?;
    let node = node[usize::from(to.is_ipv6())];
    let sees = |replaced: bool| if replaced { node } else { trace.client.source };
    match trace.outcome.verdict.as_str() {
        "forwarded" => {
            let able = trace
                .backends
                .iter()
                .filter(|backend| backend.percent > 0.0);
            let named = able.map(|backend| {
                let at = SocketAddr::new(backend.address, backend.port);
                let name = listener(at).ok_or_else(|| format!("nobody listens at {at}"))?;
                Ok((name, sees(backend.sees.as_deref() == Some("node"))))
            });
            named.collect()
        }
        "served" | "passed" => {
            let name = listener(to).ok_or_else(|| format!("nobody listens at {to}"))?;
            Ok([(name, sees(trace.outcome.masquerade.is_some()))].into())
        }
        other => Err(format!("it is answered, and not {other}")),
    }
}

/// Who listens at an address and port.
fn listener(at: SocketAddr) -> Option<String> {
    if at.port() == cast::KUBELET {
        return Some("kubelet".to_owned());
    }
    let mut names = LISTENERS.into_iter().filter(|_| at.port() == cast::PORT);
    let name = names.find(|name| cast::ips(name).is_some_and(|ips| ips.contains(&at.ip())))?;
    Some(name.to_owned())
}

/// The same of the command.
fn command(
    context: &Context,
    agent: &Path,
    scenario: &Scenario,
    name: &str,
    question: &Question,
) -> anyhow::Result<Trace> {
    let manifests = context.folder().join(name);
    fs::create_dir(&manifests)?;
    fs::copy(cast_of(&scenario.folder), manifests.join(CAST))?;
    let own = "manifests.yaml";
    fs::copy(scenario.folder.join(own), manifests.join(own))?;
    let mut command = Command::new(agent);
    command.args(["trace", "--json", "--node", NODE]);
    command.arg("--manifests").arg(&manifests);
    command.args(["--from", &question.from.to_string()]);
    command.args(["--to", &question.to.to_string()]);
    if let Some(device) = &question.device {
        command.args(["--device", device.as_str()]);
    }
    if let Some(config) = scenario.existing("config.yaml") {
        command.arg("--config").arg(config);
    }
    let printed = netns::check(&mut command)?;
    Ok(serde_json::from_str(&printed)?)
}
