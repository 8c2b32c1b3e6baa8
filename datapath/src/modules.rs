//! Kernel modules that services need.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::debug;

/// What services need. The kernel would load those of nftables by itself, one after the other while
/// a ruleset is loaded, which it begins anew after each: on a cold machine that takes a minute.
const MODULES: [&str; 10] = [
    "ip_vs",
    "ip_vs_rr",
    "nf_conntrack",
    "dummy",
    "nf_tables",
    "nft_ct",
    "nft_chain_nat",
    "nft_masq",
    "nft_reject_inet",
    "nft_fib_inet",
];

/// Where distributions have the program; the agent's PATH may be empty.
const PROGRAMS: [&str; 3] = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"];

/// Where the kernel lists what is loaded, and most of what is built in.
const LOADED: &str = "/sys/module";

/// How long loading one may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Loads what is not there yet and returns what is missing then. That is no
/// failure by itself: a container may lack the program, or a kernel have it
/// built in without saying so. Whoever needs the module finds out, and has the
/// better message.
pub(crate) async fn load() -> Vec<&'static str> {
    let program = PROGRAMS.into_iter().find(|path| Path::new(path).exists());
    let mut missing = Vec::new();
    for module in MODULES {
        if Path::new(LOADED).join(module).exists() {
            continue;
        }
        let loaded = match program {
            Some(program) => load_one(program, module).await,
            None => false,
        };
        if !loaded {
            missing.push(module);
        }
    }
    missing
}

/// What is built in counts as loaded, the program says.
async fn load_one(program: &str, module: &str) -> bool {
    let child = Command::new(program)
        .args(["-q", module])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    let outcome = timeout(TIMEOUT, child).await;
    debug!(program, module, ?outcome, "module asked for");
    matches!(outcome, Ok(Ok(status)) if status.success())
}
