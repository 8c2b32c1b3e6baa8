//! A folder of manifests, read again where it changed.
//!
//! The folder holds YAML or JSON files, also in subfolders. Of two objects with
//! one name the last in the order of paths counts, as the plan format says.
//! What cannot be read keeps the objects it had when it could.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use ferrule_model::cluster::Event;
use ferrule_model::kube::{Object, ObjectKey};
use tracing::{info, warn};

use super::document::{self, DocumentError};
use super::findings::{Findings, Problem};
use super::tree::{Stamp, Tree};

/// A larger file is refused: nobody writes it by hand.
const MAX_FILE: u64 = 64 * 1024 * 1024;

/// One file as it was last read.
#[derive(Debug)]
struct File {
    stamp: Stamp,
    objects: BTreeMap<ObjectKey, Object>,
    /// What is wrong with it.
    problems: Vec<Problem>,
    /// Objects that it defines more than once; the last one counts.
    repeated: BTreeSet<ObjectKey>,
    /// Objects of which it has a definition that cannot be read.
    broken: BTreeSet<ObjectKey>,
    /// Something in it could not be read and has no last good state.
    unknown: bool,
}

/// The folder and what was last told about it.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Which files define an object; the last one counts.
    definitions: BTreeMap<ObjectKey, BTreeSet<PathBuf>>,
    /// What is below the folder and had to be left out, and why.
    left_out: BTreeMap<PathBuf, String>,
    complete: bool,
}

/// What a scan found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Differences to what was told before.
    pub(crate) events: Vec<Event>,
    /// Files were left for the next scan because somebody may still be writing them.
    pub(crate) unsettled: bool,
}

impl Folder {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self {
            root,
            files: BTreeMap::new(),
            definitions: BTreeMap::new(),
            left_out: BTreeMap::new(),
            complete: false,
        }
    }

    /// Whether there was a moment at which everything in the folder could be read.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Compares the folder with what was last told.
    ///
    /// # Errors
    /// When the folder or one below it cannot be listed; nothing is then told as gone.
    pub(crate) fn scan(&mut self) -> io::Result<Scan> {
        let tree = Tree::below(&self.root)?.open()?;
        let before = std::mem::take(&mut self.left_out);
        self.leave_out(&tree);
        for (path, words) in &self.left_out {
            if before.get(path) != Some(words) {
                warn!(file = %path.display(), "{words}; it is left out");
            }
        }
        Ok(self.scan_files(tree.manifests, Stamp::is_fresh))
    }

    /// Likewise, for somebody who looks once: takes every file as it is now, and
    /// what can be read of a folder that cannot be listed whole.
    ///
    /// # Errors
    /// When the folder itself cannot be listed.
    pub(crate) fn scan_once(&mut self) -> io::Result<Scan> {
        let tree = Tree::below(&self.root)?;
        self.leave_out(&tree);
        Ok(self.scan_files(tree.manifests, |_| false))
    }

    /// Likewise, also where it is a single file and no folder.
    ///
    /// # Errors
    /// When the folder itself cannot be listed, or the file not be looked at.
    pub(crate) fn scan_once_or_file(&mut self) -> io::Result<Scan> {
        if self.root.is_dir() || !self.root.exists() {
            return self.scan_once();
        }
        let tree = Tree::of_file(&self.root)?;
        self.leave_out(&tree);
        Ok(self.scan_files(tree.manifests, |_| false))
    }

    fn leave_out(&mut self, tree: &Tree) {
        let closed = tree.closed.iter().map(|(path, error)| {
            let words = format!("cannot be listed: {error}; make the folder readable");
            (path.clone(), words)
        });
        let no_files = tree.no_files.iter().map(|(path, what)| {
            let words = format!("{what}; remove it, or give it another name");
            (path.clone(), words)
        });
        self.left_out = closed.chain(no_files).collect();
    }

    /// What is wrong with the folder as it was last scanned.
    pub(crate) fn findings(&self) -> Findings {
        let mut findings = Findings::default();
        let left_out = self.left_out.iter();
        findings.problems.extend(
            left_out.map(|(path, words)| (path.clone(), Problem::fatal(words.clone(), false))),
        );
        for (path, file) in &self.files {
            let problems = file.problems.iter().cloned();
            findings
                .problems
                .extend(problems.map(|p| (path.clone(), p)));
        }
        findings.repeated = self.repeated();
        findings
    }

    /// Definitions that cannot be read are among those that are to be removed.
    fn repeated(&self) -> Vec<(ObjectKey, Option<PathBuf>)> {
        let mut broken: BTreeMap<&ObjectKey, BTreeSet<&PathBuf>> = BTreeMap::new();
        let mut twice = BTreeSet::new();
        for (path, file) in &self.files {
            for key in &file.broken {
                broken.entry(key).or_default().insert(path);
            }
            twice.extend(&file.repeated);
        }
        let keys: BTreeSet<&ObjectKey> = self
            .definitions
            .keys()
            .chain(broken.keys().copied())
            .collect();
        let mut repeated = Vec::new();
        for key in keys {
            let good = self.definitions.get(key);
            let mut paths: BTreeSet<&PathBuf> = good.into_iter().flatten().collect();
            paths.extend(broken.get(key).into_iter().flatten());
            if paths.len() > 1 || twice.contains(key) {
                repeated.push((key.clone(), good.and_then(BTreeSet::last).cloned()));
            }
        }
        repeated
    }

    fn scan_files(
        &mut self,
        found: BTreeMap<PathBuf, Stamp>,
        waits: impl Fn(&Stamp) -> bool,
    ) -> Scan {
        let gone = self.files.keys().filter(|path| !found.contains_key(*path));
        let mut changed: Vec<(PathBuf, Option<Stamp>)> =
            gone.map(|path| (path.clone(), None)).collect();
        let mut unsettled = false;
        for (path, stamp) in found {
            if self
                .files
                .get(&path)
                .is_some_and(|file| file.stamp == stamp)
            {
                continue;
            }
            if waits(&stamp) {
                unsettled = true;
            } else {
                changed.push((path, Some(stamp)));
            }
        }
        let mut before = BTreeMap::new();
        for (path, stamp) in changed {
            let file = stamp.map(|stamp| read(&path, stamp, self.files.get(&path)));
            self.replace(path, file, &mut before);
        }
        self.complete |= !unsettled && !self.files.values().any(|file| file.unknown);
        Scan {
            events: self.events(before),
            unsettled,
        }
    }

    /// Puts the new state of a file in the place of the old one; `before`
    /// receives what each object concerned was like before this scan.
    fn replace(
        &mut self,
        path: PathBuf,
        file: Option<File>,
        before: &mut BTreeMap<ObjectKey, Option<Object>>,
    ) {
        let old = self
            .files
            .get(&path)
            .into_iter()
            .flat_map(|f| f.objects.keys());
        let new = file.iter().flat_map(|f| f.objects.keys());
        let keys: BTreeSet<ObjectKey> = old.chain(new).cloned().collect();
        for key in &keys {
            if !before.contains_key(key) {
                before.insert(key.clone(), self.effective(key).cloned());
            }
        }
        for key in keys {
            let defined = file.as_ref().is_some_and(|f| f.objects.contains_key(&key));
            if defined {
                self.definitions
                    .entry(key)
                    .or_default()
                    .insert(path.clone());
            } else if let Some(paths) = self.definitions.get_mut(&key) {
                paths.remove(&path);
                if paths.is_empty() {
                    self.definitions.remove(&key);
                }
            }
        }
        let old_problems = self
            .files
            .get(&path)
            .is_some_and(|f| !f.problems.is_empty());
        match file {
            Some(file) => {
                for problem in &file.problems {
                    warn!(file = %path.display(), "{}; {}", problem.words, problem.effect());
                }
                if old_problems && file.problems.is_empty() {
                    info!(file = %path.display(), "can be read again");
                }
                self.files.insert(path, file);
            }
            None => {
                self.files.remove(&path);
            }
        }
    }

    fn effective(&self, key: &ObjectKey) -> Option<&Object> {
        let path = self.definitions.get(key)?.last()?;
        self.files.get(path)?.objects.get(key)
    }

    fn events(&self, before: BTreeMap<ObjectKey, Option<Object>>) -> Vec<Event> {
        let mut events = Vec::new();
        for (key, before) in before {
            let now = self.effective(&key);
            match now {
                Some(object) if before.as_ref() != Some(object) => {
                    events.push(Event::Applied(Box::new(object.clone())));
                }
                None if before.is_some() => events.push(Event::Deleted(key)),
                Some(_) | None => {}
            }
        }
        events
    }
}

fn read(path: &Path, stamp: Stamp, old: Option<&File>) -> File {
    let text = if stamp.size > MAX_FILE {
        Err(format!("has more than {MAX_FILE} bytes; split it"))
    } else {
        fs::read(path)
            .map_err(|error| unreadable(path, &error))
            .and_then(utf8)
    };
    match text {
        Ok(text) => from_text(&text, stamp, old),
        Err(problem) => {
            let objects = old.map(|old| old.objects.clone()).unwrap_or_default();
            File {
                stamp,
                problems: vec![Problem::fatal(problem, !objects.is_empty())],
                objects,
                repeated: BTreeSet::new(),
                broken: BTreeSet::new(),
                unknown: old.is_none_or(|old| old.unknown),
            }
        }
    }
}

fn unreadable(path: &Path, error: &io::Error) -> String {
    if path.is_symlink() {
        format!("is a link that leads to no file: {error}; correct the link, or remove it")
    } else {
        format!("cannot be read: {error}; make the file readable")
    }
}

fn utf8(bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|error| {
        let (valid, _) = error.as_bytes().split_at(error.utf8_error().valid_up_to());
        let line = 1 + String::from_utf8_lossy(valid).matches('\n').count();
        format!("line {line}: is not UTF-8; write the file in UTF-8")
    })
}

fn from_text(text: &str, stamp: Stamp, old: Option<&File>) -> File {
    let parsed = document::parse(text);
    let mut objects = BTreeMap::new();
    let mut repeated = BTreeSet::new();
    for object in parsed.objects {
        if let Some(earlier) = objects.insert(object.key(), object) {
            repeated.insert(earlier.key());
        }
    }
    let mut broken = BTreeSet::new();
    for key in parsed.errors.iter().filter_map(DocumentError::definition) {
        if !broken.insert(key.clone()) || objects.contains_key(key) {
            repeated.insert(key.clone());
        }
    }
    let mut last_good = BTreeMap::new();
    let mut problems = Vec::new();
    for error in &parsed.errors {
        let of_error = last_good_of(error, &objects, old);
        problems.push(Problem::of(error, !of_error.is_empty()));
        last_good.extend(of_error);
    }
    let unknown = !parsed.errors.is_empty() && old.is_none_or(|old| old.unknown);
    objects.extend(last_good);
    File {
        stamp,
        objects,
        problems,
        repeated,
        broken,
        unknown,
    }
}

/// A document that is wrong keeps the object it was. Where not even its name
/// can be read, it may be any object that the file had and has no longer.
fn last_good_of(
    error: &DocumentError,
    now: &BTreeMap<ObjectKey, Object>,
    old: Option<&File>,
) -> BTreeMap<ObjectKey, Object> {
    let meant = |key: &ObjectKey| error.definition().is_none_or(|named| named == key);
    let before = old.into_iter().flat_map(|old| &old.objects);
    before
        .filter(|(key, _)| meant(key) && !now.contains_key(*key))
        .map(|(key, object)| (key.clone(), object.clone()))
        .collect()
}

#[cfg(test)]
mod tests;
