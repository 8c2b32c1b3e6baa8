//! Takes an attachment's devices off the node, if they are provably ours.
//!
//! A veth that has our name and the MAC that we gave it, but an alias that
//! somebody has changed, is neither removed nor forgotten: it may be a live
//! pod's, and its address must not be leased to another. Whoever names the pod's
//! namespace can still prove it, by the interface at the other end.

use std::path::Path;

use ferrule_model::names::Attachment;
use ferrule_model::ownership;

use crate::failure::{Code, Failure};
use crate::kernel::{Kernel, KernelError, Link};
use crate::netns::Netns;

/// Why a device may still be there. The lease has to stay with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RemovalError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "interface {name} of the node is like that of {attachment}, but its alias is {found:?} instead of {expected:?}: it stays, and so does the lease; give it that alias again with `ip link set dev {name} alias ...`, or remove it with `ip link del {name}`"
    )]
    Altered {
        attachment: Box<Attachment>,
        name: String,
        found: String,
        expected: String,
    },
}

impl From<RemovalError> for Failure {
    fn from(error: RemovalError) -> Self {
        match error {
            RemovalError::Kernel(error) => error.into(),
            // Somebody has to look at it, and it goes with the pod's namespace.
            RemovalError::Altered { .. } => Self::new(Code::TryAgainLater, error.to_string()),
        }
    }
}

impl RemovalError {
    /// About a veth that is ours but for its alias.
    pub(crate) fn altered(attachment: &Attachment, link: &Link) -> Self {
        Self::Altered {
            attachment: Box::new(attachment.clone()),
            name: link.name.clone(),
            found: link.alias().to_owned(),
            expected: ownership::device_alias(attachment, None),
        }
    }
}

/// Removes the host's end of an attachment's veth, and with it the pod's end
/// and every route and neighbour entry over them; and the device that shapes
/// what comes from the pod. A stranger's link stays; that there is none is fine.
///
/// `netns` is the pod's namespace, where the runtime names one.
pub(crate) async fn remove(
    host: &Kernel,
    attachment: &Attachment,
    netns: Option<&Path>,
) -> Result<(), RemovalError> {
    let veth = ownership::host_veth_name(attachment);
    let shaper = ownership::shaper_name(attachment);
    let [veth, shaper] = host.links([veth.as_str(), shaper.as_str()]).await?;
    let veth = match veth {
        Some(link) if link.is_host_end_of(attachment) => Some(link),
        Some(link) if leads_into(&link, attachment, netns).await => Some(link),
        Some(link) if link.is_altered_end_of(attachment) => {
            return Err(RemovalError::altered(attachment, &link));
        }
        Some(_) | None => None,
    };
    // In this order: packets are redirected to the shaper until the veth is gone.
    let ours: Vec<_> = veth
        .into_iter()
        .chain(shaper.filter(|link| link.is_shaper_of(attachment)))
        .collect();
    Ok(host.delete(&ours).await?)
}

/// Whether the other end of a veth with our name is the very interface that the
/// runtime wants removed. What cannot be looked at proves nothing.
async fn leads_into(link: &Link, attachment: &Attachment, netns: Option<&Path>) -> bool {
    let Some(Ok(netns)) = netns.map(Netns::open) else {
        return false;
    };
    let Ok(Ok(pod)) = netns.inside(Kernel::open) else {
        return false;
    };
    let end = pod.link(attachment.interface.as_str()).await;
    matches!(end, Ok(Some(end)) if link.is_peer_of(&end))
}
