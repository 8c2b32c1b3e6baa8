//! The client against agents that misbehave.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use ferrule_model::names::{Attachment, ContainerId, IfName};

use super::*;
use crate::{Allocation, CallError, ErrorCode};

const SHORT: Duration = Duration::from_millis(200);

fn release() -> Call {
    Call::Release {
        attachment: Attachment {
            container_id: ContainerId::try_from("abc".to_owned()).unwrap(),
            interface: IfName::try_from("eth0".to_owned()).unwrap(),
        },
    }
}

/// An agent that does `behave` with its first connection and then ends.
struct Stand {
    _folder: tempfile::TempDir,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Stand {
    fn new(behave: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || behave(listener.accept().unwrap().0));
        Self {
            _folder: folder,
            path,
            thread: Some(thread),
        }
    }

    fn call(&self) -> Result<Answer, ClientError> {
        Client::connect(&self.path, SHORT).unwrap().call(release())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn read_line(stream: &mut UnixStream) -> Vec<u8> {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
        if byte[0] == b'\n' {
            break;
        }
    }
    line
}

fn answering(bytes: &'static [u8]) -> Stand {
    Stand::new(move |mut stream| {
        read_line(&mut stream);
        stream.write_all(bytes).unwrap();
        // Wait for the client to hang up, so that it judges the bytes alone.
        let _ = stream.read(&mut [0]);
    })
}

#[test]
fn several_exchanges_go_over_one_connection() {
    let stand = Stand::new(|mut stream| {
        let request: Request = decode(&read_line(&mut stream)).unwrap();
        assert_eq!(request, Request::new(release()));
        stream
            .write_all(&encode(&Reply::new(Answer::Released)).unwrap())
            .unwrap();
        read_line(&mut stream);
        let allocation = Allocation {
            addresses: vec![
                "10.0.0.2/32".parse().unwrap(),
                "fd00::2/128".parse().unwrap(),
            ],
            mtu: 1450,
            renewed: false,
        };
        let line = encode(&Reply::new(Answer::Allocated(allocation))).unwrap();
        // In pieces, as a stream may deliver it.
        for piece in line.chunks(7) {
            stream.write_all(piece).unwrap();
            stream.flush().unwrap();
        }
        read_line(&mut stream);
        let error = CallError {
            code: ErrorCode::NotReady,
            message: "starting".to_owned(),
        };
        stream
            .write_all(&encode(&Reply::new(Answer::Error(error))).unwrap())
            .unwrap();
    });
    let mut client = Client::connect(&stand.path, Duration::from_secs(5)).unwrap();
    assert_eq!(client.call(release()).unwrap(), Answer::Released);
    let Answer::Allocated(allocation) = client.call(release()).unwrap() else {
        panic!("not allocated");
    };
    assert_eq!(allocation.ips().count(), 2);
    let Answer::Error(error) = client.call(release()).unwrap() else {
        panic!("no error");
    };
    assert_eq!(error.code, ErrorCode::NotReady);
}

#[test]
fn garbage_is_named() {
    let error = answering(b"\x00\xff\xfe\n").call().unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
    assert!(!error.agent_is_down());
    let error = answering(b"{\"version\":1,\"answer\":\"maybe\"}\n")
        .call()
        .unwrap_err();
    assert!(error.to_string().contains("maybe"), "{error}");
    let error = answering(b"{\"version\":1,\"answer\":\"released\"}\n{}\n")
        .call()
        .unwrap_err();
    assert!(matches!(
        error,
        ClientError::Protocol {
            source: FrameError::Trailing
        }
    ));
}

#[test]
fn another_version_is_named_even_if_the_rest_is_unknown() {
    let error = answering(b"{\"version\":2,\"answer\":\"maybe\"}\n")
        .call()
        .unwrap_err();
    assert!(
        matches!(error, ClientError::Version { theirs: 2 }),
        "{error}"
    );
}

#[test]
fn half_a_line_and_silence_run_into_the_deadline() {
    for bytes in [&b"{\"version\":1,\"ans"[..], b""] {
        let started = Instant::now();
        let error = answering(bytes).call().unwrap_err();
        assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
        assert!(error.may_have_taken_effect());
        assert!(started.elapsed() < SHORT * 5);
    }
}

#[test]
fn a_trickle_does_not_push_the_deadline_out() {
    let stand = Stand::new(|mut stream| {
        read_line(&mut stream);
        while stream.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let started = Instant::now();
    let error = stand.call().unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error}");
    assert!(started.elapsed() < SHORT * 5);
}

#[test]
fn half_a_line_and_hanging_up_is_an_agent_that_went_away() {
    let stand = Stand::new(|mut stream| {
        read_line(&mut stream);
        stream.write_all(b"{\"version\":1").unwrap();
    });
    let error = stand.call().unwrap_err();
    assert!(matches!(error, ClientError::Closed), "{error}");
    assert!(error.agent_is_down());
    let error = Stand::new(drop).call().unwrap_err();
    assert!(error.agent_is_down(), "{error}");
}

#[test]
fn a_line_without_end_is_cut_off() {
    let stand = Stand::new(|mut stream| {
        read_line(&mut stream);
        // Errors once the client has had enough.
        while stream.write_all(&[b'x'; 4096]).is_ok() {}
    });
    let error = stand.call().unwrap_err();
    let ClientError::Protocol {
        source: FrameError::TooLong { length },
    } = error
    else {
        panic!("{error}");
    };
    assert!(length <= MAX_LINE + 4096);
}

#[test]
fn a_client_that_failed_stays_closed() {
    let stand = answering(b"nonsense\n");
    let mut client = Client::connect(&stand.path, SHORT).unwrap();
    assert!(client.call(release()).is_err());
    assert!(matches!(client.call(release()), Err(ClientError::Closed)));
}

#[test]
fn nobody_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let error = Client::connect(&path, SHORT).unwrap_err();
    assert!(error.agent_is_down(), "{error}");
    assert!(error.to_string().contains("agent.sock"));
    // A socket whose process is gone.
    drop(UnixListener::bind(&path).unwrap());
    assert!(Client::connect(&path, SHORT).unwrap_err().agent_is_down());
    // Not a socket at all.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    assert!(Client::connect(&path, SHORT).is_err());
    let long = folder.path().join("x".repeat(200));
    let error = Client::connect(&long, SHORT).unwrap_err();
    assert!(!error.agent_is_down(), "{error}");
}

#[test]
fn a_full_backlog_runs_into_the_deadline() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = Client::connect(&path, SHORT).unwrap();
    let started = Instant::now();
    let error = Client::connect(&path, SHORT).unwrap_err();
    assert!(
        matches!(error, ClientError::ConnectTimeout { .. }),
        "{error}"
    );
    assert!(error.agent_is_down());
    assert!(started.elapsed() < SHORT * 5);
}
