//! What the reconciler tells about itself: the answers to `status` and its
//! listings.
//!
//! Questions come over a channel and are answered between two passes, so that
//! an answer is never half of one state and half of another. Who asks waits for
//! a bounded time ([`Asker`]): a pass over tens of thousands of Services takes
//! a while, and then the last status has to do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferrule_api::TraceRequest;
use ferrule_api::status::{
    self, Drift, FrontendRow, FrontendRows, Health, MAX_LISTED, MAX_ROWS, ObjectCondition, Packets,
    PodStatus, Problem, Programmed, SocketStatus, SourceStatus, Status, cut,
};
use ferrule_datapath::{filter::counters, ipvs::Stats};
use ferrule_model::address::{Family, FrontendAddr};
use ferrule_model::condition::Condition;
use ferrule_model::desired::{Action, Frontend, FrontendKind};
use ferrule_model::names::{Attachment, ObjectName};
use ferrule_model::plan::ConditionRow;
use ferrule_model::service::ServiceKey;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::Reconciler;
use super::faults::{now, with_remedy};
use super::host_ports;
use super::trace::TraceReply;
use crate::config::Config;
use crate::source::{Report, Trouble};

/// How long an answer may take before an older one is given.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long host ports may take into the kernel; the plugin waits twice as long.
const HOST_PORTS: Duration = Duration::from_secs(10);

/// How long statistics of virtual services serve for the further parts of a listing.
const FRESH: Duration = Duration::from_secs(10);

/// What problems of pods' interfaces are about.
const INTERFACES: &str = "pods' interfaces";

/// Separates the parts of a cursor; less than any character of a name, so that
/// cursors are ordered as the rows are.
const SEPARATOR: char = '\u{1}';

/// Begins the cursors of host ports: greater than any that begins with a namespace.
const BEHIND_SERVICES: char = char::MAX;

/// A question.
#[derive(Debug)]
pub(crate) enum Query {
    /// How the node fares.
    Status(oneshot::Sender<Box<Status>>),
    /// A part of the list of frontends, behind a cursor.
    Frontends(Option<String>, oneshot::Sender<FrontendRows>),
    /// What becomes of a packet.
    Trace(Box<TraceRequest>, oneshot::Sender<TraceReply>),
    /// Another configuration, or why the file is none.
    Configure(Result<Box<Config>, String>),
    /// Whether the host ports of a lease can be had; answered when the kernel has them.
    HostPorts(Attachment, host_ports::Reply),
}

/// The way to ask.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    queries: mpsc::Sender<Query>,
    last: Arc<Mutex<Option<Box<Status>>>>,
}

impl Asker {
    pub(crate) fn new(queries: mpsc::Sender<Query>) -> Self {
        Self {
            queries,
            last: Arc::default(),
        }
    }

    /// How the node fares; the last answer, with a problem that says so, where
    /// there is none in time. `None` when there never was one.
    pub(crate) async fn status(&self) -> Option<Box<Status>> {
        let answer = self.ask(Query::Status).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(status) = answer {
            *last = Some(status.clone());
            return Some(status);
        }
        let mut status = last.clone()?;
        drop(last);
        let since = status.now;
        status.now = now();
        status.health = Health::Degraded;
        status.problems.insert(
            0,
            Problem {
                object: "agent".to_owned(),
                problem: format!(
                    "is busy changing the kernel and has not answered within {PATIENCE:?}; what is shown is older"
                ),
                remedy: "ask again in a moment; if it stays so, see the agent's log".to_owned(),
                since,
                attempts: 0,
            },
        );
        status.problems.truncate(MAX_LISTED);
        status.problem_count += 1;
        Some(status)
    }

    /// Hands over what was read of the configuration file.
    pub(crate) async fn configure(&self, read: Result<Box<Config>, String>) {
        // Who is gone takes nothing.
        let _gone = self.queries.send(Query::Configure(read)).await;
    }

    /// A part of the list of frontends; `None` without an answer in time.
    pub(crate) async fn frontends(&self, after: Option<String>) -> Option<FrontendRows> {
        self.ask(|reply| Query::Frontends(after, reply)).await
    }

    /// What becomes of a packet; `None` without an answer in time.
    pub(crate) async fn trace(&self, asked: Box<TraceRequest>) -> Option<TraceReply> {
        self.ask(|reply| Query::Trace(asked, reply)).await
    }

    /// Has the host ports of a lease brought into the kernel; `None` without an
    /// answer in time.
    pub(crate) async fn host_ports(
        &self,
        attachment: Attachment,
    ) -> Option<Result<(), host_ports::PortsFault>> {
        let query = |reply| Query::HostPorts(attachment, reply);
        self.ask_within(HOST_PORTS, query).await
    }

    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Option<T> {
        self.ask_within(PATIENCE, query).await
    }

    async fn ask_within<T>(
        &self,
        patience: Duration,
        query: impl FnOnce(oneshot::Sender<T>) -> Query,
    ) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.queries.send(query(reply)).await.ok()?;
            answer.await.ok()
        };
        timeout(patience, exchange).await.ok().flatten()
    }
}

/// Where the facts come from, and what is wrong there.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) last_event: Option<u64>,
    report: Report,
    started: u64,
}

impl Source {
    pub(super) fn new(name: String) -> Self {
        Self {
            name,
            last_event: None,
            report: Report::default(),
            started: now(),
        }
    }

    /// Takes in what is wrong now. What was told before in the same words stands since then.
    pub(super) fn take(&mut self, mut report: Report) {
        let words = |trouble: &Trouble| (trouble.object.clone(), trouble.problem.clone());
        let before = std::mem::take(&mut self.report.troubles).into_iter();
        let before: BTreeMap<_, _> = before.map(|old| (words(&old), old.since)).collect();
        for trouble in &mut report.troubles {
            let told = before.get(&words(trouble)).copied().flatten();
            trouble.since = trouble.since.or(told).or_else(|| Some(now()));
        }
        self.report = report;
    }

    /// What was not read to its end, in words: of what, since when and why.
    pub(super) fn missing(&self) -> String {
        let seconds = now().saturating_sub(self.started);
        let why = self.report.troubles.first();
        let why = why.map_or_else(String::new, |trouble| {
            let mut words = format!(" ({}: {})", trouble.object, trouble.problem);
            cut(&mut words);
            words
        });
        format!("{} since its start {seconds} s ago{why}", self.name)
    }

    fn problems(&self, complete: bool) -> Vec<Problem> {
        let troubles = self.report.troubles.iter().map(|trouble| Problem {
            object: trouble.object.clone(),
            problem: trouble.problem.clone(),
            remedy: trouble.remedy.clone(),
            since: trouble.since.unwrap_or(self.started),
            attempts: 0,
        });
        let incomplete = (!complete).then(|| Problem {
            object: self.name.clone(),
            problem: "not everything could be read yet: nothing is removed from the kernel"
                .to_owned(),
            remedy: "see the problems of the source; it goes on by itself when they are over"
                .to_owned(),
            since: self.started,
            attempts: 0,
        });
        troubles.chain(incomplete).collect()
    }
}

/// Counters of virtual services, read for a listing.
#[derive(Debug, Default)]
pub(super) struct Statistics {
    read: Option<Instant>,
    of: BTreeMap<ServiceKey, Stats>,
}

impl Reconciler {
    pub(super) async fn answer(&mut self, query: Query) {
        // Who asked may have given up meanwhile.
        match query {
            Query::Status(reply) => {
                let _gave_up = reply.send(Box::new(self.status().await));
            }
            Query::Frontends(after, reply) => {
                let _gave_up = reply.send(self.frontends(after).await);
            }
            Query::Trace(asked, reply) => {
                let _gave_up = reply.send(self.trace(&asked).await);
            }
            Query::Configure(read) => self.configure(read).await,
            Query::HostPorts(attachment, reply) => self.claim_host_ports(attachment, reply),
        }
    }

    async fn status(&mut self) -> Status {
        let mut problems: Vec<Problem> = self.faults.problems().collect();
        problems.extend(self.source.problems(self.complete));
        problems.extend(self.health_checks.problems());
        problems.extend(self.events.problem());
        problems.extend(self.of_config.clone());
        let leases = self.pods.leases().trouble();
        let looks = self.pods.look_trouble();
        problems.extend(leases.map(|trouble| {
            let about = "no address can be leased or released";
            Self::of_pods("leases", about, &trouble)
        }));
        problems.extend(looks.map(|trouble| {
            let about = "cannot be compared with the leases";
            Self::of_pods(INTERFACES, about, &trouble)
        }));
        self.note_pods();
        problems.extend(self.of_pods.iter().cloned());
        let problem_count = problems.len();
        problems.truncate(MAX_LISTED);
        for problem in &mut problems {
            cut(&mut problem.problem);
            cut(&mut problem.object);
        }
        let (conditions, condition_count) = self.conditions();
        Status {
            health: if problem_count == 0 {
                Health::Healthy
            } else {
                Health::Degraded
            },
            node: self.view.node().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            started: self.source.started,
            now: now(),
            source: self.source_status(),
            programmed: self.programmed(),
            last_change: self.last_change.clone(),
            pods: PodStatus {
                leases: self.pods.leases().count(),
                ranges: self.pods.leases().usage(),
                tidied: self.pods.tidied(),
            },
            draining: self.draining(),
            drift: Drift {
                repaired: self
                    .drifts
                    .repaired
                    .iter()
                    .map(|(kind, count)| ((*kind).to_owned(), *count))
                    .collect(),
                last: self.drifts.last.as_ref().map(|(_, words)| words.clone()),
                last_at: self.drifts.last.as_ref().map(|(at, _)| *at),
            },
            audit: self.audit_status(),
            packets: self.packets().await,
            failed_operations: self.faults.failed(),
            events: self.events.tally().counts(),
            socket: SocketStatus::default(),
            sysctls: self.tunings.status(&self.settings.sysctls),
            problems,
            problem_count,
            conditions,
            condition_count,
        }
    }

    fn source_status(&self) -> SourceStatus {
        let cluster = self.view.cluster();
        SourceStatus {
            name: self.source.name.clone(),
            complete: self.complete,
            services: cluster.service_count(),
            endpoint_slices: cluster.slice_count(),
            nodes: cluster.nodes().count(),
            service_cidrs: cluster.service_cidrs().count(),
            last_event: self.source.last_event,
        }
    }

    fn programmed(&self) -> Programmed {
        let desired = self.view.desired();
        let mut programmed = Programmed {
            routes: self.network.route_count(),
            node_addresses: desired
                .facts()
                .node_ports
                .iter()
                .take(MAX_LISTED)
                .map(ToString::to_string)
                .collect(),
            pending: self.dirty.len() + self.waiting.len(),
            ..Programmed::default()
        };
        let mut services = BTreeSet::new();
        for (_, frontend) in desired.frontends() {
            programmed.frontends += 1;
            match frontend.action() {
                Action::Reject => programmed.rejecting += 1,
                Action::Drop => programmed.dropping += 1,
                Action::Balance => {}
            }
            match frontend.kind {
                FrontendKind::HostPort => {
                    programmed.host_ports += 1;
                    continue;
                }
                FrontendKind::NodePort => programmed.node_ports += 1,
                FrontendKind::ClusterIP | FrontendKind::ExternalIP | FrontendKind::LoadBalancer => {
                }
            }
            services.insert(&frontend.holder);
        }
        programmed.services = services.len();
        programmed.no_local_endpoints = self.no_local_endpoints();
        if let Some(observed) = &self.observed {
            programmed.vips = observed.bound_vips().count();
            programmed.virtual_services = observed.services.len();
            programmed.real_servers = observed.services.values().map(|s| s.servers.len()).sum();
        }
        programmed
    }

    /// Service ports whose policy Local has nobody to send to here, by the policy.
    fn no_local_endpoints(&self) -> BTreeMap<String, u64> {
        let (mut internal, mut external) = (BTreeSet::new(), BTreeSet::new());
        for (_, frontend) in self.view.desired().frontends() {
            if frontend.action() != Action::Drop {
                continue;
            }
            let ports = match frontend.kind {
                FrontendKind::ClusterIP => &mut internal,
                FrontendKind::NodePort | FrontendKind::ExternalIP | FrontendKind::LoadBalancer => {
                    &mut external
                }
                FrontendKind::HostPort => continue,
            };
            ports.insert((&frontend.holder, &frontend.port_name));
        }
        let counts = [("internal", internal.len()), ("external", external.len())];
        let counts = counts.into_iter();
        counts
            .map(|(policy, count)| (policy.to_owned(), u64::try_from(count).unwrap_or(u64::MAX)))
            .collect()
    }

    fn audit_status(&self) -> status::Audit {
        let total = self.observed.as_ref().map_or(0, |o| o.services.len());
        status::Audit {
            budget_percent: self.audit.budget * 100.0,
            done: self.audit.done.min(total),
            total,
            rounds: self.audit.rounds,
            last_round: self.audit.last_round,
            round_estimate: self.audit.estimate(total),
            services_at: self.audit.services_at,
            filter_at: self.audit.filter_at,
        }
    }

    async fn packets(&self) -> Packets {
        let mut packets = Packets::default();
        let Some(kernel) = &self.kernel else {
            return packets;
        };
        // A kernel that does not answer is a problem of the next pass.
        let Ok(counted) = kernel.packet_counters().await else {
            return packets;
        };
        let take = |names: &[&str]| {
            let found = names.iter().filter_map(|name| {
                let count = counted.get(*name)?;
                Some(((*name).to_owned(), *count))
            });
            found.collect()
        };
        packets.counters = take(&counters::REFUSED);
        packets.counters.extend(take(&counters::DROPPED));
        packets.masqueraded = take(&counters::MASQUERADED);
        packets
    }

    fn pool_problems(&self) -> Vec<Problem> {
        let ranges = self.pods.leases().usage();
        let full = ranges.into_iter().filter(|range| range.free == 0);
        full.map(|range| Problem {
            object: format!("pod range {}", range.range),
            problem: format!(
                "all {} addresses are leased: no pod can be started",
                range.used
            ),
            remedy: "remove pods, or give the Node a larger spec.podCIDRs".to_owned(),
            since: now(),
            attempts: 0,
        })
        .collect()
    }

    /// Pods can neither come nor go in order while the disk refuses; and what is left
    /// behind stays while the interfaces cannot be looked at.
    fn of_pods(object: &str, about: &str, trouble: &crate::leases::Trouble) -> Problem {
        let (problem, remedy) = with_remedy(&trouble.words);
        Problem {
            object: object.to_owned(),
            problem: format!("{about}: {problem}"),
            remedy,
            since: trouble.since,
            attempts: trouble.attempts,
        }
    }

    /// Looks what is wrong with pods' addresses: done after each pass, so that it is
    /// known since when.
    pub(super) fn note_pods(&mut self) {
        let before = std::mem::take(&mut self.of_pods);
        let mut problems = self.pool_problems();
        problems.extend(self.loose_problem());
        for problem in &mut problems {
            let told = before.iter().find(|told| told.object == problem.object);
            problem.since = told.map_or(problem.since, |told| told.since);
        }
        self.of_pods = problems;
    }

    /// Those pods work, but nobody knows whose they are.
    fn loose_problem(&self) -> Option<Problem> {
        let withheld = self.pods.withheld();
        let (ip, interface) = withheld.first_key_value()?;
        Some(Problem {
            object: INTERFACES.to_owned(),
            problem: format!(
                "{} addresses are in use by interfaces that cannot be given a lease (the first: {ip} at {interface}): no other pod gets them",
                withheld.len()
            ),
            remedy: "delete the pods that the interfaces belong to; `ip -d link show` tells their containers".to_owned(),
            since: now(),
            attempts: 0,
        })
    }

    /// The first of what is to be said about objects, and how much that is.
    fn conditions(&self) -> (Vec<ObjectCondition>, usize) {
        let mut rows: Vec<ConditionRow> = self
            .view
            .conditions()
            .iter()
            .map(ConditionRow::from)
            .collect();
        let of_routes = self.network.conditions().iter();
        rows.extend(of_routes.map(|condition: &Condition| ConditionRow::from(condition)));
        rows.extend(self.source.report.conditions.iter().cloned());
        rows.sort();
        rows.dedup();
        let count = rows.len();
        let listed = rows.into_iter().take(MAX_LISTED).map(|mut row| {
            cut(&mut row.message);
            cut(&mut row.object);
            ObjectCondition {
                object: row.object,
                reason: row.reason,
                message: row.message,
            }
        });
        (listed.collect(), count)
    }

    async fn frontends(&mut self, after: Option<String>) -> FrontendRows {
        let stale = self
            .statistics
            .read
            .is_none_or(|read| read.elapsed() > FRESH);
        if (after.is_none() || stale)
            && let Some(kernel) = &self.kernel
            && let Ok(statistics) = kernel.service_statistics().await
        {
            self.statistics.of = statistics;
            self.statistics.read = Some(Instant::now());
        }
        let limit = usize::try_from(MAX_ROWS).unwrap_or(usize::MAX);
        let mut rows = FrontendRows::default();
        let mut last = None;
        let from = after.as_deref().map(service_of);
        for (name, mut frontends) in self.view.desired().frontends_by_service(from.as_ref()) {
            frontends.sort_by_key(|(addr, frontend)| {
                (
                    &frontend.port_name,
                    Family::of(addr.ip),
                    frontend.kind,
                    *addr,
                )
            });
            for (index, (addr, frontend)) in frontends.into_iter().enumerate() {
                let cursor = cursor(name, index);
                if after.as_ref().is_some_and(|after| cursor <= *after) {
                    continue;
                }
                if rows.rows.len() == limit {
                    rows.next = last;
                    return rows;
                }
                rows.rows.push(self.frontend_row(addr, frontend));
                last = Some(cursor);
            }
        }
        for (index, (addr, frontend)) in self.view.desired().host_ports().enumerate() {
            let cursor = format!("{BEHIND_SERVICES}{index:06}");
            if after.as_ref().is_some_and(|after| cursor <= *after) {
                continue;
            }
            if rows.rows.len() == limit {
                rows.next = last;
                return rows;
            }
            rows.rows.push(self.frontend_row(addr, frontend));
            last = Some(cursor);
        }
        rows
    }

    fn frontend_row(&self, addr: FrontendAddr, frontend: &Frontend) -> FrontendRow {
        let key = addr.into();
        let statistics = self.statistics.of.get(&key).copied().unwrap_or_default();
        let wanted = frontend.virtual_service();
        let observed = self.observed.as_ref();
        FrontendRow {
            service: frontend.holder.to_string(),
            port: frontend.port_name.clone(),
            kind: frontend.kind.to_string(),
            address: addr.to_string(),
            action: frontend.action().name().to_owned(),
            scheduler: frontend.scheduling.scheduler.name().to_owned(),
            backends: frontend.backends.len(),
            programmed: observed.is_some_and(|o| o.serves(&key, wanted.as_ref())),
            connections: statistics.connections,
            packets_in: statistics.packets_in,
            packets_out: statistics.packets_out,
            bytes_in: statistics.bytes_in,
            bytes_out: statistics.bytes_out,
        }
    }
}

fn cursor(name: &ObjectName, index: usize) -> String {
    format!(
        "{}{SEPARATOR}{}{SEPARATOR}{index:06}",
        name.namespace, name.name
    )
}

/// The Service that a cursor stands in; whatever a client sends, it is some place in the list.
fn service_of(cursor: &str) -> ObjectName {
    let mut parts = cursor.split(SEPARATOR);
    let mut part = || parts.next().unwrap_or_default();
    ObjectName::new(part(), part())
}
