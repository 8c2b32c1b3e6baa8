//! What holds, in the words of kube-proxy's configuration: for `/configz`.

use std::net::SocketAddr;

use ferrule_model::network::{DetectLocal, NodePortAddresses};
use serde_json::{Value, json};

use super::Config;
use super::kube_proxy::{API_VERSION, KIND, written};

impl Config {
    /// The configuration as it holds on the node, whichever file it came from. Zero stands
    /// where the kernel's own value stays. Fields without effect are not in it.
    pub(crate) fn effective(
        &self,
        node: &str,
        healthz: Option<SocketAddr>,
        metrics: Option<SocketAddr>,
    ) -> Value {
        let address = |address: Option<SocketAddr>| {
            address.map_or_else(String::new, |address| address.to_string())
        };
        let policy = &self.policy;
        let of_file = &self.kube_proxy;
        let conntrack = &of_file.tuning.conntrack;
        let timeouts = &of_file.timeouts;
        let (mode, bridge, prefix) = match &policy.detect_local {
            None => ("", "", ""),
            Some(DetectLocal::ClusterCidr) => ("ClusterCIDR", "", ""),
            Some(DetectLocal::NodeCidr) => ("NodeCIDR", "", ""),
            Some(DetectLocal::BridgeInterface(name)) => ("BridgeInterface", name.as_str(), ""),
            Some(DetectLocal::InterfaceNamePrefix(prefix)) => {
                ("InterfaceNamePrefix", "", prefix.as_str())
            }
        };
        let texts = |networks: &[ipnetwork::IpNetwork]| -> Vec<String> {
            networks.iter().map(ToString::to_string).collect()
        };
        json!({
            "apiVersion": API_VERSION,
            "kind": KIND,
            "mode": "ipvs",
            "hostnameOverride": node,
            "healthzBindAddress": address(healthz),
            "metricsBindAddress": address(metrics),
            "clientConnection": {"kubeconfig": of_file.kubeconfig},
            "clusterCIDR": texts(&policy.cluster_cidrs).join(","),
            "detectLocalMode": mode,
            "detectLocal": {"bridgeInterface": bridge, "interfaceNamePrefix": prefix},
            "nodePortAddresses": match &policy.node_port_addresses {
                NodePortAddresses::All => Vec::new(),
                NodePortAddresses::Primary => vec!["primary".to_owned()],
                NodePortAddresses::Within(networks) => texts(networks),
            },
            "iptables": {"masqueradeAll": policy.masquerade_all},
            "ipvs": {
                "scheduler": policy.scheduling.scheduler.name(),
                "excludeCIDRs": texts(&of_file.excluded),
                "strictARP": of_file.tuning.strict_arp,
                "syncPeriod": written(of_file.sync_period),
                "tcpTimeout": written(timeouts.tcp),
                "tcpFinTimeout": written(timeouts.tcp_fin),
                "udpTimeout": written(timeouts.udp),
            },
            "conntrack": {
                "maxPerCore": conntrack.max_per_core,
                "min": conntrack.min,
                "tcpEstablishedTimeout": written(conntrack.tcp_established),
                "tcpCloseWaitTimeout": written(conntrack.tcp_close_wait),
                "udpTimeout": written(conntrack.udp),
                "udpStreamTimeout": written(conntrack.udp_stream),
            },
        })
    }
}
