//! The command `ferrule-agent trace`: the way of a packet through this node.
//!
//! It asks a running agent over its socket; or, from manifests alone, the same code
//! by which a node would be programmed. Both give a [`Trace`], which [`text`] shows
//! to people and `docs/trace.md` promises as JSON. With `--live` the agent holds each
//! step against the kernel.

mod text;

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, anyhow};
use ferrule_api::{Answer, Call, TraceRequest};
use ferrule_model::trace::{Question, Trace};
use ferrule_model::view::NodeView;

use crate::config::Config;
use crate::settings::TraceSettings;
use crate::source::folder::Folder;
use crate::source::kubernetes::chain;
use crate::status::words::{plain, plain_json};
use crate::status::{Agent, StatusError};

/// Exit code when a step is broken, a manifest cannot be read, or the trace not be written.
const BROKEN: u8 = 1;

/// Exit code of a wrong command line, clap's own, and without an answer.
const USAGE: u8 = 2;

/// Follows the packet and prints its way.
pub(crate) fn run(settings: &TraceSettings) -> ExitCode {
    let (trace, whole) = match follow(settings) {
        Ok(followed) => followed,
        Err(error) => {
            complain(&chain(error.as_ref()));
            return ExitCode::from(USAGE);
        }
    };
    let shown = if settings.json {
        json(&trace)
    } else {
        Ok(text::render(&trace))
    };
    let written = shown.and_then(|shown| {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(shown.as_bytes());
        Ok(written.and_then(|()| stdout.flush())?)
    });
    let reader_has_enough = |error: &anyhow::Error| {
        let error = error.downcast_ref::<io::Error>();
        error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if let Err(error) = written
        && !reader_has_enough(&error)
    {
        complain(&format!("standard output cannot be written: {error}"));
        return ExitCode::from(BROKEN);
    }
    let broken = trace.live.as_ref().is_some_and(|live| live.broken > 0);
    if whole && !broken {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(BROKEN)
    }
}

/// The trace, and whether every manifest could be read.
fn follow(settings: &TraceSettings) -> anyhow::Result<(Trace, bool)> {
    let question = Question::new(settings.from, settings.to, settings.device.clone());
    let question = question.map_err(|error| anyhow!("--{error}"))?;
    let (Some(manifests), Some(node)) = (&settings.manifests, &settings.node) else {
        let trace = ask(&settings.socket, question, settings.live)?;
        return Ok((trace, true));
    };
    let config = Config::read(settings.config.as_deref())?;
    let mut view = NodeView::new(node, config.policy);
    let whole = read(manifests, &mut view)?;
    let trace = Trace::new(&view, &question).map_err(|error| anyhow!("--{error}"))?;
    Ok((trace, whole))
}

/// Takes in what manifests say. Whether all of them could be read.
fn read(manifests: &Path, view: &mut NodeView) -> anyhow::Result<bool> {
    let mut files = Folder::new(manifests.to_owned());
    let scan = files.scan_once_or_file().with_context(|| {
        format!(
            "--manifests {}: name a folder of manifests, or one of them",
            manifests.display()
        )
    })?;
    view.take(scan.events);
    let mut whole = true;
    for (path, problem) in &files.findings().problems {
        complain(&format!("{}: {}", path.display(), problem.words));
        whole &= !problem.fatal;
    }
    Ok(whole)
}

/// Asks the agent of this node.
fn ask(socket: &Path, question: Question, live: bool) -> Result<Trace, StatusError> {
    let call = Call::Trace(Box::new(TraceRequest { question, live }));
    match Agent::connect(socket)?.ask(call)? {
        Answer::Trace { trace } => Ok(*trace),
        _ => Err(StatusError::OtherAnswer),
    }
}

fn json(trace: &Trace) -> anyhow::Result<String> {
    let mut json = plain_json(&serde_json::to_string_pretty(trace)?);
    json.push('\n');
    Ok(json)
}

fn complain(words: &str) {
    let _nobody_listens = writeln!(io::stderr(), "ferrule-agent trace: {}", plain(words));
}
