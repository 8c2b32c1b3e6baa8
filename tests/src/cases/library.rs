//! The tests' own tools: a check that cannot fail proves nothing.

use std::net::SocketAddr;

use anyhow::ensure;

use crate::context::Context;
use crate::link::{End, batch, veth};
use crate::sock::{ANSWER, Connection, Outcome, Request, SILENCE, Server, TRANSPORTS, send_all};

/// The four outcomes of a request, over both transports and both families.
pub(super) fn answered_refused_unreachable_silent(context: &mut Context) -> anyhow::Result<()> {
    let left = context.netns("left")?;
    let right = context.netns("right")?;
    veth(
        End {
            namespace: &left,
            device: "to-right",
            addresses: &["192.0.2.1/24", "2001:db8::1/64"],
        },
        End {
            namespace: &right,
            device: "to-left",
            addresses: &["192.0.2.2/24", "2001:db8::2/64"],
        },
    )?;
    right.output(
        "nft",
        &["add table inet silence { chain input { type filter hook input priority 0; meta l4proto { tcp, udp } th dport 9 drop; }; }"],
    )?;
    batch(
        &left,
        [
            "route add prohibit 198.51.100.0/24",
            "route add prohibit 2001:db8:1::/64",
        ],
    )?;
    let servers = Server::everywhere(&right, "right", 80)?;
    let mut unanswered = Vec::new();
    for (ip, own, nowhere) in [
        ("192.0.2.2", "192.0.2.1", "198.51.100.1"),
        ("2001:db8::2", "2001:db8::1", "2001:db8:1::1"),
    ] {
        for transport in TRANSPORTS {
            let to = |ip: &str, port| anyhow::Ok(SocketAddr::new(ip.parse()?, port));
            let request = Request::new(transport, to(ip, 80)?);
            match request.send(&left, ANSWER)? {
                Outcome::Answered { by, saw } => {
                    ensure!(by == "right" && saw.ip() == own.parse::<std::net::IpAddr>()?);
                }
                other => anyhow::bail!("{request:?}: {other:?}"),
            }
            let bound = Request::new(transport, to(ip, 80)?).bound_to(Some(31_000));
            match bound.send(&left, ANSWER)? {
                Outcome::Answered { saw, .. } => ensure!(saw.port() == 31_000, "{saw}"),
                other => anyhow::bail!("{bound:?}: {other:?}"),
            }
            let seen = servers.iter().flat_map(Server::seen);
            ensure!(seen.filter(|seen| seen.word == request.word).count() == 1);
            unanswered.extend([
                (Request::new(transport, to(ip, 81)?), Outcome::Refused),
                (
                    Request::new(transport, to(nowhere, 80)?),
                    Outcome::Unreachable,
                ),
                (Request::new(transport, to(ip, 9)?), Outcome::TimedOut),
            ]);
        }
    }
    let requests: Vec<_> = unanswered
        .iter()
        .map(|(request, _)| request.clone())
        .collect();
    let outcomes = send_all(&left, &requests, SILENCE)?;
    for ((request, expected), outcome) in unanswered.iter().zip(outcomes) {
        ensure!(outcome == *expected, "{request:?}: {outcome:?}");
    }
    many_at_once(&left, &right)
}

fn many_at_once(left: &crate::netns::Netns, right: &crate::netns::Netns) -> anyhow::Result<()> {
    let to = "192.0.2.2:82".parse()?;
    let server = Server::start(right, "many", crate::sock::Transport::Tcp, to)?;
    let requests: Vec<_> = (0..50)
        .map(|_| Request::new(crate::sock::Transport::Tcp, to))
        .collect();
    for outcome in send_all(left, &requests, ANSWER)? {
        ensure!(matches!(outcome, Outcome::Answered { .. }), "{outcome:?}");
    }
    ensure!(server.seen().len() == requests.len());
    let mut connection = Connection::open(left, to)?;
    for word in ["once", "twice"] {
        let outcome = connection.ask(word, ANSWER)?;
        ensure!(matches!(outcome, Outcome::Answered { .. }), "{outcome:?}");
    }
    drop(server);
    let outcome = connection.ask("too late", ANSWER)?;
    ensure!(outcome == Outcome::Refused, "after its end: {outcome:?}");
    Ok(())
}

/// A dropped namespace is gone with its devices, and programs started in it run in it.
pub(super) fn nothing_is_left_of_a_namespace(context: &mut Context) -> anyhow::Result<()> {
    let left = context.netns("left")?;
    let right = context.netns("right")?;
    let end = |namespace, device| End {
        namespace,
        device,
        addresses: &[],
    };
    veth(end(&left, "a"), end(&right, "b"))?;
    ensure!(right.links()? == ["b", "lo"], "{:?}", right.links());
    ensure!(
        right
            .output("ip", &["-o", "link", "show", "dev", "b"])?
            .contains("b@")
    );
    let path = right.path().to_owned();
    drop(right);
    ensure!(!path.exists(), "{} still exists", path.display());
    crate::wait::until_ok("the end of the pair", crate::wait::SETTLED, || {
        let links = left.links()?;
        ensure!(links == ["lo"], "still there: {links:?}");
        Ok(())
    })
}
