//! `docs/semantics.md`: what scenarios show, row by row of the service semantics. It is
//! made of their heads, so that nothing in it is without a test.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::citation::{Citation, Row, SECTIONS};
use super::control;

/// Where it is.
pub(super) fn file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/semantics.md")
}

/// The rows that no scenario shows.
pub(super) fn missing(scenarios: &BTreeMap<String, Citation>) -> Vec<String> {
    let shown = |row: &Row| scenarios.values().any(|head| head.rows.contains(row));
    let missing = Row::all().filter(|row| !shown(row));
    let words = missing.map(|row| format!("{}, {}", row.section(), row.name()));
    words.collect()
}

/// The page: a table for each section. A scenario stands with the first row that it cites.
pub(super) fn page(scenarios: &BTreeMap<String, Citation>) -> Result<String, std::fmt::Error> {
    let mut page = String::new();
    writeln!(
        page,
        "<!-- Made of the heads of tests/scenarios/*/manifests.yaml; `make dumps` writes it. -->\n\
        # What a Service means, rule by rule\n\n\
        Each line is a scenario of `tests/scenarios`: objects, and packets with their outcome, on \
        IPv4 and IPv6, through a real kernel. The last two columns say what kube-proxy 1.36 does \
        there in its IPVS and its nftables mode: `same` as the rule, or what differs. How Ferrule \
        comes to these results stands in [services.md](services.md).\n\n\
        There are {} scenarios.",
        scenarios.len()
    )?;
    for (section, _) in SECTIONS {
        let of_section = |head: &Citation| head.rows.first().map(|row| row.section());
        let mut lines: Vec<(&Vec<Row>, &String, &Citation)> = scenarios
            .iter()
            .filter(|(_, head)| of_section(head) == Some(section))
            .map(|(name, head)| (&head.rows, name, head))
            .collect();
        lines.sort_by_key(|(rows, name, _)| (rows.first().copied(), *name));
        if lines.is_empty() {
            continue;
        }
        writeln!(
            page,
            "\n## {section}\n\n| row | rule | scenario | kube-proxy, IPVS | kube-proxy, nftables |\n\
            |---|---|---|---|---|"
        )?;
        for (rows, name, head) in lines {
            let named = rows.iter().map(|row| {
                if row.section() == section {
                    row.name().to_owned()
                } else {
                    format!("{}, {}", row.section(), row.name())
                }
            });
            let named: Vec<String> = named.collect();
            let Citation {
                rule,
                ipvs,
                nftables,
                ..
            } = head;
            writeln!(
                page,
                "| {} | {rule} | [`{name}`](../tests/scenarios/{name}) | {ipvs} | {nftables} |",
                named.join("; ")
            )?;
        }
    }
    write!(page, "{CONTROLS}")?;
    for (name, scenario) in control::listed() {
        writeln!(
            page,
            "| `control/{name}` | [`{scenario}`](../tests/scenarios/{scenario}) |"
        )?;
    }
    Ok(page)
}

/// What stands before the list of controls.
const CONTROLS: &str = "
## What users of IPVS suffered

Each of these tests sets IPVS up in a straightforward way, as kube-proxy's IPVS mode did, and
sees the calls of a scenario go wrong; with Ferrule the scenario passes.

| test, by the number of the pain | scenario that passes |
|---|---|
";
