//! The kernel of one node: opened, observed, changed, cleaned.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use ferrule_model::address::BackendAddr;
use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::change::Change;
use ferrule_model::names::IfName;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::{Scheduler, Scheduling, VirtualService, Weight};
use ferrule_model::source_nat::SourceNat;
use ferrule_netlink::{Error, Protocol, Socket};
use ipnetwork::IpNetwork;
use rustix::io::Errno;

use crate::apply::{ChangeError, Kernel};
use crate::audit::{Loaded, load_filter};
use crate::bindings::{Bindings, Bound};
use crate::filter::{self, Element, Elements, RulesetError, Swap};
use crate::ipvs::{
    self, ForwardMethod, Order, RealServer, ServerSettings, Service, ServiceFlags, ServiceKey,
    ServiceSettings,
};
use crate::modules;
use crate::sysctl::{self, SysctlError, Sysctls};
use crate::vip::DeviceError;

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
    /// How VIPs are bound.
    pub vip_binding: VipBinding,
    /// Our nftables table.
    pub nft_table: String,
    /// The kernel's settings, and where changes of them are recorded.
    pub sysctls: Sysctls,
    /// Whether kernel modules may be loaded.
    pub load_modules: bool,
    /// Binary logarithm of the buckets of IPVS's connection table, where we load IPVS and
    /// somebody says it.
    pub connection_table_bits: Option<u8>,
    /// The program that loads the base ruleset.
    pub nft_program: PathBuf,
    /// Networks at whose addresses other programs may have virtual services, even at VIPs of ours.
    pub excluded: Vec<IpNetwork>,
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

/// The kernel of one network namespace.
#[derive(Debug)]
pub struct Node {
    pub(crate) settings: Settings,
    pub(crate) ipvs: ipvs::Client,
    pub(crate) elements: Elements,
    pub(crate) bindings: Bindings,
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
        sysctl::ensure_forwarding(&settings.sysctls)?;
        sysctl::ensure_services(&settings.sysctls)?;
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
            bindings: Bindings::open(&settings.vip_device, &settings.vip_binding).await?,
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
        observed.bound = self.observe_bindings().await?;
        for (key, scheduling) in self.observe_services(&observed).await? {
            let servers = self.observe_servers(&key).await?;
            let service = VirtualService {
                scheduling,
                servers,
            };
            observed.services.insert(key, service);
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
        observed.take_filter(Observed::default());
        for element in elements {
            note_element(observed, element);
        }
        Ok(strange.iter().map(filter::Strange::set).collect())
    }

    /// VIPs that are bound, and how.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_bindings(&self) -> Result<BTreeSet<Bound>, ObserveError> {
        let bound = self.bindings.list().await;
        bound.map_err(ObserveError::of("the addresses and local routes of VIPs"))
    }

    /// Our virtual services without their real servers; `observed` has the proof
    /// which ones are ours.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_services(
        &self,
        observed: &Observed,
    ) -> Result<BTreeMap<ServiceKey, Scheduling>, ObserveError> {
        let proofs = observed.proofs(&self.settings.excluded);
        let services = self.ipvs.services().await;
        let services = services.map_err(ObserveError::of("virtual services"))?;
        let ours = services
            .iter()
            .filter(|service| owns_virtual_service(&service.key, &proofs));
        let ours = ours.map(|service| (service.key, scheduling(service)));
        Ok(ours.collect())
    }

    /// The real servers of a virtual service; none if there is no such service.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete.
    pub async fn observe_servers(
        &self,
        key: &ServiceKey,
    ) -> Result<BTreeMap<BackendAddr, Weight>, ObserveError> {
        match self.ipvs.servers(key).await {
            Ok(servers) => Ok(servers.iter().map(|s| (s.addr, weight(s))).collect()),
            Err(error) if error.is_not_found() => Ok(BTreeMap::new()),
            Err(error) => Err(ObserveError::of(format!("real servers of {key}"))(error)),
        }
    }

    /// How many connections each real server of a virtual service has: established ones, and
    /// others, which begin, end, or wait for their time-outs. Of a service that is gone there
    /// are none.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn connections(
        &self,
        key: &ServiceKey,
    ) -> Result<BTreeMap<BackendAddr, (u32, u32)>, ObserveError> {
        match self.ipvs.servers(key).await {
            Ok(servers) => {
                let servers = servers.into_iter();
                Ok(servers.map(|s| (s.addr, (s.active, s.inactive))).collect())
            }
            Err(error) if error.is_not_found() => Ok(BTreeMap::new()),
            Err(error) => Err(ObserveError::of(format!("real servers of {key}"))(error)),
        }
    }

    /// Sets how long IPVS remembers connections; zero leaves a time-out as it is.
    ///
    /// # Errors
    /// [`Error`]; they stay as they were.
    pub async fn set_timeouts(&self, timeouts: &ipvs::Timeouts) -> Result<(), Error> {
        let before = self.ipvs.timeouts().await?;
        let value = timeouts.or(&before);
        if value == before {
            return Ok(());
        }
        self.settings.sysctls.note_timeouts(&before, &value);
        self.ipvs.set_timeouts(&value).await
    }

    /// Counters of our virtual services, for listings.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn service_statistics(
        &self,
    ) -> Result<BTreeMap<ServiceKey, ipvs::Stats>, ObserveError> {
        let services = self.ipvs.services().await;
        let services = services.map_err(ObserveError::of("virtual services"))?;
        let services = services.into_iter();
        Ok(services
            .map(|service| (service.key, service.stats))
            .collect())
    }

    /// The VIP device is ours, and was there; a device that is another's comes and goes.
    async fn bind(&self, bound: &[Bound]) -> Vec<Result<(), ChangeError>> {
        let results = self.bindings.bind(bound).await.into_iter().zip(bound);
        let judged = results.map(|(result, (_, binding))| {
            let gone = match binding {
                Binding::Address => Gone::Contradicts,
                Binding::Route { .. } | Binding::Alias { .. } => Gone::Refuses,
            };
            judge(result, gone)
        });
        judged.collect()
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
    bound: Vec<Bound>,
    elements: Vec<Element>,
    swaps: Vec<Swap>,
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
        match change {
            Change::UnbindVip(ip, binding)
            | Change::BindVip(ip, binding)
            | Change::RebindVip(ip, binding)
            | Change::ReleaseVip(ip, binding) => self.bound.push((*ip, binding.clone())),
            Change::UnguardVip(ip) | Change::GuardVip(ip) => self.elements.push(Element::Vip(*ip)),
            Change::UnsilenceVip(ip) | Change::SilenceVip(ip) => {
                self.elements.push(Element::Silent(*ip));
            }
            Change::AddHairpin(ip) | Change::RemoveHairpin(ip) => {
                self.elements.push(Element::Hairpin(*ip));
            }
            Change::AddExternal(addr) | Change::RemoveExternal(addr) => {
                self.elements.push(Element::External(*addr));
            }
            Change::AddPreserved(addr) | Change::RemovePreserved(addr) => {
                self.elements.push(Element::Preserved(*addr));
            }
            Change::AddServed(addr) | Change::RemoveServed(addr) => {
                self.elements.push(Element::Served(*addr));
            }
            Change::AddLeaving(addr) | Change::RemoveLeaving(addr) => {
                self.elements.push(Element::Leaving(*addr));
            }
            Change::AddClosed(addr) | Change::RemoveClosed(addr) => {
                self.elements.push(Element::Closed(*addr));
            }
            Change::AddDropped(addr) | Change::RemoveDropped(addr) => {
                self.elements.push(Element::Dropped(*addr));
            }
            Change::Restrict(addr, how) => self.swaps.push(Swap::of(*addr, how)),
            Change::SetMark(addr, from, to) => self.swaps.push(Swap::mark(*addr, *from, *to)),
            Change::DisallowFrontend(addr) | Change::AllowFrontend(addr) => {
                self.elements.push(Element::Frontend(*addr));
            }
            Change::RemoveService(key) => self.first.push(Order::DeleteService(*key)),
            Change::AddService(key, how) => {
                self.first
                    .push(Order::AddService(*key, service_settings(key, how)));
                self.second
                    .push(Order::SetService(*key, service_settings(key, how)));
            }
            Change::UpdateService(key, how) => {
                self.first
                    .push(Order::SetService(*key, service_settings(key, how)));
            }
            Change::AddServer(key, backend, weight) => {
                let settings = ServerSettings::nat(*weight);
                self.first.push(Order::AddServer(*key, *backend, settings));
                self.second.push(Order::SetServer(*key, *backend, settings));
            }
            Change::UpdateServer(key, backend, weight) => {
                let settings = ServerSettings::nat(*weight);
                self.first.push(Order::SetServer(*key, *backend, settings));
            }
            Change::RemoveServer(key, backend) => {
                self.first.push(Order::DeleteServer(*key, *backend));
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
            Change::UnbindVip(..) | Change::ReleaseVip(..) => {
                (self.bindings.unbind(&run.bound).await, Gone::Fine)
            }
            Change::BindVip(..) | Change::RebindVip(..) => return self.bind(&run.bound).await,
            Change::UnguardVip(_)
            | Change::UnsilenceVip(_)
            | Change::DisallowFrontend(_)
            | Change::RemoveExternal(_)
            | Change::RemovePreserved(_)
            | Change::RemoveDropped(_)
            | Change::RemoveLeaving(_)
            | Change::RemoveClosed(_)
            | Change::RemoveServed(_)
            | Change::RemoveHairpin(_) => {
                (self.elements.remove(&run.elements).await, Gone::Contradicts)
            }
            Change::GuardVip(_)
            | Change::SilenceVip(_)
            | Change::AllowFrontend(_)
            | Change::AddExternal(_)
            | Change::AddPreserved(_)
            | Change::AddDropped(_)
            | Change::AddLeaving(_)
            | Change::AddClosed(_)
            | Change::AddServed(_)
            | Change::AddHairpin(_) => (self.elements.add(&run.elements).await, Gone::Contradicts),
            Change::Restrict(..) | Change::SetMark(..) => {
                (self.elements.swap(&run.swaps).await, Gone::Contradicts)
            }
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
    /// The same, and so is that something exists.
    Refuses,
}

fn judge(result: Result<(), Error>, gone: Gone) -> Result<(), ChangeError> {
    result.or_else(|error| match gone {
        Gone::Fine if error.is_not_found() => Ok(()),
        Gone::Contradicts if error.is_not_found() => Err(ChangeError::contradicts(error)),
        Gone::Fails if error.already_exists() => Err(ChangeError::contradicts(error)),
        Gone::Fine | Gone::Contradicts | Gone::Fails | Gone::Refuses => {
            Err(ChangeError::new(error))
        }
    })
}

fn service_settings(key: &ServiceKey, scheduling: &Scheduling) -> ServiceSettings {
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
        prefix: key.family().bits(),
        engine: None,
    }
}

/// A service with settings that we never make is observed with a scheduler that
/// does not exist, so that it differs from whatever is desired.
pub(crate) fn scheduling(service: &Service) -> Scheduling {
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

pub(crate) fn note_element(observed: &mut Observed, element: Element) {
    match element {
        Element::Vip(ip) => observed.guarded.insert(ip),
        Element::Silent(ip) => observed.silent.insert(ip),
        Element::Frontend(addr) => observed.allowed.insert(addr),
        Element::External(addr) => observed.external.insert(addr),
        Element::Preserved(addr) => observed.preserved.insert(addr),
        Element::Dropped(addr) => observed.dropped.insert(addr),
        Element::Leaving(addr) => observed.leaving.insert(addr),
        Element::Closed(addr) => observed.closed.insert(addr),
        Element::Served(addr) => observed.served.insert(addr),
        Element::Limited(addr) => observed.limited.insert(addr),
        Element::Admitted(addr, network) => {
            observed.admitted.entry(addr).or_default().insert(network)
        }
        Element::Marked(addr, mark) => observed.marks.insert(addr, mark).is_none(),
        Element::Hairpin(ip) => observed.hairpins.insert(ip),
    };
}
