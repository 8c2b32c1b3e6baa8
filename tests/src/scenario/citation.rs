//! What a scenario shows: the head of its `manifests.yaml`.
//!
//! ```text
//! # row: Which endpoints, 4; Which endpoints, 5
//! # rule: Under policy Local without a local endpoint clients from outside are dropped.
//! # kube-proxy ipvs: what its IPVS mode does; `same`, or `not checked`
//! # kube-proxy nftables: likewise
//! ```
//!
//! A value goes on in lines that are indented behind their `#`. A row is one of
//! [`SECTIONS`], so that a typing error is no row.

use anyhow::{Context as _, bail, ensure};

/// The sections of the service semantics, and the rows of each that scenarios show.
pub(super) const SECTIONS: [(&str, &[&str]); 10] = [
    (
        "Which objects count",
        &[
            "ExternalName and headless",
            "clusterIP",
            "conflict",
            "invalid address",
            "service-proxy-name",
            "headless slice",
            "addressType",
            "duplicates",
            "port",
            "family",
        ],
    ),
    (
        "Frontends",
        &[
            "ClusterIP",
            "external IP",
            "load balancer VIP",
            "node port",
            "health check node port",
        ],
    ),
    (
        "Which endpoints",
        &[
            "conditions",
            "first address",
            "slice port",
            "1",
            "2",
            "3",
            "4",
            "5",
            "6",
            "7",
        ],
    ),
    ("Session affinity", &["ClientIP"]),
    (
        "Masquerade",
        &[
            "hairpin",
            "external frontend",
            "beyond the pod network",
            "outside the cluster",
            "node process",
            "masqueradeAll",
            "detect-local",
            "not needed",
            "source port",
        ],
    ),
    (
        "loadBalancerSourceRanges",
        &[
            "whom they admit",
            "blanks",
            "family",
            "all",
            "invalid",
            "the node itself",
        ],
    ),
    ("Health check node port", &["answer", "addresses"]),
    ("Removing a backend", &["weight"]),
    ("Configuration", &["scheduler"]),
    ("Pains of users", &["2", "17", "19", "20"]),
];

/// A row: its place among the sections, and within its section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Row {
    section: usize,
    place: usize,
}

impl Row {
    /// Every row, in the order of the semantics.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        (0..).zip(SECTIONS).flat_map(|(section, (_, rows))| {
            (0..rows.len()).map(move |place| Self { section, place })
        })
    }

    pub(super) fn section(self) -> &'static str {
        SECTIONS[self.section].0
    }

    pub(super) fn name(self) -> &'static str {
        SECTIONS[self.section].1[self.place]
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut rows = Self::all();
        rows.find(|row| text == format!("{}, {}", row.section(), row.name()))
            .with_context(|| format!("row: {text:?} is none of those in {}", file!()))
    }
}

/// The head, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Citation {
    /// What is shown, the most important first.
    pub(super) rows: Vec<Row>,
    /// In a sentence.
    pub(super) rule: String,
    /// What kube-proxy's modes do.
    pub(super) ipvs: String,
    pub(super) nftables: String,
}

const KEYS: [&str; 4] = ["row", "rule", "kube-proxy ipvs", "kube-proxy nftables"];

impl Citation {
    /// Reads the comments that begin a manifest.
    pub(super) fn parse(manifests: &str) -> anyhow::Result<Self> {
        let comments = manifests.lines().map_while(|line| line.strip_prefix('#'));
        let mut values: Vec<String> = Vec::new();
        for line in comments {
            if line.starts_with("   ") {
                let value = values.last_mut().context("the first line goes on")?;
                value.push(' ');
                value.push_str(line.trim());
                continue;
            }
            let key = KEYS.get(values.len()).copied().unwrap_or_default();
            let value = line.trim_start().strip_prefix(key);
            let value = value.and_then(|rest| rest.strip_prefix(": "));
            let Some(value) = value.filter(|_| !key.is_empty()) else {
                bail!("manifests.yaml begins with `#{line}` where {KEYS:?} are due, in this order");
            };
            values.push(value.trim().to_owned());
        }
        let Ok([rows, rule, ipvs, nftables]) = <[String; 4]>::try_from(values) else {
            bail!("manifests.yaml begins with less than {KEYS:?}");
        };
        for (key, value) in KEYS.iter().zip([&rows, &rule, &ipvs, &nftables]) {
            ensure!(!value.contains('|'), "{key}: a table has no place for `|`");
        }
        Ok(Self {
            rows: rows.split("; ").map(Row::parse).collect::<Result<_, _>>()?,
            rule,
            ipvs,
            nftables,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "# row: Which endpoints, 4; Which endpoints, 5\n# rule: Drops, and\n#   \
        serves.\n# kube-proxy ipvs: same\n# kube-proxy nftables: not checked\nkind: Service\n# no\n";

    #[test]
    fn a_head_is_read() {
        let citation = Citation::parse(HEAD).unwrap();
        let rows: Vec<_> = citation.rows.iter().map(|row| row.name()).collect();
        assert_eq!(rows, ["4", "5"]);
        assert_eq!(citation.rows[0].section(), "Which endpoints");
        assert_eq!(citation.rule, "Drops, and serves.");
        assert_eq!(citation.nftables, "not checked");
    }

    #[test]
    fn what_is_no_head_is_refused() {
        for (part, other) in [
            ("endpoints, 5", "endpoints, 8"),
            ("# rule: ", "# rules: "),
            ("# kube-proxy ipvs: same\n", ""),
            ("kind: Service", "# note: x"),
            ("same", "this | that"),
            ("# row: ", "#    row: "),
        ] {
            assert!(
                Citation::parse(&HEAD.replace(part, other)).is_err(),
                "{other}"
            );
        }
    }
}
