//! Asking the agent over HTTP, as a balancer, a probe or Prometheus does.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context as _;

use crate::netns::Netns;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// Body.
    pub body: String,
}

/// Asks from a namespace. `more` is a header line, or empty.
///
/// # Errors
/// When nobody answers, or what comes is no HTTP.
pub fn get(from: &Netns, to: SocketAddr, path: &str, more: &str) -> anyhow::Result<Answer> {
    let text = from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let more = if more.is_empty() {
            String::new()
        } else {
            format!("{more}\r\n")
        };
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n");
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    let text = text.with_context(|| format!("{to}{path}"))?;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .context("an answer has a head")?;
    let status = head.split(' ').nth(1).context("an answer has a status")?;
    Ok(Answer {
        status: status.parse()?,
        head: head.to_lowercase(),
        body: body.to_owned(),
    })
}
