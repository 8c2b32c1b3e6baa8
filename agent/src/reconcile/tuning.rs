//! Kernel settings that the configuration asks for, or that hang on how much is served and on
//! what else is on the node, beside what services need always.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ferrule_api::status::SysctlStatus;
use ferrule_datapath::ipvs::Timeouts;
use ferrule_datapath::modules::load_bridge_netfilter;
use ferrule_datapath::tuning::{self, Tuning, tune};
use ferrule_datapath::{Node as Kernel, Sysctls, ensure_forwarding, probe};
use ferrule_model::kube::Node;
use ferrule_model::network::{DetectLocal, parse_network};
use ipnetwork::IpNetwork;
use tracing::{info, warn};

use super::Reconciler;
use super::faults::About;
use crate::config::{Config, Estimation};

/// Time between two attempts at a setting that cannot be made.
const LOOK: Duration = Duration::from_mins(1);

/// Whether it is known that there is a bridge of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bridges {
    /// There may be a new one.
    Suspect,
    /// As far as was looked.
    Looked,
}

/// What is asked for, and what became of it. Bounded by the number of settings.
#[derive(Debug)]
pub(super) struct Tunings {
    asked: Tuning,
    estimation: Estimation,
    bridges: Bridges,
    timeouts: Timeouts,
    told: BTreeMap<&'static str, SysctlStatus>,
    /// When those that could not be made are tried again.
    look_at: Instant,
}

impl Tunings {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            asked: config.kube_proxy.tuning.clone(),
            estimation: config.estimation,
            bridges: Bridges::Suspect,
            timeouts: config.kube_proxy.timeouts,
            told: BTreeMap::new(),
            look_at: Instant::now(),
        }
    }

    /// Sets the sysctls. One that cannot be set is told and hurts nothing else; it is tried
    /// again whenever the kernel is opened anew.
    pub(super) fn set_sysctls(&mut self, sysctls: &Sysctls) {
        let (made, failed) = tune(sysctls, &self.asked);
        // What is not asked for any longer, or was set by somebody meanwhile, is no problem.
        self.told.retain(|key, status| {
            status.problem.is_none() || failed.iter().any(|fault| fault.key == *key)
        });
        self.look_at = Instant::now() + LOOK;
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
                    "a kernel setting cannot be made; make it by hand where it matters"
                );
                self.told.insert(fault.key, status);
            }
        }
    }

    /// Another configuration. What it no longer asks for stays as it is until `cleanup`.
    pub(super) fn set(&mut self, config: &Config) {
        let same = self.estimation == config.estimation;
        self.asked = Tuning {
            estimation: self.asked.estimation.filter(|_| same),
            bridged: self.asked.bridged,
            ..config.kube_proxy.tuning.clone()
        };
        self.estimation = config.estimation;
        self.timeouts = config.kube_proxy.timeouts;
        self.bridges = Bridges::Suspect;
    }

    /// Addresses or pod ranges changed: a bridge of pods may have come.
    pub(super) fn bridges_are_suspect(&mut self) {
        self.bridges = Bridges::Suspect;
    }

    /// What is asked for, and everything else that was changed in this boot, by whichever part of
    /// the agent: so the record is read when somebody asks. That it cannot be was told when it was
    /// written.
    pub(super) fn status(&self, sysctls: &Sysctls) -> Vec<SysctlStatus> {
        let recorded = sysctls.changed().unwrap_or_default();
        let others = recorded.into_iter();
        let others = others.filter(|changed| !self.told.contains_key(&*changed.key));
        let others = others.map(|changed| SysctlStatus {
            name: changed.key.replace('/', "."),
            before: Some(changed.before),
            value: changed.value,
            problem: None,
        });
        self.told.values().cloned().chain(others).collect()
    }
}

/// A device that has come takes router advertisements as those did that were there before.
pub(super) fn look_at_devices(sysctls: &Sysctls) {
    if let Err(error) = ensure_forwarding(sysctls) {
        warn!(%error, "a device that has come may lack a setting");
    }
}

impl Reconciler {
    /// Makes the settings that hang on how much is served, and on a bridge of pods beside us.
    pub(super) async fn tune_to_node(&mut self) {
        let (Some(_), Some(observed)) = (&self.kernel, &self.observed) else {
            return;
        };
        let sysctls = &self.settings.sysctls;
        let estimation = match self.tunings.estimation {
            Estimation::Auto => tuning::estimation(sysctls, observed.services.len()),
            Estimation::Always => Some(true),
            Estimation::Never => Some(false),
        };
        // What was turned off for their number stays off, however few are left.
        let mut changed = estimation.is_some() && self.tunings.asked.estimation != estimation;
        if changed {
            self.tunings.asked.estimation = estimation;
        }
        if self.tunings.bridges == Bridges::Suspect {
            self.tunings.bridges = Bridges::Looked;
            if !self.tunings.asked.bridged && self.finds_bridge_of_pods().await {
                if self.settings.load_modules && !tuning::can_be_bridged(&self.settings.sysctls) {
                    load_bridge_netfilter().await;
                }
                self.tunings.asked.bridged = true;
                changed = true;
            }
        }
        let fails = || {
            self.tunings
                .told
                .values()
                .any(|status| status.problem.is_some())
        };
        if changed || (self.tunings.look_at <= Instant::now() && fails()) {
            self.tunings.set_sysctls(&self.settings.sysctls);
        }
    }

    /// Whether pods hang on a bridge: one that has an address of this node's pod ranges, or that
    /// the configuration names.
    async fn finds_bridge_of_pods(&self) -> bool {
        let node = self.view.cluster().node(self.view.node());
        let ranges = node.into_iter().flat_map(Node::pod_cidrs);
        let ranges: Vec<IpNetwork> = ranges.filter_map(|text| parse_network(text).ok()).collect();
        let of_pods = |ip| ranges.iter().any(|range| range.contains(ip));
        let mut names: BTreeSet<&str> = self
            .network
            .own()
            .iter()
            .filter(|address| of_pods(address.ip))
            .map(|address| address.device.as_str())
            .collect();
        if let Some(DetectLocal::BridgeInterface(name)) = &self.view.policy().detect_local {
            names.insert(name);
        }
        for name in names {
            match probe::is_bridge(name).await {
                Ok(true) => {
                    info!(bridge = name, "pods hang on a bridge beside us");
                    return true;
                }
                Ok(false) => {}
                Err(error) => warn!(device = name, %error, "cannot be asked what it is"),
            }
        }
        false
    }

    /// Sets how long IPVS remembers connections, where that is asked for.
    pub(super) async fn set_timeouts(&mut self, kernel: &Kernel) {
        let timeouts = self.tunings.timeouts;
        if timeouts == Timeouts::default() {
            self.faults.clear(About::Timeouts);
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Also where the kernel could not be opened, and nothing is asked for.
    #[test]
    fn whatever_was_changed_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let sysctls = Sysctls {
            root: folder.path().join("sys"),
            record: Some(folder.path().join("sysctls.json")),
        };
        for (key, value) in [
            ("kernel/random/boot_id", "boot"),
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv4/conf/all/send_redirects", "1"),
        ] {
            let path = sysctls.root.join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        let tunings = Tunings::new(&Config::default());
        assert_eq!(tunings.status(&sysctls), []);
        ensure_forwarding(&sysctls).unwrap();
        let told = tunings.status(&sysctls);
        let told: Vec<(&str, Option<&str>, &str)> = told
            .iter()
            .map(|one| (&*one.name, one.before.as_deref(), &*one.value))
            .collect();
        assert_eq!(
            told,
            [
                ("net.ipv4.ip_forward", Some("0"), "1"),
                ("net.ipv4.conf.all.send_redirects", Some("1"), "0"),
            ]
        );
    }
}
