//! Kernel settings that an operator asks for, or that hang on the size of the cluster and on
//! what else is on the node. What services need always is elsewhere (`sysctl`).
//!
//! What was there before is recorded, as of all settings ([`Sysctls`]).

use std::fs;
use std::io;
use std::thread;
use std::time::Duration;

use crate::sysctl::Sysctls;

/// What is asked for; the default asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuning {
    /// Whether no device answers in ARP for addresses of others, nor announces them.
    pub strict_arp: bool,
    /// Connection tracking.
    pub conntrack: Conntrack,
    /// Whether IPVS estimates rates and adds its counters up; `None` leaves that as it is.
    pub estimation: Option<bool>,
    /// Whether packets between the ports of one bridge pass through netfilter, and so through
    /// IPVS: replies of a pod to another one on its bridge would not come by otherwise.
    pub bridged: bool,
}

/// What connection tracking should be like. Zero leaves a setting as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections for each core; zero leaves the limit as it is, whatever [`Conntrack::min`] says.
    pub max_per_core: u32,
    /// Connections at least.
    pub min: u32,
    /// How long an idle TCP connection is remembered.
    pub tcp_established: Duration,
    /// Likewise one of which an end has not been closed.
    pub tcp_close_wait: Duration,
    /// Likewise a UDP packet without an answer.
    pub udp: Duration,
    /// Likewise UDP with answers.
    pub udp_stream: Duration,
}

/// Whether IPVS estimates. Kernels before 5.16 always do.
const ESTIMATION: &str = "net/ipv4/vs/run_estimation";

/// Only there where IPVS estimates by threads, which hold up no packet: since 6.2.
const ESTIMATION_BY_THREADS: &str = "net/ipv4/vs/est_nice";

/// Whether packets between the ports of a bridge pass through netfilter; of module `br_netfilter`.
const BRIDGED: [&str; 2] = [
    "net/bridge/bridge-nf-call-iptables",
    "net/bridge/bridge-nf-call-ip6tables",
];

/// The most virtual services whose rates are estimated by a timer, which lets packets wait: it
/// takes more than 200 ms for 50,000 of them on 104 cores (Linux 2232642ec3fb).
const ESTIMATED: usize = 2_000;

/// Whether rates of so many virtual services should be estimated, where nobody says; `None`
/// leaves it as it is.
#[must_use]
pub fn estimation(sysctls: &Sysctls, services: usize) -> Option<bool> {
    let can_be_off = sysctls.root.join(ESTIMATION).exists();
    let threads = sysctls.root.join(ESTIMATION_BY_THREADS).exists();
    (services > ESTIMATED && can_be_off && !threads).then_some(false)
}

/// Whether packets between the ports of a bridge can be made to pass through netfilter.
#[must_use]
pub fn can_be_bridged(sysctls: &Sysctls) -> bool {
    BRIDGED.iter().all(|key| sysctls.root.join(key).exists())
}

/// Most that the number of cores can lead to; kube-proxy has it since 1.36.
const MOST_BY_CORES: u32 = 1_048_576;

impl Conntrack {
    /// The limit on a machine with that many cores, as kube-proxy computes it; `None` leaves it.
    #[must_use]
    pub fn limit(&self, cores: u32) -> Option<u32> {
        let by_cores = self.max_per_core.saturating_mul(cores).min(MOST_BY_CORES);
        (self.max_per_core > 0).then(|| by_cores.max(self.min))
    }
}

/// A setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuned {
    /// Path below `/proc/sys`.
    pub key: &'static str,
    /// What was there before.
    pub before: String,
    /// What is there now.
    pub value: String,
}

/// A setting that could not be made.
#[derive(Debug)]
pub struct Untuned {
    /// Path below `/proc/sys`.
    pub key: &'static str,
    /// What is there, where it can be read.
    pub present: Option<String>,
    /// What was asked for.
    pub value: String,
    /// Why.
    pub source: io::Error,
}

/// A setting, its value, and whether a higher one may stay.
type Wanted = (&'static str, u64, bool);

impl Tuning {
    fn wanted(&self, cores: u32) -> Vec<Wanted> {
        let mut wanted: Vec<Wanted> = Vec::new();
        if self.strict_arp {
            wanted.push(("net/ipv4/conf/all/arp_ignore", 1, false));
            wanted.push(("net/ipv4/conf/all/arp_announce", 2, false));
        }
        if let Some(limit) = self.conntrack.limit(cores) {
            // To lower it would drop what others rely on; kube-proxy does not, either.
            wanted.push(("net/netfilter/nf_conntrack_max", limit.into(), true));
        }
        if let Some(estimation) = self.estimation {
            wanted.push((ESTIMATION, estimation.into(), false));
        }
        if self.bridged {
            wanted.extend(BRIDGED.map(|key| (key, 1, false)));
        }
        let conntrack = &self.conntrack;
        for (key, span) in [
            (
                "net/netfilter/nf_conntrack_tcp_timeout_established",
                conntrack.tcp_established,
            ),
            (
                "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
                conntrack.tcp_close_wait,
            ),
            ("net/netfilter/nf_conntrack_udp_timeout", conntrack.udp),
            (
                "net/netfilter/nf_conntrack_udp_timeout_stream",
                conntrack.udp_stream,
            ),
        ] {
            if span.as_secs() > 0 {
                wanted.push((key, span.as_secs(), false));
            }
        }
        wanted
    }
}

/// Makes the settings of the calling thread's network namespace; writes only what differs.
/// What fails holds up nothing else.
#[must_use]
pub fn tune(sysctls: &Sysctls, tuning: &Tuning) -> (Vec<Tuned>, Vec<Untuned>) {
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    for (key, value, higher_stays) in tuning.wanted(cores()) {
        let path = sysctls.root.join(key);
        let read = fs::read_to_string(&path).map(|text| text.trim().to_owned());
        let present = read.as_ref().ok().and_then(|text| text.parse().ok());
        let fine = match present {
            Some(present) if higher_stays => present >= value,
            present => present == Some(value),
        };
        if fine {
            continue;
        }
        let value = value.to_string();
        match sysctls.write(key, &value) {
            Ok(before) => made.extend(before.map(|before| Tuned { key, before, value })),
            Err(source) => failed.push(Untuned {
                key,
                present: present.map(|present: u64| present.to_string()),
                value,
                source,
            }),
        }
    }
    (made, failed)
}

/// Where the kernel lists the cores that work, such as `0-3,8`.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// Cores of the machine, whatever part of them this process may use.
fn cores() -> u32 {
    let listed = fs::read_to_string(ONLINE).ok();
    let listed = listed.and_then(|text| count(text.trim()));
    listed.unwrap_or_else(|| {
        let usable = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        u32::try_from(usable).unwrap_or(1)
    })
}

fn count(ranges: &str) -> Option<u32> {
    ranges.split(',').try_fold(0_u32, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_kube_proxys() {
        let limit = |max_per_core, min, cores| {
            let conntrack = Conntrack {
                max_per_core,
                min,
                ..Conntrack::default()
            };
            conntrack.limit(cores)
        };
        assert_eq!(limit(32_768, 131_072, 2), Some(131_072));
        assert_eq!(limit(32_768, 131_072, 8), Some(262_144));
        assert_eq!(limit(0, 131_072, 8), None, "left as it is");
        assert_eq!(limit(32_768, 131_072, 512), Some(1_048_576));
        assert_eq!(limit(32_768, 2_000_000, 512), Some(2_000_000));
        assert_eq!(limit(u32::MAX, 0, 512), Some(1_048_576));
    }

    #[test]
    fn cores_are_counted() {
        for (list, cores) in [("0", 1), ("0-3", 4), ("0-3,8,10-11", 7)] {
            assert_eq!(count(list), Some(cores), "{list}");
        }
        for list in ["", "3-1", "x", "0-4294967295"] {
            assert_eq!(count(list), None, "{list}");
        }
        assert!(cores() > 0);
    }

    #[test]
    fn what_differs_is_written_and_told() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (key, value) in [
            ("net/ipv4/conf/all/arp_ignore", "0\n"),
            ("net/ipv4/conf/all/arp_announce", "2\n"),
            ("net/netfilter/nf_conntrack_max", "99999999\n"),
            (
                "net/netfilter/nf_conntrack_tcp_timeout_established",
                "432000\n",
            ),
        ] {
            let path = root.join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        }
        let tuning = Tuning {
            strict_arp: true,
            conntrack: Conntrack {
                max_per_core: 1,
                min: 1000,
                tcp_established: Duration::from_hours(24),
                udp: Duration::from_secs(30),
                udp_stream: Duration::from_millis(999),
                ..Conntrack::default()
            },
            ..Tuning::default()
        };
        let sysctls = Sysctls {
            root: root.to_owned(),
            record: None,
        };
        let (made, failed) = tune(&sysctls, &tuning);
        let made: Vec<_> = made
            .iter()
            .map(|tuned| (tuned.key, tuned.before.as_str(), tuned.value.as_str()))
            .collect();
        assert_eq!(
            made,
            [
                ("net/ipv4/conf/all/arp_ignore", "0", "1"),
                (
                    "net/netfilter/nf_conntrack_tcp_timeout_established",
                    "432000",
                    "86400"
                ),
            ],
            "a higher limit stays"
        );
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(failed[0].key, "net/netfilter/nf_conntrack_udp_timeout");
        let (made, failed) = tune(&sysctls, &Tuning::default());
        assert!(made.is_empty() && failed.is_empty());
    }

    #[test]
    fn estimation_ends_where_it_would_hold_up_packets() {
        let root = tempfile::tempdir().unwrap();
        let sysctls = Sysctls {
            root: root.path().to_owned(),
            record: None,
        };
        let put = |key: &str, value: &str| {
            let path = root.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, value).unwrap();
        };
        assert_eq!(estimation(&sysctls, 50_000), None, "it cannot be off");
        put(ESTIMATION, "1\n");
        assert_eq!(estimation(&sysctls, ESTIMATED), None);
        assert_eq!(estimation(&sysctls, ESTIMATED + 1), Some(false));
        put(ESTIMATION_BY_THREADS, "0\n");
        assert_eq!(
            estimation(&sysctls, 50_000),
            None,
            "threads hold up nothing"
        );
        let off = Tuning {
            estimation: Some(false),
            ..Tuning::default()
        };
        assert_eq!(tune(&sysctls, &off).0.len(), 1);
        assert!(!can_be_bridged(&sysctls));
        let bridged = Tuning {
            bridged: true,
            ..Tuning::default()
        };
        assert_eq!(
            tune(&sysctls, &bridged).1.len(),
            2,
            "the module is not there"
        );
        for key in BRIDGED {
            put(key, "0\n");
        }
        assert!(can_be_bridged(&sysctls));
        assert_eq!(tune(&sysctls, &bridged).0.len(), 2);
    }
}
