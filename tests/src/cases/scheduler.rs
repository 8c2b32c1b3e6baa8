//! The scheduler of a Service that is in use.

use std::net::SocketAddr;

use anyhow::{bail, ensure};

use super::world::{self, Backend};
use crate::context::Context;
use crate::dump;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::sock::{ANSWER, Connection, Outcome};

/// All of them but the one that a Service has without asking, which comes last.
const SCHEDULERS: [&str; 13] = [
    "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "fo", "ovf", "rr",
];

/// A client that goes on talking through a Service while that changes its scheduler
/// to each that there is: connections stay where they are, nothing is made anew.
pub(super) fn a_change_breaks_no_connection(context: &mut Context) -> anyhow::Result<()> {
    let node = world::started_node(context)?;
    let backends = [
        Backend::create(context, &node, "backend-1")?,
        Backend::create(context, &node, "backend-2")?,
    ];
    let client = Pod::added(context, &node, "client")?;
    let pods = backends.each_ref().map(|backend| &backend.pod);
    node.write_manifest("slices.yaml", &world::slices("web", &pods)?)?;
    node.write_manifest("web.yaml", &world::service("web", 10, 80))?;
    world::wait_for_service(client.netns(), 10, 80)?;
    let mut talks = Talks::begin(client.netns())?;
    let counted = world::wait_for_count(&node, "TCP 10.96.0.10:80")?;
    for scheduler in SCHEDULERS {
        let annotated = world::service("web", 10, 80).replace(
            "  namespace: default\n",
            &format!(
                "  namespace: default\n  annotations: {{ferrule.io/scheduler: {scheduler}}}\n"
            ),
        );
        node.overwrite_manifest("web.yaml", &annotated)?;
        is_in_use(&node, scheduler)?;
        talks.go_on(scheduler)?;
        // A virtual service that was made anew would count from nothing.
        let now = dump::connections(node.netns(), "TCP 10.96.0.10:80")?;
        ensure!(now >= Some(counted), "{scheduler}: {counted}, then {now:?}");
        world::wait_for_service(client.netns(), 10, 80)?;
    }
    node.check_alive()
}

/// Waits until both families and transports have the scheduler.
fn is_in_use(node: &Node, scheduler: &str) -> anyhow::Result<()> {
    world::wait_for_ipvs(node, scheduler, |table| {
        let services = table.lines().filter(|line| !line.contains("->"));
        let mut count = 0;
        let all = services.inspect(|_| count += 1).all(|line| {
            let mut words = line.split_whitespace();
            words.nth(2) == Some(scheduler)
        });
        all && count == 4
    })?;
    Ok(())
}

/// Connections to both VIPs, and who answers on them.
struct Talks(Vec<(Connection, Option<String>)>);

impl Talks {
    fn begin(from: &Netns) -> anyhow::Result<Self> {
        let mut talks = Vec::new();
        // Two to each VIP, so that both backends are called.
        for vip in world::vips(10).repeat(2) {
            talks.push((Connection::open(from, SocketAddr::new(vip, 80))?, None));
        }
        let mut talks = Self(talks);
        talks.go_on("rr")?;
        Ok(talks)
    }

    fn go_on(&mut self, scheduler: &str) -> anyhow::Result<()> {
        for (connection, before) in &mut self.0 {
            let Outcome::Answered { by, .. } = connection.ask("still there?", ANSWER)? else {
                bail!("a connection broke when the scheduler became {scheduler}");
            };
            let known = before.get_or_insert_with(|| by.clone());
            ensure!(*known == by, "{known} answered, and with {scheduler} {by}");
        }
        Ok(())
    }
}
