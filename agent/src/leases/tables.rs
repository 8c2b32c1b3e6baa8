//! What stands in the tables of the lease file, and how it is read and written.

use std::net::IpAddr;
use std::ops::Bound;
use std::path::Path;

use ferrule_model::host_ports::PodPorts;
use ferrule_model::ipam::Ledger;
use ferrule_model::names::Attachment;
use redb::{Database, ReadableDatabase as _, WriteTransaction};
use serde::Serialize;
use tracing::error;

use super::{Inner, LEASES, LeaseError, RELEASED, Record, Trouble, file};

impl Inner {
    /// A lease with its key, as they stand in the file.
    pub(super) fn read(
        &self,
        attachment: &Attachment,
    ) -> Result<Option<(String, String)>, redb::Error> {
        let key = json(attachment)?;
        let read = self.database()?.begin_read()?;
        let value = read.open_table(LEASES)?.get(&*key)?;
        Ok(value.map(|value| (key, value.value().to_owned())))
    }

    pub(super) fn note(&mut self, words: String) {
        let trouble = self.trouble.get_or_insert_with(|| Trouble {
            words: String::new(),
            since: crate::reconcile::now(),
            attempts: 0,
        });
        trouble.words = words;
        trouble.attempts += 1;
    }

    pub(super) fn database(&self) -> Result<&Database, redb::Error> {
        self.database.as_ref().ok_or(redb::Error::DatabaseClosed)
    }

    /// In two phases: whatever a crash leaves, the commit that counts is whole, so
    /// that damage to it is never taken for a commit that was cut off.
    pub(super) fn begin(&self) -> Result<WriteTransaction, redb::Error> {
        let mut write = self.database()?.begin_write()?;
        write.set_two_phase_commit(true);
        Ok(write)
    }

    pub(super) fn read_behind(
        &self,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, String)>, redb::Error> {
        let read = self.database()?.begin_read()?;
        let table = read.open_table(LEASES)?;
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut entries = Vec::new();
        for entry in table.range::<&str>((start, Bound::Unbounded))?.take(limit) {
            let (key, value) = entry?;
            entries.push((key.value().to_owned(), value.value().to_owned()));
        }
        Ok(entries)
    }

    pub(super) fn release(&mut self, attachment: &Attachment) -> Result<bool, redb::Error> {
        let Some(addresses) = self.ledger.lease(attachment).map(<[IpAddr]>::to_vec) else {
            return Ok(false);
        };
        let order = self.ledger.next_release();
        self.write_release(attachment, &addresses, order)?;
        self.ledger.record_release(attachment, order);
        self.ports.remove(attachment);
        Ok(true)
    }

    /// Writes as for a lease, and leaves what is there.
    pub(super) fn write_nothing(&mut self) -> Result<(), redb::Error> {
        let write = self.begin()?;
        {
            // A key that no attachment has, since it is no JSON.
            let mut leases = write.open_table(LEASES)?;
            leases.insert("", "")?;
            leases.remove("")?;
        }
        write.commit()?;
        self.trouble = None;
        Ok(())
    }

    pub(super) fn write_lease(
        &mut self,
        attachment: &Attachment,
        record: &Record,
    ) -> Result<(), redb::Error> {
        let (key, value) = (json(attachment)?, json(record)?);
        let write = self.begin()?;
        write.open_table(LEASES)?.insert(&*key, &*value)?;
        {
            // The released entries of addresses in use again have no meaning any longer.
            let mut released = write.open_table(RELEASED)?;
            let texts: Vec<String> = record.addresses.iter().map(ToString::to_string).collect();
            released.retain(|_, ip| !texts.iter().any(|text| text == ip))?;
        }
        write.commit()?;
        self.trouble = None;
        Ok(())
    }

    pub(super) fn write_release(
        &mut self,
        attachment: &Attachment,
        addresses: &[IpAddr],
        order: u64,
    ) -> Result<(), redb::Error> {
        let key = json(attachment)?;
        let write = self.begin()?;
        write.open_table(LEASES)?.remove(&*key)?;
        {
            let mut released = write.open_table(RELEASED)?;
            for (order, ip) in (order..).zip(addresses) {
                released.insert(order, &*ip.to_string())?;
            }
        }
        write.commit()?;
        self.trouble = None;
        Ok(())
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> Result<String, redb::Error> {
    serde_json::to_string(value).map_err(|error| redb::Error::Io(error.into()))
}

pub(super) fn reopen(path: &Path) -> Result<(Database, Stored), LeaseError> {
    let stored = stored(path)?;
    Ok((file::open(path)?, stored))
}

/// What the file says.
pub(super) struct Stored {
    pub(super) ledger: Ledger,
    pub(super) ports: Vec<(Attachment, PodPorts)>,
}

/// Reads the file; nothing is changed.
pub(super) fn stored(path: &Path) -> Result<Stored, LeaseError> {
    let contents = file::read(path)?.unwrap_or_default();
    let mut ledger = Ledger::default();
    let mut ports = Vec::new();
    for (order, ip) in contents.released {
        if let Ok(ip) = ip.parse() {
            ledger.record_released(ip, order);
        }
    }
    for (key, value) in contents.leases {
        let damaged = |fault| LeaseError::Damaged {
            path: path.to_owned(),
            entry: key.clone(),
            fault,
        };
        let attachment: Attachment = serde_json::from_str(&key).map_err(damaged)?;
        let record: Record = serde_json::from_str(&value).map_err(damaged)?;
        if !record.ports.is_empty() {
            ports.push((attachment.clone(), record.pod_ports(&attachment)));
        }
        if let Err(error) = ledger.record_lease(attachment, record.addresses) {
            error!(file = %path.display(), %error, "the earlier lease counts");
        }
    }
    Ok(Stored { ledger, ports })
}
