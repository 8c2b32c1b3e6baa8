//! `kill -9` after each step of ADD and DEL; the DEL that a runtime sends next
//! leaves nothing.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::process::Command;

use serde_json::{Value, json};

use support::{Node, Pod, ip_json};

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
