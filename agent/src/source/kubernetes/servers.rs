//! The API servers of the cluster, one of which is asked at a time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube_client::client::{Body, ConfigExt as _};
use kube_client::{Client, Config};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};
use tower::util::option_layer;
use tower::{BoxError, Layer as _, ServiceExt as _};
use tracing::{debug, warn};

use super::credentials::{Credentials, url, without_user};
use super::failure::{Cause, Failure, chain};
use super::stream::whole;
use super::wire;

/// Time until a connection stands.
const CONNECT: Duration = Duration::from_secs(5);

/// Time until a server begins its answer. Large lists take a server a while.
const ANSWER: Duration = Duration::from_secs(30);

/// A connection on which nothing comes is asked by the kernel whether the other
/// end lives: after the first time, as often as the number says, each after the
/// second. So a server that lost its power is missed within half a minute, though
/// a watch may be silent for longer.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);

/// How long what was sent may go without the other end's word that it came.
const UNHEARD: Duration = Duration::from_secs(30);

/// How old credentials may become. The token of a service account is replaced on
/// the disk long before it expires, and who goes on using the old one is told of
/// in the API's audit.
const OLD: Duration = Duration::from_mins(5);

/// Most bytes that are read of an answer which is an error.
const LONGEST_ERROR: usize = 64 * 1024;

/// Each server with its address.
type Clients = Arc<[(String, Client)]>;

/// The servers.
#[derive(Clone)]
pub(crate) struct Servers(Arc<Shared>);

/// A server that was asked.
pub(crate) struct Asked {
    clients: Clients,
    index: usize,
}

struct Shared {
    /// From where clients are made anew; `None`: they are what they are.
    origin: Option<Origin>,
    clients: RwLock<Clients>,
    /// When the credentials were read.
    read: RwLock<Instant>,
    /// Which one is asked. It is another's turn when one does not answer.
    current: AtomicUsize,
    /// Held while the credentials are read anew.
    renewal: Mutex<()>,
}

struct Origin {
    credentials: Credentials,
    addresses: Vec<String>,
}

impl Origin {
    async fn clients(&self) -> Result<Clients, String> {
        let config = self.credentials.read(!self.addresses.is_empty()).await?;
        let mut clients = Vec::new();
        if self.addresses.is_empty() {
            let address = config.cluster_url.to_string();
            let address = address.trim_end_matches('/').to_owned();
            clients.push((address, client(&config)?));
        }
        let name = config.tls_server_name.clone().or_else(|| {
            let host = config.cluster_url.host()?;
            // An IPv6 address stands in brackets in a URL, and nowhere else.
            Some(host.trim_matches(['[', ']']).to_owned())
        });
        let encrypted = config.cluster_url.scheme_str() == Some("https");
        for address in &self.addresses {
            let mut config = config.clone();
            config.cluster_url = url(address, encrypted)?;
            config.tls_server_name.clone_from(&name);
            clients.push((without_user(address), client(&config)?));
        }
        Ok(clients.into())
    }
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
        let origin = Origin {
            credentials: credentials.clone(),
            addresses: addresses.to_owned(),
        };
        let clients = origin.clients().await?;
        Ok(Self::new(Some(origin), clients))
    }

    /// One that is reached without a network.
    #[cfg(test)]
    pub(crate) fn of(clients: Vec<(String, Client)>) -> Self {
        Self::new(None, clients.into())
    }

    /// Tells one making of the clients from another.
    #[cfg(test)]
    pub(super) fn made(&self) -> usize {
        Arc::as_ptr(&self.clients()).addr()
    }

    fn new(origin: Option<Origin>, clients: Clients) -> Self {
        Self(Arc::new(Shared {
            origin,
            clients: RwLock::new(clients),
            read: RwLock::new(Instant::now()),
            current: AtomicUsize::default(),
            renewal: Mutex::default(),
        }))
    }

    /// Their addresses, in words.
    pub(crate) fn addresses(&self) -> String {
        let clients = self.clients();
        let addresses: Vec<&str> = clients.iter().map(|(address, _)| &**address).collect();
        addresses.join(", ")
    }

    fn clients(&self) -> Clients {
        let clients = self.0.clients.read();
        Arc::clone(&clients.unwrap_or_else(PoisonError::into_inner))
    }

    /// Asks for a path such as `/api/v1/services?limit=500`. The answer's body is
    /// still to be read.
    ///
    /// # Errors
    /// A server that does not answer, or refuses; the next question goes to
    /// another one, where there is one that may do better. Credentials that were
    /// refused have been read anew by then, and were tried.
    pub(crate) async fn get(&self, path: &str) -> Result<(Body, Asked), Failure> {
        self.ask(&Question { path, body: None }).await
    }

    /// Asks for a path, and reads the whole answer as JSON.
    ///
    /// # Errors
    /// As [`Servers::get`] has them, and an answer that breaks off or is no JSON.
    pub(crate) async fn read<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let (body, asked) = self.get(path).await?;
        let body = whole(body)
            .await
            .map_err(|failure| self.broke_off(&asked, failure))?;
        serde_json::from_slice(&body)
            .map_err(|error| self.broke_off(&asked, Failure::nonsense(error.to_string())))
    }

    /// Has an object created in the collection at a path.
    ///
    /// # Errors
    /// As [`Servers::get`] has them.
    pub(crate) async fn post(&self, path: &str, object: &impl Serialize) -> Result<(), Failure> {
        let body = serde_json::to_vec(object)
            .map_err(|error| Failure::nonsense(format!("cannot be written: {error}")))?;
        let body = Some(body.as_slice());
        self.ask(&Question { path, body }).await.map(drop)
    }

    async fn ask(&self, question: &Question<'_>) -> Result<(Body, Asked), Failure> {
        self.renew_if_old().await;
        let clients = self.clients();
        let mut failure = match self.ask_once(&clients, question).await {
            Ok(answer) => return Ok(answer),
            Err(failure) => failure,
        };
        if failure.asks_for_credentials() {
            match self.renew(&clients).await {
                Ok(()) => return self.ask_once(&self.clients(), question).await,
                Err(words) => failure.words = format!("{}; read anew: {words}", failure.words),
            }
        }
        Err(failure)
    }

    async fn ask_once(
        &self,
        clients: &Clients,
        question: &Question<'_>,
    ) -> Result<(Body, Asked), Failure> {
        let index = self.0.current.load(Ordering::Relaxed) % clients.len();
        let (address, client) = &clients[index];
        let mut failure = match ask(address, client, question).await {
            Ok(answer) => {
                let clients = Arc::clone(clients);
                return Ok((answer.into_body(), Asked { clients, index }));
            }
            Err(failure) => failure,
        };
        if failure.is_of_server() {
            self.give_up(clients, index);
        }
        if failure.cause == Cause::Unreachable && self.goes_in_a_circle() {
            "name the API servers in apiServer of the configuration: this address is a \
             Service's, which works only when an agent has programmed it"
                .clone_into(&mut failure.remedy);
        }
        Err(failure)
    }

    /// Whether the only address is one that waits for what we learn through it.
    fn goes_in_a_circle(&self) -> bool {
        self.0.origin.as_ref().is_some_and(|origin| {
            origin.addresses.is_empty() && origin.credentials.leads_through_a_service()
        })
    }

    /// Takes in that a server did not bring its answer to a good end. Returns why,
    /// with the server's address.
    pub(crate) fn broke_off(&self, asked: &Asked, failure: Failure) -> Failure {
        if failure.is_of_server() {
            self.give_up(&asked.clients, asked.index);
        }
        asked.named(failure)
    }

    /// Reads credentials anew that are old. If they cannot be read, the old ones
    /// may still do.
    pub(super) async fn renew_if_old(&self) {
        let read = *self.0.read.read().unwrap_or_else(PoisonError::into_inner);
        if read.elapsed() < OLD {
            return;
        }
        match self.renew(&self.clients()).await {
            Ok(()) => debug!("credentials were read anew"),
            Err(words) => warn!("{words}; what was read before stays in use"),
        }
    }

    /// Reads the credentials anew, unless somebody has since `used` were made.
    /// What is on the disk may be half written: then those of before stay.
    async fn renew(&self, used: &Clients) -> Result<(), String> {
        let Some(origin) = &self.0.origin else {
            return Ok(());
        };
        let _one_at_a_time = self.0.renewal.lock().await;
        if !Arc::ptr_eq(used, &self.clients()) {
            return Ok(());
        }
        *self.0.read.write().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        let fresh = origin.clients().await?;
        let mut clients = self
            .0
            .clients
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *clients = fresh;
        Ok(())
    }

    /// Asks each server for its version, all at the same time; what each answered within `limit`.
    pub(crate) async fn try_each(&self, limit: Duration) -> Vec<(String, Result<(), Failure>)> {
        let clients = self.clients();
        let tries = clients.iter().map(|(address, client)| async move {
            let version = Question {
                path: "/version",
                body: None,
            };
            let answer = timeout(limit, ask(address, client, &version)).await;
            let outcome = answer.unwrap_or_else(|_| {
                let words = format!("{address}: no answer within {limit:?}");
                Err(Failure::new(Cause::Unreachable, words))
            });
            (address.clone(), outcome.map(drop))
        });
        futures_util::future::join_all(tries).await
    }

    /// The next server's turn, unless another has seen to it.
    fn give_up(&self, clients: &Clients, index: usize) {
        if clients.len() < 2 {
            return;
        }
        let index = index % clients.len();
        let next = (index + 1) % clients.len();
        let turned =
            self.0
                .current
                .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        if turned.is_ok() {
            warn!(
                from = clients[index].0,
                to = clients[next].0,
                "another API server is asked"
            );
        }
    }
}

impl Asked {
    /// A failure with the server's address.
    fn named(&self, failure: Failure) -> Failure {
        let address = &self.clients[self.index].0;
        Failure {
            words: format!("{address}: {}", failure.words),
            ..failure
        }
    }
}

/// What a server is asked: for what is at a path, or to create something there.
struct Question<'a> {
    path: &'a str,
    body: Option<&'a [u8]>,
}

impl Question<'_> {
    fn request(&self) -> Result<Request<Body>, Failure> {
        let request = match self.body {
            None => Request::get(self.path)
                .header(header::ACCEPT, "application/json")
                .body(Body::empty()),
            Some(body) => Request::post(self.path)
                .header(header::ACCEPT, "application/json")
                .header(header::CONTENT_TYPE, "application/json")
                .body(body.to_vec().into()),
        };
        request.map_err(|error| {
            let words = format!("cannot ask for {}: {error}", self.path);
            Failure::new(Cause::Nonsense, words)
        })
    }

    /// The only code of success. Part of a list, or none, would pass for a cluster
    /// with less in it.
    fn success(&self) -> StatusCode {
        match self.body {
            None => StatusCode::OK,
            Some(_) => StatusCode::CREATED,
        }
    }
}

async fn ask(
    address: &str,
    client: &Client,
    question: &Question<'_>,
) -> Result<Response<Body>, Failure> {
    let request = question.request()?;
    let answer = match timeout(ANSWER, client.send(request)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(Failure::of_request(address, &error)),
        Err(_) => {
            let words = format!("{address}: no answer within {ANSWER:?}");
            return Err(Failure::new(Cause::Unreachable, words));
        }
    };
    if answer.status() == question.success() {
        return Ok(answer);
    }
    Err(refusal(address, answer).await)
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
    let cause = if status.is_too_new() {
        Cause::TooNew
    } else {
        Cause::Refused(code)
    };
    let words = format!("{address}: {code}: {}", status.message);
    Failure {
        retry_after,
        ..Failure::new(cause, words)
    }
}

fn client(config: &Config) -> Result<Client, String> {
    let wrong = |error: &dyn std::error::Error| format!("{}: {}", config.cluster_url, chain(error));
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    let (idle, interval, retries) = KEEPALIVE;
    connector.set_keepalive(Some(idle));
    connector.set_keepalive_interval(Some(interval));
    connector.set_keepalive_retries(Some(retries));
    connector.set_tcp_user_timeout(Some(UNHEARD));
    let connector = config
        .rustls_https_connector_with_connector(connector)
        .map_err(|error| wrong(&error))?;
    let service = legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    let service = service.map_err(BoxError::from);
    let credentials = config.auth_layer().map_err(|error| wrong(&error))?;
    let service = option_layer(credentials).layer(service);
    let service = config.base_uri_layer().layer(service);
    Ok(Client::new(service, "default"))
}
