//! How numbers, spans and foreign text become words for people.
//!
//! Names and messages come from objects that anybody with a namespace may
//! write. They reach a terminal, often root's: whatever could move its cursor
//! or change the order of what is read goes through [`plain`] first.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Above this a count of free addresses says nothing more to a person.
const MANY: u64 = 1_000_000;

/// The text with everything written out that a terminal would obey.
pub(crate) fn plain(text: &str) -> Cow<'_, str> {
    if !text.contains(acts_on_a_terminal) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        if acts_on_a_terminal(char) {
            shown.extend(char.escape_default());
        } else {
            shown.push(char);
        }
    }
    Cow::Owned(shown)
}

/// JSON as it may stand on a terminal: `serde_json` escapes the controls of
/// ASCII only, not C1, which holds a CSI of one character.
///
/// The newlines that make JSON pretty stay. All else that is replaced can only
/// stand inside of strings, so the document keeps its meaning.
pub(crate) fn plain_json(json: &str) -> String {
    let mut shown = String::with_capacity(json.len() + 1);
    for char in json.chars() {
        if char != '\n' && acts_on_a_terminal(char) {
            let mut units = [0; 2];
            for unit in char.encode_utf16(&mut units) {
                let _strings_take_all = write!(shown, "\\u{unit:04x}");
            }
        } else {
            shown.push(char);
        }
    }
    shown
}

/// Controls, and the invisible characters that reorder, join or hide text.
fn acts_on_a_terminal(char: char) -> bool {
    char.is_control()
        || matches!(char,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// A span of whole seconds, in its two largest units.
pub(super) fn span(seconds: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let mut left = seconds;
    let mut parts = Vec::new();
    for (length, unit) in UNITS {
        let count = left / length;
        left %= length;
        if count > 0 {
            parts.push(format!("{count} {unit}"));
        } else if !parts.is_empty() {
            // "3 d 5 s" would pretend to a precision that nobody reads.
            break;
        }
        if parts.len() == 2 {
            break;
        }
    }
    if parts.is_empty() {
        "0 s".to_owned()
    } else {
        parts.join(" ")
    }
}

/// A span with fractions: milliseconds below one second.
pub(super) fn short_span(seconds: f64) -> String {
    let millis = seconds * 1000.0;
    if millis < 0.995 {
        format!("{:.2} ms", millis.max(0.0))
    } else if millis < 9.95 {
        format!("{millis:.1} ms")
    } else if seconds < 0.9995 {
        format!("{millis:.0} ms")
    } else if seconds < 9.95 {
        format!("{seconds:.1} s")
    } else {
        span(
            std::time::Duration::try_from_secs_f64(seconds.round())
                .map_or(u64::MAX, |s| s.as_secs()),
        )
    }
}

/// How long ago something was; clocks that went back make it now.
pub(super) fn ago(now: u64, then: u64) -> String {
    match now.saturating_sub(then) {
        0 => "just now".to_owned(),
        seconds => format!("{} ago", span(seconds)),
    }
}

/// A count and its noun, which gets an s unless there is one.
pub(super) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// A count of addresses; an IPv6 range has more than anybody reads.
pub(super) fn addresses(number: u64) -> String {
    if number > MANY {
        "over a million".to_owned()
    } else {
        number.to_string()
    }
}

/// A rate or amount with three digits that count and a decimal prefix: `12.3 k`.
///
/// `unit` stands right behind the prefix; without one there is no blank either.
pub(super) fn amount(number: f64, unit: &str) -> String {
    const PREFIXES: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
    let mut value = number;
    let mut prefix = "";
    for next in PREFIXES {
        // What would be rounded to 1000 takes the next prefix already.
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = next;
    }
    // An amount without fractions shows none: three bytes are not 3.00 bytes.
    let digits = if prefix.is_empty() && value.fract() == 0.0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    let space = if prefix.is_empty() && unit.is_empty() {
        ""
    } else {
        " "
    };
    format!("{value:.digits$}{space}{prefix}{unit}")
}

/// The words of a key in camelCase: `refusedTcp` is "refused TCP".
pub(super) fn key(key: &str) -> String {
    const ACRONYMS: [&str; 6] = ["icmp", "ip", "ipvs", "tcp", "udp", "vip"];
    let mut words: Vec<String> = vec![String::new()];
    for char in key.chars() {
        if char.is_uppercase() {
            words.push(String::new());
        }
        if let Some(word) = words.last_mut() {
            word.extend(char.to_lowercase());
        }
    }
    words.retain(|word| !word.is_empty());
    for word in &mut words {
        if ACRONYMS.contains(&word.as_str()) {
            word.make_ascii_uppercase();
        }
    }
    plain(&words.join(" ")).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        let cases = [
            ("default/web", "default/web"),
            ("größer → 日本", "größer → 日本"),
            (
                "\u{1b}[2J\u{1b}]0;pwned\u{7}",
                "\\u{1b}[2J\\u{1b}]0;pwned\\u{7}",
            ),
            ("one\r\ntwo\t", "one\\r\\ntwo\\t"),
            ("\u{9b}31m\u{7f}", "\\u{9b}31m\\u{7f}"),
            ("a\u{202e}b\u{200b}", "a\\u{202e}b\\u{200b}"),
            ("\u{e0041}", "\\u{e0041}"),
        ];
        for (text, shown) in cases {
            assert_eq!(plain(text), shown);
        }
    }

    #[test]
    fn json_keeps_its_meaning_when_it_is_made_plain() {
        let text = "\u{1b}[2J \u{9b}31m \u{7f} \u{202e} \u{e0041} 日本";
        let json = serde_json::to_string_pretty(&[text]).unwrap();
        let shown = plain_json(&json);
        assert!(!shown.contains(|char| char != '\n' && acts_on_a_terminal(char)));
        assert_eq!(serde_json::from_str::<[String; 1]>(&shown).unwrap(), [text]);
        assert_eq!(shown.lines().count(), 3);
    }

    #[test]
    fn spans_have_two_units() {
        let cases = [
            (0, "0 s"),
            (59, "59 s"),
            (60, "1 min"),
            (61, "1 min 1 s"),
            (3_605, "1 h"),
            (273_600, "3 d 4 h"),
            (86_400, "1 d"),
            (u64::MAX, "213503982334601 d 7 h"),
        ];
        for (seconds, words) in cases {
            assert_eq!(span(seconds), words);
        }
        let cases = [
            (0.0, "0.00 ms"),
            (-1.0, "0.00 ms"),
            (0.000_42, "0.42 ms"),
            (0.003_4, "3.4 ms"),
            (0.012, "12 ms"),
            (0.999_9, "1.0 s"),
            (1.25, "1.2 s"),
            (38.4, "38 s"),
            (f64::MAX, "213503982334601 d 7 h"),
        ];
        for (seconds, words) in cases {
            assert_eq!(short_span(seconds), words);
        }
        assert_eq!(ago(100, 88), "12 s ago");
        assert_eq!(ago(100, 100), "just now");
        assert_eq!(ago(100, 200), "just now");
    }

    #[test]
    fn amounts_have_three_digits_that_count() {
        let cases = [
            (0.0, "0"),
            (3.0, "3"),
            (0.5, "0.50"),
            (12.34, "12.3"),
            (999.4, "999"),
            (999.6, "1.00 k"),
            (1_234.0, "1.23 k"),
            (999_999.0, "1.00 M"),
            (18_446_744_073_709_551_615.0, "18.4 E"),
        ];
        for (number, words) in cases {
            assert_eq!(amount(number, ""), words);
        }
        assert_eq!(amount(0.0, "B"), "0 B");
        assert_eq!(amount(1_500_000.0, "B"), "1.50 MB");
    }

    #[test]
    fn keys_are_words() {
        let cases = [
            ("refusedTcp", "refused TCP"),
            ("viaVip", "via VIP"),
            ("all", "all"),
            ("Odd", "odd"),
            ("", ""),
            ("a\u{1b}[2J", "a\\u{1b}[2 j"),
        ];
        for (camel, words) in cases {
            assert_eq!(key(camel), words);
        }
    }
}
