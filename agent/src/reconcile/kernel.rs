//! The difference between what is and what should be, carried out in the kernel.

use std::collections::BTreeSet;
use std::time::Instant;

use ferrule_api::status::LastChange;
use ferrule_datapath::{ChangeError, Node, apply};
use ferrule_model::change::Change;
use ferrule_model::desired::Frontend;
use ferrule_model::diff::{diff, everything};
use ferrule_model::service::ServiceKey;
use rustix::io::Errno;
use tracing::{error, info, warn};

use super::difference::Difference;
use super::faults::{About, now, remedy, with_remedy};
use super::{RETRY, Reconciler};

impl Reconciler {
    /// Makes the kernel as desired, as far as it can be now.
    pub(super) async fn reconcile(&mut self) {
        self.routes().await;
        let due = self.retry_at.is_none_or(|retry| retry <= Instant::now());
        if due {
            self.dirty.merge(std::mem::take(&mut self.waiting));
        }
        if self.kernel.is_none() || self.observed.is_none() {
            // Nothing can be done before the kernel can be had, be there news or not.
            if !due || !self.prepare().await {
                return;
            }
        }
        if due {
            self.retry_at = None;
        }
        if due || !self.faults.has(About::SourceNat) {
            self.set_source_nat().await;
        }
        if self.dirty.is_empty() {
            self.settle();
            return;
        }
        let changes = self.changes();
        if changes.is_empty() {
            self.settle();
        } else {
            self.carry_out(&changes).await;
        }
        self.remove_unused_device().await;
    }

    /// What lies between what is and what should be, at the addresses that may differ.
    fn changes(&mut self) -> Vec<Change> {
        let mut scope = std::mem::take(&mut self.dirty);
        self.drain(&mut scope);
        let Some(observed) = &self.observed else {
            return Vec::new();
        };
        let mut changes = diff(self.view.desired(), observed, &scope);
        // What failed and is not wanted any longer, or was done by another, is no fault.
        let open: BTreeSet<About> = changes.iter().map(about).collect();
        self.faults.clear_if(|about| {
            let looked_at = match about {
                About::Frontend(addr) => scope.frontends.contains(&addr),
                About::Marked(key) => scope.marked.contains(&key),
                About::Address(ip) => scope.vips.contains(&ip) || scope.hairpins.contains(&ip),
                _ => false,
            };
            looked_at && !open.contains(&about)
        });
        if !self.knows_all() {
            let all = changes.len();
            changes.retain(|change| !removes(change) || self.is_certain(change));
            if changes.len() < all {
                warn!(
                    held_back = all - changes.len(),
                    "nothing is removed until every manifest can be read"
                );
            }
        }
        changes
    }

    /// Everything that can be done is done.
    fn settle(&mut self) {
        if self.waiting.is_empty() {
            self.pending_since = None;
            if !self.faults.has(About::SourceNat) {
                self.retry_at = None;
                self.pause = RETRY.0;
            }
        }
    }

    fn retry_later(&mut self) {
        self.retry_at = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(RETRY.1);
    }

    /// Opens and observes the kernel. False when that failed.
    async fn prepare(&mut self) -> bool {
        if self.kernel.is_none() {
            if self.settings.load_modules {
                let table_bits = self.settings.connection_table_bits;
                self.missing.load(table_bits).await;
            }
            self.tunings.set_sysctls(&self.settings.sysctls);
            let nat = self.view.source_nat();
            match Node::open(self.settings.clone(), nat, !self.knows_all()).await {
                Ok(kernel) => {
                    self.set_timeouts(&kernel).await;
                    self.kernel = Some(kernel);
                }
                Err(error) => {
                    let words =
                        "services cannot be programmed; pods get their addresses all the same";
                    self.kernel_fault(&error.to_string(), words);
                    return false;
                }
            }
        }
        let Some(kernel) = &self.kernel else {
            return false;
        };
        match kernel.observe().await {
            Ok(observed) => {
                info!(
                    services = observed.services.len(),
                    vips = observed.bound_vips().count(),
                    "the kernel's state was adopted"
                );
                self.dirty.merge(everything(self.view.desired(), &observed));
                if let Some(believed) = self.contradicted.take() {
                    self.note_drift(Difference::of(&believed, &observed));
                }
                self.observed = Some(observed);
                self.faults.clear(About::Kernel);
                true
            }
            Err(error) => {
                // A socket in doubt is replaced by a new one.
                self.kernel = None;
                self.kernel_fault(&error.to_string(), "cannot observe the kernel");
                false
            }
        }
    }

    pub(super) fn kernel_fault(&mut self, error: &str, words: &str) {
        let (error, remedy) = with_remedy(error);
        let fault = format!("{words}: {error}");
        if self
            .faults
            .note(About::Kernel, "kernel".to_owned(), fault, &remedy)
        {
            error!(error, remedy, retry = ?self.pause, "{words}");
        }
        self.retry_later();
    }

    /// Whether every source has told all it has, and the machine's addresses are known.
    pub(super) fn knows_all(&self) -> bool {
        self.complete && self.network.is_known()
    }

    /// A failure holds up nothing else: the former rules stay loaded. Those of a
    /// former agent stay until all is known: to know less is no reason to replace
    /// the sources of fewer connections, or of more.
    async fn set_source_nat(&mut self) {
        let knows_all = self.knows_all();
        let Some(kernel) = &mut self.kernel else {
            return;
        };
        if kernel.keeps_former_source_nat() && !knows_all {
            return;
        }
        match kernel.set_source_nat(&self.view.source_nat()).await {
            Ok(changed) => {
                if changed {
                    info!("the rules of source NAT follow the node's addresses and networks");
                }
                self.faults.clear(About::SourceNat);
            }
            Err(error) => {
                self.note_fault(
                    About::SourceNat,
                    &format!("nftables table {}", self.settings.nft_table),
                    &error.to_string(),
                    "it is tried again by itself; until then the rules are the former ones",
                );
                self.retry_later();
            }
        }
    }

    pub(super) fn note_fault(&mut self, about: About, object: &str, problem: &str, remedy: &str) {
        let new = self
            .faults
            .note(about, object.to_owned(), problem.to_owned(), remedy);
        if new {
            error!(object, retry = ?self.pause, "{problem}");
        }
    }

    async fn carry_out(&mut self, changes: &[Change]) {
        let (Some(kernel), Some(mut observed)) = (&mut self.kernel, self.observed.take()) else {
            return;
        };
        let start = Instant::now();
        let applied = apply(kernel, changes).await;
        self.note_leaving(&applied.done, &observed);
        for change in &applied.done {
            observed.record(change);
        }
        info!(
            changes = applied.done.len(),
            failed = applied.failed.len(),
            held_back = applied.held_back.len(),
            took = ?start.elapsed(),
            "node changed"
        );
        let failed: BTreeSet<About> = applied.failed.iter().map(|(c, _)| about(c)).collect();
        for change in applied.done.iter().filter(|c| !failed.contains(&about(c))) {
            self.faults.clear(about(change));
        }
        let (mut doubt, mut contradiction) = (false, false);
        for (change, error) in &applied.failed {
            doubt |= error.leaves_doubt();
            contradiction |= error.is_contradiction();
            self.change_fault(change, error);
            self.waiting.insert_change(change);
        }
        for change in &applied.held_back {
            self.waiting.insert_change(change);
        }
        self.changed_since_rest |= !applied.done.is_empty();
        if !applied.done.is_empty() {
            // What still waits has a fault that says since when.
            let seen = self.pending_since.take().unwrap_or(start);
            self.last_change = Some(LastChange {
                at: now(),
                steps: applied.done.len(),
                seen_to_kernel: seen.elapsed().as_secs_f64(),
                kernel: start.elapsed().as_secs_f64(),
            });
        }
        if doubt {
            self.kernel = None;
            self.contradicted = contradiction.then_some(observed);
        } else {
            self.observed = Some(observed);
        }
        if self.waiting.is_empty() {
            self.settle();
        } else if self.retry_at.is_none() {
            self.retry_later();
        } else if doubt {
            // Everything waits for the kernel to be observed, not only what failed before.
            self.retry_at = Some(Instant::now() + RETRY.0);
        }
        // Otherwise what failed before has its time already: changes that have nothing to do with
        // it must not put that off, or where changes come all the time it is never tried again.
    }

    fn change_fault(&mut self, change: &Change, error: &ChangeError) {
        let holder = change
            .frontend()
            .and_then(|addr| self.view.desired().frontend(&addr))
            .map(Frontend::object);
        let marked = || {
            let ServiceKey::Mark { mark, .. } = change.service()? else {
                return None;
            };
            let holder = self.view.desired().mark_holder(mark)?;
            Some(format!("Service {}", holder.service))
        };
        let address = || change.ip().map(|ip| format!("address {ip}"));
        let object = holder.or_else(marked).or_else(address);
        let object = object.unwrap_or_else(|| change.to_string());
        let scheduler = match change {
            Change::AddService(_, how) | Change::UpdateService(_, how) => {
                Some(how.scheduler.name().to_owned())
            }
            _ => None,
        };
        let words = format!("cannot {change}: {error}");
        if let (Some(Errno::NOENT), Some(scheduler)) = (error.errno(), &scheduler) {
            let scope = self.view.note_missing_scheduler(scheduler);
            self.dirty.merge(scope);
        }
        let remedy = remedy(error.errno(), scheduler.as_deref());
        self.note_fault(about(change), &object, &words, &remedy);
    }
}

/// Whom a fault of a change is filed under.
fn about(change: &Change) -> About {
    match (change.service(), change.frontend(), change.ip()) {
        (_, Some(frontend), _) => About::Frontend(frontend),
        (Some(key), None, _) => About::Marked(key),
        (None, None, Some(ip)) => About::Address(ip),
        (None, None, None) => About::Kernel,
    }
}

/// Whether a change takes something away that may still be wanted.
fn removes(change: &Change) -> bool {
    match change {
        Change::RemoveService(_)
        | Change::DisallowFrontend(_)
        | Change::RemoveExternal(_)
        | Change::RemovePreserved(_)
        | Change::RemoveDropped(_)
        | Change::AddLeaving(_)
        | Change::AddClosed(_)
        | Change::RemoveLeaving(_)
        | Change::RemoveClosed(_)
        | Change::RemoveServed(_)
        | Change::UnbindVip(..)
        | Change::UnsilenceVip(_)
        | Change::UnguardVip(_)
        | Change::RemoveServer(..)
        | Change::RemoveHairpin(_) => true,
        Change::SetMark(_, from, _) => from.is_some(),
        Change::Restrict(_, how) => !how.dismiss.is_empty() || how.limit == Some(false),
        Change::UpdateServer(_, _, weight) => *weight == 0,
        Change::GuardVip(_)
        | Change::SilenceVip(_)
        | Change::BindVip(..)
        | Change::RebindVip(..)
        // It is bound otherwise.
        | Change::ReleaseVip(..)
        | Change::AllowFrontend(_)
        | Change::AddExternal(_)
        | Change::AddPreserved(_)
        | Change::AddDropped(_)
        | Change::AddServed(_)
        | Change::AddHairpin(_)
        | Change::AddService(..)
        | Change::UpdateService(..)
        | Change::AddServer(..) => false,
    }
}
