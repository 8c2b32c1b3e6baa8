//! What `plan` shows to people: the table, differences, and the documentation.

use super::*;

use ferrule_model::kube::{
    FLAGS_ANNOTATIONS, SCHEDULER_ANNOTATIONS, WEIGHT_ANNOTATION, WEIGHTS_ANNOTATION,
};
use ferrule_model::service::Scheduler;

/// Names and texts that would move a cursor, and one that would break a line.
const HOSTILE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: "web\e[2J\nfake", namespace: "evil\u009b31m"}
spec: {clusterIP: 10.96.0.66, ports: [{name: "ht\u202etp\e]0;x\a", port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: bad}
spec: {clusterIP: "\e[31m10", ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: worse}
spec: {type: "\e[31mx"}
"#;

#[test]
fn a_table_for_people() {
    let slice = |n: usize| {
        let addresses: Vec<String> = (1..=n)
            .map(|n| format!("{{addresses: [10.244.1.{n}]}}"))
            .collect();
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: many, labels: \
             {{kubernetes.io/service-name: many}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\n\
             endpoints: [{}]\n",
            addresses.join(", ")
        )
    };
    let many = "apiVersion: v1\nkind: Service\nmetadata: {name: many}\nspec: {clusterIPs: [10.96.0.30, \"fd00::30\"], ports: [{port: 80}]}\n";
    let dir = folder(&[
        ("node.yaml", NODE),
        ("web.yaml", WEB),
        ("many.yaml", &format!("{many}---\n{}", slice(6))),
    ]);
    let output = plan(dir.path(), &["-o", "table"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    expect![[r"
        SERVICE       PORT  KIND       FRONTEND              ACTION   SCHEDULER  MASQUERADE                 BACKENDS
        default/many  -     ClusterIP  10.96.0.30:80/TCP     balance  rr         hairpin                    10.244.1.1:8080, 10.244.1.2:8080, 10.244.1.3:8080, 10.244.1.4:8080, and 2 more
        default/many  -     ClusterIP  [fd00::30]:80/TCP     reject   rr         -                          -
        default/web   http  ClusterIP  10.96.0.10:80/TCP     balance  rr         hairpin,podEgress          10.244.1.5:8080, 10.244.2.5:8080
        default/web   http  NodePort   192.0.2.10:30080/TCP  balance  rr         hairpin,offNode,podEgress  10.244.1.5:8080, 10.244.2.5:8080
    "]].assert_eq(stdout(&output));

    let hostile = folder(&[("a.yaml", HOSTILE)]);
    let output = plan(hostile.path(), &["-o", "table"]);
    expect![[r#"
        SERVICE                           PORT                         KIND       FRONTEND           ACTION  SCHEDULER  MASQUERADE  BACKENDS
        evil\u{9b}31m/web\u{1b}[2J\nfake  ht\u{202e}tp\u{1b}]0;x\u{7}  ClusterIP  10.96.0.66:80/TCP  reject  rr         -           -

        Served only in part, or not at all:
          Node node-a: NodeMissing: no Node object has the name node-a: pods of this node get no addresses, and a plan has no node ports; check the name, or add the object
          Service default/bad: InvalidAddress: spec.clusterIP: "\u{1b}[31m10" is not an IP address; the address is not served, correct it
          Service default/worse: InvalidObject: spec.type: is the text "\u{1b}[31mx"; write one of ClusterIP, NodePort, LoadBalancer, ExternalName
    "#]].assert_eq(stdout(&output));

    let empty = folder(&[("node.yaml", NODE)]);
    let output = plan(empty.path(), &["-o", "table"]);
    expect![[r"
        Node node-a would program no frontend.
    "]]
    .assert_eq(stdout(&output));
}

#[test]
fn what_objects_say_never_acts_on_a_terminal() {
    let dir = folder(&[("a.yaml", HOSTILE), ("b\u{1b}[2J.yaml", "{")]);
    write(&dir.path().join("other/node.yaml"), NODE);
    for more in [
        &["-o", "table"][..],
        &["-o", "json"],
        &["-o", "table", "--diff", "other"],
        &["-o", "json", "--diff", "other"],
    ] {
        let output = plan(dir.path(), more);
        for text in [stdout(&output), stderr(&output)] {
            let acts = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
            assert!(!text.contains(acts), "{more:?}: {text:?}");
            assert!(!text.lines().any(|line| line.starts_with("fake")), "{text}");
        }
        assert!(stderr(&output).contains(r"b\u{1b}[2J.yaml"), "{output:?}");
    }
    let json: Value = serde_json::from_slice(&plan(dir.path(), &[]).stdout).unwrap();
    assert_eq!(
        json["frontends"][0]["service"], "evil\u{9b}31m/web\u{1b}[2J\nfake",
        "JSON keeps what it escapes"
    );
}

fn before_and_after() -> TempDir {
    let more = "
apiVersion: v1
kind: Service
metadata: {name: gone}
spec: {clusterIPs: [10.96.0.9, 10.96.0.11], ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: moved}
spec: {clusterIPs: [10.96.0.12], sessionAffinity: ClientIP, ports: [{port: 80}]}
---
";
    let dir = folder(&[
        ("node.yaml", NODE),
        ("web.yaml", WEB),
        ("more.yaml", more),
        ("again.yaml", more),
        (
            "broken.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {}\n",
        ),
    ]);
    let other = dir.path().join("other");
    write(&other.join("node.yaml"), NODE);
    let web = WEB
        .replace(
            "10.244.2.5], nodeName: node-b",
            "10.244.1.5], nodeName: node-a",
        )
        .replace(
            "[10.244.1.5], nodeName: node-a}\n  -",
            "[192.0.2.77]}\n  - {addresses: [10.244.2.6], nodeName: node-b}\n  -",
        );
    write(&other.join("web.yaml"), &web);
    write(
        &other.join("more.yaml"),
        "
apiVersion: v1
kind: Service
metadata: {name: mover}
spec: {clusterIPs: [10.96.0.12], ports: [{name: http, port: 80}, {name: new, protocol: UDP, port: 53}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: mover, labels: {kubernetes.io/service-name: mover}}
addressType: IPv4
ports: [{name: http, port: 80}]
endpoints: [{addresses: [10.244.1.9], nodeName: node-a, conditions: {ready: false, terminating: true}}]
",
    );
    write(
        &other.join("broken.yaml"),
        "apiVersion: v1\nkind: Service\nmetadata: {}\n",
    );
    dir
}

#[test]
fn a_difference_for_people() {
    let dir = before_and_after();
    let output = plan(dir.path(), &["--diff", "other", "-o", "table"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    expect![[r"
        - default/gone ClusterIP 10.96.0.9:80/TCP reject []
        - default/gone ClusterIP 10.96.0.11:80/TCP reject []
        + default/mover ClusterIP 10.96.0.12:53/UDP reject []
        ~ default/mover ClusterIP 10.96.0.12:80/TCP
            service: default/moved -> default/mover
            port: none -> http
            action: reject -> balance
            affinity: 10800 s -> none
            masquerade: none -> hairpin
            + backend 10.244.1.9:80 (terminating), weight 1, on this node
        ~ default/web ClusterIP 10.96.0.10:80/TCP
            - backend 10.244.2.5:8080, weight 1, not on this node
            + backend 10.244.2.6:8080, weight 1, not on this node
            + backend 192.0.2.77:8080, weight 1, not on this node
        ~ default/web NodePort 192.0.2.10:30080/TCP
            - backend 10.244.2.5:8080, weight 1, not on this node
            + backend 10.244.2.6:8080, weight 1, not on this node
            + backend 192.0.2.77:8080, weight 1, not on this node
        - Service default/gone: DuplicateObject: metadata.name: the object is defined more than once, the last definition in path order that can be read counts, in more.yaml; remove the others
        - Service default/moved: DuplicateObject: metadata.name: the object is defined more than once, the last definition in path order that can be read counts, in more.yaml; remove the others
    "]].assert_eq(stdout(&output));
    let output = plan(dir.path(), &["--diff", "manifests", "-o", "table"]);
    expect![[r"
        Nothing would change on node node-a.
    "]]
    .assert_eq(stdout(&output));
}

#[test]
fn a_difference_for_programs() {
    let dir = before_and_after();
    let output = plan(dir.path(), &["--diff", "other"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    expect_file!["../plan-diff.json"].assert_eq(stdout(&output));
}

#[test]
fn a_backend_that_changes_its_node_is_told_apart() {
    let dir = folder(&[("node.yaml", NODE), ("web.yaml", WEB)]);
    let moved = WEB.replace(
        "10.244.2.5], nodeName: node-b",
        "10.244.2.5], nodeName: node-a",
    );
    write(&dir.path().join("other/web.yaml"), &moved);
    write(&dir.path().join("other/node.yaml"), NODE);
    let output = plan(dir.path(), &["--diff", "other", "-o", "table"]);
    expect![[r"
        ~ default/web ClusterIP 10.96.0.10:80/TCP
            - backend 10.244.2.5:8080, weight 1, not on this node
            + backend 10.244.2.5:8080, weight 1, on this node
        ~ default/web NodePort 192.0.2.10:30080/TCP
            - backend 10.244.2.5:8080, weight 1, not on this node
            + backend 10.244.2.5:8080, weight 1, on this node
    "]]
    .assert_eq(stdout(&output));
}

/// The block behind a marker, less the command on its first line.
fn example<'a>(text: &'a str, marker: &str) -> &'a str {
    let (_, rest) = text
        .split_once(&format!("<!-- {marker} -->\n```\n$ "))
        .unwrap();
    let (block, _) = rest.split_once("```").unwrap();
    block.split_once('\n').unwrap().1
}

#[test]
fn the_documentation_shows_what_is_printed() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let text = doc("plan.md");
    let before = [
        "--manifests",
        examples.to_str().unwrap(),
        "--node",
        "node-a",
        "-o",
        "table",
    ];
    let dir = folder(&[]);
    let output = agent(dir.path(), &before);
    assert_eq!(stdout(&output), example(&text, "table"));
    let node = fs::read_to_string(examples.join("node.yaml")).unwrap();
    let web = fs::read_to_string(examples.join("web.yaml")).unwrap();
    let web = web.replace("[10.244.1.3]", "[10.244.1.4]").replace(
        "  clusterIPs:",
        "  sessionAffinity: ClientIP\n  clusterIPs:",
    );
    write(&dir.path().join("after/node.yaml"), &node);
    write(&dir.path().join("after/web.yaml"), &web);
    let output = agent(dir.path(), &[&before[..], &["--diff", "after"]].concat());
    assert_eq!(stdout(&output), example(&text, "diff"));
}

/// The first cells of a table's rows, less the header, where they are code.
fn first_cells(text: &str) -> Vec<&str> {
    let cells = text.lines().filter_map(|line| line.strip_prefix("| `"));
    cells.filter_map(|line| line.split('`').next()).collect()
}

#[test]
fn the_documentation_has_every_reason() {
    let text = doc("plan.md");
    let (_, reasons) = text.split_once("## Reasons").unwrap();
    let listed: BTreeSet<&str> = first_cells(reasons).into_iter().collect();
    let known = Reason::ALL.into_iter().map(Reason::name).collect();
    assert_eq!(listed, known);
}

#[test]
fn the_documentation_has_every_field_of_the_configuration() {
    let text = doc("configuration.md");
    // Behind that are the fields of kube-proxy's file.
    let (text, _) = text.split_once("\n## kube-proxy's file").unwrap();
    let dir = folder(&[("node.yaml", NODE)]);
    // What is not known is refused with a list of what is.
    let head = "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n";
    write(
        &dir.path().join("config.yaml"),
        &format!("{head}noSuchField: 1\n"),
    );
    let output = plan(dir.path(), &["--config", "config.yaml"]);
    let (_, known) = stderr(&output).split_once("expected one of ").unwrap();
    let known: BTreeSet<&str> = known.trim_end().split(", ").collect();
    assert!(known.contains("auditBudgetPercent"), "{output:?}");
    let listed: BTreeSet<&str> = first_cells(text).into_iter().collect();
    assert_eq!(listed, known);
    // The example is one, and uses all of them.
    let (_, example) = text.split_once("```yaml\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    for field in known {
        assert!(
            example.contains(&format!("\n{field}:")) || example.starts_with(field),
            "{field}"
        );
    }
    write(&dir.path().join("config.yaml"), example);
    let output = plan(dir.path(), &["--config", "config.yaml"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn the_documentation_has_every_scheduler_and_annotation() {
    let text = doc("services.md");
    let section = |name: &str| {
        let (_, rest) = text.split_once(&format!("## {name}\n")).unwrap();
        let (section, _) = rest.split_once("\n## ").unwrap();
        first_cells(section).into_iter().collect::<BTreeSet<&str>>()
    };
    let schedulers: BTreeSet<String> = Scheduler::ALL.iter().map(Scheduler::to_string).collect();
    let flags = ["flag-1", "flag-2", "flag-3"].map(str::to_owned);
    let known: BTreeSet<String> = schedulers.into_iter().chain(flags).collect();
    let known: BTreeSet<&str> = known.iter().map(String::as_str).collect();
    assert_eq!(section("Schedulers"), known);
    let weights = [WEIGHT_ANNOTATION, WEIGHTS_ANNOTATION];
    let known = [SCHEDULER_ANNOTATIONS, FLAGS_ANNOTATIONS, weights].concat();
    assert_eq!(section("Annotations"), known.into_iter().collect());
}
