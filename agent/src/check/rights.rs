//! Who we are, and what we may do.

use std::fs;

use super::{Finding, Outcome};

const CHECK: &str = "rights";

/// Numbers of capabilities (linux/capability.h).
const NET_ADMIN: u32 = 12;
const SYS_MODULE: u32 = 16;

/// Where the kernel tells about the process that asks.
const STATUS: &str = "/proc/self/status";

/// Whether we may change the network at all.
pub(super) fn check() -> Finding {
    match fs::read_to_string(STATUS) {
        Ok(text) => judge(&text),
        Err(error) => Finding::new(
            CHECK,
            Outcome::Failed,
            format!("{STATUS} cannot be read: {error}"),
            "mount /proc where the agent runs",
        ),
    }
}

/// Whether we may load kernel modules.
pub(super) fn may_load_modules() -> bool {
    let text = fs::read_to_string(STATUS).unwrap_or_default();
    effective(&text).is_some_and(|set| has(set, SYS_MODULE))
}

fn judge(text: &str) -> Finding {
    let uid = field(text, "Uid:").and_then(|ids| ids.split_whitespace().nth(1));
    let who = format!("user {}", uid.unwrap_or("unknown"));
    match effective(text) {
        Some(set) if has(set, NET_ADMIN) => {
            let modules = if has(set, SYS_MODULE) {
                " and CAP_SYS_MODULE"
            } else {
                ""
            };
            Finding::ok(CHECK, format!("{who} with CAP_NET_ADMIN{modules}"))
        }
        _ => Finding::new(
            CHECK,
            Outcome::Failed,
            format!(
                "this process ({who}) lacks CAP_NET_ADMIN, without which neither services nor \
                 routes can be programmed"
            ),
            "run ferrule-agent as root, or give it CAP_NET_ADMIN",
        ),
    }
}

/// The effective set.
fn effective(text: &str) -> Option<u64> {
    u64::from_str_radix(field(text, "CapEff:")?, 16).ok()
}

fn has(set: u64, capability: u32) -> bool {
    set & (1 << capability) != 0
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = text.lines();
    lines
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(uid: u32, set: u64) -> String {
        format!("Name:\tx\nUid:\t0\t{uid}\t0\t0\nCapInh:\t0\nCapEff:\t{set:016x}\n")
    }

    #[test]
    fn without_the_capability_it_is_told_who_lacks_it() {
        let all = judge(&status(0, u64::MAX));
        assert_eq!(all.result, Outcome::Ok);
        assert!(all.found.contains("CAP_SYS_MODULE"), "{all:?}");
        let some = judge(&status(7, 1 << NET_ADMIN));
        assert_eq!(some, Finding::ok(CHECK, "user 7 with CAP_NET_ADMIN"));
        for text in [
            status(1000, !(1 << NET_ADMIN)),
            status(1000, 0),
            String::new(),
        ] {
            let none = judge(&text);
            assert_eq!(none.result, Outcome::Failed, "{text}");
            assert!(
                none.sentence().contains("run ferrule-agent as root"),
                "{none:?}"
            );
        }
        assert!(judge(&status(1000, 0)).found.contains("user 1000"));
    }
}
