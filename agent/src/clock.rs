//! Time that goes on while the machine sleeps, and what it counts from.

use std::fs;
use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Where the kernel tells which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A point in time of one boot of the machine. No clock that is set can move it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// The kernel's ID of the boot; empty where it does not tell.
    pub(crate) boot: String,
    /// Seconds since then, of `CLOCK_BOOTTIME`.
    pub(crate) seconds: u64,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let boot = fs::read_to_string(Path::new(BOOT_ID)).unwrap_or_default();
        let time = clock_gettime(ClockId::Boottime);
        Self {
            boot: boot.trim().to_owned(),
            seconds: u64::try_from(time.tv_sec).unwrap_or(0),
        }
    }

    /// Seconds from `earlier` to this one; `None` when the machine was booted in between.
    pub(crate) fn since(&self, earlier: &Self) -> Option<u64> {
        (self.boot == earlier.boot).then(|| self.seconds.saturating_sub(earlier.seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_passes_within_a_boot() {
        let first = Moment::now();
        assert_eq!(first.boot.len(), 36, "{first:?}");
        let second = Moment::now();
        assert!(second.since(&first).is_some_and(|seconds| seconds < 60));
        let other = Moment {
            boot: "another".to_owned(),
            ..first.clone()
        };
        assert_eq!(second.since(&other), None);
    }
}
