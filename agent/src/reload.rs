//! The configuration file, read anew where it has changed or somebody asks (SIGHUP).
//!
//! What can be applied to a running agent is; of the rest the log says that it waits for
//! the next start. A file that cannot be read changes nothing: the last good state holds,
//! and `status` says so.

use std::time::Duration;

use ferrule_datapath::modules::{connection_table_bits, wanted_table_bits};
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::check;
use crate::config::Config;
use crate::reconcile::Asker;
use crate::settings::RunSettings;
use crate::source::kubernetes::chain;

/// Time between two looks at the file. A `ConfigMap` takes a minute to come to a node.
const LOOK: Duration = Duration::from_secs(10);

/// When a field takes effect that a running agent does not take.
const NEXT_START: &str = "takes effect at the agent's next start";
const NEXT_LOAD: &str = "takes effect when ip_vs is loaded anew, as at the next boot";

/// Follows the file for as long as the agent runs. `held` has the configuration that holds.
pub(crate) async fn follow(
    settings: RunSettings,
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
        let Some(place) = settings.config.clone() else {
            if by_signal {
                info!("SIGHUP: there is no configuration file (--config) to read");
            }
            continue;
        };
        let Ok(read) = spawn_blocking(move || Config::read(Some(&place))).await else {
            continue;
        };
        match read {
            Ok(config) => {
                if told.take().is_some() || config != holds {
                    let table = connection_table_bits();
                    for (field, when) in waiting(&settings, &held.borrow(), &config, table) {
                        warn!(field, "{when}");
                    }
                    for note in config.notes.iter().filter(|n| !holds.notes.contains(n)) {
                        warn!("{note}");
                    }
                    asker.configure(Ok(Box::new(config.clone()))).await;
                    info!("the configuration was read anew, and what does not wait is applied");
                    held.send_modify(|running| *running = live(running, &config));
                    holds = config;
                } else if by_signal {
                    info!("SIGHUP: the configuration is as it was");
                }
            }
            Err(error) => {
                let words = chain(&error);
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

/// What of a new configuration a running agent does not take, and when it will. A field beside
/// which the command line says something has no effect at all. `table`: buckets that the kernel's
/// connection table has, as a binary logarithm.
fn waiting(
    settings: &RunSettings,
    holds: &Config,
    new: &Config,
    table: Option<u8>,
) -> Vec<(&'static str, &'static str)> {
    let (of_file, of_new) = (&holds.kube_proxy, &new.kube_proxy);
    let node = |config: &Config| config.node_name(settings.node.as_deref()).ok();
    let kubeconfig = |config| check::kubeconfig(settings, config);
    let wanted = wanted_table_bits(new.connection_table_bits);
    let fields = [
        (
            "vipBinding",
            holds.policy.vip_binding != new.policy.vip_binding,
            NEXT_START,
        ),
        (
            "apiServer",
            holds.api_servers != new.api_servers,
            NEXT_START,
        ),
        ("hostnameOverride", node(holds) != node(new), NEXT_START),
        (
            "clientConnection.kubeconfig",
            kubeconfig(holds) != kubeconfig(new),
            NEXT_START,
        ),
        (
            "metricsBindAddress",
            settings.metrics.is_none() && of_file.metrics != of_new.metrics,
            NEXT_START,
        ),
        (
            "healthzBindAddress",
            settings.healthz.is_none() && of_file.healthz != of_new.healthz,
            NEXT_START,
        ),
        (
            "ipvs.syncPeriod",
            of_file.sync_period != of_new.sync_period,
            NEXT_START,
        ),
        (
            "connectionTableBits",
            holds.connection_table_bits != new.connection_table_bits
                && table.is_some()
                && wanted.is_some_and(|wanted| table != Some(wanted)),
            NEXT_LOAD,
        ),
    ];
    let changed = fields.into_iter().filter(|(_, changed, _)| *changed);
    changed.map(|(field, _, when)| (field, when)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use clap::Parser as _;

    use super::*;
    use crate::settings::{Cli, Command};

    /// Those of a command line.
    fn settings(flags: &[&str]) -> RunSettings {
        let cli = Cli::parse_from(["ferrule-agent", "run"].iter().chain(flags));
        let Command::Run(settings) = cli.command else {
            unreachable!("another command");
        };
        settings
    }

    fn fields(flags: &[&str], holds: &Config, new: &Config) -> Vec<&'static str> {
        let waiting = waiting(&settings(flags), holds, new, Some(16));
        waiting.into_iter().map(|(field, _)| field).collect()
    }

    #[test]
    fn what_cannot_be_changed_live_is_named() {
        let holds = Config::default();
        let mut new = holds.clone();
        assert_eq!(fields(&[], &holds, &new), Vec::<&str>::new());
        new.policy.masquerade_all = true;
        new.drain_timeout = Duration::from_secs(1);
        assert_eq!(fields(&[], &holds, &new), Vec::<&str>::new());
        new.api_servers = vec!["https://192.0.2.1:6443".to_owned()];
        new.kube_proxy.sync_period += Duration::from_secs(1);
        assert_eq!(fields(&[], &holds, &new), ["apiServer", "ipvs.syncPeriod"]);
        let live = live(&holds, &new);
        assert_eq!(fields(&[], &holds, &live), Vec::<&str>::new());
        assert!(live.policy.masquerade_all);
    }

    #[test]
    fn what_the_command_line_says_does_not_wait() {
        let mut holds = Config::default();
        holds.kube_proxy.is_read = true;
        let mut new = holds.clone();
        new.kube_proxy.node = Some("another".to_owned());
        new.kube_proxy.kubeconfig = Some(PathBuf::from("/etc/kubeconfig"));
        new.kube_proxy.metrics = "192.0.2.1:80".parse().ok();
        new.kube_proxy.healthz = "192.0.2.1:81".parse().ok();
        assert_eq!(
            fields(&[], &holds, &new),
            [
                "hostnameOverride",
                "clientConnection.kubeconfig",
                "metricsBindAddress",
                "healthzBindAddress"
            ]
        );
        let flags = [
            "--node=a",
            "--kubeconfig=/kubeconfig",
            "--metrics=none",
            "--healthz=none",
        ];
        assert_eq!(fields(&flags, &holds, &new), Vec::<&str>::new());
    }

    #[test]
    fn a_connection_table_stays_as_it_was_loaded() {
        let holds = Config {
            connection_table_bits: Some(16),
            ..Config::default()
        };
        let new = Config {
            connection_table_bits: Some(20),
            ..Config::default()
        };
        let settings = settings(&[]);
        let table = |bits| waiting(&settings, &holds, &new, bits);
        assert_eq!(table(Some(16)), [("connectionTableBits", NEXT_LOAD)]);
        assert_eq!(table(Some(20)), [], "it has them already");
        assert_eq!(table(None), [], "there is no IPVS yet");
    }

    #[tokio::test]
    async fn why_a_file_cannot_be_read_is_told() {
        let path = PathBuf::from("/nowhere/config.yaml");
        let error = Config::read(Some(&path)).unwrap_err();
        assert!(chain(&error).contains("No such file"), "{}", chain(&error));
    }
}
