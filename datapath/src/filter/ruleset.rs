//! The ruleset, and the program that loads it.

use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ferrule_model::address::Family;
use ferrule_model::network::outermost;
use ferrule_model::ownership::HOST_VETH_PREFIX;
use ferrule_model::source_nat::SourceNat;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Element, counters};

/// How long the program may take.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Longest name of a table; the kernel has `NFT_NAME_MAXLEN` 256 with the end.
const MAX_NAME: usize = 255;

/// Why the ruleset could not be loaded or removed.
#[derive(Debug, thiserror::Error)]
pub enum RulesetError {
    /// The name would not be read as a name.
    #[error(
        "{0:?} cannot be the name of an nftables table; take a letter, then letters, digits, '_' or '-'"
    )]
    Name(String),
    /// The program could not be run.
    #[error(
        "cannot run {program}: {source}; install nftables, or name the program in the settings"
    )]
    Run {
        /// Its path or name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The program took too long.
    #[error("{program} did not end within {TIMEOUT:?}")]
    Timeout {
        /// Its path or name.
        program: String,
    },
    /// The program, or the kernel, refused.
    #[error("{program} refused the ruleset: {words}")]
    Refused {
        /// Its path or name.
        program: String,
        /// What it said.
        words: String,
    },
}

/// Chains of our table.
const CHAINS: [&str; 5] = [
    "guard-remote",
    "guard-local",
    "vip-without-service",
    "source-nat",
    "replace-source",
];

/// Those of them that replace sources.
pub(crate) const SOURCE_NAT_CHAINS: [&str; 2] = ["source-nat", "replace-source"];

/// Makes table, sets and chains as they should be, in one transaction. The
/// sets keep their elements and the counters their counts; a second time
/// changes nothing. `present` are the chains that the table has: those that
/// another put there go. Without `nat` the rules that replace sources stay what
/// they are.
///
/// # Errors
/// [`RulesetError`]; nothing was changed then.
pub async fn load(
    program: &Path,
    table: &str,
    nat: Option<&SourceNat>,
    present: &[String],
) -> Result<(), RulesetError> {
    check_name(table)?;
    let mut text = Ruleset::whole(table, nat);
    // Rules of foreign chains may refer to one another: all are emptied before the first goes.
    for verb in ["flush", "delete"] {
        for chain in present.iter().filter(|chain| !CHAINS.contains(&&***chain)) {
            check_name(chain)?;
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{verb} chain inet {table} {chain}");
        }
    }
    run(program, text).await
}

/// Makes the table anew, with these elements, in one transaction: for what another
/// made of it that cannot be put right in its place, such as a set of another type,
/// a chain at another hook, or a chain with a name that the program cannot read.
///
/// # Errors
/// [`RulesetError`]; nothing was changed then.
pub async fn load_anew(
    program: &Path,
    table: &str,
    nat: &SourceNat,
    elements: &[Element],
) -> Result<(), RulesetError> {
    check_name(table)?;
    // To delete what may not be there: make it first, in the same transaction.
    let mut text = format!("add table inet {table}\ndelete table inet {table}\n");
    text.push_str(&Ruleset::whole(table, Some(nat)));
    for element in elements {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "add element inet {table} {} {{ {} }}",
            element.set(),
            element.text()
        );
    }
    run(program, text).await
}

/// Whether program and kernel take our ruleset; changes nothing, but the kernel may
/// load modules for it.
///
/// # Errors
/// [`RulesetError`].
pub async fn check(program: &Path, table: &str) -> Result<(), RulesetError> {
    check_name(table)?;
    execute(
        program,
        &["--check", "-f", "-"],
        Ruleset::whole(table, None),
    )
    .await
}

/// Removes our table with all that is in it. One that is gone is fine.
///
/// # Errors
/// [`RulesetError`].
pub async fn remove(program: &Path, table: &str) -> Result<(), RulesetError> {
    check_name(table)?;
    // To delete what may not be there: make it first, in the same transaction.
    let text = format!("add table inet {table}\ndelete table inet {table}\n");
    run(program, text).await
}

/// The name becomes part of a program's text: it must not say more than a name.
fn check_name(table: &str) -> Result<(), RulesetError> {
    let mut bytes = table.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic());
    let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
    if first && rest && table.len() <= MAX_NAME {
        Ok(())
    } else {
        Err(RulesetError::Name(table.to_owned()))
    }
}

/// The text of our ruleset. Sets and counters are added where missing; chains
/// are emptied and filled anew.
struct Ruleset<'a> {
    table: &'a str,
    text: String,
}

impl<'a> Ruleset<'a> {
    fn whole(table: &'a str, nat: Option<&SourceNat>) -> String {
        let mut ours = Self::new(table);
        for chain in CHAINS {
            if nat.is_some() || !SOURCE_NAT_CHAINS.contains(&chain) {
                // Writing to a String cannot fail.
                let _ = writeln!(ours.text, "flush chain inet {table} {chain}");
            }
        }
        ours.guard();
        if let Some(nat) = nat {
            ours.source_nat(nat);
        }
        ours.text
    }

    fn new(table: &'a str) -> Self {
        let mut text =
            format!("add table inet {table} {{ comment \"Ferrule: services of this node\"; }}\n");
        for (family, ip) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
            let frontend = format!("{ip} . inet_proto . inet_service");
            for (set, kind, why) in [
                ("vips", ip, "VIPs under guard"),
                ("frontends", &frontend, "VIPs with their service ports"),
                (
                    "external",
                    &frontend,
                    "frontends that are called from outside",
                ),
                (
                    "preserved",
                    &frontend,
                    "those of them whose backends see the client",
                ),
                (
                    "hairpins",
                    &format!("{ip} . {ip}"),
                    "backends of this node that may call themselves",
                ),
            ] {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    text,
                    "add set inet {table} {set}{family} {{ type {kind}; comment \"{why}\"; }}"
                );
            }
        }
        for counter in counters::ALL {
            let _ = writeln!(text, "add counter inet {table} {counter}");
        }
        for (chain, hook, why) in [
            (
                "guard-remote",
                "type filter hook input priority 110",
                "behind IPVS, which takes at 98 and 99 what is for a service",
            ),
            (
                "guard-local",
                "type filter hook output priority -90",
                "behind IPVS, which takes at -99 and -98 what is for a service",
            ),
            (
                "source-nat",
                "type nat hook postrouting priority 100",
                "behind IPVS, which has chosen the backend",
            ),
        ] {
            let _ = writeln!(
                text,
                "add chain inet {table} {chain} {{ {hook}; policy accept; comment \"{why}\"; }}"
            );
        }
        for chain in ["vip-without-service", "replace-source"] {
            let _ = writeln!(text, "add chain inet {table} {chain}");
        }
        Self { table, text }
    }

    fn rule(&mut self, chain: &str, rule: &str, why: &str) {
        let table = self.table;
        let _ = writeln!(
            self.text,
            "add rule inet {table} {chain} {rule} comment \"{why}\""
        );
    }

    /// What reaches a VIP or an external frontend and was not taken by IPVS is refused.
    fn guard(&mut self) {
        for chain in ["guard-remote", "guard-local"] {
            for (ip, family) in FAMILIES {
                self.rule(
                    chain,
                    &format!("{ip} daddr @vips{family} jump vip-without-service"),
                    "for a VIP, and IPVS did not take it",
                );
                self.rule(
                    chain,
                    &format!(
                        "{ip} daddr . meta l4proto . th dport @external{family} \
                         jump vip-without-service"
                    ),
                    "for an external frontend, and IPVS did not take it",
                );
            }
        }
        self.rule(
            "guard-local",
            &format!("oifname \"{HOST_VETH_PREFIX}*\" icmpv6 type nd-redirect drop"),
            "a pod that calls itself through a service needs no advice",
        );
        let chain = "vip-without-service";
        self.rule(
            chain,
            "meta l4proto { icmp, ipv6-icmp } accept",
            "errors belong to connections of IPVS",
        );
        for (ip, family) in FAMILIES {
            self.rule(
                chain,
                &format!("{ip} saddr . meta l4proto . th sport @frontends{family} accept"),
                "answer of a service to this node, calling from the VIP",
            );
        }
        self.rule(
            chain,
            "tcp flags & rst == rst accept",
            "opens nothing, and the refusal below is one",
        );
        self.rule(
            chain,
            &format!(
                "meta l4proto tcp counter name {} reject with tcp reset",
                counters::REFUSED_TCP
            ),
            "no service here",
        );
        self.rule(
            chain,
            &format!(
                "counter name {} reject with icmpx type port-unreachable",
                counters::REFUSED_OTHER
            ),
            "no service here",
        );
    }

    /// The rows of the table of service semantics, one rule each. Connection
    /// tracking knows the address that a client called; the packet has the
    /// backend that IPVS chose. So no mark is needed.
    fn source_nat(&mut self, nat: &SourceNat) {
        let chain = "source-nat";
        self.rule(chain, "oifname \"lo\" return", "does not leave the node");
        for (family, (ip, digit)) in Family::ALL.into_iter().zip(FAMILIES) {
            let own = braces(&outermost(&nat.networks.node_pods, family));
            let pods = braces(&outermost(&nat.networks.pods, family));
            let exempt = braces(&outermost(&nat.networks.non_masquerade, family));
            let called = format!("ct original {ip} daddr");
            let vip = format!("{called} @vips{digit}");
            // The program knows what a port is only after a transport protocol.
            let of_set = |set| {
                PROTOCOLS.map(|protocol| {
                    format!(
                        "meta l4proto {protocol} {called} . meta l4proto . \
                         ct original proto-dst @{set}{digit}"
                    )
                })
            };
            let external = of_set("external");
            self.replace(
                &format!("{ip} saddr . {ip} daddr @hairpins{digit}"),
                counters::HAIRPIN,
                "the backend is the client",
            );
            self.replace(
                &format!("{ip} saddr @vips{digit}"),
                counters::VIA_VIP,
                "a process of this node that calls from the VIP",
            );
            if nat.masquerade_all {
                self.replace(&vip, counters::ALL_CLUSTER, "masqueradeAll");
            }
            let beyond = own
                .as_ref()
                .map_or(String::new(), |own| format!("{ip} saddr != {own} "));
            for preserved in of_set("preserved") {
                self.rule(
                    chain,
                    &format!("{preserved} return"),
                    "the backend is on this node and sees the client",
                );
            }
            for external in &external {
                self.replace(
                    &format!("{external} {beyond}fib saddr type != local"),
                    counters::OFF_NODE,
                    "the reply must come back through this node",
                );
            }
            let Some(own) = own else {
                continue;
            };
            if let Some(pods) = pods {
                for service in external.iter().chain([&vip]) {
                    self.replace(
                        &format!("{service} {ip} saddr {own} {ip} daddr != {pods}"),
                        counters::POD_EGRESS,
                        "a backend that does not know the way to pods",
                    );
                }
            }
            let outside = exempt.map_or(String::new(), |exempt| format!("{ip} daddr != {exempt} "));
            self.replace(
                &format!("{ip} saddr {own} {outside}"),
                counters::POD_EGRESS,
                "a pod that calls beyond the cluster",
            );
        }
        self.replacements(nat);
    }

    fn replace(&mut self, condition: &str, counter: &str, why: &str) {
        let rule = format!("{condition} counter name {counter} goto replace-source");
        self.rule("source-nat", &rule, why);
    }

    /// Where the device that leads out has an address, the kernel chooses the
    /// right one of it; pods' veths have none, and there the kernel would choose
    /// any address of the node, a VIP among them.
    fn replacements(&mut self, nat: &SourceNat) {
        let chain = "replace-source";
        let (first, last) = (nat.ports.start(), nat.ports.end());
        for (family, (ip, _)) in Family::ALL.into_iter().zip(FAMILIES) {
            let nfproto = match family {
                Family::IPv4 => "meta nfproto ipv4",
                Family::IPv6 => "meta nfproto ipv6",
            };
            let known = nat.sources.get(&family).cloned().unwrap_or_default();
            let devices: Vec<String> = known
                .devices
                .iter()
                .filter(|device| can_be_said(device))
                .map(|device| format!("\"{device}\""))
                .collect();
            // Ports can be said only of protocols that have them.
            for protocol in PROTOCOLS.into_iter().map(Some).chain([None]) {
                let (protocols, to) = protocol.map_or_else(Default::default, |protocol| {
                    let protocol = format!("meta l4proto {protocol} ");
                    (protocol, format!(" to :{first}-{last} fully-random"))
                });
                if let Some(devices) = braces(&devices) {
                    self.rule(
                        chain,
                        &format!("{nfproto} oifname {devices} {protocols}masquerade{to}"),
                        "an address of the device that leads out",
                    );
                }
                let Some(node) = known.node else {
                    self.rule(
                        chain,
                        &format!("{nfproto} {protocols}masquerade{to}"),
                        "no address of the node is known",
                    );
                    continue;
                };
                let node = match node {
                    _ if protocol.is_none() => node.to_string(),
                    IpAddr::V4(node) => format!("{node}:{first}-{last} fully-random"),
                    IpAddr::V6(node) => format!("[{node}]:{first}-{last} fully-random"),
                };
                self.rule(
                    chain,
                    &format!("{nfproto} {protocols}snat {ip} to {node}"),
                    "the address of the node",
                );
            }
        }
    }
}

/// The word for a family in rules, and the end of its sets' names; as [`Family::ALL`].
const FAMILIES: [(&str, &str); 2] = [("ip", "4"), ("ip6", "6")];

/// Protocols that have ports.
const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// Whether the program reads the name of a device as that name and no other: it
/// knows no escapes, and a star at the end stands for more than one device. The
/// kernel allows nearly every character.
fn can_be_said(device: &str) -> bool {
    !device.contains(|c: char| matches!(c, '"' | '*' | '\\') || c.is_control())
}

/// An anonymous set, if it has an element.
fn braces<T: ToString>(elements: &[T]) -> Option<String> {
    let words: Vec<String> = elements.iter().map(T::to_string).collect();
    (!words.is_empty()).then(|| format!("{{ {} }}", words.join(", ")))
}

async fn run(program: &Path, text: String) -> Result<(), RulesetError> {
    execute(program, &["-f", "-"], text).await
}

async fn execute(program: &Path, arguments: &[&str], text: String) -> Result<(), RulesetError> {
    let name = program.display().to_string();
    let failed = |source| RulesetError::Run {
        program: name.clone(),
        source,
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let exchange = async {
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ends early says why on its standard error.
            let _broken_pipe = stdin.write_all(text.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = match timeout(TIMEOUT, exchange).await {
        Ok(output) => output.map_err(failed)?,
        Err(_elapsed) => return Err(RulesetError::Timeout { program: name }),
    };
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(RulesetError::Refused {
        program: name,
        words: words.lines().take(3).collect::<Vec<_>>().join(" / "),
    })
}
