//! The two text formats of metrics.
//!
//! The library writes OpenMetrics. The older format, which everything reads that asks for
//! nothing, differs in that a counter's name has its suffix everywhere.

use std::collections::BTreeSet;
use std::fmt::Write as _;

/// A text format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The text format of Prometheus, version 0.0.4.
    Classic,
    /// OpenMetrics 1.0.
    Open,
}

impl Format {
    /// The one that a request's header `Accept` asks for.
    pub(super) fn wanted(accept: Option<&str>) -> Self {
        // Who accepts OpenMetrics prefers it.
        if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
            Self::Open
        } else {
            Self::Classic
        }
    }

    /// `Content-Type`.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
            Self::Open => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// OpenMetrics in the classic format.
pub(super) fn classic(open: &str) -> String {
    let counters: BTreeSet<&str> = open
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter"))
        .collect();
    let mut text = String::with_capacity(open.len() + 32 * counters.len());
    for line in open.lines() {
        let described = ["# HELP ", "# TYPE "].into_iter().find_map(|kind| {
            let (name, words) = line.strip_prefix(kind)?.split_once(' ')?;
            Some((kind, name, words))
        });
        let _strings_take_all = match described {
            Some((kind, name, words)) if counters.contains(name) => {
                writeln!(text, "{kind}{name}_total {words}")
            }
            None if line == "# EOF" => Ok(()),
            Some(_) | None => writeln!(text, "{line}"),
        };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counters_suffix_belongs_to_its_name() {
        let open = "# HELP a_b Words # TYPE a_b.\n# TYPE a_b counter\na_b_total{x=\"# EOF\"} 1\n\
                    # HELP a_b_c Other.\n# TYPE a_b_c gauge\na_b_c 2\n# EOF\n";
        assert_eq!(
            classic(open),
            "# HELP a_b_total Words # TYPE a_b.\n# TYPE a_b_total counter\na_b_total{x=\"# EOF\"} 1\n\
             # HELP a_b_c Other.\n# TYPE a_b_c gauge\na_b_c 2\n"
        );
    }

    #[test]
    fn who_asks_for_nothing_gets_the_classic_one() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        assert_eq!(Format::wanted(Some(prometheus)), Format::Open);
        for accept in [None, Some("*/*"), Some("text/plain"), Some("")] {
            assert_eq!(Format::wanted(accept), Format::Classic);
        }
    }
}
