//! Facts and what follows from them for one node, kept together and up to date.
//!
//! The running agent and `ferrule-agent plan` both drive this, so that what is
//! planned is what is programmed. The agent tells the machine's own addresses;
//! a plan has no machine, and the Node object's addresses stand for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::cluster::{ClusterState, Event, Touched};
use crate::condition::{Condition, Reason};
use crate::desired::{Desired, Scope};
use crate::kube::Kind;
use crate::network::{
    Networks, NodeFacts, Policy, address_conditions, cluster_object, range_conditions,
};
use crate::routes::{self, NodeRoute};
use crate::source_nat::{OwnAddress, SourceNat};

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
}

impl NodeView {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(node: &str, policy: Policy) -> Self {
        let cluster = ClusterState::default();
        let (networks, network_conditions) = Networks::new(&cluster, node, &policy);
        Self {
            node: node.to_owned(),
            desired: Desired::new(node),
            policy,
            cluster,
            networks,
            network_conditions,
            own: None,
        }
    }

    /// Takes events in. Returns what may have changed by them, and what they were about.
    pub fn take(&mut self, events: impl IntoIterator<Item = Event>) -> (Scope, Touched) {
        let mut touched = Touched::default();
        for event in events {
            touched.merge(self.cluster.apply(event));
        }
        let mut scope = Scope::default();
        if touched.service_cidrs || !touched.nodes.is_empty() {
            let (networks, conditions) = Networks::new(&self.cluster, &self.node, &self.policy);
            self.networks = networks;
            self.network_conditions = conditions;
            scope.merge(self.set_facts());
        }
        for service in &touched.services {
            scope.merge(self.desired.update(&self.cluster, service));
        }
        (scope, touched)
    }

    /// Takes in which addresses the machine has. Returns what may have changed by it.
    pub fn set_own(&mut self, own: Vec<OwnAddress>) -> Scope {
        self.own = Some(own);
        self.set_facts()
    }

    fn set_facts(&mut self) -> Scope {
        let own: Option<BTreeSet<IpAddr>> = self
            .own
            .as_ref()
            .map(|own| own.iter().map(|address| address.ip).collect());
        let facts = NodeFacts::new(
            own.as_ref(),
            self.cluster.node(&self.node),
            &self.policy,
            &self.networks.node_pods,
        );
        self.desired.set_facts(&self.cluster, facts)
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
        SourceNat::new(
            &self.policy,
            self.networks.clone(),
            self.own.as_deref().unwrap_or_default(),
            self.cluster.node(&self.node),
        )
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
