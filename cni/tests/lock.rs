//! Two plugins on one attachment at once, as a runtime causes them that is
//! killed and started anew: an interface and its lease come and go together.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use ferrule_model::ownership;
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use support::{Node, Pod, attachment, ip_json, our_links};

/// Without the lock, one round in four fails.
const ROUNDS: u32 = 40;

fn locks(node: &Node) -> usize {
    let folder = node.socket().with_file_name("locks");
    fs::read_dir(folder).unwrap().count()
}

/// Interface and lease are both there, or neither is.
fn assert_whole(node: &Node, there: bool, round: u32) {
    let expected = usize::from(there);
    let found = (our_links().len(), node.agent.leases(), node.queued().len());
    assert_eq!(found, (expected, expected, 0), "round {round}");
    assert_eq!(locks(node), 0, "round {round}");
}

#[test]
fn of_two_adds_one_wins_and_keeps_its_lease() {
    let node = Node::new();
    for round in 0..ROUNDS {
        let pod = Pod::new();
        let path = pod.path();
        let both = thread::scope(|scope| {
            let add = || node.call("ADD", "abc", &path);
            let both = [scope.spawn(add), scope.spawn(add)];
            both.map(|one| one.join().unwrap())
        });
        let mut codes = both.each_ref().map(|said| said.code);
        codes.sort_unstable();
        assert_eq!(codes, [Some(0), Some(1)], "round {round}: {both:?}");
        let loser = both.iter().find(|said| said.code == Some(1)).unwrap();
        loser.error(101);
        assert_whole(&node, true, round);
        let inside = pod.inside(|| ip_json("addr show dev eth0"));
        assert!(inside.to_string().contains("10.1.0.2"), "{inside}");
        node.del("abc", &path);
        assert_whole(&node, false, round);
    }
}

#[test]
fn a_del_beside_an_add_takes_all_or_nothing() {
    let node = Node::new();
    for round in 0..ROUNDS {
        let pod = Pod::new();
        let path = pod.path();
        thread::scope(|scope| {
            let add = scope.spawn(|| node.call("ADD", "abc", &path));
            thread::sleep(Duration::from_micros(u64::from(round) * 150));
            node.del("abc", &path);
            add.join().unwrap().result();
        });
        // Whoever came second has decided.
        let there = !our_links().is_empty();
        assert_whole(&node, there, round);
        node.del("abc", &path);
        assert_whole(&node, false, round);
    }
}

#[test]
fn each_verb_waits_for_the_one_before() {
    let mut node = Node::new();
    node.version = "1.1.0";
    let pod = Pod::new();
    node.add("abc", &pod);
    node.del("abc", &pod.path());
    let folder = node.socket().with_file_name("locks");
    let name = ownership::host_veth_name(&attachment("abc"));
    for verb in ["ADD", "DEL"] {
        let path = folder.join(name.as_str());
        let file = fs::File::create(&path).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        let begin = Instant::now();
        thread::scope(|scope| {
            let said = scope.spawn(|| node.call(verb, "abc", &pod.path()));
            thread::sleep(Duration::from_millis(300));
            fs::remove_file(&path).unwrap();
            drop(file);
            said.join().unwrap().result();
        });
        assert!(begin.elapsed() >= Duration::from_millis(300), "{verb}");
    }
    node.assert_clean();
}

#[test]
fn gc_leaves_alone_what_another_is_at_work_on() {
    let mut node = Node::new();
    node.version = "1.1.0";
    let pods = ["abc", "def"].map(|container| (container, Pod::new()));
    for (container, pod) in &pods {
        node.add(container, pod);
    }
    let name = ownership::host_veth_name(&attachment("abc"));
    let path = node.socket().with_file_name("locks").join(name.as_str());
    let file = fs::File::create(&path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    node.extra = serde_json::json!({"cni.dev/valid-attachments": []});
    let error = node.call("GC", "", "").error(5);
    let said = error["msg"].as_str().unwrap();
    let us = format!("process {}, is at work on abc/eth0", std::process::id());
    assert!(said.contains(&us), "{error}");
    assert_eq!(our_links(), [name.as_str()]);
    assert_eq!(node.agent.leases(), 1);
    drop(file);
    node.call("GC", "", "").result();
    node.assert_clean();
    assert_eq!(locks(&node), 0);
}

#[test]
fn where_no_file_can_be_made_del_works_and_add_does_not() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    let folder = node.socket().with_file_name("locks");
    fs::remove_dir(&folder).unwrap();
    fs::write(&folder, "").unwrap();
    let said = node.call("DEL", "abc", &pod.path());
    said.result();
    assert!(said.stderr.contains("without a lock"), "{said:?}");
    node.assert_clean();
    let error = node.call("ADD", "abc", &pod.path()).error(5);
    assert!(error["msg"].as_str().unwrap().contains("locks"), "{error}");
    node.assert_clean();
}

/// Neither is the pod kept on a full file system, nor is one added unguarded.
#[test]
fn on_a_full_file_system_del_works_and_add_does_not() {
    let node = Node::new();
    let pod = Pod::new();
    node.add("abc", &pod);
    let folder = node.socket().with_file_name("locks");
    // SAFETY: of this thread alone; what it starts inherits it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
    // Room for the folder itself and for no file.
    let options = c"mode=0700,nr_inodes=1";
    mount("none", &folder, "tmpfs", MountFlags::empty(), options).unwrap();
    let said = node.call("DEL", "abc", &pod.path());
    said.result();
    assert!(said.stderr.contains("No space left"), "{said:?}");
    node.assert_clean();
    let error = node.call("ADD", "abc", &pod.path()).error(5);
    let said = error["msg"].as_str().unwrap();
    assert!(said.contains("No space left") && said.contains("full"));
    unmount(&folder, UnmountFlags::DETACH).unwrap();
    node.add("abc", &pod);
    node.del("abc", &pod.path());
    node.assert_clean();
}

#[test]
fn without_the_agents_folder_del_works_and_add_says_so() {
    let mut node = Node::new();
    let pod = Pod::new();
    let nowhere = node.state_dir().join("none/agent.sock");
    node.extra = serde_json::json!({"agentSocket": nowhere});
    node.del("abc", &pod.path());
    let error = node.call("ADD", "abc", &pod.path()).error(11);
    assert!(error["msg"].as_str().unwrap().contains("ferrule-agent"));
    assert!(!nowhere.parent().unwrap().exists());
}
