//! The rules that follow from the cluster's networks: whose source is replaced, and
//! which addresses are services' and pods'.

use std::net::IpAddr;

use ferrule_model::address::Family;
use ferrule_model::network::outermost;
use ferrule_model::ownership::STRANGER_MARK;
use ferrule_model::source_nat::{SourceNat, Strangers};

use super::{FAMILIES, PROTOCOLS, Ruleset, braces, can_be_said, counters, mark};

/// One family in the words of rules.
struct Words {
    ip: &'static str,
    /// The end of its sets' names.
    digit: &'static str,
    /// Pods of this node; absent: no network of them is known.
    own: Option<String>,
    /// Pods of the cluster.
    pods: Option<String>,
    /// Both: a configured pod network need not hold this node's.
    all_pods: Option<String>,
    /// Where pods' own addresses may appear.
    exempt: Option<String>,
}

impl Words {
    fn of(nat: &SourceNat, family: Family, (ip, digit): (&'static str, &'static str)) -> Self {
        Self {
            ip,
            digit,
            own: braces(&outermost(&nat.networks.node_pods, family)),
            pods: braces(&outermost(&nat.networks.pods, family)),
            all_pods: braces(&outermost(&nat.networks.all_pods(), family)),
            exempt: braces(&outermost(&nat.networks.non_masquerade, family)),
        }
    }

    /// The client called a VIP.
    fn vip(&self) -> String {
        format!("ct original {} daddr @vips{}", self.ip, self.digit)
    }

    /// The client called a frontend of a set. The program knows what a port is only
    /// after a transport protocol.
    fn called(&self, set: &str) -> [String; 3] {
        self.compared(&format!("@{set}"))
    }

    /// What the client called is in a set, or `!=` it is not.
    fn compared(&self, with: &str) -> [String; 3] {
        let Self { ip, digit, .. } = self;
        PROTOCOLS.map(|protocol| {
            format!(
                "meta l4proto {protocol} ct original {ip} daddr . meta l4proto . \
                 ct original proto-dst {with}{digit}"
            )
        })
    }

    /// The client is no pod of this node.
    fn beyond(&self) -> String {
        let not = |own| format!("{} saddr != {own} ", self.ip);
        self.own.as_ref().map_or(String::new(), not)
    }
}

impl Ruleset<'_> {
    /// The rows of the table of service semantics, one rule each. Connection
    /// tracking knows the address that a client called; the packet has the
    /// backend that IPVS chose. So no mark is needed.
    pub(super) fn source_nat(&mut self, nat: &SourceNat) {
        let chain = "source-nat";
        self.rule(chain, "oifname \"lo\" return", "does not leave the node");
        // What is refused before hook input has passed source NAT was not decided about yet:
        // the reset would be the first packet that is.
        self.rule(chain, "ct direction reply return", "a refusal");
        for (family, words) in Family::ALL.into_iter().zip(FAMILIES) {
            let words = Words::of(nat, family, words);
            self.before_ipvs(nat, family, &words);
            self.of_services(nat, &words);
            self.of_strangers(nat.strangers(family).as_ref(), &words);
            self.of_pods(&words);
        }
        self.replacements(nat);
    }

    /// Who is told apart by the cluster's networks before IPVS, and what is none of
    /// its frontends.
    fn before_ipvs(&mut self, nat: &SourceNat, family: Family, words: &Words) {
        let Words {
            ip, digit, pods, ..
        } = words;
        let strangers = nat.strangers(family);
        self.mark_strangers(strangers.as_ref(), words);
        let through = match &strangers {
            Some(Strangers::NotThrough(device)) => Some((device, "")),
            Some(Strangers::NotThroughAny(prefix)) => Some((prefix, "*")),
            Some(Strangers::OutsideOf(_)) | None => None,
        };
        if let Some((device, end)) = through
            && can_be_said(device)
        {
            self.rule(
                "mark-internal",
                &format!("iifname \"{device}{end}\" {}", mark(ip, digit)),
                "pods, as the operator tells them",
            );
        }
        if let Some(pods) = pods {
            self.rule(
                "mark-internal",
                &format!("{ip} saddr {pods} {}", mark(ip, digit)),
                "pods use the endpoints of all nodes",
            );
        }
        if let Some(services) = braces(&outermost(&nat.networks.services, family)) {
            let pods = braces(&outermost(&nat.networks.pods_among_services(), family));
            let left = nat.left_to_others.iter().copied();
            let left: Vec<IpAddr> = left.filter(|ip| Family::of(*ip) == family).collect();
            let not = |others| format!(" {ip} daddr != {others}");
            let not_pods = pods.map_or_else(String::new, not);
            let not_others = braces(&left).map_or_else(String::new, not);
            self.rule(
                "unallocated",
                &format!("{ip} daddr {services}{not_pods}{not_others} jump vip-without-service"),
                "a service address that no service has",
            );
        }
    }

    /// By which device a client came is known before IPVS only.
    fn mark_strangers(&mut self, strangers: Option<&Strangers<'_>>, words: &Words) {
        let (device, end) = match strangers {
            Some(Strangers::NotThrough(device)) => (device, ""),
            Some(Strangers::NotThroughAny(prefix)) => (prefix, "*"),
            Some(Strangers::OutsideOf(_)) | None => return,
        };
        let Words { ip, digit, .. } = words;
        if can_be_said(device) {
            self.rule(
                "mark-internal",
                &format!(
                    "iifname != \"{device}{end}\" {ip} daddr @vips{digit} ct state new \
                     meta mark set {STRANGER_MARK:#x}"
                ),
                "a client from beyond the cluster",
            );
        }
    }

    fn of_services(&mut self, nat: &SourceNat, words: &Words) {
        let Words { ip, digit, .. } = words;
        self.replace(
            &format!("{ip} saddr . {ip} daddr @hairpins{digit}"),
            counters::HAIRPIN,
            "the backend is the client",
        );
        self.replace(
            &format!("{ip} saddr @vips{digit}"),
            counters::VIA_VIP,
            "a process of this node that calls from the VIP",
        );
        if nat.masquerade_all {
            // Of the VIPs, those that are called from outside are not meant.
            for not_external in words.compared("!= @external") {
                let called = format!("{} {not_external}", words.vip());
                self.replace(&called, counters::ALL_CLUSTER, "masqueradeAll");
            }
        }
        self.beyond_pods(words);
        let beyond = words.beyond();
        for preserved in words.called("preserved") {
            if let Some(pods) = &words.pods {
                // A backend elsewhere would answer the pod, and not by way of this node. Which ones
                // are here their endpoints say: not every node's pods have a range of their own.
                self.replace(
                    &format!(
                        "{preserved} {ip} saddr {pods} {beyond}\
                         {ip} daddr . {ip} daddr != @hairpins{digit} fib daddr type != local"
                    ),
                    counters::OFF_NODE,
                    "a pod of another node that was led to a third",
                );
            }
            self.rule(
                "source-nat",
                &format!("{preserved} {beyond}return"),
                "the backend is on this node and sees the client",
            );
        }
        for external in words.called("external") {
            self.replace(
                &format!("{external} {beyond}fib saddr type != local"),
                counters::OFF_NODE,
                "the reply must come back through this node",
            );
        }
    }

    fn of_strangers(&mut self, strangers: Option<&Strangers<'_>>, words: &Words) {
        let stranger = match strangers {
            None => None,
            Some(Strangers::OutsideOf(networks)) => braces(networks)
                .map(|inside| format!("{} saddr != {inside} fib saddr type != local", words.ip)),
            Some(Strangers::NotThrough(_) | Strangers::NotThroughAny(_)) => {
                Some(format!("meta mark {STRANGER_MARK:#x} meta mark set 0"))
            }
        };
        if let Some(stranger) = stranger {
            // As with masqueradeAll; of those that are called from outside, nobody who
            // comes from there is left.
            for not_external in words.compared("!= @external") {
                self.replace(
                    &format!("{} {not_external} {stranger}", words.vip()),
                    counters::OFF_CLUSTER,
                    "a client from beyond the cluster",
                );
            }
        }
    }

    /// Also for pods of other nodes: such a backend would not answer by way of this one.
    fn beyond_pods(&mut self, words: &Words) {
        let Words { ip, .. } = words;
        let (Some(pods), Some(all_pods)) = (&words.pods, &words.all_pods) else {
            return;
        };
        for service in words.called("external").iter().chain([&words.vip()]) {
            self.replace(
                &format!(
                    "{service} {ip} saddr {all_pods} {ip} daddr != {pods} fib daddr type != local"
                ),
                counters::POD_EGRESS,
                "a backend that does not know the way to pods",
            );
        }
    }

    /// What calls no Service is replaced for pods of this node alone, where it has a range:
    /// others are their own plugin's.
    fn of_pods(&mut self, words: &Words) {
        let Words { ip, exempt, .. } = words;
        let Some(own) = &words.own else {
            return;
        };
        let outside = exempt
            .as_ref()
            .map_or(String::new(), |exempt| format!("{ip} daddr != {exempt} "));
        self.replace(
            &format!("{ip} saddr {own} {outside}"),
            counters::POD_EGRESS,
            "a pod that calls beyond the cluster",
        );
    }

    fn replace(&mut self, condition: &str, counter: &str, why: &str) {
        let rule = format!("{condition} counter name {counter} goto replace-source");
        self.rule("source-nat", &rule, why);
    }

    /// Where the device that leads out has an address, the kernel chooses the
    /// right one of it; pods' veths have none, and there the kernel would choose
    /// any address of the node, a VIP among them.
    fn replacements(&mut self, nat: &SourceNat) {
        let chain = "replace-source";
        let (first, last) = (nat.ports.start(), nat.ports.end());
        for (family, (ip, _)) in Family::ALL.into_iter().zip(FAMILIES) {
            let nfproto = match family {
                Family::IPv4 => "meta nfproto ipv4",
                Family::IPv6 => "meta nfproto ipv6",
            };
            let known = nat.sources.get(&family).cloned().unwrap_or_default();
            let devices: Vec<String> = known
                .devices
                .iter()
                .filter(|device| can_be_said(device))
                .map(|device| format!("\"{device}\""))
                .collect();
            // Ports can be said only of protocols that have them.
            for protocol in PROTOCOLS.into_iter().map(Some).chain([None]) {
                let (protocols, to) = protocol.map_or_else(Default::default, |protocol| {
                    let protocol = format!("meta l4proto {protocol} ");
                    (protocol, format!(" to :{first}-{last} fully-random"))
                });
                if let Some(devices) = braces(&devices) {
                    self.rule(
                        chain,
                        &format!("{nfproto} oifname {devices} {protocols}masquerade{to}"),
                        "an address of the device that leads out",
                    );
                }
                let Some(node) = known.node else {
                    self.rule(
                        chain,
                        &format!("{nfproto} {protocols}masquerade{to}"),
                        "no address of the node is known",
                    );
                    continue;
                };
                let node = match node {
                    _ if protocol.is_none() => node.to_string(),
                    IpAddr::V4(node) => format!("{node}:{first}-{last} fully-random"),
                    IpAddr::V6(node) => format!("[{node}]:{first}-{last} fully-random"),
                };
                self.rule(
                    chain,
                    &format!("{nfproto} {protocols}snat {ip} to {node}"),
                    "the address of the node",
                );
            }
        }
    }
}
