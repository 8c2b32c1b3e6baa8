//! The verb ADD: a pod gets its interface.
//!
//! Everything is checked before anything is made, and the lease is durable at
//! the agent before its address is used. A failure takes back what was made;
//! a `kill -9` leaves what the DEL after it finds by name and alias.

use std::path::Path;
use std::time::Duration;

use ferrule_api::{HostPort, PodName, Wanted};
use ferrule_model::names::{Attachment, NetworkName};
use ferrule_model::ownership;
use serde_json::Value;

use crate::agent;
use crate::config::Config;
use crate::failure::{Code, Failure};
use crate::fault::{self, Step};
use crate::kernel::{Kernel, Link};
use crate::lock;
use crate::netns::Netns;
use crate::pair::Pair;
use crate::ports;
use crate::removal;
use crate::report::{self, Before};
use crate::shaper::Shaper;
use crate::sysctl;
use crate::undo::Undo;
use crate::wishes::Wishes;

/// What the runtime told about the pod.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) attachment: &'a Attachment,
    pub(crate) netns: &'a Path,
    pub(crate) pod: Option<PodName>,
    pub(crate) network: &'a NetworkName,
    pub(crate) mtu: Option<u32>,
    pub(crate) wishes: Wishes,
}

/// How long the steps of an ADD may take together. The agent counts a lease
/// without an interface as left behind only long after that.
const LIMIT: Duration = Duration::from_secs(90);

/// Both sides of the pair to be, checked and with nothing made yet.
struct Sides {
    netns: Netns,
    host: Kernel,
    pod: Kernel,
    /// Index of the pod's loopback interface.
    loopback: u32,
}

/// Makes the interface and hands its result to `print`, which is part of ADD:
/// a runtime that never got the result will not use the interface.
pub(crate) async fn run(
    config: &Config,
    request: Request<'_>,
    print: impl FnOnce(&Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    // What depends on the MTU is looked at again when the agent has told it.
    config.bandwidth.limits(request.mtu.unwrap_or_default())?;
    let ports = ports::read(config.port_mappings.as_ref())?;
    let before = Before::read(config.version, config.previous.as_ref())?;
    let netns = Netns::open(request.netns)?;
    let attachment = request.attachment;
    // Until everything is made, or undone.
    let _lock = lock::take(
        &config.agent_socket,
        attachment,
        fault::patience(lock::PATIENCE),
    )?;
    let sides = validate(&request, netns).await?;
    fault::reached(Step::Validated);
    let mut undo = Undo::default();
    let made = make(config, request, ports, before, &sides, &mut undo, print);
    let made = tokio::time::timeout(LIMIT, made).await.unwrap_or_else(|_| {
        Err(Failure::new(
            Code::TryAgainLater,
            format!("ADD took more than {LIMIT:?}: is the node overloaded?"),
        ))
    });
    match made {
        Ok(()) => Ok(()),
        Err(failure) => {
            let left = undo.run(config, attachment, &sides.host).await;
            Err(failure.with_details(left))
        }
    }
}

/// Looks into both namespaces and makes sure that the interface is not there yet, nor
/// in use in a third, and that no other of ours is in the pod's.
async fn validate(request: &Request<'_>, netns: Netns) -> Result<Sides, Failure> {
    let host = Kernel::open()?;
    let pod = netns.inside(Kernel::open)??;
    let interface = &request.attachment.interface;
    if pod.link(interface.as_str()).await?.is_some() {
        return Err(Failure::new(
            Code::Taken,
            format!(
                "interface {interface} exists already in network namespace {}: the runtime has to call DEL before it calls ADD again",
                request.netns.display()
            ),
        ));
    }
    check_alone(request, &host, &pod).await?;
    check_no_other_life(request.attachment, &host).await?;
    // Every namespace has one, but its name is only a habit of the kernel.
    let loopback = pod.link("lo").await?.map_or(1, |link| link.index);
    Ok(Sides {
        netns,
        host,
        pod,
        loopback,
    })
}

/// A namespace has one interface of ours: a second would have the same gateways, and the
/// routes to them are there.
async fn check_alone(request: &Request<'_>, host: &Kernel, pod: &Kernel) -> Result<(), Failure> {
    for end in pod.veths().await? {
        let Some(there) = host.other_end(&end).await? else {
            continue;
        };
        if let Some((owner, _)) = there.read_alias()
            && owner.interface.as_str() == end.name
        {
            return Err(Failure::new(
                Code::Taken,
                format!(
                    "network namespace {} (CNI_NETNS) has interface {} by ferrule already, that of {owner}: a namespace can have one; have {} made by another plugin, or call DEL for the other before",
                    request.netns.display(),
                    end.name,
                    request.attachment.interface,
                ),
            ));
        }
    }
    Ok(())
}

/// The host's end of an earlier life of the attachment makes way, but not while a pod
/// uses it: it would be cut off.
async fn check_no_other_life(attachment: &Attachment, host: &Kernel) -> Result<(), Failure> {
    let name = ownership::host_veth_name(attachment);
    if let Some(link) = host.link(name.as_str()).await?
        && link.is_host_end_of(attachment)
        && host.serves_a_pod(&link).await?
    {
        return Err(Failure::new(
            Code::Taken,
            format!(
                "{attachment} has a network already, in another network namespace than CNI_NETNS names (interface {name} of the node leads to it): the runtime has to call DEL before it calls ADD again"
            ),
        ));
    }
    Ok(())
}

/// Everything that has to be undone after a failure.
async fn make(
    config: &Config,
    request: Request<'_>,
    ports: Vec<HostPort>,
    before: Before,
    sides: &Sides,
    undo: &mut Undo,
    print: impl FnOnce(&Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let attachment = request.attachment;
    let netns = request.netns.to_string_lossy();
    let wanted = Wanted {
        attachment: attachment.clone(),
        pod: request.pod,
        network: Some(request.network.clone()),
        netns: Some(netns.clone().into_owned()),
        ips: request.wishes.ips,
        ports,
    };
    let allocation = agent::allocate(config, wanted, request.mtu).inspect_err(|error| {
        if error.may_hold_lease() {
            undo.lease();
        }
    })?;
    // One that is older may be a pod's, and is not ours to end.
    if !allocation.renewed {
        undo.lease();
    }
    fault::reached(Step::Leased);
    let limits = config.bandwidth.limits(allocation.mtu)?;
    let mut pair = Pair::new(
        attachment,
        request.network,
        allocation.mtu,
        allocation.addresses,
    );
    if let Some(mac) = request.wishes.mac {
        pair = pair.with_mac(mac);
    }
    let result = report::added(config.version, &pair, &netns, before);
    // The time of ADD may run out while the kernel is at it.
    undo.link();
    make_link(attachment, sides, &pair).await?;
    fault::reached(Step::LinkMade);
    configure_pod(sides, &pair).await?;
    fault::reached(Step::PodConfigured);
    let host_end = configure_host(sides, &pair).await?;
    fault::reached(Step::HostConfigured);
    let shaper = Shaper::new(attachment, Some(request.network), pair.mtu, limits);
    shaper.make(&sides.host, attachment).await?;
    fault::reached(Step::ShaperMade);
    shaper.apply(&sides.host, &host_end).await?;
    fault::reached(Step::BeforeResult);
    print(&result)
}

/// Makes the pair, after removing the host's end of an earlier life of this
/// attachment. That one is provably ours, and no pod uses it ([`check_no_other_life`]).
async fn make_link(attachment: &Attachment, sides: &Sides, pair: &Pair) -> Result<(), Failure> {
    let create = || {
        let order = pair.create(sides.netns.raw_fd());
        sides.host.carry_out(vec![order])
    };
    match create().await {
        Err(error) if error.already_exists() => {
            removal::remove(&sides.host, attachment, None).await?;
            Ok(create().await?)
        }
        other => Ok(other?),
    }
}

/// The pod's end: settings, addresses, gateway. The loopback interface too,
/// since not every runtime brings it up.
async fn configure_pod(sides: &Sides, pair: &Pair) -> Result<(), Failure> {
    let name = &pair.pod_name;
    let link = made(sides.pod.link(name.as_str()).await?, name.as_str())?;
    let mut settings = vec![sysctl::NO_DAD];
    if pair.has_ipv6() {
        settings.push(sysctl::IPV6_ON);
    }
    sides
        .netns
        .inside(|| sysctl::apply(&pair.pod_name, &settings))??;
    let orders = pair.pod_side(link.index, sides.loopback);
    Ok(sides.pod.carry_out(orders).await?)
}

/// The host's end: settings, routes to the pod, its neighbour entries.
async fn configure_host(sides: &Sides, pair: &Pair) -> Result<Link, Failure> {
    let name = &pair.host_name;
    let link = made(sides.host.link(name.as_str()).await?, name.as_str())?;
    let mut settings = vec![
        sysctl::NO_DAD,
        sysctl::NO_REDIRECTS,
        sysctl::NO_ADVERTISEMENTS,
    ];
    if pair.has_ipv6() {
        settings.push(sysctl::IPV6_ON);
    }
    sysctl::apply(name, &settings)?;
    sides.host.carry_out(pair.host_side(link.index)).await?;
    Ok(link)
}

/// The end of the pair that we have just made; somebody may remove it at once.
fn made(link: Option<Link>, name: &str) -> Result<Link, Failure> {
    link.ok_or_else(|| {
        Failure::new(
            Code::Io,
            format!("interface {name} was removed while ADD was at work: see what else manages interfaces on this node"),
        )
    })
}
