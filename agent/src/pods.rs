//! What the plugin asks for: addresses of pods.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferrule_api::status::{MAX_ROWS, PodRow, PodRows, cut};
use ferrule_api::{Allocation, Answer, Call, CallError, ErrorCode, Lease, MAX_LINE, Wanted, queue};
use ferrule_model::address::Family;
use ferrule_model::ipam::ChooseError;
use ferrule_model::names::Attachment;
use ferrule_model::ownership::host_veth_name;
use ipnetwork::IpNetwork;
use std::net::IpAddr;
use tracing::{debug, error, info, warn};

use crate::clock::Moment;
use crate::housekeeping::Tally;
use crate::leases::{LeaseError, Leased, Leases, Record, Trouble};
use crate::links::Counters;
use crate::reconcile::now;

/// Time between two looks at the queue of releases; a release in it only holds an address back.
const QUEUE_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of a reply that rows of a listing may take; the rest is what stands around them.
const ROOM: usize = MAX_LINE - 4096;

/// How the comparison of pods' interfaces with the leases stands.
#[derive(Debug, Default)]
struct Looking {
    /// It has worked once.
    done: bool,
    /// Why it does not work at present.
    trouble: Option<Trouble>,
}

/// Answers calls about pods.
#[derive(Debug)]
pub(crate) struct Pods {
    leases: Leases,
    state_dir: PathBuf,
    mtu: AtomicU32,
    /// When this agent started.
    started: Moment,
    looking: Mutex<Looking>,
    turn: tokio::sync::Mutex<()>,
    tidied: Mutex<Tally>,
    loose: Mutex<BTreeMap<IpAddr, String>>,
}

impl Pods {
    pub(crate) fn new(leases: Leases, state_dir: PathBuf, mtu: u32) -> Self {
        Self {
            leases,
            state_dir,
            mtu: AtomicU32::new(mtu),
            started: Moment::now(),
            looking: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            tidied: Mutex::default(),
            loose: Mutex::default(),
        }
    }

    /// Where the agent keeps what has to outlive it.
    pub(crate) fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub(crate) fn started(&self) -> &Moment {
        &self.started
    }

    /// Whether it is known which addresses are in use without a lease.
    pub(crate) fn has_looked(&self) -> bool {
        self.looking().done
    }

    /// Who has it looks; others wait.
    pub(crate) async fn turn_to_look(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Takes in how a comparison of pods' interfaces with the leases ended. After the
    /// first that worked, addresses can be leased. Whether it failed for another reason
    /// than before is returned.
    pub(crate) fn note_look(&self, outcome: Result<(), String>) -> bool {
        let mut looking = self.looking();
        let Err(words) = outcome else {
            *looking = Looking {
                done: true,
                trouble: None,
            };
            return false;
        };
        let before = looking.trouble.take();
        let news = before.as_ref().is_none_or(|before| before.words != words);
        looking.trouble = Some(Trouble {
            words,
            since: before.as_ref().map_or_else(now, |before| before.since),
            attempts: before.map_or(0, |before| before.attempts) + 1,
        });
        news
    }

    /// Why pods' interfaces cannot be compared with the leases at present.
    pub(crate) fn look_trouble(&self) -> Option<Trouble> {
        self.looking().trouble.clone()
    }

    fn looking(&self) -> MutexGuard<'_, Looking> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has addresses given to nobody that are in use without a lease, each with the
    /// interface that uses it. Where not all was `seen`, those of before stay so.
    pub(crate) fn withhold(&self, mut in_use: BTreeMap<IpAddr, String>, seen: bool) {
        let mut loose = self.loose.lock().unwrap_or_else(PoisonError::into_inner);
        if !seen {
            in_use.extend(std::mem::take(&mut *loose));
        }
        let withheld = self.leases.withhold(in_use.keys().copied().collect());
        in_use.retain(|ip, _| withheld.contains(ip));
        if *loose != in_use && !in_use.is_empty() {
            warn!(addresses = ?in_use, "addresses are in use by interfaces that cannot be given a lease; nobody else gets them");
        }
        *loose = in_use;
    }

    /// Addresses that are in use without a lease, with the interface that uses each.
    pub(crate) fn withheld(&self) -> BTreeMap<IpAddr, String> {
        let loose = self.loose.lock();
        loose.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts what housekeeping did.
    pub(crate) fn note_tidied(&self, what: &'static str) {
        let mut tally = self.tidied.lock().unwrap_or_else(PoisonError::into_inner);
        *tally.0.entry(what).or_default() += 1;
    }

    /// What housekeeping did since the start, by kind.
    pub(crate) fn tidied(&self) -> BTreeMap<String, u64> {
        let tally = self.tidied.lock().unwrap_or_else(PoisonError::into_inner);
        tally
            .0
            .iter()
            .map(|(what, count)| ((*what).to_owned(), *count))
            .collect()
    }

    pub(crate) fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Answers one call. The disk is touched, so it is done where blocking is allowed.
    pub(crate) async fn call(self: Arc<Self>, call: Call) -> Answer {
        let answer = tokio::task::spawn_blocking(move || match call {
            Call::Allocate(wanted) => self.allocate(&wanted),
            Call::Release { attachment } => self.release_while(&attachment, || true),
            Call::Ready => self.ready(),
            Call::Lease { attachment } => self.lease(&attachment),
            Call::Status
            | Call::Frontends { .. }
            | Call::Pods { .. }
            | Call::Trace(_)
            | Call::Tidy => Err(CallError {
                code: ErrorCode::Internal,
                message: "the call is not about a pod".to_owned(),
            }),
        });
        ended(answer.await)
    }

    /// Ends a lease for a client that may have gone meanwhile; see [`Leases::release_while`].
    pub(crate) async fn release_for(
        self: Arc<Self>,
        attachment: Attachment,
        is_there: impl FnOnce() -> bool + Send + 'static,
    ) -> Answer {
        let answer = tokio::task::spawn_blocking(move || self.release_while(&attachment, is_there));
        ended(answer.await)
    }

    /// A part of the list of pods, with what passed through each.
    pub(crate) async fn rows(
        self: Arc<Self>,
        after: Option<String>,
        counters: BTreeMap<String, Counters>,
    ) -> Answer {
        let page = tokio::task::spawn_blocking(move || {
            let limit = usize::try_from(MAX_ROWS).unwrap_or(usize::MAX);
            // One more than fits says whether there is another part.
            self.leases.page(after.as_deref(), limit + 1)
        });
        let leases = match page.await {
            Ok(Ok(leases)) => leases,
            Ok(Err(error)) => return Answer::Error(call_error(&error)),
            Err(error) => {
                error!(%error, "a call did not come to its end");
                return Answer::Error(CallError {
                    code: ErrorCode::Internal,
                    message: "the agent failed to answer; see its log".to_owned(),
                });
            }
        };
        let limit = usize::try_from(MAX_ROWS).unwrap_or(usize::MAX);
        let mut page = PodRows::default();
        let (mut room, mut last) = (ROOM, None);
        for (key, attachment, record) in leases {
            let row = row(&attachment, record, &counters);
            let size = serde_json::to_vec(&row).map_or(0, |row| row.len() + 1);
            if page.rows.len() == limit || size > room {
                page.next = last;
                break;
            }
            room -= size;
            page.rows.push(row);
            last = Some(key);
        }
        Answer::Pods(page)
    }

    fn allocate(&self, wanted: &Wanted) -> Result<Answer, CallError> {
        self.check_looked()?;
        let allocate = || self.leases.allocate(wanted, Moment::now());
        let leased = allocate().or_else(|error| match error {
            // Who has it may have a release in the queue.
            LeaseError::PortTaken(_) => {
                self.take_queued();
                allocate()
            }
            other => Err(other),
        });
        let Leased { addresses, renewed } = leased.map_err(|error| call_error(&error))?;
        let pod = wanted.pod.as_ref();
        let pod = pod.map(|pod| format!("{}/{}", pod.namespace, pod.name));
        info!(container_id = %wanted.attachment.container_id, pod, ?addresses, renewed, "address leased");
        Ok(Answer::Allocated(Allocation {
            addresses: addresses.into_iter().filter_map(host_network).collect(),
            mtu: self.mtu.load(Ordering::Relaxed),
            renewed,
        }))
    }

    fn check_looked(&self) -> Result<(), CallError> {
        let looking = self.looking();
        let (code, message) = match &looking.trouble {
            _ if looking.done => return Ok(()),
            None => (
                ErrorCode::NotReady,
                "the agent has just started and does not know yet which addresses are in use on this node; ask again in a moment".to_owned(),
            ),
            Some(Trouble { words, .. }) => (
                // A disk that refuses keeps the look from its end as well.
                match self.leases.trouble() {
                    Some(_) => ErrorCode::NotReady,
                    None => ErrorCode::Internal,
                },
                format!("the agent cannot find out which addresses are in use on this node: {words}"),
            ),
        };
        Err(CallError { code, message })
    }

    /// Whether an address could be leased now. A disk that has refused is tried again:
    /// who is told that no pod can come sends none, so nothing else would try it.
    fn ready(&self) -> Result<Answer, CallError> {
        self.check_looked()?;
        let disk = self.leases.try_disk();
        disk.map_err(|error| call_error(&error))?;
        match self.leases.has_room() {
            Ok(()) => Ok(Answer::Ready),
            Err(error) => Err(call_error(&error.into())),
        }
    }

    /// What an attachment has; before it is known whose pods have lost their lease
    /// nothing is said.
    fn lease(&self, attachment: &Attachment) -> Result<Answer, CallError> {
        self.check_looked()?;
        let found = self.leases.find(attachment);
        let record = found.map_err(|error| call_error(&error))?;
        let lease = record.map(|record| Lease {
            addresses: record
                .addresses
                .into_iter()
                .filter_map(host_network)
                .collect(),
            ports: record.ports,
        });
        Ok(Answer::Lease(lease.unwrap_or_default()))
    }

    fn release_while(
        &self,
        attachment: &Attachment,
        is_there: impl FnOnce() -> bool,
    ) -> Result<Answer, CallError> {
        let had_one = self
            .leases
            .release_while(attachment, is_there)
            .map_err(|error| call_error(&error))?;
        if had_one {
            info!(container_id = %attachment.container_id, "address released");
        }
        Ok(Answer::Released)
    }

    /// Takes the releases that the plugin queued while no agent was there.
    fn take_queued(&self) {
        let queued = match queue::list(&self.state_dir) {
            Ok(queued) => queued,
            Err(error) => {
                warn!(%error, "cannot read the queue of releases");
                return;
            }
        };
        for (path, attachment) in queued {
            match self.leases.release_queued(&attachment, &path) {
                Ok(false) => {}
                Ok(true) => {
                    info!(container_id = %attachment.container_id, "address released (queued while the agent was away)");
                }
                Err(error) => {
                    warn!(container_id = %attachment.container_id, %error, "a queued release has to wait");
                }
            }
        }
    }

    /// Takes queued releases now and then, for as long as the agent runs; and tries a disk
    /// that has refused, so that `status` tells when it is over.
    pub(crate) async fn drain_queue(self: Arc<Self>) {
        loop {
            let pods = Arc::clone(&self);
            let round = move || {
                pods.take_queued();
                if let Err(error) = pods.leases.try_disk() {
                    debug!(%error, "the disk still refuses");
                }
            };
            if let Err(error) = tokio::task::spawn_blocking(round).await {
                error!(%error, "the queue of releases was not read to its end");
            }
            tokio::time::sleep(QUEUE_INTERVAL).await;
        }
    }
}

fn row(attachment: &Attachment, record: Record, counters: &BTreeMap<String, Counters>) -> PodRow {
    let device = host_veth_name(attachment).to_string();
    let counted = counters.get(&device);
    let mut pod = record
        .pod
        .map(|pod| format!("{}/{}", pod.namespace, pod.name))
        .unwrap_or_default();
    // The runtime told it, nobody checked it.
    cut(&mut pod);
    PodRow {
        pod,
        container_id: attachment.container_id.to_string(),
        interface: attachment.interface.to_string(),
        network: record.network.map(String::from),
        addresses: record.addresses.iter().map(ToString::to_string).collect(),
        host_interface: counted.map(|_| device).unwrap_or_default(),
        packets_in: counted.map_or(0, |c| c.packets_in),
        packets_out: counted.map_or(0, |c| c.packets_out),
        bytes_in: counted.map_or(0, |c| c.bytes_in),
        bytes_out: counted.map_or(0, |c| c.bytes_out),
    }
}

/// The answer of a call that was made where blocking is allowed.
fn ended(outcome: Result<Result<Answer, CallError>, tokio::task::JoinError>) -> Answer {
    match outcome {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => Answer::Error(error),
        Err(error) => {
            error!(%error, "a call did not come to its end");
            Answer::Error(CallError {
                code: ErrorCode::Internal,
                message: "the agent failed to answer; see its log".to_owned(),
            })
        }
    }
}

fn host_network(ip: IpAddr) -> Option<IpNetwork> {
    IpNetwork::new(ip, Family::of(ip).bits()).ok()
}

fn call_error(error: &LeaseError) -> CallError {
    let (code, remedy) = match error {
        LeaseError::Choose(ChooseError::NoRange) => (
            ErrorCode::NotReady,
            "; it is taken from spec.podCIDRs of the Node object, which has not been seen",
        ),
        LeaseError::Choose(ChooseError::Exhausted { .. }) => (
            ErrorCode::PoolExhausted,
            "; remove pods, or give the node a larger pod range",
        ),
        LeaseError::Choose(
            ChooseError::NotOffered { .. } | ChooseError::Taken { .. } | ChooseError::InUse(_),
        )
        | LeaseError::HasOthers { .. } => (
            ErrorCode::AddressTaken,
            "; ask for another one, or for none",
        ),
        LeaseError::PortTaken(_) => (ErrorCode::PortTaken, ""),
        LeaseError::OtherPorts(_) => (ErrorCode::BadRequest, ""),
        LeaseError::Store { .. } => (ErrorCode::Internal, "; is the disk full or read-only?"),
        // They have their remedy.
        LeaseError::File(error) if error.may_pass() => (ErrorCode::NotReady, ""),
        LeaseError::File(_) | LeaseError::Lock(_) | LeaseError::Damaged { .. } => {
            (ErrorCode::Internal, "")
        }
    };
    CallError {
        code,
        message: format!("{error}{remedy}"),
    }
}
