//! The verb GC: what the runtime does not know any longer goes.
//!
//! The runtime names what is in use of one network. Every other attachment of
//! that network loses its interface and then its lease; other networks', and
//! what is not provably ours, stay. As much is done as can be, and everything
//! that cannot be is named. Then the agent puts right what nobody called for.

use std::collections::BTreeSet;

use ferrule_model::names::{Attachment, NetworkName};

use crate::agent::{self, Released};
use crate::config::Config;
use crate::failure::{Code, Failure};
use crate::kernel::{Kernel, Link};

/// Removes what is not in use. Doing it again is fine.
pub(crate) async fn run(config: &Config) -> Result<(), Failure> {
    let network = config.network()?;
    let valid = config.valid_attachments()?;
    let host = Kernel::open()?;
    // Whoever cannot say what is leased cannot be asked to end it.
    let leased = agent::leases_of(config, &network)?;
    let stale: BTreeSet<Attachment> = leased.difference(&valid).cloned().collect();
    let devices = host.devices().await?;
    let (removed, mut problems) = remove(&host, &devices, &network, &valid, &stale).await;
    for attachment in &stale {
        // The lease outlives a link that is still there: its address is in use.
        if !removed.contains(attachment) {
            continue;
        }
        match agent::release(config, attachment) {
            Ok(Released::ByAgent | Released::Queued(_)) => {}
            Err(error) => problems.push(error.to_string()),
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

/// Removes the devices of whoever is not in use, all in one request so that
/// they wait for the kernel together. Returns the stale attachments that have
/// none any longer, and what went wrong.
async fn remove(
    host: &Kernel,
    devices: &[Link],
    network: &NetworkName,
    valid: &BTreeSet<Attachment>,
    stale: &BTreeSet<Attachment>,
) -> (BTreeSet<Attachment>, Vec<String>) {
    let mut gone = stale.clone();
    let mut doomed: Vec<(Option<&Attachment>, &Link)> = Vec::new();
    for device in devices {
        let leased = stale.iter().find(|attachment| device.is_of(attachment));
        // Without a lease its alias says whose it is, and of which network.
        let orphan = || {
            device.read_alias().is_some_and(|(attachment, of)| {
                of.as_ref() == Some(network) && !valid.contains(&attachment)
            })
        };
        if leased.is_some() || orphan() {
            doomed.push((leased, device));
        }
    }
    let links: Vec<&Link> = doomed.iter().map(|(_, link)| *link).collect();
    let results = host.delete_each(&links).await;
    let mut problems = Vec::new();
    for ((attachment, _), result) in doomed.iter().zip(results) {
        if let Err(error) = result {
            problems.push(error.to_string());
            if let Some(attachment) = attachment {
                gone.remove(*attachment);
            }
        }
    }
    (gone, problems)
}
