//! A folder of manifests, read again where it changed.
//!
//! The folder holds YAML or JSON files, also in subfolders. Of two objects with
//! one name the last in the order of paths counts, as the plan format says.
//! What cannot be read keeps the objects it had when it could.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ferrule_model::cluster::Event;
use ferrule_model::kube::{Object, ObjectKey};
use tracing::{info, warn};

use super::document::{self, DocumentError};

/// A larger file is refused: nobody writes it by hand.
const MAX_FILE: u64 = 64 * 1024 * 1024;

/// A file that was written less than this ago may still be half of itself.
pub(crate) const SETTLE: Duration = Duration::from_millis(50);

/// What tells a changed file from an unchanged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: (i64, i64),
    changed: (i64, i64),
    size: u64,
    inode: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            size: metadata.len(),
            inode: metadata.ino(),
        }
    }

    /// Whether the file was written so lately that its writer may not be done. A
    /// time in the future (somebody set the clock back) is no reason to wait.
    fn is_fresh(&self) -> bool {
        let (seconds, nanoseconds) = self.modified;
        let modified = u64::try_from(seconds)
            .map(Duration::from_secs)
            .unwrap_or_default()
            + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or_default());
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH + modified)
            .is_ok_and(|age| age < SETTLE)
    }
}

/// One file as it was last read.
#[derive(Debug)]
struct File {
    stamp: Stamp,
    objects: BTreeMap<ObjectKey, Object>,
    /// What is wrong with it.
    problems: Vec<Problem>,
    /// Objects that it defines more than once; the last one counts.
    repeated: BTreeSet<ObjectKey>,
    /// Something in it could not be read and has no last good state.
    unknown: bool,
}

/// What is below a folder.
#[derive(Debug, Default)]
struct Tree {
    /// The folder itself and those below it.
    folders: Vec<PathBuf>,
    /// Manifests, by path.
    manifests: BTreeMap<PathBuf, Stamp>,
    /// Folders below it that cannot be listed, and why.
    closed: BTreeMap<PathBuf, io::Error>,
}

/// What is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The object, where that could be read.
    pub(crate) object: Option<ObjectKey>,
    /// What is wrong: line, object, field.
    pub(crate) words: String,
    /// The same without the line: field and what is wrong with it.
    pub(crate) about_field: String,
    /// Nothing could be made of it: not even YAML, or not to be read at all.
    pub(crate) fatal: bool,
}

/// What is to be said about the folder as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// What is wrong with the folder itself.
    pub(crate) folder: Option<String>,
    /// By file.
    pub(crate) problems: Vec<(PathBuf, Problem)>,
    /// Objects that are defined more than once, and the file whose definition counts.
    pub(crate) repeated: Vec<(ObjectKey, PathBuf)>,
}

/// The folder and what was last told about it.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Which files define an object; the last one counts.
    definitions: BTreeMap<ObjectKey, BTreeSet<PathBuf>>,
    /// Subfolders that [`Folder::scan_once`] had to leave out, and why.
    closed: BTreeMap<PathBuf, String>,
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
            closed: BTreeMap::new(),
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
        let found = Tree::below(&self.root)?.open()?.manifests;
        Ok(self.scan_files(found, Stamp::is_fresh))
    }

    /// Likewise, for somebody who looks once: takes every file as it is now, and
    /// what can be read of a folder that cannot be listed whole.
    ///
    /// # Errors
    /// When the folder itself cannot be listed.
    pub(crate) fn scan_once(&mut self) -> io::Result<Scan> {
        let tree = Tree::below(&self.root)?;
        let closed = tree.closed.into_iter();
        self.closed = closed
            .map(|(path, error)| (path, format!("cannot be listed: {error}")))
            .collect();
        Ok(self.scan_files(tree.manifests, |_| false))
    }

    /// What is wrong with the folder as it was last scanned.
    pub(crate) fn report(&self) -> Report {
        let mut report = Report::default();
        let closed = self.closed.iter();
        report
            .problems
            .extend(closed.map(|(path, words)| (path.clone(), Problem::fatal(words.clone()))));
        for (path, file) in &self.files {
            let problems = file.problems.iter().cloned();
            report.problems.extend(problems.map(|p| (path.clone(), p)));
        }
        for (key, paths) in &self.definitions {
            let Some(last) = paths.last() else {
                continue;
            };
            let twice = paths.iter().any(|path| {
                let file = self.files.get(path);
                file.is_some_and(|file| file.repeated.contains(key))
            });
            if paths.len() > 1 || twice {
                report.repeated.push((key.clone(), last.clone()));
            }
        }
        report
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
                    warn!(file = %path.display(), "{}; its last good state stays", problem.words);
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

/// The folder and those below it, each once however many symbolic links lead to it.
///
/// # Errors
/// When `root` or one below it cannot be listed.
pub(crate) fn folders(root: &Path) -> io::Result<Vec<PathBuf>> {
    Ok(Tree::below(root)?.open()?.folders)
}

impl Tree {
    /// # Errors
    /// When `root` itself cannot be listed.
    fn below(root: &Path) -> io::Result<Self> {
        let mut known = BTreeSet::new();
        let mut tree = Self::default();
        // In the order of paths: by which of several links a folder is entered must not
        // depend on the order in which a file system lists them.
        let mut waiting = BTreeSet::from([root.to_owned()]);
        while let Some(folder) = waiting.pop_first() {
            match tree.take(&folder, &mut known, &mut waiting) {
                Ok(()) => {}
                Err(error) if folder == root => return Err(error),
                Err(error) => {
                    tree.closed.insert(folder, error);
                }
            }
        }
        Ok(tree)
    }

    fn take(
        &mut self,
        folder: &Path,
        known: &mut BTreeSet<(u64, u64)>,
        waiting: &mut BTreeSet<PathBuf>,
    ) -> io::Result<()> {
        let metadata = fs::metadata(folder)?;
        if !known.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        for path in visible(folder)? {
            if path.is_dir() {
                waiting.insert(path);
            } else if is_manifest(&path)
                && let Some(stamp) = stamp(&path)?
            {
                self.manifests.insert(path, stamp);
            }
        }
        self.folders.push(folder.to_owned());
        Ok(())
    }

    /// The tree, if everything in it could be listed.
    fn open(self) -> io::Result<Self> {
        match self.closed.iter().next() {
            None => Ok(self),
            Some((path, error)) => Err(io::Error::new(
                error.kind(),
                format!("subfolder {}: {error}", path.display()),
            )),
        }
    }
}

/// What is in a folder, less what editors and kubelet keep to themselves:
/// names that begin with a dot (`..data` of a mounted `ConfigMap`).
fn visible(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

/// `None` for what is gone since it was listed, and for what is no file, such as
/// a socket. A link that leads nowhere has the stamp of the link: it is a
/// manifest that cannot be read, and not one that was removed.
fn stamp(path: &Path) -> io::Result<Option<Stamp>> {
    let metadata = fs::metadata(path).or_else(|_| fs::symlink_metadata(path));
    match metadata {
        Ok(metadata) if metadata.is_file() || metadata.is_symlink() => {
            Ok(Some(Stamp::of(&metadata)))
        }
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

fn read(path: &Path, stamp: Stamp, old: Option<&File>) -> File {
    let text = if stamp.size > MAX_FILE {
        Err(format!("has more than {MAX_FILE} bytes, split it"))
    } else {
        fs::read(path)
            .map_err(|error| format!("cannot be read: {error}"))
            .and_then(utf8)
    };
    match text {
        Ok(text) => from_text(&text, stamp, old),
        Err(problem) => File {
            stamp,
            objects: old.map(|old| old.objects.clone()).unwrap_or_default(),
            problems: vec![Problem::fatal(problem)],
            repeated: BTreeSet::new(),
            unknown: old.is_none_or(|old| old.unknown),
        },
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
    let mut file = File {
        stamp,
        objects,
        problems: parsed.errors.iter().map(Problem::of).collect(),
        repeated,
        unknown: false,
    };
    for error in &parsed.errors {
        file.keep_last_good(error, old);
    }
    file
}

impl Problem {
    fn of(error: &DocumentError) -> Self {
        Self {
            object: error.object.as_deref().cloned(),
            words: error.to_string(),
            about_field: error.about_field(),
            fatal: error.syntax,
        }
    }

    fn fatal(words: String) -> Self {
        Self {
            object: None,
            about_field: words.clone(),
            words,
            fatal: true,
        }
    }
}

impl File {
    /// A document that is wrong keeps the object it was. Where not even its name
    /// can be read, it may be any object that the file had and has no longer.
    fn keep_last_good(&mut self, error: &DocumentError, old: Option<&Self>) {
        let Some(old) = old else {
            self.unknown = true;
            return;
        };
        self.unknown |= old.unknown;
        let meant = |key: &ObjectKey| error.object.as_deref().is_none_or(|named| named == key);
        for (key, object) in old.objects.iter().filter(|(key, _)| meant(key)) {
            self.objects
                .entry(key.clone())
                .or_insert_with(|| object.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, ip: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  clusterIP: {ip}\n  \
             ports: [{{port: 80}}]\n"
        )
    }

    struct Fixture {
        dir: tempfile::TempDir,
        folder: Folder,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let folder = Folder::new(dir.path().to_owned());
            Self { dir, folder }
        }

        /// Writes a file as if it had been written a while ago.
        fn write(&self, name: &str, text: &str) {
            let path = self.dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            let file = fs::File::options().append(true).open(&path).unwrap();
            let ago = std::time::SystemTime::now() - SETTLE * 4;
            file.set_modified(ago).unwrap();
        }

        fn scan(&mut self) -> Vec<String> {
            let scan = self.folder.scan().unwrap();
            assert!(!scan.unsettled);
            scan.events
                .into_iter()
                .map(|event| match event {
                    Event::Applied(object) => format!("+{}", object.key()),
                    Event::Deleted(key) => format!("-{key}"),
                })
                .collect()
        }
    }

    fn problems(folder: &Folder) -> usize {
        folder.files.values().map(|file| file.problems.len()).sum()
    }

    #[test]
    fn only_what_changed_is_told() {
        let mut f = Fixture::new();
        f.write("a.yaml", &service("a", "10.0.0.1"));
        f.write("sub/b.yml", &service("b", "10.0.0.2"));
        f.write(".hidden.yaml", &service("hidden", "10.0.0.3"));
        f.write("notes.txt", "no manifest");
        assert_eq!(f.scan(), ["+Service default/a", "+Service default/b"]);
        assert!(f.folder.is_complete());
        assert!(f.scan().is_empty());
        f.write("a.yaml", &service("a", "10.0.0.9"));
        assert_eq!(f.scan(), ["+Service default/a"]);
        fs::remove_file(f.dir.path().join("sub/b.yml")).unwrap();
        assert_eq!(f.scan(), ["-Service default/b"]);
    }

    #[test]
    fn links_are_followed_and_never_in_circles() {
        use std::os::unix::fs::symlink;
        let mut f = Fixture::new();
        // As kubelet mounts a ConfigMap: the files are links through a link.
        f.write("..1/a.yaml", &service("a", "10.0.0.1"));
        symlink("..1", f.dir.path().join("..data")).unwrap();
        symlink("..data/a.yaml", f.dir.path().join("a.yaml")).unwrap();
        symlink(".", f.dir.path().join("circle")).unwrap();
        symlink("..", f.dir.path().join("..1/up")).unwrap();
        assert_eq!(f.scan(), ["+Service default/a"]);
        f.write("..2/a.yaml", &service("a", "10.0.0.2"));
        symlink("..2", f.dir.path().join("..new")).unwrap();
        fs::rename(f.dir.path().join("..new"), f.dir.path().join("..data")).unwrap();
        assert_eq!(f.scan(), ["+Service default/a"]);
    }

    /// A tmpfs lists what was made last first, ext4 by a hash.
    #[test]
    fn by_which_link_a_folder_is_entered_is_told_by_the_names() {
        use std::os::unix::fs::symlink;
        for link_first in [false, true] {
            let mut f = Fixture::new();
            let link = f.dir.path().join("alias");
            if link_first {
                symlink("real", &link).unwrap();
            }
            f.write("real/a.yaml", &service("a", "10.0.0.1"));
            if !link_first {
                symlink("real", &link).unwrap();
            }
            f.write("b.yaml", &service("a", "10.0.0.2"));
            f.scan();
            let (_, last) = f.folder.report().repeated.remove(0);
            assert_eq!(
                last,
                f.dir.path().join("b.yaml"),
                "alias/a.yaml comes before"
            );
        }
    }

    #[test]
    fn of_two_files_with_one_object_the_last_counts() {
        let mut f = Fixture::new();
        f.write("1.yaml", &service("a", "10.0.0.1"));
        f.write("2.yaml", &service("a", "10.0.0.2"));
        assert_eq!(f.scan(), ["+Service default/a"]);
        f.write("1.yaml", &service("a", "10.0.0.3"));
        assert!(f.scan().is_empty(), "the first is hidden by the second");
        fs::remove_file(f.dir.path().join("2.yaml")).unwrap();
        assert_eq!(f.scan(), ["+Service default/a"]);
    }

    #[test]
    fn an_object_moves_between_files_without_a_gap() {
        let mut f = Fixture::new();
        f.write("1.yaml", &service("a", "10.0.0.1"));
        f.scan();
        fs::remove_file(f.dir.path().join("1.yaml")).unwrap();
        f.write("2.yaml", &service("a", "10.0.0.1"));
        assert!(f.scan().is_empty());
    }

    #[test]
    fn broken_documents_keep_their_last_good_state() {
        let mut f = Fixture::new();
        let (a, b) = (service("a", "10.0.0.1"), service("b", "10.0.0.2"));
        f.write("x.yaml", &format!("{a}---\n{b}"));
        f.scan();
        // A field is wrong: this object stays as it was, the other one changes.
        let wrong = a.replace("port: 80", "port: http");
        f.write(
            "x.yaml",
            &format!("{wrong}---\n{}", service("b", "10.0.0.3")),
        );
        assert_eq!(f.scan(), ["+Service default/b"]);
        assert_eq!(problems(&f.folder), 1);
        // The YAML is broken: nothing that was there is told as gone.
        f.write("x.yaml", "{");
        assert!(f.scan().is_empty());
        // Repaired, with one of the two left.
        f.write("x.yaml", &a);
        assert_eq!(f.scan(), ["-Service default/b"]);
        assert_eq!(problems(&f.folder), 0);
    }

    #[test]
    fn a_folder_with_a_broken_file_from_the_start_is_not_complete() {
        let mut f = Fixture::new();
        f.write("a.yaml", &service("a", "10.0.0.1"));
        f.write("b.yaml", "{");
        assert_eq!(f.scan(), ["+Service default/a"]);
        assert!(!f.folder.is_complete());
        f.write("b.yaml", &service("b", "10.0.0.2"));
        assert_eq!(f.scan(), ["+Service default/b"]);
        assert!(f.folder.is_complete());
        f.write("b.yaml", "{");
        f.scan();
        assert!(f.folder.is_complete(), "once is enough");
    }

    #[test]
    fn a_file_that_is_being_written_waits() {
        let mut f = Fixture::new();
        fs::write(f.dir.path().join("a.yaml"), service("a", "10.0.0.1")).unwrap();
        let scan = f.folder.scan().unwrap();
        assert!(scan.unsettled && scan.events.is_empty());
        assert!(!f.folder.is_complete());
    }
}
