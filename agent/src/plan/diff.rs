//! What changes between two plans of one node.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ferrule_model::address::Protocol;
use ferrule_model::plan::{BackendRow, ConditionRow, FrontendRow, Plan, VERSION};
use serde::Serialize;

use super::table::{backend, frontend};
use crate::status::words::plain;

/// The difference of two plans. Rows stand in the order of the plan they are from.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Difference {
    version: u32,
    node: String,
    /// Frontends that only the second plan has.
    added: Vec<FrontendRow>,
    /// Frontends that only the first plan has.
    removed: Vec<FrontendRow>,
    /// Frontends that both have and that differ.
    changed: Vec<Change>,
    /// Conditions that only the second plan has.
    conditions_added: Vec<ConditionRow>,
    /// Conditions that only the first plan has.
    conditions_removed: Vec<ConditionRow>,
}

#[derive(Debug, Serialize)]
struct Change {
    before: FrontendRow,
    after: FrontendRow,
}

/// What makes two rows the same frontend: where it is and whom it is for. Its
/// Service may be another afterwards.
fn key(row: &FrontendRow) -> (IpAddr, u16, Protocol, String, &'static str) {
    (
        row.address,
        row.port_number,
        row.protocol,
        row.kind.clone(),
        row.clients,
    )
}

impl Difference {
    pub(super) fn new(before: Plan, after: Plan) -> Self {
        let only_in = |these: &[ConditionRow], those: &[ConditionRow]| -> Vec<ConditionRow> {
            let missing = these.iter().filter(|row| !those.contains(row));
            missing.cloned().collect()
        };
        let conditions_added = only_in(&after.conditions, &before.conditions);
        let conditions_removed = only_in(&before.conditions, &after.conditions);
        let mut new: BTreeMap<_, _> = after.frontends.iter().map(|row| (key(row), row)).collect();
        let mut removed = Vec::new();
        let mut both = BTreeMap::new();
        for before in before.frontends {
            let key = key(&before);
            match new.remove(&key) {
                None => removed.push(before),
                Some(_) => {
                    both.insert(key, before);
                }
            }
        }
        let mut added = Vec::new();
        let mut changed = Vec::new();
        for after in after.frontends {
            match both.remove(&key(&after)) {
                None => added.push(after),
                Some(before) if before != after => changed.push(Change { before, after }),
                Some(_) => {}
            }
        }
        Self {
            version: VERSION,
            node: after.node,
            added,
            removed,
            changed,
            conditions_added,
            conditions_removed,
        }
    }

    fn is_empty(&self) -> bool {
        self.added.is_empty()
            && self.removed.is_empty()
            && self.changed.is_empty()
            && self.conditions_added.is_empty()
            && self.conditions_removed.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "Nothing would change on node {}.", plain(&self.node));
        }
        for (sign, rows) in [('-', &self.removed), ('+', &self.added)] {
            for row in rows {
                let backends: Vec<String> = row.backends.iter().map(backend).collect();
                writeln!(
                    f,
                    "{sign} {} {} [{}]",
                    title(row),
                    row.action,
                    backends.join(", ")
                )?;
            }
        }
        for Change { before, after } in &self.changed {
            writeln!(f, "~ {}", title(after))?;
            for (field, before, after) in fields(before, after) {
                writeln!(f, "    {field}: {before} -> {after}")?;
            }
            for (sign, these, those) in [('-', before, after), ('+', after, before)] {
                for row in these
                    .backends
                    .iter()
                    .filter(|r| !those.backends.contains(r))
                {
                    writeln!(f, "    {sign} backend {}", whole_backend(row))?;
                }
            }
        }
        for (sign, rows) in [
            ('-', &self.conditions_removed),
            ('+', &self.conditions_added),
        ] {
            for row in rows {
                let words = format!("{}: {}: {}", row.object, row.reason, row.message);
                writeln!(f, "{sign} {}", plain(&words))?;
            }
        }
        Ok(())
    }
}

fn title(row: &FrontendRow) -> String {
    format!("{} {} {}", plain(&row.service), row.kind, frontend(row))
}

/// With everything in which two rows of one backend can differ.
fn whole_backend(row: &BackendRow) -> String {
    format!(
        "{}, weight {}, {}",
        backend(row),
        row.weight,
        if row.local {
            "on this node"
        } else {
            "not on this node"
        }
    )
}

/// Fields in which two rows differ, backends aside.
fn fields(before: &FrontendRow, after: &FrontendRow) -> Vec<(&'static str, String, String)> {
    let none = |text: String| {
        if text.is_empty() {
            "none".to_owned()
        } else {
            plain(&text).into_owned()
        }
    };
    let in_words = |row: &FrontendRow| {
        let affinity = row.affinity_seconds.map(|seconds| format!("{seconds} s"));
        [
            ("service", row.service.clone()),
            ("port", row.port.clone()),
            ("action", row.action.to_owned()),
            ("scheduler", row.scheduler.clone()),
            ("scheduler flags", row.scheduler_flags.join(",")),
            ("affinity", affinity.unwrap_or_default()),
            ("source ranges", row.source_ranges.join(",")),
            ("masquerade", row.masquerade.join(",")),
        ]
    };
    let pairs = in_words(before).into_iter().zip(in_words(after));
    pairs
        .filter(|(before, after)| before != after)
        .map(|((field, before), (_, after))| (field, none(before), none(after)))
        .collect()
}
