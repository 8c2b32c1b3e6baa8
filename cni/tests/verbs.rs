//! Every verb in every version of the specification, with input that is right
//! and input that is not. What is printed is read back, and the rules of the
//! versions are looked up, with types that are not ours (`rscni-types`).

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use rscni_types::error::Error;
use rscni_types::legacy;
use rscni_types::types::{CNIResultWithVersion, Cmd, ErrorResult};
use rscni_types::version::SpecVersion;
use serde_json::{Value, json};

use support::{Node, Pod, Said, run};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Fails with this code, a message that has this word, and the version asked for.
fn assert_error(said: &Said, code: u32, word: &str, version: &str) {
    let object = said.error(code);
    let text = object["msg"].as_str().unwrap();
    assert!(text.contains(word), "{word:?} is not in {text:?}");
    assert!(text.len() < 1024, "{} bytes of message", text.len());
    assert_eq!(object["cniVersion"], version, "{object}");
    let read: ErrorResult = serde_json::from_value(object).unwrap();
    let _ = Error::from(read);
}

/// The life of a pod, in every version.
#[test]
fn every_verb_in_every_version() {
    for version in VERSIONS {
        let mut node = Node::new();
        node.version = version;
        let pod = Pod::new();
        let spec: SpecVersion = version.parse().unwrap();
        let exists = |command| spec.allows(command).is_ok();

        let result = node.add("abc", &pod);
        let read: CNIResultWithVersion = serde_json::from_value(result.clone()).unwrap();
        assert_eq!(read.cni_version(), spec);
        // Printed by another's hand it is the same, to the field.
        let printed = if spec.is_legacy() {
            serde_json::to_value(legacy::CNIResult::new(spec, read.into_result())).unwrap()
        } else {
            let mut printed = serde_json::to_value(&read).unwrap();
            printed["dns"] = json!({});
            printed
        };
        assert_eq!(printed, result, "{version}");

        assert_error(&node.call("ADD", "abc", &pod.path()), 101, "eth0", version);
        node.extra = json!({"prevResult": result});
        let check = node.call("CHECK", "abc", &pod.path());
        if exists(Cmd::Check) {
            assert_eq!(check.result(), Value::Null);
        } else {
            assert_error(&check, 1, "CHECK", version);
        }
        node.extra =
            json!({"cni.dev/valid-attachments": [{"containerID": "abc", "ifname": "eth0"}]});
        for (verb, command) in [("STATUS", Cmd::Status), ("GC", Cmd::Gc)] {
            let said = node.call(verb, "abc", &pod.path());
            if exists(command) {
                assert_eq!(said.result(), Value::Null);
            } else {
                assert_error(&said, 1, verb, version);
            }
        }
        node.extra = json!({"prevResult": result});
        let again = node.call("CHECK", "abc", &pod.path());
        assert_eq!(
            again.code == Some(0),
            exists(Cmd::Check),
            "GC took a valid pod"
        );

        for _ in 0..2 {
            node.del("abc", &pod.path());
            node.assert_clean();
        }
        node.extra = json!({});
        node.del("abc", "");
        node.del("never-was", "/run/netns/never-was");
        let reply = node.call("VERSION", "", "").result();
        assert_eq!(reply["cniVersion"], version);
        assert_eq!(reply["supportedVersions"], json!(VERSIONS));
    }
}

/// Field, value, the words that are said about it with code 7, and the verbs that mind.
const MISTAKES: &str = r#"
agentSocket|"relative"|agentSocket|ADD DEL CHECK STATUS GC
agentSocket|7|agentSocket|ADD DEL CHECK STATUS GC
stateDir|"x"|stateDir|ADD DEL CHECK STATUS GC
stateDir|[]|stateDir|ADD DEL CHECK STATUS GC
name|null|name|ADD GC
name|"a b"|name|ADD GC
name|"../x"|name|ADD GC
mtu|67|mtu|ADD
mtu|"1500"|mtu|ADD
mtu|-1|mtu|ADD
runtimeConfig|"x"|runtimeConfig|ADD
runtimeConfig|{"ips": ["10.1.0"]}|runtimeConfig.ips[0]|ADD
runtimeConfig|{"mac": "x"}|runtimeConfig.mac|ADD
runtimeConfig|{"bandwidth": {"ingressRate": "fast"}}|runtimeConfig.bandwidth.ingressRate|ADD
args|{"cni": {"ips": {}}}|args.cni.ips|ADD
prevResult|7|prevResult|ADD CHECK
prevResult|{"ips": 7}|prevResult.ips|ADD CHECK
prevResult|{"interfaces": {}}|prevResult.interfaces|ADD CHECK
cni.dev/valid-attachments|[{}]|valid-attachments[0]|GC
cni.dev/valid-attachments|"all"|valid-attachments|GC
"#;

/// The verbs that do not look at what is wrong go on: above all DEL.
#[test]
fn every_mistake_in_the_configuration_is_named() {
    let anything = Pod::new();
    let mut node = Node::new();
    node.version = "1.1.0";
    let sound = json!({"prevResult": {"interfaces": []}, "cni.dev/valid-attachments": []});
    for line in MISTAKES.trim().lines() {
        let [field, value, word, verbs] = line.split('|').collect::<Vec<_>>().try_into().unwrap();
        let value: Value = serde_json::from_str(value).unwrap();
        for verb in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            node.extra = match verb {
                "ADD" => json!({}),
                _ => sound.clone(),
            };
            node.extra[field] = value.clone();
            let said = node.call(verb, "abc", &anything.path());
            if verbs.split(' ').any(|minds| minds == verb) {
                assert_error(&said, 7, word, "1.1.0");
            } else if verb != "CHECK" {
                // There is nothing that CHECK could find.
                said.result();
                node.del("abc", &anything.path());
            }
            node.assert_clean();
        }
    }
    for version in [
        json!("0.2.0"),
        json!("1.0"),
        json!(""),
        json!(1),
        Value::Null,
    ] {
        node.extra = json!({"cniVersion": version});
        for verb in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            assert_error(
                &node.call(verb, "abc", &anything.path()),
                1,
                "cniVersion",
                "1.1.0",
            );
        }
    }
    node.assert_clean();
}

/// Each verb says which variable it misses, and minds no variable that it does not need.
#[test]
fn every_mistake_in_the_environment_is_named() {
    let mut node = Node::new();
    node.version = "1.1.0";
    node.extra = json!({"cni.dev/valid-attachments": []});
    let pod = Pod::new();
    let path = pod.path();
    let long = "a".repeat(257);
    let cases = [
        ("CNI_CONTAINERID", "", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", "../../etc", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", "-rf", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", "a\nb", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", "a b", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", "\u{e4}", "ADD DEL CHECK"),
        ("CNI_CONTAINERID", &long, "ADD DEL CHECK"),
        ("CNI_IFNAME", "", "ADD DEL CHECK"),
        ("CNI_IFNAME", ".", "ADD DEL CHECK"),
        ("CNI_IFNAME", "..", "ADD DEL CHECK"),
        ("CNI_IFNAME", "eth0/../../x", "ADD DEL CHECK"),
        ("CNI_IFNAME", "eth0:1", "ADD DEL CHECK"),
        ("CNI_IFNAME", "eth 0", "ADD DEL CHECK"),
        ("CNI_IFNAME", "eth%d", "ADD DEL CHECK"),
        ("CNI_IFNAME", "sixteen_bytes___", "ADD DEL CHECK"),
        ("CNI_NETNS", "", "ADD CHECK"),
        ("CNI_NETNS", "run/netns/x", "ADD CHECK"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=A b;K8S_POD_NAME=c", "ADD"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=a;K8S_POD_NAME=../c", "ADD"),
        ("CNI_ARGS", "IP=here", "ADD"),
        ("CNI_ARGS", "MAC=ff:ff:ff:ff:ff:ff", "ADD"),
    ];
    for (variable, value, verbs) in cases {
        for verb in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
            let said = node.call_with(verb, "abc", &path, &[(variable, value)]);
            if verbs.split(' ').any(|minds| minds == verb) {
                assert_error(&said, 4, variable, "1.1.0");
            } else if verb != "CHECK" {
                said.result();
            }
            node.assert_clean();
        }
    }
    for verb in ["add", "ADD ", "FROB", "\u{1}"] {
        assert_error(&node.call(verb, "abc", &path), 4, "CNI_COMMAND", "1.1.0");
    }
    // Odd is not wrong.
    for arguments in [
        ";;;",
        "=",
        "a",
        "IP=",
        "K8S_POD_NAME=x",
        "X=1;IgnoreUnknown=0;Y",
    ] {
        node.call_with("ADD", "abc", &path, &[("CNI_ARGS", arguments)])
            .result();
        node.del("abc", &path);
    }
    let longest = "a".repeat(256);
    let odd = [
        ("CNI_CONTAINERID", longest.as_str()),
        ("CNI_IFNAME", "a.b-c_d@e+f\u{e4}"),
    ];
    node.call_with("ADD", "abc", &path, &odd).result();
    node.call_with("DEL", "abc", &path, &odd).result();
    node.assert_clean();
}

#[test]
fn input_without_an_end_is_refused() {
    let node = Node::new();
    let mut huge = node.config();
    huge["padding"] = "x".repeat(10 << 20).into();
    let huge = huge.to_string();
    for verb in ["ADD", "DEL", "CHECK", "STATUS", "GC"] {
        let variables = [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/x"),
        ];
        let said = run(&variables, huge.as_bytes());
        assert_error(&said, 6, "longer than", "1.1.0");
        for garbage in [
            &b""[..],
            b"\xff\xfe",
            b"{",
            b"[1,",
            "[".repeat(100_000).as_bytes(),
        ] {
            assert_error(&run(&variables, garbage), 6, "no JSON", "1.1.0");
        }
    }
    node.assert_clean();
}
