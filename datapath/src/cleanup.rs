//! A node without what is ours.

use std::fmt;
use std::fs;

use ferrule_model::binding::Binding;
use ferrule_model::observed::Observed;
use ferrule_model::ownership::{Proofs, is_of_a_pod, owns_virtual_service};
use ferrule_netlink::Error;
use tracing::info;

use crate::bindings::{Bindings, Bound};
use crate::filter::{self, Elements};
use crate::ipvs::{self, Order};
use crate::node::{Settings, note_element};
use crate::routes::{NodeRoute, Routes};
use crate::sysctl::{self, Sysctls};

/// What could not be removed.
#[derive(Debug, thiserror::Error)]
pub struct CleanupError(Vec<String>);

impl fmt::Display for CleanupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
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
    let mut unbound = false;
    match Bindings::find(&settings.vip_device).await {
        // They prove whose the services are: they stay until these are gone.
        Ok(bindings) if services => {
            let before = problems.len();
            remove_bindings(bindings, &settings, &mut problems).await;
            unbound = problems.len() == before;
        }
        Ok(_) => problems.push(format!("device {} stays", settings.vip_device)),
        Err(error) => problems.push(error.to_string()),
    }
    // Without it, whatever listens on the node is reached through a VIP that is still bound.
    if !unbound {
        problems.push(format!("table {} stays", settings.nft_table));
    } else if let Err(error) = filter::remove(&settings.nft_program, &settings.nft_table).await {
        problems.push(error.to_string());
    }
    let timeouts = restore_timeouts(&settings.sysctls).await;
    let keeps_timeouts = timeouts.is_err();
    if let Err(error) = timeouts {
        problems.push(format!("time-outs of IPVS: {error}"));
    }
    if let Err(error) = remove_routes().await {
        problems.push(format!("routes to other nodes' pods: {error}"));
    }
    // Last: services need their settings until they are gone. Pods live on.
    let has_pods = has_pods();
    if has_pods {
        info!("forwarding stays on for the pods of this node; clean up again when they are gone");
    }
    let is_needed = |key: &str| {
        (has_pods && sysctl::is_for_pods(key)) || (keeps_timeouts && key == sysctl::TIMEOUTS)
    };
    problems.extend(settings.sysctls.restore(is_needed));
    if problems.is_empty() {
        Ok(())
    } else {
        Err(CleanupError(problems))
    }
}

/// IPVS's time-outs, unless somebody has set them since.
async fn restore_timeouts(sysctls: &Sysctls) -> Result<(), Error> {
    let Some((before, value)) = sysctls.timeouts() else {
        return Ok(());
    };
    let client = match ipvs::Client::open().await {
        Ok(client) => client,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    };
    if client.timeouts().await? == value {
        client.set_timeouts(&before).await?;
    }
    Ok(())
}

/// Whether a pod's device is in the calling thread's network namespace.
fn has_pods() -> bool {
    let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    devices.lines().any(|line| is_of_a_pod(line.trim_start()))
}

/// The VIP device with its addresses, local routes, aliases.
async fn remove_bindings(mut bindings: Bindings, settings: &Settings, problems: &mut Vec<String>) {
    match bindings.list().await {
        Ok(bound) => {
            let others = bound
                .into_iter()
                .filter(|(_, way)| *way != Binding::Address);
            let others: Vec<Bound> = others.collect();
            let results = bindings.unbind(&others).await;
            for ((ip, way), result) in others.iter().zip(results) {
                if let Err(error) = result {
                    problems.push(format!("VIP {ip} ({way}): {error}"));
                }
            }
        }
        Err(error) => problems.push(format!("bindings of VIPs: {error}")),
    }
    if let Err(error) = bindings.remove_device().await {
        problems.push(format!("device {}: {error}", settings.vip_device));
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
    let proofs = match our_proofs(settings).await {
        Ok(proofs) => proofs,
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
        .filter(|service| owns_virtual_service(&service.key, &proofs))
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

/// What proves that virtual services are ours.
async fn our_proofs(settings: &Settings) -> Result<Proofs, String> {
    let mut observed = Observed::default();
    let bindings = Bindings::find(&settings.vip_device).await;
    let bound = bindings.map_err(|error| error.to_string())?.list().await;
    observed.bound = bound.map_err(|error| format!("bindings of VIPs: {error}"))?;
    let elements = Elements::open(&settings.nft_table).map_err(|error| error.to_string())?;
    match elements.list().await {
        Ok(elements) => {
            for element in elements {
                note_element(&mut observed, element);
            }
        }
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(format!("table {}: {error}", settings.nft_table)),
    }
    Ok(observed.proofs(&settings.excluded))
}
