//! The API servers of the cluster, one of which is asked at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::{Request, Response, StatusCode, header};
use kube_client::client::Body;
use kube_client::config::{KubeConfigOptions, Kubeconfig};
use kube_client::{Client, Config};
use tokio::time::timeout;
use tracing::warn;

use super::wire;

/// Time until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);

/// Time until a server begins its answer. Large lists take a server a while.
const ANSWER: Duration = Duration::from_secs(30);

/// Most bytes that are read of an answer which is an error.
const LONGEST_ERROR: usize = 64 * 1024;

/// Where credentials come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// A kubeconfig file.
    Kubeconfig(PathBuf),
    /// The service account of the pod that we run in.
    InCluster,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What happened, for people.
    pub(crate) words: String,
    /// The HTTP code of the answer, if there was one.
    pub(crate) code: Option<StatusCode>,
    /// How long the server asks to be left alone.
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    /// One without an answer.
    pub(crate) fn new(words: String) -> Self {
        Self {
            words,
            code: None,
            retry_after: None,
        }
    }
}

/// The servers.
#[derive(Clone)]
pub(crate) struct Servers {
    clients: Arc<[(String, Client)]>,
    /// Which one is asked. It is another's turn when one does not answer.
    current: Arc<AtomicUsize>,
}

impl Servers {
    /// Prepares clients; no connection is made yet. `addresses` are URLs such as
    /// `https://192.0.2.1:6443` that take the place of the one that comes with
    /// the credentials, whose host is still the name that certificates are for.
    ///
    /// # Errors
    /// When credentials cannot be read or an address makes no sense, in words
    /// with a remedy.
    pub(crate) async fn open(
        credentials: &Credentials,
        addresses: &[String],
    ) -> Result<Self, String> {
        let mut config = match credentials {
            Credentials::Kubeconfig(path) => of_kubeconfig(path).await?,
            Credentials::InCluster if addresses.is_empty() => {
                Config::incluster().map_err(|error| in_cluster_words(&error))?
            }
            Credentials::InCluster => {
                Config::incluster_dns().map_err(|error| in_cluster_words(&error))?
            }
        };
        config.connect_timeout = Some(CONNECT);
        // A watch may be silent for long; who reads has time-outs of its own.
        config.read_timeout = None;
        config.write_timeout = Some(ANSWER);
        // Who asks waits by itself, as long as the server says.
        config.default_retry = false;
        let mut clients = Vec::new();
        if addresses.is_empty() {
            clients.push((config.cluster_url.to_string(), client(config)?));
        } else {
            let name = config
                .tls_server_name
                .clone()
                .or_else(|| config.cluster_url.host().map(str::to_owned));
            for address in addresses {
                let mut config = config.clone();
                config.cluster_url = url(address)?;
                config.tls_server_name.clone_from(&name);
                clients.push((address.clone(), client(config)?));
            }
        }
        Ok(Self {
            clients: clients.into(),
            current: Arc::default(),
        })
    }

    /// One that is reached without a network.
    #[cfg(test)]
    pub(super) fn of(clients: Vec<(String, Client)>) -> Self {
        Self {
            clients: clients.into(),
            current: Arc::default(),
        }
    }

    /// Where it is asked at present.
    pub(crate) fn address(&self) -> &str {
        &self.clients[self.index()].0
    }

    fn index(&self) -> usize {
        self.current.load(Ordering::Relaxed) % self.clients.len()
    }

    /// Asks for a path such as `/api/v1/services?limit=500`. The answer's body is
    /// still to be read.
    pub(crate) async fn get(&self, path: &str) -> Result<Response<Body>, Failure> {
        let index = self.index();
        let (address, client) = &self.clients[index];
        let request = Request::get(path)
            .header(header::ACCEPT, "application/json")
            .body(Body::empty())
            .map_err(|error| Failure::new(format!("cannot ask for {path}: {error}")))?;
        let answer = match timeout(ANSWER, client.send(request)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                self.give_up(index);
                return Err(Failure::new(format!("{address}: {}", chain(&error))));
            }
            Err(_) => {
                self.give_up(index);
                return Err(Failure::new(format!(
                    "{address}: no answer within {ANSWER:?}"
                )));
            }
        };
        if answer.status().is_success() {
            return Ok(answer);
        }
        if answer.status().is_server_error() {
            self.give_up(index);
        }
        Err(refusal(address, answer).await)
    }

    /// The server that was asked last went silent or broke off.
    pub(crate) fn broke_off(&self) {
        self.give_up(self.index());
    }

    /// The next server's turn, unless another has seen to it.
    fn give_up(&self, index: usize) {
        if self.clients.len() < 2 {
            return;
        }
        let next = (index + 1) % self.clients.len();
        let current = self.current.load(Ordering::Relaxed);
        if current % self.clients.len() == index
            && self
                .current
                .compare_exchange(current, next, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            warn!(
                from = self.clients[index].0,
                to = self.clients[next].0,
                "another API server is asked"
            );
        }
    }
}

async fn refusal(address: &str, answer: Response<Body>) -> Failure {
    let code = answer.status();
    let retry_after = answer
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.trim().parse().ok())
        .map(Duration::from_secs);
    let body = http_body_util::Limited::new(answer.into_body(), LONGEST_ERROR);
    let body = match timeout(ANSWER, body.collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) | Err(_) => hyper::body::Bytes::new(),
    };
    let status = wire::status(code.as_u16(), &body);
    Failure {
        words: format!("{address}: {code}: {}", status.message),
        code: Some(code),
        retry_after,
    }
}

async fn of_kubeconfig(path: &Path) -> Result<Config, String> {
    let words = |error: &dyn std::error::Error| {
        format!(
            "kubeconfig {}: {}; give a file that kubectl can work with",
            path.display(),
            chain(error)
        )
    };
    let kubeconfig = Kubeconfig::read_from(path).map_err(|error| words(&error))?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| words(&error))
}

fn in_cluster_words(error: &dyn std::error::Error) -> String {
    format!(
        "no credentials of a service account: {}; run the agent in a pod that has one, or give \
         --kubeconfig or --manifests",
        chain(error)
    )
}

fn url(address: &str) -> Result<hyper::Uri, String> {
    let wrong =
        |why: &str| format!("apiServer: {address:?} {why}; write it like https://192.0.2.1:6443");
    let url: hyper::Uri = address.parse().map_err(|_| wrong("is no URL"))?;
    if !matches!(url.scheme_str(), Some("https" | "http")) || url.host().is_none() {
        return Err(wrong("is no URL with https"));
    }
    Ok(url)
}

fn client(config: Config) -> Result<Client, String> {
    let address = config.cluster_url.to_string();
    Client::try_from(config).map_err(|error| format!("{address}: {}", chain(&error)))
}

/// An error with what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Many errors say what their cause says.
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = error.source();
    }
    words
}
