//! `packets.txt`: who calls what, who must answer, and whom they see.
//!
//! A line has four or five words; `#` begins a comment.
//!
//! ```text
//! # client  transports  target           expected      source
//! outside   any         web/balancer:80  a1,a2         client
//! client-b  tcp         node-a:30080     b1,b2         node-a
//! a1        any         web:80           a1=node-a,a2  client
//! stranger  any         web/balancer:80  dropped
//! client-a  udp4        10.96.0.99:53    refused
//! wait 5
//! outside   tcp         node-a:32000     200/2
//! ```
//!
//! *Client*: somebody of the cast; `outside@30123` calls once, from that port. *Transports*: `tcp`, `udp`, `sctp`, `any` (TCP and
//! UDP), of one family with `4` or `6` behind it, several with commas. *Target*:
//! `SERVICE:PORT` is the Service's cluster addresses, `SERVICE/external:PORT` and
//! `SERVICE/balancer:PORT` those outside, `NAME:PORT` somebody of the cast (a Service of
//! the same name would hide them); or an address, `[…]` around one of IPv6; several with
//! commas. *Expected*: all backends that answer, one after the other, and nobody else
//! does; `same:` before them: one of them, every time the same; `within:`: nobody else
//! answers; `still:`: the one who answered this client before the last wait; `other:`: one
//! who did not; or `refused`; or `dropped` (by us), or `lost` (by whomever); or what a health
//! check says, `200/2` (status and local endpoints), or `closed`. *Source*: whom they see, `client`, `node-a` (then
//! never from a port that could be a node port, unless a process of node-a calls), `target`
//! (the address that was called) or several with `|`; a backend can have its own behind `=`.
//!
//! `wait N` lets N seconds pass; IPVS then forgets a flow of UDP after one second.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ferrule_model::kube::{Object, Service};

use super::cast;
use crate::sock::Transport;

/// A line.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) line: usize,
    pub(super) client: String,
    /// The port that the client calls from, where it matters.
    pub(super) port: Option<u16>,
    /// What passes before it.
    pub(super) wait: Duration,
    pub(super) transports: Vec<(Transport, Option<Family>)>,
    pub(super) targets: Vec<SocketAddr>,
    pub(super) target: String,
    pub(super) expected: Expected,
}

/// One family alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }
}

/// What becomes of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Backends answer; each sees one of these.
    Answered(How, BTreeMap<String, Vec<Source>>),
    Refused,
    Dropped,
    Lost,
    /// The words of a health check.
    Says(String),
}

/// Which of the backends answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Each,
    Same,
    Within,
    Still,
    Other,
}

/// Whom a backend sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Client,
    Node,
    Target,
}

impl Row {
    pub(super) fn calls_sctp(&self) -> bool {
        let mut transports = self.transports.iter();
        transports.any(|(transport, _)| *transport == Transport::Sctp)
    }

    /// Each transport to each address for which it is meant.
    pub(super) fn calls(&self) -> impl Iterator<Item = (Transport, SocketAddr)> {
        self.transports.iter().flat_map(|(transport, family)| {
            let meant = |to: &&SocketAddr| family.is_none_or(|family| family.has(to.ip()));
            let targets = self.targets.iter().filter(meant);
            targets.map(|to| (*transport, *to))
        })
    }
}

/// Reads the table; `objects` are the cluster, whose Services are called.
pub(super) fn parse(text: &str, objects: &[Object]) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut wait = Duration::ZERO;
    for (line, text) in (1..).zip(text.lines()) {
        let words = text.split('#').next().unwrap_or_default();
        let words: Vec<&str> = words.split_whitespace().collect();
        let place = || format!("packets.txt, line {line}");
        if let ["wait", seconds] = words[..] {
            wait += Duration::from_secs(seconds.parse().with_context(place)?);
        } else if !words.is_empty() {
            let mut row = row(line, &words, objects).with_context(place)?;
            row.wait = std::mem::take(&mut wait);
            rows.push(row);
        }
    }
    ensure!(wait.is_zero(), "packets.txt waits at its end");
    Ok(rows)
}

fn row(line: usize, words: &[&str], objects: &[Object]) -> anyhow::Result<Row> {
    let (client, transports_word, target, expected, source) = match words {
        [client, transports, target, expected] => (client, transports, target, expected, None),
        [client, transports, target, expected, source] => {
            (client, transports, target, expected, Some(source))
        }
        _ => bail!("{} words; write four or five", words.len()),
    };
    let (client, port) = match client.split_once('@') {
        Some((client, port)) => (client, Some(port.parse().context("port of the client")?)),
        None => (*client, None),
    };
    ensure!(
        cast::ips(client).is_some(),
        "nobody is called {client} who could call"
    );
    let mut targets = Vec::new();
    for part in target.split(',') {
        targets.extend(self::targets(part, objects)?);
    }
    let row = Row {
        line,
        client: client.to_owned(),
        port,
        wait: Duration::ZERO,
        transports: transports(transports_word)?,
        targets,
        target: (*target).to_owned(),
        expected: self::expected(expected, source.copied())?,
    };
    for (transport, family) in &row.transports {
        let any = row.calls().any(|(called, to)| {
            called == *transport && family.is_none_or(|family| family.has(to.ip()))
        });
        ensure!(any, "{transports_word} to {target} calls nothing");
    }
    Ok(row)
}

fn transports(word: &str) -> anyhow::Result<Vec<(Transport, Option<Family>)>> {
    let mut transports = Vec::new();
    for part in word.split(',') {
        let (name, family) = match part.strip_suffix('4') {
            Some(name) => (name, Some(Family::V4)),
            None => match part.strip_suffix('6') {
                Some(name) => (name, Some(Family::V6)),
                None => (part, None),
            },
        };
        let of_name: &[Transport] = match name {
            "tcp" => &[Transport::Tcp],
            "udp" => &[Transport::Udp],
            "sctp" => &[Transport::Sctp],
            "any" => &[Transport::Tcp, Transport::Udp],
            _ => bail!("{part} is no transport"),
        };
        transports.extend(of_name.iter().map(|transport| (*transport, family)));
    }
    Ok(transports)
}

fn targets(word: &str, objects: &[Object]) -> anyhow::Result<Vec<SocketAddr>> {
    if let Ok(address) = word.parse() {
        return Ok(vec![address]);
    }
    let (what, port) = word.rsplit_once(':').context("a target has a port")?;
    let port = port
        .parse()
        .with_context(|| format!("{port} is no port number"))?;
    let (name, kind) = what.split_once('/').unwrap_or((what, "cluster"));
    let service = objects.iter().find_map(|object| match object {
        Object::Service(service) if service.metadata.name == name => Some(service),
        _ => None,
    });
    let ips = match service {
        Some(service) => addresses(service, kind)?,
        None if kind == "cluster" => cast::ips(name)
            .with_context(|| format!("no Service and nobody is called {name}"))?
            .to_vec(),
        None => bail!("no Service is called {name}"),
    };
    ensure!(!ips.is_empty(), "{what} has no address");
    let with_port = ips.into_iter().map(|ip| SocketAddr::new(ip, port));
    Ok(with_port.collect())
}

fn addresses(service: &Service, kind: &str) -> anyhow::Result<Vec<IpAddr>> {
    let ingress = &service.status.load_balancer.ingress;
    let texts: Vec<&str> = match kind {
        "cluster" if service.spec.cluster_ips.is_empty() => vec![&service.spec.cluster_ip],
        "cluster" => service
            .spec
            .cluster_ips
            .iter()
            .map(String::as_str)
            .collect(),
        "external" => service
            .spec
            .external_ips
            .iter()
            .map(String::as_str)
            .collect(),
        "balancer" => ingress.iter().map(|entry| entry.ip.as_str()).collect(),
        _ => bail!("{kind} is no kind of address; write external or balancer"),
    };
    let texts = texts.into_iter().filter(|text| !text.is_empty());
    texts
        .map(|text| {
            text.parse()
                .with_context(|| format!("{text} is no address"))
        })
        .collect()
}

fn expected(word: &str, source: Option<&str>) -> anyhow::Result<Expected> {
    match (word, source) {
        ("refused", None) => return Ok(Expected::Refused),
        ("dropped", None) => return Ok(Expected::Dropped),
        ("lost", None) => return Ok(Expected::Lost),
        ("refused" | "dropped" | "lost", Some(_)) => bail!("nobody sees what is {word}"),
        (_, None) if word == "closed" || word.contains('/') => {
            return Ok(Expected::Says(word.to_owned()));
        }
        _ => {}
    }
    let (how, names) = match word.split_once(':') {
        None => (How::Each, word),
        Some(("same", names)) => (How::Same, names),
        Some(("within", names)) => (How::Within, names),
        Some(("still", names)) => (How::Still, names),
        Some(("other", names)) => (How::Other, names),
        Some((how, _)) => bail!("{how}: is none of same:, within:, still:, other:"),
    };
    let mut backends = BTreeMap::new();
    for part in names.split(',') {
        let (name, own) = match part.split_once('=') {
            Some((name, own)) => (name, Some(own)),
            None => (part, source),
        };
        ensure!(cast::is_backend(name), "no backend is called {name}");
        let seen = own.with_context(|| format!("say whom {name} sees"))?;
        let seen = seen.split('|').map(self::source);
        backends.insert(name.to_owned(), seen.collect::<anyhow::Result<_>>()?);
    }
    Ok(Expected::Answered(how, backends))
}

fn source(word: &str) -> anyhow::Result<Source> {
    Ok(match word {
        "client" => Source::Client,
        "node-a" => Source::Node,
        "target" => Source::Target,
        _ => bail!("{word} is none whom a backend sees; write client, node-a or target"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> anyhow::Result<Row> {
        parse(line, &[]).map(|mut rows| rows.remove(0))
    }

    #[test]
    fn a_line_says_it_all() {
        let row = one("a1 tcp,udp6 node-b:30080 a1=node-a,b1 client|target # why").unwrap();
        let calls: Vec<_> = row.calls().collect();
        let [v4, v6] = ["192.0.2.3:30080", "[2001:db8::3]:30080"].map(|at| at.parse().unwrap());
        let expected = [
            (Transport::Tcp, v4),
            (Transport::Tcp, v6),
            (Transport::Udp, v6),
        ];
        assert_eq!(calls, expected);
        let Expected::Answered(How::Each, backends) = row.expected else {
            panic!("{row:?}");
        };
        assert_eq!(backends["a1"], [Source::Node]);
        assert_eq!(backends["b1"], [Source::Client, Source::Target]);
    }

    #[test]
    fn time_passes_before_a_row_and_a_client_may_have_a_port() {
        let rows = parse(
            "a1@30123 udp node-b:80 within:b1 client\nwait 2\nwait 1\n\na1 udp node-b:80 200/2\n",
            &[],
        );
        let [first, second] = <[Row; 2]>::try_from(rows.unwrap()).unwrap();
        assert_eq!((first.port, first.wait), (Some(30123), Duration::ZERO));
        assert_eq!(first.client, "a1");
        assert_eq!(second.wait, Duration::from_secs(3));
        assert_eq!(second.expected, Expected::Says("200/2".to_owned()));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for wrong in [
            "a1 tcp node-b:80",
            "nobody tcp node-b:80 refused",
            "a1 icmp node-b:80 refused",
            "a1 tcp nobody:80 refused",
            "a1 tcp node-b refused",
            "a1 tcp6 10.0.0.1:80 refused",
            "a1 tcp node-b:80 refused client",
            "a1 tcp node-b:80 b1",
            "a1 tcp node-b:80 b3 client",
            "a1 tcp node-b:80 some:b1 client",
            "a1 tcp node-b:80 b1 me",
            "a1 tcp node-b:80 lost client",
            "a1@x tcp node-b:80 refused",
            "wait long",
            "wait 1",
        ] {
            assert!(one(wrong).is_err(), "{wrong}");
        }
    }
}
