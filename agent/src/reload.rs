//! The configuration file, read anew where it has changed or somebody asks (SIGHUP).
//!
//! What can be applied to a running agent is; of the rest the log says that it waits for
//! the next start. A file that cannot be read changes nothing: the last good state holds,
//! and `status` says so.

use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::reconcile::Asker;

/// Time between two looks at the file. A `ConfigMap` takes a minute to come to a node.
const LOOK: Duration = Duration::from_secs(10);

/// Follows the file for as long as the agent runs. `held` has the configuration that holds.
pub(crate) async fn follow(
    path: Option<PathBuf>,
    mut hangup: Signal,
    held: watch::Sender<Config>,
    asker: Asker,
) {
    let mut holds = held.borrow().clone();
    let mut told: Option<String> = None;
    loop {
        let by_signal = tokio::select! {
            _ = hangup.recv() => true,
            () = sleep(LOOK) => false,
        };
        if path.is_none() {
            if by_signal {
                info!("SIGHUP: there is no configuration file (--config) to read");
            }
            continue;
        }
        let place = path.clone();
        let Ok(read) = spawn_blocking(move || Config::read(place.as_deref())).await else {
            continue;
        };
        match read {
            Ok(config) => {
                if told.take().is_some() || config != holds {
                    for field in waiting(&held.borrow(), &config) {
                        warn!(field, "takes effect at the agent's next start");
                    }
                    for note in config.notes.iter().filter(|n| !holds.notes.contains(n)) {
                        warn!("{note}");
                    }
                    asker.configure(Ok(Box::new(config.clone()))).await;
                    info!("the configuration was read anew and is applied");
                    held.send_modify(|running| *running = live(running, &config));
                    holds = config;
                } else if by_signal {
                    info!("SIGHUP: the configuration is as it was");
                }
            }
            Err(error) => {
                let words = error.to_string();
                if told.as_ref() != Some(&words) {
                    error!("{words}; the last good configuration holds");
                    asker.configure(Err(words.clone())).await;
                    told = Some(words);
                }
            }
        }
    }
}

/// What holds when a running agent has taken a new configuration; see [`waiting`].
fn live(running: &Config, new: &Config) -> Config {
    let mut live = new.clone();
    live.policy.vip_binding = running.policy.vip_binding.clone();
    live.api_servers.clone_from(&running.api_servers);
    let (of_file, former) = (&mut live.kube_proxy, &running.kube_proxy);
    of_file.node.clone_from(&former.node);
    of_file.kubeconfig.clone_from(&former.kubeconfig);
    of_file.metrics = former.metrics;
    of_file.healthz = former.healthz;
    of_file.sync_period = former.sync_period;
    live
}

/// What of a new configuration a running agent does not take.
fn waiting(holds: &Config, new: &Config) -> Vec<&'static str> {
    let (of_file, of_new) = (&holds.kube_proxy, &new.kube_proxy);
    let fields = [
        (
            "vipBinding",
            holds.policy.vip_binding != new.policy.vip_binding,
        ),
        ("apiServer", holds.api_servers != new.api_servers),
        ("hostnameOverride", of_file.node != of_new.node),
        (
            "clientConnection.kubeconfig",
            of_file.kubeconfig != of_new.kubeconfig,
        ),
        ("metricsBindAddress", of_file.metrics != of_new.metrics),
        ("healthzBindAddress", of_file.healthz != of_new.healthz),
        ("ipvs.syncPeriod", of_file.sync_period != of_new.sync_period),
    ];
    let changed = fields.into_iter().filter(|(_, changed)| *changed);
    changed.map(|(field, _)| field).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_changed_live_is_named() {
        let holds = Config::default();
        let mut new = holds.clone();
        assert_eq!(waiting(&holds, &new), Vec::<&str>::new());
        new.policy.masquerade_all = true;
        new.drain_timeout = Duration::from_secs(1);
        assert_eq!(waiting(&holds, &new), Vec::<&str>::new());
        new.api_servers = vec!["https://192.0.2.1:6443".to_owned()];
        new.kube_proxy.sync_period += Duration::from_secs(1);
        assert_eq!(waiting(&holds, &new), ["apiServer", "ipvs.syncPeriod"]);
        let live = live(&holds, &new);
        assert_eq!(waiting(&holds, &live), Vec::<&str>::new());
        assert!(live.policy.masquerade_all);
    }
}
