//! Firewall marks by which IPVS tells two kinds of clients of one frontend apart.
//!
//! Where the policy for clients from outside is Local, clients within the cluster
//! use the endpoints of all nodes. One virtual service cannot hold both sets: the
//! second is selected by a mark, which the filter puts on the packets of these
//! clients. All frontends of a service port share a mark, for they share the
//! backends; the families have virtual services of their own anyway.
//!
//! A mark follows from the set of service ports that need one, in whatever order
//! they came: each asks for the marks that a hash of its name gives, one after the
//! other, and takes the first that no port with a lesser name has.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use crate::address::Protocol;
use crate::names::ObjectName;
use crate::ownership::{MARK_BASE, MARK_BITS};
use crate::service::Mark;

/// What has a mark: a service port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MarkHolder {
    /// The Service.
    pub service: ObjectName,
    /// Name of the port.
    pub port: String,
    /// Its protocol.
    pub protocol: Protocol,
}

impl MarkHolder {
    /// The `index`-th mark that it asks for, out of two to the power of `bits`.
    fn choice(&self, index: u32, bits: u32) -> Mark {
        let mut hash = Sha256::new();
        for text in [&self.service.namespace, &self.service.name, &self.port] {
            hash.update(text);
            hash.update([0]);
        }
        hash.update([self.protocol.number()]);
        hash.update(index.to_be_bytes());
        let digest: [u8; 32] = hash.finalize().into();
        let [a, b, c, d, ..] = digest;
        MARK_BASE | (u32::from_be_bytes([a, b, c, d]) & ((1 << bits) - 1))
    }
}

/// Who has which mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Marks {
    /// Each holder's mark, and which of its choices that is.
    of: BTreeMap<MarkHolder, (Mark, u32)>,
    holders: BTreeMap<Mark, MarkHolder>,
    /// How many holders have another than their first choice.
    displaced: usize,
    /// [`MARK_BITS`], or so few that marks meet in tests.
    bits: u32,
}

impl Default for Marks {
    fn default() -> Self {
        Self::of_bits(MARK_BITS)
    }
}

impl Marks {
    fn of_bits(bits: u32) -> Self {
        Self {
            of: BTreeMap::new(),
            holders: BTreeMap::new(),
            displaced: 0,
            bits,
        }
    }

    /// The mark of a service port that needs one.
    pub(crate) fn of(&self, holder: &MarkHolder) -> Option<Mark> {
        self.of.get(holder).map(|(mark, _)| *mark)
    }

    /// Who has a mark.
    pub(crate) fn holder(&self, mark: Mark) -> Option<&MarkHolder> {
        self.holders.get(&mark)
    }

    /// Every mark, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Mark, &MarkHolder)> {
        self.holders.iter().map(|(mark, holder)| (*mark, holder))
    }

    /// Gives a mark. Returns whose mark is another now, beside the holder's, and what it was.
    pub(crate) fn insert(&mut self, holder: MarkHolder) -> BTreeMap<MarkHolder, Mark> {
        let mut moved = BTreeMap::new();
        if self.of.contains_key(&holder) {
            return moved;
        }
        let (mut seeker, mut index) = (holder, 0);
        loop {
            let mark = seeker.choice(index, self.bits);
            let taken = self.holders.get(&mark);
            if taken.is_some_and(|other| *other < seeker) {
                index += 1;
                continue;
            }
            self.displaced += usize::from(index > 0);
            self.of.insert(seeker.clone(), (mark, index));
            let Some(other) = self.holders.insert(mark, seeker) else {
                return moved;
            };
            let (_, its_index) = self.of.remove(&other).unwrap_or_default();
            self.displaced -= usize::from(its_index > 0);
            // One that is displaced twice was first where it was before.
            moved.entry(other.clone()).or_insert(mark);
            (seeker, index) = (other, its_index + 1);
        }
    }

    /// Takes a mark back. Returns whose mark is another now, and what it was. Marks
    /// nearly never meet: where some do, all are given anew.
    pub(crate) fn remove(&mut self, holder: &MarkHolder) -> BTreeMap<MarkHolder, Mark> {
        let mut moved = BTreeMap::new();
        let Some((mark, _)) = self.of.remove(holder) else {
            return moved;
        };
        self.holders.remove(&mark);
        if self.displaced == 0 {
            return moved;
        }
        let before = std::mem::replace(self, Self::of_bits(self.bits));
        for holder in before.of.keys() {
            self.insert(holder.clone());
        }
        moved.extend(
            before
                .of
                .iter()
                .filter(|(holder, (mark, _))| self.of(holder) != Some(*mark))
                .map(|(holder, (mark, _))| (holder.clone(), *mark)),
        );
        moved
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cluster::{ClusterState, Event};
    use crate::desired::Desired;
    use crate::diff::{diff, diff_all};
    use crate::kube::{
        Endpoint, EndpointPort, EndpointSlice, Kind, Object, ObjectKey, SERVICE_NAME_LABEL,
        Service, ServicePort, ServiceType,
    };
    use crate::observed::Observed;

    fn holder(n: u32) -> MarkHolder {
        MarkHolder {
            service: ObjectName::new("default", format!("s{n}")),
            port: String::new(),
            protocol: Protocol::Tcp,
        }
    }

    #[test]
    fn marks_are_ours_and_each_is_held_once() {
        let mut marks = Marks::default();
        for n in 0..20_000 {
            marks.insert(holder(n));
        }
        assert!(marks.displaced > 0, "so many that some meet");
        assert_eq!(marks.of.len(), 20_000);
        assert_eq!(marks.holders.len(), 20_000);
        for (mark, holder) in marks.iter() {
            assert_eq!(mark >> MARK_BITS, MARK_BASE >> MARK_BITS);
            assert_eq!(marks.of(holder), Some(mark));
        }
    }

    #[test]
    fn the_order_does_not_matter_and_who_moved_is_told() {
        let (mut up, mut down) = (Marks::default(), Marks::default());
        for n in 0..12_000 {
            up.insert(holder(n));
        }
        assert!(up.displaced > 0);
        let mut believed = BTreeMap::new();
        for n in (0..12_010).rev() {
            let moved = down.insert(holder(n));
            for holder in moved.into_keys().chain([holder(n)]) {
                let mark = down.of(&holder);
                believed.insert(holder, mark);
            }
        }
        let first = holder(12_009);
        let unmoved = down.of(&first);
        for n in 12_000..12_010 {
            for (holder, _) in down.remove(&holder(n)) {
                let mark = down.of(&holder);
                believed.insert(holder, mark);
            }
            believed.remove(&holder(n));
        }
        assert!(unmoved.is_some());
        assert_eq!(up, down);
        for (holder, mark) in believed {
            assert_eq!(down.of(&holder), mark);
        }
    }
    /// With so few marks that every second holder is displaced, some of them twice.
    #[test]
    fn few_marks_are_given_as_the_set_of_holders_says() {
        const BITS: u32 = 6;
        let given_anew = |there: &BTreeSet<u32>| {
            let mut marks = Marks::of_bits(BITS);
            let mut sorted: Vec<MarkHolder> = there.iter().map(|n| holder(*n)).collect();
            sorted.sort();
            for holder in sorted {
                assert_eq!(
                    marks.insert(holder),
                    BTreeMap::new(),
                    "lesser names came first"
                );
            }
            marks
        };
        let (mut there, mut marks) = (BTreeSet::new(), Marks::of_bits(BITS));
        let mut displaced = 0;
        for step in 0..400_u32 {
            let n = (step.wrapping_mul(0x9e37_79b9) >> 8) % 48;
            let before = marks.clone();
            let moved = if there.remove(&n) {
                marks.remove(&holder(n))
            } else {
                there.insert(n);
                marks.insert(holder(n))
            };
            assert_eq!(marks, given_anew(&there));
            let others = before.of.iter().filter(|(other, _)| **other != holder(n));
            let expected: BTreeMap<MarkHolder, Mark> = others
                .filter(|(other, (mark, _))| marks.of(other) != Some(*mark))
                .map(|(other, (mark, _))| (other.clone(), *mark))
                .collect();
            assert_eq!(moved, expected);
            let elsewhere = marks.of.values().filter(|(_, index)| *index > 0).count();
            assert_eq!(marks.displaced, elsewhere);
            displaced = displaced.max(elsewhere);
        }
        assert!(displaced > 10, "{displaced}");
        assert_eq!(marks.remove(&holder(1 << 20)), BTreeMap::new(), "not there");
        let (known, before) = (holder(*there.first().unwrap()), marks.clone());
        assert_eq!(marks.insert(known), BTreeMap::new(), "there already");
        assert_eq!(marks, before);
    }

    /// Two that ask for the same mark first, the one with the lesser name before the other.
    fn rivals() -> (MarkHolder, MarkHolder) {
        let mut first = BTreeMap::new();
        for n in 0.. {
            let holder = holder(n);
            if let Some(other) = first.insert(holder.choice(0, MARK_BITS), holder.clone()) {
                let (lesser, greater) = (other.clone().min(holder.clone()), other.max(holder));
                return (lesser, greater);
            }
        }
        unreachable!("there are fewer marks than numbers")
    }

    /// What the mark of the one is about is news when the other comes or goes.
    #[test]
    fn whose_mark_moves_is_in_the_scope() {
        let (lesser, greater) = rivals();
        let mut cluster = ClusterState::default();
        let mut desired = Desired::new("n0");
        let mut kernel = Observed::default();
        let mut take = |event, about: &ObjectName| {
            cluster.apply(event);
            let scope = desired.update(&cluster, about);
            for change in diff(&desired, &kernel, &scope) {
                kernel.record(&change);
            }
            assert_eq!(diff_all(&desired, &kernel), vec![], "{scope:?}");
            let keys = kernel.marks.values().copied().collect::<Vec<_>>();
            let at = kernel.services.keys().filter(|key| key.address().is_none());
            (keys, at.count())
        };
        let external = |n: u8| format!("203.0.113.{n}");
        let mut both = Vec::new();
        for (n, holder) in (1..).zip([&greater, &lesser]) {
            let name = &holder.service;
            take(applied(Object::EndpointSlice(elsewhere(name))), name);
            let told = applied(Object::Service(local(name, &external(n))));
            both = take(told, name).0;
        }
        // The later one has the mark that the earlier one had.
        assert_eq!(
            both,
            [greater.choice(1, MARK_BITS), lesser.choice(0, MARK_BITS)]
        );
        let (left, services) = take(
            Event::Deleted(ObjectKey {
                kind: Kind::Service,
                name: lesser.service.clone(),
            }),
            &lesser.service,
        );
        assert_eq!((left, services), (vec![greater.choice(0, MARK_BITS)], 1));
    }

    fn applied(object: Object) -> Event {
        Event::Applied(Box::new(object))
    }

    /// A Service whose clients within the cluster fare otherwise than those outside.
    fn local(name: &ObjectName, external: &str) -> Service {
        let mut service = Service::default();
        service.metadata.name.clone_from(&name.name);
        service.spec.service_type = ServiceType::LoadBalancer;
        service.spec.cluster_ips = vec!["10.96.0.1".to_owned()];
        service.spec.external_ips = vec![external.to_owned()];
        "Local".clone_into(&mut service.spec.external_traffic_policy);
        service.spec.ports = vec![ServicePort {
            port: 80,
            ..ServicePort::default()
        }];
        service
    }

    fn elsewhere(service: &ObjectName) -> EndpointSlice {
        let mut slice = EndpointSlice::default();
        slice.metadata.name.clone_from(&service.name);
        let label = (SERVICE_NAME_LABEL.to_owned(), service.name.clone());
        slice.metadata.labels = BTreeMap::from([label]);
        slice.ports = vec![EndpointPort {
            port: Some(8080),
            ..EndpointPort::default()
        }];
        slice.endpoints = vec![Endpoint {
            addresses: vec!["10.1.1.1".to_owned()],
            ..Endpoint::default()
        }];
        slice
    }
}
