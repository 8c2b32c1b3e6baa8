//! Pod addresses: decided by `model::ipam`, made durable here.
//!
//! A lease is on disk before anybody hears of it, and a release is on disk
//! before the address can be chosen again. So whatever instruction the agent
//! dies at, no address is leased twice: at worst one is leased to a container
//! that never came to be, whose DEL releases it.
//!
//! A disk that is full costs the calls that it fails, and nothing else: after a
//! failure what is on disk is read anew before the next call is answered.

pub(crate) mod file;
mod tables;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferrule_api::status::RangeStatus;
use ferrule_api::{PodName, Wanted, queue};
use ferrule_model::host_ports::{HostPort, PodPorts};
use ferrule_model::ipam::{ChooseError, Ledger, PodRange};
use ferrule_model::names::{Attachment, NetworkName};
use redb::{Database, TableDefinition};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::{error, info};

use self::file::FileError;
use self::tables::{reopen, stored};
use crate::clock::Moment;
use crate::hostports;
use crate::lock::{self, LockError};

/// Attachment (as JSON) to [`Record`] (as JSON).
const LEASES: TableDefinition<'_, &str, &str> = TableDefinition::new("leases");

/// Number of the release to the address that was released.
const RELEASED: TableDefinition<'_, u64, &str> = TableDefinition::new("released");

/// What is written about a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Leased addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// The pod, where the runtime told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pod: Option<PodName>,
    /// The network, where the plugin told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) network: Option<NetworkName>,
    /// Path of the pod's network namespace, where the plugin told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) netns: Option<String>,
    /// When it was asked for last; absent in leases of older agents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) since: Option<Moment>,
    /// Ports of the node that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ports: Vec<HostPort>,
}

impl Record {
    /// Its host ports, with where they lead.
    fn pod_ports(&self, attachment: &Attachment) -> PodPorts {
        PodPorts {
            pod: hostports::pod_name(attachment, self.pod.as_ref()),
            addresses: self.addresses.clone(),
            ports: self.ports.clone(),
        }
    }

    fn of(wanted: &Wanted, addresses: Vec<IpAddr>, now: Moment) -> Self {
        Self {
            addresses,
            pod: wanted.pod.clone(),
            network: wanted.network.clone(),
            netns: wanted.netns.clone(),
            since: Some(now),
            ports: wanted.ports.clone(),
        }
    }
}

/// What [`Leases::allocate`] gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leased {
    /// Leased addresses, one of each family at most.
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether the attachment had them before.
    pub(crate) renewed: bool,
}

/// Why a lease could not be given or ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LeaseError {
    /// No address is to be had.
    #[error(transparent)]
    Choose(#[from] ChooseError),
    /// An attachment asks for another address than it has.
    #[error(
        "{attachment} has a lease without address {ip}: it has to be released (DEL) before it can have others"
    )]
    HasOthers {
        /// Who asks.
        attachment: Attachment,
        /// For what.
        ip: IpAddr,
    },
    /// The state folder is another's, or cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The file cannot serve.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another pod has a host port that is asked for.
    #[error(transparent)]
    PortTaken(#[from] hostports::Taken),
    /// The lease that there is has other host ports.
    #[error("{0} has a lease with other host ports; call DEL before another ADD")]
    OtherPorts(Attachment),
    /// The file could not be read or written.
    #[error("lease file {path}: {fault}")]
    Store {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: redb::Error,
    },
    /// What stands in the file is no lease.
    #[error(
        "lease file {path} is damaged (entry {entry:?}: {fault}) and was left as it is; drain the \
         node, move the file aside and start the agent again"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its key.
        entry: String,
        /// What is wrong.
        fault: serde_json::Error,
    },
}

/// The node's leases.
#[derive(Debug)]
pub(crate) struct Leases {
    path: PathBuf,
    inner: Mutex<Inner>,
    /// Held for as long as the agent runs.
    _folder: File,
}

#[derive(Debug)]
struct Inner {
    /// `None` while the disk refuses.
    database: Option<Database>,
    ledger: Ledger,
    ports: hostports::Table,
    trouble: Option<Trouble>,
}

/// What is wrong with the disk at present.
#[derive(Clone, Debug)]
pub(crate) struct Trouble {
    /// In words, with a remedy.
    pub(crate) words: String,
    /// Since when, in seconds since 1970.
    pub(crate) since: u64,
    /// How often it was tried.
    pub(crate) attempts: u64,
}

impl Leases {
    /// Opens the file, or makes it. One process at a time can have its folder. On a
    /// disk that is full or read-only no lease can be given or ended; that is no error
    /// here, for it may pass ([`Leases::trouble`]).
    ///
    /// # Errors
    /// When the file cannot be read or is not sound, or another agent has the folder;
    /// nothing on disk was changed then.
    pub(crate) fn open(path: &Path) -> Result<Self, LeaseError> {
        let folder = lock::folder(path.parent().unwrap_or(Path::new("/")))?;
        let mut inner = Inner {
            database: None,
            ledger: Ledger::default(),
            ports: hostports::Table::default(),
            trouble: None,
        };
        let stored = stored(path)?;
        inner.ledger = stored.ledger;
        inner.ports.become_these(stored.ports);
        match file::open(path) {
            Ok(database) => inner.database = Some(database),
            Err(error) if error.may_pass() => {
                error!("no address can be leased or released: {error}");
                inner.note(error.to_string());
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Self {
            path: path.to_owned(),
            inner: Mutex::new(inner),
            _folder: folder,
        })
    }

    /// The ledger holds nothing half-done at any point where its holder could panic.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Likewise, with the file open. After a failure the file says whether what
    /// failed is in it all the same, so it is read anew.
    fn opened(&self) -> Result<MutexGuard<'_, Inner>, LeaseError> {
        let mut inner = self.lock();
        if inner.database.is_some() {
            return Ok(inner);
        }
        match reopen(&self.path) {
            Ok((database, mut stored)) => {
                stored.ledger.set_ranges(inner.ledger.ranges().to_vec());
                stored.ledger.withhold(inner.ledger.withheld().collect());
                inner.database = Some(database);
                inner.ledger = stored.ledger;
                inner.ports.become_these(stored.ports);
                info!(file = %self.path.display(), "the lease file was opened anew");
                Ok(inner)
            }
            Err(error) => {
                inner.note(error.to_string());
                Err(error)
            }
        }
    }

    /// Tries the disk again, if a write to it has failed and none has worked since. What
    /// is on it stays as it is. A file that can be opened proves nothing: a full disk
    /// refuses the write.
    ///
    /// # Errors
    /// When it still refuses.
    pub(crate) fn try_disk(&self) -> Result<(), LeaseError> {
        if self.trouble().is_none() {
            return Ok(());
        }
        let mut inner = self.opened()?;
        let tried = inner.write_nothing();
        tried.map_err(|fault| self.failed(&mut inner, fault))
    }

    /// What is wrong with the disk at present, if anything.
    pub(crate) fn trouble(&self) -> Option<Trouble> {
        self.lock().trouble.clone()
    }

    /// Redb does nothing more with a file once the disk failed it.
    fn failed(&self, inner: &mut Inner, fault: redb::Error) -> LeaseError {
        inner.database = None;
        let error = self.store_error(fault);
        inner.note(error.to_string());
        error
    }

    fn store_error(&self, fault: redb::Error) -> LeaseError {
        match fault {
            redb::Error::Io(source) => LeaseError::File(FileError::Disk {
                path: self.path.clone(),
                action: "write to it",
                source,
            }),
            fault => LeaseError::Store {
                path: self.path.clone(),
                fault,
            },
        }
    }

    /// Sets the node's pod ranges and forgets releases outside of them.
    pub(crate) fn set_ranges(&self, ranges: Vec<PodRange>) {
        let mut inner = self.lock();
        inner.ledger.set_ranges(ranges);
        let forgettable: Vec<IpAddr> = inner.ledger.forgettable().collect();
        for ip in forgettable {
            inner.ledger.forget(ip);
        }
        let ranges: Vec<String> = inner
            .ledger
            .ranges()
            .iter()
            .map(|range| format!("{} ({} addresses)", range.network(), range.capacity()))
            .collect();
        info!(ranges = ranges.join(", "), "pod ranges");
    }

    /// Leases one address of each range; the same ones again to who has a lease,
    /// which counts as asked for `now` from then on.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing is leased then.
    pub(crate) fn allocate(&self, wanted: &Wanted, now: Moment) -> Result<Leased, LeaseError> {
        let mut inner = self.opened()?;
        let attachment = &wanted.attachment;
        let held = inner.ledger.lease(attachment).map(<[IpAddr]>::to_vec);
        let addresses = if let Some(held) = &held {
            if let Some(ip) = wanted.ips.iter().find(|ip| !held.contains(ip)) {
                return Err(LeaseError::HasOthers {
                    attachment: attachment.clone(),
                    ip: *ip,
                });
            }
            // A runtime may tell them in another order at its second attempt.
            let set = |ports: &[HostPort]| ports.iter().copied().collect::<BTreeSet<_>>();
            if set(inner.ports.ports_of(attachment)) != set(&wanted.ports) {
                return Err(LeaseError::OtherPorts(attachment.clone()));
            }
            held.clone()
        } else {
            inner.ports.are_free(attachment, &wanted.ports)?;
            inner.ledger.choose(&wanted.ips)?
        };
        let record = Record::of(wanted, addresses.clone(), now);
        if let Err(fault) = inner.write_lease(attachment, &record) {
            return Err(self.failed(&mut inner, fault));
        }
        if held.is_none()
            && let Err(error) = inner
                .ledger
                .record_lease(attachment.clone(), addresses.clone())
        {
            error!(%error, "the ledger chose an address that is leased");
        }
        if held.is_none() {
            let ports = record.pod_ports(attachment);
            inner.ports.insert(attachment, ports, false);
        }
        Ok(Leased {
            addresses,
            renewed: held.is_some(),
        })
    }

    /// Records addresses that an attachment has been using without a lease.
    /// Whether it has none, and so got one, is returned; addresses that are leased to
    /// another stay so.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn adopt(
        &self,
        attachment: &Attachment,
        record: &Record,
    ) -> Result<bool, LeaseError> {
        let mut inner = self.opened()?;
        if inner.ledger.lease(attachment).is_some() {
            return Ok(false);
        }
        for ip in &record.addresses {
            if let Some(holder) = inner.ledger.holder(*ip) {
                // Nobody else will get it, but of the two only one can work.
                error!(%ip, %holder, %attachment, "two pods use one address, which is leased to the holder; restart one of them");
                return Ok(false);
            }
        }
        if let Err(fault) = inner.write_lease(attachment, record) {
            return Err(self.failed(&mut inner, fault));
        }
        if let Err(error) = inner
            .ledger
            .record_lease(attachment.clone(), record.addresses.clone())
        {
            error!(%error, "an address was leased meanwhile");
        }
        Ok(true)
    }

    /// Holds addresses back that are in use without a lease; see [`Ledger::withhold`].
    /// Which of them have none is returned.
    pub(crate) fn withhold(&self, in_use: BTreeSet<IpAddr>) -> BTreeSet<IpAddr> {
        let mut inner = self.lock();
        inner.ledger.withhold(in_use);
        inner.ledger.withheld().collect()
    }

    /// Whether an address is this node's to give, and no pod has it.
    pub(crate) fn is_abandoned(&self, ip: IpAddr) -> bool {
        self.lock().ledger.is_abandoned(ip)
    }

    /// Ends a lease if its record is still one that should end, which an ADD
    /// that came meanwhile may have changed. Whether it ended is returned.
    ///
    /// # Errors
    /// When it could not be read or written; the lease then stands.
    pub(crate) fn release_if(
        &self,
        attachment: &Attachment,
        should_end: impl FnOnce(&Record) -> bool,
    ) -> Result<bool, LeaseError> {
        let mut inner = self.opened()?;
        let read = inner.read(attachment);
        let read = read.map_err(|fault| self.failed(&mut inner, fault))?;
        let Some((key, value)) = read else {
            return Ok(false);
        };
        let record: Record = serde_json::from_str(&value).map_err(|fault| LeaseError::Damaged {
            path: self.path.clone(),
            entry: key,
            fault,
        })?;
        if !should_end(&record) {
            return Ok(false);
        }
        let released = inner.release(attachment);
        released.map_err(|fault| self.failed(&mut inner, fault))
    }

    /// Ends a lease, if its end is still wanted when nobody else is at the leases.
    /// Whether one ended is returned.
    ///
    /// A plugin whose patience has ended queues the release and goes. What it had asked
    /// for must not end the lease of an ADD that came after it.
    ///
    /// # Errors
    /// When it could not be written; the lease then stands.
    pub(crate) fn release_while(
        &self,
        attachment: &Attachment,
        wanted: impl FnOnce() -> bool,
    ) -> Result<bool, LeaseError> {
        let mut inner = self.opened()?;
        if !wanted() {
            return Ok(false);
        }
        let released = inner.release(attachment);
        released.map_err(|fault| self.failed(&mut inner, fault))
    }

    /// Whether a lease is still what it was; `None` is that there is none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn is_unchanged(
        &self,
        attachment: &Attachment,
        record: Option<&Record>,
    ) -> Result<bool, LeaseError> {
        let mut inner = self.opened()?;
        let read = inner.read(attachment);
        let read = read.map_err(|fault| self.failed(&mut inner, fault))?;
        Ok(match (read, record) {
            (None, None) => true,
            (Some((_, value)), Some(record)) => {
                serde_json::from_str(&value).ok().as_ref() == Some(record)
            }
            (None, Some(_)) | (Some(_), None) => false,
        })
    }

    /// The lease of an attachment, if it has one.
    ///
    /// # Errors
    /// When the file cannot be read, or what stands in it is no lease.
    pub(crate) fn find(&self, attachment: &Attachment) -> Result<Option<Record>, LeaseError> {
        let mut inner = self.opened()?;
        let read = inner.read(attachment);
        let read = read.map_err(|fault| self.failed(&mut inner, fault))?;
        let parsed = read.map(|(entry, value)| {
            serde_json::from_str(&value).map_err(|fault| LeaseError::Damaged {
                path: self.path.clone(),
                entry,
                fault,
            })
        });
        parsed.transpose()
    }

    /// Ends a lease that the plugin asked to end by a file in the queue, and removes the file.
    ///
    /// Both under one lock: an ADD that uses the attachment anew withdraws the
    /// file before it asks for a lease, so a file that is still there was not
    /// overtaken by one (see [`queue`]).
    ///
    /// Whether a lease ended is returned.
    ///
    /// # Errors
    /// When something could not be written; the file then stays.
    pub(crate) fn release_queued(
        &self,
        attachment: &Attachment,
        file: &Path,
    ) -> anyhow::Result<bool> {
        let mut inner = self.opened()?;
        if !file.exists() {
            return Ok(false);
        }
        let released = inner.release(attachment);
        let released = released.map_err(|fault| self.failed(&mut inner, fault))?;
        queue::remove(file)?;
        Ok(released)
    }

    /// Whether an attachment without wishes could have a lease now.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn has_room(&self) -> Result<(), ChooseError> {
        self.lock().ledger.choose(&[]).map(drop)
    }

    /// How full each pod range is.
    pub(crate) fn usage(&self) -> Vec<RangeStatus> {
        let inner = self.lock();
        let ranges = inner.ledger.ranges().iter().map(|range| {
            let leased = inner.ledger.leases().flat_map(|(_, ips)| ips);
            let used = leased.filter(|ip| range.offers(**ip)).count();
            let used = u64::try_from(used).unwrap_or(u64::MAX);
            let withheld = inner.ledger.withheld().filter(|ip| range.offers(*ip));
            let withheld = u64::try_from(withheld.count()).unwrap_or(u64::MAX);
            let taken = used.saturating_add(withheld);
            RangeStatus {
                range: range.network().to_string(),
                used,
                free: u64::from(range.capacity()).saturating_sub(taken),
            }
        });
        ranges.collect()
    }

    /// At most `limit` leases behind the one with the key `after`, each with its key.
    ///
    /// # Errors
    /// When the file cannot be read, or what stands in it is no lease.
    pub(crate) fn page(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, Attachment, Record)>, LeaseError> {
        let mut inner = self.opened()?;
        let entries = inner.read_behind(after, limit);
        let entries = entries.map_err(|fault| self.failed(&mut inner, fault))?;
        let parsed = entries.into_iter().map(|(key, value)| {
            let damaged = |fault| LeaseError::Damaged {
                path: self.path.clone(),
                entry: key.clone(),
                fault,
            };
            let attachment = serde_json::from_str(&key).map_err(damaged)?;
            let record = serde_json::from_str(&value).map_err(damaged)?;
            Ok((key, attachment, record))
        });
        parsed.collect()
    }

    /// The host ports of a lease, served or not.
    pub(crate) fn host_ports(&self, attachment: &Attachment) -> Option<PodPorts> {
        self.lock().ports.of(attachment).cloned()
    }

    /// Has the host ports of a lease served from now on; see [`hostports::Table::accept`].
    pub(crate) fn accept_host_ports(&self, attachment: &Attachment) -> bool {
        self.lock().ports.accept(attachment)
    }

    /// What is to be served now of the leases whose host ports changed; `None` is nothing.
    pub(crate) fn changed_host_ports(&self) -> Vec<(Attachment, Option<PodPorts>)> {
        self.lock().ports.take_changed()
    }

    /// Tells that [`Leases::changed_host_ports`] has something.
    pub(crate) fn host_port_news(&self) -> Arc<Notify> {
        self.lock().ports.news()
    }

    /// How many attachments have a lease.
    pub(crate) fn count(&self) -> usize {
        self.lock().ledger.leases().count()
    }
}

#[cfg(test)]
mod tests;
