//! What the tests in the real kernel share.

use std::future::Future;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs a test in a network namespace of its own.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: only this thread's network namespace changes; no file descriptors are unshared.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("root");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
    thread.join().unwrap();
}
