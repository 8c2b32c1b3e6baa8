//! A steady load of requests on Services, every one of which must be answered.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};

use super::world;
use crate::netns::Netns;
use crate::sock::{ANSWER, Outcome, Request, TRANSPORTS};
use crate::wait;

/// The clients' ports. Each call of a Service has one that none had before it: from a
/// port that was used towards two Services with one backend, IPVS cannot tell the
/// replies of the older connection from those of the newer. None of them is one that
/// the kernel gives to others, or that the agent listens on.
const PORTS: Range<u16> = 11_000..32_768;

/// Requests that go on until they are stopped.
pub(super) struct Load {
    done: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    thread: Option<JoinHandle<anyhow::Result<anyhow::Result<()>>>>,
}

impl Load {
    /// Starts it: one request after the other to each Service, over both
    /// transports and families.
    pub(super) fn start(client: &Netns, services: &[u8]) -> anyhow::Result<Self> {
        let done = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicUsize::new(0));
        let (stop, count) = (Arc::clone(&done), Arc::clone(&rounds));
        let services = services.to_vec();
        // The thread is in the client's namespace for good.
        let thread = client.thread(move || {
            let mut ports = PORTS;
            while !stop.load(Ordering::Relaxed) {
                for number in &services {
                    let port = ports.next().context("the load has used all ports")?;
                    call(*number, port)?;
                }
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?;
        Ok(Self {
            done,
            rounds,
            thread: Some(thread),
        })
    }

    /// Waits until each Service was called so many times more.
    pub(super) fn wait_for_rounds(&self, more: usize) -> anyhow::Result<()> {
        let goal = self.rounds.load(Ordering::Relaxed) + more;
        wait::until_ok("rounds of the load", Duration::from_mins(2), || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            let now = self.rounds.load(Ordering::Relaxed);
            ensure!(now >= goal || ended, "{now} of {goal}");
            Ok(())
        })
    }

    /// Ends it.
    ///
    /// # Errors
    /// The first request that was not answered.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.done.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the load panicked"))??,
            None => Ok(()),
        }
    }
}

/// One request over each transport and family, all from one port.
fn call(service: u8, port: u16) -> anyhow::Result<()> {
    for to in world::vips(service).map(|vip| SocketAddr::new(vip, 80)) {
        for transport in TRANSPORTS {
            let request = Request::new(transport, to).bound_to(Some(port));
            match request.send_here(ANSWER)? {
                Outcome::Answered { .. } => {}
                other => bail!("{transport:?} {to} from port {port}: {other:?}"),
            }
        }
    }
    Ok(())
}

impl Drop for Load {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}
