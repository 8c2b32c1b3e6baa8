//! The ruleset, and the program that loads it.

mod source_nat;

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ferrule_model::ownership::{HOST_VETH_PREFIX, MARK_BASE, MARK_BITS};
use ferrule_model::source_nat::{Solicitor, SourceNat};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::element::SILENT;
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
const CHAINS: [&str; 11] = [
    "admit-remote",
    "admit-local",
    "guard-forward",
    "guard-remote",
    "guard-local",
    "vip-without-service",
    "unallocated",
    "mark-internal",
    "source-nat",
    "replace-source",
    SOLICITATIONS,
];

/// As whom neighbours are asked for: in both tables of ours. Its rules follow from the
/// addresses of the machine.
const SOLICITATIONS: &str = "solicitations";

/// Those of them whose rules follow from the cluster's networks.
pub(crate) const SOURCE_NAT_CHAINS: [&str; 4] = [
    "source-nat",
    "replace-source",
    "unallocated",
    "mark-internal",
];

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
    let mut text = gone(table);
    text.push_str(&Ruleset::whole(table, Some(nat)));
    for element in elements {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "add element {} {table} {} {{ {} }}",
            element.family(),
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
    run(program, gone(table)).await
}

/// To delete what may not be there: make it first, in the same transaction.
fn gone(table: &str) -> String {
    let mut text = String::new();
    for family in ["inet", "arp"] {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "add table {family} {table}\ndelete table {family} {table}"
        );
    }
    text
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
            let follows = SOURCE_NAT_CHAINS.contains(&chain) || chain == SOLICITATIONS;
            if nat.is_some() || !follows {
                // Writing to a String cannot fail.
                let _ = writeln!(ours.text, "flush chain inet {table} {chain}");
            }
        }
        ours.silence();
        ours.admission();
        ours.guard();
        if let Some(nat) = nat {
            ours.solicitations(nat);
            ours.source_nat(nat);
        }
        ours.text
    }

    fn new(table: &'a str) -> Self {
        let mut text =
            format!("add table inet {table} {{ comment \"Ferrule: services of this node\"; }}\n");
        add_sets(table, &mut text);
        for (digit, ip) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
            let _ = writeln!(
                text,
                "add map inet {table} marks{digit} {{ type {ip} . inet_proto . inet_service : mark; \
                 comment \"marks of clients within the cluster, by frontend\"; }}"
            );
        }
        for counter in counters::ALL {
            let _ = writeln!(text, "add counter inet {table} {counter}");
        }
        for (chain, hook, why) in [
            (
                "admit-remote",
                "type filter hook input priority 90",
                "before IPVS, which takes at 98 and 99 what is for a service",
            ),
            (
                "admit-local",
                "type filter hook output priority -101",
                "before IPVS, which takes at -99 and -98 what is for a service",
            ),
            (
                "guard-forward",
                "type filter hook forward priority 0",
                "what is for a service address that no service has",
            ),
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
        for chain in [
            "vip-without-service",
            "unallocated",
            "mark-internal",
            "replace-source",
            SOLICITATIONS,
        ] {
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

    /// A VIP is on every node: who asks on a link whose it is must not be told that it
    /// is this one's, nor does this one say so by itself, or by asking for others. Whoever
    /// announces VIPs does so by sockets that no rule sees, or by another address.
    fn silence(&mut self) {
        let table = self.table;
        let _ = writeln!(
            self.text,
            "add table arp {table} {{ comment \"Ferrule: services of this node\"; }}\n\
             add set arp {table} {SILENT} {{ type ipv4_addr; comment \"VIPs\"; }}\n\
             add chain arp {table} silence {{ type filter hook input priority 0; policy accept; \
             comment \"before the kernel answers\"; }}\n\
             flush chain arp {table} silence\n\
             add rule arp {table} silence arp operation request arp daddr ip @{SILENT} drop \
             comment \"a VIP is not this node's alone\"\n\
             add chain arp {table} announcements {{ type filter hook output priority 0; \
             policy accept; comment \"what the kernel says of itself\"; }}\n\
             add chain arp {table} {SOLICITATIONS}\n\
             flush chain arp {table} announcements\n\
             add rule arp {table} announcements arp saddr ip @{SILENT} arp daddr ip @{SILENT} drop \
             comment \"gratuitous\"\n\
             add rule arp {table} announcements arp operation request arp saddr ip @{SILENT} \
             jump {SOLICITATIONS} comment \"asks as a VIP\""
        );
        // That a VIP is at an address of the link says the kernel from the VIP itself, where it is
        // an address of the link's device; who announces VIPs has another address for that.
        self.rule(
            "guard-local",
            "icmpv6 type nd-neighbor-advert ip6 saddr @vips6 drop",
            "a VIP is not this node's alone",
        );
        self.rule(
            "guard-local",
            &format!("icmpv6 type nd-neighbor-solicit ip6 saddr @vips6 jump {SOLICITATIONS}"),
            "asks as a VIP",
        );
    }

    /// As whom the kernel asks for neighbours instead of as a VIP.
    fn solicitations(&mut self, nat: &SourceNat) {
        let table = self.table;
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "flush chain arp {table} {SOLICITATIONS}");
        for Solicitor { device, asked, ip } in &nat.solicitors {
            let device = match device.as_deref() {
                Some(device) if !can_be_said(device) => continue,
                Some(device) => format!("oifname \"{device}\" "),
                None => String::new(),
            };
            if ip.is_ipv4() {
                let asked = asked.map_or(String::new(), |asked| format!("arp daddr ip {asked} "));
                // The first that fits leaves nothing for the others.
                let _ = writeln!(
                    self.text,
                    "add rule arp {table} {SOLICITATIONS} {device}{asked}arp saddr ip @{SILENT} \
                     arp saddr ip set {ip} comment \"an address of the node\""
                );
            } else {
                self.rule(
                    SOLICITATIONS,
                    &format!("{device}ip6 saddr @vips6 ip6 saddr set {ip}"),
                    "an address of the node",
                );
            }
        }
    }

    /// Who is not admitted to a frontend never reaches IPVS.
    fn admission(&mut self) {
        for chain in ["admit-remote", "admit-local"] {
            for (ip, family) in FAMILIES {
                // Sets of intervals take a protocol out of the packet alone before kernel 6.18.
                // Behind extension headers it is another, and nobody is admitted.
                let protocol = match ip {
                    "ip" => "ip protocol",
                    _ => "ip6 nexthdr",
                };
                self.rule(
                    chain,
                    &format!(
                        "{ip} daddr . meta l4proto . th dport @limited{family} \
                         {ip} saddr . {ip} daddr . {protocol} . th dport != @admitted{family} \
                         counter name {} drop",
                        counters::NOT_ADMITTED
                    ),
                    "loadBalancerSourceRanges",
                );
            }
            // IPVS takes whatever has one of our marks: nobody else may set them.
            let bits = u32::MAX << MARK_BITS;
            self.rule(
                chain,
                &format!("meta mark & {bits:#x} == {MARK_BASE:#x} meta mark set 0"),
                "a mark of ours from another, or from IPVS itself",
            );
        }
        self.rule("admit-remote", "jump mark-internal", "pods of the cluster");
        for (ip, family) in FAMILIES {
            self.rule("admit-local", &mark(ip, family), "this node");
        }
        // What has a mark goes to another virtual service, which has backends.
        let bits = u32::MAX << MARK_BITS;
        for chain in ["admit-remote", "admit-local"] {
            for (ip, family) in FAMILIES {
                self.rule(
                    chain,
                    &format!(
                        "{ip} daddr . meta l4proto . th dport @leaving{family} \
                         tcp flags & (fin | syn | rst | ack) == syn \
                         meta mark & {bits:#x} != {MARK_BASE:#x} jump vip-without-service"
                    ),
                    "its backends keep connections, and take no new ones",
                );
                self.rule(
                    chain,
                    &format!(
                        "{ip} daddr . meta l4proto . th dport @closed{family} \
                         tcp flags & (fin | syn | rst | ack) == syn jump vip-without-service"
                    ),
                    "the same of the virtual service by mark",
                );
            }
        }
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
        for chain in ["guard-forward", "guard-local"] {
            self.rule(
                chain,
                "jump unallocated",
                "service addresses that no service has",
            );
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
                &format!("{ip} daddr . meta l4proto . th dport @served{family} accept"),
                "a health check of a load balancer",
            );
            for (set, why) in [
                (
                    "frontends",
                    "answer of a service to this node, calling from the VIP",
                ),
                ("served", "answer of a health check to it"),
            ] {
                self.rule(
                    chain,
                    &format!(
                        "ct direction reply {ip} saddr . meta l4proto . th sport \
                         @{set}{family} accept"
                    ),
                    why,
                );
            }
        }
        self.rule(
            chain,
            "tcp flags & rst == rst accept",
            "opens nothing, and the refusal below is one",
        );
        for (ip, family) in FAMILIES {
            self.rule(
                chain,
                &format!(
                    "{ip} daddr . meta l4proto . th dport @dropped{family} counter name {} drop",
                    counters::NO_LOCAL_ENDPOINT
                ),
                "policy Local, and the endpoints are on other nodes",
            );
        }
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
}

/// Sets of each family, where they are missing.
fn add_sets(table: &str, text: &mut String) {
    for (family, ip) in [("4", "ipv4_addr"), ("6", "ipv6_addr")] {
        let frontend = format!("{ip} . inet_proto . inet_service");
        let client = format!("{ip} . {frontend}; flags interval");
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
                "dropped",
                &frontend,
                "frontends whose endpoints are on other nodes",
            ),
            (
                "leaving",
                &frontend,
                "frontends that keep connections, and take no new ones",
            ),
            (
                "closed",
                &frontend,
                "the same of clients within the cluster",
            ),
            (
                "served",
                &frontend,
                "where this node itself answers at a VIP",
            ),
            ("limited", &frontend, "frontends that not everyone may call"),
            ("admitted", &client, "who may call them"),
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
}

/// The word for a family in rules, and the end of its sets' names; as [`Family::ALL`].
const FAMILIES: [(&str, &str); 2] = [("ip", "4"), ("ip6", "6")];

/// Puts the mark of a frontend on a packet to it, if it has one.
fn mark(ip: &str, family: &str) -> String {
    format!("meta mark set {ip} daddr . meta l4proto . th dport map @marks{family}")
}

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
