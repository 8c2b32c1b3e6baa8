//! Who may call a load balancer's VIP.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::condition::{Condition, Reason};
use crate::desired::condition;
use crate::kube::Service;
use crate::names::ObjectName;
use crate::network::{outermost, parse_network};
use crate::vips::Vips;

/// `spec.loadBalancerSourceRanges`, by family. A family of which none is named,
/// or every address, is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SourceRanges {
    by_family: BTreeMap<Family, BTreeSet<IpNetwork>>,
}

impl SourceRanges {
    pub(crate) fn of(
        name: &ObjectName,
        service: &Service,
        vips: &Vips,
        conditions: &mut Vec<Condition>,
    ) -> Self {
        let mut all = BTreeSet::new();
        let texts = &service.spec.load_balancer_source_ranges;
        for text in texts.iter().filter(|text| !text.trim().is_empty()) {
            match parse_network(text) {
                Ok(network) => {
                    all.insert(network);
                }
                Err(problem) => conditions.push(condition(
                    name,
                    Reason::InvalidRange,
                    format!(
                        "spec.loadBalancerSourceRanges: {problem}; the range is left out, correct it"
                    ),
                )),
            }
        }
        let mut ranges = Self::default();
        for family in Family::ALL {
            // One within another says nothing more.
            let of_family = outermost(&all, family);
            let open = of_family.iter().any(|network| network.prefix() == 0);
            if !of_family.is_empty() && !open {
                ranges
                    .by_family
                    .insert(family, of_family.into_iter().collect());
            }
        }
        // Without a VIP they mean nothing, and take no memory.
        if vips.balancer.is_empty() {
            return Self::default();
        }
        ranges
    }

    /// Those of a family; none admits everyone.
    pub(crate) fn of_family(&self, family: Family) -> &BTreeSet<IpNetwork> {
        static EVERYONE: BTreeSet<IpNetwork> = BTreeSet::new();
        self.by_family.get(&family).unwrap_or(&EVERYONE)
    }
}
