//! The text format of metrics.
//!
//! The library writes OpenMetrics. The older format, which kube-proxy serves to everybody, differs
//! in that a counter's name has its suffix everywhere, and in how it writes the bounds of buckets:
//! a bound is a label, so another way to write it is another series.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// `Content-Type` of the text format of Prometheus, version 0.0.4.
pub(super) const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

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
            Some(_) => writeln!(text, "{line}"),
            None => writeln!(text, "{}", with_gos_bound(line)),
        };
    }
    text
}

/// A bucket's line with its bound as Go writes one: whole numbers have no point.
fn with_gos_bound(line: &str) -> Cow<'_, str> {
    let (name, labels) = line.split_once('{').unwrap_or((line, ""));
    if !name.ends_with("_bucket") || line.starts_with('#') {
        return Cow::Borrowed(line);
    }
    let bound = labels.split_once("le=\"").map(|(_, rest)| rest);
    let bound = bound.and_then(|rest| rest.split_once('"'));
    let Some((bound, whole)) = bound.and_then(|(b, _)| Some((b, b.strip_suffix(".0")?))) else {
        return Cow::Borrowed(line);
    };
    let (written, gos) = (format!("le=\"{bound}\""), format!("le=\"{whole}\""));
    Cow::Owned(line.replacen(&written, &gos, 1))
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
    fn bounds_are_written_as_go_does() {
        for (line, expected) in [
            ("a_bucket{le=\"1.0\"} 3", "a_bucket{le=\"1\"} 3"),
            (
                "a_bucket{x=\"1.0\",le=\"60.0\"} 3",
                "a_bucket{x=\"1.0\",le=\"60\"} 3",
            ),
            ("a_bucket{le=\"0.25\"} 3", "a_bucket{le=\"0.25\"} 3"),
            ("a_bucket{le=\"+Inf\"} 3", "a_bucket{le=\"+Inf\"} 3"),
            ("a{le=\"1.0\"} 3", "a{le=\"1.0\"} 3"),
        ] {
            assert_eq!(with_gos_bound(line), expected);
        }
    }
}
