//! The kernel of one node: opened, observed, changed, cleaned.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use ferrule_model::address::{BackendAddr, FrontendAddr};
use ferrule_model::change::Change;
use ferrule_model::names::IfName;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::{Scheduler, Scheduling, VirtualService, Weight};
use ferrule_model::source_nat::SourceNat;
use ferrule_netlink::{Error, Protocol, Socket};
use rustix::io::Errno;
use tracing::info;

use crate::apply::{ChangeError, Kernel};
use crate::audit::{Loaded, load_filter};
use crate::filter::{self, Element, Elements, RulesetError};
use crate::ipvs::{
    self, ForwardMethod, Order, RealServer, ServerSettings, Service, ServiceFlags, ServiceKey,
    ServiceSettings,
};
use crate::modules;
use crate::routes::{NodeRoute, Routes};
use crate::sysctl::{self, SysctlError};
use crate::vip::{DeviceError, VipDevice};

/// Weight by which a real server is observed whose other settings are not ours
/// (limits, a forwarding method other than NAT): no desired weight equals it,
/// so it is put right or removed.
const FOREIGN_SETTINGS: Weight = Weight::MAX;

/// `IP_VS_SVC_F_SCHED1` is bit 3.
const SCHEDULER_FLAGS_SHIFT: u32 = 3;
const SCHEDULER_FLAGS: u32 = 0b111;

/// How our things are called and where the kernel's are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The dummy device that carries the VIPs.
    pub vip_device: IfName,
    /// Our nftables table.
    pub nft_table: String,
    /// Where `/proc/sys` is.
    pub sysctl_root: PathBuf,
    /// Whether kernel modules may be loaded.
    pub load_modules: bool,
    /// The program that loads the base ruleset.
    pub nft_program: PathBuf,
}

/// Why services cannot be programmed. Each names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No IPVS.
    #[error(
        "this kernel has no IPVS, without which no service is programmed ({0}); {remedy}",
        remedy = modules::remedy(&["ip_vs", "ip_vs_rr"])
    )]
    NoIpvs(Error),
    /// No nftables.
    #[error(
        "this kernel has no nftables, without which there is neither guard nor source NAT ({0}); {remedy}",
        remedy = modules::remedy(&["nf_tables"])
    )]
    NoNftables(Error),
    /// A socket could not be made.
    #[error("cannot talk to the kernel: {0}")]
    Socket(Error),
    /// The VIP device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guard and source NAT.
    #[error(transparent)]
    Ruleset(#[from] RulesetError),
    /// The table that was loaded could not be read back.
    #[error("cannot read nftables table {table} back: {source}")]
    ReadBack {
        /// Its name.
        table: String,
        /// Why.
        source: Error,
    },
    /// A sysctl.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

/// Why the kernel's state is not known.
#[derive(Debug, thiserror::Error)]
#[error("cannot list {what}: {source}")]
pub struct ObserveError {
    what: String,
    source: Error,
}

impl ObserveError {
    pub(crate) fn of(what: impl Into<String>) -> impl FnOnce(Error) -> Self {
        let what = what.into();
        move |source| Self { what, source }
    }
}

/// What could not be removed.
#[derive(Debug, thiserror::Error)]
pub struct CleanupError(Vec<String>);

impl fmt::Display for CleanupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

/// The kernel of one network namespace.
#[derive(Debug)]
pub struct Node {
    pub(crate) settings: Settings,
    pub(crate) ipvs: ipvs::Client,
    pub(crate) elements: Elements,
    pub(crate) device: VipDevice,
    /// Asks about the table, so that it never waits for elements.
    pub(crate) netfilter: Socket,
    pub(crate) nat: SourceNat,
    /// Our table as we loaded it.
    pub(crate) loaded: Loaded,
    /// Generation of the kernel's ruleset when the table was last compared.
    pub(crate) generation: Option<u32>,
}

impl Node {
    /// Prepares the kernel of the calling thread's network namespace: sysctls, the VIP
    /// device, the guard and source NAT. Modules are the caller's part
    /// ([`modules::Missing::load`]). Idempotent. With `keep`,
    /// rules of source NAT that are there stay as they are until
    /// [`Node::set_source_nat`]: for who does not know yet what they should be.
    ///
    /// # Errors
    /// [`OpenError`]; what was prepared stays and does no harm.
    pub async fn open(settings: Settings, nat: SourceNat, keep: bool) -> Result<Self, OpenError> {
        let ipvs = ipvs::Client::open().await.map_err(|error| {
            if error.is_not_found() {
                OpenError::NoIpvs(error)
            } else {
                OpenError::Socket(error)
            }
        })?;
        sysctl::ensure_forwarding(&settings.sysctl_root)?;
        sysctl::ensure_services(&settings.sysctl_root)?;
        let netfilter = Socket::open(Protocol::Netfilter).map_err(|error| {
            if error.errno() == Some(Errno::PROTONOSUPPORT) {
                OpenError::NoNftables(error)
            } else {
                OpenError::Socket(error)
            }
        })?;
        let loaded = load_filter(&settings, &netfilter, &nat, keep).await?;
        Ok(Self {
            ipvs,
            elements: Elements::open(&settings.nft_table).map_err(OpenError::Socket)?,
            device: VipDevice::ensure(&settings.vip_device).await?,
            netfilter,
            nat,
            loaded,
            generation: None,
            settings,
        })
    }

    /// What of ours the kernel holds. Changes nothing but what [`Node::observe_filter`] removes.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe(&self) -> Result<Observed, ObserveError> {
        let mut observed = Observed::default();
        self.observe_filter(&mut observed).await?;
        observed.bound = self.observe_vips().await?;
        for (addr, scheduling) in self.observe_services(&observed).await? {
            let servers = self.observe_servers(&addr).await?;
            let service = VirtualService {
                scheduling,
                servers,
            };
            observed.services.insert(addr, service);
        }
        Ok(observed)
    }

    /// Reads the elements of our sets into `observed`, in the place of what was there.
    /// Elements that can only be another's, which no [`Change`] could name, are removed;
    /// returns the names of the sets where they were.
    ///
    /// # Errors
    /// [`ObserveError`]; `observed` is not touched then.
    pub async fn observe_filter(
        &self,
        observed: &mut Observed,
    ) -> Result<Vec<&'static str>, ObserveError> {
        let elements = self.elements.list_all().await;
        let (elements, strange) =
            elements.map_err(ObserveError::of("the elements of our nftables sets"))?;
        let removed = self.elements.remove_strange(&strange).await;
        removed.map_err(ObserveError::of("foreign elements of our nftables sets"))?;
        observed.guarded.clear();
        observed.allowed.clear();
        observed.external.clear();
        observed.preserved.clear();
        observed.hairpins.clear();
        for element in elements {
            match element {
                Element::Vip(ip) => observed.guarded.insert(ip),
                Element::Frontend(addr) => observed.allowed.insert(addr),
                Element::External(addr) => observed.external.insert(addr),
                Element::Preserved(addr) => observed.preserved.insert(addr),
                Element::Hairpin(ip) => observed.hairpins.insert(ip),
            };
        }
        Ok(strange.iter().map(filter::Strange::set).collect())
    }

    /// The addresses on the VIP device.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_vips(&self) -> Result<BTreeSet<IpAddr>, ObserveError> {
        let device = format!("the addresses of {}", self.device.name());
        let addresses = self.device.addresses().await;
        addresses.map_err(ObserveError::of(device))
    }

    /// Our virtual services without their real servers; `observed` has the proof
    /// which ones are ours.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_services(
        &self,
        observed: &Observed,
    ) -> Result<BTreeMap<FrontendAddr, Scheduling>, ObserveError> {
        let vips: BTreeSet<IpAddr> = &observed.guarded | &observed.bound;
        let services = self.ipvs.services().await;
        let services = services.map_err(ObserveError::of("virtual services"))?;
        let ours = services.iter().filter_map(|service| match service.key {
            ServiceKey::Address(addr) if owns_virtual_service(&addr, &vips, &observed.external) => {
                Some((addr, scheduling(service)))
            }
            // By firewall mark: never ours.
            ServiceKey::Address(_) | ServiceKey::Mark { .. } => None,
        });
        Ok(ours.collect())
    }

    /// The real servers of a virtual service; none if there is no such service.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_servers(
        &self,
        addr: &FrontendAddr,
    ) -> Result<BTreeMap<BackendAddr, Weight>, ObserveError> {
        match self.ipvs.servers(&ServiceKey::Address(*addr)).await {
            Ok(servers) => Ok(servers.iter().map(|s| (s.addr, weight(s))).collect()),
            Err(error) if error.is_not_found() => Ok(BTreeMap::new()),
            Err(error) => Err(ObserveError::of(format!("real servers of {addr}"))(error)),
        }
    }

    /// Counters of our virtual services, for listings.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn service_statistics(
        &self,
    ) -> Result<BTreeMap<FrontendAddr, ipvs::Stats>, ObserveError> {
        let services = self.ipvs.services().await;
        let services = services.map_err(ObserveError::of("virtual services"))?;
        let by_address = services
            .into_iter()
            .filter_map(|service| match service.key {
                ServiceKey::Address(addr) => Some((addr, service.stats)),
                ServiceKey::Mark { .. } => None,
            });
        Ok(by_address.collect())
    }

    async fn orders(&self, orders: Vec<Order>) -> Vec<Result<(), Error>> {
        self.ipvs.carry_out(&orders).await
    }

    /// Makes things; those that are there already are made exact by the second order.
    /// Returns also where that was so.
    async fn orders_with_second(
        &self,
        first: Vec<Order>,
        second: &[Order],
    ) -> (Vec<Result<(), Error>>, Vec<usize>) {
        let mut results = self.orders(first).await;
        let existing: Vec<usize> = results
            .iter()
            .enumerate()
            .filter(|(_, result)| result.as_ref().is_err_and(Error::already_exists))
            .map(|(index, _)| index)
            .collect();
        if existing.is_empty() {
            return (results, existing);
        }
        let orders = existing
            .iter()
            .filter_map(|i| second.get(*i).cloned())
            .collect();
        for (index, result) in existing.iter().zip(self.orders(orders).await) {
            if let Some(slot) = results.get_mut(*index) {
                *slot = result;
            }
        }
        (results, existing)
    }

    /// Makes virtual services. One that another program made before us is made
    /// exact; real servers in it are not what the caller believes to be there,
    /// so it fails as "exists", for the caller to observe and to put right.
    async fn add_services(&self, first: Vec<Order>, second: &[Order]) -> Vec<Result<(), Error>> {
        let (mut results, existing) = self.orders_with_second(first, second).await;
        for index in existing {
            let (Some(slot), Some(Order::SetService(key, _))) =
                (results.get_mut(index), second.get(index))
            else {
                continue;
            };
            if slot.is_err() {
                continue;
            }
            *slot = match self.ipvs.servers(key).await {
                Ok(servers) if servers.is_empty() => Ok(()),
                Ok(_) => Err(Error::Refused {
                    errno: Errno::EXIST,
                    reason: Some("with real servers that are not ours".to_owned()),
                }),
                Err(error) => Err(error),
            };
        }
        results
    }
}

/// Changes of one kind, taken apart.
#[derive(Default)]
struct Run {
    ips: Vec<IpAddr>,
    elements: Vec<Element>,
    first: Vec<Order>,
    second: Vec<Order>,
}

impl Run {
    fn of(changes: &[Change]) -> Self {
        let mut run = Self::default();
        for change in changes {
            run.take(change);
        }
        run
    }

    fn take(&mut self, change: &Change) {
        let key = |addr: &FrontendAddr| ServiceKey::Address(*addr);
        match change {
            Change::UnbindVip(ip) | Change::BindVip(ip) => self.ips.push(*ip),
            Change::UnguardVip(ip) | Change::GuardVip(ip) => self.elements.push(Element::Vip(*ip)),
            Change::AddHairpin(ip) | Change::RemoveHairpin(ip) => {
                self.elements.push(Element::Hairpin(*ip));
            }
            Change::AddExternal(addr) | Change::RemoveExternal(addr) => {
                self.elements.push(Element::External(*addr));
            }
            Change::AddPreserved(addr) | Change::RemovePreserved(addr) => {
                self.elements.push(Element::Preserved(*addr));
            }
            Change::DisallowFrontend(addr) | Change::AllowFrontend(addr) => {
                self.elements.push(Element::Frontend(*addr));
            }
            Change::RemoveService(addr) => self.first.push(Order::DeleteService(key(addr))),
            Change::AddService(addr, how) => {
                self.first
                    .push(Order::AddService(key(addr), service_settings(addr, how)));
                self.second
                    .push(Order::SetService(key(addr), service_settings(addr, how)));
            }
            Change::UpdateService(addr, how) => {
                self.first
                    .push(Order::SetService(key(addr), service_settings(addr, how)));
            }
            Change::AddServer(addr, backend, weight) => {
                let settings = ServerSettings::nat(*weight);
                self.first
                    .push(Order::AddServer(key(addr), *backend, settings));
                self.second
                    .push(Order::SetServer(key(addr), *backend, settings));
            }
            Change::UpdateServer(addr, backend, weight) => {
                let settings = ServerSettings::nat(*weight);
                self.first
                    .push(Order::SetServer(key(addr), *backend, settings));
            }
            Change::RemoveServer(addr, backend) => {
                self.first.push(Order::DeleteServer(key(addr), *backend));
            }
        }
    }
}

impl Kernel for Node {
    async fn execute(&mut self, changes: &[Change]) -> Vec<Result<(), ChangeError>> {
        let Some(kind) = changes.first() else {
            return Vec::new();
        };
        let run = Run::of(changes);
        let (results, gone) = match kind {
            Change::UnbindVip(_) => (self.device.unbind(&run.ips).await, Gone::Fine),
            Change::BindVip(_) => (self.device.bind(&run.ips).await, Gone::Contradicts),
            Change::UnguardVip(_)
            | Change::DisallowFrontend(_)
            | Change::RemoveExternal(_)
            | Change::RemovePreserved(_)
            | Change::RemoveHairpin(_) => {
                (self.elements.remove(&run.elements).await, Gone::Contradicts)
            }
            Change::GuardVip(_)
            | Change::AllowFrontend(_)
            | Change::AddExternal(_)
            | Change::AddPreserved(_)
            | Change::AddHairpin(_) => (self.elements.add(&run.elements).await, Gone::Contradicts),
            Change::RemoveService(_) | Change::RemoveServer(..) => {
                (self.orders(run.first).await, Gone::Fine)
            }
            // Not found is the scheduler here, not something that we believed to be there.
            Change::AddService(..) => {
                (self.add_services(run.first, &run.second).await, Gone::Fails)
            }
            Change::AddServer(..) => {
                let (results, _) = self.orders_with_second(run.first, &run.second).await;
                (results, Gone::Contradicts)
            }
            Change::UpdateService(..) | Change::UpdateServer(..) => {
                (self.orders(run.first).await, Gone::Contradicts)
            }
        };
        results
            .into_iter()
            .map(|result| judge(result, gone))
            .collect()
    }
}

/// What "not found" means for a change.
#[derive(Clone, Copy)]
enum Gone {
    /// It is as it should be.
    Fine,
    /// Something that the change builds on was removed by another.
    Contradicts,
    /// A failure as any other.
    Fails,
}

fn judge(result: Result<(), Error>, gone: Gone) -> Result<(), ChangeError> {
    result.or_else(|error| match gone {
        Gone::Fine if error.is_not_found() => Ok(()),
        Gone::Contradicts if error.is_not_found() => Err(ChangeError::contradicts(error)),
        Gone::Fails if error.already_exists() => Err(ChangeError::contradicts(error)),
        Gone::Fine | Gone::Contradicts | Gone::Fails => Err(ChangeError::new(error)),
    })
}

fn service_settings(addr: &FrontendAddr, scheduling: &Scheduling) -> ServiceSettings {
    let scheduler_flags =
        (u32::from(scheduling.scheduler_flags) & SCHEDULER_FLAGS) << SCHEDULER_FLAGS_SHIFT;
    let mut flags = ServiceFlags::from_bits(scheduler_flags);
    if scheduling.persistence.is_some() {
        flags = flags | ServiceFlags::PERSISTENT;
    }
    ServiceSettings {
        scheduler: scheduling.scheduler.name().to_owned(),
        flags,
        timeout: scheduling.persistence.unwrap_or(0),
        prefix: ferrule_model::address::Family::of(addr.ip).bits(),
        engine: None,
    }
}

/// A service with settings that we never make is observed with a scheduler that
/// does not exist, so that it differs from whatever is desired.
fn scheduling(service: &Service) -> Scheduling {
    let settings = &service.settings;
    let ours = SCHEDULER_FLAGS << SCHEDULER_FLAGS_SHIFT
        | ServiceFlags::PERSISTENT.bits()
        | ServiceFlags::HASHED.bits();
    let foreign = settings.flags.bits() & !ours != 0
        || settings.prefix != service.key.family().bits()
        || settings.engine.is_some();
    let scheduler = if foreign {
        Scheduler::Other(format!("{} with foreign settings", settings.scheduler))
    } else {
        Scheduler::from_name(&settings.scheduler)
    };
    let scheduler_flags = settings.flags.bits() >> SCHEDULER_FLAGS_SHIFT & SCHEDULER_FLAGS;
    Scheduling {
        scheduler,
        scheduler_flags: scheduler_flags.to_le_bytes()[0],
        persistence: settings
            .flags
            .contains(ServiceFlags::PERSISTENT)
            .then_some(settings.timeout),
    }
}

fn weight(server: &RealServer) -> Weight {
    let settings = server.settings;
    let ours = settings.forward == ForwardMethod::Nat || settings.forward == ForwardMethod::Local;
    if ours && settings.upper == 0 && settings.lower == 0 {
        settings.weight
    } else {
        FOREIGN_SETTINGS
    }
}

/// Removes what is ours from the calling thread's network namespace: virtual
/// services on our VIPs and node ports, the VIP device, our nftables table, routes
/// to other nodes' pods; nothing else.
///
/// # Errors
/// Everything that could not be removed; what could is gone.
pub async fn cleanup(settings: Settings) -> Result<(), CleanupError> {
    let mut problems = Vec::new();
    let services = remove_services(&settings, &mut problems).await;
    match our_device(&settings).await {
        Ok(None) => {}
        // Its addresses prove whose the services are: it stays until these are gone.
        Ok(Some(device)) if services => {
            if let Err(error) = device.remove().await {
                problems.push(format!("device {}: {error}", settings.vip_device));
            }
        }
        Ok(Some(_)) => problems.push(format!("device {} stays", settings.vip_device)),
        Err(error) => problems.push(error.to_string()),
    }
    if services && let Err(error) = filter::remove(&settings.nft_program, &settings.nft_table).await
    {
        problems.push(error.to_string());
    }
    if let Err(error) = remove_routes().await {
        problems.push(format!("routes to other nodes' pods: {error}"));
    }
    if problems.is_empty() {
        Ok(())
    } else {
        Err(CleanupError(problems))
    }
}

/// Routes to this node's pods stay: the pods live on.
async fn remove_routes() -> Result<(), Error> {
    let routes = Routes::open()?;
    let ours: Vec<NodeRoute> = routes.list().await?.ours.into_iter().collect();
    routes.remove(&ours).await.into_iter().collect()
}

/// Whether all of our virtual services are gone.
async fn remove_services(settings: &Settings, problems: &mut Vec<String>) -> bool {
    let client = match ipvs::Client::open().await {
        Ok(client) => client,
        Err(error) if error.is_not_found() => return true,
        Err(error) => {
            problems.push(format!("virtual services: {error}"));
            return false;
        }
    };
    let (vips, external) = match our_addresses(settings).await {
        Ok(ours) => ours,
        Err(error) => {
            problems.push(error);
            return false;
        }
    };
    let services = match client.services().await {
        Ok(services) => services,
        Err(error) => {
            problems.push(format!("virtual services: {error}"));
            return false;
        }
    };
    let orders: Vec<Order> = services
        .iter()
        .filter(|service| {
            matches!(&service.key, ServiceKey::Address(addr)
                if owns_virtual_service(addr, &vips, &external))
        })
        .map(|service| Order::DeleteService(service.key))
        .collect();
    let before = problems.len();
    for (order, result) in orders.iter().zip(client.carry_out(&orders).await) {
        if let Err(error) = result
            && !error.is_not_found()
        {
            problems.push(format!("{order:?}: {error}"));
        }
    }
    problems.len() == before
}

/// A device of the name that is no dummy is another's: none of ours is there.
async fn our_device(settings: &Settings) -> Result<Option<VipDevice>, DeviceError> {
    match VipDevice::find(&settings.vip_device).await {
        Err(DeviceError::Taken { device }) => {
            info!(%device, "not ours, it stays");
            Ok(None)
        }
        found => found,
    }
}

/// VIPs of ours, and our frontends at addresses that are not.
async fn our_addresses(
    settings: &Settings,
) -> Result<(BTreeSet<IpAddr>, BTreeSet<FrontendAddr>), String> {
    let mut vips = BTreeSet::new();
    let mut external = BTreeSet::new();
    let device = our_device(settings).await;
    if let Some(device) = device.map_err(|error| error.to_string())? {
        let addresses = device.addresses().await;
        vips.extend(addresses.map_err(|error| format!("device {}: {error}", device.name()))?);
    }
    let elements = Elements::open(&settings.nft_table).map_err(|error| error.to_string())?;
    match elements.list().await {
        Ok(elements) => {
            for element in elements {
                match element {
                    Element::Vip(ip) => {
                        vips.insert(ip);
                    }
                    Element::External(addr) => {
                        external.insert(addr);
                    }
                    Element::Frontend(_) | Element::Preserved(_) | Element::Hairpin(_) => {}
                }
            }
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(format!("table {}: {error}", settings.nft_table)),
    }
    Ok((vips, external))
}
