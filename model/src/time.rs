//! When an object was made.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};

/// A moment, as RFC 3339 writes it. The API server writes UTC and whole seconds;
/// people may write other zones and parts of a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Since 1970 in UTC.
    seconds: i64,
    nanoseconds: u32,
}

impl Timestamp {
    /// `None` for what is no moment.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut rest = text;
        let year = number(&mut rest, 4, 0..=9999)?;
        let month = after(&mut rest, '-', 1..=12)?;
        let day = after(&mut rest, '-', 1..=days_of(year, month))?;
        let hour = after(&mut rest, 'T', 0..=23)?;
        let minute = after(&mut rest, ':', 0..=59)?;
        let second = after(&mut rest, ':', 0..=59)?;
        let nanoseconds = fraction(&mut rest)?;
        let east = offset(rest)?;
        let days = days_before(year, month) + day - 1;
        Some(Self {
            seconds: ((days * 24 + hour) * 60 + minute - east) * 60 + second,
            nanoseconds,
        })
    }
}

/// Takes that many digits off the beginning.
fn number(rest: &mut &str, digits: usize, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
    let (number, behind) = rest.split_at_checked(digits)?;
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    *rest = behind;
    number.parse().ok().filter(|number| range.contains(number))
}

/// Takes two digits behind a mark.
fn after(rest: &mut &str, mark: char, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
    *rest = rest.strip_prefix(mark)?;
    number(rest, 2, range)
}

/// Takes a part of a second; what is less than a nanosecond does not count.
fn fraction(rest: &mut &str) -> Option<u32> {
    let Some(behind) = rest.strip_prefix('.') else {
        return Some(0);
    };
    let end = behind.find(|c: char| !c.is_ascii_digit())?;
    let (digits, behind) = behind.split_at_checked(end)?;
    *rest = behind;
    let digits = digits.get(..9).unwrap_or(digits);
    format!("{digits:0<9}")
        .parse()
        .ok()
        .filter(|_| !digits.is_empty())
}

/// Minutes east of UTC.
fn offset(text: &str) -> Option<i64> {
    if text == "Z" {
        return Some(0);
    }
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+')?),
    };
    let hours = number(&mut rest, 2, 0..=23)?;
    let minutes = after(&mut rest, ':', 0..=59)?;
    rest.is_empty().then_some(sign * (hours * 60 + minutes))
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970 to the first of a month.
fn days_before(year: i64, month: i64) -> i64 {
    let leap_days = |year: i64| {
        (year - 1).div_euclid(4) - (year - 1).div_euclid(100) + (year - 1).div_euclid(400)
    };
    let of_years = (year - 1970) * 365 + leap_days(year) - leap_days(1970);
    of_years + (1..month).map(|month| days_of(year, month)).sum::<i64>()
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Moment)
    }
}

struct Moment;

impl Visitor<'_> for Moment {
    type Value = Timestamp;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a time such as \"2026-01-31T09:30:00Z\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
        Timestamp::parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_compared_wherever_they_were_written() {
        let at = |text: &str| Timestamp::parse(text).unwrap();
        assert_eq!(at("1970-01-01T00:00:00Z").seconds, 0);
        assert_eq!(at("2000-02-29T12:00:00Z").seconds, 951_825_600);
        assert_eq!(at("2026-11-24T03:39:51Z").seconds, 1_795_491_591);
        assert_eq!(at("1969-12-31T23:59:59Z").seconds, -1);
        assert_eq!(at("2026-01-01T02:00:00+02:00"), at("2026-01-01T00:00:00Z"));
        assert_eq!(at("2025-12-31T18:30:00-05:30"), at("2026-01-01T00:00:00Z"));
        assert!(at("2026-01-01T02:00:00+02:00") < at("2026-01-01T01:00:00Z"));
        assert!(at("2026-01-01T00:00:00.5Z") > at("2026-01-01T00:00:00.49Z"));
        assert!(at("2026-01-01T00:00:00.1234567891Z") > at("2026-01-01T00:00:00Z"));
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        for text in [
            "",
            "garbage",
            "2026-01-01",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00.5",
            "2026-01-01 00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00+2:00",
            "2026-01-01T00:00:00+02:00Z",
            "+026-01-01T00:00:00Z",
            "2026-01-01T00:00:00Z ",
            "äöü6-01-01T00:00:00Z",
        ] {
            assert_eq!(Timestamp::parse(text), None, "{text}");
        }
    }
}
