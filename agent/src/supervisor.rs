//! What a service manager is told (`sd_notify(3)`): that the agent is ready, and, as long as
//! its reconciler goes on, that it is alive. Without such a manager nobody is told.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use crate::programming::Programming;

/// Where the manager listens, and after how many microseconds of silence it ends the agent.
const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG: &str = "WATCHDOG_USEC";

/// Tells for as long as the agent runs.
pub(crate) async fn tell(programming: Arc<Programming>) {
    let Some(manager) = Manager::from_environment() else {
        return;
    };
    manager.tell("READY=1\n");
    let Some(pause) = watchdog(env::var(WATCHDOG).ok().as_deref()) else {
        return;
    };
    info!(?pause, "the service manager's watchdog is told");
    loop {
        // A restart may cure a pass that hangs, and neither that the cluster is away nor what
        // the kernel lacks.
        if !programming.hangs() {
            manager.tell("WATCHDOG=1\n");
        }
        sleep(pause).await;
    }
}

/// Half of what the manager waits.
fn watchdog(text: Option<&str>) -> Option<Duration> {
    let micros: u64 = text?.parse().ok()?;
    (micros > 0).then(|| Duration::from_micros(micros / 2).max(Duration::from_millis(100)))
}

struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Manager {
    fn from_environment() -> Option<Self> {
        let place = env::var_os(SOCKET)?;
        let opened = address(place.as_bytes()).and_then(|address| {
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok(Self { socket, address })
        });
        match opened {
            Ok(manager) => Some(manager),
            Err(error) => {
                warn!(%error, "{SOCKET} is of no use; the service manager is not told");
                None
            }
        }
    }

    fn tell(&self, words: &str) {
        if let Err(error) = self.socket.send_to_addr(words.as_bytes(), &self.address) {
            warn!(%error, "the service manager does not hear");
        }
    }
}

/// A path, or behind an `@` a name in the abstract namespace.
fn address(place: &[u8]) -> io::Result<SocketAddr> {
    match place {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(Path::new(std::ffi::OsStr::from_bytes(place))),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_hears_twice_in_its_time() {
        for (text, millis) in [
            (None, None),
            (Some(""), None),
            (Some("0"), None),
            (Some("60000000"), Some(30_000)),
            (Some("1"), Some(100)),
        ] {
            let pause = watchdog(text);
            assert_eq!(pause.map(|pause| pause.as_millis()), millis, "{text:?}");
        }
    }

    #[test]
    fn the_manager_hears_by_path_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("@ferrule-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&address(name.as_bytes()).unwrap()).unwrap();
        for (hears, place) in [
            (by_path, path.as_os_str().as_bytes()),
            (by_name, name.as_bytes()),
        ] {
            let manager = Manager {
                socket: UnixDatagram::unbound().unwrap(),
                address: address(place).unwrap(),
            };
            manager.tell("READY=1\n");
            let mut words = [0; 32];
            let length = hears.recv(&mut words).unwrap();
            assert_eq!(&words[..length], b"READY=1\n");
        }
        assert!(address(b"relative").is_err());
    }
}
