//! Programs that run beside a test, and are gone when it ends.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// Started and not yet waited for; what the watchdog ends when a test hangs.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    what: String,
}

impl Process {
    /// Starts it in the namespace of the calling thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> anyhow::Result<Self> {
        let what = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        if let Some(pid) = pid_of(&child) {
            running().insert(pid.as_raw_nonzero().get());
        }
        Ok(Self { child, what })
    }

    /// Its process identifier.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if let Some(status) = self.ended()? {
            bail!("{} has ended: {status}", self.what);
        }
        let pid = pid_of(&self.child).context("a process identifier is positive")?;
        kill_process(pid, signal).with_context(|| format!("signal {}", self.what))
    }

    /// Its status if it has ended.
    ///
    /// # Errors
    /// When the kernel does not know it.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the time is over; it then still runs.
    pub fn wait(&mut self, limit: Duration) -> anyhow::Result<ExitStatus> {
        let what = format!("end of {}", self.what);
        wait::for_some(&what, limit, || self.ended())
    }

    /// Ends it as a power cut would, and waits until it is gone.
    ///
    /// # Errors
    /// When it had ended before by anything but this.
    pub fn kill9(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::KILL)?;
        let status = self.child.wait()?;
        if status.signal() != Some(Signal::KILL.as_raw()) {
            bail!("{} ended before it was killed: {status}", self.what);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
        if let Some(pid) = pid_of(&self.child) {
            running().remove(&pid.as_raw_nonzero().get());
        }
    }
}

/// What a process takes of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Memory that it has in RAM, in KiB.
    pub resident: u64,
    /// The most that it ever had, in KiB.
    pub peak: u64,
    /// As much of what is in RAM as is no file's: its own data, not the program's text.
    pub anonymous: u64,
    /// Time of processors that it took so far.
    pub cpu: Duration,
    /// Descriptors that it has open.
    pub descriptors: usize,
}

impl Usage {
    /// Of the process with this identifier.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let field = |name: &str| -> anyhow::Result<u64> {
            let value = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
            Ok(value
                .with_context(|| format!("process {pid} has no {name}"))?
                .parse()?)
        };
        Ok(Self {
            resident: field("VmRSS:")?,
            peak: field("VmHWM:")?,
            anonymous: field("RssAnon:")?,
            cpu: cpu(pid)?,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        })
    }
}

fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program may hold anything; it ends with the last bracket.
    let (_, rest) = text.rsplit_once(')').context("a name in brackets")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| -> anyhow::Result<u64> {
        Ok(fields.get(index).context("a short line")?.parse()?)
    };
    // Fields 14 and 15 of proc(5), in hundredths of a second on every Linux of ours.
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

/// Kills whatever still runs; for the watchdog.
pub(crate) fn kill_all() {
    for pid in std::mem::take(&mut *running()) {
        if let Some(pid) = Pid::from_raw(pid) {
            let _gone = kill_process(pid, Signal::KILL);
        }
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    Pid::from_raw(i32::try_from(child.id()).ok()?)
}

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}
