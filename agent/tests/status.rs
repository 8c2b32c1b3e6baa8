//! `ferrule-agent status` as a person or a script meets it: the real binary
//! against an agent that is played by a thread.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;

use ferrule_api::status::{
    Audit, Drift, FrontendRow, FrontendRows, Health, Packets, PodStatus, Problem, Programmed,
    SourceStatus, Status,
};
use ferrule_api::{Answer, Call, CallError, ErrorCode, Reply, Request, decode, encode};
use serde_json::Value;
use tempfile::TempDir;

/// An agent that answers each line as a test wants. Its thread ends with the test's process.
struct Fake {
    dir: TempDir,
}

impl Fake {
    fn new(answer: impl FnMut(Call) -> Vec<u8> + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent.sock")).unwrap();
        thread::spawn(move || serve(&listener, answer));
        Self { dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn status(&self, arguments: &[&str]) -> Output {
        status(&self.socket(), arguments).output().unwrap()
    }
}

fn serve(listener: &UnixListener, mut answer: impl FnMut(Call) -> Vec<u8>) {
    for stream in listener.incoming() {
        let stream: UnixStream = stream.unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).unwrap() > 0 {
            let request: Request = decode(&line).unwrap();
            line.clear();
            let reply = answer(request.call);
            if reply.is_empty() || (&stream).write_all(&reply).is_err() {
                break;
            }
        }
    }
}

fn status(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
    command.arg("status").args(arguments);
    command.arg("--socket").arg(socket);
    command.env_remove("NO_COLOR");
    command
}

fn reply(answer: Answer) -> Vec<u8> {
    encode(&Reply::new(answer)).unwrap()
}

fn node(problem: Option<&str>) -> Vec<u8> {
    let problems: Vec<Problem> = problem
        .map(|problem| Problem {
            object: "Service default/web".to_owned(),
            problem: problem.to_owned(),
            remedy: "wait".to_owned(),
            since: 40,
            attempts: 1,
        })
        .into_iter()
        .collect();
    reply(Answer::Status(Box::new(Status {
        health: if problems.is_empty() {
            Health::Healthy
        } else {
            Health::Degraded
        },
        node: "node-a".to_owned(),
        agent_version: "0.1.0".to_owned(),
        started: 0,
        now: 100,
        source: SourceStatus::default(),
        programmed: Programmed::default(),
        last_change: None,
        pods: PodStatus::default(),
        drift: Drift::default(),
        audit: Audit::default(),
        draining: ferrule_api::status::Draining::default(),
        failed_operations: 0,
        events: std::collections::BTreeMap::new(),
        socket: ferrule_api::status::SocketStatus::default(),
        sysctls: Vec::new(),
        packets: Packets::default(),
        problem_count: problems.len(),
        problems,
        conditions: Vec::new(),
        condition_count: 0,
    })))
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

#[test]
fn healthy_is_0() {
    let agent = Fake::new(|_| node(None));
    let output = agent.status(&[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stdout(&output).starts_with("healthy  node-a  ferrule-agent 0.1.0, up 1 min 40 s\n"));
    assert_eq!(stderr(&output), "");
}

#[test]
fn degraded_is_1_and_the_problem_is_named() {
    let agent = Fake::new(|_| node(Some("broken \u{1b}[2J")));
    let output = agent.status(&[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = stdout(&output);
    assert!(text.starts_with(
        "DEGRADED  node-a: 1 problem\n\nService default/web, for 1 min, tried once\n"
    ));
    assert!(text.contains(r"broken \u{1b}[2J"));
    assert!(!text.contains('\u{1b}'), "no colours into a pipe");
    let coloured = agent.status(&["--color", "always"]);
    assert!(stdout(&coloured).starts_with("\u{1b}[1m\u{1b}[31mDEGRADED"));
    let json = agent.status(&["-o", "json"]);
    assert_eq!(json.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["health"], "degraded");
}

#[test]
fn no_agent_is_2_and_the_remedy_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    for what in [&[][..], &["services"], &["pods", "-o", "json"]] {
        let output = status(&socket, what).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(stdout(&output), "");
        let said = stderr(&output);
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.starts_with(&format!(
            "ferrule-agent: there is no socket {}",
            socket.display()
        )));
        assert!(said.contains("systemctl status ferrule-agent"), "{said}");
    }
    drop(UnixListener::bind(&socket).unwrap());
    let output = status(&socket, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("nobody listens at"));
}

#[test]
fn a_wrong_answer_is_2() {
    let refusal = || {
        reply(Answer::Error(CallError {
            code: ErrorCode::BadRequest,
            message: "unknown call\u{1b}[2J".to_owned(),
        }))
    };
    let cases: [(Vec<u8>, &str); 5] = [
        (
            b"HTTP/1.1 400 Bad Request\n".to_vec(),
            "breaks the protocol",
        ),
        (reply(Answer::Released), "something else"),
        (refusal(), r"refuses to tell: unknown call\u{1b}[2J"),
        (
            b"{\"version\":2,\"answer\":\"released\"}\n".to_vec(),
            "version 2",
        ),
        (Vec::new(), "closed the connection"),
    ];
    for (answer, words) in cases {
        let agent = Fake::new(move |_| answer.clone());
        for what in [&[][..], &["pods", "--interval", "0"]] {
            let output = agent.status(what);
            assert_eq!(output.status.code(), Some(2), "{output:?}");
            assert!(stderr(&output).contains(words), "{output:?}");
            assert_eq!(stderr(&output).lines().count(), 1);
            assert_eq!(stdout(&output), "");
        }
    }
}

#[test]
fn a_wrong_command_line_is_2() {
    let socket = Path::new("/nowhere");
    for wrong in [
        &["-o", "yaml"][..],
        &["services", "--interval=-1"],
        &["services", "--interval", "nan"],
        &["pods", "--interval", "1e9"],
        &["nodes"],
    ] {
        let output = status(socket, wrong).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(stderr(&output).contains("Usage:") || stderr(&output).contains("--help"));
    }
}

/// Two parts of a list; each time it is asked for, every frontend has served ten more.
fn frontends() -> impl FnMut(Call) -> Vec<u8> + Send {
    let mut looks = 0;
    move |call| {
        let Call::Frontends { after } = call else {
            return Vec::new();
        };
        let (service, next) = if after.is_some() {
            ("default/web", None)
        } else {
            looks += 10;
            ("default/api", Some("default/api".to_owned()))
        };
        reply(Answer::Frontends(FrontendRows {
            rows: vec![FrontendRow {
                service: service.to_owned(),
                port: "http".to_owned(),
                kind: "ClusterIP".to_owned(),
                address: "10.96.0.10:80/TCP".to_owned(),
                action: "balance".to_owned(),
                scheduler: "rr".to_owned(),
                backends: 2,
                programmed: true,
                connections: looks,
                packets_in: 0,
                packets_out: 0,
                bytes_in: 0,
                bytes_out: 0,
            }],
            next,
        }))
    }
}

#[test]
fn a_listing_has_all_parts_and_rates() {
    let agent = Fake::new(frontends());
    let output = agent.status(&["services", "-o", "json", "--interval", "0.2"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["interval"], 0.2);
    for (index, service) in ["default/api", "default/web"].iter().enumerate() {
        let row = &json["services"][index];
        assert_eq!(row["service"], *service);
        assert_eq!(row["connections"], 20);
        // Ten in the time that really passed, which on a busy machine is longer than asked for.
        let rate = row["rates"]["connections"].as_f64().unwrap();
        assert!(rate > 0.0 && rate <= 50.0, "{rate}");
    }
    let text = agent.status(&["services", "--interval", "0"]);
    assert_eq!(stdout(&text).lines().count(), 3, "{text:?}");
    assert!(stdout(&text).starts_with("SERVICE"));
}

#[test]
fn a_list_that_goes_round_is_2() {
    let agent = Fake::new(|_| {
        reply(Answer::Frontends(FrontendRows {
            rows: Vec::new(),
            next: Some("same".to_owned()),
        }))
    });
    let output = agent.status(&["services", "--interval", "0"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(stderr(&output).contains("does not come to its end"));
}

#[test]
fn a_reader_that_left_is_no_error() {
    let (left, has_left) = mpsc::channel();
    let agent = Fake::new(move |_| {
        has_left.recv().unwrap();
        node(None)
    });
    let mut child = status(&agent.socket(), &[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    left.send(()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(stderr(&output), "");
}
