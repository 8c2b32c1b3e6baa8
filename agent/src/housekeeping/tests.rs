//! What is put right, and above all what is not.

use ferrule_api::Wanted;
use ferrule_model::ipam::PodRange;
use ferrule_model::names::{ContainerId, IfName};
use ferrule_model::ownership::{device_alias, host_veth_mac, shaper_mac};

use super::*;

fn attachment(container: &str) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(container.to_owned()).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

fn at(seconds: u64) -> Moment {
    Moment {
        boot: "b".to_owned(),
        seconds,
    }
}

fn record(since: Option<Moment>, netns: Option<&str>) -> Record {
    Record {
        addresses: vec!["10.1.0.2".parse().unwrap()],
        pod: None,
        network: None,
        netns: netns.map(str::to_owned),
        since,
        ports: Vec::new(),
    }
}

fn end(container: &str, aliased: bool) -> Device {
    let attachment = attachment(container);
    Device {
        index: 7,
        name: host_veth_name(&attachment).to_string(),
        alias: aliased.then(|| device_alias(&attachment, None)),
        mac: Some(host_veth_mac(&attachment)),
        ..Device::default()
    }
}

fn seen(ends: Vec<Device>, has_route: bool) -> Seen {
    let mut seen = Seen {
        ends,
        ..Seen::default()
    };
    if has_route {
        let ips = BTreeSet::from(["10.1.0.2".parse().unwrap()]);
        seen.routes.insert(7, ips);
    }
    seen
}

/// What is done 1,000 s after the boot about one lease of "a".
fn about(record: &Record, seen: &Seen) -> Vec<Duty> {
    let leases = [(attachment("a"), record.clone())];
    duties(&leases, seen, &at(1000), &at(10), |path| path == "/lives")
}

#[test]
fn a_lease_without_a_pod_ends_when_its_pod_is_provably_gone() {
    let released = |record: &Record| vec![Duty::Release(attachment("a"), record.clone())];
    let nothing = seen(Vec::new(), false);
    for gone in [
        record(Some(at(100)), Some("/gone")),
        record(Some(at(100)), None),
        record(None, None),
        // Of another boot, however young.
        record(
            Some(Moment {
                boot: "a".to_owned(),
                seconds: 999,
            }),
            Some("/lives"),
        ),
    ] {
        assert_eq!(about(&gone, &nothing), released(&gone), "{gone:?}");
    }
    for stays in [
        // An ADD may be at work.
        record(Some(at(1000 - GRACE)), Some("/gone")),
        record(Some(at(2000)), Some("/gone")),
        record(Some(at(100)), Some("/lives")),
    ] {
        assert_eq!(about(&stays, &nothing), [], "{stays:?}");
    }
    // An older agent's lease counts from this one's start.
    let leases = [(attachment("a"), record(None, None))];
    let young = duties(&leases, &nothing, &at(100), &at(10), |_| false);
    assert_eq!(young, []);
}

#[test]
fn a_live_pod_is_left_alone() {
    let live = seen(vec![end("a", true)], true);
    for netns in [None, Some("/gone"), Some("/lives")] {
        assert_eq!(about(&record(Some(at(100)), netns), &live), []);
    }
}

#[test]
fn what_no_add_will_finish_is_removed() {
    let record = record(Some(at(100)), Some("/lives"));
    let half = seen(vec![end("a", false)], false);
    assert_eq!(
        about(&record, &half),
        [
            Duty::Remove(attachment("a"), 7, Some(record.clone())),
            Duty::Release(attachment("a"), record.clone())
        ]
    );
    let young = Record {
        since: Some(at(900)),
        ..record.clone()
    };
    assert_eq!(about(&young, &half), []);
    // A stranger of that name is neither removed nor taken for the pod's.
    let mut stranger = end("a", false);
    stranger.mac = Some([2, 0, 0, 0, 0, 9]);
    assert_eq!(about(&record, &seen(vec![stranger], false)), []);
}

#[test]
fn a_pod_whose_alias_was_changed_is_no_pod_that_is_gone() {
    let record = record(Some(at(100)), Some("/gone"));
    let mut renamed = end("a", true);
    renamed.alias = Some("x".to_owned());
    assert_eq!(about(&record, &seen(vec![renamed], true)), []);
    // Nor is one whose interface nobody can find, while a route leads to it.
    assert_eq!(about(&record, &seen(Vec::new(), true)), []);
}

#[test]
fn a_lost_route_comes_back() {
    let record = record(Some(at(100)), Some("/lives"));
    let ip = "10.1.0.2".parse().unwrap();
    assert_eq!(
        about(&record, &seen(vec![end("a", true)], false)),
        [Duty::Route(attachment("a"), 7, ip)]
    );
}

#[test]
fn a_pod_without_a_lease_gets_one() {
    let found = duties(
        &[],
        &seen(vec![end("a", true)], true),
        &at(50),
        &at(40),
        |_| true,
    );
    let record = record(Some(at(50)), None);
    assert_eq!(found, [Duty::Adopt(attachment("a"), record)]);
    // Whose veth it is has to be proven, and that it has addresses.
    for ends in [vec![end("a", false)], Vec::new()] {
        assert_eq!(
            duties(&[], &seen(ends, true), &at(50), &at(40), |_| true),
            []
        );
    }
    let bare = seen(vec![end("a", true)], false);
    assert_eq!(duties(&[], &bare, &at(50), &at(40), |_| true), []);
}

#[test]
fn a_shaper_goes_after_its_veth() {
    let attachment = attachment("a");
    let shaper = |aliased: bool| Device {
        index: 9,
        name: shaper_name(&attachment).to_string(),
        alias: aliased.then(|| device_alias(&attachment, None)),
        mac: Some(shaper_mac(&attachment)),
        ..Device::default()
    };
    let with = |shaper: Device, ends| Seen {
        shapers: vec![shaper],
        ..seen(ends, true)
    };
    let young = record(Some(at(999)), None);
    let removed = Duty::Remove(attachment.clone(), 9, Some(young.clone()));
    for aliased in [true, false] {
        let alone = with(shaper(aliased), Vec::new());
        assert_eq!(about(&young, &alone), std::slice::from_ref(&removed));
        let live = with(shaper(aliased), vec![end("a", true)]);
        assert_eq!(about(&young, &live), []);
    }
    let alone = with(shaper(true), Vec::new());
    let orphan = [Duty::Remove(attachment.clone(), 9, None)];
    assert_eq!(duties(&[], &alone, &at(50), &at(40), |_| true), orphan);
    // Neither lease nor alias: a stranger.
    let stranger = with(shaper(false), Vec::new());
    assert_eq!(duties(&[], &stranger, &at(50), &at(40), |_| true), []);
}

#[test]
fn nothing_ends_while_something_cannot_be_read() {
    let gone = record(Some(at(100)), Some("/gone"));
    let mut unclear = seen(Vec::new(), false);
    assert_eq!(about(&gone, &unclear).len(), 1);
    unclear.unclear.push("interface fera: broken".to_owned());
    assert_eq!(about(&gone, &unclear), []);
    let mut half = seen(vec![end("a", false)], false);
    assert_eq!(about(&gone, &half).len(), 2);
    half.unclear.clone_from(&unclear.unclear);
    assert_eq!(about(&gone, &half), []);
    // What serves a live pod goes on.
    let live = Seen {
        unclear: unclear.unclear.clone(),
        ..seen(vec![end("a", true)], false)
    };
    assert_eq!(about(&gone, &live).len(), 1);
    let adopted = Seen {
        unclear: unclear.unclear,
        ..seen(vec![end("a", true)], true)
    };
    let found = duties(&[], &adopted, &at(50), &at(40), |_| true);
    assert!(matches!(found[..], [Duty::Adopt(..)]), "{found:?}");
}

#[test]
fn what_is_wrong_once_does_not_end() {
    let record = record(Some(at(100)), Some("/gone"));
    let half = seen(vec![end("a", false)], false);
    let first = about(&record, &half);
    assert_eq!(first.len(), 2, "{first:?}");
    assert_eq!(confirmed(first.clone(), &first), first);
    // In the meantime an ADD has got further, or made another interface.
    let done = about(&record, &seen(vec![end("a", true)], true));
    assert_eq!(confirmed(first.clone(), &done), []);
    let mut anew = end("a", false);
    anew.index = 8;
    let another = confirmed(first, &about(&record, &seen(vec![anew], false)));
    assert!(
        !another.iter().any(|duty| matches!(duty, Duty::Remove(..))),
        "{another:?}"
    );
    // What serves a pod is done at once.
    let routes = about(&record, &seen(vec![end("a", true)], false));
    assert_eq!(confirmed(routes.clone(), &[]), routes);
}

/// A node's pods, with one address leased to "a" at the given time.
fn pods_with_a_lease(dir: &Path, now: Moment) -> Arc<Pods> {
    let leases = Leases::open(&dir.join("leases.redb")).unwrap();
    leases.set_ranges(vec![PodRange::parse("10.1.0.0/29").unwrap()]);
    leases.allocate(&Wanted::new(attachment("a")), now).unwrap();
    Arc::new(Pods::new(leases, dir.to_owned(), 1400))
}

/// No interface has this index: to remove it changes nothing, and is counted.
const NOBODYS: u32 = i32::MAX as u32;

#[tokio::test]
async fn an_interface_is_removed_only_while_its_lease_is_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let pods = pods_with_a_lease(dir.path(), at(100));
    let listed = pods.leases().page(None, 1).unwrap();
    let record = listed[0].2.clone();
    let removal = |of: &str, lease| Duty::Remove(attachment(of), NOBODYS, lease);
    let release = Duty::Release(attachment("a"), record.clone());
    // A runtime asks for the attachment again, and gets an interface behind the look.
    pods.leases()
        .allocate(&Wanted::new(attachment("a")), at(1000))
        .unwrap();
    let overtaken = [
        removal("a", Some(record.clone())),
        // There was none when the leases were listed.
        removal("a", None),
        // It has ended since, and may have been another's.
        removal("b", Some(record.clone())),
    ];
    for duty in overtaken {
        let mut kept = BTreeSet::new();
        let told = format!("{duty:?}");
        carry_out(&pods, duty, &mut kept).await.unwrap();
        assert_eq!(kept.len(), 1, "{told}");
        carry_out(&pods, release.clone(), &mut kept).await.unwrap();
        assert_eq!(pods.tidied(), BTreeMap::new(), "{told}");
        assert_eq!(pods.leases().count(), 1, "{told}");
    }
    // Without an ADD in between it is done: whether the kernel lets us or not, it was asked.
    let listed = pods.leases().page(None, 1).unwrap();
    for duty in [removal("a", Some(listed[0].2.clone())), removal("b", None)] {
        let before: u64 = pods.tidied().values().sum();
        let _may_lack_permission = carry_out(&pods, duty, &mut BTreeSet::new()).await;
        assert_eq!(pods.tidied().values().sum::<u64>(), before + 1);
    }
}

#[test]
fn a_pod_without_a_lease_and_without_a_route_is_adopted_by_what_is_inside() {
    let mut bare = seen(vec![end("a", true)], false);
    let inside = BTreeSet::from(["10.1.0.2".parse().unwrap()]);
    bare.inside.insert(7, inside);
    let found = duties(&[], &bare, &at(50), &at(40), |_| true);
    let adopted = record(Some(at(50)), None);
    let ip = adopted.addresses[0];
    let wanted = [
        Duty::Adopt(attachment("a"), adopted),
        Duty::Route(attachment("a"), 7, ip),
    ];
    assert_eq!(found, wanted);
    // Of two addresses one is none that the plugin gave it.
    let second = "10.1.0.3".parse().unwrap();
    bare.inside.get_mut(&7).unwrap().insert(second);
    assert_eq!(duties(&[], &bare, &at(50), &at(40), |_| true), []);
    assert_eq!(loose(&[], &bare).len(), 2);
}

#[test]
fn what_cannot_be_adopted_is_in_use_all_the_same() {
    let ip: IpAddr = "10.1.0.2".parse().unwrap();
    let of = |name: &str| BTreeMap::from([(ip, name.to_owned())]);
    // Its alias is cut, or another's.
    let long = "a".repeat(256);
    let mut renamed = end("a", true);
    renamed.alias = Some("x".to_owned());
    for end in [end(&long, true), renamed] {
        let name = end.name.clone();
        let found = seen(vec![end], true);
        assert_eq!(duties(&[], &found, &at(50), &at(40), |_| true), []);
        assert_eq!(loose(&[], &found), of(&name));
        let mut inside = Seen {
            inside: found.routes.clone(),
            ..found
        };
        inside.routes.clear();
        assert_eq!(loose(&[], &inside), of(&name));
    }
    assert_eq!(loose(&[], &seen(Vec::new(), true)), of("interface 7"));
    let leased = [(attachment("b"), record(None, None))];
    assert_eq!(loose(&leased, &seen(Vec::new(), true)), BTreeMap::new());
}

#[test]
fn an_address_in_use_is_given_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let pods = pods_with_a_lease(dir.path(), at(100));
    let of = |last: u8| {
        let ip = IpAddr::from([10, 1, 0, last]);
        (ip, format!("fer{last}"))
    };
    // The first is leased to "a", four are free.
    pods.withhold([of(2), of(3)].into(), true);
    assert_eq!(pods.withheld(), [of(3)].into());
    assert_eq!(pods.leases().usage()[0].free, 3);
    // A look that was not complete says nothing of what it did not see.
    pods.withhold([of(4)].into(), false);
    assert_eq!(pods.withheld(), [of(3), of(4)].into());
    let add = |who: &str| {
        let leased = pods
            .leases()
            .allocate(&Wanted::new(attachment(who)), at(200));
        leased.map(|leased| leased.addresses[0])
    };
    assert_eq!(add("b").unwrap(), of(5).0);
    assert_eq!(add("c").unwrap(), of(6).0);
    assert!(add("d").is_err());
    let mut asking = Wanted::new(attachment("d"));
    asking.ips = vec![of(3).0];
    let refused = pods.leases().allocate(&asking, at(200)).unwrap_err();
    assert!(refused.to_string().contains("in use"), "{refused}");
    // A release is no reason to give it away either.
    pods.leases()
        .release_if(&attachment("a"), |_| true)
        .unwrap();
    assert_eq!(add("d").unwrap(), of(2).0);
    assert!(add("e").is_err());
    pods.withhold(BTreeMap::new(), true);
    assert_eq!(add("e").unwrap(), of(3).0);
}
