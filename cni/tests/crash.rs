//! `kill -9` after each step of ADD and DEL; the DEL that a runtime sends next
//! leaves nothing.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::fs;
use std::process::Command;

use ferrule_model::ownership;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use support::{Node, Pod, attachment, ip_json, our_links};

/// The steps of a verb, as the plugin itself lists them.
fn steps(verb: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO_BIN_EXE_ferrule"))
        .arg("--fault-steps")
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| {
            line.strip_prefix(verb)?
                .strip_prefix(' ')
                .map(str::to_owned)
        })
        .collect()
}

fn kill_at(node: &Node, verb: &str, pod: &Pod, step: &str) {
    let fault = [("FERRULE_FAULT_STEP", step)];
    let said = node.call_with(verb, "abc", &pod.path(), &fault);
    assert_eq!(said.code, None, "{verb} was not killed at {step}: {said:?}");
}

/// A pod with limits has one device more.
fn with_and_without_limits() -> [Value; 2] {
    let limits = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000,
        "egressRate": 8_000_000, "egressBurst": 800_000});
    [json!({}), json!({"runtimeConfig": {"bandwidth": limits}})]
}

#[test]
fn del_removes_what_a_killed_add_left() {
    for extra in with_and_without_limits() {
        let mut node = Node::new();
        node.extra = extra;
        removes_what_a_killed_add_left(&node);
    }
}

fn removes_what_a_killed_add_left(node: &Node) {
    let steps = steps("ADD");
    assert_eq!(steps.len(), 7, "{steps:?}");
    for step in &steps {
        let pod = Pod::new();
        kill_at(node, "ADD", &pod, step);
        node.del("abc", &pod.path());
        node.assert_clean();
        let left = pod.inside(|| ip_json("link show type veth"));
        assert!(left.as_array().unwrap().is_empty(), "{step}: {left}");
        // And nothing stands in the way of the next one.
        node.add("abc", &pod);
        node.del("abc", &pod.path());
        node.assert_clean();
    }
}

#[test]
fn del_without_the_agent_removes_what_a_killed_add_left() {
    let limited = with_and_without_limits();
    for (step, extra) in steps("ADD").iter().zip(limited.iter().rev().cycle()) {
        let mut node = Node::new();
        node.extra = extra.clone();
        let pod = Pod::new();
        kill_at(&node, "ADD", &pod, step);
        node.stop_agent();
        node.del("abc", "");
        node.start_agent();
        node.drain();
        node.assert_clean();
    }
}

#[test]
fn del_finishes_what_a_killed_del_began() {
    let mut node = Node::new();
    let [_, limits] = with_and_without_limits();
    node.extra = limits;
    let steps = steps("DEL");
    assert_eq!(steps.len(), 2, "{steps:?}");
    for step in &steps {
        let pod = Pod::new();
        node.add("abc", &pod);
        kill_at(&node, "DEL", &pod, step);
        node.del("abc", &pod.path());
        node.assert_clean();
    }
}

/// A killed plugin's lock ends with it; one that hangs is named.
#[test]
fn whoever_is_in_the_way_is_named_and_nothing_is_changed() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    let name = ownership::host_veth_name(&attachment("abc"));
    let path = node.socket().with_file_name("locks").join(name.as_str());
    let file = fs::File::create(&path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    for verb in ["DEL", "ADD"] {
        let patience = [("FERRULE_FAULT_PATIENCE", "50")];
        let error = node
            .call_with(verb, "abc", &pod.path(), &patience)
            .error(11);
        let said = error["msg"].as_str().unwrap();
        let us = format!("process {}, is at work on abc/eth0", std::process::id());
        assert!(said.contains(&us), "{verb}: {said}");
        assert_eq!((our_links().len(), node.agent.leases()), (1, 1));
        assert!(path.exists(), "{verb} took another's lock away");
    }
    // Its file stays, as that of a killed one does.
    drop(file);
    node.del("abc", &pod.path());
    node.assert_clean();
    assert!(!path.exists());
}

#[test]
fn an_unknown_step_kills_nothing() {
    let node = Node::new();
    let pod = Pod::new();
    let fault = [("FERRULE_FAULT_STEP", "none-such")];
    node.call_with("ADD", "abc", &pod.path(), &fault).result();
    for verb in ["CHECK", "VERSION"] {
        assert!(steps(verb).is_empty());
    }
}
