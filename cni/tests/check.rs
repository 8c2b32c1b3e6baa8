//! CHECK and STATUS.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use ferrule_api::ErrorCode;
use serde_json::{Value, json};

use support::{Mood, Node, Pod, attachment, ip};

fn added() -> (Node, Pod, Value) {
    let mut node = Node::new();
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    node.extra = json!({"prevResult": result});
    (node, pod, result)
}

fn difference(node: &Node, pod: &Pod) -> String {
    let error = node.call("CHECK", "abc", &pod.path()).error(102);
    error["msg"].as_str().unwrap().to_owned()
}

#[test]
fn what_add_made_passes() {
    let (mut node, pod, result) = added();
    node.call("CHECK", "abc", &pod.path()).result();
    node.version = "0.4.0";
    node.call("CHECK", "abc", &pod.path()).result();
    // Plugins after us add to the result.
    let mut more = result;
    more["interfaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"name": "ifb0"}));
    let ip = json!({"address": "10.9.9.9/24", "interface": 2});
    more["ips"].as_array_mut().unwrap().push(ip);
    node.extra = json!({"prevResult": more});
    node.call("CHECK", "abc", &pod.path()).result();
}

#[test]
fn each_difference_is_named() {
    for (broken, words) in [
        ("addr del 10.1.0.2/32 dev eth0", "address 10.1.0.2/32"),
        ("-6 addr del fd01::2/128 dev eth0", "address fd01::2/128"),
        ("route del default", "route to 0.0.0.0/0"),
        ("-6 route del default", "route to ::/0"),
        ("link set eth0 down", "eth0 is down"),
        (
            "link set eth0 address 02:00:00:00:00:01",
            "MAC 02:00:00:00:00:01",
        ),
        ("link set eth0 mtu 9000", "eth0 has MTU 9000"),
        (
            "neigh del 169.254.1.1 dev eth0",
            "neighbour entry for 169.254.1.1 is missing",
        ),
        (
            "neigh replace fe80::1 lladdr 02:00:00:00:00:01 nud permanent dev eth0",
            "neighbour entry for fe80::1 has MAC 02:00:00:00:00:01 instead of",
        ),
    ] {
        let (node, pod, _) = added();
        pod.inside(|| ip(broken));
        let said = difference(&node, &pod);
        assert!(said.contains(words), "{broken}: {said}");
    }
    let (node, pod, result) = added();
    let host = result["interfaces"][0]["name"].as_str().unwrap();
    ip(&format!("route del 10.1.0.2 dev {host}"));
    assert!(difference(&node, &pod).contains("node's route to 10.1.0.2"));
    ip(&format!("link del {host}"));
    let said = difference(&node, &pod);
    assert!(said.contains("eth0 of the pod is missing"), "{said}");
    assert!(said.contains(host), "{said}");
}

/// What other plugins of the list made: ADD accepts it, and it is not ours to judge,
/// but for routes that are gone.
#[test]
fn what_other_plugins_made() {
    let mut node = Node::new();
    let pod = Pod::new();
    pod.inside(|| {
        ip("link add net1 type veth peer name far");
        ip("addr add 10.9.0.2/24 dev net1");
        ip("link set far up");
        ip("link set net1 up");
        ip("route add default via 10.9.0.1 dev net1 metric 100");
        ip("route add 10.8.0.0/16 via 10.9.0.1 dev net1 table 77");
    });
    node.extra = json!({"prevResult": {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net1", "sandbox": pod.path()}],
        "ips": [{"address": "10.9.0.2/24", "gateway": "10.9.0.1"}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.9.0.1"}, {"dst": "10.8.0.0/16", "gw": "10.9.0.1"}],
    }});
    let result = node.add("abc", &pod);
    node.extra = json!({"prevResult": result});
    node.call("CHECK", "abc", &pod.path()).result();
    pod.inside(|| ip("route del 10.8.0.0/16 table 77"));
    let said = difference(&node, &pod);
    assert!(said.contains("route to 10.8.0.0/16"), "{said}");
    pod.inside(|| ip("route add 10.8.0.0/16 via 10.9.0.1 dev net1 table 77"));
    node.call("CHECK", "abc", &pod.path()).result();
    pod.inside(|| ip("route del default dev eth0"));
    assert!(difference(&node, &pod).contains("route to 0.0.0.0/0"));
}

/// Since 1.1.0 the result tells the MTU.
#[test]
fn an_mtu_that_was_reported_is_compared() {
    let mut node = Node::new();
    node.version = "1.1.0";
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    node.extra = json!({"prevResult": result});
    node.call("CHECK", "abc", &pod.path()).result();
    pod.inside(|| ip("link set eth0 mtu 1300"));
    assert!(difference(&node, &pod).contains("eth0 has MTU 1300 instead of"));
}

#[test]
fn the_lease_is_compared_as_well() {
    let (node, pod, _) = added();
    node.agent
        .lease(attachment("abc"), &["10.1.0.9/32", "fd01::2/128"]);
    let said = difference(&node, &pod);
    let words = "address 10.1.0.2/32 is not leased to it, but 10.1.0.9/32 and fd01::2/128";
    assert!(
        said.contains(words) && !said.contains("address fd01"),
        "{said}"
    );
    node.agent.forget(&attachment("abc"));
    let said = difference(&node, &pod);
    assert!(said.contains("no lease"), "{said}");
    // An older agent does not know the question, one that fails cannot say.
    node.agent.set(Mood::Refuses(ErrorCode::BadRequest));
    node.call("CHECK", "abc", &pod.path()).result();
    for mood in [Mood::Refuses(ErrorCode::Internal), Mood::HangsUp] {
        node.agent.set(mood);
        node.call("CHECK", "abc", &pod.path()).error(11);
    }
    node.agent.set(Mood::Says("{}\n".to_owned()));
    node.call("CHECK", "abc", &pod.path()).error(11);
    node.stop_agent();
    let error = node.call("CHECK", "abc", &pod.path()).error(11);
    assert!(error["msg"].as_str().unwrap().contains("cannot be seen"));
    // What is amiss for sure is told all the same.
    pod.inside(|| ip("link set eth0 down"));
    assert!(difference(&node, &pod).contains("eth0 is down"));
}

#[test]
fn host_ports_are_part_of_the_lease() {
    let (mut node, pod, result) = added();
    let mappings = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "udp"}]);
    node.extra = json!({"prevResult": result, "runtimeConfig": {"portMappings": mappings}});
    let said = difference(&node, &pod);
    assert!(said.contains("host port 8080/UDP is not leased"), "{said}");
    node.del("abc", &pod.path());
    let result = node.add("abc", &pod);
    node.extra["prevResult"] = result;
    node.call("CHECK", "abc", &pod.path()).result();
}

#[test]
fn a_changed_alias_is_named() {
    let (node, pod, result) = added();
    let host = result["interfaces"][0]["name"].as_str().unwrap();
    ip(&format!("link set {host} alias uplink"));
    assert!(difference(&node, &pod).contains("has the alias \"uplink\""));
}

#[test]
fn what_it_needs() {
    let (mut node, pod, result) = added();
    node.extra = json!({});
    node.call("CHECK", "abc", &pod.path()).error(7);
    node.extra = json!({"prevResult": {"ips": [{"address": "x"}]}});
    node.call("CHECK", "abc", &pod.path()).error(7);
    node.extra = json!({"prevResult": result});
    node.call("CHECK", "abc", "/run/netns/that-never-was")
        .error(3);
    node.version = "0.3.1";
    node.call("CHECK", "abc", &pod.path()).error(1);
}

#[test]
fn status_says_whether_the_agent_is_there() {
    let mut node = Node::new();
    node.version = "1.1.0";
    assert_eq!(node.call("STATUS", "", "").result(), Value::Null);
    node.stop_agent();
    let error = node.call("STATUS", "", "").error(50);
    assert!(error["msg"].as_str().unwrap().contains("agent.sock"));
    node.version = "1.0.0";
    node.call("STATUS", "", "").error(1);
}
