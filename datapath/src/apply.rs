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

    /// The kernel lacked what the change builds on, or had what it was to make.
    #[must_use]
    pub fn is_contradiction(&self) -> bool {
        self.contradiction
    }

    /// The kernel's error number, where it gave one.
    #[must_use]
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        self.source.errno()
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
        let mut results = kernel.execute(&tried).await.into_iter();
        for change in tried {
            // A change without a result must not pass for one that was made.
            let result = results.next();
            match result.unwrap_or_else(|| Err(ChangeError::new(Error::Closed))) {
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
}

impl Broken {
    fn record(&mut self, change: &Change) {
        match change {
            Change::RemoveService(frontend) | Change::DisallowFrontend(frontend) => {
                self.occupied.insert(frontend.ip);
                self.frontends.insert(*frontend);
            }
            Change::AllowFrontend(frontend)
            | Change::AddExternal(frontend)
            | Change::AddPreserved(frontend)
            | Change::RemovePreserved(frontend)
            | Change::RemoveExternal(frontend)
            | Change::AddService(frontend, _) => {
                self.frontends.insert(*frontend);
            }
            Change::UnbindVip(ip)
            | Change::UnguardVip(ip)
            | Change::GuardVip(ip)
            | Change::BindVip(ip) => {
                self.vips.insert(*ip);
            }
            // A backend that cannot call itself is better than one that nobody can call.
            Change::AddHairpin(_)
            | Change::RemoveHairpin(_)
            | Change::UpdateService(..)
            | Change::AddServer(..)
            | Change::UpdateServer(..)
            | Change::RemoveServer(..) => {}
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
            | Change::RemoveExternal(frontend)
            | Change::RemovePreserved(frontend)
            | Change::AllowFrontend(frontend)
            | Change::AddExternal(frontend)
            | Change::AddPreserved(frontend)
            | Change::AddService(frontend, _)
            | Change::AddServer(frontend, ..) => {
                self.frontends.contains(frontend) || self.vips.contains(&frontend.ip)
            }
            // These build on nothing that the same pass makes. A backend that is dead or drains
            // must go whatever else fails, or its share of the connections is lost.
            Change::AddHairpin(_)
            | Change::RemoveHairpin(_)
            | Change::UpdateService(..)
            | Change::UpdateServer(..)
            | Change::RemoveServer(..) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use ferrule_model::address::{BackendAddr, Protocol};
    use ferrule_model::service::Scheduling;

    use super::*;

    /// Every kind of change about one frontend, and then about another port of the same VIP.
    fn changes() -> Vec<Change> {
        let ip: IpAddr = "10.96.0.1".parse().unwrap();
        let backend = BackendAddr::new("10.1.0.2".parse().unwrap(), 8080);
        let how = Scheduling::default;
        let mut changes = Vec::new();
        for port in [80, 81] {
            let addr = FrontendAddr::new(ip, port, Protocol::Tcp);
            changes.extend([
                Change::RemoveService(addr),
                Change::DisallowFrontend(addr),
                Change::RemoveExternal(addr),
                Change::AllowFrontend(addr),
                Change::AddExternal(addr),
                Change::AddPreserved(addr),
                Change::RemovePreserved(addr),
                Change::AddService(addr, how()),
                Change::UpdateService(addr, how()),
                Change::AddServer(addr, backend, 1),
                Change::UpdateServer(addr, backend, 0),
                Change::RemoveServer(addr, backend),
            ]);
        }
        changes.extend([
            Change::UnbindVip(ip),
            Change::UnguardVip(ip),
            Change::GuardVip(ip),
            Change::BindVip(ip),
            Change::AddHairpin(backend.ip),
            Change::RemoveHairpin(backend.ip),
        ]);
        changes.sort();
        changes
    }

    fn short(change: &Change) -> String {
        let name = format!("{change:?}");
        let name = name.split('(').next().unwrap_or_default();
        let port = change.frontend().map(|addr| format!(":{}", addr.port));
        format!("{name}{}", port.unwrap_or_default())
    }

    /// What a failure of each kind of change holds back, of those that come behind it.
    #[test]
    fn a_failure_holds_back_what_builds_on_it() {
        let all = changes();
        let mut table = String::new();
        for failed in &all {
            if failed.frontend().is_some_and(|addr| addr.port == 81) {
                continue;
            }
            let mut broken = Broken::default();
            broken.record(failed);
            let behind = all.iter().skip_while(|change| *change != failed).skip(1);
            let held: Vec<_> = behind.filter(|c| broken.holds_back(c)).map(short).collect();
            writeln!(table, "{}: {}", short(failed), held.join(" ")).unwrap();
        }
        expect_test::expect![[r"
            RemoveService:80: DisallowFrontend:80 UnbindVip UnguardVip AllowFrontend:80 AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 AddService:80 AddServer:80
            DisallowFrontend:80: UnbindVip UnguardVip AllowFrontend:80 AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 AddService:80 AddServer:80
            UnbindVip: UnguardVip GuardVip BindVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            UnguardVip: GuardVip BindVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            GuardVip: BindVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            BindVip: AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            AllowFrontend:80: AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 AddService:80 AddServer:80
            AddExternal:80: AddPreserved:80 RemovePreserved:80 RemoveExternal:80 AddService:80 AddServer:80
            AddPreserved:80: RemovePreserved:80 RemoveExternal:80 AddService:80 AddServer:80
            RemovePreserved:80: RemoveExternal:80 AddService:80 AddServer:80
            RemoveExternal:80: AddService:80 AddServer:80
            AddHairpin: 
            AddService:80: AddServer:80
            UpdateService:80: 
            AddServer:80: 
            UpdateServer:80: 
            RemoveServer:80: 
            RemoveHairpin: 
        "]].assert_eq(&table);
    }
}
