//! Others in the packets' way: kube-proxy, and chains that drop what they do not know.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ferrule_datapath::Settings;
use serde_json::Value;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Finding, Outcome};

const PROXY: &str = "kube-proxy";
const CHAINS: &str = "foreign chains";

/// How long `nft` may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Names of tables and chains that only kube-proxy makes.
const PROXY_TABLE: &str = "kube-proxy";
const PROXY_CHAINS: [&str; 2] = ["KUBE-SERVICES", "KUBE-NODEPORTS"];

/// Looks for both.
pub(super) async fn check(settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![process(Path::new("/proc"))];
    match chains(&settings.nft_program).await {
        Ok(listed) => findings.extend(judge(&listed, &settings.nft_table)),
        Err(words) => findings.push(Finding::new(
            CHAINS,
            Outcome::Warning,
            format!("could not be listed: {words}"),
            "run the check as root",
        )),
    }
    findings
}

fn process(proc: &Path) -> Finding {
    let Ok(entries) = fs::read_dir(proc) else {
        return Finding::new(
            PROXY,
            Outcome::Warning,
            "processes cannot be listed",
            "mount /proc",
        );
    };
    let runs = entries.flatten().find(|entry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.trim() == PROXY)
    });
    match runs {
        None => Finding::ok(PROXY, "does not run, as far as can be seen"),
        Some(entry) => Finding::new(
            PROXY,
            Outcome::Warning,
            format!(
                "runs as process {}: two programs would serve the same Services",
                entry.file_name().display()
            ),
            "remove it from this node, and then `kube-proxy --cleanup` what it leaves",
        ),
    }
}

async fn chains(program: &Path) -> Result<Value, String> {
    let run = Command::new(program)
        .args(["--json", "list", "chains"])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match timeout(LIMIT, run).await {
        Err(_) => {
            return Err(format!(
                "{} did not end within {LIMIT:?}",
                program.display()
            ));
        }
        Ok(Err(error)) => return Err(format!("{}: {error}", program.display())),
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(words.lines().next().unwrap_or("nft failed").to_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
}

fn judge(listed: &Value, own_table: &str) -> Vec<Finding> {
    let objects = listed.get("nftables").and_then(Value::as_array);
    let chains = objects
        .into_iter()
        .flatten()
        .filter_map(|object| object.get("chain"));
    let (mut left, mut dropping) = (Vec::new(), Vec::new());
    for chain in chains {
        let word = |key: &str| chain.get(key).and_then(Value::as_str).unwrap_or_default();
        let (family, table, name) = (word("family"), word("table"), word("name"));
        if table == own_table && family == "inet" {
            continue;
        }
        let full = format!("{family} {table} {name}");
        if table == PROXY_TABLE || PROXY_CHAINS.contains(&name) {
            left.push(full.clone());
        }
        let on_the_way = matches!(word("hook"), "forward" | "input" | "output");
        let of_ip = matches!(family, "ip" | "ip6" | "inet");
        if word("policy") == "drop" && on_the_way && of_ip {
            dropping.push(full);
        }
    }
    let mut findings = Vec::new();
    if let Some(first) = left.first() {
        findings.push(Finding::new(
            PROXY,
            Outcome::Warning,
            format!(
                "left {} chains, such as {first}, which act on Services",
                left.len()
            ),
            "remove them with `kube-proxy --cleanup`, or reboot",
        ));
    }
    findings.push(if dropping.is_empty() {
        Finding::ok(CHAINS, "none drops by policy")
    } else {
        Finding::new(
            CHAINS,
            Outcome::Warning,
            format!(
                "drop by policy what no rule of theirs accepts: {}",
                dropping.join(", ")
            ),
            "see to it that they accept pods' packets (interfaces fer*) and calls to Services",
        )
    });
    findings
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_drops_and_what_kube_proxy_left_is_named() {
        let chain = |family: &str, table: &str, name: &str, hook: &str, policy: &str| {
            json!({"chain": {"family": family, "table": table, "name": name, "hook": hook,
                             "policy": policy}})
        };
        let quiet = json!({"nftables": [
            {"metainfo": {}},
            chain("inet", "ferrule", "guard-remote", "input", "drop"),
            chain("ip", "filter", "FORWARD", "forward", "accept"),
            chain("bridge", "filter", "F", "forward", "drop"),
        ]});
        assert_eq!(
            judge(&quiet, "ferrule"),
            [Finding::ok(CHAINS, "none drops by policy")]
        );
        let loud = json!({"nftables": [
            chain("ip", "filter", "FORWARD", "forward", "drop"),
            chain("ip", "nat", "KUBE-SERVICES", "", ""),
            chain("ip6", "kube-proxy", "services", "", ""),
        ]});
        let [left, dropping] = judge(&loud, "ferrule").try_into().unwrap();
        assert!(left.found.contains("2 chains") && left.found.contains("KUBE-SERVICES"));
        assert!(dropping.found.contains("ip filter FORWARD"), "{dropping:?}");
        assert_eq!(left.result.max(dropping.result), Outcome::Warning);
    }

    #[test]
    fn a_process_is_found_by_its_name() {
        let proc = tempfile::tempdir().unwrap();
        let put = |pid: &str, name: &str| {
            let folder = proc.path().join(pid);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("comm"), name).unwrap();
        };
        put("7", "kube-proxy-like\n");
        assert_eq!(process(proc.path()).result, Outcome::Ok);
        put("42", "kube-proxy\n");
        assert!(process(proc.path()).found.contains("42"));
    }
}
