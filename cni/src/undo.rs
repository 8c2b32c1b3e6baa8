//! Takes back what a failed ADD has made.

use ferrule_model::names::Attachment;
use ferrule_model::ownership;

use crate::agent::{self, Released};
use crate::config::Config;
use crate::kernel::Kernel;

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
            && let Err(error) = remove_host_end(host, attachment).await
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

/// Removes the host's end of an attachment's veth, and with it the pod's end
/// and every route and neighbour entry over them; and the device that shapes
/// what comes from the pod. A link that is not provably ours stays; that there
/// is none is fine.
pub(crate) async fn remove_host_end(
    host: &Kernel,
    attachment: &Attachment,
) -> Result<(), crate::kernel::KernelError> {
    let veth = ownership::host_veth_name(attachment);
    let shaper = ownership::shaper_name(attachment);
    let [veth, shaper] = host.links([veth.as_str(), shaper.as_str()]).await?;
    // In this order: packets are redirected to the shaper until the veth is gone.
    let ours: Vec<_> = veth
        .filter(|link| link.is_host_end_of(attachment))
        .into_iter()
        .chain(shaper.filter(|link| link.is_shaper_of(attachment)))
        .collect();
    host.delete(&ours).await
}
