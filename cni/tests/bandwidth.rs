//! The capability `bandwidth`: what the kernel is told, and that it goes again.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::process::Command;

use ferrule_model::ownership;
use serde_json::{Value, json};

use support::{MTU, Node, Pod, attachment, ip, ip_json, our_links};

/// Runs `tc -j` in the caller's namespace.
fn tc(arguments: &str) -> Value {
    let output = Command::new("tc")
        .arg("-j")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "tc {arguments}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn change(arguments: &str) {
    let status = Command::new("tc")
        .args(arguments.split_whitespace())
        .status()
        .unwrap();
    assert!(status.success(), "tc {arguments}");
}

fn limits() -> Value {
    json!({"runtimeConfig": {"bandwidth": {
        "ingressRate": 8_000_000, "ingressBurst": 1_600_000,
        "egressRate": 80_000_000_000_u64, "egressBurst": u32::MAX,
    }}})
}

fn veth() -> String {
    ownership::host_veth_name(&attachment("abc")).to_string()
}

fn shaper() -> String {
    ownership::shaper_name(&attachment("abc")).to_string()
}

fn added() -> (Node, Pod, Value) {
    let mut node = Node::new();
    node.extra = limits();
    let pod = Pod::new();
    let result = node.add("abc", &pod);
    (node, pod, result)
}

#[test]
fn both_directions_are_shaped_on_the_host() {
    let (node, pod, _) = added();
    let qdiscs = tc(&format!("qdisc show dev {}", veth()));
    assert_eq!(qdiscs[0]["kind"], "tbf", "{qdiscs}");
    assert_eq!(qdiscs[0]["root"], true);
    // Bytes; 25 ms at the rate are the queue behind the burst.
    let options = &qdiscs[0]["options"];
    assert_eq!(options["rate"], 1_000_000, "{qdiscs}");
    assert_eq!(options["burst"], 200_000, "{qdiscs}");
    assert_eq!(options["lat"], 25_000, "{qdiscs}");
    assert_eq!(qdiscs[1]["kind"], "ingress", "{qdiscs}");
    let qdiscs = tc(&format!("qdisc show dev {}", shaper()));
    assert_eq!(qdiscs[0]["kind"], "tbf", "{qdiscs}");
    // More than 32 bits hold, and a burst of ours, as containerd has no opinion.
    let options = &qdiscs[0]["options"];
    assert_eq!(options["rate"], 10_000_000_000_u64, "{qdiscs}");
    let burst = options["burst"].as_u64().unwrap();
    assert!((499_000_000..=500_000_000).contains(&burst), "{qdiscs}");
    let filters = tc(&format!("filter show dev {} ingress", veth()));
    let filter = filters
        .as_array()
        .unwrap()
        .iter()
        .find(|filter| filter["options"]["actions"].is_array())
        .unwrap();
    assert_eq!(filter["protocol"], "all", "{filters}");
    let action = &filter["options"]["actions"][0];
    assert_eq!(action["kind"], "mirred");
    assert_eq!(action["mirred_action"], "redirect");
    assert_eq!(action["direction"], "egress");
    assert_eq!(action["to_dev"], shaper());
    let link = ip_json(&format!("link show dev {}", shaper()))[0].clone();
    assert_eq!(link["linkinfo"]["info_kind"], "ifb");
    assert_eq!(link["mtu"], MTU);
    assert_eq!(link["ifalias"], "ferrule abc eth0 pods");
    assert!(link["flags"].as_array().unwrap().contains(&json!("UP")));
    let addresses = ip_json(&format!("addr show dev {}", shaper()));
    assert_eq!(addresses[0]["addr_info"], json!([]));
    // The pod has nothing that it could take away.
    let inside = pod.inside(|| tc("qdisc show dev eth0"));
    assert_eq!(inside[0]["kind"], "noqueue", "{inside}");
    node.del("abc", &pod.path());
    node.assert_clean();
    assert!(!tc("qdisc show").to_string().contains("tbf"));
}

#[test]
fn each_direction_by_itself() {
    for (fields, devices) in [("ingress", 1), ("egress", 2)] {
        let mut node = Node::new();
        let pod = Pod::new();
        // Fields of the configuration itself, as the reference plugin has them.
        let (rate, burst) = (format!("{fields}Rate"), format!("{fields}Burst"));
        node.extra = json!({ rate: 8_000_000, burst: 1_600_000 });
        node.add("abc", &pod);
        assert_eq!(our_links().len(), devices, "{:?}", our_links());
        let all = tc("qdisc show").to_string();
        assert_eq!(all.matches("tbf").count(), 1, "{all}");
        assert_eq!(all.matches("ingress").count(), devices - 1, "{all}");
        // DEL does not look at what was asked for.
        node.extra = json!({"egressRate": "odd", "runtimeConfig": {"bandwidth": 7}});
        node.del("abc", "");
        node.assert_clean();
    }
}

#[test]
fn packets_still_pass() {
    let (node, pod, _) = added();
    let server = support::NODE_V4;
    let from = support::connect(
        || support::listen(server),
        |target| pod.inside(|| support::dial(target)),
    );
    assert_eq!(from.to_string(), "10.1.0.2");
    let pod_ip = "fd01::2";
    support::connect(|| pod.inside(|| support::listen(pod_ip)), support::dial);
    // And they took the detour: the pod's packets are counted where they are shaped.
    let stats = tc(&format!("-s qdisc show dev {}", shaper()));
    assert!(stats[0]["packets"].as_u64().unwrap() > 2, "{stats}");
    node.del("abc", "");
    node.assert_clean();
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_made() {
    let mut node = Node::new();
    let pod = Pod::new();
    for (bandwidth, words) in [
        (json!({"ingressRate": -1, "ingressBurst": 1}), "ingressRate"),
        (json!({"egressRate": 8}), "egressBurst"),
        (json!("10M"), "runtimeConfig.bandwidth"),
    ] {
        node.extra = json!({"runtimeConfig": {"bandwidth": bandwidth}});
        let error = node.call("ADD", "abc", &pod.path()).error(7);
        assert!(error["msg"].as_str().unwrap().contains(words), "{error}");
        node.assert_clean();
    }
    // Only the agent knows the MTU; the lease goes again.
    let asked = json!({"egressRate": 8000, "egressBurst": (MTU + 13) * 8});
    node.extra = json!({"runtimeConfig": {"bandwidth": asked}});
    let error = node.call("ADD", "abc", &pod.path()).error(7);
    let words = format!("no packet of {MTU} bytes");
    assert!(error["msg"].as_str().unwrap().contains(&words), "{error}");
    node.assert_clean();
}

#[test]
fn an_ifb_of_an_earlier_life_makes_room_and_a_foreign_one_does_not() {
    let mut node = Node::new();
    node.extra = limits();
    let pod = Pod::new();
    let name = shaper();
    ip(&format!("link add {name} type ifb"));
    node.del("abc", "");
    let error = node.call("ADD", "abc", &pod.path()).error(101);
    assert!(error["msg"].as_str().unwrap().contains(&name), "{error}");
    // The undo has spared it, too; nothing else is left.
    assert_eq!(our_links(), std::slice::from_ref(&name));
    assert_eq!(node.agent.leases(), 0);
    // Another's alias is no proof, whatever the address.
    let mac = ownership::shaper_mac(&attachment("abc")).map(|byte| format!("{byte:02x}"));
    let ours = format!("link add {name} address {} type ifb", mac.join(":"));
    ip(&format!("link del {name}"));
    ip(&ours);
    ip(&format!("link set {name} alias uplink"));
    node.del("abc", "");
    assert_eq!(our_links(), std::slice::from_ref(&name));
    // Nor is the name on a device of another kind.
    ip(&format!("link del {name}"));
    ip(&format!("link add {name} type veth peer name foreign"));
    let alias = ownership::device_alias(&attachment("abc"), None);
    let status = Command::new("ip")
        .args(["link", "set", &name, "alias", &alias])
        .status();
    assert!(status.unwrap().success());
    node.del("abc", "");
    ip("link del foreign");
    // Killed before the alias was set: ours by its address.
    ip(&ours);
    node.add("abc", &pod);
    node.del("abc", "");
    node.assert_clean();
    ip(&ours);
    node.extra = json!({});
    node.del("abc", "");
    node.assert_clean();
}

#[test]
fn check_names_what_is_not_shaped_as_asked() {
    let veth = veth();
    let shaper = shaper();
    for (broken, words) in [
        (
            format!("qdisc del dev {veth} root"),
            "to the pod is not limited",
        ),
        (
            format!("qdisc change dev {veth} root handle 1: tbf rate 1mbit burst 64k limit 64k"),
            "to the pod is limited to 1000000 instead of 8000000 bits",
        ),
        (
            format!("qdisc replace dev {shaper} root pfifo"),
            "from the pod is not limited",
        ),
        (format!("qdisc del dev {veth} ingress"), "not redirected"),
        (format!("filter del dev {veth} ingress"), "not redirected"),
    ] {
        let (mut node, pod, result) = added();
        node.extra["prevResult"] = result;
        node.call("CHECK", "abc", &pod.path()).result();
        change(&broken);
        let error = node.call("CHECK", "abc", &pod.path()).error(102);
        let said = error["msg"].as_str().unwrap();
        assert!(said.contains(words), "{broken}: {said}");
    }
    let (mut node, pod, result) = added();
    node.extra["prevResult"] = result;
    ip(&format!("link set {shaper} down"));
    let error = node.call("CHECK", "abc", &pod.path()).error(102);
    let words = format!("{shaper} is down");
    assert!(error["msg"].as_str().unwrap().contains(&words), "{error}");
    ip(&format!("link del {shaper}"));
    let error = node.call("CHECK", "abc", &pod.path()).error(102);
    let words = format!("{shaper} of the node is missing");
    assert!(error["msg"].as_str().unwrap().contains(&words), "{error}");
    // Who asked for nothing misses nothing.
    node.extra["runtimeConfig"] = json!({});
    node.call("CHECK", "abc", &pod.path()).result();
}
