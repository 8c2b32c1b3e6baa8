//! Another configuration for a running agent.

use ferrule_api::status::Problem;
use ferrule_model::cluster::Touched;

use super::Reconciler;
use super::faults::now;
use crate::config::Config;

impl Reconciler {
    /// Takes a configuration over as far as that goes, or notes why there is none.
    pub(super) async fn configure(&mut self, read: Result<Box<Config>, String>) {
        let config = match read {
            Ok(config) => config,
            Err(problem) => {
                self.of_config = Some(Problem {
                    object: "configuration".to_owned(),
                    problem,
                    remedy: "correct the file; until then the last good one holds".to_owned(),
                    since: now(),
                    attempts: 0,
                });
                return;
            }
        };
        self.of_config = None;
        self.dirty
            .merge(self.view.set_policy(config.policy.clone()));
        self.network.routes_are_suspect();
        let all = Touched {
            services: self
                .view
                .cluster()
                .services()
                .map(|(name, _)| name.clone())
                .collect(),
            service_cidrs: true,
            ..Touched::default()
        };
        self.say_conditions(&all);
        self.audit.budget = config.audit_budget / 100.0;
        self.drains.set_bound(config.drain_timeout);
        if self.settings.excluded != config.kube_proxy.excluded {
            // Whose the virtual services are is asked anew.
            self.settings
                .excluded
                .clone_from(&config.kube_proxy.excluded);
            self.kernel = None;
            self.observed = None;
        }
        self.tunings.set(&config);
        self.settings.connection_table_bits = config.connection_table_bits;
        if let Some(kernel) = self.kernel.take() {
            self.tunings.set_sysctls(&self.settings.sysctls);
            self.set_timeouts(&kernel).await;
            self.kernel = Some(kernel);
        }
    }
}
