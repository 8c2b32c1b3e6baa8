//! `ferrule-agent check` over a kubeconfig, in an environment that is meant for others.

use std::fs;
use std::process::Command;

/// Nobody listens on this port.
const SERVER: &str = "http://127.0.0.1:1";

#[test]
fn a_proxy_in_the_environment_is_not_looked_at() {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: {SERVER:?}}}}}]
users: [{{name: u, user: {{token: secret}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
"
    );
    fs::write(&kubeconfig, text).unwrap();
    for name in ["HTTPS_PROXY", "https_proxy"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrule-agent"));
        command.args(["check", "--node", "a", "--kubeconfig"]);
        let output = command.arg(&kubeconfig).env(name, "::::").output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("proxy url"), "{name}: {said}");
        // The server was asked.
        assert!(said.contains(&format!("{SERVER}: ")), "{name}: {said}");
    }
}
