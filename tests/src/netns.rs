//! Network namespaces, made and entered by system call.
//!
//! A namespace belongs to a file onto which it is mounted, so that a CNI plugin
//! can be given its path as a runtime does. Only the network is unshared: /sys
//! and mounts stay those of the machine, because the agent needs the cgroup and
//! bpf file systems that `ip netns exec` hides.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, anyhow, bail};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::process::Process;

/// A network namespace of a test. Dropping it takes the mount away; the kernel
/// ends the namespace, and every device in it, when its last thread has left.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes an empty namespace with `lo` up, mounted on `folder/name`.
    ///
    /// # Errors
    /// Without root, or when the file exists.
    pub fn create(folder: &Path, name: &str) -> anyhow::Result<Self> {
        let namespace = Self::bare(folder, name)?;
        namespace.output("ip", &["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Likewise, with `lo` down.
    ///
    /// # Errors
    /// Without root, or when the file exists.
    pub fn bare(folder: &Path, name: &str) -> anyhow::Result<Self> {
        let path = folder.join(name);
        File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
        let made = thread::scope(|scope| {
            scope
                .spawn(|| -> anyhow::Result<()> {
                    unshare_network()?;
                    mount_bind("/proc/thread-self/ns/net", &path)
                        .with_context(|| format!("mount onto {}", path.display()))
                })
                .join()
        });
        // From here on dropping it undoes what was done.
        let namespace = Self {
            name: name.to_owned(),
            path,
        };
        joined(made)??;
        Ok(namespace)
    }

    /// What the test calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file it is mounted on; what a runtime passes as `CNI_NETNS`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` in the namespace, on a thread of its own: sockets that it
    /// opens and processes that it starts belong to the namespace for good.
    ///
    /// # Errors
    /// What `work` returns, and its panic.
    pub fn run<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let done = thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    work()
                })
                .join()
        });
        joined(done)?.with_context(|| format!("in namespace {}", self.name))
    }

    /// Starts a thread that lives in the namespace until `work` returns.
    ///
    /// # Errors
    /// When the namespace cannot be opened.
    pub fn thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
        let file = self.file()?;
        Ok(thread::spawn(move || {
            move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&file),
                Some(LinkNameSpaceType::Network),
            )?;
            drop(file);
            Ok(work())
        }))
    }

    /// Starts a program in the namespace.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> anyhow::Result<Process> {
        self.run(|| Process::spawn(command))
    }

    /// Runs a program in the namespace and returns what it wrote.
    ///
    /// # Errors
    /// When it cannot be started or fails; the error has what it said.
    pub fn output(&self, program: &str, arguments: &[&str]) -> anyhow::Result<String> {
        self.run(|| check(Command::new(program).args(arguments)))
    }

    /// Reads a setting below `/proc/sys/net` as the namespace sees it.
    ///
    /// # Errors
    /// When there is no such setting.
    pub fn sysctl(&self, key: &str) -> anyhow::Result<String> {
        let path = Path::new("/proc/sys/net").join(key);
        self.run(|| {
            let mut value = String::new();
            File::open(&path)
                .and_then(|mut file| file.read_to_string(&mut value))
                .with_context(|| format!("read {}", path.display()))?;
            Ok(value.trim().to_owned())
        })
    }

    /// Names of the devices in the namespace, `lo` among them.
    ///
    /// # Errors
    /// When the kernel's list cannot be read.
    pub fn links(&self) -> anyhow::Result<Vec<String>> {
        self.run(own_links)
    }

    /// The namespace as an open file.
    pub(crate) fn file(&self) -> anyhow::Result<File> {
        File::open(&self.path).with_context(|| format!("open {}", self.path.display()))
    }

    fn enter(&self) -> anyhow::Result<()> {
        move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&self.file()?),
            Some(LinkNameSpaceType::Network),
        )
        .context("setns")
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Not mounted if making it failed half-way; the leak check finds the rest.
        let _not_mounted = unmount(&self.path, UnmountFlags::DETACH);
        let _gone = fs::remove_file(&self.path);
    }
}

/// Gives the calling thread a network of its own.
///
/// # Errors
/// Without root.
pub fn unshare_network() -> anyhow::Result<()> {
    // SAFETY: only unsharing the table of descriptors could leave other threads
    // with descriptors that mean something else; the network alone does not.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
        .context("unshare the network; the tests need root")
}

/// Names of the devices that the calling thread sees.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn own_links() -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")?;
    let mut names: Vec<String> = text
        .lines()
        .skip(2)
        .filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Runs a program to its end in the namespace of the calling thread.
pub(crate) fn check(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout)
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of {command:?}"))
}

fn joined<T>(result: thread::Result<T>) -> anyhow::Result<T> {
    result.map_err(|panic| anyhow!("panicked: {}", crate::runner::panic_text(&*panic)))
}
