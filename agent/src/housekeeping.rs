//! Puts leases and pods' interfaces in agreement with one another: at the
//! start, once a minute, and when a runtime asks for it (GC).
//!
//! They part when something was killed, the node was booted, a namespace was
//! removed behind the runtime's back, or the lease file was lost. What is done
//! about it never touches a live pod, and an ADD that is under way counts as
//! live: [`duties`] decides from what was seen, and is pure. What ends something
//! has to be seen twice ([`confirmed`]), and is carried out only if the lease is
//! still as it was then. Where something cannot be read, nothing ends at all.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ferrule_model::address::Family;
use ferrule_model::names::Attachment;
use ferrule_model::ownership::{
    host_veth_name, is_alias, owns_host_veth, owns_shaper, read_alias, shaper_name,
};
use tracing::{info, warn};

use crate::clock::Moment;
use crate::leases::{LeaseError, Leases, Record};
use crate::links::{self, Device, Seen};
use crate::pods::Pods;

/// Seconds after which no ADD is under way any more. The plugin gives up after 90 s.
const GRACE: u64 = 150;

/// Time between two looks.
const INTERVAL: Duration = Duration::from_mins(1);

/// Time between two looks as long as none has succeeded: until then no address is leased.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);

/// Something to put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// A pod that uses addresses without a lease gets one for them.
    Adopt(Attachment, Record),
    /// A host end that no ADD will finish is removed, or a shaper without a pod; only if
    /// its lease is still this one, or it still has none.
    Remove(Attachment, u32, Option<Record>),
    /// A lease whose pod is gone ends.
    Release(Attachment, Record),
    /// The node has lost its route to a pod.
    Route(Attachment, u32, IpAddr),
}

/// How often what was put right, by what `status` calls it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally(pub(crate) BTreeMap<&'static str, u64>);

/// What there is to be done.
///
/// `started` is when this agent started, from which the age of leases counts
/// that do not tell theirs; `may_live` says of a path whether a network
/// namespace may be there.
pub(crate) fn duties(
    leases: &[(Attachment, Record)],
    seen: &Seen,
    now: &Moment,
    started: &Moment,
    may_live: impl Fn(&str) -> bool,
) -> Vec<Duty> {
    let mut duties = Vec::new();
    let ends: BTreeMap<&str, &Device> = seen.ends.iter().map(|e| (e.name.as_str(), e)).collect();
    let none = BTreeSet::new();
    for (attachment, record) in leases {
        let age = now.since(record.since.as_ref().unwrap_or(started));
        let settled = age.is_none_or(|age| age > GRACE);
        let name = host_veth_name(attachment);
        match ends.get(name.as_str()) {
            _ if !settled => {}
            None => {
                // A namespace does not outlive a boot.
                let lives = age.is_some() && record.netns.as_deref().is_some_and(&may_live);
                let in_use = |ip| seen.routes.values().any(|routes| routes.contains(ip));
                if !lives && !record.addresses.iter().any(in_use) {
                    duties.push(Duty::Release(attachment.clone(), record.clone()));
                }
            }
            // Somebody has changed its alias, or it is a stranger: it may be the pod's.
            Some(end) if !owns_host_veth(attachment, &end.name, end.alias.as_deref(), end.mac) => {}
            // The alias is set before ADD reports: nobody uses this pod.
            Some(end) if end.alias.is_none() => {
                let record = Some(record.clone());
                duties.push(Duty::Remove(attachment.clone(), end.index, record.clone()));
                duties.extend(record.map(|record| Duty::Release(attachment.clone(), record)));
            }
            Some(end) => {
                let routes = seen.routes.get(&end.index).unwrap_or(&none);
                let missing = record.addresses.iter().filter(|ip| !routes.contains(ip));
                duties.extend(missing.map(|ip| Duty::Route(attachment.clone(), end.index, *ip)));
            }
        }
    }
    duties.extend(without_lease(leases, seen, now));
    duties.extend(without_veth(leases, seen, &ends));
    // What is absent from a list that could not be read whole may be there.
    duties.retain(|duty| seen.unclear.is_empty() || !duty.ends_something());
    duties
}

/// The duties of a first look without those that end something and are none any more
/// by a second: a list of interfaces is made while interfaces come.
fn confirmed(first: Vec<Duty>, second: &[Duty]) -> Vec<Duty> {
    let stands = |duty: &Duty| !duty.ends_something() || second.contains(duty);
    first.into_iter().filter(stands).collect()
}

impl Duty {
    /// Whether a live pod would suffer, were it a mistake.
    fn ends_something(&self) -> bool {
        match self {
            Self::Remove(..) | Self::Release(..) => true,
            Self::Adopt(..) | Self::Route(..) => false,
        }
    }
}

/// Addresses that no lease has and a pod uses, each with its interface: what cannot be
/// adopted must not be given to another all the same.
fn loose(leases: &[(Attachment, Record)], seen: &Seen) -> BTreeMap<IpAddr, String> {
    let held = leases.iter().flat_map(|(_, record)| &record.addresses);
    let held: BTreeSet<&IpAddr> = held.collect();
    let mut loose = BTreeMap::new();
    for (index, addresses) in seen.routes.iter().chain(&seen.inside) {
        let end = seen.ends.iter().find(|end| end.index == *index);
        for ip in addresses.iter().filter(|ip| !held.contains(ip)) {
            let name = end.map_or_else(|| format!("interface {index}"), |end| end.name.clone());
            loose.insert(*ip, name);
        }
    }
    loose
}

/// Everything, with what is inside of pods that may have to be adopted.
async fn look(leases: &[(Attachment, Record)]) -> anyhow::Result<Seen> {
    let known = leases.iter().map(|(attachment, _)| attachment);
    let known: BTreeSet<String> = known.map(|a| host_veth_name(a).to_string()).collect();
    let mut seen = links::look().await?;
    links::look_inside(&mut seen, |end| {
        let alias = end.alias.as_deref();
        !known.contains(&end.name) && alias.is_some_and(is_alias)
    })
    .await?;
    Ok(seen)
}

/// Shapers whose veth is gone: it is made before its shaper and removed before it,
/// but where a namespace vanishes the kernel removes the veth alone.
fn without_veth(
    leases: &[(Attachment, Record)],
    seen: &Seen,
    ends: &BTreeMap<&str, &Device>,
) -> Vec<Duty> {
    let mut duties = Vec::new();
    for shaper in &seen.shapers {
        let (alias, mac) = (shaper.alias.as_deref(), shaper.mac);
        // Without an alias its lease says whose it is.
        let told = alias.and_then(|alias| read_alias(&shaper.name, alias));
        let owner = told.map(|(attachment, _)| attachment).or_else(|| {
            let known = leases.iter().map(|(attachment, _)| attachment);
            known
                .filter(|attachment| shaper_name(attachment).as_str() == shaper.name)
                .find(|attachment| owns_shaper(attachment, &shaper.name, alias, mac))
                .cloned()
        });
        if let Some(owner) = owner
            && !ends.contains_key(host_veth_name(&owner).as_str())
        {
            let lease = leases.iter().find(|(attachment, _)| *attachment == owner);
            let record = lease.map(|(_, record)| record.clone());
            duties.push(Duty::Remove(owner, shaper.index, record));
        }
    }
    duties
}

/// Pods that use addresses without a lease.
fn without_lease(leases: &[(Attachment, Record)], seen: &Seen, now: &Moment) -> Vec<Duty> {
    let known: BTreeSet<&Attachment> = leases.iter().map(|(attachment, _)| attachment).collect();
    let none = BTreeSet::new();
    let mut duties = Vec::new();
    for end in &seen.ends {
        let alias = end.alias.as_deref();
        let Some((attachment, network)) = alias.and_then(|alias| read_alias(&end.name, alias))
        else {
            continue;
        };
        let routed = seen.routes.get(&end.index).unwrap_or(&none);
        let inside = seen.inside.get(&end.index).unwrap_or(&none);
        let addresses: Vec<IpAddr> = routed.union(inside).copied().collect();
        // Of several inside of it, some are the pod's own idea: nobody can say which.
        let told = Family::ALL.into_iter().all(|family| {
            let of_family = inside.iter().filter(|ip| Family::of(**ip) == family);
            of_family.count() <= 1
        });
        if known.contains(&attachment) || addresses.is_empty() || !told {
            continue;
        }
        let record = Record {
            addresses,
            pod: None,
            network,
            netns: None,
            since: Some(now.clone()),
            ports: Vec::new(),
        };
        duties.push(Duty::Adopt(attachment.clone(), record));
        let lost = inside.iter();
        duties.extend(lost.map(|ip| Duty::Route(attachment.clone(), end.index, *ip)));
    }
    duties
}

/// Whether something is at a path, or may be: only a clear no counts as one.
fn may_live(path: &str) -> bool {
    match Path::new(path).symlink_metadata() {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Looks once and puts right what is wrong. Until this has worked once, no
/// address is leased: one that is in use without a lease could be chosen.
///
/// # Errors
/// When something could not be seen; nothing was ended then.
pub(crate) async fn tidy(pods: &Arc<Pods>, started: &Moment) -> anyhow::Result<()> {
    let now = Moment::now();
    // Leases first: a pod that comes in between has an interface without one in
    // this list, and adopting it anew changes nothing.
    let listed = {
        let pods = Arc::clone(pods);
        tokio::task::spawn_blocking(move || pods.leases().page(None, usize::MAX)).await??
    };
    let leases: Vec<(Attachment, Record)> = listed
        .into_iter()
        .map(|(_, a, record)| (a, record))
        .collect();
    let seen = look(&leases).await?;
    let mut in_use = loose(&leases, &seen);
    let mut all = duties(&leases, &seen, &now, started, may_live);
    if all.iter().any(Duty::ends_something) || !in_use.is_empty() {
        let again = look(&leases).await?;
        // A pod that came and went in the meantime uses nothing.
        let still = loose(&leases, &again);
        in_use.retain(|ip, _| still.contains_key(ip));
        all = confirmed(all, &duties(&leases, &again, &now, started, may_live));
    }
    let mut kept = BTreeSet::new();
    let mut unknown = Vec::new();
    for duty in all {
        let adopts = matches!(duty, Duty::Adopt(..));
        if let Err(error) = carry_out(pods, duty, &mut kept).await
            && adopts
        {
            unknown.push(error);
        }
    }
    pods.withhold(in_use, seen.unclear.is_empty());
    // Addresses in use that are not leased could be chosen.
    if let Some(error) = unknown.pop()
        && !pods.has_looked()
    {
        return Err(error);
    }
    ensure_clear(&seen)?;
    pods.note_look(Ok(()));
    Ok(())
}

/// That everything could be read: what an interface that could not be is in use with is unknown.
fn ensure_clear(seen: &Seen) -> anyhow::Result<()> {
    let Some(first) = seen.unclear.first() else {
        return Ok(());
    };
    anyhow::bail!(
        "{} of the kernel's answers about interfaces and routes cannot be decoded, so that no \
         lease is ended and no interface removed (the first: {first}); look with `ip -d link show` \
         for an interface that another program changed, and delete the pod that it belongs to",
        seen.unclear.len()
    )
}

/// Does one thing. What fails is told and tried again with the next look; an
/// attachment whose interface could not be removed keeps its lease, and one that was not
/// adopted gets no routes (`kept`).
async fn carry_out(
    pods: &Arc<Pods>,
    duty: Duty,
    kept: &mut BTreeSet<Attachment>,
) -> anyhow::Result<()> {
    let (what, attachment, result) = match duty {
        Duty::Adopt(attachment, record) => {
            let who = attachment.clone();
            let adopted = on_disk(pods, move |leases| leases.adopt(&who, &record)).await;
            if matches!(adopted, Ok(true)) {
                // They stood in the lease alone.
                warn!(container_id = %attachment.container_id, interface = %attachment.interface, "a pod without a lease got one; its host ports, if it had any, are served when it is made anew");
            } else {
                kept.insert(attachment.clone());
            }
            ("adopted", attachment, adopted)
        }
        Duty::Remove(attachment, index, record) => {
            let removed = remove(pods, &attachment, index, record).await;
            if !matches!(removed, Ok(true)) {
                kept.insert(attachment.clone());
            }
            ("removed", attachment, removed)
        }
        Duty::Release(attachment, _) | Duty::Route(attachment, ..)
            if kept.contains(&attachment) =>
        {
            return Ok(());
        }
        Duty::Release(attachment, record) => {
            let who = attachment.clone();
            let released = on_disk(pods, move |leases| {
                leases.release_if(&who, |current| *current == record)
            });
            ("released", attachment, released.await)
        }
        Duty::Route(attachment, index, ip) => {
            let made = links::add_route(index, ip).await;
            (
                "routed",
                attachment,
                made.map(|()| true).map_err(Into::into),
            )
        }
    };
    match result {
        Ok(true) => {
            pods.note_tidied(what);
            info!(container_id = %attachment.container_id, interface = %attachment.interface, what, "put right");
        }
        Ok(false) => {}
        Err(error) => {
            pods.note_tidied("failed");
            warn!(container_id = %attachment.container_id, interface = %attachment.interface, what, error = format!("{error:#}"), "not put right; tried again within a minute");
            return Err(error);
        }
    }
    Ok(())
}

/// Removes an interface, unless an ADD has asked for the attachment's lease since the
/// leases were listed: every ADD does so before it makes one.
async fn remove(
    pods: &Arc<Pods>,
    attachment: &Attachment,
    index: u32,
    record: Option<Record>,
) -> anyhow::Result<bool> {
    let who = attachment.clone();
    let unchanged = on_disk(pods, move |leases| {
        leases.is_unchanged(&who, record.as_ref())
    });
    if !unchanged.await? {
        return Ok(false);
    }
    links::remove(index).await?;
    Ok(true)
}

/// Does what waits for the disk where waiting is allowed.
async fn on_disk(
    pods: &Arc<Pods>,
    work: impl FnOnce(&Leases) -> Result<bool, LeaseError> + Send + 'static,
) -> anyhow::Result<bool> {
    let pods = Arc::clone(pods);
    Ok(tokio::task::spawn_blocking(move || work(pods.leases())).await??)
}

/// Looks if that has not worked yet: an ADD need not wait for the next time.
pub(crate) async fn look_first(pods: &Arc<Pods>) {
    if pods.has_looked() {
        return;
    }
    // One at a time: after a reboot hundreds may ask.
    let _turn = pods.turn_to_look().await;
    if !pods.has_looked()
        && let Err(error) = tidy(pods, pods.started()).await
    {
        pods.note_look(Err(format!("{error:#}")));
    }
}

/// Looks for as long as the agent runs.
pub(crate) async fn keep(pods: Arc<Pods>) {
    let started = pods.started().clone();
    loop {
        let pause = match tidy(&pods, &started).await {
            Ok(()) => INTERVAL,
            Err(error) => {
                pods.note_tidied("failed");
                let error = format!("{error:#}");
                if pods.note_look(Err(error.clone())) {
                    warn!(error, "cannot compare leases with pods' interfaces");
                }
                if pods.has_looked() {
                    INTERVAL
                } else {
                    FIRST_INTERVAL
                }
            }
        };
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests;
