//! The plugin at its edge: what it does with calls that are not right.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use serde_json::json;

use support::{Node, Pod, run};

const CONFIG: &[u8] = br#"{"cniVersion":"0.4.0","name":"pods","type":"ferrule"}"#;

#[test]
fn a_person_is_told_what_it_is() {
    let said = run(&[], b"");
    assert_eq!(said.code, Some(1));
    assert_eq!(said.stdout, "");
    assert_eq!(said.stderr.lines().count(), 2);
    assert!(said.stderr.contains("CNI plugin"));
}

#[test]
fn version_needs_nothing_else() {
    let command = [("CNI_COMMAND", "VERSION")];
    for input in [&b""[..], CONFIG] {
        let reply = run(&command, input).result();
        assert_eq!(
            reply["supportedVersions"],
            json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
        );
    }
}

#[test]
fn verbs_that_are_none() {
    let said = run(&[("CNI_COMMAND", "FROB")], CONFIG);
    let error = said.error(4);
    assert_eq!(error["cniVersion"], "0.4.0");
    assert!(
        error["msg"]
            .as_str()
            .unwrap()
            .contains("CNI_COMMAND is \"FROB\"")
    );
}

#[test]
fn an_environment_that_is_not_right_is_named() {
    let good = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "abc"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_NETNS", "/run/netns/that-never-was"),
    ];
    let error = run(&good, CONFIG).error(3);
    assert!(error["msg"].as_str().unwrap().contains("CNI_NETNS"));
    for (variable, value) in [
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../etc"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "eth0/../../x"),
        ("CNI_IFNAME", "sixteen_bytes___"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=a;K8S_POD_NAME=b\nc"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=a;K8S_POD_NAME=.."),
    ] {
        let mut variables = good.to_vec();
        variables.push((variable, value));
        let error = run(&variables, CONFIG).error(4);
        assert!(error["msg"].as_str().unwrap().contains(variable), "{error}");
    }
}

#[test]
fn an_input_that_is_not_right_is_named() {
    let variables = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", "abc"),
        ("CNI_IFNAME", "eth0"),
    ];
    run(&variables, b"").error(6);
    run(&variables, b"\xff").error(6);
    run(&variables, &vec![b' '; (1 << 20) + 1]).error(6);
    run(&variables, b"{}").error(1);
    run(&variables, br#"{"cniVersion":"0.2.0"}"#).error(1);
    run(&variables, br#"{"cniVersion":"1.0.0","stateDir":"x"}"#).error(7);
}

#[test]
fn files_that_are_no_pods_namespace() {
    let mut node = Node::new();
    for (path, code) in [
        ("/dev/null", 4),
        ("/etc/hostname", 4),
        ("/proc/self/ns/net", 4),
    ] {
        let error = node.call("ADD", "abc", path).error(code);
        assert!(error["msg"].as_str().unwrap().contains("CNI_NETNS"));
        node.assert_clean();
    }
    node.extra = json!({"agentSocket": node.socket().with_file_name("a".repeat(200))});
    for verb in ["ADD", "CHECK"] {
        let error = node.call(verb, "abc", &Pod::new().path()).error(7);
        assert!(error["msg"].as_str().unwrap().contains("agentSocket"));
    }
    node.del("abc", "");
    node.drain();
    node.extra = json!({"prevResult": []});
    node.call("ADD", "abc", &Pod::new().path()).error(7);
    node.assert_clean();
}
