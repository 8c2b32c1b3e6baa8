//! The command `ferrule-agent plan`: what a node would program, from manifests alone.
//!
//! The facts go through the same `NodeView` as in the running agent; here the
//! Node object's addresses stand for those of the machine. Nothing is watched,
//! no kernel is touched, and no right is needed but to read the files.
//!
//! What objects say is shown to people as [`plain`] text: whoever reviews a
//! manifest need not trust its author.

mod diff;
mod table;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use ferrule_model::plan::Plan;
use ferrule_model::view::NodeView;

use crate::config::Config;
use crate::plan::diff::Difference;
use crate::settings::{PlanOutput, PlanSettings};
use crate::source::folder::Folder;
use crate::status::words::{plain, plain_json};

/// Exit code when a file could not be read or parsed at all, or the plan not be written.
const UNREADABLE: u8 = 1;

/// Exit code of a wrong command line, and clap's own.
const USAGE: u8 = 2;

/// Prints the plan, or the difference of two.
pub(crate) fn run(settings: &PlanSettings) -> ExitCode {
    let (text, whole) = match text(settings) {
        Ok(made) => made,
        Err(error) => {
            complain(&format!("{error:#}"));
            return ExitCode::from(USAGE);
        }
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        Ok(()) => {}
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => {
            complain(&format!("standard output cannot be written: {error}"));
            return ExitCode::from(UNREADABLE);
        }
    }
    if whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(UNREADABLE)
    }
}

/// What is printed, and whether every file could be read.
fn text(settings: &PlanSettings) -> anyhow::Result<(String, bool)> {
    let config = Config::read(settings.config.as_deref())?;
    let node = &settings.node;
    let (plan, mut whole) = plan("--manifests", &settings.manifests, node, &config)?;
    let text = if let Some(other) = &settings.diff {
        let (changed, whole_too) = self::plan("--diff", other, node, &config)?;
        whole &= whole_too;
        let difference = Difference::new(plan, changed);
        match settings.output {
            PlanOutput::Json => json(&difference)?,
            PlanOutput::Table => difference.to_string(),
        }
    } else {
        match settings.output {
            PlanOutput::Json => json(&plan)?,
            PlanOutput::Table => table::text(&plan),
        }
    };
    Ok((text, whole))
}

fn json(value: &impl serde::Serialize) -> anyhow::Result<String> {
    let mut text = plain_json(&serde_json::to_string_pretty(value)?);
    text.push('\n');
    Ok(text)
}

/// The plan of a folder, and whether every file of it could be read. `option` is
/// the one that names the folder.
fn plan(option: &str, folder: &Path, node: &str, config: &Config) -> anyhow::Result<(Plan, bool)> {
    let mut files = Folder::new(folder.to_owned());
    let scan = files.scan_once().map_err(|error| {
        anyhow::anyhow!(
            "{option} {}: cannot be listed: {error}; name a folder of manifests",
            folder.display()
        )
    })?;
    let mut view = NodeView::new(node, config.policy.clone());
    view.take(scan.events);
    let findings = files.findings();
    let mut whole = true;
    for (path, problem) in &findings.problems {
        // A condition must not depend on the file that an object stands in; here the
        // file and line of what is wrong with it are told.
        complain(&format!("{}: {}", path.display(), problem.words));
        whole &= !problem.fatal;
    }
    Ok((Plan::new(&view, findings.conditions(folder)), whole))
}

fn complain(words: &str) {
    let _nobody_listens = writeln!(io::stderr(), "ferrule-agent plan: {}", plain(words));
}
