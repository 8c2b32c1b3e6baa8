//! ADD against the real kernel.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use ferrule_api::ErrorCode;
use serde_json::{Value, json};

use support::{
    MTU, Mood, NODE_V4, NODE_V6, Node, Pod, attachment, connect, dial, ip, ip_json, listen,
    our_links,
};

/// The addresses that the stand-in leases first.
const FIRST_V4: &str = "10.1.0.2";
const FIRST_V6: &str = "fd01::2";

fn link(name: &str) -> Value {
    ip_json(&format!("link show dev {name}"))[0].clone()
}

/// Routes of one device, without what the kernel adds to them.
fn routes(family: &str, device: &str) -> Vec<(String, Option<String>, String)> {
    ip_json(&format!("{family} route show dev {device}"))
        .as_array()
        .unwrap()
        .iter()
        .filter(|route| route["protocol"] != "kernel")
        .map(|route| {
            let text = |key: &str| route[key].as_str().map(str::to_owned);
            (
                text("dst").unwrap(),
                text("gateway"),
                text("protocol").unwrap(),
            )
        })
        .collect()
}

fn owned(dst: &str, gateway: Option<&str>, protocol: &str) -> (String, Option<String>, String) {
    (
        dst.to_owned(),
        gateway.map(str::to_owned),
        protocol.to_owned(),
    )
}

/// Permanent neighbour entries of a device: address and MAC.
fn neighbours(device: &str) -> Vec<(String, String)> {
    let mut all: Vec<_> = ip_json(&format!("neigh show dev {device} nud permanent"))
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let text = |key: &str| entry[key].as_str().unwrap().to_owned();
            (text("dst"), text("lladdr"))
        })
        .collect();
    all.sort();
    all
}

#[test]
fn makes_exactly_what_it_reports() {
    let node = Node::new();
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    let host_name = result["interfaces"][0]["name"].as_str().unwrap().to_owned();
    let host_mac = result["interfaces"][0]["mac"].as_str().unwrap().to_owned();
    let pod_mac = result["interfaces"][1]["mac"].as_str().unwrap().to_owned();
    assert_eq!(
        result,
        json!({
            "cniVersion": "1.0.0",
            "interfaces": [
                {"name": host_name, "mac": host_mac},
                {"name": "eth0", "mac": pod_mac, "sandbox": pod.path()},
            ],
            "ips": [
                {"address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 1},
                {"address": "fd01::2/128", "gateway": "fe80::1", "interface": 1},
            ],
            "routes": [
                {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
                {"dst": "::/0", "gw": "fe80::1"},
            ],
            "dns": {},
        })
    );

    // The host's end.
    let end = link(&host_name);
    assert_eq!(end["ifalias"], "ferrule abc eth0 pods");
    assert_eq!(end["address"], host_mac);
    assert_eq!(end["mtu"], MTU);
    assert_eq!(end["operstate"], "UP");
    assert_eq!(routes("-4", &host_name), [owned(FIRST_V4, None, "101")]);
    let v6: Vec<_> = routes("-6", &host_name);
    assert_eq!(v6, [owned(FIRST_V6, None, "101")]);
    assert_eq!(
        neighbours(&host_name),
        [
            (FIRST_V4.to_owned(), pod_mac.clone()),
            (FIRST_V6.to_owned(), pod_mac.clone())
        ]
    );
    for setting in ["ipv6/conf/NAME/accept_dad", "ipv4/conf/NAME/send_redirects"] {
        let path = format!("/proc/sys/net/{}", setting.replace("NAME", &host_name));
        assert_eq!(fs::read_to_string(&path).unwrap().trim(), "0", "{path}");
    }

    // The pod's end.
    pod.inside(|| {
        let end = link("eth0");
        assert_eq!(end["address"], pod_mac);
        assert_eq!(end["mtu"], MTU);
        assert_eq!(end["operstate"], "UP");
        assert!(
            link("lo")["flags"]
                .as_array()
                .unwrap()
                .contains(&json!("UP"))
        );
        let addresses = ip_json("addr show dev eth0 scope global");
        // iproute2 prints an empty object for each address that it filters out.
        let infos: Vec<_> = addresses[0]["addr_info"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|info| info["local"].is_string())
            .collect();
        let found: Vec<_> = infos
            .iter()
            .map(|info| {
                (
                    info["local"].as_str().unwrap(),
                    info["prefixlen"].as_u64().unwrap(),
                )
            })
            .collect();
        assert_eq!(found, [(FIRST_V4, 32), (FIRST_V6, 128)]);
        assert!(
            infos.iter().all(|info| info["tentative"].is_null()),
            "{infos:?}"
        );
        assert_eq!(
            routes("-4", "eth0"),
            [
                owned("default", Some("169.254.1.1"), "boot"),
                owned("169.254.1.1", None, "boot")
            ]
        );
        assert_eq!(
            routes("-6", "eth0"),
            [
                owned("fe80::1", None, "boot"),
                owned("default", Some("fe80::1"), "boot")
            ]
        );
        assert_eq!(
            neighbours("eth0"),
            [
                ("169.254.1.1".to_owned(), host_mac.clone()),
                ("fe80::1".to_owned(), host_mac.clone())
            ]
        );
    });
    node.del("abc", &pod.path());
    node.assert_clean();
}

#[test]
fn a_pod_and_its_node_reach_each_other_at_once() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    for (here, there) in [(NODE_V4, FIRST_V4), (NODE_V6, FIRST_V6)] {
        let seen = connect(|| listen(here), |target| pod.inside(|| dial(target)));
        assert_eq!(seen.to_string(), there);
        let seen = connect(|| pod.inside(|| listen(there)), dial);
        assert_eq!(seen.to_string(), here);
    }
}

#[test]
fn two_pods_reach_each_other_in_both_families() {
    let node = Node::new();
    let (one, two) = (Pod::new(), Pod::new());
    node.add("one", &one);
    node.add("two", &two);
    for (from, to) in [(FIRST_V4, "10.1.0.3"), (FIRST_V6, "fd01::3")] {
        let seen = connect(
            || two.inside(|| listen(to)),
            |target| one.inside(|| dial(target)),
        );
        assert_eq!(seen.to_string(), from);
    }
    node.del("one", &one.path());
    // The other is untouched.
    connect(|| listen(NODE_V6), |target| two.inside(|| dial(target)));
    node.del("two", &two.path());
    node.assert_clean();
}

#[test]
fn one_family_is_enough() {
    let node = Node::new();
    node.agent.lease(attachment("four"), &["10.1.0.44/32"]);
    node.agent.lease(attachment("six"), &["fd01::66/128"]);
    let (four, six) = (Pod::new(), Pod::new());
    let result = node.add("four", &four);
    assert_eq!(
        result["routes"],
        json!([{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}])
    );
    connect(|| listen(NODE_V4), |target| four.inside(|| dial(target)));
    node.add("six", &six);
    connect(|| listen(NODE_V6), |target| six.inside(|| dial(target)));
}

#[test]
fn ipv6_is_switched_on_where_the_runtime_had_it_off() {
    let node = Node::new();
    let pod = Pod::new();
    pod.inside(|| {
        for scope in ["all", "default"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").unwrap();
        }
    });
    fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    node.add("abc", &pod);
    let seen = connect(|| listen(NODE_V6), |target| pod.inside(|| dial(target)));
    assert_eq!(seen.to_string(), FIRST_V6);
}

#[test]
fn each_version_of_the_specification_gets_its_format() {
    let mut node = Node::new();
    for (version, family) in [
        ("0.3.1", json!("4")),
        ("0.4.0", json!("4")),
        ("1.0.0", Value::Null),
        ("1.1.0", Value::Null),
    ] {
        node.version = version;
        let pod = Pod::new();
        let result = node.add("abc", &pod);
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["ips"][0]["version"], family);
        node.del("abc", &pod.path());
    }
    node.assert_clean();
}

#[test]
fn the_configuration_overrides_the_mtu() {
    let mut node = Node::new();
    node.extra = json!({"mtu": 1300});
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    assert_eq!(
        link(result["interfaces"][0]["name"].as_str().unwrap())["mtu"],
        1300
    );
    assert_eq!(pod.inside(|| link("eth0"))["mtu"], 1300);
}

#[test]
fn an_interface_that_exists_is_left_alone() {
    let node = Node::new();
    let pod = Pod::new();
    pod.inside(|| ip("link add eth0 type veth peer name other"));
    let error = node.call("ADD", "abc", &pod.path()).error(101);
    assert!(
        error["msg"]
            .as_str()
            .unwrap()
            .contains("eth0 exists already"),
        "{error}"
    );
    pod.inside(|| ip("link show dev other"));
    node.assert_clean();

    // A second ADD must not take the first one's lease or link away.
    let pod = Pod::new();
    node.add("abc", &pod);
    node.call("ADD", "abc", &pod.path()).error(101);
    assert_eq!(node.agent.leases(), 1);
    connect(|| listen(NODE_V4), |target| pod.inside(|| dial(target)));
}

#[test]
fn many_at_once() {
    const PODS: usize = 40;
    let node = Node::new();
    let pods: Vec<Pod> = (0..PODS).map(|_| Pod::new()).collect();
    let all = |verb: &str| {
        std::thread::scope(|scope| {
            for (number, pod) in pods.iter().enumerate() {
                let node = &node;
                scope.spawn(move || {
                    node.call(verb, &format!("pod{number}"), &pod.path())
                        .result();
                });
            }
        });
    };
    all("ADD");
    assert_eq!(our_links().len(), PODS);
    assert_eq!(node.agent.leases(), PODS);
    let last = &pods[PODS - 1];
    connect(|| listen(NODE_V6), |target| last.inside(|| dial(target)));
    all("DEL");
    node.assert_clean();
}

#[test]
fn a_foreign_link_with_our_name_stops_add_and_survives() {
    let node = Node::new();
    let name = ferrule_model::ownership::host_veth_name(&attachment("abc"));
    ip(&format!("link add {name} type veth peer name foreign"));
    let pod = Pod::new();
    let error = node.call("ADD", "abc", &pod.path()).error(101);
    assert!(
        error["msg"].as_str().unwrap().contains(name.as_str()),
        "{error}"
    );
    ip("link show dev foreign");
    assert_eq!(node.agent.leases(), 0);
    assert_eq!(node.queued(), []);
}

#[test]
fn the_link_of_an_earlier_life_makes_way() {
    let node = Node::new();
    let (old, new) = (Pod::new(), Pod::new());
    node.add("abc", &old);
    old.inside(|| ip("link set eth0 down"));
    node.add("abc", &new);
    assert_eq!(our_links().len(), 1);
    assert!(
        old.inside(|| ip_json("link show type veth"))
            .as_array()
            .unwrap()
            .is_empty()
    );
    connect(|| listen(NODE_V4), |target| new.inside(|| dial(target)));
}

/// A pod lives by it, whatever the runtime has forgotten.
#[test]
fn the_link_of_a_pod_that_lives_stays_with_its_lease() {
    let mut node = Node::new();
    let (live, other) = (Pod::new(), Pod::new());
    let result = node.add("abc", &live);
    for (fields, code) in [
        (json!({}), 101),
        (json!({"prevResult": []}), 7),
        (json!({"prevResult": {"interfaces": [5]}}), 7),
        (json!({"mtu": 1000}), 101),
    ] {
        node.extra = fields;
        let error = node.call("ADD", "abc", &other.path()).error(code);
        let message = error["msg"].as_str().unwrap();
        if code == 101 {
            assert!(
                message.contains("has a network already") && message.contains("CNI_NETNS"),
                "{message}"
            );
        }
        assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
    }
    node.extra = json!({"prevResult": result});
    node.call("CHECK", "abc", &live.path()).result();
    connect(|| listen(NODE_V4), |target| live.inside(|| dial(target)));
    // Its namespace goes, once the kernel has closed the connection, and with it what was
    // in the way.
    node.extra = json!({});
    drop(live);
    let deadline = Instant::now() + Duration::from_secs(20);
    while node.call("ADD", "abc", &other.path()).code != Some(0) {
        assert!(Instant::now() < deadline, "the namespace is still in use");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
}

#[test]
fn a_lease_that_is_older_than_a_failed_add_stays() {
    let mut node = Node::new();
    let pod = Pod::new();
    let addresses = ["10.1.0.2/32", "fd01::2/128"];
    let foreign = format!("-6 route add {FIRST_V6}/128 dev uplink");
    for (mtu, foreign, code) in [(json!(1000), None, 7), (json!(null), Some(foreign), 101)] {
        node.extra = json!({"mtu": mtu});
        if let Some(foreign) = foreign {
            ip(&foreign);
        }
        node.agent.lease(attachment("old"), &addresses);
        node.call("ADD", "old", &pod.path()).error(code);
        assert_eq!(node.agent.leases(), 1, "the older lease has ended");
        node.agent.forget(&attachment("old"));
        node.call("ADD", "new", &pod.path()).error(code);
        node.assert_clean();
    }
}

#[test]
fn what_stands_before_us_is_looked_at_before_anything_is_made() {
    let mut node = Node::new();
    let pod = Pod::new();
    for (before, field) in [
        (json!([]), "prevResult of"),
        (json!({"interfaces": [5]}), "prevResult.interfaces[0] of"),
        (
            json!({"ips": [{"address": "zz"}]}),
            "prevResult.ips[0].address of",
        ),
        (
            json!({"ips": [{"address": "10.9.0.2/24", "interface": 99}]}),
            "prevResult.ips[0].interface of",
        ),
    ] {
        node.extra = json!({"prevResult": before});
        let error = node.call("ADD", "abc", &pod.path()).error(7);
        let message = error["msg"].as_str().unwrap();
        assert!(message.starts_with(field), "{message}");
        assert_eq!(
            *node.agent.ports.lock().unwrap(),
            None,
            "the agent was asked"
        );
        node.assert_clean();
    }
}

#[test]
fn a_namespace_has_one_interface_of_ours() {
    let node = Node::new();
    let pod = Pod::new();
    let named = |name| [("CNI_IFNAME", name)];
    let add = |container, name| node.call_with("ADD", container, &pod.path(), &named(name));
    add("abc", "e0").result();
    for container in ["abc", "xyz"] {
        let error = add(container, "e1").error(101);
        let message = error["msg"].as_str().unwrap();
        assert!(
            message.contains("has interface e0 by ferrule already, that of abc/e0"),
            "{message}"
        );
        assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
    }
    connect(|| listen(NODE_V4), |target| pod.inside(|| dial(target)));
    node.call_with("DEL", "abc", &pod.path(), &named("e0"))
        .result();
    add("abc", "e1").result();
    node.call_with("DEL", "abc", &pod.path(), &named("e1"))
        .result();
    // Another plugin's veth is none of ours.
    ip("link add host0 type veth peer name net1");
    ip(&format!("link set net1 netns {}", pod.path()));
    add("abc", "e1").result();
}

#[test]
fn a_failure_half_way_takes_everything_back() {
    let node = Node::new();
    let pod = Pod::new();
    // The last order of all: somebody else has the route to the pod's address.
    ip(&format!("-6 route add {FIRST_V6}/128 dev uplink"));
    let error = node.call("ADD", "abc", &pod.path()).error(101);
    let message = error["msg"].as_str().unwrap();
    assert!(message.contains("route to fd01::2/128"), "{message}");
    assert_eq!(error["details"], "");
    node.assert_clean();
    assert!(
        pod.inside(|| ip_json("link show type veth"))
            .as_array()
            .unwrap()
            .is_empty()
    );
    // The foreign route is still there.
    assert_eq!(routes("-6", "uplink"), [owned(FIRST_V6, None, "boot")]);
}

#[test]
fn without_the_agent_it_fails_quickly_and_can_be_tried_again() {
    let node = Node::without_agent();
    let pod = Pod::new();
    let started = Instant::now();
    let error = node.call("ADD", "abc", &pod.path()).error(11);
    assert!(started.elapsed().as_secs() < 2);
    let message = error["msg"].as_str().unwrap();
    assert!(
        message.contains("agent.sock") && message.contains("ferrule-agent"),
        "{message}"
    );
    node.assert_clean();
    node.start_agent();
    node.add("abc", &pod);
}

#[test]
fn what_the_agent_refuses_is_passed_on() {
    let node = Node::new();
    let pod = Pod::new();
    for (refusal, code) in [
        (ErrorCode::NotReady, 11),
        (ErrorCode::PoolExhausted, 11),
        (ErrorCode::BadRequest, 100),
        (ErrorCode::Internal, 100),
        (ErrorCode::PortTaken, 101),
        (ErrorCode::Unsupported, 2),
    ] {
        node.agent.set(Mood::Refuses(refusal));
        let error = node.call("ADD", "abc", &pod.path()).error(code);
        assert!(
            error["msg"].as_str().unwrap().contains("says the stand-in"),
            "{error}"
        );
        node.assert_clean();
    }
}

#[test]
fn an_agent_that_talks_rubbish_is_named_and_no_lease_is_lost() {
    let node = Node::new();
    let pod = Pod::new();
    for text in [
        "\u{0}\n",
        "{\"version\":7}\n",
        "{\"version\":1,\"answer\":\"released\"}\n",
        "{\"version\":1,\"answer\":\"allocated\",\"addresses\":[\"10.0.0.0/8\"],\"mtu\":1500}\n",
        "{\"version\":1,\"answer\":\"allocated\",\"addresses\":[],\"mtu\":1500}\n",
    ] {
        node.agent.set(Mood::Says(text.to_owned()));
        let error = node.call("ADD", "abc", &pod.path()).error(100);
        assert!(error["msg"].as_str().unwrap().contains("agent"), "{error}");
        assert_eq!(our_links(), Vec::<String>::new());
    }
    // An agent that leased and died: the release waits for the next one.
    node.agent.set(Mood::HangsUp);
    node.call("ADD", "xyz", &pod.path()).error(11);
    node.agent.set(Mood::Works);
    node.drain();
    node.assert_clean();
}

#[test]
fn a_release_that_waits_does_not_end_the_lease_of_a_new_life() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    node.stop_agent();
    node.del("abc", &pod.path());
    assert_eq!(node.queued().len(), 1);
    node.start_agent();
    node.add("abc", &pod);
    assert_eq!(node.queued(), []);
    node.drain();
    assert_eq!(node.agent.leases(), 1);
}

#[test]
fn an_output_that_nobody_reads_is_a_failed_add() {
    use std::process::{Command, Stdio};
    let node = Node::new();
    let pod = Pod::new();
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferrule"))
        .env_clear()
        .env("CNI_COMMAND", "ADD")
        .env("CNI_CONTAINERID", "abc")
        .env("CNI_IFNAME", "eth0")
        .env("CNI_NETNS", pod.path())
        .stdin(Stdio::piped())
        .stdout(full)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    serde_json::to_writer(child.stdin.take().unwrap(), &node.config()).unwrap();
    assert!(!child.wait().unwrap().success());
    node.assert_clean();
}

#[test]
fn host_ports_are_passed_on_and_wrong_ones_refused_before_anything_is_made() {
    let mut node = Node::new();
    let pod = Pod::new();
    let mapping = |protocol| {
        json!({"runtimeConfig": {"portMappings": [
            {"hostPort": 8080, "containerPort": 80, "protocol": protocol, "hostIP": "192.0.2.1"},
        ]}})
    };
    node.extra = mapping("icmp");
    let error = node.call("ADD", "abc", &pod.path()).error(7);
    let message = error["msg"].as_str().unwrap();
    let field = "runtimeConfig.portMappings[0].protocol";
    assert!(message.contains(field), "{message}");
    assert_eq!(
        *node.agent.ports.lock().unwrap(),
        None,
        "the agent was asked"
    );
    node.assert_clean();
    // A pod that never was must be deletable with the same configuration.
    node.del("abc", &pod.path());
    node.extra = mapping("UDP");
    node.add("abc", &pod);
    let ports = node.agent.ports.lock().unwrap().clone();
    assert_eq!(
        serde_json::to_value(ports).unwrap(),
        json!([
            {"hostIP": "192.0.2.1", "hostPort": 8080, "containerPort": 80, "protocol": "UDP"}
        ])
    );
}
