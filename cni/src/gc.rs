//! The verb GC: what the runtime does not know any longer goes.
//!
//! The runtime names what is in use of one network. Every other attachment of
//! that network loses its interface and then its lease; other networks', and
//! what is not provably ours, stay. As much is done as can be, and everything
//! that cannot be is named. Then the agent puts right what nobody called for.

use std::collections::{BTreeMap, BTreeSet};

use ferrule_model::names::{Attachment, IfName, NetworkName};
use ferrule_model::ownership;

use crate::agent::{self, Released};
use crate::config::Config;
use crate::failure::{Code, Failure};
use crate::kernel::{Kernel, KernelError, Link};
use crate::lock::{self, Lock};
use crate::removal::RemovalError;

/// Attachments that are locked at the same time, and removed in one request: each
/// takes a descriptor, of which a process usually has 1,024.
const AT_ONCE: usize = 256;

/// Removes what is not in use. Doing it again is fine.
pub(crate) async fn run(config: &Config) -> Result<(), Failure> {
    let network = config.network()?;
    let valid = config.valid_attachments()?;
    let host = Kernel::open()?;
    // Whoever cannot say what is leased cannot be asked to end it.
    let leased = agent::leases_of(config, &network)?;
    let devices = host.devices().await?;
    let stale: BTreeSet<Attachment> = leased
        .into_iter()
        .chain(of_network(&devices, &network))
        .filter(|attachment| !valid.contains(attachment))
        .collect();
    let mut problems = Vec::new();
    let stale: Vec<Attachment> = stale.into_iter().collect();
    for part in stale.chunks(AT_ONCE) {
        let (part, _locks) = lock(config, part, &mut problems);
        let gone = remove(&host, &part, &mut problems).await?;
        for attachment in gone {
            match agent::release(config, attachment) {
                Ok(Released::ByAgent | Released::Queued(_)) => {}
                Err(error) => problems.push(error.to_string()),
            }
        }
    }
    problems.extend(agent::tidy(config).err().map(|failure| failure.to_string()));
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Io,
        format!(
            "GC of network {network} could not remove everything: {}; it is tried again with the next GC",
            problems[0]
        ),
    )
    .with_details(problems))
}

/// Whose devices there are: without a lease their alias says so, and of which network.
fn of_network(devices: &[Link], network: &NetworkName) -> impl Iterator<Item = Attachment> {
    devices.iter().filter_map(move |device| {
        let (attachment, of) = device.read_alias()?;
        (of.as_ref() == Some(network)).then_some(attachment)
    })
}

/// Locks what can be at once: what another plugin is at work on is not stale.
fn lock<'a>(
    config: &Config,
    stale: &'a [Attachment],
    problems: &mut Vec<String>,
) -> (Vec<&'a Attachment>, Vec<Lock>) {
    let mut locked = Vec::new();
    let mut locks = Vec::new();
    for attachment in stale {
        match lock::take(&config.agent_socket, attachment, lock::NOT_AT_ALL) {
            Ok(lock) => {
                locked.push(attachment);
                locks.push(lock);
            }
            Err(error) => problems.push(error.to_string()),
        }
    }
    (locked, locks)
}

/// Removes the devices of locked attachments, all in one request so that they
/// wait for the kernel together. Returns the attachments that have none any
/// longer: the lease outlives a link that is still there, its address is in use.
async fn remove<'a>(
    host: &Kernel,
    stale: &[&'a Attachment],
    problems: &mut Vec<String>,
) -> Result<BTreeSet<&'a Attachment>, KernelError> {
    let mut gone: BTreeSet<&Attachment> = stale.iter().copied().collect();
    let names = |attachment| {
        let names = [
            ownership::host_veth_name(attachment),
            ownership::shaper_name(attachment),
        ];
        names.map(|name: IfName| (name.to_string(), attachment))
    };
    let owners: BTreeMap<String, &Attachment> = stale.iter().copied().flat_map(names).collect();
    let mut doomed: Vec<(&Attachment, &Link)> = Vec::new();
    // Looked at again, for an ADD may have been at work until it was locked.
    let devices = host.devices().await?;
    for device in &devices {
        let Some(attachment) = owners.get(&device.name).copied() else {
            continue;
        };
        if device.is_of(attachment) {
            doomed.push((attachment, device));
        } else if device.is_altered_end_of(attachment) {
            problems.push(RemovalError::altered(attachment, device).to_string());
            gone.remove(attachment);
        }
    }
    let links: Vec<&Link> = doomed.iter().map(|(_, link)| *link).collect();
    let results = host.delete_each(&links).await;
    for ((attachment, _), result) in doomed.iter().zip(results) {
        if let Err(error) = result {
            problems.push(error.to_string());
            gone.remove(attachment);
        }
    }
    Ok(gone)
}
