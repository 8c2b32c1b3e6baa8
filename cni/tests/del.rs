//! DEL: whatever state things are in, it works and leaves nothing.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::fs;

use ferrule_api::ErrorCode;
use ferrule_model::ownership;
use serde_json::json;

use support::{Mood, Node, Pod, attachment, ip, our_links};

#[test]
fn twice_and_without_an_add_before() {
    let node = Node::new();
    let pod = Pod::new();
    node.del("never", &pod.path());
    node.add("abc", &pod);
    node.del("abc", &pod.path());
    node.assert_clean();
    node.del("abc", &pod.path());
    node.assert_clean();
}

#[test]
fn with_the_namespace_gone_or_not_named() {
    let node = Node::new();
    for netns in ["", "/run/netns/that-never-was"] {
        let pod = Pod::new();
        node.add("abc", &pod);
        node.del("abc", netns);
        node.assert_clean();
        drop(pod);
    }
    let pod = Pod::new();
    let path = pod.path();
    node.add("abc", &pod);
    drop(pod);
    node.del("abc", &path);
    node.assert_clean();
}

#[test]
fn with_or_without_a_previous_result() {
    let mut node = Node::new();
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    for previous in [result, json!({"cniVersion": "1.0.0", "interfaces": "odd"})] {
        node.extra = json!({"prevResult": previous});
        node.del("abc", &pod.path());
        node.assert_clean();
    }
}

#[test]
fn without_the_agent_the_release_waits_on_disk() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    node.stop_agent();
    node.del("abc", &pod.path());
    node.del("abc", &pod.path());
    assert_eq!(our_links(), Vec::<String>::new());
    let queued = node.queued();
    assert_eq!(queued.len(), 1);
    assert_eq!(queued[0].1, attachment("abc"));
    node.start_agent();
    node.drain();
    node.assert_clean();
}

#[test]
fn an_agent_that_fails_does_not_fail_it() {
    let node = Node::new();
    let pod = Pod::new();
    for mood in [
        Mood::Refuses(ErrorCode::NotReady),
        Mood::Refuses(ErrorCode::Internal),
        Mood::Says("rubbish\n".to_owned()),
        Mood::HangsUp,
    ] {
        node.agent.set(Mood::Works);
        node.add("abc", &pod);
        node.agent.set(mood);
        node.del("abc", &pod.path());
        assert_eq!(node.queued().len(), 1);
        node.agent.set(Mood::Works);
        node.drain();
        node.assert_clean();
    }
}

#[test]
fn without_agent_and_queue_it_fails_so_that_the_runtime_tries_again() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    node.stop_agent();
    // Where the state folder should be there is a file.
    let _ = fs::remove_dir_all(node.state_dir());
    fs::write(node.state_dir(), "").unwrap();
    let error = node.call("DEL", "abc", &pod.path()).error(5);
    assert!(
        error["msg"].as_str().unwrap().contains("abc/eth0"),
        "{error}"
    );
    fs::remove_file(node.state_dir()).unwrap();
    node.start_agent();
    node.del("abc", &pod.path());
    node.assert_clean();
}

#[test]
fn a_foreign_link_with_our_name_survives() {
    let node = Node::new();
    let name = ownership::host_veth_name(&attachment("abc"));
    ip(&format!("link add {name} type veth peer name foreign"));
    node.del("abc", "");
    ip("link show dev foreign");
    // Another's alias is no proof either.
    ip(&format!("link set {name} alias uplink"));
    node.del("abc", "");
    ip("link show dev foreign");
    // With our alias it is ours.
    let alias = ownership::device_alias(&attachment("abc"), None);
    let status = std::process::Command::new("ip")
        .args(["link", "set", name.as_str(), "alias", &alias])
        .status()
        .unwrap();
    assert!(status.success());
    node.del("abc", "");
    node.assert_clean();
}

/// A pod whose host end somebody has given another alias; the name of that end.
fn altered(node: &Node, pod: &Pod) -> String {
    node.add("abc", pod);
    let name = ownership::host_veth_name(&attachment("abc")).to_string();
    ip(&format!("link set {name} alias lb-uplink"));
    name
}

#[test]
fn a_changed_alias_is_overlooked_where_the_pods_end_is_seen() {
    let mut node = Node::new();
    let limits = json!({"egressRate": 8_000_000, "egressBurst": 800_000});
    node.extra = json!({"runtimeConfig": {"bandwidth": limits}});
    let pod = Pod::new();
    altered(&node, &pod);
    // Another interface of that namespace is no proof.
    pod.inside(|| ip("link add eth1 type veth peer name eth2"));
    let other = Pod::new();
    other.inside(|| ip("link add eth0 type veth peer name eth2"));
    node.call("DEL", "abc", &other.path()).error(11);
    assert_eq!(node.agent.leases(), 1);
    node.del("abc", &pod.path());
    node.assert_clean();
}

#[test]
fn a_changed_alias_keeps_the_lease_until_somebody_has_looked() {
    let node = Node::new();
    let pod = Pod::new();
    let name = altered(&node, &pod);
    for _ in 0..2 {
        let error = node.call("DEL", "abc", "").error(11);
        let said = error["msg"].as_str().unwrap();
        for words in [
            name.as_str(),
            "\"lb-uplink\"",
            "\"ferrule abc eth0\"",
            "abc/eth0",
        ] {
            assert!(said.contains(words), "{words}: {said}");
        }
        assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
        assert_eq!(node.queued(), []);
    }
    // Nor does an ADD in another namespace, or its undoing, end it.
    let second = Pod::new();
    node.call("ADD", "abc", &second.path()).error(11);
    assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
    // With the namespace it goes by itself.
    pod.inside(|| ip("link del eth0"));
    node.del("abc", "");
    node.assert_clean();
    // Or somebody does what the message says.
    let name = altered(&node, &pod);
    let alias = ["link", "set", &name, "alias", "ferrule abc eth0"];
    let status = std::process::Command::new("ip").args(alias).status();
    assert!(status.unwrap().success());
    node.del("abc", "");
    node.assert_clean();
}

#[test]
fn only_the_named_interface_goes() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    let other = node.call_with("DEL", "abc", &pod.path(), &[("CNI_IFNAME", "eth1")]);
    other.result();
    assert_eq!(our_links().len(), 1);
    assert_eq!(node.agent.leases(), 1);
}
