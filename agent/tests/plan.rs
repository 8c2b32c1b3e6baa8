//! `ferrule-agent plan` as a person or a script meets it: the real binary over
//! folders of manifests.
//!
//! `tests/plan/NAME/` is a scenario: `manifests/`, `config.yaml` where it needs
//! one, and `plan.json`, what must come out. `UPDATE_GOLDEN=1` writes the latter
//! anew; read the difference before you commit it. What is expected in this file
//! and in `plan-diff.json` is written anew by `UPDATE_EXPECT=1 cargo test`.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use expect_test::{Expect, expect, expect_file};
use ferrule_model::condition::Reason;
use proptest::prelude::*;
use serde_json::Value;
use similar::TextDiff;
use tempfile::TempDir;

#[path = "plan/shown.rs"]
mod shown;

fn scenarios() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan")
}

fn doc(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    fs::read_to_string(path.join(name)).unwrap()
}

fn agent(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
    command.arg("plan").args(arguments).current_dir(folder);
    command.output().unwrap()
}

/// The plan of `manifests` below `folder`.
fn plan(folder: &Path, more: &[&str]) -> Output {
    let all = [&["--manifests", "manifests", "--node", "node-a"], more].concat();
    agent(folder, &all)
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A folder with these files below `manifests`.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("manifests")).unwrap();
    for (name, text) in files {
        write(&dir.path().join("manifests").join(name), text);
    }
    dir
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn check(name: &str) {
    let folder = scenarios().join(name);
    let config = folder.join("config.yaml").exists();
    let more: &[&str] = if config {
        &["--config", "config.yaml"]
    } else {
        &[]
    };
    let output = plan(&folder, more);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // File and line of an object that cannot be read stand on stderr: the plan is the
    // same however the files are split.
    let unreadable = stdout(&output).contains("\"InvalidObject\"");
    assert_eq!(stderr(&output).is_empty(), !unreadable, "{output:?}");
    let golden = folder.join("plan.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &output.stdout).unwrap();
        return;
    }
    let expected = fs::read_to_string(&golden).unwrap_or_default();
    let diff = TextDiff::from_lines(expected.as_str(), stdout(&output));
    assert!(
        expected == stdout(&output),
        "{}\nThe plan differs from {}. If it is right now, write it with\n    \
         UPDATE_GOLDEN=1 cargo nextest run -p ferrule-agent --test plan",
        diff.unified_diff().header("expected", "planned"),
        golden.display()
    );
}

macro_rules! scenario_tests {
    ($($test:ident: $name:literal,)*) => {
        $(#[test] fn $test() { check($name); })*

        #[test]
        fn every_folder_is_a_test() {
            let listed = BTreeSet::from([$($name.to_owned()),*]);
            assert_eq!(names(), listed);
        }
    };
}

scenario_tests! {
    address_conflict: "address-conflict",
    address_conflict_between_kinds: "address-conflict-between-kinds",
    address_of_the_node_is_no_vip: "address-of-the-node-is-no-vip",
    cluster_cidr: "cluster-cidr",
    cluster_ip: "cluster-ip",
    duplicate_object: "duplicate-object",
    duplicate_port: "duplicate-port",
    external_address_of_another_family: "external-address-of-another-family",
    external_ip: "external-ip",
    external_ip_always_allowed: "external-ip-always-allowed",
    external_ip_never_allowed: "external-ip-never-allowed",
    external_ip_outside_allowed_networks: "external-ip-outside-allowed-networks",
    health_check_node_port: "health-check-node-port",
    hints_by_node: "hints-by-node",
    hints_by_zone: "hints-by-zone",
    hints_on_a_node_without_a_zone: "hints-on-a-node-without-a-zone",
    ignored: "ignored",
    internal_local_policy: "internal-local-policy",
    invalid_address: "invalid-address",
    invalid_object: "invalid-object",
    invalid_pod_range: "invalid-pod-range",
    invalid_port: "invalid-port",
    invalid_range: "invalid-range",
    kube_proxy: "kube-proxy",
    load_balancer_ip_mode: "load-balancer-ip-mode",
    load_balancer_source_ranges: "load-balancer-source-ranges",
    local_policy_all_endpoints_here: "local-policy-all-endpoints-here",
    local_policy_backends_outside_the_pod_network: "local-policy-backends-outside-the-pod-network",
    local_policy_endpoints_here_and_elsewhere: "local-policy-endpoints-here-and-elsewhere",
    local_policy_no_endpoint_anywhere_rejects: "local-policy-no-endpoint-anywhere-rejects",
    local_policy_no_endpoint_here_drops: "local-policy-no-endpoint-here-drops",
    local_policy_of_a_service_without_external_access: "local-policy-of-a-service-without-external-access",
    local_policy_terminating_endpoints: "local-policy-terminating-endpoints",
    masquerade: "masquerade",
    masquerade_all: "masquerade-all",
    masquerade_all_and_external_frontends: "masquerade-all-and-external-frontends",
    node_missing: "node-missing",
    node_port: "node-port",
    node_port_addresses: "node-port-addresses",
    node_port_nowhere: "node-port-nowhere",
    node_port_primary: "node-port-primary",
    one_address_in_two_fields: "one-address-in-two-fields",
    one_endpoint_in_two_slices: "one-endpoint-in-two-slices",
    reject: "reject",
    scheduler_by_annotation: "scheduler-by-annotation",
    scheduler_configured_maglev: "scheduler-configured-maglev",
    scheduler_configured_with_flags: "scheduler-configured-with-flags",
    scheduler_flags_by_annotation: "scheduler-flags-by-annotation",
    sctp: "sctp",
    service_proxy_name: "service-proxy-name",
    session_affinity: "session-affinity",
    session_affinity_under_local_policy: "session-affinity-under-local-policy",
    several_ports: "several-ports",
    unknown_policy_words: "unknown-policy-words",
    weights: "weights",
}

/// Names of all scenarios.
fn names() -> BTreeSet<String> {
    let entries = fs::read_dir(scenarios()).unwrap();
    entries
        .map(Result::unwrap)
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

#[test]
fn every_reason_that_a_plan_can_have_is_in_a_scenario() {
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for name in names() {
        let golden = fs::read_to_string(scenarios().join(name).join("plan.json")).unwrap();
        let golden: Value = serde_json::from_str(&golden).unwrap();
        let conditions = golden["conditions"].as_array().unwrap();
        seen.extend(
            conditions
                .iter()
                .map(|c| c["reason"].as_str().unwrap().to_owned()),
        );
    }
    let machine_only = [
        Reason::RouteConflict,
        Reason::NoSharedLink,
        Reason::SchedulerMissing,
    ];
    let expected = Reason::ALL
        .into_iter()
        .filter(|r| !machine_only.contains(r));
    assert_eq!(seen, expected.map(|r| r.to_string()).collect());
}

/// Every document of all scenarios that has a name, each object once.
fn documents() -> Vec<String> {
    let mut known = BTreeMap::new();
    let mut files = Vec::new();
    let mut waiting: Vec<PathBuf> = names().iter().map(|name| scenarios().join(name)).collect();
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|e| e == "yaml" || e == "json")
                && path.components().any(|c| c.as_os_str() == "manifests")
                && !path.file_name().unwrap().to_str().unwrap().starts_with('.')
            {
                files.push(path);
            }
        }
    }
    files.sort();
    for path in files {
        for text in fs::read_to_string(path).unwrap().split("\n---\n") {
            // What JSON cannot hold cannot be written as JSON below: a field that stands
            // twice, and `.nan`.
            let Ok(Some(value)) = serde_saphyr::from_str::<Option<Value>>(text) else {
                continue;
            };
            let text = text.to_owned();
            // The items of a list are objects of their own.
            let items = value["items"].as_array();
            let single = vec![value.clone()];
            for item in items.unwrap_or(&single) {
                let text = if items.is_some() {
                    item.to_string()
                } else {
                    text.clone()
                };
                let key = [
                    &item["apiVersion"],
                    &item["kind"],
                    &item["metadata"]["namespace"],
                    &item["metadata"]["name"],
                ];
                let named = key[3].is_string() && key[0].is_string();
                if named {
                    known.entry(format!("{key:?}")).or_insert(text);
                }
            }
        }
    }
    known.into_values().collect()
}

/// Where a document goes, and in which order.
const FILES: [&str; 6] = [
    "a.yaml",
    "b.yml",
    "c.json",
    "sub/a.yaml",
    "sub/deeper/a.json",
    "z/a.yaml",
];

/// Writes the documents into files, in the order of `places`: order, file. Each
/// file has one of three forms.
fn split(documents: &[String], places: &[(u64, usize)], forms: [u8; FILES.len()]) -> TempDir {
    let mut order: Vec<_> = places.iter().zip(documents).collect();
    order.sort();
    let dir = folder(&[]);
    for (file, (name, form)) in FILES.iter().zip(forms).enumerate() {
        let mine: Vec<&str> = order
            .iter()
            .filter(|((_, place), _)| *place == file)
            .map(|(_, document)| document.as_str())
            .collect();
        let as_json = |text: &&str| serde_saphyr::from_str::<Value>(text).unwrap();
        let text = match form {
            _ if mine.is_empty() => continue,
            0 if !name.ends_with("json") => mine.join("\n---\n"),
            1 if !name.ends_with("json") => {
                let indented = mine.iter().map(|text| text.replace('\n', "\n    "));
                let items: Vec<String> =
                    indented.map(|text| format!("  -\n    {text}\n")).collect();
                format!("kind: List\napiVersion: v1\nitems:\n{}", items.concat())
            }
            _ => serde_json::to_string_pretty(&serde_json::json!({
                "apiVersion": "v1",
                "kind": "List",
                "items": mine.iter().map(as_json).collect::<Vec<_>>(),
            }))
            .unwrap(),
        };
        write(&dir.path().join("manifests").join(name), &text);
    }
    dir
}

#[test]
fn order_and_split_of_the_files_do_not_matter() {
    let documents = documents();
    assert!(documents.len() > 60, "{}", documents.len());
    let places = vec![(0, 0); documents.len()];
    let first = plan(split(&documents, &places, [0; FILES.len()]).path(), &[]);
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    let json: Value = serde_json::from_slice(&first.stdout).unwrap();
    assert!(json["frontends"].as_array().unwrap().len() > 30, "{json}");
    assert!(json["conditions"].as_array().unwrap().len() > 20, "{json}");
    let places = proptest::collection::vec((any::<u64>(), 0..FILES.len()), documents.len());
    let forms = proptest::array::uniform6(0..3_u8);
    let config = ProptestConfig {
        cases: 48,
        // A failure names its input; what is kept on disk would be of old scenarios.
        failure_persistence: None,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    };
    proptest!(config, |(places in places, forms in forms)| {
        let again = plan(split(&documents, &places, forms).path(), &[]);
        prop_assert_eq!(again.status.code(), Some(0));
        let diff = TextDiff::from_lines(stdout(&first), stdout(&again));
        prop_assert!(first.stdout == again.stdout, "{}", diff.unified_diff());
    });
}

const NODE: &str = "
apiVersion: v1
kind: Node
metadata: {name: node-a}
spec: {podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}
";

const WEB: &str = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIPs: [10.96.0.10]
  ports: [{name: http, port: 80, nodePort: 30080}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
  - {addresses: [10.244.1.5], nodeName: node-a}
  - {addresses: [10.244.2.5], nodeName: node-b}
";

#[test]
fn a_file_that_cannot_be_read_is_1_and_the_rest_is_planned() {
    let dir = folder(&[
        ("node.yaml", NODE),
        ("web.yaml", WEB),
        (
            "broken/syntax.yaml",
            "kind: Service\napiVersion: v1\nmetadata: {name: x\nspec: [\n",
        ),
        (
            "broken/half.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: half}\nspec: {clusterIP: 10.96.0.11, ports: [{port: 80}]}\n---\na: 1\n b: 2\n",
        ),
        (
            "broken/object.yaml",
            "\n\napiVersion: v1\nkind: Service\nmetadata: {name: object}\nspec: {ports: [{port: no}]}\n",
        ),
    ]);
    let manifests = dir.path().join("manifests");
    fs::write(manifests.join("latin1.yaml"), b"# one\n# Stra\xdfe\n").unwrap();
    std::os::unix::fs::symlink("nowhere", manifests.join("link.yaml")).unwrap();
    std::os::unix::fs::symlink("loop.yaml", manifests.join("loop.yaml")).unwrap();
    let output = plan(dir.path(), &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = json["frontends"].as_array().unwrap();
    let services: Vec<&str> = rows
        .iter()
        .map(|r| r["service"].as_str().unwrap())
        .collect();
    assert_eq!(services, ["default/half", "default/web", "default/web"]);
    let conditions = json["conditions"].as_array().unwrap();
    assert_eq!(conditions.len(), 1, "{json}");
    assert_eq!(conditions[0]["object"], "Service default/object");
    expect![[r"
        ferrule-agent plan: manifests/broken/half.yaml: line 7: mapping values are not allowed in this context; correct the YAML of this line or of those above it
        ferrule-agent plan: manifests/broken/object.yaml: line 6: Service default/object: spec.ports[0].port: is the boolean false; write a port number from 1 to 65535, without quotes
        ferrule-agent plan: manifests/broken/syntax.yaml: line 4: while parsing a flow mapping, did not find expected ',' or '}'; correct the YAML of this line or of those above it
        ferrule-agent plan: manifests/latin1.yaml: line 2: is not UTF-8; write the file in UTF-8
        ferrule-agent plan: manifests/link.yaml: is a link that leads to no file: No such file or directory (os error 2); correct the link, or remove it
        ferrule-agent plan: manifests/loop.yaml: is a link that leads to no file: Too many levels of symbolic links (os error 40); correct the link, or remove it
    "]].assert_eq(stderr(&output));
}

#[test]
fn wrong_usage_is_2_and_names_the_remedy() {
    let dir = folder(&[("node.yaml", NODE)]);
    write(
        &dir.path().join("unknown.yaml"),
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\nclusterCidr: 10.0.0.0/8\n",
    );
    write(
        &dir.path().join("range.yaml"),
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\nclusterCIDR: 10.0.0.1\n",
    );
    let node = ["--node", "node-a"];
    let here = ["--manifests", "manifests"];
    let cases: [(&[&[&str]], Expect); 9] = [
        (
            &[&here, &["--node", ""]],
            expect![[r"
            error: invalid value '' for '--node <NAME>': give the name of the Node object, as `kubectl get nodes` shows it

            For more information, try '--help'.
        "]],
        ),
        (
            &[&here],
            expect![[r"
            error: the following required arguments were not provided:
              --node <NAME>

            Usage: ferrule-agent plan --manifests <DIR> --node <NAME>

            For more information, try '--help'.
        "]],
        ),
        (
            &[&node],
            expect![[r"
            error: the following required arguments were not provided:
              --manifests <DIR>

            Usage: ferrule-agent plan --manifests <DIR> --node <NAME>

            For more information, try '--help'.
        "]],
        ),
        (
            &[&here, &node, &["--config", "nowhere.yaml"]],
            expect![[r"
                ferrule-agent plan: configuration nowhere.yaml: cannot be read: No such file or directory (os error 2)
            "]],
        ),
        (
            &[&here, &node, &["--config", "unknown.yaml"]],
            expect![[r"
                ferrule-agent plan: configuration unknown.yaml: line 3: clusterCidr: unknown field `clusterCidr`, expected one of apiVersion, kind, clusterCIDR, serviceCIDRs, nodePortAddresses, nonMasqueradeCIDRs, masqueradeAll, nodePortRange, externalIPs, scheduler, schedulerFlags, serviceProxyName, auditBudgetPercent, drainSeconds, estimation, connectionTableBits, apiServer, detectLocalMode, detectLocal, vipBinding, vipDevice
            "]],
        ),
        (
            &[&here, &node, &["--config", "range.yaml"]],
            expect![[r#"
                ferrule-agent plan: configuration range.yaml: clusterCIDR: "10.0.0.1" is not a network in CIDR notation, such as 10.244.0.0/16
            "#]],
        ),
        (
            &[&node, &["--manifests", "nowhere"]],
            expect![[r"
            ferrule-agent plan: --manifests nowhere: cannot be listed: No such file or directory (os error 2); name a folder of manifests
        "]],
        ),
        (
            &[&node, &["--manifests", "unknown.yaml"]],
            expect![[r"
            ferrule-agent plan: --manifests unknown.yaml: cannot be listed: Not a directory (os error 20); name a folder of manifests
        "]],
        ),
        (
            &[&here, &node, &["--diff", "nowhere"]],
            expect![[r"
            ferrule-agent plan: --diff nowhere: cannot be listed: No such file or directory (os error 2); name a folder of manifests
        "]],
        ),
    ];
    for (arguments, said) in cases {
        let output = agent(dir.path(), &arguments.concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(stdout(&output), "");
        said.assert_eq(stderr(&output));
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_a_full_disk_is() {
    let dir = folder(&[("node.yaml", NODE), ("web.yaml", WEB)]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
    command.args(["plan", "--manifests", "manifests", "--node", "node-a"]);
    command.current_dir(dir.path());
    command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("standard output"), "{output:?}");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stderr(&output), "");
}

/// The parser's own limit is 250,000 nodes, and `kubectl get services -A` of a
/// large cluster writes more into one list. The kind is foreign here, because
/// that takes the least time.
#[test]
fn a_big_document_is_read_whole() {
    let nodes = "0,".repeat(260_000);
    let big = format!("apiVersion: v1\nkind: Foreign\ndata: [{nodes}0]\n---\n{WEB}");
    let dir = folder(&[("all.yaml", &big), ("node.yaml", NODE)]);
    let output = plan(dir.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["frontends"].as_array().unwrap().len(), 2);
}

#[test]
fn yaml_as_people_and_tools_write_it() {
    let dir = folder(&[
        (
            "mark.yaml",
            "\u{feff}---\r\napiVersion: v1\r\nkind: Service\r\nmetadata:\r\n  name: mark\r\nspec: {clusterIP: 10.96.1.1, ports: [{port: 80}]}\r\n",
        ),
        (
            "directive.yaml",
            "%YAML 1.2\n---\napiVersion: v1\nkind: Service\nmetadata: {name: directive, namespace: \"\"}\nspec: {clusterIP: 10.96.1.2, ports: [{port: 80}]}\n...\n",
        ),
        (
            "tabs.json",
            "{\n\t\"apiVersion\": \"v1\",\n\t\"kind\": \"Service\",\n\t\"metadata\": {\"name\": \"tabs\", \"annotations\": {\"a\": \"\\ud83d\\ude00 \\/\"}},\n\t\"spec\": {\"clusterIP\": \"10.96.1.3\", \"ports\": [{\"port\": 80}]}\n}\n",
        ),
        (
            "anchor.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: &name anchor, labels: {app: *name}}\nspec:\n  clusterIP: 10.96.1.4\n  ports: [{port: 80}]\n",
        ),
    ]);
    let output = plan(dir.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = json["frontends"].as_array().unwrap();
    let services: Vec<&str> = rows
        .iter()
        .map(|r| r["service"].as_str().unwrap())
        .collect();
    assert_eq!(
        services,
        [
            "default/anchor",
            "default/directive",
            "default/mark",
            "default/tabs"
        ]
    );
}
