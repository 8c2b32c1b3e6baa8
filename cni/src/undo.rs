//! Takes back what a failed ADD has made.

use ferrule_model::names::Attachment;

use crate::agent::{self, Released};
use crate::config::Config;
use crate::kernel::Kernel;
use crate::removal;

/// What there is to take back. The last made goes first: the address must not
/// be leased to another pod while a route to this one still stands.
#[derive(Debug, Default)]
pub(crate) struct Undo {
    lease: bool,
    link: bool,
}

impl Undo {
    /// The agent holds a lease, or may hold one.
    pub(crate) fn lease(&mut self) {
        self.lease = true;
    }

    /// The veth pair exists.
    pub(crate) fn link(&mut self) {
        self.link = true;
    }

    /// Takes everything back. Returns sentences about what could not be, all
    /// of it harmless after the DEL that the runtime sends next.
    pub(crate) async fn run(
        self,
        config: &Config,
        attachment: &Attachment,
        host: &Kernel,
    ) -> Vec<String> {
        let mut left = Vec::new();
        if self.link
            && let Err(error) = removal::remove(host, attachment, None).await
        {
            left.push(format!("not undone: {error}"));
            // Its address stays leased for as long as it is in use.
            return left;
        }
        if self.lease {
            match agent::release(config, attachment) {
                Ok(Released::ByAgent) => {}
                Ok(Released::Queued(reason)) => {
                    left.push(format!("the release of the lease is queued: {reason}"));
                }
                Err(error) => left.push(format!("not undone: {error}")),
            }
        }
        left
    }
}
