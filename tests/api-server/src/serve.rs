//! The API behind HTTP.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::ApiServer;

/// Serves until the listener fails.
///
/// # Errors
/// When no connection can be accepted any longer.
pub async fn serve(server: Arc<ApiServer>, listener: TcpListener) -> std::io::Result<Infallible> {
    loop {
        let (stream, _from) = listener.accept().await?;
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let server = Arc::clone(&server);
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // Connections break: that is what this server is for.
            let _broken = connection.await;
        });
    }
}
