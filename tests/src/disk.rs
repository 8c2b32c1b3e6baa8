//! A disk that is small enough to be filled.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// What the file system gives out at once, in bytes.
pub const PAGE: usize = 4096;

/// A file system in memory, mounted on a folder. Dropping it takes it away.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
}

impl Disk {
    /// Makes the folder, and mounts a disk with room for so many bytes on it.
    ///
    /// # Errors
    /// Without root.
    pub fn create(path: &Path, bytes: usize) -> anyhow::Result<Self> {
        fs::create_dir_all(path)?;
        let options = CString::new(format!("size={bytes},mode=0700"))?;
        mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(&*options))
            .with_context(|| format!("mount onto {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
        })
    }

    /// Fills it until there is room for so many pages and no more.
    ///
    /// # Errors
    /// When it cannot be filled.
    pub fn fill_but(&self, pages: usize) -> anyhow::Result<()> {
        self.free()?;
        let mut filler = File::create(self.filler())?;
        let mut written: usize = 0;
        loop {
            match filler.write(&[0x5a; PAGE]) {
                Ok(PAGE) => written += PAGE,
                Ok(other) => bail!("{other} bytes of a page were written"),
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error).context("fill the disk"),
            }
        }
        let keep = written.saturating_sub(pages * PAGE);
        Ok(filler.set_len(u64::try_from(keep)?)?)
    }

    /// Takes away what fills it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn free(&self) -> anyhow::Result<()> {
        match fs::remove_file(self.filler()) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).context("free the disk")
            }
            _ => Ok(()),
        }
    }

    /// Lets nobody write from now on, or again.
    ///
    /// # Errors
    /// When files are open for writing.
    pub fn set_read_only(&self, read_only: bool) -> anyhow::Result<()> {
        let flags = if read_only {
            MountFlags::RDONLY
        } else {
            MountFlags::empty()
        };
        mount_remount(&self.path, flags, "").context("mount it anew")
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _gone = unmount(&self.path, UnmountFlags::DETACH);
    }
}
