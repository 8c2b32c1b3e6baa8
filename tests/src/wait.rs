//! Waiting for a condition, never for a time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::bail;

/// How long a change may take to reach the kernel. The agent promises a second;
/// an emulated machine is ten to twenty times slower than a real one, and a load that a test
/// makes on it leaves the agent a small part of that.
pub const SETTLED: Duration = Duration::from_mins(3);

/// Waits until `look` returns something, and returns it.
///
/// # Errors
/// The first error of `look`, or that the time is over: then with `what`.
pub fn for_some<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() >= end {
            bail!("{what}: not after {limit:?}");
        }
        pause_after(begun);
    }
}

/// A look may be a program's start, which is much on an emulated machine: who waits leaves
/// most of it to what is waited for.
fn pause_after(begun: Instant) {
    let spent = begun.elapsed();
    thread::sleep((2 * spent).clamp(Duration::from_millis(10), Duration::from_secs(1)));
}

/// Waits until `check` succeeds.
///
/// # Errors
/// The last error of `check`, with `what`, when the time is over.
pub fn until_ok<T>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let end = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= end => {
                return Err(error.context(format!("{what}: not after {limit:?}")));
            }
            Err(_) => pause_after(begun),
        }
    }
}
