//! GC, STATUS, and what a runtime asks for one pod.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use ferrule_api::ErrorCode;
use serde_json::{Value, json};

use support::{Mood, Node, Pod, attachment, ip, ip_json, our_links};

fn gc(node: &mut Node, valid: &[&str]) -> Value {
    let valid: Vec<Value> = valid
        .iter()
        .map(|container| json!({"containerID": container, "ifname": "eth0"}))
        .collect();
    node.extra["cni.dev/valid-attachments"] = valid.into();
    let said = node.call("GC", "", "");
    node.extra = json!({});
    said.result()
}

fn node() -> Node {
    let mut node = Node::new();
    node.version = "1.1.0";
    node
}

#[test]
fn what_is_not_in_use_goes_and_nothing_else() {
    let mut node = node();
    let pods: Vec<(String, Pod)> = (0..4).map(|n| (format!("c{n}"), Pod::new())).collect();
    for (container, pod) in &pods {
        node.add(container, pod);
    }
    // Another network of the same agent, and a stranger whose name begins like ours.
    node.extra = json!({"name": "other"});
    let other = Pod::new();
    node.add("other", &other);
    node.extra = json!({});
    ip("link add feraaaaaaaaaaaa type veth peer name strange");
    ip("link set feraaaaaaaaaaaa alias uplink");
    assert_eq!(gc(&mut node, &["c0", "c2"]), Value::Null);
    assert_eq!(our_links().len(), 4);
    assert_eq!(node.agent.leases(), 3);
    assert_eq!(gc(&mut node, &["c0", "c2"]), Value::Null, "again");
    assert_eq!(our_links().len(), 4);
    for (container, pod) in [&pods[1], &pods[3]] {
        let links = pod.inside(|| ip_json("link show type veth"));
        assert_eq!(links, json!([]), "{container}");
    }
    node.del("other", &other.path());
    // A reboot: nothing is in use.
    assert_eq!(gc(&mut node, &[]), Value::Null);
    assert_eq!(our_links(), ["feraaaaaaaaaaaa"], "a stranger was taken");
    assert_eq!(node.agent.leases(), 0);
}

#[test]
fn leases_without_interfaces_and_interfaces_without_leases() {
    let mut node = node();
    let pod = Pod::new();
    node.add("orphan", &pod);
    let gone = Pod::new();
    node.add("gone", &gone);
    // The agent has lost it; nothing but the alias says whose it is.
    node.agent.forget(&attachment("orphan"));
    let name = ferrule_model::ownership::host_veth_name(&attachment("gone"));
    ip(&format!("link del {name}"));
    // A killed ADD left this one without an alias: its lease says whose it is.
    let half = Pod::new();
    let fault = [("FERRULE_FAULT_STEP", "link-made")];
    if cfg!(feature = "fault-injection") {
        let said = node.call_with("ADD", "half", &half.path(), &fault);
        assert_eq!(said.code, None, "{said:?}");
    }
    assert_eq!(gc(&mut node, &[]), Value::Null);
    node.assert_clean();
}

#[test]
fn gc_keeps_the_lease_of_an_interface_whose_alias_was_changed() {
    let mut node = node();
    let pods = ["abc", "def"].map(|container| (container, Pod::new()));
    for (container, pod) in &pods {
        node.add(container, pod);
    }
    let name = ferrule_model::ownership::host_veth_name(&attachment("abc"));
    ip(&format!("link set {name} alias uplink"));
    node.extra = json!({"cni.dev/valid-attachments": []});
    let error = node.call("GC", "", "").error(5);
    let said = error["msg"].as_str().unwrap();
    assert!(said.contains(name.as_str()), "{error}");
    assert_eq!(our_links(), [name.as_str()]);
    assert_eq!(node.agent.leases(), 1);
    ip(&format!("link del {name}"));
    assert_eq!(gc(&mut node, &[]), Value::Null);
    node.assert_clean();
}

#[test]
fn gc_without_the_agent_changes_nothing() {
    let mut node = node();
    let pod = Pod::new();
    node.add("abc", &pod);
    node.stop_agent();
    node.extra = json!({"cni.dev/valid-attachments": []});
    node.call("GC", "", "").error(11);
    assert_eq!(our_links().len(), 1);
    node.extra = json!({});
    let error = node.call("GC", "", "").error(7);
    assert!(error["msg"].as_str().unwrap().contains("valid-attachments"));
}

#[test]
fn status_says_whether_an_add_would_work() {
    let node = node();
    assert_eq!(node.call("STATUS", "", "").result(), Value::Null);
    for (code, expected) in [
        (ErrorCode::PoolExhausted, Some(50)),
        (ErrorCode::NotReady, Some(50)),
        (ErrorCode::Internal, Some(50)),
        (ErrorCode::Disconnected, Some(51)),
        // An agent that does not know the question.
        (ErrorCode::BadRequest, None),
    ] {
        node.agent.set(Mood::Refuses(code));
        let said = node.call("STATUS", "", "");
        match expected {
            None => assert_eq!(said.result(), Value::Null),
            Some(expected) => drop(said.error(expected)),
        }
    }
    node.agent.set(Mood::Says("{}\n".to_owned()));
    node.call("STATUS", "", "").error(50);
    node.stop_agent();
    node.call("STATUS", "", "").error(50);
}

#[test]
fn a_pod_gets_the_addresses_and_the_mac_that_are_asked_for() {
    let mut node = node();
    let pod = Pod::new();
    node.extra = json!({"runtimeConfig": {"ips": ["10.1.0.77/24"], "mac": "02:ab:cd:00:00:01"}});
    let result = node.add("abc", &pod);
    assert_eq!(result["ips"][0]["address"], "10.1.0.77/32");
    assert_eq!(result["interfaces"][1]["mac"], "02:ab:cd:00:00:01");
    let link = pod.inside(|| ip_json("link show eth0"));
    assert_eq!(link[0]["address"], "02:ab:cd:00:00:01");
    let neighbours = ip_json("neigh show to 10.1.0.77");
    assert_eq!(neighbours[0]["lladdr"], "02:ab:cd:00:00:01");
    node.extra["prevResult"] = result;
    assert_eq!(node.call("CHECK", "abc", &pod.path()).result(), Value::Null);
    node.del("abc", &pod.path());
    node.assert_clean();
    node.agent.set(Mood::Refuses(ErrorCode::AddressTaken));
    node.extra = json!({"runtimeConfig": {"ips": ["10.1.0.77"]}});
    node.call("ADD", "abc", &pod.path()).error(101);
    node.assert_clean();
}

/// Another plugin has been at work before us, in the same namespace.
#[test]
fn the_result_of_a_plugin_before_us_is_passed_on() {
    for version in ["0.4.0", "1.0.0"] {
        let mut node = node();
        node.version = version;
        let pod = Pod::new();
        pod.inside(|| {
            ip("link add tap0 type veth peer name tap1");
            ip("addr add 192.168.9.2/24 dev tap0");
        });
        let mut address = json!({"address": "192.168.9.2/24", "interface": 0});
        if version == "0.4.0" {
            address["version"] = "4".into();
        }
        let before = json!({
            "cniVersion": version,
            "interfaces": [{"name": "tap0", "sandbox": pod.path()}],
            "ips": [address],
            "dns": {"nameservers": ["10.96.0.10"]},
        });
        node.extra = json!({"prevResult": before});
        let result = node.add("abc", &pod);
        assert_eq!(result["interfaces"][0], before["interfaces"][0]);
        assert_eq!(result["interfaces"][2]["name"], "eth0");
        assert_eq!(result["ips"][1]["interface"], 2);
        assert_eq!(result["dns"], before["dns"]);
        node.extra = json!({"prevResult": result});
        assert_eq!(node.call("CHECK", "abc", &pod.path()).result(), Value::Null);
        node.del("abc", &pod.path());
        node.assert_clean();
    }
}
