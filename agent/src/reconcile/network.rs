//! The machine's devices, addresses and routes as far as they concern us:
//! followed by events, looked at only when an event says so.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ferrule_datapath::Error;
use ferrule_datapath::news::{News, Watch};
use ferrule_datapath::routes::{MachineAddress, RouteTable, Routes};
use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::condition::{Condition, Reason};
use ferrule_model::kube::Kind;
use ferrule_model::network::cluster_object;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::is_of_a_pod;
use ferrule_model::routes::NodeRoute;
use ferrule_model::source_nat::OwnAddress;
use ferrule_model::view::NodeView;
use ipnetwork::IpNetwork;
use tracing::{info, warn};

use super::difference::Drifts;
use super::faults::{About, Faults, remedy};

/// Shortest time between two looks at addresses and routes, however many events come.
const LOOK: Duration = Duration::from_millis(200);

/// Pause before something that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Whether all devices have the settings that they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Devices {
    /// One has come.
    Suspect,
    /// As far as was looked.
    Looked,
}

/// What is known of devices, addresses and routes.
pub(super) struct Network {
    vip_device: String,
    binding: VipBinding,
    watch: Option<Watch>,
    /// Events that were not judged yet.
    inbox: Vec<News>,
    socket: Option<Routes>,
    bindings_suspect: bool,
    addresses_suspect: bool,
    routes_suspect: bool,
    devices: Devices,
    next_look: Instant,
    own: Option<Vec<OwnAddress>>,
    table: Option<RouteTable>,
    /// Prefixes to which we want routes, there or not.
    wanted: BTreeSet<IpNetwork>,
    conditions: Vec<Condition>,
}

impl Network {
    pub(super) fn new(vip_device: String, binding: &VipBinding) -> Self {
        Self {
            vip_device,
            binding: binding.clone(),
            watch: None,
            inbox: Vec::new(),
            socket: None,
            bindings_suspect: false,
            addresses_suspect: true,
            routes_suspect: true,
            devices: Devices::Looked,
            next_look: Instant::now(),
            own: None,
            table: None,
            wanted: BTreeSet::new(),
            conditions: Vec::new(),
        }
    }

    /// Opens what is not open. What failed is tried again by later calls.
    pub(super) fn open(&mut self, faults: &mut Faults) {
        if self.watch.is_none() {
            match Watch::open() {
                Ok(watch) => {
                    self.watch = Some(watch);
                    faults.clear(About::Monitor);
                }
                Err(error) => fail(
                    faults,
                    About::Monitor,
                    "kernel",
                    &format!("cannot listen for changes of devices, addresses and routes: {error}"),
                    &error,
                ),
            }
        }
        if self.socket.is_none() {
            match Routes::open() {
                Ok(socket) => {
                    self.socket = Some(socket);
                    faults.clear(About::Addresses);
                }
                Err(error) => {
                    let words = format!("cannot ask for addresses and routes: {error}");
                    fail(faults, About::Addresses, "kernel", &words, &error);
                }
            }
        }
    }

    /// Returns when there may be something to look at. Nothing is lost when it
    /// is given up on the way.
    pub(super) async fn news(&mut self, faults: &mut Faults) {
        self.open(faults);
        let Some(watch) = &mut self.watch else {
            tokio::time::sleep(RETRY).await;
            return;
        };
        match watch.next().await {
            Ok(news) => self.inbox.extend(news),
            Err(error) => {
                warn!(%error, "news of devices, addresses and routes ended; listening anew");
                self.watch = None;
                self.inbox.push(News::Lost);
            }
        }
    }

    /// Judges the events that came: which of them were not our own doing.
    pub(super) fn judge(&mut self, device: Option<u32>, observed: Option<&Observed>) {
        for news in std::mem::take(&mut self.inbox) {
            match news {
                News::Lost => {
                    self.bindings_suspect = true;
                    self.addresses_suspect = true;
                    self.routes_suspect = true;
                    self.devices = Devices::Suspect;
                }
                News::Link { index, name, gone } => {
                    let is_device = Some(index) == device;
                    if is_device || name.as_ref() == Some(&self.vip_device) {
                        let renamed = name.is_some_and(|name| name != self.vip_device);
                        self.bindings_suspect |= gone || !is_device || renamed;
                    } else if name.is_none_or(|name| !is_of_a_pod(&name)) {
                        // The routes over a device that goes down vanish without an event of
                        // their own.
                        self.addresses_suspect = true;
                        self.routes_suspect = true;
                        if !gone {
                            self.devices = Devices::Suspect;
                        }
                        // So do local routes with the loopback device, and addresses with theirs.
                        self.bindings_suspect |= self.binding != VipBinding::Address;
                    }
                }
                News::Address {
                    index, ip, present, ..
                } if Some(index) == device => {
                    let link_local =
                        matches!(ip, Some(IpAddr::V6(ip)) if ip.is_unicast_link_local());
                    let believed = observed
                        .zip(ip)
                        .is_some_and(|(observed, ip)| observed.is_bound_as(ip, &Binding::Address));
                    self.bindings_suspect |= believed != present && !link_local;
                }
                News::Address {
                    ip,
                    present,
                    alias: true,
                    ..
                } => {
                    let is_alias = |binding: &Binding| matches!(binding, Binding::Alias { .. });
                    let believed = observed
                        .zip(ip)
                        .is_some_and(|(observed, ip)| observed.bindings(ip).any(is_alias));
                    self.bindings_suspect |= believed != present;
                }
                News::Address { ip, .. } => {
                    self.addresses_suspect = true;
                    self.bindings_suspect |= ip.is_some_and(|ip| self.is_source(ip));
                }
                News::VipRoute {
                    ip,
                    binding,
                    present,
                } => {
                    let believed =
                        observed.is_some_and(|observed| observed.is_bound_as(ip, &binding));
                    self.bindings_suspect |= believed != present;
                }
                News::Route {
                    destination,
                    ours,
                    present,
                } => self.routes_suspect |= self.judge_route(destination, ours, present),
            }
        }
    }

    fn judge_route(&self, to: IpNetwork, ours: Option<NodeRoute>, present: bool) -> bool {
        let Some(table) = &self.table else {
            return true;
        };
        match ours {
            Some(route) => table.ours.contains(&route) != present,
            None => {
                self.wanted.contains(&to) || table.ours.iter().any(|route| route.destination == to)
            }
        }
    }

    /// Whether local routes may have it as their source. With an address that goes the
    /// kernel removes, or changes, the routes that name it, and many kernels do not say so.
    fn is_source(&self, ip: IpAddr) -> bool {
        let own = self.own.iter().flatten();
        self.binding == VipBinding::Route && own.map(|address| address.ip).any(|own| own == ip)
    }

    /// Whether VIPs may be bound otherwise than believed. Asked once, the suspicion is over.
    pub(super) fn bindings_are_suspect(&mut self) -> bool {
        std::mem::take(&mut self.bindings_suspect)
    }

    /// Whether there may be a device that needs settings of its own. Asked once, the suspicion
    /// is over.
    pub(super) fn devices_are_suspect(&mut self) -> bool {
        let suspect = self.devices == Devices::Suspect && Instant::now() >= self.next_look;
        if suspect {
            self.devices = Devices::Looked;
        }
        suspect
    }

    /// Nodes, addresses or routes changed.
    pub(super) fn routes_are_suspect(&mut self) {
        self.routes_suspect = true;
    }

    /// When there is something to look at without news. Routes are looked at once
    /// the source has told something, and not before the addresses are known.
    pub(super) fn wake_at(&self, told: bool) -> Option<Instant> {
        let routes = told && self.routes_suspect && self.own.is_some();
        (self.addresses_suspect || routes).then_some(self.next_look)
    }

    /// The machine's addresses, as far as they have been read.
    pub(super) fn own(&self) -> &[OwnAddress] {
        self.own.as_deref().unwrap_or_default()
    }

    /// Whether the machine's addresses have been read.
    pub(super) fn is_known(&self) -> bool {
        self.own.is_some()
    }

    /// The machine's addresses, if they are news. `device` is the VIP device, whatever its
    /// name is at the moment: VIPs that pass for addresses of the node are not served.
    pub(super) async fn addresses(
        &mut self,
        device: Option<u32>,
        faults: &mut Faults,
    ) -> Option<Vec<OwnAddress>> {
        if !self.addresses_suspect || Instant::now() < self.next_look {
            return None;
        }
        self.open(faults);
        let Some(socket) = &self.socket else {
            self.next_look = Instant::now() + RETRY;
            return None;
        };
        match socket.addresses().await {
            Ok(found) => {
                self.addresses_suspect = false;
                faults.clear(About::Addresses);
                let own: Vec<OwnAddress> = found
                    .into_iter()
                    .filter(|address| {
                        address.device != self.vip_device && Some(address.index) != device
                    })
                    .filter_map(own_address)
                    .collect();
                if self.own.as_ref() == Some(&own) {
                    return None;
                }
                let ips: BTreeSet<IpAddr> = own.iter().map(|address| address.ip).collect();
                info!(addresses = ?ips, "addresses of this node");
                self.own = Some(own.clone());
                Some(own)
            }
            Err(error) => {
                let words = format!("cannot list the machine's addresses: {error}");
                fail(faults, About::Addresses, "kernel", &words, &error);
                self.give_up(&error);
                None
            }
        }
    }

    fn give_up(&mut self, error: &Error) {
        self.next_look = Instant::now() + RETRY;
        if error.leaves_doubt() {
            self.socket = None;
        }
    }

    /// Makes the routes to other nodes' pods as they should be, if they may not be.
    pub(super) async fn reconcile_routes(
        &mut self,
        view: &NodeView,
        complete: bool,
        faults: &mut Faults,
        drifts: &mut Drifts,
    ) {
        let due = Instant::now() >= self.next_look;
        if !self.routes_suspect || !due || self.own.is_none() {
            return;
        }
        self.next_look = Instant::now() + LOOK;
        self.open(faults);
        let Some(socket) = &self.socket else {
            return;
        };
        let found = match socket.list().await {
            Ok(found) => found,
            Err(error) => {
                let words = format!("cannot list routes: {error}");
                fail(faults, About::Routes, "kernel", &words, &error);
                self.give_up(&error);
                return;
            }
        };
        faults.clear(About::Routes);
        self.routes_suspect = false;
        let (wanted, mut conditions) = view.routes();
        if let Some(believed) = &self.table {
            let gone = believed.ours.difference(&found.ours);
            let gone: Vec<String> = gone
                .filter(|route| wanted.values().any(|wanted| wanted == *route))
                .map(|route| format!("route {route} was gone"))
                .collect();
            drifts.note("route", &gone);
        }
        let mut table = found;
        self.replace_gateways(&wanted, &mut table, faults).await;
        let Some(socket) = &self.socket else {
            return;
        };
        let remove: Vec<NodeRoute> = table
            .ours
            .iter()
            .filter(|route| complete && wanted.get(&route.destination) != Some(*route))
            .copied()
            .collect();
        let results = socket.remove(&remove).await;
        note_results(&remove, &results, "remove", &mut table, faults);
        let mut add = Vec::new();
        for route in wanted.values().filter(|route| !table.ours.contains(*route)) {
            match table.foreign.get(&route.destination) {
                None => add.push(*route),
                Some(theirs) => {
                    // That says what is wrong, whatever the kernel said when it was tried.
                    faults.clear(About::Route(route.destination));
                    conditions.push(conflict(view, route, theirs));
                }
            }
        }
        let results = socket.add(&add).await;
        note_results(&add, &results, "add", &mut table, faults);
        if results.iter().any(Result::is_err) {
            self.routes_suspect = true;
            self.next_look = Instant::now() + RETRY;
        }
        for route in wanted.values() {
            if table.ours.contains(route) {
                faults.clear(About::Route(route.destination));
            }
        }
        // A route that is neither wanted nor there any more is no fault, whatever failed about it.
        faults.clear_if(|about| match about {
            About::Route(prefix) => {
                !wanted.contains_key(&prefix)
                    && !table.ours.iter().any(|route| route.destination == prefix)
            }
            _ => false,
        });
        conditions.sort();
        for condition in conditions.iter().filter(|c| !self.conditions.contains(c)) {
            warn!(object = %condition.object, reason = %condition.reason, "{}", condition.message);
        }
        self.conditions = conditions;
        self.wanted = wanted.into_keys().collect();
        // A router may have a million, and changes some of them each second.
        table.foreign.clear();
        self.table = Some(table);
    }

    /// A Node that moved: its route changes in place.
    async fn replace_gateways(
        &self,
        wanted: &BTreeMap<IpNetwork, NodeRoute>,
        table: &mut RouteTable,
        faults: &mut Faults,
    ) {
        let Some(socket) = &self.socket else {
            return;
        };
        let mut old = Vec::new();
        let mut new = Vec::new();
        for route in wanted.values().filter(|route| !table.ours.contains(*route)) {
            let mut present = table
                .ours
                .iter()
                .filter(|ours| ours.destination == route.destination);
            // With another's beside it, or several of ours, it is not certain which one would go.
            if let (Some(former), None) = (present.next(), present.next())
                && !table.foreign.contains_key(&route.destination)
            {
                old.push(*former);
                new.push(*route);
            }
        }
        let results = socket.replace(&new).await;
        for (former, result) in old.iter().zip(&results) {
            if result.is_ok() {
                table.ours.remove(former);
            }
        }
        note_results(&new, &results, "add", table, faults);
    }

    /// How many routes to other nodes' pods there are.
    pub(super) fn route_count(&self) -> usize {
        self.table.as_ref().map_or(0, |table| table.ours.len())
    }

    /// Nodes to whose pods there is no route of ours, and why.
    pub(super) fn conditions(&self) -> &[Condition] {
        &self.conditions
    }
}

fn note_results(
    routes: &[NodeRoute],
    results: &[Result<(), Error>],
    verb: &str,
    table: &mut RouteTable,
    faults: &mut Faults,
) {
    for (route, result) in routes.iter().zip(results) {
        match result {
            Ok(()) => {
                info!("{verb} route {route}");
                if verb == "add" {
                    table.ours.insert(*route);
                } else {
                    table.ours.remove(route);
                }
                faults.clear(About::Route(route.destination));
            }
            Err(error) => fail(
                faults,
                About::Route(route.destination),
                &format!("route {route}"),
                &format!("cannot {verb} it: {error}"),
                error,
            ),
        }
    }
}

fn conflict(view: &NodeView, route: &NodeRoute, theirs: &str) -> Condition {
    let holder = view.cluster().nodes().find(|(_, node)| {
        node.pod_cidrs()
            .any(|text| ferrule_model::network::parse_network(text) == Ok(route.destination))
    });
    Condition {
        object: cluster_object(Kind::Node, holder.map_or("", |(name, _)| name)),
        reason: Reason::RouteConflict,
        message: format!(
            "spec.podCIDRs: another program's route leads to {} ({theirs}); it is left alone and \
             ours via {} is not made, remove that one if it is wrong",
            route.destination, route.gateway
        ),
    }
}

fn fail(faults: &mut Faults, about: About, object: &str, words: &str, error: &Error) {
    let remedy = remedy(error.errno(), None);
    if faults.note(about, object.to_owned(), words.to_owned(), &remedy) {
        tracing::error!(object, "{words}");
    }
}

fn own_address(address: MachineAddress) -> Option<OwnAddress> {
    let link = IpNetwork::new(address.ip, address.prefix).ok()?;
    Some(OwnAddress {
        ip: address.ip,
        link: IpNetwork::new(link.network(), link.prefix()).ok()?,
        device: address.device,
    })
}
