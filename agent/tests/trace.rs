//! `ferrule-agent trace` as a person or a script meets it: the real binary over
//! manifests, and against an agent that is played by a thread.
//!
//! `tests/trace/ways.txt` and `way.json` are what must come out over `cluster.yaml`.
//! `UPDATE_GOLDEN=1` writes them anew; read the difference before you commit it.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use ferrule_api::{Answer, Call, CallError, ErrorCode, MAX_LINE, Reply, Request, decode, encode};
use ferrule_model::trace::live::{Check, Live};
use ferrule_model::trace::{MAX_BACKENDS, Trace};
use serde_json::Value;
use similar::TextDiff;
use tempfile::TempDir;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trace")
}

fn trace(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
    command.arg("trace").args(arguments).current_dir(folder());
    command.output().unwrap()
}

fn from_manifests(words: &str) -> Output {
    let words: Vec<&str> = words.split(' ').collect();
    let plan = ["--manifests", "cluster.yaml", "--node", "node-a"];
    trace(&[&plan[..], &words].concat())
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn check_golden(name: &str, told: &str) {
    let path = folder().join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, told).unwrap();
        return;
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let diff = TextDiff::from_lines(expected.as_str(), told);
    assert!(
        expected == told,
        "{}\nIf it is right now, write it with\n    \
         UPDATE_GOLDEN=1 cargo nextest run -p ferrule-agent --test trace",
        diff.unified_diff().header("expected", "told"),
    );
}

/// What can happen to a packet.
const WAYS: [&str; 17] = [
    // Policy Local: a client from beyond, a pod, a pod that is the backend itself.
    "--from 198.51.100.7 --to 203.0.113.10:80/tcp",
    "--from 10.244.1.10 --to 203.0.113.10:80/tcp",
    "--from 10.244.1.11 --to 192.0.2.1:30080/tcp",
    // Not within the source ranges.
    "--from 192.0.2.9 --to 203.0.113.10:80/tcp",
    // A process of the node.
    "--from 192.0.2.1 --to 10.96.0.10:80/tcp",
    "--from 2001:db8::1 --to [fd00:10:96::a]:80/tcp",
    // Weights, a scheduler and affinity; every weight 0.
    "--from 10.244.2.11 --to 10.96.0.20:53/udp",
    "--from 10.244.1.10 --to 10.96.0.30:80/tcp",
    // No endpoint; none here.
    "--from 10.244.1.10 --to 10.96.0.40:80/tcp",
    "--from 198.51.100.7 --to 192.0.2.1:30081/tcp",
    "--from 10.244.1.10 --to 10.96.0.50:80/tcp",
    // No such port; nobody's address.
    "--from 10.244.1.10 --to 10.96.0.10:81/tcp",
    "--from 10.244.1.10 --to 10.96.0.99:80/sctp",
    // A balancer's health check; a port of the node; somewhere else.
    "--from 198.51.100.7 --to 203.0.113.10:32000/tcp",
    "--from 198.51.100.7 --to 192.0.2.1:22/tcp --device eth0",
    "--from 10.244.1.10 --to 198.51.100.99:443/tcp",
    // Clients within the cluster are told by their device.
    "--from 172.16.0.5 --to 10.96.0.10:80/tcp --config by-device.yaml",
];

#[test]
fn ways_in_sentences() {
    let mut told = String::new();
    for words in WAYS {
        let output = from_manifests(words);
        assert_eq!(output.status.code(), Some(0), "{words}: {output:?}");
        assert_eq!(stderr(&output), "", "{words}");
        writeln!(told, "$ ferrule-agent trace {words}\n{}", stdout(&output)).unwrap();
    }
    check_golden("ways.txt", &told);
    let device = from_manifests(&format!("{} --device cni0 --json", WAYS[16]));
    let told: Trace = serde_json::from_str(stdout(&device)).unwrap();
    assert_eq!(told.client.within.as_deref(), Some("device"));
}

/// The form is stable: what is written once must read back the same for ever.
#[test]
fn a_way_as_json() {
    let output = from_manifests(&format!("{} --json", WAYS[1]));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    check_golden("way.json", stdout(&output));
    let read: Trace = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(read.version, 1);
    let again: Value = serde_json::to_value(&read).unwrap();
    assert_eq!(
        again,
        serde_json::from_str::<Value>(stdout(&output)).unwrap()
    );
}

#[test]
fn the_documentation_shows_what_is_printed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/trace.md")).unwrap();
    let (_, rest) = page
        .split_once("<!-- example -->\n```\n$ ferrule-agent ")
        .unwrap();
    let (block, _) = rest.split_once("```").unwrap();
    let (command, printed) = block.split_once('\n').unwrap();
    let mut agent = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
    let output = agent.args(command.split(' ')).current_dir(root);
    assert_eq!(stdout(&output.output().unwrap()), printed);
    // Every field is named.
    let output = from_manifests(&format!("{} --json", WAYS[1]));
    let told: Value = serde_json::from_str(stdout(&output)).unwrap();
    let mut fields = Vec::new();
    names(&told, &mut fields);
    assert!(fields.len() > 20);
    for field in fields {
        assert!(page.contains(&format!("`{field}`")), "{field}");
    }
}

fn names(value: &Value, fields: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                fields.push(name.clone());
                names(value, fields);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| names(value, fields)),
        _ => {}
    }
}

#[test]
fn wrong_usage_is_2_and_names_the_argument() {
    let to = "--to 10.96.0.10:80/tcp";
    for (words, said) in [
        (
            format!("--from pod-a {to}"),
            "'--from <ADDRESS>': from: \"pod-a\" is not an IP address; give the client's",
        ),
        (
            "--from 10.0.0.1 --to 10.96.0.10:80".to_owned(),
            "'--to <ADDRESS:PORT/PROTOCOL>': to: \"10.96.0.10:80\" is no address with port and protocol; write 10.96.0.10:80/tcp",
        ),
        (
            format!("--from fd00::1 {to}"),
            "ferrule-agent trace: --to: it is IPv4 and `from` is IPv6; give two addresses of one family",
        ),
        (
            format!("--from 192.0.2.1 {to} --device eth0"),
            "ferrule-agent trace: --device: 192.0.2.1 is an address of this node, and what its processes send comes by no device; leave the device out",
        ),
        (
            format!("--from 10.0.0.1 {to} --device a/b"),
            "'--device <NAME>'",
        ),
        (
            format!("--from 10.0.0.1 {to} --live"),
            "'--manifests <DIR|FILE>' cannot be used with '--live'",
        ),
        (
            format!("--from 10.0.0.1 {to} --config nowhere.yaml"),
            "configuration nowhere.yaml: cannot be read",
        ),
    ] {
        let output = from_manifests(&words);
        assert_eq!(output.status.code(), Some(2), "{words}: {output:?}");
        assert!(
            stderr(&output).contains(said),
            "{words}: {}",
            stderr(&output)
        );
        assert_eq!(stdout(&output), "");
    }
    for (arguments, said) in [
        (&["--manifests", "."][..], "--node <NAME>"),
        (&["--node", "node-a"], "--manifests <DIR|FILE>"),
        (
            &["--manifests", "nowhere", "--node", "node-a"],
            "ferrule-agent trace: --manifests nowhere: name a folder of manifests, or one of them: No such file",
        ),
        (
            &["--socket", "nowhere.sock"],
            "there is no socket nowhere.sock: is the agent running?",
        ),
    ] {
        let packet = ["--from", "10.0.0.1", "--to", "10.96.0.10:80/tcp"];
        let output = trace(&[&packet[..], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(stderr(&output).contains(said), "{}", stderr(&output));
    }
}

#[test]
fn what_can_be_read_is_traced_and_the_rest_is_1() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        folder().join("cluster.yaml"),
        dir.path().join("cluster.yaml"),
    )
    .unwrap();
    fs::write(dir.path().join("half.yaml"), "kind: {").unwrap();
    let output = trace(&[
        "--manifests",
        dir.path().to_str().unwrap(),
        "--node",
        "node-a",
        "--from",
        "10.244.1.10",
        "--to",
        "10.96.0.10:80/tcp",
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("Forwarded to one of 2 backends."));
    assert!(
        stderr(&output).contains("half.yaml: line 1"),
        "{}",
        stderr(&output)
    );
}

/// An agent that answers each call as a test wants. Its thread ends with the test's process.
fn agent(answer: impl Fn(Call) -> Answer + Send + 'static) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            let mut line = Vec::new();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            lines.read_until(b'\n', &mut line).unwrap();
            let request: Request = decode(&line).unwrap();
            let reply = encode(&Reply::new(answer(request.call))).unwrap();
            (&stream).write_all(&reply).unwrap();
        }
    });
    dir
}

fn ask(dir: &TempDir, more: &[&str]) -> Output {
    let socket = dir.path().join("agent.sock");
    let packet = ["--from", "10.244.1.10", "--to", "10.96.0.10:80/tcp"];
    let socket = ["--socket", socket.to_str().unwrap()];
    trace(&[&packet[..], &socket, more].concat())
}

fn told() -> Trace {
    let output = from_manifests("--from 10.244.1.10 --to 10.96.0.10:80/tcp --json");
    serde_json::from_str(stdout(&output)).unwrap()
}

fn check(step: &str, wrong: Option<&str>) -> Check {
    Check {
        step: step.to_owned(),
        ok: wrong.is_none(),
        says: vec![wrong.unwrap_or("It is \u{1b}[1mthere.").to_owned()],
        remedy: wrong.map(|_| "wait".to_owned()),
    }
}

#[test]
fn the_agents_answer_is_shown_and_a_broken_step_is_1() {
    let dir = agent(|call| {
        let Call::Trace(asked) = call else {
            unreachable!("{call:?}")
        };
        assert_eq!(asked.question.to.to_string(), "10.96.0.10:80/TCP");
        let mut trace = told();
        if asked.live {
            trace.live = Some(Live {
                broken: 1,
                checks: vec![check("guard", None), check("vip", Some("It is not bound."))],
            });
        }
        Answer::Trace {
            trace: Box::new(trace),
        }
    });
    let output = ask(&dir, &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(!stdout(&output).contains("kernel"));
    let output = ask(&dir, &["--live"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let (_, kernel) = stdout(&output).split_once("In the kernel").unwrap();
    assert_eq!(
        kernel,
        ", 1 step is BROKEN:\n\n\
         guard       It is \\u{1b}[1mthere.\n\
         vip         BROKEN: It is not bound.\n\
         \u{20}           Remedy: wait.\n"
    );
    let output = ask(&dir, &["--live", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let read: Value = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(read["live"]["checks"][1]["ok"], false);
}

#[test]
fn a_refusal_is_2_with_the_agents_words() {
    let dir = agent(|_| {
        Answer::Error(CallError {
            code: ErrorCode::NotReady,
            message: "ask again".to_owned(),
        })
    });
    let output = ask(&dir, &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("refuses to tell: ask again"));
    let dir = agent(|_| Answer::Tidied);
    let output = ask(&dir, &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("something else"));
}

/// Everything as large as it can be fits into a line of the socket.
#[test]
fn a_trace_of_many_backends_fits_a_line() {
    let mut cluster = fs::read_to_string(folder().join("cluster.yaml")).unwrap();
    let name = "w".repeat(253);
    let ranges: Vec<String> = (0..200)
        .map(|n| format!("\"2001:db8:{n:x}::/48\""))
        .collect();
    let ips = |n: u32| format!("2001:db8:aaaa:bbbb:cccc:dddd:1:{n:x}");
    let endpoints: Vec<String> = (1..1000)
        .map(|n| format!("  - {{addresses: [\"{}\"], nodeName: node-b}}", ips(n)))
        .collect();
    write!(
        cluster,
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  type: LoadBalancer
  clusterIPs: [\"fd00:10:96::b\"]
  loadBalancerSourceRanges: [{}]
  ports: [{{name: {name}, port: 80, targetPort: 8080}}]
status:
  loadBalancer: {{ingress: [{{ip: \"2001:db8:203::1\"}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: many, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv6
ports: [{{name: {name}, port: 8080}}]
endpoints:
{}
",
        ranges.join(", "),
        endpoints.join("\n")
    )
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("all.yaml"), cluster).unwrap();
    let file = dir.path().join("all.yaml");
    let of_file = ["--manifests", file.to_str().unwrap(), "--node", "node-a"];
    let packet = [
        "--from",
        "2001:db8:1::1",
        "--to",
        "[2001:db8:203::1]:80/tcp",
    ];
    let output = trace(&[&of_file[..], &packet, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let told: Trace = serde_json::from_str(stdout(&output)).unwrap();
    assert_eq!(
        (told.backends.len(), told.backend_count),
        (MAX_BACKENDS, 999)
    );
    let line = encode(&Reply::new(Answer::Trace {
        trace: Box::new(told),
    }))
    .unwrap();
    decode::<Reply>(&line).unwrap();
    assert!(line.len() < MAX_LINE / 2, "{} bytes", line.len());
    let output = trace(&[&of_file[..], &packet].concat());
    assert!(
        stdout(&output).contains(" and 979 more\n"),
        "{}",
        stdout(&output)
    );
}
