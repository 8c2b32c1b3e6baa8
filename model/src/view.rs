//! Facts and what follows from them for one node, kept together and up to date.
//!
//! The running agent and `ferrule-agent plan` both drive this, so that what is
//! planned is what is programmed. The agent tells the machine's own addresses;
//! a plan has no machine, and the Node object's addresses stand for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::binding::VipBinding;
use crate::cluster::{ClusterState, Event, Touched};
use crate::condition::{Condition, Reason};
use crate::desired::{Desired, Scope};
use crate::drain::{End, Recalled, Server};
use crate::host_ports::PodPorts;
use crate::kube::{Kind, Node};
use crate::names::Attachment;
use crate::network::{
    Networks, NodeFacts, Policy, address_conditions, cluster_object, range_conditions,
};
use crate::observed::Observed;
use crate::routes::{self, NodeRoute};
use crate::service::Scheduler;
use crate::source_nat::{OwnAddress, SourceNat, node_address};

/// One node's view of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeView {
    node: String,
    policy: Policy,
    cluster: ClusterState,
    desired: Desired,
    networks: Networks,
    network_conditions: Vec<Condition>,
    /// The machine's addresses; `None` where nothing is known of a machine.
    own: Option<Vec<OwnAddress>>,
    /// The node's own object as it was last: pods and node ports go on when it
    /// vanishes, be it for the moment in which a folder of manifests is replaced.
    object: Option<Node>,
    /// Schedulers that the kernel was seen not to have.
    missing_schedulers: BTreeSet<Scheduler>,
}

impl NodeView {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(node: &str, policy: Policy) -> Self {
        let cluster = ClusterState::default();
        let (networks, network_conditions) = Networks::new(&cluster, node, &policy, None);
        Self {
            node: node.to_owned(),
            desired: Desired::new(node),
            policy,
            cluster,
            networks,
            network_conditions,
            own: None,
            object: None,
            missing_schedulers: BTreeSet::new(),
        }
    }

    /// Takes events in. Returns what may have changed by them, and what they were about.
    pub fn take(&mut self, events: impl IntoIterator<Item = Event>) -> (Scope, Touched) {
        let mut touched = Touched::default();
        for event in events {
            touched.merge(self.cluster.apply(event));
        }
        let mut scope = Scope {
            left: std::mem::take(&mut touched.left),
            ..Scope::default()
        };
        if touched.service_cidrs || !touched.nodes.is_empty() {
            if let Some(object) = self.cluster.node(&self.node) {
                self.object = Some(object.clone());
            }
            let former = self.object.as_ref();
            let (networks, conditions) =
                Networks::new(&self.cluster, &self.node, &self.policy, former);
            self.networks = networks;
            self.network_conditions = conditions;
            scope.merge(self.set_facts());
        }
        for service in &touched.services {
            scope.merge(self.desired.update(&self.cluster, service));
        }
        (scope, touched)
    }

    /// Notes that the events have told every Node of a cluster; see
    /// [`ClusterState::know_all_nodes`].
    pub fn know_all_nodes(&mut self) {
        self.cluster.know_all_nodes();
    }

    /// Takes in which addresses the machine has. Returns what may have changed by it.
    pub fn set_own(&mut self, own: Vec<OwnAddress>) -> Scope {
        self.own = Some(own);
        self.set_facts()
    }

    /// Takes in what the operator decides now. How VIPs are bound stays as it is. Returns
    /// what may have changed by it.
    pub fn set_policy(&mut self, policy: Policy) -> Scope {
        self.policy = Policy {
            vip_binding: self.policy.vip_binding.clone(),
            ..policy
        };
        let former = self.object.as_ref();
        let (networks, conditions) = Networks::new(&self.cluster, &self.node, &self.policy, former);
        self.networks = networks;
        self.network_conditions = conditions;
        self.set_facts()
    }

    /// Takes in the host ports of an attachment; `None` is none. Returns what may have changed.
    pub fn set_host_ports(&mut self, attachment: &Attachment, ports: Option<PodPorts>) -> Scope {
        self.desired.set_host_ports(attachment, ports)
    }

    /// Notes that the kernel has no scheduler of this name: Services that ask for it
    /// get round robin, and are told. Returns what may have changed by it.
    pub fn note_missing_scheduler(&mut self, name: &str) -> Scope {
        match Scheduler::known(name) {
            // There is nothing to take in its place.
            None | Some(Scheduler::RoundRobin) => return Scope::default(),
            Some(scheduler) => self.missing_schedulers.insert(scheduler),
        };
        self.set_facts()
    }

    /// Forgets which schedulers the kernel lacked: modules may have come since.
    pub fn forget_missing_schedulers(&mut self) -> Scope {
        self.missing_schedulers.clear();
        self.set_facts()
    }

    /// Lets what the kernel has in `scope` and nobody wants keep its connections; see
    /// [`Desired::drain`].
    pub fn drain(&mut self, observed: &Observed, scope: &mut Scope, now: Instant) -> Vec<Server> {
        self.desired.drain(observed, scope, now)
    }

    /// Ends the drains of which nothing is left to wait for, and returns them; see
    /// [`Desired::look_at_drains`].
    pub fn look_at_drains(
        &mut self,
        bound: Duration,
        now: Instant,
        is_gone: impl Fn(IpAddr) -> bool,
    ) -> Vec<(Server, End)> {
        self.desired
            .look_at_drains(&self.cluster, bound, now, is_gone)
    }

    /// Takes in what a former agent knew of backends that leave.
    pub fn recall_drains(&mut self, recall: impl Fn(&Server) -> Option<Recalled>) {
        self.desired.recall_drains(recall);
    }

    /// Ends a drain: the backend has no connections any more.
    pub fn end_drain(&mut self, server: &Server) {
        self.desired.end_drain(server);
    }

    fn set_facts(&mut self) -> Scope {
        let facts = self.facts();
        self.desired.set_facts(&self.cluster, facts)
    }

    fn facts(&self) -> NodeFacts {
        let own: Option<BTreeSet<IpAddr>> = self
            .own
            .as_ref()
            .map(|own| own.iter().map(|address| address.ip).collect());
        let mut facts = NodeFacts::new(
            own.as_ref(),
            self.object.as_ref(),
            &self.policy,
            &self.networks.node_pods,
        );
        if self.own.is_some() {
            facts.primary = self.addresses();
        }
        NodeFacts {
            missing_schedulers: self.missing_schedulers.clone(),
            sources: self.sources(),
            ..facts
        }
    }

    /// The address of each family that stands for the node, of those that the machine has.
    fn addresses(&self) -> BTreeMap<Family, IpAddr> {
        let own = self.own.as_deref().unwrap_or_default();
        let object = self.object.as_ref();
        let families = Family::ALL.into_iter();
        let known = families.map(|family| Some((family, node_address(own, object, family)?)));
        known.flatten().collect()
    }

    /// By which addresses processes of the node call VIPs, where routes can say that.
    fn sources(&self) -> BTreeMap<Family, IpAddr> {
        if self.policy.vip_binding != VipBinding::Route {
            return BTreeMap::new();
        }
        self.addresses()
    }

    /// Name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// What the operator decided.
    #[must_use]
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The facts.
    #[must_use]
    pub fn cluster(&self) -> &ClusterState {
        &self.cluster
    }

    /// What should be programmed for services.
    #[must_use]
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Which addresses are whose.
    #[must_use]
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// Whose source is to be replaced, and by what.
    #[must_use]
    pub fn source_nat(&self) -> SourceNat {
        SourceNat {
            left_to_others: self.desired.left_to_others().collect(),
            ..SourceNat::new(
                &self.policy,
                self.networks.clone(),
                self.own.as_deref().unwrap_or_default(),
                self.object.as_ref(),
            )
        }
    }

    /// The device whose link has this address, where the machine is known: the narrowest.
    #[must_use]
    pub fn device_towards(&self, ip: IpAddr) -> Option<&str> {
        let own = self.own.iter().flatten();
        let links = own.filter(|address| address.link.contains(ip));
        let narrowest = links.max_by_key(|address| address.link.prefix())?;
        Some(&narrowest.device)
    }

    /// Routes to other nodes' pods, and the Nodes to which there is none.
    #[must_use]
    pub fn routes(&self) -> (BTreeMap<IpNetwork, NodeRoute>, Vec<Condition>) {
        let links = self.own.iter().flatten().map(|address| address.link);
        routes::plan(&self.cluster, &self.node, &links.collect())
    }

    /// What is to be said about objects other than Services and their slices.
    #[must_use]
    pub fn node_conditions(&self) -> Vec<Condition> {
        let mut conditions = self.network_conditions.clone();
        match self.cluster.node(&self.node) {
            Some(object) => {
                conditions.extend(address_conditions(&self.node, object));
                conditions.extend(range_conditions(&self.node, object));
            }
            None => conditions.push(Condition {
                object: cluster_object(Kind::Node, &self.node),
                reason: Reason::NodeMissing,
                message: format!(
                    "no Node object has the name {}: pods of this node get no addresses, and a \
                     plan has no node ports; check the name, or add the object",
                    self.node
                ),
            }),
        }
        let facts = self.facts();
        if facts.node_ports.is_empty() && !facts.own.is_empty() {
            conditions.push(Condition {
                object: cluster_object(Kind::Node, &self.node),
                reason: Reason::InvalidAddress,
                message: "nodePortAddresses: none of the node's addresses is among them, so it \
                          serves no node ports; correct the configuration or status.addresses"
                    .to_owned(),
            });
        }
        conditions.sort();
        conditions
    }

    /// What is to be said about every object, in order, each thing once.
    #[must_use]
    pub fn conditions(&self) -> BTreeSet<Condition> {
        let services = self.desired.conditions();
        services.chain(self.node_conditions()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kube::{AddressKind, NodeAddress, Object};

    #[test]
    fn pods_and_node_ports_go_on_without_the_node_object() {
        let mut node = Node::default();
        "a".clone_into(&mut node.metadata.name);
        node.spec.pod_cidrs = vec!["10.1.0.0/24".to_owned(), "fd00:1::/64".to_owned()];
        node.status.addresses = vec![NodeAddress {
            kind: AddressKind::InternalIP,
            address: "192.0.2.1".to_owned(),
        }];
        let object = Object::Node(node);
        let key = object.key();
        let mut view = NodeView::new("a", Policy::default());
        view.take([Event::Applied(Box::new(object))]);
        let before = (view.source_nat(), view.networks().clone());
        assert_eq!(before.1.node_pods.len(), 2);
        let (scope, touched) = view.take([Event::Deleted(key)]);
        assert!(touched.nodes.contains("a"));
        assert!(scope.is_empty(), "{scope:?}");
        assert_eq!((view.source_nat(), view.networks().clone()), before);
        let reasons: Vec<Reason> = view.node_conditions().iter().map(|c| c.reason).collect();
        assert_eq!(reasons, [Reason::NodeMissing]);
    }
}
