//! The plugin, and the configuration by which the container runtime calls it.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::timeout;

use super::{Finding, Outcome};

const PLUGIN: &str = "CNI plugin";
const CONFIGURATION: &str = "CNI configuration";

/// The plugin's file name, and its `type` in a configuration.
const NAME: &str = "ferrule";

/// How long the plugin may take to tell its versions.
const LIMIT: Duration = Duration::from_secs(3);

/// No configuration is longer.
const LONGEST: u64 = 1024 * 1024;

/// Whether the plugin can be run, and whether a configuration names it.
pub(super) async fn check(programs: &Path, configurations: &Path) -> Vec<Finding> {
    vec![
        plugin(&programs.join(NAME)).await,
        configuration(configurations),
    ]
}

async fn plugin(path: &Path) -> Finding {
    let wrong = |why: String| {
        Finding::new(
            PLUGIN,
            Outcome::Warning,
            format!("{}: {why}", path.display()),
            "install the plugin `ferrule` of this release there, or name its folder by --cni-bin-dir",
        )
    };
    if let Err(error) = fs::metadata(path) {
        return wrong(error.to_string());
    }
    match timeout(LIMIT, versions(path)).await {
        Err(_) => wrong(format!("does not end within {LIMIT:?}")),
        Ok(Err(error)) => wrong(format!("cannot be run: {error}")),
        Ok(Ok(answer)) => match supported(&answer) {
            Some(versions) => {
                Finding::ok(PLUGIN, format!("{}, for CNI {versions}", path.display()))
            }
            None => wrong("does not tell its versions as a CNI plugin does".to_owned()),
        },
    }
}

/// What the plugin answers to VERSION.
async fn versions(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut child = Command::new(path)
        .env_clear()
        .env("CNI_COMMAND", "VERSION")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A plugin that does not read it answers all the same.
        let _broken_pipe = stdin.write_all(br#"{"cniVersion":"1.0.0"}"#).await;
    }
    Ok(child.wait_with_output().await?.stdout)
}

/// The first and last of the versions in the answer.
fn supported(answer: &[u8]) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(answer).ok()?;
    let versions = answer.get("supportedVersions")?.as_array()?;
    let first = versions.first()?.as_str()?;
    let last = versions.last()?.as_str()?;
    Some(format!("{first} to {last}"))
}

/// The runtime takes the file whose name comes first, and no other.
fn configuration(folder: &Path) -> Finding {
    let missing = |found: String| {
        Finding::new(
            CONFIGURATION,
            Outcome::Warning,
            found,
            "write one as docs/cni.md shows, with a name that comes first, or name the folder by \
             --cni-conf-dir",
        )
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => return missing(format!("{}: {error}", folder.display())),
    };
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let extension = path.extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("conf" | "conflist" | "json"))
        })
        .collect();
    paths.sort();
    let Some(first) = paths.first() else {
        return missing(format!("{} has none", folder.display()));
    };
    let ours: Vec<_> = paths.iter().filter(|path| names_us(path)).collect();
    if ours.contains(&first) {
        Finding::ok(
            CONFIGURATION,
            format!("{} names the plugin", first.display()),
        )
    } else if let Some(ours) = ours.first() {
        missing(format!(
            "{} comes before {}, which names the plugin: the runtime takes the first",
            first.display(),
            ours.display()
        ))
    } else {
        missing(format!(
            "none in {} names the plugin `{NAME}`",
            folder.display()
        ))
    }
}

fn names_us(path: &Path) -> bool {
    if fs::metadata(path).map_or(true, |metadata| metadata.len() > LONGEST) {
        return false;
    }
    let text = fs::read_to_string(path).unwrap_or_default();
    let Ok(value) = serde_json::from_str::<serde_json::Value>(&text) else {
        return false;
    };
    let is_ours = |plugin: &serde_json::Value| {
        plugin.get("type").and_then(serde_json::Value::as_str) == Some(NAME)
    };
    let listed = value.get("plugins").and_then(serde_json::Value::as_array);
    is_ours(&value) || listed.is_some_and(|plugins| plugins.iter().any(is_ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_configuration_has_to_be_ours() {
        let dir = tempfile::tempdir().unwrap();
        let said = || configuration(dir.path());
        assert!(said().found.contains("has none"), "{:?}", said());
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("50-other.conf", r#"{"type":"bridge"}"#);
        put("10.txt", r#"{"type":"ferrule"}"#);
        assert!(said().found.contains("none in"), "{:?}", said());
        put(
            "90-ferrule.conflist",
            r#"{"plugins":[{"type":"ferrule"},{"type":"x"}]}"#,
        );
        assert!(said().found.contains("comes before"), "{:?}", said());
        put("10-ferrule.conflist", r#"{"plugins":[{"type":"ferrule"}]}"#);
        assert_eq!(said().result, Outcome::Ok);
        put("00-broken.conf", "{");
        assert_eq!(said().result, Outcome::Warning);
        assert_eq!(
            configuration(&dir.path().join("none")).result,
            Outcome::Warning
        );
    }

    #[tokio::test]
    async fn a_plugin_that_is_none_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for (program, result) in [
            ("/bin/true", "does not tell"),
            ("/bin/none", "No such file"),
        ] {
            let finding = plugin(Path::new(program)).await;
            assert!(finding.found.contains(result), "{finding:?}");
        }
        assert_eq!(plugin(dir.path()).await.result, Outcome::Warning);
        let answer = br#"{"cniVersion":"1.0.0","supportedVersions":["0.3.1","1.0.0","1.1.0"]}"#;
        assert_eq!(supported(answer).as_deref(), Some("0.3.1 to 1.1.0"));
    }
}
