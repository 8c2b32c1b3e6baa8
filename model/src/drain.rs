//! Backends that leave and keep the connections that they have.
//!
//! A real server of TCP that is no longer wanted takes no new connections (weight 0), and
//! goes when it has none left, when its pod is known to be gone, or after a bound. That is
//! no function of the facts: it hangs on time and on what the kernel counts. So it stands
//! beside the desired state, is told both, and an agent that starts finds it in the kernel
//! again: what is there and not wanted drains.
//!
//! Real servers of UDP and SCTP go at once: nothing ends their flows, and clients would
//! send to them for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::address::{BackendAddr, FrontendAddr};
use crate::cluster::{ClusterState, Left};
use crate::observed::Observed;
use crate::scope::Scope;
use crate::service::ServiceKey;

/// A backend that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// When it began to leave.
    pub since: Instant,
    /// When it was first seen to be in no slice.
    pub left: Option<Instant>,
    /// The node that it was last said to be on.
    pub node: Option<String>,
    /// Whether its pod was being ended when it was last in a slice.
    pub terminating: bool,
    /// Whether it waits for its removal.
    over: bool,
}

/// What a former agent knew of a backend that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recalled {
    /// [`Drain::left`].
    pub left: Option<Instant>,
    /// [`Drain::node`].
    pub node: Option<String>,
    /// [`Drain::terminating`].
    pub terminating: bool,
}

/// Why a drain ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// It has no connections.
    Idle,
    /// Its pod was ended: what is left of its connections has nobody behind it.
    PodGone,
    /// Its node is gone, or cannot be reached as the cluster says.
    NodeGone,
    /// It has been out of all slices for as long as is allowed.
    Bound,
}

impl End {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Idle, Self::PodGone, Self::NodeGone, Self::Bound];

    /// The word for it in metrics and `status`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::PodGone => "podGone",
            Self::NodeGone => "nodeGone",
            Self::Bound => "bound",
        }
    }
}

/// Which backend of which virtual service.
pub type Server = (ServiceKey, BackendAddr);

/// How long after its endpoint a pod is held to be there, though it was being ended: the word
/// that its Service is gone comes by another way, and may come later.
const HEARSAY: Duration = Duration::from_secs(2);

/// The backends that leave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drains {
    servers: BTreeMap<Server, Drain>,
    /// The frontends that led to a virtual service by mark when nobody wanted it any more.
    marked: BTreeMap<ServiceKey, BTreeSet<FrontendAddr>>,
}

impl Drains {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.servers.len()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Server, &Drain)> {
        self.servers.iter()
    }

    /// Those that keep their connections still, in order.
    pub fn live(&self) -> impl Iterator<Item = (&Server, &Drain)> {
        self.servers.iter().filter(|(_, drain)| !drain.over)
    }

    /// The backends of a virtual service that keep their connections still.
    pub fn kept(&self, key: ServiceKey) -> impl Iterator<Item = BackendAddr> {
        let of_key = self.of(key).filter(|(_, drain)| !drain.over);
        of_key.map(|((_, backend), _)| *backend)
    }

    /// The frontends of virtual services that have such backends and that nobody wants, or
    /// of those by address, all.
    pub(crate) fn frontends(&self) -> impl Iterator<Item = FrontendAddr> {
        self.live().flat_map(|((key, _), _)| {
            let marked = self.marked(key).copied();
            key.address().into_iter().chain(marked)
        })
    }

    /// The frontends that led to a virtual service by mark when nobody wanted it any more.
    pub(crate) fn marked(&self, key: &ServiceKey) -> impl Iterator<Item = &FrontendAddr> {
        self.marked.get(key).into_iter().flatten()
    }

    /// Whether this frontend led to the virtual service by this mark, of which backends leave.
    pub(crate) fn holds_mark(&self, key: &ServiceKey, addr: &FrontendAddr) -> bool {
        self.marked
            .get(key)
            .is_some_and(|addrs| addrs.contains(addr))
            && self.kept(*key).next().is_some()
    }

    /// Adds to `scope` what goes together: virtual services by mark that nobody wants, and the
    /// frontends that led there.
    pub(crate) fn widen(&self, scope: &mut Scope) {
        for (key, addrs) in &self.marked {
            let is_meant = scope.marked.contains(key);
            if is_meant || addrs.iter().any(|addr| scope.frontends.contains(addr)) {
                scope.insert_service(*key);
                for addr in addrs {
                    scope.insert(*addr);
                }
            }
        }
    }

    /// Takes in which frontends lead to a virtual service by mark that nobody wants.
    pub(crate) fn set_marked(&mut self, key: ServiceKey, addrs: BTreeSet<FrontendAddr>) {
        if addrs.is_empty() {
            self.marked.remove(&key);
        } else {
            self.marked.insert(key, addrs);
        }
    }

    fn of(&self, key: ServiceKey) -> impl Iterator<Item = (&Server, &Drain)> {
        let from = self.servers.range((key, BackendAddr::LEAST)..);
        from.take_while(move |((of, _), _)| *of == key)
    }

    /// Takes in which real servers of a virtual service the kernel has and nobody wants.
    pub(crate) fn set(&mut self, key: ServiceKey, unwanted: &BTreeSet<BackendAddr>, now: Instant) {
        let known: Vec<Server> = self.of(key).map(|(server, _)| *server).collect();
        for server in known {
            if !unwanted.contains(&server.1) {
                self.servers.remove(&server);
            }
        }
        for backend in unwanted {
            let server = (key, *backend);
            self.servers
                .entry(server)
                .or_insert_with(|| Drain::new(now));
        }
    }

    /// Takes in what was said last of endpoints that a slice names no longer: of one that has
    /// left at once nothing else tells where it was.
    pub(crate) fn note(&mut self, left: &Left) {
        if left.is_empty() {
            return;
        }
        for ((_, backend), drain) in &mut self.servers {
            // Somebody may have looked between the slice's word and this.
            let unknown = drain.node.is_none() && !drain.terminating;
            let Some(listing) = left.get(backend) else {
                continue;
            };
            if drain.left.is_none() || unknown {
                drain.terminating |= listing.terminating;
                if drain.node.is_none() {
                    drain.node.clone_from(&listing.node);
                }
            }
        }
    }

    /// Takes in what a former agent knew of those of which nothing is known yet.
    pub(crate) fn recall(&mut self, recall: impl Fn(&Server) -> Option<Recalled>) {
        for (server, drain) in &mut self.servers {
            let unknown = drain.left.is_none() && drain.node.is_none() && !drain.terminating;
            if let Some(recalled) = recall(server).filter(|_| unknown) {
                drain.left = recalled.left;
                drain.node = recalled.node;
                drain.terminating = recalled.terminating;
            }
        }
    }

    /// Forgets those that have ended and are gone from the kernel.
    pub(crate) fn forget_gone(&mut self, observed: &Observed) {
        self.servers.retain(|(key, backend), drain| {
            let service = observed.services.get(key);
            let there = || service.is_some_and(|service| service.servers.contains_key(backend));
            !drain.over || there()
        });
        let keys: BTreeSet<ServiceKey> = self.servers.keys().map(|(key, _)| *key).collect();
        self.marked.retain(|key, _| keys.contains(key));
    }

    /// Lets a drain end: its real server is to be removed. Whether that is news.
    pub(crate) fn end(&mut self, server: &Server) -> bool {
        let drain = self.servers.get_mut(server);
        drain.is_some_and(|drain| !std::mem::replace(&mut drain.over, true))
    }

    /// Takes in what the slices say of the backends that leave, and returns those whose
    /// drain ends by that or by time. `is_served` tells virtual services whose frontends are
    /// there still, `is_gone` pods of this node that are no more.
    pub(crate) fn look(
        &mut self,
        cluster: &ClusterState,
        bound: Duration,
        now: Instant,
        is_served: impl Fn(&ServiceKey) -> bool,
        is_gone: impl Fn(IpAddr) -> bool,
    ) -> Vec<(Server, End)> {
        let backends: BTreeSet<BackendAddr> =
            self.live().map(|((_, backend), _)| *backend).collect();
        if backends.is_empty() {
            return Vec::new();
        }
        let listed = cluster.listed(&backends);
        let mut ends = Vec::new();
        for (server, drain) in self.servers.iter_mut().filter(|(_, drain)| !drain.over) {
            let ip = server.1.ip;
            if let Some(listing) = listed.get(&server.1) {
                drain.left = None;
                drain.terminating = listing.terminating;
                if listing.node.is_some() {
                    drain.node.clone_from(&listing.node);
                }
            } else {
                drain.left.get_or_insert(now);
            }
            let node_gone = drain.node.as_deref().is_some_and(|node| {
                // As long as a slice names the endpoint, its Node may be a new one.
                cluster.is_lost(node) || (drain.left.is_some() && cluster.is_unheard_of(node))
            });
            let left = drain.left.map(|left| now.saturating_duration_since(left));
            // With a Service its slices go, and the pods that were being ended may go on.
            let pod_gone = || {
                let settled = left.is_some_and(|left| left >= HEARSAY);
                is_gone(ip) || (drain.terminating && settled && is_served(&server.0))
            };
            let end = match left {
                _ if node_gone => Some(End::NodeGone),
                Some(_) if pod_gone() => Some(End::PodGone),
                Some(left) if left >= bound => Some(End::Bound),
                Some(_) | None => None,
            };
            ends.extend(end.map(|end| (*server, end)));
        }
        for (server, _) in &ends {
            self.end(server);
        }
        ends
    }
}

impl Drain {
    fn new(now: Instant) -> Self {
        Self {
            since: now,
            left: None,
            node: None,
            terminating: false,
            over: false,
        }
    }
}
