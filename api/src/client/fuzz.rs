//! A way in for the fuzz targets (`fuzz/`): an agent that answers anything.

use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Exchange, parse};
use crate::{Answer, ClientError};

/// What the client makes of these bytes and the end of the connection behind them.
///
/// # Errors
/// As for a call.
pub fn answer(bytes: &[u8]) -> Result<Answer, ClientError> {
    let failed = |source: io::Error| ClientError::Io { source };
    let (stream, mut agent) = UnixStream::pair().map_err(failed)?;
    agent.write_all(bytes).map_err(failed)?;
    agent.shutdown(Shutdown::Both).map_err(failed)?;
    let timeout = Duration::from_secs(5);
    let mut exchange = Exchange {
        stream,
        deadline: Instant::now() + timeout,
        timeout,
    };
    parse(&exchange.receive()?)
}
