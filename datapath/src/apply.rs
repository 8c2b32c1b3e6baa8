//! Carries changes out, so that a failure hurts its own address and no other.

use std::collections::BTreeSet;
use std::future::Future;
use std::mem::discriminant;
use std::net::IpAddr;

use ferrule_model::address::FrontendAddr;
use ferrule_model::change::Change;
use ferrule_netlink::Error;

/// A change that the kernel did not make.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{source}")]
pub struct ChangeError {
    source: Error,
    /// The kernel is not as we believed it to be.
    contradiction: bool,
}

impl ChangeError {
    /// The kernel refused, or its answer was lost.
    #[must_use]
    pub fn new(source: Error) -> Self {
        Self {
            source,
            contradiction: false,
        }
    }

    /// The kernel lacks what the change builds on, so somebody else removed it.
    #[must_use]
    pub fn contradicts(source: Error) -> Self {
        Self {
            source,
            contradiction: true,
        }
    }

    /// What is known of the kernel is in doubt: observe it before going on.
    #[must_use]
    pub fn leaves_doubt(&self) -> bool {
        self.contradiction || self.source.leaves_doubt()
    }
}

/// Something that carries out changes: the kernel, or in tests one that fails on purpose.
pub trait Kernel {
    /// Carries out changes that are all of one kind. The i-th result is that of
    /// the i-th change. Idempotent, as [`Change`] says.
    fn execute(
        &mut self,
        changes: &[Change],
    ) -> impl Future<Output = Vec<Result<(), ChangeError>>> + Send;
}

/// What became of changes.
#[derive(Debug, Default)]
pub struct Applied {
    /// The kernel acknowledged these.
    pub done: Vec<Change>,
    /// These failed.
    pub failed: Vec<(Change, ChangeError)>,
    /// These were not tried, because one that they build on failed.
    pub held_back: Vec<Change>,
}

/// Carries out `changes`, which stand in the order of [`Change`]'s variants.
///
/// A VIP that is not under guard is never bound, a virtual service that could
/// not be removed keeps its VIP and guard, and so on: after a failure the later
/// steps that build on it are held back.
pub async fn apply<K: Kernel>(kernel: &mut K, changes: &[Change]) -> Applied {
    let mut applied = Applied::default();
    let mut broken = Broken::default();
    for run in changes.chunk_by(|a, b| discriminant(a) == discriminant(b)) {
        let (held_back, tried): (Vec<Change>, Vec<Change>) = run
            .iter()
            .cloned()
            .partition(|change| broken.holds_back(change));
        applied.held_back.extend(held_back);
        if tried.is_empty() {
            continue;
        }
        let results = kernel.execute(&tried).await;
        for (change, result) in tried.into_iter().zip(results) {
            match result {
                Ok(()) => applied.done.push(change),
                Err(error) => {
                    broken.record(&change);
                    applied.failed.push((change, error));
                }
            }
        }
    }
    applied
}

/// Addresses about which something failed.
#[derive(Debug, Default)]
struct Broken {
    /// A step about the VIP itself failed: nothing is built on it.
    vips: BTreeSet<IpAddr>,
    /// A virtual service on the VIP could not be removed: the VIP stays.
    occupied: BTreeSet<IpAddr>,
    /// A virtual service could not be made or removed.
    frontends: BTreeSet<FrontendAddr>,
    /// A real server could not be added: those that were to leave stay, or none may be left.
    unstaffed: BTreeSet<FrontendAddr>,
}

impl Broken {
    fn record(&mut self, change: &Change) {
        match change {
            Change::RemoveService(frontend) | Change::DisallowFrontend(frontend) => {
                self.occupied.insert(frontend.ip);
                self.frontends.insert(*frontend);
            }
            Change::AllowFrontend(frontend) | Change::AddService(frontend, _) => {
                self.frontends.insert(*frontend);
            }
            Change::UnbindVip(ip)
            | Change::UnguardVip(ip)
            | Change::GuardVip(ip)
            | Change::BindVip(ip) => {
                self.vips.insert(*ip);
            }
            Change::AddServer(frontend, ..) => {
                self.unstaffed.insert(*frontend);
            }
            Change::UpdateService(..) | Change::UpdateServer(..) | Change::RemoveServer(..) => {}
        }
    }

    fn holds_back(&self, change: &Change) -> bool {
        match change {
            Change::UnbindVip(ip) | Change::UnguardVip(ip) => {
                self.vips.contains(ip) || self.occupied.contains(ip)
            }
            Change::GuardVip(ip) | Change::BindVip(ip) => self.vips.contains(ip),
            Change::RemoveService(frontend)
            | Change::DisallowFrontend(frontend)
            | Change::AllowFrontend(frontend)
            | Change::AddService(frontend, _)
            | Change::UpdateService(frontend, _)
            | Change::AddServer(frontend, ..)
            | Change::UpdateServer(frontend, ..) => {
                self.frontends.contains(frontend) || self.vips.contains(&frontend.ip)
            }
            Change::RemoveServer(frontend, _) => {
                self.frontends.contains(frontend) || self.unstaffed.contains(frontend)
            }
        }
    }
}
