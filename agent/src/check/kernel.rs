//! The kernel's version.

use std::fs;

use super::{Finding, Outcome};

const CHECK: &str = "kernel version";

/// The oldest kernel that Ferrule is written for.
const OLDEST: (u32, u32) = (5, 15);

/// The release of the running kernel, such as `6.1.0-18-amd64`.
fn release() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

/// Whether it is one that Ferrule is written for.
pub(super) fn version() -> Finding {
    judge(&release())
}

fn judge(release: &str) -> Finding {
    let (major, minor) = OLDEST;
    match parse(release) {
        Some(version) if version >= OLDEST => Finding::ok(CHECK, format!("Linux {release}")),
        Some(_) => Finding::new(
            CHECK,
            Outcome::Warning,
            format!(
                "Linux {release} is older than {major}.{minor}, the oldest that Ferrule is tested \
                 for: pods should work, but the kernel may refuse parts of services and of the \
                 guard, which `ferrule-agent status` names then"
            ),
            format!("boot a kernel of {major}.{minor} or newer"),
        ),
        None => Finding::new(
            CHECK,
            Outcome::Warning,
            format!("the kernel's release {release:?} is no version that can be compared"),
            format!("see to it that it is {major}.{minor} or newer"),
        ),
    }
}

/// Major and minor number; whatever distributions write behind them does not count.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.splitn(3, '.');
    let major = parts.next()?.parse().ok()?;
    let digits = |text: &str| {
        text.find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len())
    };
    let minor = parts.next()?;
    let minor = minor.get(..digits(minor))?.parse().ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for release in ["5.15.0", "5.15", "6.1.0-18-amd64", "6.12-rc3", "10.0.1"] {
            assert_eq!(judge(release).result, Outcome::Ok, "{release}");
        }
        for release in ["5.14.21-150500", "5.4.0-generic", "4.19", "3.99.1", "5.9+"] {
            let finding = judge(release);
            assert_eq!(finding.result, Outcome::Warning, "{release}");
            assert!(finding.found.contains(release) && finding.found.contains("5.15"));
        }
        for release in ["", "six", "6", "6.x"] {
            assert_eq!(judge(release).result, Outcome::Warning, "{release}");
        }
    }
}
