//! Lists of frontends and pods, with rates from two looks.
//!
//! The agent gives a list in parts. Between the two looks rows may come and
//! go, and counters begin anew when their virtual service or device was made
//! anew: such a row counts from zero, so no rate is ever negative.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anstyle::Style;
use comfy_table::{Cell, CellAlignment, Table, presets};
use ferrule_api::status::{FrontendRow, PodRow};
use ferrule_api::{Answer, Call};
use serde::Serialize;

use crate::settings::{Output, StatusSettings};
use crate::status::text::{Look, Palette, paint};
use crate::status::words::{amount, plain};
use crate::status::{Agent, OUTPUT_VERSION, StatusError, pretty};

/// Most rows of a list, over all its parts. No node has as many.
pub(super) const MAX_TOTAL: usize = 1_000_000;

/// Characters of a container ID that people read; tools of runtimes show 12 or 13.
const SHORT_ID: usize = 12;

/// A counter of a row.
pub(super) struct Counter<R> {
    /// Its field in JSON.
    field: &'static str,
    /// Its column in text.
    heading: &'static str,
    /// `B` for bytes.
    unit: &'static str,
    get: fn(&R) -> u64,
}

/// One row of a list.
pub(super) trait Row: Serialize + Sized + 'static {
    /// What the list is called.
    const LIST: &'static str;
    /// Headings of the columns before the counters.
    const HEADINGS: &'static [&'static str];
    /// Its counters.
    const COUNTERS: &'static [Counter<Self>];

    /// Asks for the part behind `after`.
    fn call(after: Option<String>) -> Call;
    /// The rows of a part, and where the next one begins.
    fn part(answer: Answer) -> Option<(Vec<Self>, Option<String>)>;
    /// What stays the same between two looks.
    fn identity(&self) -> [&str; 4];
    /// The cells before the counters; made plain by the caller.
    fn cells(&self) -> Vec<String>;
    /// How its line stands out.
    fn style(&self, palette: &Palette) -> Style;
}

impl Row for FrontendRow {
    const LIST: &'static str = "services";
    const HEADINGS: &'static [&'static str] = &[
        "SERVICE",
        "PORT",
        "KIND",
        "ADDRESS",
        "SCHEDULER",
        "BACKENDS",
        "STATE",
    ];
    const COUNTERS: &'static [Counter<Self>] = &[
        counter("connections", "CONNS", "", |row| row.connections),
        counter("packetsIn", "PKTS IN", "", |row: &Self| row.packets_in),
        counter("packetsOut", "PKTS OUT", "", |row: &Self| row.packets_out),
        counter("bytesIn", "BYTES IN", "B", |row: &Self| row.bytes_in),
        counter("bytesOut", "BYTES OUT", "B", |row: &Self| row.bytes_out),
    ];

    fn call(after: Option<String>) -> Call {
        Call::Frontends { after }
    }

    fn part(answer: Answer) -> Option<(Vec<Self>, Option<String>)> {
        match answer {
            Answer::Frontends(part) => Some((part.rows, part.next)),
            _ => None,
        }
    }

    fn identity(&self) -> [&str; 4] {
        [&self.service, &self.port, &self.address, &self.kind]
    }

    fn cells(&self) -> Vec<String> {
        let state = if self.programmed {
            &self.action
        } else {
            "pending"
        };
        vec![
            self.service.clone(),
            self.port.clone(),
            self.kind.clone(),
            self.address.clone(),
            self.scheduler.clone(),
            self.backends.to_string(),
            state.to_owned(),
        ]
    }

    fn style(&self, palette: &Palette) -> Style {
        if !self.programmed {
            palette.bad
        } else if self.action != "balance" {
            palette.warning
        } else {
            Style::new()
        }
    }
}

impl Row for PodRow {
    const LIST: &'static str = "pods";
    const HEADINGS: &'static [&'static str] =
        &["POD", "CONTAINER", "INTERFACE", "ADDRESSES", "HOST END"];
    const COUNTERS: &'static [Counter<Self>] = &[
        counter("packetsIn", "PKTS IN", "", |row| row.packets_in),
        counter("packetsOut", "PKTS OUT", "", |row| row.packets_out),
        counter("bytesIn", "BYTES IN", "B", |row| row.bytes_in),
        counter("bytesOut", "BYTES OUT", "B", |row| row.bytes_out),
    ];

    fn call(after: Option<String>) -> Call {
        Call::Pods { after }
    }

    fn part(answer: Answer) -> Option<(Vec<Self>, Option<String>)> {
        match answer {
            Answer::Pods(part) => Some((part.rows, part.next)),
            _ => None,
        }
    }

    fn identity(&self) -> [&str; 4] {
        [
            &self.container_id,
            &self.interface,
            &self.host_interface,
            "",
        ]
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.pod.clone(),
            self.container_id.chars().take(SHORT_ID).collect(),
            self.interface.clone(),
            self.addresses.join(", "),
            self.host_interface.clone(),
        ]
    }

    fn style(&self, palette: &Palette) -> Style {
        if self.host_interface.is_empty() {
            palette.warning
        } else {
            Style::new()
        }
    }
}

const fn counter<R>(
    field: &'static str,
    heading: &'static str,
    unit: &'static str,
    get: fn(&R) -> u64,
) -> Counter<R> {
    Counter {
        field,
        heading,
        unit,
        get,
    }
}

/// A row, and the moment at which the agent told it.
struct Seen<R> {
    row: R,
    at: Instant,
}

/// A row with its rates, in the order of [`Row::COUNTERS`]; without them after a single look.
struct Rated<R> {
    row: R,
    rates: Option<Vec<f64>>,
}

/// Looks twice, or once where the interval is zero, and makes the text to print.
pub(super) fn show<R: Row>(
    settings: &StatusSettings,
    interval: Duration,
    look: &Look,
) -> Result<String, StatusError> {
    let began = Instant::now();
    let first = look_once::<R>(&settings.socket)?;
    let rows = if interval.is_zero() {
        first
            .into_iter()
            .map(|seen| Rated {
                row: seen.row,
                rates: None,
            })
            .collect()
    } else {
        thread::sleep(interval);
        rated(began, &first, look_once::<R>(&settings.socket)?)
    };
    match settings.output {
        Output::Text => Ok(table(&rows, !interval.is_zero(), look)),
        Output::Json => json(rows, interval),
    }
}

/// One look, over a connection of its own: the agent closes one that is idle
/// for longer than a request may take, and the interval may be longer.
fn look_once<R: Row>(socket: &Path) -> Result<Vec<Seen<R>>, StatusError> {
    let mut agent = Agent::connect(socket)?;
    all_parts(|call| agent.ask(call))
}

/// Reads part after part.
///
/// An agent that goes astray must not keep us for ever: a part has to end
/// behind the one before, and there is an end to all rows. A part without any
/// counts as a row, or empty parts would never reach it.
fn all_parts<R: Row>(
    mut ask: impl FnMut(Call) -> Result<Answer, StatusError>,
) -> Result<Vec<Seen<R>>, StatusError> {
    let mut all = Vec::new();
    let mut counted: usize = 0;
    let mut after: Option<String> = None;
    loop {
        let answer = ask(R::call(after.clone()))?;
        let (rows, next) = R::part(answer).ok_or(StatusError::OtherAnswer)?;
        let at = Instant::now();
        counted = counted.saturating_add(rows.len().max(1));
        if counted > MAX_TOTAL {
            return Err(StatusError::TooLong { list: R::LIST });
        }
        all.extend(rows.into_iter().map(|row| Seen { row, at }));
        let Some(next) = next else {
            return Ok(all);
        };
        match after {
            Some(after) if next <= after => {
                let list = R::LIST;
                return Err(StatusError::Loop { list, after, next });
            }
            _ => after = Some(next),
        }
    }
}

/// The rows of the second look, with rates. A row that the first look, which
/// `began` then, did not see yet came into being after it and counts from zero.
fn rated<R: Row>(began: Instant, first: &[Seen<R>], second: Vec<Seen<R>>) -> Vec<Rated<R>> {
    let before: BTreeMap<[&str; 4], &Seen<R>> = first
        .iter()
        .map(|seen| (seen.row.identity(), seen))
        .collect();
    second
        .into_iter()
        .map(|seen| {
            let earlier = before.get(&seen.row.identity()).copied();
            let since = earlier.map_or(began, |earlier| earlier.at);
            let elapsed = seen.at.duration_since(since);
            let rates = rates(earlier.map(|earlier| &earlier.row), &seen.row, elapsed);
            Rated {
                row: seen.row,
                rates: Some(rates),
            }
        })
        .collect()
}

/// What each counter gained in a second.
///
/// If any of them went down, the row was made anew, and all began at zero: the
/// others may have grown past what they had been.
fn rates<R: Row>(earlier: Option<&R>, later: &R, elapsed: Duration) -> Vec<f64> {
    let seconds = elapsed.as_secs_f64();
    let values = |row: &R| {
        R::COUNTERS
            .iter()
            .map(|counter| (counter.get)(row))
            .collect()
    };
    let now: Vec<u64> = values(later);
    let before: Vec<u64> = earlier
        .map(values)
        .filter(|before: &Vec<u64>| before.iter().zip(&now).all(|(before, now)| before <= now))
        .unwrap_or_else(|| vec![0; now.len()]);
    now.iter()
        .zip(&before)
        .map(|(now, before)| {
            if seconds > 0.0 {
                approximate(now.saturating_sub(*before)) / seconds
            } else {
                0.0
            }
        })
        .collect()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a rate is shown with three digits"
)]
fn approximate(number: u64) -> f64 {
    number as f64
}

/// Text: a line for each row, never wrapped, so that `grep` and `awk` can read it.
fn table<R: Row>(rows: &[Rated<R>], with_rates: bool, look: &Look) -> String {
    if rows.is_empty() {
        return format!("no {}\n", R::LIST);
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let per_second = if with_rates { "/S" } else { "" };
    let counters = R::COUNTERS
        .iter()
        .map(|counter| number(format!("{}{per_second}", counter.heading)));
    table.set_header(R::HEADINGS.iter().map(Cell::new).chain(counters));
    for rated in rows {
        table.add_row(line(rated));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let styles = rows.iter().map(|rated| rated.row.style(&look.palette));
    let mut text = String::new();
    for (line, style) in table
        .lines()
        .zip(std::iter::once(look.palette.label).chain(styles))
    {
        text.push_str(&paint(style, line.trim_end()));
        text.push('\n');
    }
    text
}

fn line<R: Row>(entry: &Rated<R>) -> Vec<Cell> {
    let mut cells: Vec<Cell> = entry.row.cells().iter().map(|text| cell(text)).collect();
    for (index, counter) in R::COUNTERS.iter().enumerate() {
        let value = match &entry.rates {
            Some(rates) => rates.get(index).copied().unwrap_or_default(),
            None => approximate((counter.get)(&entry.row)),
        };
        cells.push(number(amount(value, counter.unit)));
    }
    cells
}

/// A cell of text. An empty one would shift the columns for `awk`.
fn cell(text: &str) -> Cell {
    if text.is_empty() {
        Cell::new("-")
    } else {
        Cell::new(plain(text))
    }
}

fn number(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

fn json<R: Row>(rows: Vec<Rated<R>>, interval: Duration) -> Result<String, StatusError> {
    #[derive(Serialize)]
    struct Line<R> {
        #[serde(flatten)]
        row: R,
        #[serde(skip_serializing_if = "Option::is_none")]
        rates: Option<BTreeMap<&'static str, f64>>,
    }
    #[derive(Serialize)]
    struct List<R: Serialize> {
        version: u32,
        interval: f64,
        #[serde(flatten)]
        rows: BTreeMap<&'static str, Vec<Line<R>>>,
    }
    let fields = R::COUNTERS.iter().map(|counter| counter.field);
    let lines = rows
        .into_iter()
        .map(|rated| Line {
            row: rated.row,
            rates: rated
                .rates
                .map(|rates| fields.clone().zip(rates.into_iter().map(rounded)).collect()),
        })
        .collect();
    pretty(&List {
        version: OUTPUT_VERSION,
        interval: interval.as_secs_f64(),
        rows: BTreeMap::from([(R::LIST, lines)]),
    })
}

/// To thousandths; the clock knows no better.
fn rounded(rate: f64) -> f64 {
    (rate * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests;
