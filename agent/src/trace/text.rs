//! A trace for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};
use ferrule_model::address::BackendAddr;
use ferrule_model::trace::live::{Check, Live};
use ferrule_model::trace::{BackendStep, Trace};

use crate::status::words::plain;

/// Width of the lines, which is that of `status` where there is no terminal.
const WIDTH: usize = 100;

/// Width of the names of steps.
const NAMES: usize = 12;

/// Backends that are shown one by one.
const BACKENDS: usize = 20;

/// The step behind which the backends stand.
const BALANCING: &str = "balancing";

/// The steps in sentences, with a table of the backends, then what the kernel has.
pub(super) fn render(trace: &Trace) -> String {
    // Writing to a String cannot fail.
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{} to {} on node {}",
        trace.from,
        plain(&trace.to),
        plain(&trace.node)
    );
    text.push('\n');
    for step in &trace.steps {
        paragraph(&mut text, &step.step, &step.says);
        if step.step == BALANCING {
            backends(&mut text, trace);
        }
    }
    if let Some(live) = &trace.live {
        kernel(&mut text, live);
    }
    text
}

/// A name and the sentences behind it, wrapped.
fn paragraph(text: &mut String, name: &str, says: &str) {
    let first = format!("{:NAMES$}", plain(name));
    let indent = " ".repeat(NAMES);
    let options = textwrap::Options::new(WIDTH)
        .initial_indent(&first)
        .subsequent_indent(&indent)
        .break_words(false);
    for line in textwrap::wrap(&plain(says), options) {
        let _ = writeln!(text, "{}", line.trim_end());
    }
}

fn backends(text: &mut String, trace: &Trace) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["SHARE", "BACKEND", "WEIGHT", "WHERE", "SEES"]);
    for backend in trace.backends.iter().take(BACKENDS) {
        table.add_row(row(backend));
    }
    for column in [0, 2] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let indent = " ".repeat(NAMES);
    for line in table.lines() {
        let _ = writeln!(text, "{}", format!("{indent}{line}").trim_end());
    }
    let shown = trace.backends.len().min(BACKENDS);
    if trace.backend_count > shown {
        let _ = writeln!(text, "{indent} and {} more", trace.backend_count - shown);
    }
}

fn row(backend: &BackendStep) -> [String; 5] {
    let place = if backend.local {
        "this node"
    } else {
        "elsewhere"
    };
    let place = match backend.state.as_str() {
        "ready" => place.to_owned(),
        state => format!("{place}, {}", plain(state)),
    };
    let sees = match (&backend.sees, &backend.masquerade) {
        (None, _) => "-".to_owned(),
        (Some(_), None) => "the client".to_owned(),
        (Some(_), Some(why)) => format!("this node ({})", plain(why)),
    };
    [
        format!("{} %", backend.percent),
        BackendAddr::new(backend.address, backend.port).to_string(),
        backend.weight.to_string(),
        place,
        sees,
    ]
}

fn kernel(text: &mut String, live: &Live) {
    text.push('\n');
    let _ = match live.broken {
        0 => writeln!(text, "In the kernel, each step is as it should be:"),
        1 => writeln!(text, "In the kernel, 1 step is BROKEN:"),
        number => writeln!(text, "In the kernel, {number} steps are BROKEN:"),
    };
    text.push('\n');
    for check in &live.checks {
        let Check {
            step,
            ok,
            says,
            remedy,
        } = check;
        let mut words = says.join(" ");
        if !ok {
            words.insert_str(0, "BROKEN: ");
        }
        paragraph(text, step, &words);
        if let Some(remedy) = remedy {
            paragraph(text, "", &format!("Remedy: {remedy}."));
        }
    }
}
