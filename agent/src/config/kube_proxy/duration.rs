//! Spans of time as Go writes them: `0s`, `1m0s`, `1h30m`, `250ms`.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

/// Longest span that Go has, in seconds: it counts nanoseconds, to some 292 years.
const LONGEST: f64 = 9_223_372_036.0;

/// A span of time; nothing and `0` are none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GoDuration(pub(super) Duration);

/// What is read; `None` for what is no span of time, or a negative one.
pub(super) fn parse(text: &str) -> Option<Duration> {
    if matches!(text, "" | "0" | "+0" | "-0") {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, behind) = rest.split_at(end);
        let number: f64 = number.parse().ok()?;
        let unit = behind.find(|c: char| c.is_ascii_digit() || c == '.');
        let (unit, behind) = behind.split_at(unit.unwrap_or(behind.len()));
        seconds += number * in_seconds(unit)?;
        rest = behind;
    }
    if seconds > LONGEST {
        return None;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

fn in_seconds(unit: &str) -> Option<f64> {
    match unit {
        "ns" => Some(1e-9),
        "us" | "µs" | "μs" => Some(1e-6),
        "ms" => Some(1e-3),
        "s" => Some(1.0),
        "m" => Some(60.0),
        "h" => Some(3600.0),
        _ => None,
    }
}

/// As Go writes it, for spans of whole milliseconds.
pub(in crate::config) fn written(span: Duration) -> String {
    let seconds = span.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let millis = span.subsec_millis();
    let mut rest = (seconds % 60).to_string();
    if millis > 0 {
        let fraction = format!("{millis:03}");
        rest.push('.');
        rest.push_str(fraction.trim_end_matches('0'));
    }
    match (hours, minutes) {
        (0, 0) => format!("{rest}s"),
        (0, minutes) => format!("{minutes}m{rest}s"),
        (hours, minutes) => format!("{hours}h{minutes}m{rest}s"),
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Span)
    }
}

struct Span;

impl Visitor<'_> for Span {
    type Value = GoDuration;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a span of time, such as 30s or 1h0m0s")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<GoDuration, E> {
        parse(text).map(GoDuration).ok_or_else(|| {
            E::custom(format!(
                "{text:?} is no span of time; write one such as 30s or 1h0m0s"
            ))
        })
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<GoDuration, E> {
        match number {
            0 => Ok(GoDuration::default()),
            number => Err(E::custom(format!(
                "{number} has no unit; write {number}s if these are seconds"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_writes_is_read() {
        for (text, millis) in [
            ("", 0),
            ("0", 0),
            ("0s", 0),
            ("15s", 15_000),
            ("1m0s", 60_000),
            ("900s", 900_000),
            ("24h0m0s", 86_400_000),
            ("1.5h", 5_400_000),
            ("1m0.25s", 60_250),
            ("250ms", 250),
            ("+2s", 2000),
            ("720h", 2_592_000_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in [
            "s", "5", "-5s", "5 s", "5d", "1h-5m", "1..5s", ".s", "1e3s", "2562048h",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn and_written_as_go_writes_it() {
        for text in ["0s", "15s", "1m0s", "15m0s", "24h0m0s", "1h0m0.25s"] {
            assert_eq!(parse(text).map(written).as_deref(), Some(text));
        }
    }
}
