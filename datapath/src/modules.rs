//! Kernel modules that services need.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::debug;

/// What services need, and what for.
const MODULES: [&str; 4] = ["ip_vs", "ip_vs_rr", "nf_conntrack", "dummy"];

/// Where distributions have the program; the agent's PATH may be empty.
const PROGRAMS: [&str; 3] = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"];

/// How long loading may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Asks for the modules to be loaded. What is built in, or loaded, counts as
/// loaded. A failure shows where the module is needed, with a better message
/// than this place could give; so it is only noted here.
pub(crate) async fn load() {
    for program in PROGRAMS {
        if !std::path::Path::new(program).exists() {
            continue;
        }
        let child = Command::new(program)
            .args(["-q", "-a"])
            .args(MODULES)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .status();
        match timeout(TIMEOUT, child).await {
            Ok(status) => debug!(program, ?status, "modules asked for"),
            Err(_elapsed) => debug!(program, "modules did not load within {TIMEOUT:?}"),
        }
        return;
    }
    debug!("no modprobe here");
}
