//! What the checks found, for people and for programs.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use comfy_table::{Table, presets};

use super::{Finding, Outcome};
use crate::settings::Output;
use crate::status::words::{plain, plain_json};

/// Columns that a line of text may take.
const WIDTH: usize = 100;

/// Prints it on standard output.
///
/// # Errors
/// When that cannot be written.
pub(super) fn print(findings: &[Finding], output: Output) -> io::Result<()> {
    let text = match output {
        Output::Text => text(findings),
        Output::Json => {
            let json = serde_json::to_string_pretty(findings)?;
            format!("{}\n", plain_json(&json))
        }
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A row for each check; below it what to do, for sentences fit no column.
fn text(findings: &[Finding]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["CHECK", "RESULT", "FOUND"]);
    let widest = findings.iter().map(|finding| finding.check.len()).max();
    // Name, result, and the blanks between the columns.
    let room = WIDTH.saturating_sub(widest.unwrap_or(0) + 14).max(30);
    for finding in findings {
        let mut cell = textwrap::fill(&plain(&finding.found), room);
        if !finding.remedy.is_empty() {
            let remedy = format!("→ {}", plain(&finding.remedy));
            let _ = write!(cell, "\n{}", textwrap::fill(&remedy, room));
        }
        table.add_row([finding.check, word(finding.result), &cell]);
    }
    let mut text = String::new();
    for line in table.lines() {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{}",
            line.trim_end()
                .strip_prefix(' ')
                .unwrap_or(&line)
                .trim_end()
        );
    }
    let count = |outcome| {
        findings
            .iter()
            .filter(|finding| finding.result == outcome)
            .count()
    };
    let _ = writeln!(
        text,
        "\n{} ok, {} warnings, {} failed",
        count(Outcome::Ok),
        count(Outcome::Warning),
        count(Outcome::Failed)
    );
    text
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Ok => "ok",
        Outcome::Warning => "warning",
        Outcome::Failed => "FAILED",
    }
}
