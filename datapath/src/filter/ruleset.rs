//! The ruleset, and the program that loads it.

use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

/// How long the program may take.
const TIMEOUT: Duration = Duration::from_secs(30);

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

/// Makes table, sets and chains as they should be, in one transaction. The
/// sets keep their elements; a second time changes nothing.
///
/// # Errors
/// [`RulesetError`]; nothing was changed then.
pub async fn load(program: &Path, table: &str) -> Result<(), RulesetError> {
    check_name(table)?;
    run(program, text(table)).await
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

/// Sets are added where missing; chains are emptied and filled anew.
fn text(table: &str) -> String {
    let mut text = format!(
        "\
add table inet {table} {{ comment \"Ferrule: services of this node\"; }}
add set inet {table} vips4 {{ type ipv4_addr; comment \"VIPs under guard\"; }}
add set inet {table} vips6 {{ type ipv6_addr; comment \"VIPs under guard\"; }}
add set inet {table} frontends4 {{ type ipv4_addr . inet_proto . inet_service; comment \"VIPs with their service ports\"; }}
add set inet {table} frontends6 {{ type ipv6_addr . inet_proto . inet_service; comment \"VIPs with their service ports\"; }}
add chain inet {table} guard-remote {{ type filter hook input priority 110; policy accept; comment \"behind IPVS, which takes at 98 and 99 what is for a service\"; }}
add chain inet {table} guard-local {{ type filter hook output priority -90; policy accept; comment \"behind IPVS, which takes at -99 and -98 what is for a service\"; }}
add chain inet {table} vip-without-service
flush chain inet {table} guard-remote
flush chain inet {table} guard-local
flush chain inet {table} vip-without-service
"
    );
    let mut rule = |chain: &str, rule: &str, why: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "add rule inet {table} {chain} {rule} comment \"{why}\""
        );
    };
    for chain in ["guard-remote", "guard-local"] {
        for (ip, family) in [("ip", "4"), ("ip6", "6")] {
            rule(
                chain,
                &format!("{ip} daddr @vips{family} jump vip-without-service"),
                "for a VIP, and IPVS did not take it",
            );
        }
    }
    let chain = "vip-without-service";
    rule(
        chain,
        "meta l4proto { icmp, ipv6-icmp } accept",
        "errors belong to connections of IPVS",
    );
    for (ip, family) in [("ip", "4"), ("ip6", "6")] {
        rule(
            chain,
            &format!("{ip} saddr . meta l4proto . th sport @frontends{family} accept"),
            "answer of a service to this node, calling from the VIP",
        );
    }
    rule(
        chain,
        "tcp flags & rst == rst accept",
        "opens nothing, and the refusal below is one",
    );
    rule(
        chain,
        "meta l4proto tcp counter reject with tcp reset",
        "no service here",
    );
    rule(
        chain,
        "counter reject with icmpx type port-unreachable",
        "no service here",
    );
    text
}

async fn run(program: &Path, text: String) -> Result<(), RulesetError> {
    let name = program.display().to_string();
    let failed = |source| RulesetError::Run {
        program: name.clone(),
        source,
    };
    let mut child = Command::new(program)
        .args(["-f", "-"])
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
