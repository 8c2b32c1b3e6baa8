//! Memory that is not needed any more goes back to the kernel.
//!
//! An agent runs for years and its work comes in bursts. glibc keeps a heap for
//! each thread that ever allocated, as large as the largest burst it has seen;
//! tasks move between threads, so that in time each has seen the largest.

/// Has all threads share one heap: they allocate little beside waiting.
pub(crate) fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt() takes two numbers; nothing else was allocated by another thread yet, and
    // if it were, its heap would stay in use.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back what is free at the end of the heap and whole pages within it.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim() takes the heap's lock itself and frees nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
