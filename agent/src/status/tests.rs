//! The screen of a healthy and of a broken node. Those of docs/status.md are a real node's:
//! the kernel suite compares them.

use std::collections::BTreeMap;

use expect_test::expect;
use ferrule_api::FrameError;
use ferrule_api::status::{
    Audit, Drift, LastChange, ObjectCondition, Packets, PodStatus, Problem, Programmed,
    RangeStatus, SourceStatus, SysctlStatus,
};
use ferrule_model::condition::Reason;
use serde_json::Value;

use super::*;

/// Some moment.
const NOW: u64 = 1_767_225_600;

const WIDE: Look = Look {
    width: DEFAULT_WIDTH,
    palette: Palette::PLAIN,
};

fn counted(counters: &[(&str, u64)]) -> BTreeMap<String, u64> {
    counters
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count))
        .collect()
}

fn range(range: &str, used: u64, free: u64) -> RangeStatus {
    RangeStatus {
        range: range.to_owned(),
        used,
        free,
    }
}

fn healthy() -> Status {
    Status {
        health: Health::Healthy,
        node: "node-a".to_owned(),
        agent_version: "0.1.0".to_owned(),
        started: NOW - 273_600,
        now: NOW,
        source: SourceStatus {
            name: "manifests in /etc/ferrule/manifests".to_owned(),
            complete: true,
            services: 42,
            endpoint_slices: 57,
            nodes: 3,
            service_cidrs: 1,
            last_event: Some(NOW - 250),
        },
        programmed: Programmed {
            services: 42,
            frontends: 118,
            rejecting: 0,
            dropping: 0,
            vips: 84,
            node_ports: 34,
            host_ports: 2,
            virtual_services: 118,
            real_servers: 310,
            routes: 4,
            node_addresses: vec!["192.0.2.7".to_owned(), "2001:db8::7".to_owned()],
            pending: 0,
            no_local_endpoints: counted(&[("internal", 0), ("external", 0)]),
        },
        last_change: Some(LastChange {
            at: NOW - 250,
            steps: 6,
            seen_to_kernel: 0.062,
            kernel: 0.003_1,
        }),
        pods: PodStatus {
            leases: 61,
            ranges: vec![
                range("10.244.1.0/24", 61, 192),
                range("fd00:10:244:1::/64", 61, 65_472),
            ],
            tidied: BTreeMap::from([("released".to_owned(), 2)]),
        },
        drift: Drift {
            repaired: counted(&[("route", 0)]),
            ..Drift::default()
        },
        audit: Audit {
            budget_percent: 0.3,
            done: 40,
            total: 118,
            rounds: 7_199,
            last_round: Some(36.0),
            round_estimate: Some(38.2),
            services_at: Some(NOW - 12),
            filter_at: Some(NOW - 12),
        },
        draining: ferrule_api::status::Draining::default(),
        failed_operations: 0,
        events: BTreeMap::new(),
        socket: ferrule_api::status::SocketStatus::default(),
        sysctls: Vec::new(),
        packets: Packets {
            counters: counted(&[("refusedTcp", 32), ("refusedOther", 0)]),
            masqueraded: counted(&[("hairpin", 4), ("podEgress", 90_210), ("viaVip", 0)]),
        },
        problems: Vec::new(),
        problem_count: 0,
        conditions: Vec::new(),
        condition_count: 0,
    }
}

fn broken() -> Status {
    let problem = |object: &str, problem: &str, remedy: &str, ago, attempts| Problem {
        object: object.to_owned(),
        problem: problem.to_owned(),
        remedy: remedy.to_owned(),
        since: NOW - ago,
        attempts,
    };
    let mut status = healthy();
    status.health = Health::Degraded;
    status.started = NOW - 730;
    status.problems = vec![
        problem(
            "Service default/web",
            "cannot add virtual service 10.96.0.10:80/TCP (rr): No such file or directory (os error 2)",
            "load the scheduler's module: modprobe ip_vs_rr; then it is tried again by itself",
            12,
            4,
        ),
        problem(
            "file /etc/ferrule/manifests/cache.yaml",
            "line 14: Service default/cache: spec.ports[0].port: 70000 is not a port number; give one from 1 to 65535; its last good state stays in use",
            "correct the file, or remove it",
            400,
            0,
        ),
    ];
    status.problem_count = 3;
    status.source.complete = false;
    status.programmed.rejecting = 2;
    status.programmed.pending = 3;
    status.pods.ranges[0] = range("10.244.1.0/24", 253, 0);
    status.drift = Drift {
        repaired: counted(&[("server", 2), ("route", 1)]),
        last: Some("route 10.244.2.0/24 was gone".to_owned()),
        last_at: Some(NOW - 95),
    };
    status.draining = ferrule_api::status::Draining {
        backends: 3,
        oldest: Some(95.0),
        bound: 600.0,
        failed: 2,
        ..ferrule_api::status::Draining::default()
    };
    status.audit.rounds = 0;
    status.audit.last_round = None;
    status.audit.round_estimate = None;
    status.conditions = vec![ObjectCondition {
        object: "Service default/legacy".to_owned(),
        reason: Reason::Unsupported.to_string(),
        message: "spec.sessionAffinity: connections are spread without affinity by this version; \
                  the rest of the Service is served, do without the field or give the Service to \
                  another proxy"
            .to_owned(),
    }];
    status.condition_count = 1;
    status
}

/// A node that knows nothing yet.
fn bare() -> Status {
    Status {
        source: SourceStatus {
            name: "manifests in /m".to_owned(),
            complete: true,
            ..SourceStatus::default()
        },
        programmed: Programmed::default(),
        last_change: None,
        pods: PodStatus::default(),
        drift: Drift::default(),
        audit: Audit::default(),
        draining: ferrule_api::status::Draining::default(),
        failed_operations: 0,
        events: BTreeMap::new(),
        socket: ferrule_api::status::SocketStatus::default(),
        sysctls: Vec::new(),
        packets: Packets::default(),
        started: NOW,
        ..healthy()
    }
}

#[test]
fn a_healthy_node() {
    expect![[r"
        healthy  node-a  ferrule-agent 0.1.0, up 3 d 4 h

        source       manifests in /etc/ferrule/manifests: 42 Services, 57 EndpointSlices, 3 Nodes,
                     1 ServiceCIDR; last event 4 min 10 s ago
        programmed   42 Services, 118 frontends
                     118 virtual services, 310 real servers, 84 VIPs, 4 routes
                     34 frontends on node ports of 192.0.2.7, 2001:db8::7
                     2 frontends on host ports of pods
        last change  4 min 10 s ago: 6 steps, 62 ms from seen to kernel, 3.1 ms of it in the kernel
        pods         61 leases
                     10.244.1.0/24: 61 used, 192 free
                     fd00:10:244:1::/64: 61 used, 65472 free
                     leases without a pod that ended: 2 since the agent started
        drift        none
        audit        round 7200: 40 of 118 virtual services compared; a full round takes 38 s at 0.3 % of a
                     core
                     last compared: services 12 s ago, nftables 12 s ago
        packets      refused TCP 32
                     masqueraded: hairpin 4, pod egress 90210
    "]].assert_eq(&text::render(&healthy(), &WIDE));
}

#[test]
fn a_broken_node() {
    expect![[r"
        DEGRADED  node-a: 3 problems

        Service default/web, for 12 s, tried 4 times
            cannot add virtual service 10.96.0.10:80/TCP (rr): No such file or directory (os error 2)
            remedy: load the scheduler's module: modprobe ip_vs_rr; then it is tried again by itself
        file /etc/ferrule/manifests/cache.yaml, for 6 min 40 s
            line 14: Service default/cache: spec.ports[0].port: 70000 is not a port number; give one from
            1 to 65535; its last good state stays in use
            remedy: correct the file, or remove it
        and 1 more problem that the agent does not list

        agent        ferrule-agent 0.1.0, up 12 min 10 s
        source       manifests in /etc/ferrule/manifests: 42 Services, 57 EndpointSlices, 3 Nodes,
                     1 ServiceCIDR; last event 4 min 10 s ago
                     not read completely yet: nothing is removed until it is
        programmed   42 Services, 118 frontends (2 without endpoints, refused)
                     118 virtual services, 310 real servers, 84 VIPs, 4 routes
                     34 frontends on node ports of 192.0.2.7, 2001:db8::7
                     2 frontends on host ports of pods
                     3 changes pending
        last change  4 min 10 s ago: 6 steps, 62 ms from seen to kernel, 3.1 ms of it in the kernel
        pods         61 leases
                     10.244.1.0/24: 253 used, 0 free
                     fd00:10:244:1::/64: 61 used, 65472 free
                     leases without a pod that ended: 2 since the agent started
        draining     3 leaving backends with old connections, the oldest for 1 min 35 s; 10 min after the
                     last sight of one they end
                     flows to backends that are gone could not be looked for 2 times
        drift        3 repaired: route 1, server 2
                     last 1 min 35 s ago: route 10.244.2.0/24 was gone
        audit        round 1: 40 of 118 virtual services compared at 0.3 % of a core
                     last compared: services 12 s ago, nftables 12 s ago
        packets      refused TCP 32
                     masqueraded: hairpin 4, pod egress 90210
        conditions   1 object served only in part
                     Service default/legacy: Unsupported: spec.sessionAffinity: connections are spread
                     without affinity by this version; the rest of the Service is served, do without the
                     field or give the Service to another proxy
    "]].assert_eq(&text::render(&broken(), &WIDE));
}

#[test]
fn a_node_that_knows_nothing_says_little() {
    expect![[r"
        healthy  node-a  ferrule-agent 0.1.0, up 0 s

        source       manifests in /m: nothing there
        programmed   nothing
        drift        none
    "]]
    .assert_eq(&text::render(&bare(), &WIDE));
}

#[test]
fn a_narrow_terminal_wraps_and_indents() {
    let look = Look { width: 48, ..WIDE };
    let text = text::render(&broken(), &look);
    expect![[r"
        DEGRADED  node-a: 3 problems

        Service default/web, for 12 s, tried 4 times
            cannot add virtual service 10.96.0.10:80/TCP
            (rr): No such file or directory (os error 2)
            remedy: load the scheduler's module:
            modprobe ip_vs_rr; then it is tried again by
            itself
        file /etc/ferrule/manifests/cache.yaml, for
        6 min 40 s
            line 14: Service default/cache:
            spec.ports[0].port: 70000 is not a port
            number; give one from 1 to 65535; its last
            good state stays in use
            remedy: correct the file, or remove it
        and 1 more problem that the agent does not list

        agent        ferrule-agent 0.1.0, up 12 min 10 s
        source       manifests in
                     /etc/ferrule/manifests:
                     42 Services, 57 EndpointSlices,
                     3 Nodes, 1 ServiceCIDR; last event
                     4 min 10 s ago
                     not read completely yet: nothing is
                     removed until it is
        programmed   42 Services, 118 frontends
                     (2 without endpoints, refused)
                     118 virtual services, 310 real
                     servers, 84 VIPs, 4 routes
                     34 frontends on node ports of
                     192.0.2.7, 2001:db8::7
                     2 frontends on host ports of pods
                     3 changes pending
        last change  4 min 10 s ago: 6 steps, 62 ms from
                     seen to kernel, 3.1 ms of it in the
                     kernel
        pods         61 leases
                     10.244.1.0/24: 253 used, 0 free
                     fd00:10:244:1::/64: 61 used,
                     65472 free
                     leases without a pod that ended:
                     2 since the agent started
        draining     3 leaving backends with old
                     connections, the oldest for 1 min
                     35 s; 10 min after the last sight
                     of one they end
                     flows to backends that are gone
                     could not be looked for 2 times
        drift        3 repaired: route 1, server 2
                     last 1 min 35 s ago: route
                     10.244.2.0/24 was gone
        audit        round 1: 40 of 118 virtual services
                     compared at 0.3 % of a core
                     last compared: services 12 s ago,
                     nftables 12 s ago
        packets      refused TCP 32
                     masqueraded: hairpin 4, pod egress
                     90210
        conditions   1 object served only in part
                     Service default/legacy:
                     Unsupported: spec.sessionAffinity:
                     connections are spread without
                     affinity by this version; the rest
                     of the Service is served, do
                     without the field or give the
                     Service to another proxy
    "]]
    .assert_eq(&text);
    for width in [32, 33, 60, 79] {
        let text = text::render(&broken(), &Look { width, ..WIDE });
        for line in text.lines() {
            assert!(line.chars().count() <= width, "{width}: {line}");
        }
    }
    let least = text::render(&broken(), &Look { width: 32, ..WIDE });
    let absurd = text::render(&broken(), &Look { width: 1, ..WIDE });
    assert_eq!(absurd, least);
}

#[test]
fn colours_say_what_matters_and_nothing_else() {
    let look = Look {
        palette: Palette::COLOURED,
        ..WIDE
    };
    let fine = text::render(&healthy(), &look);
    assert!(fine.starts_with("\u{1b}[1m\u{1b}[32mhealthy\u{1b}[0m  node-a  "));
    let text = text::render(&broken(), &look);
    assert!(text.starts_with("\u{1b}[1m\u{1b}[31mDEGRADED\u{1b}[0m  node-a: 3 problems\n"));
    for line in [
        "\u{1b}[1m\u{1b}[31mService default/web, for 12 s, tried 4 times\u{1b}[0m\n",
        "\u{1b}[36mdrift\u{1b}[0m        3 repaired",
        "             \u{1b}[33m3 changes pending\u{1b}[0m\n",
        "             \u{1b}[33m10.244.1.0/24: 253 used, 0 free\u{1b}[0m\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in {text}");
    }
    // Without its colours it is the text for a pipe.
    let mut bare = text;
    for code in ["0", "1", "31", "33", "36"] {
        bare = bare.replace(&format!("\u{1b}[{code}m"), "");
    }
    assert_eq!(bare, text::render(&broken(), &WIDE));
}

#[test]
fn foreign_text_cannot_act_on_the_terminal() {
    let evil = || "x\u{1b}]0;title\u{7}\u{9b}2J\r\u{202e}\ny".to_owned();
    let mut status = broken();
    status.node = evil();
    status.agent_version = evil();
    status.source.name = evil();
    status.programmed.node_addresses = vec![evil()];
    status.pods.ranges[0].range = evil();
    status.drift.repaired = counted(&[(&evil(), 1)]);
    status.drift.last = Some(evil());
    status.packets.counters = counted(&[(&evil(), 1)]);
    status.packets.masqueraded = counted(&[(&evil(), 1)]);
    status.problems = vec![Problem {
        object: evil(),
        problem: evil(),
        remedy: evil(),
        since: 0,
        attempts: u64::MAX,
    }];
    status.conditions = vec![ObjectCondition {
        object: evil(),
        reason: evil(),
        message: evil(),
    }];
    let acts = |char: char| char != '\n' && (char.is_control() || char == '\u{202e}');
    let text = text::render(&status, &WIDE);
    assert!(!text.contains(acts), "{text}");
    assert_eq!(text.matches(r"x\u{1b}]0;title").count(), 15, "{text}");
    let json = status_json(&status).unwrap();
    assert!(!json.contains(acts), "{json}");
    let back: Status = serde_json::from_str(&json).unwrap();
    assert_eq!(back, status);
}

#[test]
fn numbers_that_make_no_sense_are_shown_all_the_same() {
    let mut status = broken();
    status.now = 0;
    status.problem_count = 0;
    status.condition_count = 0;
    status.audit.rounds = u64::MAX;
    status.drift.repaired = counted(&[("route", u64::MAX), ("server", u64::MAX)]);
    status.last_change = Some(LastChange {
        at: u64::MAX,
        steps: usize::MAX,
        seen_to_kernel: -1.0,
        kernel: f64::MAX,
    });
    status.pods.ranges = vec![range("::/0", u64::MAX, u64::MAX)];
    let text = text::render(&status, &WIDE);
    assert!(text.contains("just now: 18446744073709551615 steps, 0.00 ms"));
    assert!(text.contains("::/0: over a million used, over a million free"));
}

#[test]
fn long_lists_are_cut_and_counted() {
    let mut status = broken();
    status.conditions = vec![status.conditions[0].clone(); 24];
    status.condition_count = 30;
    status.programmed.node_addresses = vec!["192.0.2.7".to_owned(); 20];
    let text = text::render(&status, &WIDE);
    assert!(text.contains("and 22 more; -o json lists 24\n"));
    assert!(text.contains("192.0.2.7 and 12 more"));
    assert_eq!(text.matches(": Unsupported: ").count(), 8);
}

#[test]
fn json_is_the_status_with_a_version() {
    let json = status_json(&broken()).unwrap();
    assert!(json.starts_with("{\n  \"version\": 1,\n  \"health\": \"degraded\",\n"));
    assert!(json.ends_with("}\n"));
    let value: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(value["problemCount"], 3);
    assert_eq!(value["problems"][0]["attempts"], 4);
    assert_eq!(value["lastChange"]["seenToKernel"], 0.062);
    // docs/status.md has a row for each field.
    let docs = include_str!("../../../docs/status.md");
    for field in value.as_object().unwrap().keys() {
        assert!(
            docs.contains(&format!("| `{field}` |")),
            "docs/status.md does not name {field}"
        );
    }
}

#[test]
fn without_an_answer_the_remedy_is_named() {
    let socket = Path::new("/run/x.sock");
    let connect = |kind: io::ErrorKind| ClientError::Connect {
        path: socket.to_owned(),
        source: kind.into(),
    };
    let cases = [
        (
            connect(io::ErrorKind::NotFound),
            "there is no socket /run/x.sock: is the agent running? See `systemctl status ferrule-agent` or the DaemonSet's pod on this node; if it listens elsewhere, give --socket",
        ),
        (
            connect(io::ErrorKind::ConnectionRefused),
            "nobody listens at /run/x.sock: is the agent running? ",
        ),
        (
            connect(io::ErrorKind::PermissionDenied),
            "this user may not ask the agent at /run/x.sock: run it as root",
        ),
        (
            ClientError::Closed,
            "the agent at /run/x.sock closed the connection without an answer: run this as root; ",
        ),
        (
            ClientError::Timeout { after: PATIENCE },
            "no answer from /run/x.sock: the agent did not answer within 10s; ",
        ),
        (
            ClientError::Protocol {
                source: FrameError::Empty,
            },
            "no answer from /run/x.sock: the agent's answer breaks the protocol",
        ),
    ];
    for (error, words) in cases {
        let said = no_answer(socket, &error);
        assert!(said.starts_with(words), "{said}");
    }
}

#[test]
fn sysctls_are_told_with_what_was_there_before() {
    let mut status = healthy();
    let sysctl = |name: &str, before: &str, problem: Option<&str>| SysctlStatus {
        name: name.to_owned(),
        before: Some(before.to_owned()),
        value: "2".to_owned(),
        problem: problem.map(str::to_owned),
    };
    status.sysctls = vec![
        sysctl("net.ipv4.conf.all.arp_announce", "0", None),
        sysctl(
            "net.netfilter.nf_conntrack_max",
            "1",
            Some("Permission denied"),
        ),
    ];
    let text = text::render(&status, &WIDE);
    for words in [
        "1 set: net.ipv4.conf.all.arp_announce 2 (was 0)",
        "net.netfilter.nf_conntrack_max not set to 2, stays 1: Permission denied",
    ] {
        assert!(text.contains(words), "{text}");
    }
}
