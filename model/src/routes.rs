//! Routes to the pods of other nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::cluster::ClusterState;
use crate::condition::{Condition, Reason};
use crate::kube::{AddressKind, Kind};
use crate::network::{cluster_object, object_addresses, pod_ranges};

/// A route to the pods of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeRoute {
    /// The range of the other node's pods; no bits are set behind the prefix.
    pub destination: IpNetwork,
    /// The other node.
    pub gateway: IpAddr,
}

impl std::fmt::Display for NodeRoute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} via {}", self.destination, self.gateway)
    }
}

/// The routes that `node` needs, by destination, to Nodes whose InternalIP lies
/// in one of `links`, the networks that are on a link of this machine.
///
/// The conditions name the Nodes to which there is no such route.
#[must_use]
pub fn plan(
    cluster: &ClusterState,
    node: &str,
    links: &BTreeSet<IpNetwork>,
) -> (BTreeMap<IpNetwork, NodeRoute>, Vec<Condition>) {
    let mut routes: BTreeMap<IpNetwork, NodeRoute> = BTreeMap::new();
    let mut conditions = Vec::new();
    let mut taken: BTreeMap<IpNetwork, &str> = BTreeMap::new();
    // Told elsewhere: these are conditions of the Node, not of the way to it.
    let mut about_ranges = Vec::new();
    if let Some(object) = cluster.node(node) {
        for range in pod_ranges(node, object, &mut about_ranges) {
            taken.insert(range, node);
        }
    }
    for (name, object) in cluster.nodes().filter(|(name, _)| *name != node) {
        let internal = object_addresses(Some(object), AddressKind::InternalIP);
        for destination in pod_ranges(name, object, &mut about_ranges) {
            let mut say = |reason, message| {
                conditions.push(Condition {
                    object: cluster_object(Kind::Node, name),
                    reason,
                    message,
                });
            };
            let overlapping = taken.iter().find(|(range, _)| {
                range.contains(destination.network()) || destination.contains(range.network())
            });
            if let Some((range, holder)) = overlapping {
                say(
                    Reason::AddressConflict,
                    format!(
                        "spec.podCIDRs: {destination} overlaps {range} of Node {holder}, which comes \
                         first; no route is made to it, give each Node a range of its own"
                    ),
                );
                continue;
            }
            taken.insert(destination, name);
            let family = Family::of(destination.ip());
            let gateway = internal
                .iter()
                .copied()
                .filter(|ip| Family::of(*ip) == family)
                .find(|ip| links.iter().any(|link| link.contains(*ip)));
            match gateway {
                Some(gateway) => {
                    let route = NodeRoute {
                        destination,
                        gateway,
                    };
                    routes.insert(destination, route);
                }
                None => say(
                    Reason::NoSharedLink,
                    format!(
                        "status.addresses: no {family} InternalIP shares a link with this node; no \
                         route is made to its pods in {destination}, your network has to lead there"
                    ),
                ),
            }
        }
    }
    (routes, conditions)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::cluster::Event;
    use crate::kube::{Node, NodeAddress, NodeSpec, NodeStatus, Object, ObjectMeta};

    fn node(name: &str, ranges: &[&str], addresses: &[&str]) -> Event {
        Event::Applied(Box::new(Object::Node(Node {
            metadata: ObjectMeta {
                name: name.to_owned(),
                ..ObjectMeta::default()
            },
            spec: NodeSpec {
                pod_cidrs: ranges.iter().map(ToString::to_string).collect(),
                ..NodeSpec::default()
            },
            status: NodeStatus {
                addresses: addresses
                    .iter()
                    .map(|address| NodeAddress {
                        kind: AddressKind::InternalIP,
                        address: (*address).to_owned(),
                    })
                    .collect(),
            },
        })))
    }

    #[test]
    fn nodes_that_share_a_link_get_routes_and_the_others_are_named() {
        let mut cluster = ClusterState::default();
        for event in [
            node("a", &["10.244.1.0/24"], &["192.0.2.1"]),
            node(
                "b",
                &["10.244.2.0/24", "fd00:2::/64"],
                &["192.0.2.2", "2001:db8::2"],
            ),
            node("c", &["10.244.3.0/24"], &["198.51.100.3"]),
            node("d", &["10.244.1.128/25"], &["192.0.2.4"]),
            node("e", &["0.0.0.0/0"], &["192.0.2.5"]),
        ] {
            cluster.apply(event);
        }
        let links = ["192.0.2.0/24", "2001:db8::/64"].map(|l| l.parse().unwrap());
        let (routes, conditions) = plan(&cluster, "a", &BTreeSet::from(links));
        let mut text = String::new();
        for route in routes.values() {
            writeln!(text, "{route}").unwrap();
        }
        for condition in conditions {
            writeln!(text, "{condition}").unwrap();
        }
        expect_test::expect![[r"
            10.244.2.0/24 via 192.0.2.2
            fd00:2::/64 via 2001:db8::2
            Node c: NoSharedLink: status.addresses: no IPv4 InternalIP shares a link with this node; no route is made to its pods in 10.244.3.0/24, your network has to lead there
            Node d: AddressConflict: spec.podCIDRs: 10.244.1.128/25 overlaps 10.244.1.0/24 of Node a, which comes first; no route is made to it, give each Node a range of its own
        "]]
        .assert_eq(&text);
    }
}
