//! No address is leased twice, whatever instruction the agent dies at.

use std::collections::{BTreeMap, BTreeSet};

use ferrule_model::address::Protocol;
use ferrule_model::names::{ContainerId, IfName};
use proptest::prelude::*;

use super::*;

fn attachment(number: u8) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(format!("c{number}")).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

fn allocate(leases: &Leases, who: &Attachment) -> Result<Vec<IpAddr>, LeaseError> {
    let given = leases.allocate(&Wanted::new(who.clone()), Moment::default());
    given.map(|given| given.addresses)
}

fn ranges() -> Vec<PodRange> {
    ["10.1.0.0/28", "fd00:1::/124"]
        .iter()
        .map(|text| PodRange::parse(text).unwrap())
        .collect()
}

/// What can happen to the agent, in any order.
#[derive(Clone, Copy, Debug)]
enum Step {
    Add(u8),
    Del(u8),
    /// The process is gone and starts again from what is on disk.
    Crash,
    /// As before, and the disk has what it had at an earlier durable point:
    /// the answer to the last call was never sent.
    CrashBeforeAnswer(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0_u8..24).prop_map(Step::Add),
        4 => (0_u8..24).prop_map(Step::Del),
        1 => Just(Step::Crash),
        1 => (0_u8..24).prop_map(Step::CrashBeforeAnswer),
    ]
}

/// What the runtime and the pods believe: who uses which addresses.
#[derive(Default)]
struct World {
    held: BTreeMap<Attachment, Vec<IpAddr>>,
    /// A call whose answer never came: the runtime will DEL before it uses the name again.
    doubtful: BTreeSet<Attachment>,
}

fn in_use(world: &World) -> BTreeSet<IpAddr> {
    world.held.values().flatten().copied().collect()
}

fn reopen(leases: &mut Option<Leases>, path: &Path) {
    drop(leases.take());
    let again = Leases::open(path).unwrap();
    again.set_ranges(ranges());
    *leases = Some(again);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn no_address_is_leased_twice(steps in prop::collection::vec(step(), 1..120)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases.redb");
        let mut leases = None;
        reopen(&mut leases, &path);
        let mut world = World::default();
        for step in steps {
            let open = leases.as_ref().unwrap();
            match step {
                Step::Add(n) => {
                    let who = attachment(n);
                    let Ok(addresses) = allocate(open, &who) else {
                        // Full is full: every address is held or in doubt.
                        prop_assert!(world.held.len() + world.doubtful.len() >= 13);
                        continue;
                    };
                    if let Some(held) = world.held.get(&who) {
                        prop_assert_eq!(held, &addresses);
                        continue;
                    }
                    prop_assert_eq!(addresses.len(), 2);
                    for ip in &addresses {
                        prop_assert!(!in_use(&world).contains(ip), "{} is in use", ip);
                    }
                    world.doubtful.remove(&who);
                    world.held.insert(who, addresses);
                }
                Step::Del(n) => {
                    let who = attachment(n);
                    open.release_while(&who, || true).unwrap();
                    world.held.remove(&who);
                    world.doubtful.remove(&who);
                }
                Step::Crash => reopen(&mut leases, &path),
                Step::CrashBeforeAnswer(n) => {
                    let who = attachment(n);
                    if !world.held.contains_key(&who) && allocate(open, &who).is_ok() {
                        world.doubtful.insert(who);
                    }
                    reopen(&mut leases, &path);
                }
            }
        }
        for (who, addresses) in &world.held {
            prop_assert_eq!(&allocate(leases.as_ref().unwrap(), who).unwrap(), addresses);
        }
    }
}

#[test]
fn a_lock_that_outlives_its_agent_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let held = Leases::open(&path).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(lock::RETRY * 4);
        drop(held);
    });
    assert_eq!(Leases::open(&path).unwrap().count(), 0);
    holder.join().unwrap();
}

#[test]
fn an_address_rests_before_it_is_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let leases = Leases::open(&dir.path().join("leases.redb")).unwrap();
    leases.set_ranges(ranges());
    let first = allocate(&leases, &attachment(1)).unwrap();
    leases.release_while(&attachment(1), || true).unwrap();
    // 13 addresses in the range: the one that was released comes back last.
    for n in 2..14 {
        assert_ne!(allocate(&leases, &attachment(n)).unwrap()[0], first[0]);
    }
    assert_eq!(allocate(&leases, &attachment(14)).unwrap(), first);
    assert!(matches!(
        allocate(&leases, &attachment(15)),
        Err(LeaseError::Choose(ChooseError::Exhausted {
            capacity: 13,
            ..
        }))
    ));
}

#[test]
fn addresses_that_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let leases = Leases::open(&dir.path().join("leases.redb")).unwrap();
    leases.set_ranges(ranges());
    let ask = |number, ips: &[&str]| {
        let wanted = Wanted {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ..Wanted::new(attachment(number))
        };
        let given = leases.allocate(&wanted, Moment::default());
        given.map(|given| given.addresses)
    };
    let both = ask(1, &["fd00:1::9", "10.1.0.9"]).unwrap();
    assert_eq!(
        both,
        [
            "10.1.0.9".parse::<IpAddr>().unwrap(),
            "fd00:1::9".parse().unwrap()
        ]
    );
    assert_eq!(ask(1, &["10.1.0.9"]).unwrap(), both, "again");
    assert!(matches!(
        ask(1, &["10.1.0.8"]),
        Err(LeaseError::HasOthers { .. })
    ));
    let one = ask(2, &["10.1.0.8"]).unwrap();
    assert_eq!(one[0], "10.1.0.8".parse::<IpAddr>().unwrap());
    assert_eq!(one.len(), 2, "the other family is chosen");
    let error = ask(3, &["10.1.0.9"]).unwrap_err().to_string();
    assert!(error.contains("10.1.0.9 is leased to c1/eth0"), "{error}");
    for outside in ["10.2.0.9", "10.1.0.1", "10.1.0.15", "fd00:2::1"] {
        let error = ask(3, &[outside]).unwrap_err().to_string();
        assert!(error.contains("10.1.0.0/28, fd00:1::/124"), "{error}");
    }
    assert_eq!(leases.count(), 2, "what was refused leased nothing");
}

#[test]
fn a_lease_ends_only_while_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let leases = Leases::open(&path).unwrap();
    leases.set_ranges(ranges());
    let at = |seconds| Moment {
        boot: "b".to_owned(),
        seconds,
    };
    let old = |record: &Record| record.since == Some(at(1));
    let first = leases.allocate(&Wanted::new(attachment(1)), at(1)).unwrap();
    assert!(!first.renewed);
    // An ADD asks anew just before it would have ended.
    let again = leases.allocate(&Wanted::new(attachment(1)), at(2)).unwrap();
    assert!(again.renewed);
    let held = again.addresses;
    assert!(!leases.release_if(&attachment(1), old).unwrap());
    assert!(!leases.release_if(&attachment(2), |_| true).unwrap());
    leases.allocate(&Wanted::new(attachment(1)), at(1)).unwrap();
    assert!(leases.release_if(&attachment(1), old).unwrap());
    assert_eq!(leases.count(), 0);
    // What was used without a lease is leased, unless another has it.
    let record = Record::of(&Wanted::new(attachment(3)), held, at(3));
    assert!(leases.adopt(&attachment(3), &record).unwrap());
    assert!(!leases.adopt(&attachment(3), &record).unwrap());
    assert!(!leases.adopt(&attachment(4), &record).unwrap(), "another's");
    assert!(leases.is_unchanged(&attachment(3), Some(&record)).unwrap());
    assert!(!leases.is_unchanged(&attachment(4), Some(&record)).unwrap());
    drop(leases);
    let again = Leases::open(&path).unwrap();
    assert_eq!(again.page(None, 9).unwrap()[0].2, record);
    assert_eq!(again.count(), 1);
}

#[test]
fn host_ports_live_and_end_with_their_lease() {
    let ask = |leases: &Leases, who: &Attachment, ports: &[HostPort]| {
        let wanted = Wanted {
            ports: ports.to_vec(),
            ..Wanted::new(who.clone())
        };
        let given = leases.allocate(&wanted, Moment::default());
        given.map(|given| given.addresses)
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let port = HostPort {
        host_ip: None,
        host_port: 8080,
        container_port: 80,
        protocol: Protocol::Tcp,
    };
    let (a, b) = (attachment(1), attachment(2));
    let mut leases = None;
    reopen(&mut leases, &path);
    let open = leases.as_ref().unwrap();
    let addresses = ask(open, &a, &[port]).unwrap();
    assert_eq!(ask(open, &a, &[port]).unwrap(), addresses, "again");
    let taken = ask(open, &b, &[port]).unwrap_err();
    assert!(matches!(taken, LeaseError::PortTaken(_)), "{taken}");
    assert_eq!(open.count(), 1, "a lease without its ports");
    let (c, last) = (
        attachment(3),
        HostPort {
            host_port: 9090,
            ..port
        },
    );
    let first = HostPort {
        host_port: 9080,
        ..port
    };
    let addresses_of_c = ask(open, &c, &[first, last]).unwrap();
    assert_eq!(
        ask(open, &c, &[last, first]).unwrap(),
        addresses_of_c,
        "in another order"
    );
    let other = ask(open, &c, &[first, port]).unwrap_err();
    assert!(matches!(other, LeaseError::OtherPorts(_)), "{other}");
    open.release_while(&c, || true).unwrap();
    let other = ask(open, &a, &[]).unwrap_err();
    assert!(matches!(other, LeaseError::OtherPorts(_)), "{other}");
    assert_eq!(open.changed_host_ports(), [], "nobody has accepted them");

    // Who starts anew goes on with what was leased, accepted or not: the pod
    // may be running, and if its ADD failed, its DEL ends the lease.
    reopen(&mut leases, &path);
    let open = leases.as_ref().unwrap();
    let ports = open.host_ports(&a).unwrap();
    assert_eq!((&ports.addresses, &*ports.ports), (&addresses, &[port][..]));
    assert_eq!(open.changed_host_ports(), [(a.clone(), Some(ports))]);
    let taken = ask(open, &b, &[port]).unwrap_err();
    assert!(matches!(taken, LeaseError::PortTaken(_)), "{taken}");
    open.release_while(&a, || true).unwrap();
    assert_eq!(open.changed_host_ports(), [(a, None)]);
    ask(open, &b, &[port]).unwrap();
}

/// A node that says no pod can come gets none, so nothing but this tries the disk again.
#[test]
fn a_disk_that_serves_again_is_found_out_without_a_pod() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let leases = Leases::open(&path).unwrap();
    leases.set_ranges(ranges());
    let held = allocate(&leases, &attachment(1)).unwrap();
    leases.try_disk().unwrap();
    let full = redb::Error::Io(rustix::io::Errno::NOSPC.into());
    let error = leases.failed(&mut leases.lock(), full);
    assert!(
        matches!(&error, LeaseError::File(error) if error.may_pass()),
        "{error}"
    );
    // What was read anew says nothing of a write.
    assert_eq!(
        leases.find(&attachment(1)).unwrap().unwrap().addresses,
        held
    );
    assert!(leases.trouble().is_some());
    leases.try_disk().unwrap();
    assert!(leases.trouble().is_none());
    assert_eq!(leases.page(None, 9).unwrap().len(), 1);
    assert_eq!(leases.count(), 1);

    let aside = dir.path().join("aside");
    let fault = redb::Error::Io(rustix::io::Errno::NOSPC.into());
    leases.failed(&mut leases.lock(), fault);
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(leases.try_disk().is_err());
    assert_eq!(leases.trouble().unwrap().attempts, 2);
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    leases.try_disk().unwrap();
    assert!(leases.trouble().is_none());
    assert_eq!(allocate(&leases, &attachment(1)).unwrap(), held);
}
