//! A small HTTP server: bounded in connections and in time.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt::set_ipv6_v6only;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, error, info};

/// Connections that are served at the same time, by one listener. A load balancer that asks
/// for the health must find a place beside who only holds one.
const MAX_CONNECTIONS: usize = 128;

/// How long a client may take for its request, and a connection altogether. It has one request:
/// an idle connection would keep its place from others.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECTION_TIMEOUT: Duration = Duration::from_mins(1);

/// Connections that wait to be taken.
const BACKLOG: u32 = 128;

/// Pause after a connection that could not be taken, as where descriptors are short.
const PAUSE: Duration = Duration::from_millis(100);

/// What is answered.
pub(crate) type Answer = Response<Full<Bytes>>;

/// Pause before a port that is taken is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// Listens at an address; the unspecified one of either family is every address of both, as Go
/// has it, unless the machine has no IPv6.
///
/// # Errors
/// When it cannot be had.
pub(crate) async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    if !address.ip().is_unspecified() {
        return TcpListener::bind(address).await;
    }
    let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, address.port()));
    match bind_both(both) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Whatever `net.ipv6.bindv6only` says.
fn bind_both(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    set_ipv6_v6only(&socket, false)?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Likewise, but tries until it succeeds: a port that is taken is no reason for the agent to
/// stop. `what` is served there, and `flag` names another address.
pub(crate) async fn listen(address: SocketAddr, what: &str, flag: &str) -> TcpListener {
    loop {
        match bind(address).await {
            Ok(listener) => {
                info!(%address, "{what} can be asked for");
                return listener;
            }
            Err(error) => {
                error!(%address, %error, "{what} cannot be served; free the port, or give another by {flag}");
                sleep(RETRY).await;
            }
        }
    }
}

/// Answers until it is dropped. `answer` gets the request and the address that the
/// client called; `None` closes the connection without a word.
pub(crate) async fn serve<F>(
    listener: TcpListener,
    answer: impl Fn(Request<Incoming>, IpAddr) -> F + Clone + Send + 'static,
) where
    F: Future<Output = Option<Answer>> + Send,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this future: no connection outlives its listener.
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while connections.try_join_next().is_some() {}
        let accepted = listener.accept().await;
        let Ok((stream, called)) =
            accepted.and_then(|(stream, _)| stream.local_addr().map(|called| (stream, called)))
        else {
            sleep(PAUSE).await;
            continue;
        };
        let called = called.ip().to_canonical();
        let answer = answer.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(request, called);
                async move { answer.await.ok_or(Unwanted) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            match timeout(CONNECTION_TIMEOUT, connection).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => debug!(%error, "connection ended"),
            }
            drop(place);
        });
    }
}

/// The connection is closed without an answer.
#[derive(Debug, thiserror::Error)]
#[error("not served at this address")]
struct Unwanted;

/// A few words.
pub(crate) fn plain(status: StatusCode, words: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::from(words.into()));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn every_address_is_that_of_both_families() {
        for every in ["0.0.0.0:0", "[::]:0"] {
            let listener = bind(every.parse().unwrap()).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            for ip in [
                IpAddr::from(Ipv4Addr::LOCALHOST),
                Ipv6Addr::LOCALHOST.into(),
            ] {
                let reached = TcpStream::connect((ip, port)).await;
                assert!(reached.is_ok(), "{every} by {ip}: {reached:?}");
            }
        }
        let one = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let port = one.local_addr().unwrap().port();
        assert!(
            TcpStream::connect((Ipv6Addr::LOCALHOST, port))
                .await
                .is_err()
        );
    }
}
