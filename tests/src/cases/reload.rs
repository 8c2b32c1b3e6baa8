//! The configuration changes under a running agent.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::ensure;

use super::world::{self, Backend};
use crate::context::Context;
use crate::http;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{ANSWER, Connection, Outcome};
use crate::wait;

/// Where the agent tells what it counts, and what holds.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

fn write(node: &Node, lines: &str) -> anyhow::Result<()> {
    node.write_config(&format!(
        "apiVersion: ferrule.io/v1alpha1\nkind: AgentConfiguration\n{lines}"
    ))
}

fn wait_for_scheduler(node: &Node, scheduler: &str) -> anyhow::Result<()> {
    world::wait_for_ipvs(node, "the configured scheduler", |table| {
        let services = table.lines().filter(|line| !line.trim().starts_with("->"));
        let mut ours = services.filter(|line| line.contains("10.96.0.10:80"));
        ours.all(|line| line.ends_with(&format!(" {scheduler}")))
    })?;
    Ok(())
}

/// On SIGHUP at once, and without it soon; a broken file is told and changes nothing, and
/// no connection notices.
pub(super) fn a_change_takes_effect_live(context: &mut Context) -> anyhow::Result<()> {
    let node = Node::create(context, "node-a")?;
    write(&node, "scheduler: rr\n")?;
    node.start()?;
    // Some give it as soon as they see the process.
    node.hangup()?;
    let backend = Backend::create(context, &node, "backend")?;
    let client = Pod::added(context, &node, "client")?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    node.write_manifest("slices.yaml", &world::slices("web", &[&backend.pod])?)?;
    world::wait_for_service(client.netns(), 10, 80)?;
    wait_for_scheduler(&node, "rr")?;
    let to = SocketAddr::new(world::vips(10)[0], 80);
    let mut connection = Connection::open(client.netns(), to)?;
    let agent = context.binary("ferrule-agent")?;
    let (agent, socket) = (agent.to_string_lossy(), node.socket());
    let socket = socket.to_string_lossy();
    let status = || {
        let arguments = ["status", "--socket", &socket, "--output", "json"];
        // It fails where something is wrong, and prints all the same.
        node.netns().output(
            "sh",
            &[
                "-c",
                "\"$@\" || true",
                "sh",
                &agent,
                arguments[0],
                arguments[1],
                arguments[2],
                arguments[3],
                arguments[4],
            ],
        )
    };

    write(&node, "scheduler: wlc\n")?;
    node.hangup()?;
    wait_for_scheduler(&node, "wlc")?;
    wait::until_ok("the new configuration at /configz", wait::SETTLED, || {
        let answer = http::get(node.netns(), METRICS, "/configz", "")?;
        ensure!(answer.body.contains(r#""scheduler":"wlc""#), "{answer:?}");
        Ok(())
    })?;

    write(&node, "scheduler: fastest\n")?;
    node.hangup()?;
    wait::until_ok("the fault of the file", wait::SETTLED, || {
        let status = status()?;
        ensure!(
            status.contains("scheduler: \\\"fastest\\\" is none"),
            "{status}"
        );
        Ok(())
    })?;
    wait_for_scheduler(&node, "wlc")?;

    // Nobody says anything this time.
    let estimates = || node.netns().sysctl("ipv4/vs/run_estimation");
    ensure!(estimates()? == "1", "IPVS estimates no rates");
    let never = "estimation: never\n";
    write(
        &node,
        &format!("scheduler: sed\nvipBinding: route\n{never}"),
    )?;
    wait_for_scheduler(&node, "sed")?;
    wait::until_ok("the end of the fault", wait::SETTLED, || {
        let status = status()?;
        ensure!(!status.contains("is none; write one of"), "{status}");
        Ok(())
    })?;
    ensure!(estimates()? == "0", "IPVS estimates rates still");
    let log = node.log()?;
    let said = log
        .lines()
        .any(|line| line.contains("next start") && line.contains("vipBinding"));
    ensure!(said, "nothing of what waits in the log:\n{log}");
    node.check_alive()?;
    let outcome = connection.ask("still-there", ANSWER)?;
    ensure!(matches!(outcome, Outcome::Answered { .. }), "{outcome:?}");
    Ok(())
}
