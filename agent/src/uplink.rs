//! How long packets of pods may be: as long as those of the device that leads out.

use ferrule_netlink::{Error, Protocol, Socket, route};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tracing::{info, warn};

/// What every Ethernet carries, and our answer when the node has no default route.
const USUAL: u32 = 1500;

/// MTU of the device with the default route, in bytes; the smaller one where
/// the families use two.
pub(crate) async fn mtu() -> u32 {
    match read().await {
        Ok(Some(mtu)) => {
            info!(mtu, "pods get the MTU of the device with the default route");
            mtu
        }
        Ok(None) => {
            info!(mtu = USUAL, "no default route; pods get the usual MTU");
            USUAL
        }
        Err(error) => {
            warn!(%error, mtu = USUAL, "cannot read the default route; pods get the usual MTU");
            USUAL
        }
    }
}

async fn read() -> Result<Option<u32>, Error> {
    let socket = Socket::open(Protocol::Route)?;
    let mut smallest: Option<u32> = None;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut question = RouteMessage::default();
        question.header.address_family = family;
        let question = route::encode(RouteNetlinkMessage::GetRoute(question));
        for answer in socket.dump(question).await? {
            let RouteNetlinkMessage::NewRoute(found) = route::decode(&answer)? else {
                continue;
            };
            let Some(index) = default_device(&found) else {
                continue;
            };
            let mtu = link_mtu(&socket, index).await?;
            smallest = smallest.into_iter().chain(mtu).min();
        }
    }
    Ok(smallest)
}

/// The device of a default route of the main table.
fn default_device(found: &RouteMessage) -> Option<u32> {
    let header = &found.header;
    if header.destination_prefix_length != 0 || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    found
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

async fn link_mtu(socket: &Socket, index: u32) -> Result<Option<u32>, Error> {
    let mut question = LinkMessage::default();
    question.header.index = index;
    let question = route::encode(RouteNetlinkMessage::GetLink(question));
    let answers = socket.request(question, 0).await?;
    let Some(answer) = answers.first() else {
        return Ok(None);
    };
    let RouteNetlinkMessage::NewLink(link) = route::decode(answer)? else {
        return Ok(None);
    };
    Ok(link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        }))
}
