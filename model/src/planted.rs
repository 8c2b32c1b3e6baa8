//! Bugs for the fuzz targets to find: a target that overlooks its own shows nothing.
//!
//! They stand in the parsers themselves, behind the cargo feature `fuzzing`, and
//! sleep until a target's proof wakes them. No release has any of this.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static AWAKE: AtomicBool = AtomicBool::new(false);

/// Keeps the compiler from making one branch of the steps.
static REACHED: AtomicUsize = AtomicUsize::new(0);

/// From now on planted bugs are bugs.
pub fn wake() {
    AWAKE.store(true, Ordering::Relaxed);
}

/// Where a planted bug stands. It is reached in three steps, each a branch of its
/// own: guided by coverage they are found one after the other, by chance alone
/// hardly ever all at once.
///
/// # Panics
/// Where every step holds and bugs are awake; that is what they are for.
pub fn bug(target: &str, [first, second, third]: [bool; 3]) {
    if !AWAKE.load(Ordering::Relaxed) || !first {
        return;
    }
    REACHED.store(1, Ordering::Relaxed);
    if !second {
        return;
    }
    REACHED.store(2, Ordering::Relaxed);
    assert!(!third, "planted bug of {target}");
}
