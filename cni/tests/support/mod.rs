//! A node of one's own for each test: a network namespace, pods beside it, a
//! stand-in for the agent, and the plugin run as a runtime would.
//!
//! Only the calling thread is in the node's namespace; threads and processes
//! started from it are, too. nextest runs each test in its own process, and
//! under `cargo test` each has its own thread, so nothing is shared.

#![allow(
    dead_code,
    clippy::panic,
    reason = "each test binary uses its own part; a test ends at the first surprise"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ferrule_api::status::{PodRow, PodRows};
use ferrule_api::{
    Allocation, Answer, Call, CallError, Client, ErrorCode, HostPort, Lease, Reply, Request,
};
use ferrule_model::names::{Attachment, ContainerId, IfName};
use ferrule_model::ownership;
use ipnetwork::IpNetwork;
use rustix::thread::{
    ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe,
};
use serde_json::{Value, json};

/// Address of the node, which pods reach over their gateway.
pub(crate) const NODE_V4: &str = "192.168.77.1";
pub(crate) const NODE_V6: &str = "fd77::1";

/// MTU that the stand-in hands out.
pub(crate) const MTU: u32 = 1440;

fn new_namespace() {
    // SAFETY: CLONE_NEWNET changes nothing that other threads share.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
}

/// Runs `ip` in the caller's namespace.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// `ip -d -j`, parsed.
pub(crate) fn ip_json(arguments: &str) -> Value {
    let text = ip(&format!("-d -j {arguments}"));
    if text.trim().is_empty() {
        return json!([]);
    }
    serde_json::from_str(&text).unwrap()
}

/// Names of the caller's links that look like ours.
pub(crate) fn our_links() -> Vec<String> {
    ip_json("link show")
        .as_array()
        .unwrap()
        .iter()
        .map(|link| link["ifname"].as_str().unwrap().to_owned())
        .filter(|name| {
            [ownership::HOST_VETH_PREFIX, ownership::SHAPER_PREFIX]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .collect()
}

/// The attachment of a container's `eth0`.
pub(crate) fn attachment(container: &str) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(container.to_owned()).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

/// A pod's network namespace; it ends when this is dropped.
pub(crate) struct Pod {
    namespace: File,
}

impl Pod {
    pub(crate) fn new() -> Self {
        let namespace = thread::spawn(|| {
            new_namespace();
            File::open("/proc/thread-self/ns/net").unwrap()
        })
        .join()
        .unwrap();
        Self { namespace }
    }

    /// A path that other processes can open.
    pub(crate) fn path(&self) -> String {
        format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.namespace.as_raw_fd()
        )
    }

    /// Does `work` in a thread inside the namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    let namespace = self.namespace.as_fd();
                    move_into_thread_name_spaces(namespace, ThreadNameSpaceType::NETWORK).unwrap();
                    work()
                })
                .join()
                .unwrap()
        })
    }
}

/// What the stand-in does with a call.
#[derive(Clone, Debug)]
pub(crate) enum Mood {
    Works,
    /// Leases, but dies before it has answered.
    HangsUp,
    Refuses(ErrorCode),
    Says(String),
}

/// A stand-in for the agent: leases in memory.
#[derive(Clone)]
pub(crate) struct Agent {
    leases: Arc<Mutex<BTreeMap<Attachment, Allocation>>>,
    networks: Arc<Mutex<BTreeMap<Attachment, String>>>,
    mood: Arc<Mutex<Mood>>,
    /// Host ports of the last lease that was asked for.
    pub(crate) ports: Arc<Mutex<Option<Vec<HostPort>>>>,
}

impl Agent {
    fn serve(&self, stream: UnixStream) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut stream = stream;
        while let Some(Ok(line)) = lines.next() {
            let request: Request = ferrule_api::decode(line.as_bytes()).unwrap();
            let mood = self.mood.lock().unwrap().clone();
            let reply = match mood {
                Mood::Works => ferrule_api::encode(&Reply::new(self.answer(request.call))).unwrap(),
                Mood::HangsUp => {
                    self.answer(request.call);
                    return;
                }
                Mood::Refuses(code) => {
                    let message = "says the stand-in".to_owned();
                    let answer = Answer::Error(CallError { code, message });
                    ferrule_api::encode(&Reply::new(answer)).unwrap()
                }
                Mood::Says(text) => text.into_bytes(),
            };
            if stream.write_all(&reply).is_err() {
                return;
            }
        }
    }

    fn answer(&self, call: Call) -> Answer {
        let mut leases = self.leases.lock().unwrap();
        match call {
            Call::Allocate(wanted) => {
                *self.ports.lock().unwrap() = Some(wanted.ports);
                let number = leases.len() + 2;
                let mut addresses: Vec<IpNetwork> = vec![
                    format!("10.1.0.{number}/32").parse().unwrap(),
                    format!("fd01::{number}/128").parse().unwrap(),
                ];
                for ip in wanted.ips {
                    addresses[usize::from(ip.is_ipv6())] = IpNetwork::from(ip);
                }
                if let Some(network) = wanted.network {
                    let mut networks = self.networks.lock().unwrap();
                    networks.insert(wanted.attachment.clone(), network.to_string());
                }
                let renewed = leases.contains_key(&wanted.attachment);
                let allocation = leases.entry(wanted.attachment).or_insert(Allocation {
                    addresses,
                    mtu: MTU,
                    renewed: false,
                });
                Answer::Allocated(Allocation {
                    renewed,
                    ..allocation.clone()
                })
            }
            Call::Release { attachment } => {
                leases.remove(&attachment);
                Answer::Released
            }
            Call::Ready => Answer::Ready,
            Call::Lease { attachment } => {
                let found = leases.get(&attachment);
                Answer::Lease(Lease {
                    addresses: found.map_or_else(Vec::new, |found| found.addresses.clone()),
                    ports: self.ports.lock().unwrap().clone().unwrap_or_default(),
                })
            }
            Call::Tidy => Answer::Tidied,
            // One at a time, so that parts are put together.
            Call::Pods { after } => {
                let start = after.map_or(0, |text| text.parse().unwrap());
                let mut rows = leases
                    .iter()
                    .skip(start)
                    .map(|(attachment, allocation)| PodRow {
                        pod: String::new(),
                        container_id: attachment.container_id.to_string(),
                        interface: attachment.interface.to_string(),
                        network: self.networks.lock().unwrap().get(attachment).cloned(),
                        addresses: allocation.ips().map(|ip| ip.to_string()).collect(),
                        host_interface: String::new(),
                        packets_in: 0,
                        packets_out: 0,
                        bytes_in: 0,
                        bytes_out: 0,
                    });
                let row = rows.next();
                let next = rows.next().map(|_| (start + 1).to_string());
                Answer::Pods(PodRows {
                    rows: row.into_iter().collect(),
                    next,
                })
            }
            Call::Status | Call::Frontends { .. } | Call::Trace(_) => {
                unreachable!("the plugin does not ask for this")
            }
        }
    }

    pub(crate) fn leases(&self) -> usize {
        self.leases.lock().unwrap().len()
    }

    /// Loses a lease.
    pub(crate) fn forget(&self, attachment: &Attachment) {
        self.leases.lock().unwrap().remove(attachment);
    }

    pub(crate) fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Leases these addresses to an attachment.
    pub(crate) fn lease(&self, attachment: Attachment, addresses: &[&str]) {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let allocation = Allocation {
            addresses,
            mtu: MTU,
            renewed: false,
        };
        self.leases.lock().unwrap().insert(attachment, allocation);
    }
}

/// What the plugin has said.
#[derive(Debug)]
pub(crate) struct Said {
    /// None after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Said {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| panic!("{self:?}"))
    }

    /// The result; the verb must have worked.
    pub(crate) fn result(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        if self.stdout.is_empty() {
            Value::Null
        } else {
            self.json()
        }
    }

    /// The error object; the verb must have failed with `code`.
    pub(crate) fn error(&self, code: u32) -> Value {
        assert_eq!(self.code, Some(1), "{self:?}");
        let error = self.json();
        assert_eq!(error["code"], code, "{error}");
        assert!(error["cniVersion"].is_string(), "{error}");
        error
    }
}

/// A node: the caller's thread is in its namespace from now on.
pub(crate) struct Node {
    folder: tempfile::TempDir,
    pub(crate) agent: Agent,
    pub(crate) version: &'static str,
    /// Further fields of the network configuration.
    pub(crate) extra: Value,
}

impl Node {
    /// With the stand-in running.
    pub(crate) fn new() -> Self {
        let node = Self::without_agent();
        node.start_agent();
        node
    }

    pub(crate) fn without_agent() -> Self {
        new_namespace();
        ip("link set lo up");
        ip("link add uplink type veth peer name far");
        ip(&format!("addr add {NODE_V4}/24 dev uplink"));
        ip(&format!("addr add {NODE_V6}/64 dev uplink nodad"));
        ip("link set far up");
        ip("link set uplink up");
        for name in ["ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{name}"), "1").unwrap();
        }
        Self {
            folder: tempfile::tempdir().unwrap(),
            agent: Agent {
                leases: Arc::default(),
                networks: Arc::default(),
                mood: Arc::new(Mutex::new(Mood::Works)),
                ports: Arc::default(),
            },
            version: "1.0.0",
            extra: json!({}),
        }
    }

    pub(crate) fn start_agent(&self) {
        let path = self.socket();
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(path).unwrap();
        let agent = self.agent.clone();
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let agent = agent.clone();
                thread::spawn(move || agent.serve(stream.unwrap()));
            }
        });
    }

    /// New connections find nobody.
    pub(crate) fn stop_agent(&self) {
        fs::remove_file(self.socket()).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// What waits for the agent.
    pub(crate) fn queued(&self) -> Vec<(PathBuf, Attachment)> {
        ferrule_api::queue::list(&self.state_dir()).unwrap()
    }

    /// Does what the agent does when it starts.
    pub(crate) fn drain(&self) {
        for (path, attachment) in self.queued() {
            let mut client = Client::connect(&self.socket(), Duration::from_secs(5)).unwrap();
            let answer = client.call(Call::Release { attachment }).unwrap();
            assert_eq!(answer, Answer::Released);
            ferrule_api::queue::remove(&path).unwrap();
        }
    }

    pub(crate) fn config(&self) -> Value {
        let mut config = json!({
            "cniVersion": self.version,
            "name": "pods",
            "type": "ferrule",
            "agentSocket": self.socket(),
            "stateDir": self.state_dir(),
            "capabilities": {"portMappings": true},
        });
        for (key, value) in self.extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    /// Runs a verb for a container's `eth0`.
    pub(crate) fn call(&self, verb: &str, container: &str, netns: &str) -> Said {
        self.call_with(verb, container, netns, &[])
    }

    pub(crate) fn call_with(
        &self,
        verb: &str,
        container: &str,
        netns: &str,
        variables: &[(&str, &str)],
    ) -> Said {
        let mut all = vec![
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", container),
            ("CNI_NETNS", netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", "/opt/cni/bin"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web",
            ),
        ];
        all.extend_from_slice(variables);
        run(&all, self.config().to_string().as_bytes())
    }

    /// ADD that must work.
    pub(crate) fn add(&self, container: &str, pod: &Pod) -> Value {
        self.call("ADD", container, &pod.path()).result()
    }

    /// DEL that must work.
    pub(crate) fn del(&self, container: &str, netns: &str) {
        let said = self.call("DEL", container, netns);
        assert_eq!(said.result(), Value::Null);
    }

    /// Nothing of ours is left anywhere.
    pub(crate) fn assert_clean(&self) {
        assert_eq!(our_links(), Vec::<String>::new());
        assert_eq!(ip_json("route show proto 101"), json!([]));
        assert_eq!(ip_json("-6 route show proto 101"), json!([]));
        assert_eq!(self.agent.leases(), 0, "a lease is left");
        assert_eq!(self.queued(), []);
    }
}

/// Runs the plugin with exactly these variables and this input.
pub(crate) fn run(variables: &[(&str, &str)], input: &[u8]) -> Said {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ferrule"))
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The plugin may end without having read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    Said {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Makes a connection and returns whom the server saw. A socket belongs to the
/// namespace in which it was made, so listening and dialling may be done in
/// different ones, and accepting anywhere.
pub(crate) fn connect(
    listen: impl FnOnce() -> TcpListener,
    dial: impl FnOnce(SocketAddr) -> TcpStream,
) -> IpAddr {
    let listener = listen();
    let _stream = dial(listener.local_addr().unwrap());
    listener.accept().unwrap().1.ip()
}

/// Listens on a free port of an address.
pub(crate) fn listen(ip: &str) -> TcpListener {
    TcpListener::bind((ip.parse::<IpAddr>().unwrap(), 0)).unwrap()
}

/// Connects, quickly or not at all.
pub(crate) fn dial(target: SocketAddr) -> TcpStream {
    TcpStream::connect_timeout(&target, Duration::from_secs(3))
        .unwrap_or_else(|error| panic!("{target}: {error}"))
}
