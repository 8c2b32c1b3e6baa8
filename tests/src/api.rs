//! A Kubernetes API in a namespace, for an agent that follows it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;
use ferrule_api_server::{Acceptor, ApiServer, serve};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::netns::Netns;

/// Where it listens unless told otherwise.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);

/// A server that listens until it is dropped; then its connections break. Its
/// objects outlive it.
#[derive(Debug)]
pub struct Api {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<anyhow::Result<std::io::Result<()>>>>,
}

impl Api {
    /// Listens in a namespace, on loopback and in plain text. Returns when it does.
    ///
    /// # Errors
    /// When the address is taken.
    pub fn start(netns: &Netns, server: &Arc<ApiServer>) -> anyhow::Result<Self> {
        Self::start_at(netns, server, ADDRESS, Acceptor::Plain)
    }

    /// Listens on an address of a namespace. Returns when it does.
    ///
    /// # Errors
    /// When the address is taken, or none of the namespace.
    pub fn start_at(
        netns: &Netns,
        server: &Arc<ApiServer>,
        address: SocketAddr,
        acceptor: Acceptor,
    ) -> anyhow::Result<Self> {
        let server = Arc::clone(server);
        let (stop, stopped) = oneshot::channel();
        let (ready, listens) = oneshot::channel();
        let thread = netns.thread(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let listener = TcpListener::bind(address).await?;
                let _nobody_waits = ready.send(());
                tokio::select! {
                    ended = serve(server, listener, acceptor) => ended.map(drop),
                    _dropped = stopped => Ok(()),
                }
            })
        })?;
        listens.blocking_recv().context("the API did not start")?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// A kubeconfig by which the one on loopback is reached.
    #[must_use]
    pub fn kubeconfig() -> String {
        kubeconfig(&format!("http://{ADDRESS}"), "")
    }
}

/// A kubeconfig with a token for a server, and more about its cluster, such as
/// `, certificate-authority: ca.pem`.
#[must_use]
pub fn kubeconfig(server: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: {server:?}{more}}}}}]
users: [{{name: agent, user: {{token: secret}}}}]
contexts: [{{name: test, context: {{cluster: test, user: agent}}}}]
current-context: test
"
    )
}

impl Drop for Api {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _what_it_died_of_shows_in_the_test = thread.join();
        }
    }
}

/// Gives a server every object of a manifest.
///
/// # Errors
/// When the YAML makes no sense, or it is of a kind that is not served.
pub fn put_all(server: &ApiServer, yaml: &str) -> anyhow::Result<()> {
    for document in yaml
        .split("\n---\n")
        .map(|text| text.trim_start_matches("---\n"))
    {
        if !document.trim().is_empty() {
            let object: Value = serde_saphyr::from_str(document)
                .map_err(|error| anyhow::anyhow!("{document}\n{error}"))?;
            server.put(object)?;
        }
    }
    Ok(())
}
