//! Kernel modules that services need.

mod lists;

use std::ops::RangeInclusive;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use tracing::{debug, info, warn};

pub use self::lists::{Lists, State};

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

/// What IPVS is, and its option for the buckets of its connection table.
const IPVS: &str = "ip_vs";
const TABLE_BITS: &str = "conn_tab_bits";

/// What lets netfilter see packets between the ports of a bridge.
pub const BRIDGE_NETFILTER: &str = "br_netfilter";

/// Binary logarithms that every 64-bit kernel takes for IPVS's connection table.
pub const CONNECTION_TABLE_BITS: RangeInclusive<u8> = 8..=20;

/// 262,144 buckets of 8 bytes. The kernel's own default of 4,096 makes lookups walk lists from
/// some ten thousand connections on.
pub const DEFAULT_CONNECTION_TABLE_BITS: u8 = 18;

/// What Services need whose scheduler is not rr. The kernel loads them when one is asked for.
const SCHEDULERS: [Module; 12] = [
    of_a_scheduler("ip_vs_wrr"),
    of_a_scheduler("ip_vs_lc"),
    of_a_scheduler("ip_vs_wlc"),
    of_a_scheduler("ip_vs_lblc"),
    of_a_scheduler("ip_vs_lblcr"),
    of_a_scheduler("ip_vs_sh"),
    of_a_scheduler("ip_vs_dh"),
    of_a_scheduler("ip_vs_sed"),
    of_a_scheduler("ip_vs_nq"),
    of_a_scheduler("ip_vs_mh"),
    of_a_scheduler("ip_vs_fo"),
    of_a_scheduler("ip_vs_ovf"),
];

const fn of_a_scheduler(name: &'static str) -> Module {
    needed(name, "the scheduler that the configuration names")
}

/// The module of a scheduler, unless [`NEEDED`] has it.
#[must_use]
pub fn of_scheduler(scheduler: &str) -> Option<Module> {
    let mut all = SCHEDULERS.into_iter();
    all.find(|module| module.name.strip_prefix("ip_vs_") == Some(scheduler))
}

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

/// Where `modprobe.d(5)` has options for modules.
const OPTIONS: [&str; 4] = [
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
];

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

/// Loads what is not there yet and returns what is missing then, or of what nothing can be known:
/// a container may lack the program and the lists. That is no failure by itself: whoever needs the
/// module finds out, and has the better message.
///
/// `table_bits`: binary logarithm of the buckets of IPVS's connection table; see
/// [`wanted_table_bits`]. It is an option of the module, for as long as that is loaded.
pub async fn load(table_bits: Option<u8>) -> Vec<(Module, State)> {
    let table_bits = wanted_table_bits(table_bits);
    let lists = Lists::read();
    let mut missing = Vec::new();
    for module in NEEDED {
        let state = lists.state(module.name);
        let of_module = table_bits.filter(|_| module.name == IPVS);
        let option = of_module.map(|bits| format!("{TABLE_BITS}={bits}"));
        if state != State::There && !load_one(module.name, option).await {
            missing.push((module, state));
        }
    }
    missing
}

/// Loads what lets netfilter see packets between the ports of a bridge, unless it is there.
pub async fn load_bridge_netfilter() -> bool {
    is_loaded(BRIDGE_NETFILTER) || load_one(BRIDGE_NETFILTER, None).await
}

/// What is asked of IPVS's connection table: what the configuration says, or our own default
/// where the machine's configuration of modules says nothing, either. `None` leaves it to that.
#[must_use]
pub fn wanted_table_bits(configured: Option<u8>) -> Option<u8> {
    let ours =
        || (!says_table_bits(&OPTIONS.map(Path::new))).then_some(DEFAULT_CONNECTION_TABLE_BITS);
    configured.or_else(ours)
}

/// Whether a file of options for modules names the size of the table.
fn says_table_bits(folders: &[&Path]) -> bool {
    let files = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok());
    let mut paths = files.flatten().flatten().map(|entry| entry.path());
    paths.any(|path| {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let mut lines = text.lines().map(str::trim_start);
        lines.any(|line| line.starts_with("options") && line.contains(TABLE_BITS))
    })
}

/// Buckets of IPVS's connection table, as a binary logarithm; `None` while there is no IPVS.
#[must_use]
pub fn connection_table_bits() -> Option<u8> {
    let path = Path::new(LOADED)
        .join(IPVS)
        .join("parameters")
        .join(TABLE_BITS);
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// What could not be loaded at the last attempt. An agent that cannot program services tries
/// again for as long as it runs; its log says what is missing only when that changes.
#[derive(Debug, Default)]
pub struct Missing(Vec<(Module, State)>);

impl Missing {
    /// Loads what is not there yet, as [`load`] does.
    pub async fn load(&mut self, table_bits: Option<u8>) {
        let missing = load(table_bits).await;
        if !self.note(missing) {
            return;
        }
        let (unknown, missing): (Vec<_>, Vec<_>) =
            (self.0.iter()).partition(|(_, state)| *state == State::Unknown);
        if !missing.is_empty() {
            let (modules, needed_for) = told(&missing);
            warn!(
                modules,
                needed_for, "kernel modules could not be loaded; what needs them fails and says so"
            );
        }
        if !unknown.is_empty() {
            let (modules, needed_for) = told(&unknown);
            info!(
                modules,
                needed_for,
                "kernel modules could neither be loaded nor looked up below /lib/modules; if the \
                 kernel has them built in, all is well, and what lacks one says so"
            );
        }
    }

    /// Whether there is something to tell.
    fn note(&mut self, missing: Vec<(Module, State)>) -> bool {
        let news = missing != self.0 && !missing.is_empty();
        self.0 = missing;
        news
    }
}

/// Their names, and what needs them.
fn told(modules: &[&(Module, State)]) -> (String, String) {
    let names: Vec<&str> = modules.iter().map(|(module, _)| module.name).collect();
    let mut serves: Vec<&str> = modules.iter().map(|(module, _)| module.serves).collect();
    serves.dedup();
    (names.join(" "), serves.join(", "))
}

/// What is built in counts as loaded, the program says.
async fn load_one(module: &str, option: Option<String>) -> bool {
    let program = PROGRAMS.into_iter().find(|path| Path::new(path).exists());
    let Some(program) = program else {
        return false;
    };
    let child = Command::new(program)
        .args(["-q", module])
        .args(option)
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
    use ferrule_model::service::Scheduler;

    use super::*;

    #[test]
    fn what_is_missing_is_told_when_it_changes() {
        let mut missing = Missing::default();
        let absent = |count: usize| -> Vec<(Module, State)> {
            let modules = NEEDED.into_iter().take(count);
            modules.map(|module| (module, State::Absent)).collect()
        };
        assert!(!missing.note(Vec::new()));
        assert!(missing.note(absent(2)));
        assert!(!missing.note(absent(2)), "told already");
        assert!(missing.note(absent(1)));
        assert!(!missing.note(Vec::new()), "nothing is missing any more");
        assert!(missing.note(absent(1)), "again");
        assert!(missing.note(vec![(NEEDED[0], State::Unknown)]), "another");
    }

    #[test]
    fn every_scheduler_has_a_module() {
        for name in Scheduler::names()
            .split([',', ' '])
            .filter(|name| !name.is_empty())
        {
            let needed = NEEDED
                .iter()
                .any(|module| module.name == format!("ip_vs_{name}"));
            assert!(needed || of_scheduler(name).is_some(), "{name}");
        }
        assert_eq!(of_scheduler("none"), None);
    }

    #[test]
    fn what_the_machine_says_of_the_table_holds() {
        let folder = tempfile::tempdir().unwrap();
        let folders = [folder.path(), Path::new("/nowhere")];
        let path = folder.path().join("lvs.conf");
        for (text, says) in [
            ("# options ip_vs conn_tab_bits=20\n", false),
            ("options ip_vs conn_tab_bits=20\n", true),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(says_table_bits(&folders), says, "{text}");
        }
        assert_eq!(wanted_table_bits(Some(12)), Some(12));
    }
}
