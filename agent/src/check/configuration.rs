//! What the command line and the configuration say together.

use std::path::Path;

use super::{Finding, Outcome};
use crate::config::Config;
use crate::settings::RunSettings;

const CONFIGURATION: &str = "configuration";

/// What the check of a configuration that cannot be read is called.
pub(super) fn unreadable(words: &str) -> Finding {
    Finding::of_error(CONFIGURATION, Outcome::Failed, words)
}

/// What there is to say about a configuration that was read; the last of it may be a failure.
pub(super) fn findings(settings: &RunSettings, config: &Config) -> Vec<Finding> {
    let mut findings = vec![Finding::ok(
        CONFIGURATION,
        match &settings.config {
            None => "none is given; everything has its default".to_owned(),
            Some(path) => format!("{} is valid", path.display()),
        },
    )];
    let notes = notes(settings, config).into_iter();
    findings.extend(notes.map(|note| Finding::ok(CONFIGURATION, note)));
    let faults = [
        config.node_name(settings.node.as_deref()).err(),
        kubeconfig_fault(settings, config),
    ];
    let faults = faults.into_iter().flatten();
    findings.extend(faults.map(|fault| unreadable(&fault)));
    findings
}

/// A line for each field of kube-proxy's file whose effect is another here.
pub(super) fn notes(settings: &RunSettings, config: &Config) -> Vec<String> {
    let mut notes = config.notes.clone();
    if let Some(path) = &config.kube_proxy.kubeconfig
        && kubeconfig(settings, config) != Some(path)
    {
        let instead = if settings.kubeconfig.is_some() {
            "--kubeconfig is given"
        } else if settings.in_cluster {
            "--in-cluster is given"
        } else {
            "--manifests is given, and neither --kubeconfig nor --in-cluster"
        };
        notes.push(format!(
            "clientConnection.kubeconfig is {}: no effect: {instead}",
            path.display()
        ));
    }
    notes
}

/// Credentials for the cluster: those of the command line, or of kube-proxy's file where the
/// command line does not say where facts come from.
pub(crate) fn kubeconfig<'a>(settings: &'a RunSettings, config: &'a Config) -> Option<&'a Path> {
    let says_nothing = !settings.in_cluster && settings.manifests.is_none();
    let of_file = config.kube_proxy.kubeconfig.as_deref();
    let given = settings.kubeconfig.as_deref();
    given.or(of_file.filter(|_| says_nothing))
}

/// What is wrong with the credentials that kube-proxy's file names.
pub(super) fn kubeconfig_fault(settings: &RunSettings, config: &Config) -> Option<String> {
    if settings.kubeconfig.is_some() {
        return None;
    }
    let path = kubeconfig(settings, config)?;
    let found = path.try_exists();
    let words = match found {
        Ok(true) => return None,
        Ok(false) => "there is no such file".to_owned(),
        Err(error) => error.to_string(),
    };
    Some(format!(
        "clientConnection.kubeconfig: {}: {words}; mount it where the agent runs, or give \
         --kubeconfig or --in-cluster",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::fs;

    use clap::Parser as _;

    use super::*;
    use crate::settings::{Cli, Command};

    fn settings(arguments: &[&str]) -> RunSettings {
        let all = [&["ferrule-agent", "run"], arguments].concat();
        let Command::Run(settings) = Cli::parse_from(all).command else {
            panic!("another command");
        };
        settings
    }

    fn config() -> Config {
        let mut config = Config::default();
        config.kube_proxy.is_read = true;
        config.kube_proxy.node = Some("of-the-file".to_owned());
        config.kube_proxy.kubeconfig = Some("/nowhere/kubeconfig".into());
        config
    }

    #[test]
    fn the_command_line_wins_over_kube_proxys_file() {
        let config = config();
        let used = |arguments: &[&str]| {
            let settings = settings(arguments);
            let path = kubeconfig(&settings, &config).map(|path| path.display().to_string());
            (path, notes(&settings, &config).len())
        };
        assert_eq!(used(&[]), (Some("/nowhere/kubeconfig".to_owned()), 0));
        assert_eq!(used(&["--kubeconfig", "/a"]), (Some("/a".to_owned()), 1));
        assert_eq!(used(&["--in-cluster"]), (None, 1));
        assert_eq!(used(&["--manifests", "/m"]), (None, 1));
        let name = |arguments: &[&str]| config.node_name(settings(arguments).node.as_deref());
        assert_eq!(name(&[]).as_deref(), Ok("of-the-file"));
        assert_eq!(name(&["--node", "a"]).as_deref(), Ok("a"));
        assert_eq!(name(&["--hostname-override=b"]).as_deref(), Ok("b"));
    }

    #[test]
    fn a_kubeconfig_that_is_not_there_is_named() {
        let fault = kubeconfig_fault(&settings(&[]), &config()).unwrap();
        assert!(
            fault.starts_with(
                "clientConnection.kubeconfig: /nowhere/kubeconfig: there is no such file; "
            ),
            "{fault}"
        );
        assert_eq!(
            kubeconfig_fault(&settings(&["--in-cluster"]), &config()),
            None
        );
    }

    #[test]
    fn without_kube_proxys_file_the_node_has_no_name_by_itself() {
        let error = Config::default().node_name(None).unwrap_err();
        assert!(error.contains("give --node NAME"), "{error}");
        let mut config = Config::default();
        config.kube_proxy.is_read = true;
        assert!(!config.node_name(None).unwrap().is_empty(), "the machine's");
    }

    /// Every file of the folder: what is read of it, and the lines about it.
    #[test]
    fn what_files_lead_to_and_what_is_said_of_them() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/kube-proxy");
        let mut names: Vec<String> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "read.txt")
            .collect();
        names.sort();
        assert!(names.len() >= 6, "{names:?}");
        let mut text = String::new();
        for name in names {
            let config = Config::read(Some(&folder.join(&name))).unwrap();
            writeln!(text, "{name}").unwrap();
            for line in &config.notes {
                writeln!(text, "  says: {line}").unwrap();
            }
            let read = serde_json::to_string_pretty(&config.effective("NODE", None, None)).unwrap();
            writeln!(text, "{read}\n").unwrap();
        }
        let golden = folder.join("read.txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &text).unwrap();
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        assert!(
            expected == text,
            "{}\nwrite it with UPDATE_GOLDEN=1 if it is right now",
            similar::TextDiff::from_lines(&expected, &text).unified_diff()
        );
    }
}
