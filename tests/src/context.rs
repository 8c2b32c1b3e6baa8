//! What a test is given.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::netns::Netns;

/// A folder of its own, and the way to namespaces. The folder's path is short:
/// a Unix socket below it must fit 108 bytes.
#[derive(Debug)]
pub struct Context {
    name: &'static str,
    folder: PathBuf,
    binaries: PathBuf,
}

impl Context {
    pub(crate) fn new(name: &'static str, folder: PathBuf) -> anyhow::Result<Self> {
        let binaries = match std::env::var_os("FERRULE_BIN_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => std::env::current_exe()?
                .parent()
                .context("a program lies in a folder")?
                .to_owned(),
        };
        Ok(Self {
            name,
            folder,
            binaries,
        })
    }

    /// The test's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The test's folder. Every `*.log` in it is shown when the test fails.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program of ours: from `FERRULE_BIN_DIR`, or beside this one.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn binary(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.binaries.join(name);
        path.canonicalize()
            .with_context(|| format!("{} has not been built", path.display()))
    }

    /// A new namespace.
    ///
    /// # Errors
    /// Without root, or when the test has one of that name.
    pub fn netns(&self, name: &str) -> anyhow::Result<Netns> {
        Netns::create(&self.folder, name)
    }
}
