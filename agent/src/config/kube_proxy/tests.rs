use ferrule_model::network::{DetectLocal, NodePortAddresses};
use ferrule_model::service::Scheduler;

use super::*;

const STANDALONE: &str = include_str!("../../../tests/fixtures/kube-proxy/standalone.yaml");
const KUBEADM: &str = include_str!("../../../tests/fixtures/kube-proxy/kubeadm-configmap.yaml");

#[test]
fn files_of_real_clusters_are_read() {
    let standalone = Config::parse(STANDALONE).unwrap().policy;
    assert_eq!(
        standalone.scheduling.scheduler,
        Scheduler::WeightedRoundRobin
    );
    assert_eq!(standalone.cluster_cidrs[0].to_string(), "10.0.0.0/24");
    assert_eq!(standalone.detect_local, Some(DetectLocal::ClusterCidr));
    let kubeadm = Config::parse(KUBEADM).unwrap().policy;
    assert_eq!(kubeadm.scheduling.scheduler, Scheduler::RoundRobin);
    assert_eq!(kubeadm.cluster_cidrs[0].to_string(), "10.244.0.0/16");
    assert_eq!(kubeadm.node_port_addresses, NodePortAddresses::All);
    assert!(!kubeadm.masquerade_all);
}

#[test]
fn every_field_that_decides_about_frontends() {
    let read = |more: &str| {
        Config::parse(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{more}"))
            .map(|config| config.policy)
    };
    let policy = read("ipvs: {scheduler: mh}\niptables: {masqueradeAll: true}\n").unwrap();
    assert_eq!(policy.scheduling.scheduler_flags, 2, "as kube-proxy's");
    assert!(policy.masquerade_all);
    assert_eq!(policy.detect_local, None, "no clusterCIDR");
    let policy = read("nodePortAddresses: [primary]\ndetectLocalMode: NodeCIDR\n").unwrap();
    assert_eq!(policy.node_port_addresses, NodePortAddresses::Primary);
    assert_eq!(policy.detect_local, Some(DetectLocal::NodeCidr));
    let policy =
        read("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}\n")
            .unwrap();
    let prefix = DetectLocal::InterfaceNamePrefix("cali".to_owned());
    assert_eq!(policy.detect_local, Some(prefix));
    let policy =
        read("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}\n").unwrap();
    let bridge = DetectLocal::BridgeInterface("cni0".to_owned());
    assert_eq!(policy.detect_local, Some(bridge));
    let policy = read("mode: nftables\nnftables: {masqueradeAll: true}\n").unwrap();
    assert!(policy.masquerade_all);
    for (more, words) in [
        ("ipvs: {scheduler: best}\n", "ipvs.scheduler: \"best\""),
        ("detectLocalMode: Magic\n", "detectLocalMode: \"Magic\""),
        (
            "detectLocalMode: BridgeInterface\n",
            "detectLocal.bridgeInterface",
        ),
        ("clusterCIDR: x\n", "clusterCIDR: \"x\""),
    ] {
        let error = read(more).unwrap_err();
        assert!(error.contains(words), "{more}: {error}");
    }
    let error = Config::parse("apiVersion: v1\nkind: ConfigMap\ndata: {}\n").unwrap_err();
    assert!(error.contains("config.conf"), "{error}");
}
#[test]
fn zero_empty_and_null_are_defaults() {
    let read = |more: &str| {
        Config::parse(&format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{more}")).unwrap()
    };
    let bare = read("mode: ipvs\n");
    assert_eq!(bare.notes, Vec::<String>::new());
    assert_eq!(bare.kube_proxy.sync_period, SYNC_PERIOD);
    assert_eq!(bare.kube_proxy.tuning.conntrack.limit(4), Some(131_072));
    assert_eq!(
        read(
            "mode: ipvs\nhostnameOverride: \"\"\nhealthzBindAddress: \"\"\nmetricsBindAddress: null\n\
             clientConnection: {kubeconfig: \"\"}\nconntrack: null\ndetectLocal: null\nclusterCIDR: ~\n\
             ipvs: {syncPeriod: 0s, tcpTimeout: 0s, udpTimeout: null, excludeCIDRs: [], scheduler: ~}\n"
        ),
        bare
    );
    let zero =
        read("conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}\n");
    let leaves = Conntrack {
        min: MIN,
        ..Conntrack::default()
    };
    assert_eq!(
        zero.kube_proxy.tuning.conntrack, leaves,
        "the kernel's stay"
    );
    assert_eq!(leaves.limit(64), None);
}

#[test]
fn mistakes_are_named_with_field_and_remedy() {
    for (more, words) in [
        ("mode: userspace\n", "mode: \"userspace\" is none"),
        (
            "healthzBindAddress: here\n",
            "healthzBindAddress: \"here\" is no address",
        ),
        ("metricsBindAddress: 0.0.0.0:0\n", "such as 0.0.0.0:10249"),
        (
            "ipvs: {tcpTimeout: -5s}\n",
            "line 3: ipvs.tcpTimeout: \"-5s\" is no span",
        ),
        ("ipvs: {udpTimeout: 30}\n", "write 30s"),
        ("ipvs: {syncPeriod: soon}\n", "ipvs.syncPeriod"),
        ("ipvs: {strictARP: 1}\n", "ipvs.strictARP"),
        (
            "ipvs: {excludeCIDRs: [10.0.0.1]}\n",
            "ipvs.excludeCIDRs: \"10.0.0.1\" is not",
        ),
        ("conntrack: {min: -1}\n", "conntrack.min: -1 is no number"),
        ("conntrack: {maxPerCore: lots}\n", "conntrack.maxPerCore"),
        (
            "conntrack: {min: 3000000000}\n",
            "conntrack.min: is the number 3000000000; write a whole number, 2147483647 at most",
        ),
        (
            "conntrack: {min: 2.0}\n",
            "conntrack.min: is the number 2.0; write a whole number",
        ),
        ("ipvs: {udpTimeout: 9999999h}\n", "is no span"),
    ] {
        let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{more}");
        let error = Config::parse(&text).unwrap_err();
        assert!(error.contains(words), "{more}: {error}");
    }
}

#[test]
fn what_the_kernel_cannot_count_is_shortened_and_told() {
    let text = format!(
        "apiVersion: {API_VERSION}\nkind: {KIND}\nmode: ipvs\n\
         conntrack: {{tcpEstablishedTimeout: 720h, udpTimeout: 596h31m23s}}\n\
         ipvs: {{tcpTimeout: 1000h}}\n"
    );
    let config = Config::parse(&text).unwrap();
    let kube_proxy = &config.kube_proxy;
    assert_eq!(kube_proxy.tuning.conntrack.tcp_established, LONGEST);
    assert_eq!(kube_proxy.tuning.conntrack.udp, LONGEST);
    assert_eq!(kube_proxy.timeouts.tcp, LONGEST);
    let words = "596h31m23s in its place, the longest that every kernel takes";
    let mut notes = config.notes.clone();
    notes.sort();
    assert_eq!(
        notes,
        [
            format!("conntrack.tcpEstablishedTimeout is 720h0m0s: {words}"),
            format!("ipvs.tcpTimeout is 1000h0m0s: {words}"),
        ]
    );
}

#[test]
fn a_list_is_no_group_of_fields() {
    for text in ["ipvs: [\"lc\"]", "conntrack: []", "detectLocal: [cni0]"] {
        let text = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{text}\n");
        let error = parse(&text).unwrap_err();
        assert!(
            error.contains("is a list; write its fields below it"),
            "{error}"
        );
    }
}
