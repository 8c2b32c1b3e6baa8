//! Kernel settings that kube-proxy's configuration asks for, beside what services need.

use std::collections::BTreeMap;

use ferrule_api::status::SysctlStatus;
use ferrule_datapath::ipvs::Timeouts;
use ferrule_datapath::tuning::{Tuning, tune};
use ferrule_datapath::{Changed, Node, Sysctls};
use tracing::warn;

use super::Reconciler;
use super::faults::About;
use crate::config::KubeProxy;

/// What is asked for, and what became of it. Bounded by the number of settings.
#[derive(Debug)]
pub(super) struct Tunings {
    asked: Tuning,
    timeouts: Timeouts,
    told: BTreeMap<&'static str, SysctlStatus>,
    /// Everything that was changed in this boot.
    recorded: Vec<Changed>,
}

impl Tunings {
    pub(super) fn new(configured: &KubeProxy) -> Self {
        Self {
            asked: configured.tuning.clone(),
            timeouts: configured.timeouts,
            told: BTreeMap::new(),
            recorded: Vec::new(),
        }
    }

    /// Sets the sysctls. One that cannot be set is told and hurts nothing else; it is tried
    /// again whenever the kernel is opened anew.
    pub(super) fn set_sysctls(&mut self, sysctls: &Sysctls) {
        let (made, failed) = tune(sysctls, &self.asked);
        for tuned in made {
            let status = self.told.entry(tuned.key).or_insert_with(|| SysctlStatus {
                name: tuned.key.replace('/', "."),
                before: Some(tuned.before.clone()),
                value: String::new(),
                problem: None,
            });
            // What was there first is what somebody may want back.
            if status.problem.take().is_some() {
                status.before = Some(tuned.before);
            }
            status.value = tuned.value;
        }
        for fault in failed {
            let name = fault.key.replace('/', ".");
            let problem = fault.source.to_string();
            let status = SysctlStatus {
                name,
                before: fault.present,
                value: fault.value,
                problem: Some(problem),
            };
            if self.told.get(fault.key) != Some(&status) {
                warn!(
                    sysctl = status.name,
                    value = status.value,
                    error = status.problem,
                    "cannot be set as kube-proxy's configuration asks; set it by hand where it matters"
                );
                self.told.insert(fault.key, status);
            }
        }
    }

    /// Another configuration. What it no longer asks for stays as it is until `cleanup`.
    pub(super) fn set(&mut self, configured: &KubeProxy) {
        self.asked = configured.tuning.clone();
        self.timeouts = configured.timeouts;
    }

    /// Takes in what is recorded. A record that cannot be read was told when it was written.
    pub(super) fn read_record(&mut self, sysctls: &Sysctls) {
        if let Ok(changed) = sysctls.changed() {
            self.recorded = changed;
        }
    }

    pub(super) fn status(&self) -> Vec<SysctlStatus> {
        let others = self.recorded.iter();
        let others = others.filter(|changed| !self.told.contains_key(&*changed.key));
        let others = others.map(|changed| SysctlStatus {
            name: changed.key.replace('/', "."),
            before: Some(changed.before.clone()),
            value: changed.value.clone(),
            problem: None,
        });
        self.told.values().cloned().chain(others).collect()
    }
}

impl Reconciler {
    /// Sets how long IPVS remembers connections, where that is asked for.
    pub(super) async fn set_timeouts(&mut self, kernel: &Node) {
        let timeouts = self.tunings.timeouts;
        if timeouts == Timeouts::default() {
            return;
        }
        match kernel.set_timeouts(&timeouts).await {
            Ok(()) => self.faults.clear(About::Timeouts),
            Err(error) => self.note_fault(
                About::Timeouts,
                "ipvs",
                &format!("the time-outs of connections cannot be set: {error}"),
                "correct ipvs.tcpTimeout, tcpFinTimeout and udpTimeout; until then the kernel's hold",
            ),
        }
    }
}
