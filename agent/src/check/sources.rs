//! Where facts come from: manifests and the cluster's API.

use std::path::Path;
use std::time::Duration;

use ferrule_model::view::NodeView;

use super::{Finding, Outcome};
use crate::config::Config;
use crate::source::Sources;
use crate::source::folder::Folder;
use crate::source::kubernetes::Servers;

const MANIFESTS: &str = "manifests";
const NODE: &str = "Node object";
const API: &str = "Kubernetes API";

/// What to do about a server that says nothing of it itself.
const REMEDY: &str = "see to the server, the way to it and the credentials; apiServer in the \
                      configuration names other addresses";

/// How long a server may take.
const LIMIT: Duration = Duration::from_secs(3);

/// Looks at each source. What is wrong there does not keep an agent from starting,
/// but for credentials that make no sense.
pub(super) async fn check(sources: &Sources, node: &str, config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(folder) = &sources.manifests {
        let whole_cluster = sources.credentials.is_some();
        findings.extend(manifests(folder, node, config, whole_cluster));
    }
    let Some(credentials) = &sources.credentials else {
        return findings;
    };
    match Servers::open(credentials, &sources.api_servers).await {
        Err(error) => findings.push(Finding::of_error(API, Outcome::Failed, &error)),
        Ok(servers) => {
            let answers = servers.try_each(LIMIT).await;
            let some = answers.iter().any(|(_, outcome)| outcome.is_ok());
            findings.extend(answers.into_iter().map(|(address, outcome)| match outcome {
                Ok(()) => Finding::ok(API, format!("{address} answers")),
                Err(failure) => Finding::new(
                    API,
                    if some {
                        Outcome::Warning
                    } else {
                        Outcome::Failed
                    },
                    failure.words,
                    if failure.remedy.is_empty() {
                        REMEDY
                    } else {
                        &failure.remedy
                    },
                ),
            }));
        }
    }
    findings
}

fn manifests(folder: &Path, node: &str, config: &Config, beside_an_api: bool) -> Vec<Finding> {
    let mut files = Folder::new(folder.to_owned());
    let scan = match files.scan_once() {
        Ok(scan) => scan,
        Err(error) => {
            return vec![Finding::new(
                MANIFESTS,
                Outcome::Failed,
                format!("{} cannot be listed: {error}", folder.display()),
                "name a folder of manifests that the agent may read",
            )];
        }
    };
    let mut view = NodeView::new(node, config.policy.clone());
    view.take(scan.events);
    let problems = files.findings().problems;
    let mut findings = vec![match problems.first() {
        None => Finding::ok(MANIFESTS, format!("{} can be read", folder.display())),
        Some((path, problem)) => Finding::new(
            MANIFESTS,
            Outcome::Warning,
            format!(
                "{}: {}{}",
                path.display(),
                problem.words,
                more(problems.len() - 1)
            ),
            "correct the file; until then nothing of it counts, and nothing is removed",
        ),
    }];
    match view.cluster().node(node) {
        Some(_) => findings.push(Finding::ok(NODE, format!("{node} is among the manifests"))),
        None if beside_an_api => {}
        None => findings.push(Finding::new(
            NODE,
            Outcome::Warning,
            format!("no manifest has a Node {node:?}: pods get no address"),
            "write one, or give the right --node",
        )),
    }
    findings
}

fn more(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!(" (and {count} more)"),
    }
}
