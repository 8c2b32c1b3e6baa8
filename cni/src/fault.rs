//! Named points at which a test can kill the plugin, and a shorter patience for it.
//!
//! Without the cargo feature `fault-injection` nothing of this is compiled in.

use std::time::Duration;

/// Where a verb has just got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// ADD: everything was checked, nothing made.
    Validated,
    /// ADD: the agent has leased the addresses.
    Leased,
    /// ADD: the veth pair exists, both ends down and bare.
    LinkMade,
    /// ADD: the pod's side is complete.
    PodConfigured,
    /// ADD: the host's side is complete.
    HostConfigured,
    /// ADD: the device that shapes what comes from the pod is there, if there
    /// has to be one.
    ShaperMade,
    /// ADD: only the result is missing.
    BeforeResult,
    /// DEL: the link is gone, the lease is not.
    LinkRemoved,
    /// DEL: the agent has ended the lease, or it is queued.
    Released,
}

/// Every step, with its verb and name.
#[cfg(feature = "fault-injection")]
const STEPS: [(&str, &str, Step); 9] = [
    ("ADD", "validated", Step::Validated),
    ("ADD", "leased", Step::Leased),
    ("ADD", "link-made", Step::LinkMade),
    ("ADD", "pod-configured", Step::PodConfigured),
    ("ADD", "host-configured", Step::HostConfigured),
    ("ADD", "shaper-made", Step::ShaperMade),
    ("ADD", "before-result", Step::BeforeResult),
    ("DEL", "link-removed", Step::LinkRemoved),
    ("DEL", "released", Step::Released),
];

/// Dies here, as if by `kill -9`, when `FERRULE_FAULT_STEP` names the step.
#[cfg(feature = "fault-injection")]
pub(crate) fn reached(step: Step) {
    let Ok(wanted) = std::env::var("FERRULE_FAULT_STEP") else {
        return;
    };
    if STEPS
        .iter()
        .any(|(_, name, listed)| *listed == step && *name == wanted)
    {
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// How long to wait for another: `FERRULE_FAULT_PATIENCE` milliseconds, if a test says so.
#[cfg(feature = "fault-injection")]
pub(crate) fn patience(otherwise: Duration) -> Duration {
    let given = std::env::var("FERRULE_FAULT_PATIENCE").ok();
    let milliseconds = given.and_then(|given| given.parse().ok());
    milliseconds.map_or(otherwise, Duration::from_millis)
}

/// A release waits for as long as it should.
#[cfg(not(feature = "fault-injection"))]
pub(crate) fn patience(otherwise: Duration) -> Duration {
    otherwise
}

/// Does nothing in a release.
#[cfg(not(feature = "fault-injection"))]
pub(crate) fn reached(_: Step) {}

/// `VERB step` a line, for `ferrule --fault-steps`.
#[cfg(feature = "fault-injection")]
pub(crate) fn listing() -> String {
    STEPS.iter().fold(String::new(), |all, (verb, name, _)| {
        all + verb + " " + name + "\n"
    })
}
