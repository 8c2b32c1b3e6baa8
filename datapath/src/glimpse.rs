//! What the kernel holds at a few addresses: read by key, and without changing anything.
//! Bindings of VIPs and source ranges are listed whole, for the kernel tells them no
//! other way; sets and virtual services are not.

use ferrule_model::address::{Family, FrontendAddr};
use ferrule_model::desired::{Desired, Scope};
use ferrule_model::observed::Observed;
use ferrule_model::ownership::owns_virtual_service;
use ferrule_model::service::{ServiceKey, VirtualService};

use crate::filter::Element;
use crate::node::{Node, ObserveError, note_element, scheduling};

impl Node {
    /// What of ours the kernel holds at the addresses of `scope`; whatever else it holds is
    /// not in it. A virtual service that `desired` has is ours, even if its proof is gone.
    ///
    /// # Errors
    /// [`ObserveError`]; what is returned is complete for these addresses.
    pub async fn glimpse(
        &self,
        desired: &Desired,
        scope: &Scope,
    ) -> Result<Observed, ObserveError> {
        let mut observed = Observed::default();
        let found = self.elements.find(&elements_of(scope)).await;
        for element in found.map_err(ObserveError::of("elements of our nftables sets"))? {
            note_element(&mut observed, element);
        }
        self.glimpse_admitted(desired, scope, &mut observed).await?;
        let bound = self.observe_bindings().await?.into_iter();
        observed.bound = bound.filter(|(ip, _)| scope.vips.contains(ip)).collect();
        let by_address = scope.frontends.iter().copied().map(ServiceKey::Address);
        for key in by_address.chain(scope.marked.iter().copied()) {
            let found = self.ipvs.service(&key).await;
            let Some(service) =
                found.map_err(ObserveError::of(format!("virtual service {key}")))?
            else {
                continue;
            };
            let wanted = match &key {
                ServiceKey::Address(addr) => desired.frontend(addr).is_some(),
                ServiceKey::Mark { .. } => desired.marked_service(&key).is_some(),
            };
            let proofs = observed.proofs(&self.settings.excluded);
            if wanted || owns_virtual_service(&key, &proofs) {
                let service = VirtualService {
                    scheduling: scheduling(&service),
                    servers: self.observe_servers(&key).await?,
                };
                observed.services.insert(key, service);
            }
        }
        Ok(observed)
    }

    /// Ranges are intervals, of which the kernel does not tell all by one key.
    async fn glimpse_admitted(
        &self,
        desired: &Desired,
        scope: &Scope,
        observed: &mut Observed,
    ) -> Result<(), ObserveError> {
        for family in Family::ALL {
            let limited = |addr: &FrontendAddr| {
                Family::of(addr.ip) == family
                    && (observed.limited.contains(addr) || !desired.admitted(addr).is_empty())
            };
            if !scope.frontends.iter().any(limited) {
                continue;
            }
            let found = self.elements.list_admitted(family).await;
            for element in found.map_err(ObserveError::of("source ranges of frontends"))? {
                if matches!(element, Element::Admitted(addr, _) if scope.frontends.contains(&addr))
                {
                    note_element(observed, element);
                }
            }
        }
        Ok(())
    }
}

/// Every element that could be there, source ranges aside. Of a mark only the key counts.
fn elements_of(scope: &Scope) -> Vec<Element> {
    let mut elements: Vec<Element> = scope.vips.iter().copied().map(Element::Vip).collect();
    let v4 = scope.vips.iter().filter(|ip| ip.is_ipv4());
    elements.extend(v4.copied().map(Element::Silent));
    for addr in scope.frontends.iter().copied() {
        elements.extend([
            Element::Frontend(addr),
            Element::External(addr),
            Element::Preserved(addr),
            Element::Dropped(addr),
            Element::Leaving(addr),
            Element::Closed(addr),
            Element::Served(addr),
            Element::Limited(addr),
            Element::Marked(addr, 0),
        ]);
    }
    elements.extend(scope.hairpins.iter().copied().map(Element::Hairpin));
    elements
}
