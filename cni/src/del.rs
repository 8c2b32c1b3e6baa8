//! The verb DEL: a pod's interface goes, and its lease ends.
//!
//! It needs no pod's namespace: the host's end is found by a name that depends
//! on the attachment alone, and both ends of a veth go together. Nor does it
//! need the agent: a release that it does not take waits on disk.

use std::path::Path;

use ferrule_model::names::Attachment;

use crate::agent;
use crate::config::Config;
use crate::failure::Failure;
use crate::fault::{self, Step};
use crate::kernel::Kernel;
use crate::lock::{self, Lock, LockError};
use crate::removal;

/// Removes the interface. Doing it again, or without an ADD before, is fine.
///
/// The lease outlives a link that could not be removed: its address is still
/// in use, and the runtime calls DEL again after an error. `netns` is the pod's
/// namespace, where there is one; it counts only where nothing else proves that
/// a link is ours.
pub(crate) async fn run(
    config: &Config,
    attachment: &Attachment,
    netns: Option<&Path>,
) -> Result<(), Failure> {
    let _lock = locked(config, attachment)?;
    let host = Kernel::open()?;
    removal::remove(&host, attachment, netns).await?;
    fault::reached(Step::LinkRemoved);
    agent::release(config, attachment)?;
    fault::reached(Step::Released);
    Ok(())
}

/// Waits for an ADD that is under way. Where there can be no lock, the pod goes
/// all the same: an ADD, which does not go on without one, can be beside us only
/// if it had taken its own before the file system was full.
fn locked(config: &Config, attachment: &Attachment) -> Result<Option<Lock>, LockError> {
    match lock::take(
        &config.agent_socket,
        attachment,
        fault::patience(lock::PATIENCE),
    ) {
        Ok(lock) => Ok(Some(lock)),
        Err(error @ LockError::Held { .. }) => Err(error),
        Err(LockError::NoAgent { .. }) => Ok(None),
        Err(error @ (LockError::Foreign { .. } | LockError::Unusable { .. })) => {
            eprintln!("ferrule: DEL goes on without a lock: {error}");
            Ok(None)
        }
    }
}
