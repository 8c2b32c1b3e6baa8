//! Health checks: the agent that answers them, and a client that reads the answer.
//!
//! Only the agent serves HTTP, so it runs on node-a where a table asks for a health check.
//! It finds everything programmed, and has nothing to change.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::cast::{self, Cast};
use crate::context::Context;
use crate::process::Process;
use crate::sock::Outcome;
use crate::wait;

/// How long the agent may take to start, and to find what it has to do done.
const START: Duration = Duration::from_mins(3);

/// Pause before a proxy that is not healthy yet is asked again.
const PAUSE: Duration = Duration::from_millis(200);

/// Starts the agent on node-a. It ends when the process is dropped.
pub(super) fn start(
    context: &Context,
    cast: &Cast,
    manifests: &Path,
    config: Option<&Path>,
) -> anyhow::Result<Process> {
    let folder = context.folder();
    let log = fs::File::create(folder.join("agent.log"))?;
    let socket = folder.join("agent.sock");
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .args(["run", "--node", cast::NODE, "--manifests"])
        .arg(manifests)
        .arg("--state-dir")
        .arg(folder.join("state"))
        .arg("--socket")
        .arg(&socket);
    if let Some(config) = config {
        command.arg("--config").arg(config);
    }
    command
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let mut agent = cast.node().spawn(&mut command)?;
    wait::for_some("the agent's socket", START, || {
        if let Some(status) = agent.ended()? {
            bail!("the agent ended at its start: {status}");
        }
        Ok(UnixStream::connect(&socket).ok())
    })?;
    wait::until_ok("an agent that has looked at the kernel", START, || {
        let told = fs::read_to_string(folder.join("agent.log"))?;
        ensure!(told.contains("the kernel's state was adopted"), "{told}");
        Ok(())
    })?;
    Ok(agent)
}

/// Asks a health check from the calling thread's namespace. What it says, such as `200/2`
/// or `closed`, is the name of who answers. While the agent has not programmed everything
/// once it says that it is not healthy, and is asked again.
pub(super) fn ask(to: SocketAddr, limit: Duration) -> anyhow::Result<Outcome> {
    let end = Instant::now() + limit;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let answer = match exchange(to, left.max(PAUSE)) {
            Ok(answer) => answer,
            Err(error) => {
                return match error.kind() {
                    // The agent binds a port a moment after it knows of it.
                    ErrorKind::ConnectionRefused if !left.is_zero() => {
                        thread::sleep(PAUSE);
                        continue;
                    }
                    ErrorKind::ConnectionRefused => Ok(Outcome::Refused),
                    ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                        Ok(Outcome::Unreachable)
                    }
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(Outcome::TimedOut),
                    _ => Err(error.into()),
                };
            }
        };
        let by = match read(&answer)? {
            Said::Unhealthy if !left.is_zero() => {
                thread::sleep(PAUSE);
                continue;
            }
            Said::Unhealthy => "unhealthy".to_owned(),
            Said::Words(words) => words,
        };
        return Ok(Outcome::Answered { by, saw: to });
    }
}

fn exchange(to: SocketAddr, limit: Duration) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    match stream.read_to_string(&mut answer) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(String::new()),
        read => read.map(|_| answer),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Said {
    Words(String),
    Unhealthy,
}

/// Status and number of endpoints, which header and body must agree about.
fn read(answer: &str) -> anyhow::Result<Said> {
    if answer.is_empty() {
        return Ok(Said::Words("closed".to_owned()));
    }
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer has a head")?;
    let status = head.split(' ').nth(1).context("an answer has a status")?;
    let weight = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        let is_weight = name.eq_ignore_ascii_case("x-load-balancing-endpoint-weight");
        is_weight.then_some(value)
    });
    let body: Value = serde_json::from_str(body).with_context(|| format!("body of {answer:?}"))?;
    if body["serviceProxyHealthy"] != true {
        return Ok(Said::Unhealthy);
    }
    let endpoints = body["localEndpoints"].to_string();
    if weight != Some(endpoints.as_str()) || !body["service"]["name"].is_string() {
        bail!("header and body do not agree: {answer:?}");
    }
    Ok(Said::Words(format!("{status}/{endpoints}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_and_body_are_read() {
        let answer = |weight: &str, healthy: bool| {
            format!(
                "HTTP/1.1 200 OK\r\nX-Load-Balancing-Endpoint-Weight: {weight}\r\n\r\n\
                {{\"service\":{{\"namespace\":\"default\",\"name\":\"web\"}},\
                \"localEndpoints\":2,\"serviceProxyHealthy\":{healthy}}}"
            )
        };
        assert_eq!(
            read(&answer("2", true)).unwrap(),
            Said::Words("200/2".to_owned())
        );
        assert_eq!(read(&answer("2", false)).unwrap(), Said::Unhealthy);
        assert_eq!(read("").unwrap(), Said::Words("closed".to_owned()));
        assert!(read(&answer("3", true)).is_err());
        assert!(read("HTTP/1.1 200 OK\r\n\r\nwords").is_err());
    }
}
