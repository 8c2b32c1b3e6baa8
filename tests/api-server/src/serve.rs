//! The API behind HTTP, and TLS.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::ApiServer;

/// How connections begin.
#[derive(Clone)]
pub enum Acceptor {
    /// In plain text.
    Plain,
    /// With TLS.
    Tls(TlsAcceptor),
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "Plain",
            Self::Tls(_) => "Tls",
        })
    }
}

/// Serves until the listener fails. When it is dropped, all connections break.
///
/// # Errors
/// When no connection can be accepted any longer.
pub async fn serve(
    server: Arc<ApiServer>,
    listener: TcpListener,
    acceptor: Acceptor,
) -> std::io::Result<Infallible> {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _from) = listener.accept().await?;
        // Those that have ended need no room any more.
        while connections.try_join_next().is_some() {}
        let server = Arc::clone(&server);
        let acceptor = acceptor.clone();
        connections.spawn(async move {
            match acceptor {
                Acceptor::Plain => converse(server, stream).await,
                Acceptor::Tls(acceptor) => {
                    // Who does not believe the certificate says so and goes.
                    if let Ok(stream) = acceptor.accept(stream).await {
                        converse(server, stream).await;
                    }
                }
            }
        });
    }
}

async fn converse(
    server: Arc<ApiServer>,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) {
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    // Connections break: that is what this server is for.
    let _broken = connection.await;
}
