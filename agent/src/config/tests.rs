use super::*;

const HEAD: &str = "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n";

#[test]
fn absent_empty_and_null_are_defaults() {
    for text in [
        HEAD.to_owned(),
        format!("{HEAD}clusterCIDR: \"\"\nnodePortAddresses: []\nnodePortRange: \"\"\n"),
        format!("{HEAD}clusterCIDR:\nnodePortAddresses: null\nmasqueradeAll: ~\n"),
    ] {
        assert_eq!(Config::parse(&text).unwrap(), Config::default(), "{text}");
    }
    assert_eq!(Config::read(None).unwrap(), Config::default());
}

#[test]
fn every_field_is_read() {
    let text = format!(
        "{HEAD}clusterCIDR: 10.244.0.0/16, fd00::/48\nserviceCIDRs: [10.96.0.0/12]\n\
         nodePortAddresses: [192.0.2.0/24]\nnonMasqueradeCIDRs: [10.0.0.0/8]\n\
         masqueradeAll: true\nnodePortRange: 20000-22767\nauditBudgetPercent: 5\n\
         externalIPs: [203.0.113.0/24]\nscheduler: sh\nschedulerFlags: [flag-3, flag-1]\n\
         serviceProxyName: ferrule\nvipBinding: device\nvipDevice: eth0\n\
         detectLocalMode: InterfaceNamePrefix\ndetectLocal: {{interfaceNamePrefix: cali}}\n"
    );
    let config = Config::parse(&text).unwrap();
    assert_eq!(config.policy.cluster_cidrs.len(), 2);
    assert_eq!(config.policy.node_ports, 20_000..=22_767);
    assert!(config.policy.masquerade_all);
    let allowed = vec!["203.0.113.0/24".parse().unwrap()];
    assert_eq!(config.policy.external_ips, ExternalIps::Within(allowed));
    assert_eq!(config.policy.scheduling.scheduler, Scheduler::SourceHash);
    assert_eq!(config.policy.scheduling.scheduler_flags, 0b101);
    assert_eq!(config.policy.proxy_name.as_deref(), Some("ferrule"));
    let eth0 = IfName::try_from("eth0".to_owned()).unwrap();
    assert_eq!(config.policy.vip_binding, VipBinding::Device(eth0));
    let by_name = DetectLocal::InterfaceNamePrefix("cali".to_owned());
    assert_eq!(config.policy.detect_local, Some(by_name));
    assert!((config.audit_budget - 5.0).abs() < f64::EPSILON);
    assert!(matches!(
        config.policy.node_port_addresses,
        NodePortAddresses::Within(_)
    ));
}

#[test]
fn which_external_ips_and_which_scheduler() {
    let policy = |line: &str| Config::parse(&format!("{HEAD}{line}\n")).unwrap().policy;
    for (line, expected) in [
        ("externalIPs: []", ExternalIps::All),
        ("externalIPs: [all]", ExternalIps::All),
        ("externalIPs: [none]", ExternalIps::Within(Vec::new())),
    ] {
        assert_eq!(policy(line).external_ips, expected, "{line}");
    }
    for (line, scheduler, flags) in [
        ("scheduler: \"\"", Scheduler::RoundRobin, 0),
        ("scheduler: mh", Scheduler::MaglevHash, 0b010),
        (
            "scheduler: mh\nschedulerFlags: [flag-1]",
            Scheduler::MaglevHash,
            0b001,
        ),
        (
            "scheduler: ovf\nschedulerFlags: null",
            Scheduler::WeightedOverflow,
            0,
        ),
    ] {
        let scheduling = policy(line).scheduling;
        assert_eq!(scheduling.scheduler, scheduler, "{line}");
        assert_eq!(scheduling.scheduler_flags, flags, "{line}");
    }
    assert_eq!(policy("serviceProxyName: \"\"").proxy_name, None);
}

#[test]
fn mistakes_are_named_with_field_and_remedy() {
    let said = |line: &str| Config::parse(&format!("{HEAD}{line}\n")).unwrap_err();
    for (line, words) in [
        ("clusterCIDR: 10.0.0.1", "clusterCIDR: \"10.0.0.1\" is not"),
        ("nodePortAddresses: [primary, 10.0.0.0/8]", "write it alone"),
        ("nodePortRange: 5", "30000-32767"),
        ("nodePortRange: 1024-65535", "smaller range"),
        ("auditBudgetPercent: 0", "auditBudgetPercent"),
        ("externalIPs: [none, 10.0.0.0/8]", "write it alone"),
        (
            "externalIPs: [10.0.0.1]",
            "externalIPs: \"10.0.0.1\" is not",
        ),
        (
            "scheduler: fastest",
            "scheduler: \"fastest\" is none; write one of rr,",
        ),
        (
            "schedulerFlags: [flag-4]",
            "schedulerFlags: \"flag-4\" is none",
        ),
        ("vipBinding: dummy", "write address, route or device"),
        ("vipBinding: device", "write vipDevice: eth0"),
        ("vipBinding: route\nvipDevice: eth0", "leave vipDevice out"),
        (
            "vipDevice: eth0",
            "vipBinding is address; leave vipDevice out",
        ),
        (
            "vipBinding: device\nvipDevice: a/b",
            "vipDevice: interface name",
        ),
        ("vipBinding: device\nvipDevice: ferabc", "devices of pods"),
        ("clusterCidr: x", "clusterCidr"),
        ("nodePortAddresses: primary", "line 3: nodePortAddresses: "),
        ("nodePortAddresses: [~]", "line 3: nodePortAddresses[0]: "),
        ("masqueradeAll: 1", "line 3: masqueradeAll: "),
        ("auditBudgetPercent: much", "line 3: auditBudgetPercent: "),
        ("masqueradeAll: true\nmasqueradeAll: true", "line 4: "),
    ] {
        let error = said(line);
        assert!(error.contains(words), "{line}: {error}");
        assert!(!error.contains("Option"), "{line}: {error}");
    }
    assert!(
        Config::parse("kind: x\n")
            .unwrap_err()
            .contains("apiVersion")
    );
    assert!(Config::parse("").unwrap_err().contains("apiVersion"));
}

#[test]
fn the_size_of_tables_and_what_is_estimated() {
    let parse = |line: &str| Config::parse(&format!("{HEAD}{line}\n"));
    for (line, bits, estimation) in [
        ("estimation: \"\"", None, Estimation::Auto),
        ("connectionTableBits: 20", Some(20), Estimation::Auto),
        ("estimation: auto", None, Estimation::Auto),
        ("estimation: always", None, Estimation::Always),
        ("estimation: never", None, Estimation::Never),
    ] {
        let config = parse(line).unwrap();
        assert_eq!(config.connection_table_bits, bits, "{line}");
        assert_eq!(config.estimation, estimation, "{line}");
    }
    for (line, field) in [
        ("estimation: sometimes", "estimation"),
        ("connectionTableBits: 7", "connectionTableBits"),
        ("connectionTableBits: 21", "connectionTableBits"),
    ] {
        let error = parse(line).unwrap_err();
        assert!(
            error.starts_with(field) && error.contains("write"),
            "{error}"
        );
    }
}
