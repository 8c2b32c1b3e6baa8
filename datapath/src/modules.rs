//! Kernel modules that services need.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::{debug, warn};

/// A kernel module and what needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: &'static str,
    /// What does not work without it.
    pub serves: &'static str,
}

/// What services need. The kernel would load those of nftables by itself, one after the other while
/// a ruleset is loaded, which it begins anew after each: on a cold machine that takes a minute.
pub const NEEDED: [Module; 10] = [
    needed("ip_vs", "services"),
    needed("ip_vs_rr", "services with the scheduler rr"),
    needed("nf_conntrack", "services and source NAT"),
    needed("dummy", "VIPs"),
    needed("nf_tables", "the guard and source NAT"),
    needed("nft_ct", "source NAT"),
    needed("nft_chain_nat", "source NAT"),
    needed("nft_masq", "source NAT"),
    needed("nft_reject_inet", "the guard"),
    needed("nft_fib_inet", "the guard"),
];

const fn needed(name: &'static str, serves: &'static str) -> Module {
    Module { name, serves }
}

/// How modules are loaded now, and at each boot.
#[must_use]
pub fn remedy(names: &[&str]) -> String {
    format!(
        "load with `modprobe -a {}` (for good: a line for each in /etc/modules-load.d/ferrule.conf), \
         or use a kernel that has them",
        names.join(" ")
    )
}

/// Where distributions have the program; the agent's PATH may be empty.
const PROGRAMS: [&str; 3] = ["/sbin/modprobe", "/usr/sbin/modprobe", "/bin/modprobe"];

/// Where the kernel lists what is loaded, and most of what is built in.
const LOADED: &str = "/sys/module";

/// How long loading one may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the kernel says that it has the module. What is built in and has no
/// parameters does not show.
#[must_use]
pub fn is_loaded(name: &str) -> bool {
    Path::new(LOADED).join(name).exists()
}

/// Loads what is not there yet and returns what is missing then. That is no
/// failure by itself: a container may lack the program, or a kernel have it
/// built in without saying so. Whoever needs the module finds out, and has the
/// better message.
pub async fn load() -> Vec<Module> {
    let program = PROGRAMS.into_iter().find(|path| Path::new(path).exists());
    let mut missing = Vec::new();
    for module in NEEDED {
        if is_loaded(module.name) {
            continue;
        }
        let loaded = match program {
            Some(program) => load_one(program, module.name).await,
            None => false,
        };
        if !loaded {
            missing.push(module);
        }
    }
    missing
}

/// What could not be loaded at the last attempt. An agent that cannot program services tries
/// again for as long as it runs; its log says what is missing only when that changes.
#[derive(Debug, Default)]
pub struct Missing(Vec<Module>);

impl Missing {
    /// Loads what is not there yet, as [`load`] does.
    pub async fn load(&mut self) {
        let missing = load().await;
        if self.note(missing) {
            let names: Vec<&str> = self.0.iter().map(|module| module.name).collect();
            let mut serves: Vec<&str> = self.0.iter().map(|module| module.serves).collect();
            serves.dedup();
            warn!(
                modules = names.join(" "),
                needed_for = serves.join(", "),
                "kernel modules could not be loaded; what needs them fails and says so"
            );
        }
    }

    /// Whether there is something to tell.
    fn note(&mut self, missing: Vec<Module>) -> bool {
        let news = missing != self.0 && !missing.is_empty();
        self.0 = missing;
        news
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told_when_it_changes() {
        let mut missing = Missing::default();
        assert!(!missing.note(Vec::new()));
        assert!(missing.note(NEEDED[..2].to_vec()));
        assert!(!missing.note(NEEDED[..2].to_vec()), "told already");
        assert!(missing.note(NEEDED[..1].to_vec()));
        assert!(!missing.note(Vec::new()), "nothing is missing any more");
        assert!(missing.note(NEEDED[..1].to_vec()), "again");
    }
}
