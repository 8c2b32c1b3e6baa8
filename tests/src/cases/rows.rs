//! Tables of calls: who asks whom, who must answer, and from which address.
//!
//! A row stands for one call over each transport to each of its targets. All of
//! a table is called at the same time, and every call that went wrong is told,
//! with what the servers saw of it: a request that arrives from an address to
//! which there is no way back looks like a silent server to its client.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::thread;

use anyhow::{anyhow, ensure};

use crate::netns::Netns;
use crate::sock::{ANSWER, Outcome, Request, Server, TRANSPORTS};

/// Where masqueraded connections never come from.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// Whom a row calls: a name for people, and an address of each family.
#[derive(Clone, Debug)]
pub(super) struct Target {
    what: String,
    at: Vec<SocketAddr>,
}

impl Target {
    pub(super) fn new(what: impl Into<String>, ips: &[IpAddr], port: u16) -> Self {
        Self {
            what: what.into(),
            at: ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect(),
        }
    }
}

/// One of the table.
#[derive(Debug)]
pub(super) struct Row<'a> {
    from: &'a Netns,
    from_port: Option<u16>,
    to: Target,
    expected: Expected<'a>,
}

/// What must become of a call.
#[derive(Debug)]
enum Expected<'a> {
    /// This server answers and has seen one of these addresses.
    Answered {
        by: &'a str,
        saw: Vec<IpAddr>,
        masqueraded: bool,
    },
    /// A reset or "port unreachable".
    Refused,
}

impl<'a> Row<'a> {
    /// A call that `by` has to answer, seeing it come from one of `saw`.
    pub(super) fn answered(from: &'a Netns, to: Target, by: &'a str, saw: &[IpAddr]) -> Self {
        let expected = Expected::Answered {
            by,
            saw: saw.to_vec(),
            masqueraded: false,
        };
        Self::new(from, to, expected)
    }

    /// Likewise; `saw` are addresses of the node that masquerades it, and the
    /// port must be none that could be a node port.
    pub(super) fn masqueraded(from: &'a Netns, to: Target, by: &'a str, saw: &[IpAddr]) -> Self {
        let expected = Expected::Answered {
            by,
            saw: saw.to_vec(),
            masqueraded: true,
        };
        Self::new(from, to, expected)
    }

    /// A call that has to be refused.
    pub(super) fn refused(from: &'a Netns, to: Target) -> Self {
        Self::new(from, to, Expected::Refused)
    }

    fn new(from: &'a Netns, to: Target, expected: Expected<'a>) -> Self {
        Self {
            from,
            from_port: None,
            to,
            expected,
        }
    }

    /// The same from a port of the client's choice.
    pub(super) fn bound_to(mut self, port: u16) -> Self {
        self.from_port = Some(port);
        self
    }

    fn calls(&self) -> Vec<Call<'_>> {
        let mut calls = Vec::new();
        for to in &self.to.at {
            for transport in TRANSPORTS {
                let request = Request::new(transport, *to).bound_to(self.from_port);
                calls.push(Call { row: self, request });
            }
        }
        calls
    }
}

/// One request of a row.
struct Call<'a> {
    row: &'a Row<'a>,
    request: Request,
}

impl Expected<'_> {
    /// What is wrong with how a call ended.
    fn complaint(&self, outcome: &Outcome) -> Option<String> {
        match (self, outcome) {
            (
                Self::Answered {
                    by,
                    saw,
                    masqueraded,
                },
                Outcome::Answered {
                    by: answered,
                    saw: seen,
                },
            ) => {
                if answered != by {
                    Some(format!("{answered} answered (it saw {seen}), not {by}"))
                } else if !saw.contains(&seen.ip()) {
                    Some(format!("{by} saw {seen}, none of {:?}", like(saw, *seen)))
                } else if *masqueraded && NODE_PORTS.contains(&seen.port()) {
                    Some(format!("{by} saw {seen}, whose port may be a node port"))
                } else {
                    None
                }
            }
            (Self::Answered { by, .. }, other) => {
                Some(format!("{other:?} instead of an answer of {by}"))
            }
            (Self::Refused, Outcome::Refused) => None,
            (Self::Refused, other) => Some(format!("{other:?} instead of a refusal")),
        }
    }
}

impl fmt::Display for Call<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Request { transport, to, .. } = &self.request;
        let (from, what) = (self.row.from.name(), &self.row.to.what);
        let family = if to.is_ipv4() { "IPv4" } else { "IPv6" };
        write!(out, "{from} to {what}, {family} {transport:?} {to}")?;
        match self.row.from_port {
            Some(port) => write!(out, " from port {port}"),
            None => Ok(()),
        }
    }
}

/// Those of a family.
fn like(ips: &[IpAddr], other: SocketAddr) -> Vec<IpAddr> {
    let family = ips.iter().filter(|ip| ip.is_ipv4() == other.is_ipv4());
    family.copied().collect()
}

/// Calls all and tells what went wrong, and what the servers saw of it.
pub(super) fn check<'a>(
    rows: &[Row<'_>],
    servers: impl IntoIterator<Item = &'a Server>,
) -> anyhow::Result<()> {
    let calls: Vec<Call<'_>> = rows.iter().flat_map(Row::calls).collect();
    ensure!(!calls.is_empty(), "an empty table proves nothing");
    let outcomes: Vec<anyhow::Result<Outcome>> = thread::scope(|scope| {
        let threads: Vec<_> = calls
            .iter()
            .map(|call| scope.spawn(|| call.request.send(call.row.from, ANSWER)))
            .collect();
        let joined = threads.into_iter().map(|thread| match thread.join() {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow!("the client panicked")),
        });
        joined.collect()
    });
    let seen: Vec<_> = servers.into_iter().flat_map(Server::seen).collect();
    let mut wrong = Vec::new();
    for (call, outcome) in calls.iter().zip(outcomes) {
        let complaint = match outcome {
            Ok(outcome) => call.row.expected.complaint(&outcome),
            Err(error) => Some(format!("{error:#}")),
        };
        if let Some(complaint) = complaint {
            let arrived = seen.iter().find(|seen| seen.word == call.request.word);
            let arrived = arrived.map_or("it did not arrive".to_owned(), |seen| {
                format!("it arrived from {}", seen.from)
            });
            wrong.push(format!("{call}: {complaint}; {arrived}"));
        }
    }
    ensure!(
        wrong.is_empty(),
        "{} of {} calls:\n{}",
        wrong.len(),
        calls.len(),
        wrong.join("\n")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(by: &str, saw: ([u8; 4], u16)) -> Outcome {
        Outcome::Answered {
            by: by.to_owned(),
            saw: saw.into(),
        }
    }

    #[test]
    fn every_deviation_is_a_complaint() {
        const NODE: [u8; 4] = [192, 0, 2, 1];
        let expected = |masqueraded| Expected::Answered {
            by: "backend",
            saw: vec![NODE.into()],
            masqueraded,
        };
        let right = answered("backend", (NODE, 29_999));
        assert_eq!(expected(true).complaint(&right), None);
        for wrong in [
            answered("other", (NODE, 29_999)),
            answered("backend", ([10, 96, 0, 10], 29_999)),
            answered("backend", (NODE, 30_000)),
            answered("backend", (NODE, 32_767)),
            Outcome::Refused,
            Outcome::TimedOut,
        ] {
            assert!(expected(true).complaint(&wrong).is_some(), "{wrong:?}");
        }
        let kept = answered("backend", (NODE, 30_000));
        assert_eq!(expected(false).complaint(&kept), None);
        assert_eq!(Expected::Refused.complaint(&Outcome::Refused), None);
        for wrong in [right, Outcome::TimedOut, Outcome::Unreachable] {
            assert!(Expected::Refused.complaint(&wrong).is_some(), "{wrong:?}");
        }
    }
}
