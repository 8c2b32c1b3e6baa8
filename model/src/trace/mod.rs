//! The way of one packet through this node, in the stable form that people read and
//! script against.
//!
//! Nothing is decided here: [`crate::verdict`] says what becomes of the packet and by
//! which steps, and this tells it, with the names of the objects that it is about.
//! [`live`] holds the same steps against what the kernel was seen to hold.
//!
//! Fields are added, never renamed; [`VERSION`] rises when a meaning changes. Every
//! list has a bound, so that a trace fits into one line of the agent's socket.

pub mod live;
mod odds;
mod question;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use self::live::Live;
pub use self::question::{Question, QuestionError, parse_from, parse_to};
use crate::address::{BackendAddr, Family};
use crate::binding::Binding;
use crate::desired::{Frontend, FrontendKind, Scope};
use crate::endpoints::{BackendState, Backends};
use crate::ownership::HOST_VETH_PREFIX;
use crate::policy_words::TrafficPolicy;
use crate::service::{Scheduling, ServiceKey, Weight};
use crate::source_nat::SourceNat;
use crate::verdict::{self, Loss, Packet, Refusal, Source, Steps, Verdict, Within};
use crate::view::NodeView;

/// Version of the form.
pub const VERSION: u32 = 1;

/// Most backends in a trace; the count beside them is exact.
pub const MAX_BACKENDS: usize = 100;

/// Most source ranges in a trace; the count beside them is exact.
pub const MAX_RANGES: usize = 20;

/// The way of one packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// [`VERSION`].
    pub version: u32,
    /// Name of the node.
    pub node: String,
    /// Whence, as it was asked.
    pub from: IpAddr,
    /// Whereto, such as `10.96.0.10:80/TCP`.
    pub to: String,
    /// Who sends it.
    pub client: Client,
    /// What it meets; null where it meets nothing of ours.
    pub frontend: Option<FrontendStep>,
    /// Which of a Service's policies decides; null where none does.
    pub policy: Option<Policy>,
    /// How one backend is chosen; null where none is.
    pub balancing: Option<Balancing>,
    /// Whom it can be led to, by address and port; [`MAX_BACKENDS`] at most.
    pub backends: Vec<BackendStep>,
    /// How many of those there are.
    pub backend_count: usize,
    /// The end.
    pub outcome: Outcome,
    /// All of it in sentences, in the order of the way.
    pub steps: Vec<Step>,
    /// The same steps in the kernel, where that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live: Option<Live>,
}

/// Who sends the packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Client {
    /// `process` (of this node), `podOfThisNode`, `pod` (of another) or `other`.
    pub kind: String,
    /// The source by which it comes to our rules: the kernel lets a process of this node
    /// that calls a VIP have that as its source, where it is an address of the node.
    pub source: IpAddr,
    /// By which device it comes, as far as its name is known; null for a process.
    pub device: Option<String>,
    /// Whether that was `given`, is `derived` or `unknown`; or `none`, for a process.
    pub device_is: String,
    /// By what it counts as within the cluster: `process`, `podNetwork`, `device`; null: it does not.
    pub within: Option<String>,
}

/// What the packet meets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendStep {
    /// Namespace and name of the Service; of a host port, of the pod.
    pub service: String,
    /// Name of the service port, `""` if it has none.
    pub port: String,
    /// `ClusterIP`, `NodePort`, `ExternalIP`, `LoadBalancer` or `HostPort`.
    pub kind: String,
    /// Who may call, [`MAX_RANGES`] at most; none: everyone.
    pub source_ranges: Vec<String>,
    /// How many of those there are.
    pub source_range_count: usize,
    /// Whether the client may.
    pub admitted: bool,
}

/// The policy that decides whose endpoints are used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// `internalTrafficPolicy` or `externalTrafficPolicy`.
    pub field: String,
    /// `Cluster` or `Local`.
    pub value: String,
    /// As whom the client fares: `any`; or, where these fare differently, `internal` or `external`.
    pub clients: String,
    /// The mark by which IPVS knows that it is within the cluster, such as `0xfe000001`.
    pub mark: Option<String>,
}

/// How one backend is chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Balancing {
    /// The virtual service: `10.96.0.10:80/TCP`, or a mark with its family.
    pub virtual_service: String,
    /// Scheduler of IPVS.
    pub scheduler: String,
    /// `flag-1`, `flag-2`, `flag-3`.
    pub scheduler_flags: Vec<String>,
    /// How a client stays with its backend: `persistence`, `hash`; null: it does not.
    pub affinity: Option<String>,
    /// For how many seconds; null: for as long as the backends stay.
    pub affinity_seconds: Option<u32>,
}

/// One backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendStep {
    /// What becomes of the destination's address.
    pub address: IpAddr,
    /// What becomes of its port.
    pub port: u16,
    /// Its weight; 0 takes no new connection.
    pub weight: u32,
    /// How likely the next new connection is led to it; at weight 0, and refused for that.
    pub percent: f64,
    /// `ready` or `terminating`; or `leaving`: it is no backend any more, and keeps its connections.
    pub state: String,
    /// Whether it runs on this node.
    pub local: bool,
    /// Whom it sees: `client`, or `node` for an address of this node; null: it gets nothing.
    pub sees: Option<String>,
    /// Why the source is replaced: `hairpin`, `viaVip`, `all`, `offNode`, `offCluster`,
    /// `podEgress`; null: it is kept.
    pub masquerade: Option<String>,
}

/// What becomes of the packet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// `forwarded`, `refused`, `dropped`, `served` (by the agent's health check) or `passed`
    /// (it is none of ours).
    pub verdict: String,
    /// What decided: `noEndpoint`, `noWeight`, `noPort`, `unallocated` of what is refused,
    /// `notAdmitted`, `noLocalEndpoint` of what is dropped; else null.
    pub rule: Option<String>,
    /// Why the source of what passed is replaced, as [`BackendStep::masquerade`].
    pub masquerade: Option<String>,
}

/// One step in a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// `client`, `frontend`, `admission`, `policy`, `affinity`, `balancing`, `translation`,
    /// `source` or `verdict`.
    pub step: String,
    /// The sentence.
    pub says: String,
}

/// A question with the answers of [`crate::verdict`], from which the rest is told.
struct Walk<'a> {
    view: &'a NodeView,
    nat: SourceNat,
    question: &'a Question,
    /// The source that our rules see.
    source: IpAddr,
    device: Option<(String, &'static str)>,
    steps: Steps<'a>,
}

impl<'a> Walk<'a> {
    fn new(view: &'a NodeView, question: &'a Question) -> Result<Self, QuestionError> {
        let nat = view.source_nat();
        let desired = view.desired();
        let Question { from, to, .. } = *question;
        let own = desired.facts().own.contains(&from) || desired.is_vip(from) || from.is_loopback();
        if own && question.device.is_some() {
            return Err(QuestionError::OwnByDevice(from));
        }
        let device = (!own).then(|| device(view, &nat, question));
        let source = if own {
            own_source(view, question)
        } else {
            from
        };
        let packet = Packet {
            source,
            device: device.as_ref().map(|(name, _)| name.as_str()),
            target: to,
        };
        let steps = verdict::steps(desired, &nat, &packet);
        Ok(Self {
            view,
            nat,
            question,
            source,
            device,
            steps,
        })
    }

    fn frontend(&self) -> Option<&'a Frontend> {
        self.steps.frontend
    }

    /// Whether the virtual service is the one for clients within the cluster.
    fn is_by_mark(&self) -> bool {
        let service = self.steps.service.as_ref();
        service.is_some_and(|(key, _)| key.address().is_none())
    }

    /// The backends of the virtual service that takes the packet, and how it spreads.
    fn backends(&self) -> Option<(&'a Scheduling, &'a Backends)> {
        self.steps.service.as_ref()?;
        let frontend = self.frontend()?;
        match &frontend.internal {
            Some(internal) if self.is_by_mark() => Some((&internal.scheduling, &internal.backends)),
            Some(_) | None => Some((&frontend.scheduling, &frontend.backends)),
        }
    }

    /// What is in that virtual service for old connections alone: no new one is led to it.
    fn leaving(&self) -> Vec<BackendAddr> {
        let Some((key, service)) = &self.steps.service else {
            return Vec::new();
        };
        let kept = self.view.desired().drains().kept(*key);
        kept.filter(|backend| !service.servers.contains_key(backend))
            .collect()
    }

    /// How IPVS spreads connections: beside backends that leave, past these.
    fn scheduling(&self) -> Option<Scheduling> {
        let (scheduling, _) = self.backends()?;
        let scheduling = scheduling.clone();
        Some(if self.leaving().is_empty() {
            scheduling
        } else {
            scheduling.around_weight_0()
        })
    }

    /// Session affinity: how, and for how long.
    fn affinity(&self) -> Option<(&'static str, Option<u32>)> {
        let (scheduling, _) = self.backends()?;
        if let Some(seconds) = scheduling.persistence {
            return Some(("persistence", Some(seconds)));
        }
        let frontend = self
            .frontend()
            .filter(|f| f.kind != FrontendKind::HostPort)?;
        let service = self.view.cluster().service(&frontend.holder)?;
        let asked = service.spec.session_affinity == "ClientIP";
        asked.then_some(("hash", None))
    }

    fn policy(&self) -> Option<Policy> {
        let frontend = self.frontend()?;
        let service = self.view.cluster().service(&frontend.holder);
        let (field, policy) = match frontend.kind {
            FrontendKind::HostPort => return None,
            FrontendKind::ClusterIP => ("internalTrafficPolicy", TrafficPolicy::internal(service?)),
            FrontendKind::NodePort | FrontendKind::ExternalIP | FrontendKind::LoadBalancer => {
                ("externalTrafficPolicy", TrafficPolicy::external(service?))
            }
        };
        let value = match policy {
            TrafficPolicy::Cluster => "Cluster",
            TrafficPolicy::Local => "Local",
        };
        let clients = match (&frontend.internal, self.steps.within) {
            (None, _) => "any",
            (Some(_), Some(_)) => "internal",
            (Some(_), None) => "external",
        };
        Some(Policy {
            field: field.to_owned(),
            value: value.to_owned(),
            clients: clients.to_owned(),
            mark: self.steps.mark.map(|mark| format!("{mark:#x}")),
        })
    }

    /// Whom a backend sees; `None` where it gets nothing.
    fn source_at(&self, backend: &BackendAddr) -> Option<Source> {
        match &self.steps.verdict {
            Verdict::Forwarded(leads) => leads.get(backend).map(|lead| lead.source),
            Verdict::Refused(_)
            | Verdict::Dropped(_)
            | Verdict::Unallocated
            | Verdict::Served
            | Verdict::Passed(_) => None,
        }
    }

    fn client(&self) -> Client {
        let networks = &self.nat.networks;
        let from = self.question.from;
        let among = |networks: &BTreeSet<ipnetwork::IpNetwork>| {
            networks.iter().any(|network| network.contains(from))
        };
        let kind = if self.device.is_none() {
            "process"
        } else if among(&networks.node_pods) {
            "podOfThisNode"
        } else if among(&networks.pods) {
            "pod"
        } else {
            "other"
        };
        let within = self.steps.within.map(|within| match within {
            Within::Process => "process",
            Within::PodNetwork => "podNetwork",
            Within::Device => "device",
        });
        let (device, device_is) = match &self.device {
            None => (None, "none"),
            Some((name, how)) => (Some(name.clone()).filter(|name| !name.is_empty()), *how),
        };
        Client {
            kind: kind.to_owned(),
            source: self.source,
            device,
            device_is: device_is.to_owned(),
            within: within.map(str::to_owned),
        }
    }

    fn frontend_step(&self) -> Option<FrontendStep> {
        let frontend = self.frontend()?;
        let ranges = frontend.source_ranges.iter();
        Some(FrontendStep {
            service: words::short(&frontend.holder.to_string()),
            port: words::short(&frontend.port_name),
            kind: frontend.kind.to_string(),
            source_ranges: ranges.take(MAX_RANGES).map(ToString::to_string).collect(),
            source_range_count: frontend.source_ranges.len(),
            admitted: self.steps.is_admitted,
        })
    }

    fn balancing(&self) -> Option<Balancing> {
        let scheduling = self.scheduling()?;
        let (key, _) = self.steps.service.as_ref()?;
        let affinity = self.affinity();
        Some(Balancing {
            virtual_service: key.to_string(),
            scheduler: scheduling.scheduler.name().to_owned(),
            scheduler_flags: scheduling.flag_names().collect(),
            affinity: affinity.map(|(how, _)| how.to_owned()),
            affinity_seconds: affinity.and_then(|(_, seconds)| seconds),
        })
    }

    fn backend_steps(&self) -> (Vec<BackendStep>, usize) {
        let (Some((_, backends)), Some(scheduling)) = (self.backends(), self.scheduling()) else {
            return (Vec::new(), 0);
        };
        let pods = &self.nat.networks.node_pods;
        let is_here = |ip: IpAddr| pods.iter().any(|network| network.contains(ip));
        let usable = backends.iter().map(|(addr, backend)| {
            let state = match backend.state {
                BackendState::Ready => "ready",
                BackendState::Terminating => "terminating",
            };
            (*addr, (backend.weight, state, backend.local))
        });
        let leaving = self.leaving().into_iter();
        let leaving = leaving.map(|addr| (addr, (0, "leaving", is_here(addr.ip))));
        let all: BTreeMap<BackendAddr, (Weight, &str, bool)> = leaving.chain(usable).collect();
        let weights: Vec<_> = all.values().map(|(weight, ..)| *weight).collect();
        let odds = odds::odds(&scheduling, &weights);
        let steps = all.iter().zip(odds).take(MAX_BACKENDS);
        let steps = steps.map(|((addr, (weight, state, local)), percent)| {
            let (sees, masquerade) = match self.source_at(addr) {
                Some(Source::Replaced(why)) => (Some("node"), Some(why.name())),
                Some(Source::Kept) => (Some("client"), None),
                None => (None, None),
            };
            BackendStep {
                address: addr.ip,
                port: addr.port,
                weight: *weight,
                percent,
                state: (*state).to_owned(),
                local: *local,
                sees: sees.map(str::to_owned),
                masquerade: masquerade.map(str::to_owned),
            }
        });
        (steps.collect(), all.len())
    }

    fn outcome(&self) -> Outcome {
        let (verdict, rule, source) = match &self.steps.verdict {
            Verdict::Forwarded(_) => ("forwarded", None, None),
            Verdict::Refused(Refusal::NoEndpoint) => ("refused", Some("noEndpoint"), None),
            Verdict::Refused(Refusal::NoWeight) => ("refused", Some("noWeight"), None),
            Verdict::Refused(Refusal::NoPort) => ("refused", Some("noPort"), None),
            Verdict::Unallocated => ("refused", Some("unallocated"), None),
            Verdict::Dropped(Loss::NotAdmitted) => ("dropped", Some("notAdmitted"), None),
            Verdict::Dropped(Loss::NoLocalEndpoint) => ("dropped", Some("noLocalEndpoint"), None),
            Verdict::Served => ("served", None, None),
            Verdict::Passed(source) => ("passed", None, Some(source)),
        };
        let masquerade = match source {
            Some(Source::Replaced(why)) => Some(why.name().to_owned()),
            Some(Source::Kept) | None => None,
        };
        Outcome {
            verdict: verdict.to_owned(),
            rule: rule.map(str::to_owned),
            masquerade,
        }
    }

    /// What of the kernel is on the way.
    fn scope(&self) -> Scope {
        let to = self.question.to;
        let mut scope = Scope::default();
        scope.insert(to);
        for frontend in self.view.desired().lingering(to.ip) {
            scope.insert(frontend);
        }
        scope
            .marked
            .extend(self.view.desired().mark(&to).map(|mark| ServiceKey::Mark {
                family: Family::of(to.ip),
                mark,
            }));
        let backends = self.backends();
        let mut backends = backends
            .into_iter()
            .flat_map(|(_, backends)| backends.keys());
        if backends.any(|backend| backend.ip == self.source) {
            scope.hairpins.insert(self.source);
        }
        scope
    }
}

/// By which device it comes, and how that is known. Pods of this node come by a veth of ours.
fn device(view: &NodeView, nat: &SourceNat, question: &Question) -> (String, &'static str) {
    if let Some(device) = &question.device {
        return (device.to_string(), "given");
    }
    let from = question.from;
    let mut pods = nat.networks.node_pods.iter();
    if pods.any(|network| network.contains(from)) {
        return (HOST_VETH_PREFIX.to_owned(), "derived");
    }
    match view.device_towards(from) {
        Some(device) => (device.to_owned(), "derived"),
        None => (String::new(), "unknown"),
    }
}

/// The source that the kernel gives to a process of this node.
fn own_source(view: &NodeView, question: &Question) -> IpAddr {
    let Question { from, to, .. } = *question;
    match view.desired().binding(to.ip) {
        Some(Binding::Address | Binding::Alias { .. }) => to.ip,
        Some(Binding::Route {
            source: Some(source),
        }) => source,
        // Without a machine, as in a plan, none is known.
        Some(Binding::Route { source: None }) | None => from,
    }
}

impl Trace {
    /// What becomes of a packet.
    ///
    /// # Errors
    /// [`QuestionError::OwnByDevice`].
    pub fn new(view: &NodeView, question: &Question) -> Result<Self, QuestionError> {
        let walk = Walk::new(view, question)?;
        let (backends, backend_count) = walk.backend_steps();
        Ok(Self {
            version: VERSION,
            node: words::short(view.node()),
            from: question.from,
            to: question.to.to_string(),
            client: walk.client(),
            frontend: walk.frontend_step(),
            policy: walk.policy(),
            balancing: walk.balancing(),
            backends,
            backend_count,
            outcome: walk.outcome(),
            steps: words::steps(&walk),
            live: None,
        })
    }
}
