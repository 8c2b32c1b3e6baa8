//! What does not work at present: since when, how often it was tried, what to do.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::SystemTime;

use ferrule_api::status::Problem;
use ferrule_model::address::FrontendAddr;
use ferrule_model::service::ServiceKey;
use ipnetwork::IpNetwork;
use rustix::io::Errno;

/// What a fault is about; each has one fault at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum About {
    /// Services cannot be programmed at all.
    Kernel,
    /// Rules of source NAT.
    SourceNat,
    /// IPVS's time-outs.
    Timeouts,
    /// News of devices, addresses and routes.
    Monitor,
    /// Addresses of this machine.
    Addresses,
    /// The list of routes.
    Routes,
    /// A step about a frontend.
    Frontend(FrontendAddr),
    /// A step about a virtual service by mark.
    Marked(ServiceKey),
    /// A step about an address.
    Address(IpAddr),
    /// A route.
    Route(IpNetwork),
}

#[derive(Debug)]
struct Fault {
    object: String,
    problem: String,
    remedy: String,
    since: u64,
    attempts: u64,
}

/// Every fault of the moment, and how many there ever were.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    open: BTreeMap<About, Fault>,
    failed: u64,
}

impl Faults {
    /// Notes a failure. Whether it is the first of its kind, and so worth a line in the log.
    pub(crate) fn note(
        &mut self,
        about: About,
        object: String,
        problem: String,
        remedy: &str,
    ) -> bool {
        self.failed += 1;
        let new = self
            .open
            .get(&about)
            .is_none_or(|fault| fault.problem != problem);
        let fault = self.open.entry(about).or_insert_with(|| Fault {
            object: String::new(),
            problem: String::new(),
            remedy: String::new(),
            since: now(),
            attempts: 0,
        });
        fault.attempts += 1;
        fault.object = object;
        fault.problem = problem;
        remedy.clone_into(&mut fault.remedy);
        new
    }

    /// Whether it is not over.
    pub(crate) fn has(&self, about: About) -> bool {
        self.open.contains_key(&about)
    }

    /// What is wrong there and what to do, if anything is.
    pub(crate) fn words(&self, about: About) -> Option<String> {
        let fault = self.open.get(&about)?;
        Some(format!("{}; {}", fault.problem, fault.remedy))
    }

    /// Notes that it works.
    pub(crate) fn clear(&mut self, about: About) {
        self.open.remove(&about);
    }

    /// Forgets the faults that `over` says are no more.
    pub(crate) fn clear_if(&mut self, over: impl Fn(About) -> bool) {
        self.open.retain(|about, _| !over(*about));
    }

    /// How many operations failed, each try counted.
    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    /// For `status`, what concerns everything first.
    pub(crate) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.open.values().map(|fault| Problem {
            object: fault.object.clone(),
            problem: fault.problem.clone(),
            remedy: fault.remedy.clone(),
            since: fault.since,
            attempts: fault.attempts,
        })
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Parts an error of the datapath from its remedy, which it ends with behind a
/// semicolon if it has one.
pub(crate) fn with_remedy(error: &str) -> (&str, String) {
    let again = "it is tried again by itself";
    match error.rsplit_once("; ") {
        Some((error, remedy)) => (error, format!("{remedy}; {again}")),
        None => (error, format!("{again}; the agent's log has the details")),
    }
}

/// What to do about an error of the kernel.
pub(crate) fn remedy(errno: Option<Errno>, scheduler: Option<&str>) -> String {
    let again = "it is tried again by itself";
    match (errno, scheduler) {
        (Some(Errno::PERM | Errno::ACCESS), _) => {
            "run the agent as root with CAP_NET_ADMIN and CAP_NET_RAW".to_owned()
        }
        (Some(Errno::NOENT), Some(scheduler)) => {
            format!("load the scheduler's module: modprobe ip_vs_{scheduler}; then {again}")
        }
        (Some(Errno::NOMEM | Errno::NOBUFS), _) => {
            format!("the kernel is short of memory; free some, {again}")
        }
        (Some(Errno::BUSY | Errno::AGAIN | Errno::INTR), _) => {
            format!("the kernel was busy; {again}")
        }
        (Some(Errno::EXIST), _) => format!(
            "another program made it; remove that one (ipvsadm -Ln, ip route, nft list ruleset), {again}"
        ),
        (Some(Errno::OPNOTSUPP | Errno::PROTONOSUPPORT | Errno::AFNOSUPPORT), _) => {
            "this kernel lacks it; load the module or use a kernel that has it".to_owned()
        }
        _ => format!("{again}; the agent's log has the details"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_and_its_remedy_are_told_apart() {
        let error = "this kernel has no IPVS (no such family); load it with `modprobe ip_vs`";
        let (words, remedy) = with_remedy(error);
        assert_eq!(words, "this kernel has no IPVS (no such family)");
        assert!(
            remedy.starts_with("load it with `modprobe ip_vs`; "),
            "{remedy}"
        );
        let (words, remedy) = with_remedy("cannot list routes: overrun");
        assert_eq!(words, "cannot list routes: overrun");
        assert!(remedy.contains("again"), "{remedy}");
    }

    #[test]
    fn a_fault_is_said_once_and_counted_each_time() {
        let mut faults = Faults::default();
        let mut note =
            |words: &str| faults.note(About::Kernel, "kernel".to_owned(), words.to_owned(), "wait");
        assert!(note("no IPVS"));
        assert!(!note("no IPVS"));
        assert!(note("no permission"), "another problem");
        let [problem] = faults.problems().collect::<Vec<_>>().try_into().unwrap();
        assert_eq!((problem.attempts, &*problem.problem), (3, "no permission"));
        faults.clear(About::Kernel);
        assert_eq!(faults.problems().count(), 0);
        assert_eq!(faults.failed(), 3);
    }
}
