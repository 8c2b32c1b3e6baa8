//! The verb DEL: a pod's interface goes, and its lease ends.
//!
//! It never enters the pod's namespace, so it does not matter whether that is
//! there: the host's end is found by a name that depends on the attachment
//! alone, and both ends of a veth go together. Nor does it need the agent: a
//! release that it does not take waits on disk.

use ferrule_model::names::Attachment;

use crate::agent;
use crate::config::Config;
use crate::failure::Failure;
use crate::fault::{self, Step};
use crate::kernel::Kernel;
use crate::undo;

/// Removes the interface. Doing it again, or without an ADD before, is fine.
///
/// The lease outlives a link that could not be removed: its address is still
/// in use, and the runtime calls DEL again after an error.
pub(crate) async fn run(config: &Config, attachment: &Attachment) -> Result<(), Failure> {
    let host = Kernel::open()?;
    undo::remove_host_end(&host, attachment).await?;
    fault::reached(Step::LinkRemoved);
    agent::release(config, attachment)?;
    fault::reached(Step::Released);
    Ok(())
}
