//! How likely the next connection goes to which backend.

use crate::service::{Scheduler, Scheduling, Weight};

/// The share of each weight in percent, with one digit behind the point; of new clients,
/// where a client stays with its backend. Where a hash leads to a backend of weight 0, its share
/// is of those who are refused.
pub(super) fn odds(scheduling: &Scheduling, weights: &[Weight]) -> Vec<f64> {
    let greatest = weights.iter().max().copied().unwrap_or_default();
    let refuses = greatest > 0 && refuses_at_weight_0(scheduling);
    let share = |weight: Weight| match &scheduling.scheduler {
        Scheduler::RoundRobin | Scheduler::LeastConnection => u32::from(weight > 0),
        Scheduler::DestinationHash => u32::from(weight > 0 || refuses),
        Scheduler::WeightedFailover | Scheduler::WeightedOverflow => {
            u32::from(weight > 0 && weight == greatest)
        }
        // Of its 256 buckets one of weight 0 has as many as one of weight 1
        // (`ip_vs_sh_reassign`).
        Scheduler::SourceHash if refuses => weight.max(1),
        Scheduler::WeightedRoundRobin
        | Scheduler::WeightedLeastConnection
        | Scheduler::LocalityLeastConnection
        | Scheduler::LocalityLeastConnectionReplicated
        | Scheduler::SourceHash
        | Scheduler::ShortestExpectedDelay
        | Scheduler::NeverQueue
        | Scheduler::MaglevHash
        | Scheduler::Other(_) => weight,
    };
    let shares: Vec<f64> = weights
        .iter()
        .map(|weight| f64::from(share(*weight)))
        .collect();
    let all: f64 = shares.iter().sum();
    let percent = |share: f64| {
        if all > 0.0 {
            (share * 1000.0 / all).round() / 10.0
        } else {
            0.0
        }
    };
    shares.into_iter().map(percent).collect()
}

/// Whether new connections are refused that a hash leads to a backend of weight 0: `sh` does so,
/// but for its flag 1, and `dh`; `mh` gives one of weight 0 no bucket (`ip_vs_mh_populate`).
pub(super) fn refuses_at_weight_0(scheduling: &Scheduling) -> bool {
    match scheduling.scheduler {
        Scheduler::SourceHash => scheduling.scheduler_flags & 1 == 0,
        Scheduler::DestinationHash => true,
        _ => false,
    }
}

/// How a scheduler chooses.
pub(super) fn manner(scheduler: &Scheduler) -> &'static str {
    match scheduler {
        Scheduler::RoundRobin => "the next in turn",
        Scheduler::WeightedRoundRobin => "the next in turn, in proportion to weight",
        Scheduler::LeastConnection => "the one with the fewest connections",
        Scheduler::WeightedLeastConnection => "the one with the fewest connections by weight",
        Scheduler::LocalityLeastConnection | Scheduler::LocalityLeastConnectionReplicated => {
            "the one that this destination had last, unless it is overloaded"
        }
        Scheduler::SourceHash | Scheduler::MaglevHash => "by a hash of the client's address",
        Scheduler::DestinationHash => "by a hash of the destination address, the same for all",
        Scheduler::ShortestExpectedDelay => "the one with the shortest expected delay",
        Scheduler::NeverQueue => "an idle one, else the one with the shortest expected delay",
        Scheduler::WeightedFailover => "the one of the greatest weight",
        Scheduler::WeightedOverflow => {
            "the one of the greatest weight that has fewer connections than weight"
        }
        Scheduler::Other(_) => "as that scheduler does",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_the_scheduler() {
        let cases: [(Scheduler, u8, &[Weight], &[f64]); 13] = [
            (Scheduler::RoundRobin, 0, &[1, 3], &[50.0, 50.0]),
            (Scheduler::RoundRobin, 0, &[1, 1, 1], &[33.3, 33.3, 33.3]),
            (Scheduler::RoundRobin, 0, &[1, 0], &[100.0, 0.0]),
            (Scheduler::WeightedRoundRobin, 0, &[1, 3], &[25.0, 75.0]),
            (Scheduler::MaglevHash, 0, &[65_535, 0], &[100.0, 0.0]),
            (
                Scheduler::WeightedFailover,
                0,
                &[1, 3, 2],
                &[0.0, 100.0, 0.0],
            ),
            (Scheduler::WeightedRoundRobin, 0, &[0, 0], &[0.0, 0.0]),
            (Scheduler::RoundRobin, 0, &[], &[]),
            (Scheduler::SourceHash, 0, &[0, 1, 1], &[33.3, 33.3, 33.3]),
            (Scheduler::SourceHash, 0, &[0, 3], &[25.0, 75.0]),
            (Scheduler::SourceHash, 1, &[0, 1, 1], &[0.0, 50.0, 50.0]),
            (Scheduler::SourceHash, 0, &[0, 0], &[0.0, 0.0]),
            (Scheduler::DestinationHash, 0, &[0, 3], &[50.0, 50.0]),
        ];
        for (scheduler, scheduler_flags, weights, shares) in cases {
            let scheduling = Scheduling {
                scheduler,
                scheduler_flags,
                persistence: None,
            };
            assert_eq!(
                odds(&scheduling, weights),
                shares,
                "{scheduling:?} {weights:?}"
            );
        }
    }

    #[test]
    fn every_scheduler_has_words() {
        for scheduler in Scheduler::ALL {
            assert_ne!(manner(&scheduler), "as that scheduler does", "{scheduler}");
        }
    }
}
