//! `docs/status.md` shows what the agent of a real node said.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};

use super::audit::wait_for_status as wait_for;
use super::world::{self, Backend};
use crate::context::Context;
use crate::netns::Netns;
use crate::node::{Node, manifest};
use crate::pod::Pod;
use crate::sock::{Outcome, Request, SILENCE, Transport};
use crate::{dump, golden, wait};

/// Units behind which a number is a span of time, and words that follow a count.
const UNITS: [&str; 6] = ["µs", "ms", "s", "min", "h", "d"];

/// A healthy node, then one with everything wrong that is easily brought about.
/// Numbers and the folder of the manifests are not compared.
pub(super) fn docs_show_a_real_node(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let outside = world::outside(context, &node)?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::node_port_service("web", 10, 80, 30_080))?;
    node.write_manifest("web-slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    node.write_manifest("empty.yaml", &world::service("empty", 11, 80))?;
    world::wait_for_service(client.netns(), 10, 80)?;
    world::wait_for_service(&outside, 10, 80)?;
    let node_port = SocketAddr::from(([192, 0, 2, 1], 30_080));
    // The node's addresses may be known a moment after the first Services.
    wait::until_ok("an answer at the node port", wait::SETTLED, || {
        world::ask(&outside, Transport::Tcp, node_port).map(drop)
    })?;
    let [vip, _] = world::vips(10);
    let nobody = Request::new(Transport::Tcp, SocketAddr::new(vip, 81));
    let outcome = nobody.send(client.netns(), SILENCE)?;
    ensure!(outcome == Outcome::Refused, "{outcome:?}");
    wait_for(context, &node, "a round of the audit", |told| {
        let audit = &told["audit"];
        audit["lastRound"].is_number()
            && audit["servicesAt"].is_number()
            && audit["filterAt"].is_number()
            && told["health"] == "healthy"
    })?;
    check(context, &node, "healthy", 0)?;

    let bad = world::service("cache", 12, 80).replace("port: 80,", "port: 70000,");
    node.write_manifest("cache.yaml", &bad)?;
    let sticky = world::service("legacy", 13, 80);
    let sticky = sticky.replace("spec:\n", "spec:\n  sessionAffinity: clientip\n");
    node.write_manifest("legacy.yaml", &sticky)?;
    let small = manifest(
        "node-a",
        &["10.244.1.0/29", "fd00:10:244:1::/64"],
        &[("InternalIP", "192.0.2.1"), ("InternalIP", "2001:db8::1")],
    );
    node.write_manifest("node.yaml", &small)?;
    wait::until_ok("the VIPs of three Services", wait::SETTLED, || {
        ensure!(dump::vips(node.netns())?.len() == 6);
        Ok(())
    })?;
    node.netns()
        .output("ip", &["link", "delete", "kube-ipvs0"])?;
    let mut pods = Vec::new();
    wait::until_ok("an ADD that finds no address", wait::SETTLED, || {
        let mut pod = Pod::create(context, &format!("pod-{}", pods.len()))?;
        let added = pod.add_once(&node).is_ok();
        pods.push(pod);
        ensure!(!added, "{} more pods have an address", pods.len());
        Ok(())
    })?;
    wait_for(context, &node, "what is wrong", |told| {
        told["problemCount"] == 2
            && told["conditionCount"] == 1
            && told["programmed"]["pending"] == 0
            && told["drift"]["repaired"]["device"] == 1
    })?;
    check(context, &node, "broken", 1)
}

/// Compares with a block of the documentation, or writes it with `UPDATE_DOCS=1`.
fn check(context: &Context, node: &Node, block: &str, code: i32) -> anyhow::Result<()> {
    let shown = text(context, node.netns(), node, code)?;
    let folder = node.manifests().display().to_string();
    let shown = shown.replace(&folder, "/etc/ferrule/manifests");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/status.md");
    let docs = fs::read_to_string(&path)?;
    let marker = format!("<!-- {block} -->\n```\n");
    let begin = docs.find(&marker).context("the marker")? + marker.len();
    let end = begin + docs[begin..].find("```").context("the end of the block")?;
    let (documented, said) = (without_numbers(&docs[begin..end]), without_numbers(&shown));
    if documented == said {
        return Ok(());
    }
    if std::env::var_os("UPDATE_DOCS").is_some_and(|value| value == "1") {
        let docs = format!("{}{shown}{}", &docs[..begin], &docs[end..]);
        return Ok(fs::write(&path, docs)?);
    }
    anyhow::bail!(
        "docs/status.md shows another {block} node; UPDATE_DOCS=1 VM_WRITABLE=docs writes it\n{}\n{shown}",
        golden::difference(&documented, &said)
    )
}

fn text(context: &Context, netns: &Netns, node: &Node, code: i32) -> anyhow::Result<String> {
    let mut command = Command::new(context.binary("ferrule-agent")?);
    command
        .args(["status", "--socket"])
        .arg(node.socket())
        .stdin(Stdio::null());
    let output = netns.run(|| Ok(command.output()?))?;
    ensure!(output.status.code() == Some(code), "{output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// A word a line, numbers and spans of time as `#`: where lines are broken
/// depends on how long numbers are.
fn without_numbers(text: &str) -> String {
    let text = text.replace("since just now", "for 0 s");
    let text = text.replace("just now", "0 s ago");
    let mut words: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let core = word.trim_end_matches([',', ';', ':', '.', ')', '%']);
        let end = &word[core.len()..];
        let number = core.starts_with(|c: char| c.is_ascii_digit())
            && core.chars().all(|c| c.is_ascii_digit() || c == '.')
            && core.matches('.').count() < 2;
        let after_number = words.last().is_some_and(|last| last == "#");
        if number && after_number {
            // The second part of a span: 3 min 20 s.
        } else if number {
            words.push(format!("#{end}"));
        } else if after_number && UNITS.contains(&core) {
            if !end.is_empty() {
                words.pop();
                words.push(format!("#{end}"));
            }
        } else {
            words.push(word.to_owned());
        }
    }
    words.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_counts_are_the_same_and_addresses_are_not() {
        let masked = |text: &str| without_numbers(text).replace('\n', " ");
        assert_eq!(masked("up 3 d 4 h\n"), "up #");
        assert_eq!(masked("up 12 s"), "up #");
        assert_eq!(masked("services just now"), masked("services 3 s ago"));
        assert_eq!(
            masked("4 min 10 s ago: 6 steps, 62 ms from seen"),
            "# ago: # steps, # from seen"
        );
        assert_eq!(masked("takes 1.5 s at 0.3 % of"), "takes # at # % of");
        assert_eq!(
            masked("10.0.0.0/8: 61 used, 0 free"),
            "10.0.0.0/8: # used, # free"
        );
    }
}
