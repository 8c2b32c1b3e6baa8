//! Shapes a pod's traffic: makes what [`crate::tc`] describes, and compares.
//!
//! The ifb device is found by a name that depends on the attachment alone, so
//! that a DEL removes it as it removes the veth, see [`crate::undo`]. Qdiscs and
//! filters go with the devices they are on.

use ferrule_model::names::{Attachment, IfName, NetworkName};
use ferrule_model::ownership;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use crate::bandwidth::{Bandwidth, Limit};
use crate::failure::{Code, Failure};
use crate::kernel::{Kernel, KernelError, Link};
use crate::pair::{self, Mac, Order};
use crate::{sysctl, tc};

const MAKE: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;

/// Traffic that could not be shaped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShapeError {
    #[error(
        "{source}: this kernel lacks it; install the distribution's full kernel (a cloud or minimal one leaves modules out), or remove the pod's limits of bandwidth"
    )]
    Missing { source: KernelError },
    #[error(
        "interface {name} was removed while ADD was at work: see what else manages interfaces on this node"
    )]
    Vanished { name: IfName },
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

impl From<ShapeError> for Failure {
    fn from(error: ShapeError) -> Self {
        match error {
            ShapeError::Missing { .. } | ShapeError::Vanished { .. } => {
                Self::new(Code::Io, error.to_string())
            }
            ShapeError::Kernel(error) => error.into(),
        }
    }
}

/// A kind that the kernel does not know. It has looked for a module by then.
fn judge(source: KernelError) -> ShapeError {
    if source.is_unknown_kind() {
        ShapeError::Missing { source }
    } else {
        ShapeError::Kernel(source)
    }
}

/// One pod's shaping.
#[derive(Clone, Debug)]
pub(crate) struct Shaper {
    /// Name of the ifb device.
    name: IfName,
    alias: String,
    mac: Mac,
    mtu: u32,
    limits: Bandwidth,
}

impl Shaper {
    pub(crate) fn new(
        attachment: &Attachment,
        network: Option<&NetworkName>,
        mtu: u32,
        limits: Bandwidth,
    ) -> Self {
        Self {
            name: ownership::shaper_name(attachment),
            alias: ownership::device_alias(attachment, network),
            mac: Mac(ownership::shaper_mac(attachment)),
            mtu,
            limits,
        }
    }

    /// The ifb device, down. As with the veth, the alias has to come later and
    /// the MAC is the proof until then. It is not part of the same batch: that
    /// goes on after a failure, and would put our name on another's device.
    fn create(&self) -> Order {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(self.name.to_string()),
            LinkAttribute::Mtu(self.mtu),
            LinkAttribute::Address(self.mac.0.to_vec()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
        ];
        Order {
            what: format!("make {} (kernel module ifb)", self.name),
            message: RouteNetlinkMessage::NewLink(link),
            flags: MAKE,
        }
    }

    /// The shaping of a host's end, with its ifb device if there is one.
    fn shape(&self, host: u32, shaper: Option<u32>) -> Vec<Order> {
        let make = |what: String, message| Order {
            what,
            message,
            flags: MAKE,
        };
        let mut orders = Vec::new();
        if let Some(limit) = self.limits.to_pod {
            let what = "shape what goes to the pod (kernel module sch_tbf)".to_owned();
            orders.push(make(what, tc::add_tbf(host, limit)));
        }
        if let (Some(limit), Some(shaper)) = (self.limits.from_pod, shaper) {
            // The redirection last: until then packets go their straight way.
            let mut first = pair::up(self.name.as_str(), shaper);
            if let RouteNetlinkMessage::SetLink(link) = &mut first.message {
                link.attributes = vec![LinkAttribute::IfAlias(self.alias.clone())];
            }
            orders.push(first);
            let what = "shape what comes from the pod (kernel module sch_tbf)".to_owned();
            orders.push(make(what, tc::add_tbf(shaper, limit)));
            let what = "filter what comes from the pod (kernel module sch_ingress)".to_owned();
            orders.push(make(what, tc::add_ingress(host)));
            let what = format!(
                "redirect what comes from the pod to {} (kernel modules cls_u32 and act_mirred)",
                self.name
            );
            orders.push(make(what, tc::add_redirect(host, shaper)));
        }
        orders
    }

    /// Makes the ifb device, if there has to be one, after removing one of an
    /// earlier life of the attachment.
    pub(crate) async fn make(
        &self,
        host: &Kernel,
        attachment: &Attachment,
    ) -> Result<(), ShapeError> {
        if self.limits.from_pod.is_none() {
            return Ok(());
        }
        let create = || host.carry_out(vec![self.create()]);
        match create().await {
            Err(error) if error.already_exists() => {
                let old = host.link(self.name.as_str()).await?;
                match old {
                    Some(link) if link.is_shaper_of(attachment) => host.delete(&[link]).await?,
                    Some(_) | None => return Err(error.into()),
                }
                create().await.map_err(judge)
            }
            other => other.map_err(judge),
        }
    }

    /// Shapes what passes the host's end `link`.
    pub(crate) async fn apply(&self, host: &Kernel, link: &Link) -> Result<(), Failure> {
        let mut shaper = None;
        if self.limits.from_pod.is_some() {
            // It carries frames, not addresses of its own.
            sysctl::apply(&self.name, &[sysctl::IPV6_OFF])?;
            let found = host.link(self.name.as_str()).await?;
            let name = || self.name.clone();
            let found = found.ok_or_else(|| ShapeError::Vanished { name: name() })?;
            shaper = Some(found.index);
        }
        let orders = self.shape(link.index, shaper);
        if orders.is_empty() {
            return Ok(());
        }
        Ok(host.carry_out(orders).await.map_err(judge)?)
    }

    /// Says what is not as it was made. The host's end is there.
    pub(crate) async fn check(
        &self,
        host: &Kernel,
        attachment: &Attachment,
        link: &Link,
        differences: &mut Vec<String>,
    ) -> Result<(), KernelError> {
        if let Some(limit) = self.limits.to_pod {
            check_tbf(host, link, limit, "to", differences).await?;
        }
        let Some(limit) = self.limits.from_pod else {
            return Ok(());
        };
        let found = host.link(self.name.as_str()).await?;
        let Some(shaper) = found.filter(|link| link.is_shaper_of(attachment)) else {
            differences.push(format!("interface {} of the node is missing", self.name));
            return Ok(());
        };
        if !shaper.up {
            differences.push(format!("interface {} is down", self.name));
        }
        check_tbf(host, &shaper, limit, "from", differences).await?;
        if !host.redirects(link.index).await?.contains(&shaper.index) {
            differences.push(format!(
                "what comes from the pod is not redirected from {} to {}",
                link.name, self.name
            ));
        }
        Ok(())
    }
}

async fn check_tbf(
    host: &Kernel,
    link: &Link,
    limit: Limit,
    way: &str,
    differences: &mut Vec<String>,
) -> Result<(), KernelError> {
    match host.tbf_rate(link.index).await? {
        Some(rate) if rate == limit.rate => {}
        Some(rate) => differences.push(format!(
            "traffic {way} the pod is limited to {} instead of {} bits a second on {}",
            rate.saturating_mul(8),
            limit.rate * 8,
            link.name
        )),
        None => differences.push(format!(
            "traffic {way} the pod is not limited on {}",
            link.name
        )),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ferrule_model::names::ContainerId;

    use super::*;

    fn shaper(to_pod: bool, from_pod: bool) -> Shaper {
        let attachment = Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        };
        let limit = Limit {
            rate: 1_000_000,
            burst: 200_000,
        };
        let limits = Bandwidth {
            to_pod: to_pod.then_some(limit),
            from_pod: from_pod.then_some(limit),
        };
        Shaper::new(&attachment, None, 1450, limits)
    }

    fn said(shaper: &Shaper) -> Vec<String> {
        let orders = shaper.shape(3, Some(4)).into_iter();
        orders.map(|order| order.what).collect()
    }

    #[test]
    fn the_redirection_comes_last() {
        let said = said(&shaper(true, true));
        let first: Vec<_> = said.iter().map(|what| &what[..20]).collect();
        assert_eq!(
            first,
            [
                "shape what goes to t",
                "set febhk7thubfn6br ",
                "shape what comes fro",
                "filter what comes fr",
                "redirect what comes ",
            ]
        );
    }

    #[test]
    fn each_direction_has_what_it_needs_and_no_more() {
        assert_eq!(said(&shaper(false, false)).len(), 0);
        assert_eq!(said(&shaper(true, false)).len(), 1);
        assert_eq!(said(&shaper(false, true)).len(), 4);
    }

    #[test]
    fn the_device_carries_its_proof_from_the_start_and_its_owner_later() {
        let shaper = shaper(false, true);
        let order = shaper.create();
        let RouteNetlinkMessage::NewLink(link) = &order.message else {
            panic!("{order:?}");
        };
        let mac = LinkAttribute::Address(shaper.mac.0.to_vec());
        assert!(link.attributes.contains(&mac));
        assert_eq!(order.flags & NLM_F_EXCL, NLM_F_EXCL);
        let orders = shaper.shape(3, Some(4));
        let RouteNetlinkMessage::SetLink(link) = &orders[0].message else {
            panic!("{orders:?}");
        };
        assert_eq!(link.header.index, 4);
        let alias = LinkAttribute::IfAlias("ferrule abc eth0".to_owned());
        assert_eq!(link.attributes, [alias]);
    }

    #[test]
    fn a_missing_module_is_named_with_a_remedy() {
        let orders = shaper(true, true).shape(3, Some(4));
        let modules = ["sch_tbf", "", "sch_tbf", "sch_ingress", "cls_u32"];
        for (order, module) in orders.into_iter().zip(modules) {
            let failed = KernelError::Order {
                what: order.what,
                source: ferrule_netlink::Error::Refused {
                    errno: rustix::io::Errno::NOENT,
                    reason: None,
                },
            };
            let failure = Failure::from(judge(failed));
            assert_eq!(failure.code(), Code::Io);
            let said = failure.to_string();
            assert!(said.contains(module), "{said}");
            assert!(said.contains("install the distribution's"), "{said}");
        }
    }
}
