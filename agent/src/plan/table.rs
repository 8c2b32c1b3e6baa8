//! A plan for people.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use comfy_table::{Table, presets};
use ferrule_model::plan::{BackendRow, FrontendRow, Plan};

use crate::status::words::plain;

/// Most backends that a row shows.
const BACKENDS: usize = 4;

/// The frontends as a table, then what is to be said about objects.
pub(super) fn text(plan: &Plan) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "SERVICE",
        "PORT",
        "KIND",
        "FRONTEND",
        "ACTION",
        "SCHEDULER",
        "MASQUERADE",
        "BACKENDS",
    ]);
    for row in &plan.frontends {
        table.add_row([
            plain(&row.service).into_owned(),
            dash(&plain(&row.port)),
            row.kind.clone(),
            frontend(row),
            row.action.to_owned(),
            row.scheduler.clone(),
            dash(&row.masquerade.join(",")),
            backends(&row.backends),
        ]);
    }
    // Writing to a String cannot fail.
    let mut text = String::new();
    for line in table.lines() {
        let _ = writeln!(text, "{}", line.trim());
    }
    if plan.frontends.is_empty() {
        text = format!("Node {} would program no frontend.\n", plain(&plan.node));
    }
    if !plan.conditions.is_empty() {
        text.push_str("\nServed only in part, or not at all:\n");
        for condition in &plan.conditions {
            let words = format!(
                "{}: {}: {}",
                condition.object, condition.reason, condition.message
            );
            let _ = writeln!(text, "  {}", plain(&words));
        }
    }
    text
}

fn dash(text: &str) -> String {
    if text.is_empty() { "-" } else { text }.to_owned()
}

/// `10.96.0.10:80/TCP`.
pub(super) fn frontend(row: &FrontendRow) -> String {
    format!("{}/{}", socket(row.address, row.port_number), row.protocol)
}

pub(super) fn backend(row: &BackendRow) -> String {
    let mut text = socket(row.address, row.port);
    if row.state != "ready" {
        let _ = write!(text, " ({})", row.state);
    }
    text
}

fn socket(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

fn backends(rows: &[BackendRow]) -> String {
    let mut words: Vec<String> = rows.iter().take(BACKENDS).map(backend).collect();
    if rows.len() > BACKENDS {
        words.push(format!("and {} more", rows.len() - BACKENDS));
    }
    dash(&words.join(", "))
}
