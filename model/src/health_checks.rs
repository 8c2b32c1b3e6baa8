//! Which Service has the port of a health check: one program answers there, so it is one's.
//!
//! The addresses that serve node ports are claimed beside frontends, in [`crate::desired`],
//! for a node port may have the same number.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::FrontendAddr;
use crate::desired::{Claim, Desired, older};
use crate::names::ObjectName;
use crate::planner::{HealthCheck, ServicePlan};

impl Desired {
    /// Takes in the port that a Service asks for in place of its former one.
    pub(crate) fn claim_check(&mut self, old: &ServicePlan, new: &ServicePlan, name: &ObjectName) {
        if let Some(check) = &old.health_check
            && let Some(claims) = self.checks.get_mut(&check.port)
        {
            claims.remove(&Claim::new(old, name));
            if claims.is_empty() {
                self.checks.remove(&check.port);
            }
        }
        if let Some(check) = &new.health_check {
            let claims = self.checks.entry(check.port).or_default();
            claims.insert(Claim::new(new, name));
        }
    }

    /// The Service that has the port for its health check.
    fn checked_at(&self, port: u16) -> Option<(&ObjectName, &ServicePlan)> {
        let holder = self.checks.get(&port)?.first()?;
        Some((&holder.service, self.plans.get(&holder.service)?))
    }

    pub(crate) fn served_at<'a>(
        &self,
        ports: impl IntoIterator<Item = &'a u16>,
    ) -> BTreeSet<FrontendAddr> {
        let ports = ports.into_iter();
        let holders = ports.filter_map(|port| self.checked_at(*port));
        holders
            .flat_map(|(_, plan)| plan.served.iter().copied())
            .collect()
    }

    /// Whether a program of this node answers at this place of a VIP: the health check of a
    /// Service, unless the place is a frontend.
    #[must_use]
    pub fn is_served(&self, addr: &FrontendAddr) -> bool {
        let holder = self.checked_at(addr.port);
        holder.is_some_and(|(_, plan)| plan.served.contains(addr)) && self.frontend(addr).is_none()
    }

    /// Whether the health check of a Service is asked at this place, of a VIP or of this node.
    #[must_use]
    pub fn is_health_check(&self, addr: &FrontendAddr) -> bool {
        let holder = self.checked_at(addr.port);
        let is_asked =
            |plan: &ServicePlan| plan.served.contains(addr) || plan.checked.contains(addr);
        holder.is_some_and(|(_, plan)| is_asked(plan)) && self.frontend(addr).is_none()
    }

    /// Every such place, in order.
    pub fn served(&self) -> impl Iterator<Item = FrontendAddr> {
        let all = self.served_at(self.checks.keys()).into_iter();
        all.filter(|addr| self.frontend(addr).is_none())
    }

    /// Every place where load balancers ask for the health of a Service, also at addresses of
    /// this node, by the port.
    pub fn asked(&self) -> impl Iterator<Item = FrontendAddr> {
        let plans = self.checks.keys().filter_map(|port| self.checked_at(*port));
        plans.flat_map(|(_, plan)| plan.asked.iter().copied())
    }

    /// The health checks of Services that have their port, by namespace and name.
    #[must_use]
    pub fn health_checks(&self) -> BTreeMap<&ObjectName, &HealthCheck> {
        let holders = self.checks.keys().filter_map(|port| self.checked_at(*port));
        holders
            .filter_map(|(name, plan)| Some((name, plan.health_check.as_ref()?)))
            .collect()
    }

    /// Where the health check of a Service is not answered, for others have the port.
    pub(crate) fn lost_checks(&self, plan: &ServicePlan, name: &ObjectName) -> Vec<String> {
        let Some(check) = &plan.health_check else {
            return Vec::new();
        };
        let field = "spec.healthCheckNodePort";
        match self.checked_at(check.port) {
            Some((holder, _)) if holder != name => {
                let held = older(holder, "port");
                vec![format!("{field}: port {} is held by {held}", check.port)]
            }
            Some(_) | None => {
                let held = plan.checked.iter().filter_map(|addr| {
                    let held = self.held_by_another(addr, name, "port")?;
                    Some(format!("{field}: {addr} is held by {held}"))
                });
                held.collect()
            }
        }
    }
}
