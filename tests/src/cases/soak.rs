//! What long random runs have in common: what the agent plans, whether the kernel
//! holds it, and whether memory grew.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::ensure;

use crate::netns;
use crate::node::Node;
use crate::process::Usage;

/// Tells whoever watches how far a run is.
pub(super) fn say(words: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "     {words}")?;
    Ok(out.flush()?)
}

/// What the agent would program of the manifests in the node's folder.
pub(super) fn plan(agent: &Path, node: &Node) -> anyhow::Result<String> {
    let mut plan = Command::new(agent);
    plan.arg("plan").arg("--manifests").arg(node.manifests());
    netns::check(plan.args(["--node", node.netns().name()]))
}

/// That the lines of plan and kernel are the same.
pub(super) fn as_planned(difference: &[String]) -> anyhow::Result<()> {
    ensure!(
        difference.is_empty(),
        "- is planned, + in the kernel:\n{}",
        difference.join("\n")
    );
    Ok(())
}

/// Memory of the agent: the median of a few looks, because it goes on auditing.
pub(super) fn memory(node: &Node) -> anyhow::Result<Usage> {
    let mut looks = Vec::new();
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(200));
        looks.push(node.usage()?);
    }
    looks.sort_unstable_by_key(|usage| usage.resident);
    Ok(looks[looks.len() / 2])
}

/// That memory for the same objects is at most so many percent of what it was.
pub(super) fn not_grown(before: Usage, after: Usage, percent: u64) -> anyhow::Result<()> {
    ensure!(
        after.resident * 100 <= before.resident * percent,
        "memory grew from {} to {} KiB with the same objects",
        before.resident,
        after.resident
    );
    Ok(())
}
