//! Carries changes out, so that a failure hurts its own address and no other.

use std::collections::BTreeSet;
use std::future::Future;
use std::mem::discriminant;
use std::net::IpAddr;

use ferrule_model::address::FrontendAddr;
use ferrule_model::change::Change;
use ferrule_model::service::{Mark, ServiceKey};
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
    /// A VIP could not be bound another way.
    unmoved: BTreeSet<IpAddr>,
    /// A virtual service on the VIP could not be removed: the VIP stays.
    occupied: BTreeSet<IpAddr>,
    /// A virtual service could not be made or removed.
    frontends: BTreeSet<FrontendAddr>,
    /// The same of virtual services by mark.
    marks: BTreeSet<Mark>,
}

impl Broken {
    fn record(&mut self, change: &Change) {
        match change {
            Change::RemoveService(ServiceKey::Address(frontend))
            | Change::DisallowFrontend(frontend) => {
                self.occupied.insert(frontend.ip);
                self.frontends.insert(*frontend);
            }
            Change::RemoveService(ServiceKey::Mark { mark, .. })
            | Change::AddService(ServiceKey::Mark { mark, .. }, _)
            | Change::SetMark(_, _, Some(mark))
            | Change::SetMark(_, Some(mark), None) => {
                self.marks.insert(*mark);
            }
            Change::AllowFrontend(frontend)
            | Change::AddExternal(frontend)
            | Change::AddPreserved(frontend)
            | Change::RemovePreserved(frontend)
            | Change::RemoveExternal(frontend)
            // Whom it would let in is not known.
            | Change::Restrict(frontend, _)
            | Change::AddService(ServiceKey::Address(frontend), _) => {
                self.frontends.insert(*frontend);
            }
            Change::UnbindVip(ip, _)
            | Change::UnguardVip(ip)
            | Change::UnsilenceVip(ip)
            | Change::GuardVip(ip)
            | Change::SilenceVip(ip)
            | Change::BindVip(ip, _) => {
                self.vips.insert(*ip);
            }
            // It is bound as it was, so what builds on that it is bound goes on.
            Change::RebindVip(ip, _) => {
                self.unmoved.insert(*ip);
            }
            // A backend that cannot call itself is better than one that nobody can call, and who is
            // refused instead of dropped is not let in either.
            Change::SetMark(_, None, None)
            | Change::ReleaseVip(..)
            | Change::AddServed(_)
            | Change::RemoveServed(_)
            | Change::AddDropped(_)
            | Change::RemoveDropped(_)
            | Change::AddLeaving(_)
            | Change::AddClosed(_)
            | Change::RemoveLeaving(_)
            | Change::RemoveClosed(_)
            | Change::AddHairpin(_)
            | Change::RemoveHairpin(_)
            | Change::UpdateService(..)
            | Change::AddServer(..)
            | Change::UpdateServer(..)
            | Change::RemoveServer(..) => {}
        }
    }

    fn holds_back(&self, change: &Change) -> bool {
        match change {
            Change::UnbindVip(ip, _) | Change::UnsilenceVip(ip) | Change::UnguardVip(ip) => {
                self.vips.contains(ip) || self.occupied.contains(ip)
            }
            Change::GuardVip(ip)
            | Change::SilenceVip(ip)
            | Change::BindVip(ip, _)
            | Change::RebindVip(ip, _) => self.vips.contains(ip),
            Change::ReleaseVip(ip, _) => self.vips.contains(ip) || self.unmoved.contains(ip),
            // The entry proves that a virtual service which still stands is ours.
            Change::SetMark(_, Some(mark), _) if self.marks.contains(mark) => true,
            Change::SetMark(_, _, mark) => mark.is_some_and(|mark| self.marks.contains(&mark)),
            Change::RemoveService(ServiceKey::Mark { mark, .. })
            | Change::AddService(ServiceKey::Mark { mark, .. }, _)
            | Change::AddServer(ServiceKey::Mark { mark, .. }, ..) => self.marks.contains(mark),
            Change::RemoveService(ServiceKey::Address(frontend))
            | Change::DisallowFrontend(frontend)
            | Change::RemoveExternal(frontend)
            | Change::RemovePreserved(frontend)
            | Change::AllowFrontend(frontend)
            | Change::AddExternal(frontend)
            | Change::AddPreserved(frontend)
            | Change::Restrict(frontend, _)
            | Change::AddService(ServiceKey::Address(frontend), _)
            | Change::AddServer(ServiceKey::Address(frontend), ..) => {
                self.frontends.contains(frontend) || self.vips.contains(&frontend.ip)
            }
            // These build on nothing that the same pass makes. A backend that is dead or drains
            // must go whatever else fails, or its share of the connections is lost.
            Change::AddServed(_)
            | Change::RemoveServed(_)
            | Change::AddDropped(_)
            | Change::RemoveDropped(_)
            | Change::AddLeaving(_)
            | Change::AddClosed(_)
            | Change::RemoveLeaving(_)
            | Change::RemoveClosed(_)
            | Change::AddHairpin(_)
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
    use ferrule_model::binding::Binding;
    use ferrule_model::change::Restriction;
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
                Change::RemoveService(addr.into()),
                Change::DisallowFrontend(addr),
                Change::RemoveExternal(addr),
                Change::AllowFrontend(addr),
                Change::AddExternal(addr),
                Change::AddPreserved(addr),
                Change::RemovePreserved(addr),
                Change::AddServed(addr),
                Change::RemoveServed(addr),
                Change::AddDropped(addr),
                Change::RemoveDropped(addr),
                Change::AddLeaving(addr),
                Change::RemoveLeaving(addr),
                Change::AddClosed(addr),
                Change::RemoveClosed(addr),
                Change::Restrict(addr, Restriction::default()),
                Change::AddService(addr.into(), how()),
                Change::UpdateService(addr.into(), how()),
                Change::AddServer(addr.into(), backend, 1),
                Change::UpdateServer(addr.into(), backend, 0),
                Change::RemoveServer(addr.into(), backend),
            ]);
        }
        changes.extend([
            Change::UnbindVip(ip, Binding::Address),
            Change::UnguardVip(ip),
            Change::UnsilenceVip(ip),
            Change::GuardVip(ip),
            Change::SilenceVip(ip),
            Change::BindVip(ip, Binding::Address),
            Change::RebindVip(ip, Binding::Address),
            Change::ReleaseVip(ip, Binding::Address),
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
            AddDropped:80: 
            AddLeaving:80: 
            AddClosed:80: 
            RemoveService:80: DisallowFrontend:80 UnbindVip UnsilenceVip UnguardVip AllowFrontend:80 AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            DisallowFrontend:80: UnbindVip UnsilenceVip UnguardVip AllowFrontend:80 AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            UnbindVip: UnsilenceVip UnguardVip GuardVip SilenceVip BindVip RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            UnsilenceVip: UnguardVip GuardVip SilenceVip BindVip RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            UnguardVip: GuardVip SilenceVip BindVip RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            GuardVip: SilenceVip BindVip RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            SilenceVip: BindVip RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            BindVip: RebindVip ReleaseVip AllowFrontend:80 AllowFrontend:81 AddExternal:80 AddExternal:81 AddPreserved:80 AddPreserved:81 RemovePreserved:80 RemovePreserved:81 RemoveExternal:80 RemoveExternal:81 Restrict:80 Restrict:81 AddService:80 AddService:81 AddServer:80 AddServer:81
            RebindVip: ReleaseVip
            ReleaseVip: 
            AllowFrontend:80: AddExternal:80 AddPreserved:80 RemovePreserved:80 RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            AddExternal:80: AddPreserved:80 RemovePreserved:80 RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            AddPreserved:80: RemovePreserved:80 RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            RemovePreserved:80: RemoveExternal:80 Restrict:80 AddService:80 AddServer:80
            RemoveExternal:80: Restrict:80 AddService:80 AddServer:80
            Restrict:80: AddService:80 AddServer:80
            AddServed:80: 
            RemoveServed:80: 
            AddHairpin: 
            AddService:80: AddServer:80
            UpdateService:80: 
            AddServer:80: 
            UpdateServer:80: 
            RemoveServer:80: 
            RemoveHairpin: 
            RemoveDropped:80: 
            RemoveLeaving:80: 
            RemoveClosed:80: 
        "]].assert_eq(&table);
    }
}
