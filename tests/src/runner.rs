//! Runs tests one after the other, in this process.
//!
//! Each has a folder, a limit of time, and is looked after: what it leaves
//! behind (processes, mounts, threads in a namespace, devices) is its failure
//! and is removed. A test that hangs ends the run, because a thread cannot be
//! stopped from outside.

use std::any::Any;
use std::fs;
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{
    Pid, Signal, WaitOptions, getpid, kill_process, set_child_subreaper, waitpid,
};

use crate::context::Context;
use crate::netns;
use crate::process;
use crate::wait;

/// What a test needs of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Namespaces, veth, nftables: any machine, as root.
    Native,
    /// IPVS and dummy devices: a machine that has them, or the virtual machine.
    Ipvs,
    /// A clock that counts instructions (`CLOCK=count tests/vm/run`): what is
    /// measured there does not depend on how busy the machine is. Not chosen
    /// unless asked for by name or group.
    Counted,
}

/// A test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// `subject/what-holds`; the name is the specification.
    pub name: &'static str,
    /// Where it can run.
    pub group: Group,
    /// How long it may take on a slow machine.
    pub limit: Duration,
    /// The test.
    pub run: fn(&mut Context) -> anyhow::Result<()>,
}

/// What to run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only tests of this group.
    pub group: Option<Group>,
    /// Only tests whose name has one of these in it (or is it, with `exact`); all if empty.
    pub filters: Vec<String>,
    /// Filters are whole names.
    pub exact: bool,
    /// No tests whose name has one of these in it.
    pub without: Vec<String>,
    /// Those of [`Group::Counted`] too, though nothing asks for them: to be named, not run.
    pub counted_too: bool,
}

impl Selection {
    /// Whether a test is meant.
    #[must_use]
    pub fn has(&self, test: &Test) -> bool {
        let named = self.filters.is_empty()
            || self.filters.iter().any(|filter| {
                if self.exact {
                    test.name == filter
                } else {
                    test.name.contains(filter.as_str())
                }
            });
        let without = self
            .without
            .iter()
            .any(|part| test.name.contains(part.as_str()));
        let group = match self.group {
            Some(group) => group == test.group,
            None => self.counted_too || !self.filters.is_empty() || test.group != Group::Counted,
        };
        named && !without && group
    }
}

/// Runs `tests` the given number of rounds and reports to `out`: a line each,
/// then `kernel-suite: N passed, N failed, N skipped`. Returns whether all passed.
///
/// # Errors
/// When the machine cannot run any, or `out` cannot be written.
pub fn run(tests: &[Test], rounds: u32, out: &mut impl io::Write) -> anyhow::Result<bool> {
    // What a test's processes leave without a parent becomes ours, and is found.
    set_child_subreaper(Some(getpid())).context("become the reaper of orphans")?;
    // A network of the run's own: whatever else the machine does, devices that
    // appear here come from the tests.
    netns::unshare_network()?;
    sweep();
    let base = std::env::temp_dir().join(format!("{FOLDER_PREFIX}{}", std::process::id()));
    fs::create_dir_all(&base)?;
    let total = tests.len() * usize::try_from(rounds)?;
    let (mut passed, mut failed) = (0, 0);
    for round in 0..rounds {
        for (index, test) in tests.iter().enumerate() {
            let folder = base.join(format!("{round}-{index}"));
            let start = Instant::now();
            let outcome = run_one(test, &folder);
            let seconds = start.elapsed().as_secs_f64();
            match outcome {
                Outcome::Passed => {
                    passed += 1;
                    writeln!(out, "ok   {} {seconds:.1} s", test.name)?;
                }
                Outcome::Failed(error) => {
                    failed += 1;
                    writeln!(out, "FAIL {} {seconds:.1} s", test.name)?;
                    for cause in error.chain() {
                        writeln!(
                            out,
                            "     {}",
                            cause.to_string().trim().replace('\n', "\n     ")
                        )?;
                    }
                    show_logs(&folder, out)?;
                }
                Outcome::Hung => {
                    failed += 1;
                    writeln!(
                        out,
                        "HUNG {}: not done after {:?}; ending the run",
                        test.name, test.limit
                    )?;
                    show_logs(&folder, out)?;
                    process::kill_all();
                    let skipped = total - passed - failed;
                    summary(out, passed, failed, skipped)?;
                    return Ok(false);
                }
            }
            fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
    }
    fs::remove_dir_all(&base)?;
    summary(out, passed, failed, 0)?;
    Ok(failed == 0)
}

/// Folders of runs are named by it and the runner's process identifier.
const FOLDER_PREFIX: &str = "ferrule-tests.";

fn summary(out: &mut impl io::Write, ok: usize, failed: usize, skipped: usize) -> io::Result<()> {
    writeln!(
        out,
        "kernel-suite: {ok} passed, {failed} failed, {skipped} skipped"
    )?;
    out.flush()
}

enum Outcome {
    Passed,
    Failed(anyhow::Error),
    Hung,
}

fn run_one(test: &Test, folder: &Path) -> Outcome {
    match prepare_and_run(test, folder) {
        Ok(Some(Ok(()))) => match leftovers() {
            Ok(()) => Outcome::Passed,
            Err(error) => Outcome::Failed(error),
        },
        Ok(Some(Err(error))) => {
            // A failed test may well leave something; it goes, and is not told twice.
            let _told_by_the_failure = leftovers();
            Outcome::Failed(error)
        }
        Ok(None) => Outcome::Hung,
        Err(error) => Outcome::Failed(error),
    }
}

/// `None` if it did not end in time.
fn prepare_and_run(test: &Test, folder: &Path) -> anyhow::Result<Option<anyhow::Result<()>>> {
    fs::create_dir(folder)?;
    let mut context = Context::new(test.name, folder.to_owned())?;
    let (done, result) = mpsc::channel();
    let body = test.run;
    let thread = thread::Builder::new()
        .name(test.name.to_owned())
        .spawn(move || {
            let outcome = panic::catch_unwind(AssertUnwindSafe(|| body(&mut context)))
                .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&*panic))));
            let _nobody_waits_after_a_hang = done.send(outcome);
        })?;
    let outcome = match result.recv_timeout(test.limit) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Timeout) => return Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the test's thread vanished"),
    };
    let _it_has_sent = thread.join();
    Ok(Some(outcome))
}

/// The words of a panic.
#[must_use]
pub fn panic_text(panic: &(dyn Any + Send)) -> String {
    if let Some(text) = panic.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text.clone()
    } else {
        "without words".to_owned()
    }
}

/// Looks for what a test has left behind, and removes it.
fn leftovers() -> anyhow::Result<()> {
    // Threads that were told to end, and processes that were killed, take a moment.
    let found = wait::until_ok("nothing left behind", Duration::from_secs(10), || {
        let found = find_leftovers()?;
        if found.is_empty() {
            Ok(())
        } else {
            bail!("left behind: {}", found.join(", "))
        }
    });
    if found.is_err() {
        for pid in children()? {
            let _gone = kill_process(pid, Signal::KILL);
            let _not_ours = waitpid(Some(pid), WaitOptions::empty());
        }
        for mount in mounts()? {
            let _gone = unmount(mount, UnmountFlags::DETACH);
        }
    }
    found
}

fn find_leftovers() -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for pid in children()? {
        // An orphan that came to us dead only has to be buried.
        if matches!(waitpid(Some(pid), WaitOptions::NOHANG), Ok(Some(_))) {
            continue;
        }
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        found.push(format!("process {pid} ({})", command.trim()));
    }
    for mount in mounts()? {
        found.push(format!("mount {}", mount.display()));
    }
    let own = fs::read_link("/proc/thread-self/ns/net")?;
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        // A thread may end while we look.
        if let Ok(namespace) = fs::read_link(task.join("ns/net"))
            && namespace != own
        {
            found.push(format!("a thread in {}", namespace.display()));
        }
    }
    for link in netns::own_links()? {
        if link != "lo" {
            found.push(format!("device {link} outside of every node"));
        }
    }
    Ok(found)
}

fn children() -> anyhow::Result<Vec<Pid>> {
    let own = getpid().as_raw_nonzero().get();
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // PID (NAME) STATE PARENT ...; the name may hold anything, so from its end.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let parent = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1)?.parse::<i32>().ok());
        if parent == Some(own) {
            children.extend(Pid::from_raw(pid));
        }
    }
    Ok(children)
}

/// Namespaces that are still mounted below the folder of this run.
fn mounts() -> anyhow::Result<Vec<PathBuf>> {
    let folder = format!("{FOLDER_PREFIX}{}/", std::process::id());
    Ok(mounts_with(
        &fs::read_to_string("/proc/self/mountinfo")?,
        &folder,
    ))
}

fn mounts_with(mountinfo: &str, part: &str) -> Vec<PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| path.contains(part))
        .map(PathBuf::from)
        .collect()
}

/// Removes what runs left that were killed themselves.
fn sweep() {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(FOLDER_PREFIX) else {
            continue;
        };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        for mount in mounts_with(&mountinfo, &format!("{name}/")) {
            let _gone = unmount(mount, UnmountFlags::DETACH);
        }
        let _next_time = fs::remove_dir_all(entry.path());
    }
}

/// The ends of the logs in a folder.
fn show_logs(folder: &Path, out: &mut impl io::Write) -> anyhow::Result<()> {
    const LINES: usize = 40;
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let text = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        writeln!(
            out,
            "---- last lines of {}",
            path.file_name().unwrap_or_default().display()
        )?;
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            writeln!(out, "     {line}")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test(name: &'static str, group: Group) -> Test {
        Test {
            name,
            group,
            limit: Duration::from_secs(1),
            run: |_| Ok(()),
        }
    }

    #[test]
    fn a_selection_takes_group_and_name() {
        let a = test("pods/one", Group::Native);
        let all = Selection::default();
        assert!(all.has(&a));
        let group = Selection {
            group: Some(Group::Ipvs),
            ..Selection::default()
        };
        assert!(!group.has(&a));
        let counted = test("bandwidth/one", Group::Counted);
        assert!(!all.has(&counted), "no clock that counts");
        let named = Selection {
            counted_too: true,
            ..Selection::default()
        };
        assert!(named.has(&counted));
        let asked = Selection {
            filters: vec!["bandwidth".to_owned()],
            ..Selection::default()
        };
        assert!(asked.has(&counted));
        let part = Selection {
            filters: vec!["pods".to_owned()],
            ..Selection::default()
        };
        assert!(part.has(&a));
        assert!(
            !Selection {
                exact: true,
                ..part
            }
            .has(&a)
        );
    }

    #[test]
    fn mounts_are_found_by_a_part_of_their_path() {
        let mountinfo = "36 35 0:4 net:[1] /tmp/ferrule-tests.7/0-1/a rw - nsfs nsfs rw\n\
            37 35 0:4 / /proc rw - proc proc rw\n";
        assert_eq!(
            mounts_with(mountinfo, "ferrule-tests.7/"),
            [PathBuf::from("/tmp/ferrule-tests.7/0-1/a")]
        );
    }
}
