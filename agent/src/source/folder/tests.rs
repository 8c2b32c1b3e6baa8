//! What is told of a folder as it changes.

use super::*;
use crate::source::tree::SETTLE;

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
        let (_, last) = f.folder.findings().repeated.remove(0);
        assert_eq!(
            last.unwrap(),
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

#[test]
fn what_never_was_good_is_left_out() {
    let mut f = Fixture::new();
    let good = service("a", "10.0.0.1");
    let wrong = good.replace("port: 80", "port: http");
    let effects = |f: &Fixture| -> Vec<&str> {
        let problems = f.folder.files.values().flat_map(|file| &file.problems);
        problems.map(Problem::effect).collect()
    };
    f.write("new.yaml", &wrong);
    f.write("syntax.yaml", "{");
    f.scan();
    assert_eq!(effects(&f), ["it is left out"; 2]);
    f.write("new.yaml", &good);
    f.scan();
    f.write(
        "new.yaml",
        &format!("{wrong}---\n{}", wrong.replace("name: a", "name: b")),
    );
    assert!(f.scan().is_empty());
    let kept = "its last good state stays in use";
    assert_eq!(effects(&f), [kept, "it is left out", "it is left out"]);
    f.write("new.yaml", "\u{0}{");
    f.scan();
    assert_eq!(effects(&f), [kept, "it is left out"]);
}

#[test]
fn a_broken_definition_is_one_all_the_same() {
    let mut f = Fixture::new();
    let good = service("a", "10.0.0.1");
    let wrong = good.replace("port: 80", "port: http");
    let key = "Service default/a";
    let repeated = |f: &Fixture| -> Vec<(String, Option<PathBuf>)> {
        let repeated = f.folder.findings().repeated.into_iter();
        repeated
            .map(|(key, path)| (key.to_string(), path))
            .collect()
    };
    f.write("1.yaml", &good);
    f.write("2.yaml", &wrong);
    assert_eq!(f.scan(), ["+Service default/a"]);
    let first = f.dir.path().join("1.yaml");
    assert_eq!(repeated(&f), [(key.to_owned(), Some(first.clone()))]);
    fs::remove_file(&first).unwrap();
    f.scan();
    assert_eq!(repeated(&f), []);
    f.write("2.yaml", &format!("{wrong}---\n{wrong}"));
    f.scan();
    assert_eq!(repeated(&f), [(key.to_owned(), None)]);
    // What is kept of a file is no second definition in it.
    f.write("2.yaml", &good);
    f.scan();
    f.write("2.yaml", &wrong);
    f.scan();
    assert_eq!(repeated(&f), []);
}

#[test]
fn what_is_no_file_is_named_and_never_opened() {
    let mut f = Fixture::new();
    f.write("A.YAML", &service("a", "10.0.0.1"));
    f.write("b.Yml", &service("b", "10.0.0.2"));
    f.write("c.JSON", "{\"kind\": \"Foreign\", \"apiVersion\": \"v1\"}");
    let path = |name| f.dir.path().join(name);
    let made = std::process::Command::new("mkfifo")
        .arg(path("fifo.yaml"))
        .status();
    assert!(made.unwrap().success());
    let _socket = std::os::unix::net::UnixListener::bind(path("socket.yaml")).unwrap();
    std::os::unix::fs::symlink("/dev/null", path("device.json")).unwrap();
    assert_eq!(f.scan(), ["+Service default/a", "+Service default/b"]);
    assert!(f.folder.is_complete());
    let problems = f.folder.findings().problems;
    let said: Vec<&str> = problems.iter().map(|(_, p)| p.words.as_str()).collect();
    assert_eq!(
        said,
        ["device", "FIFO", "socket"]
            .map(|what| { format!("is a {what} and no file; remove it, or give it another name") })
    );
    assert!(problems.iter().all(|(_, p)| p.fatal && !p.kept));
    fs::remove_file(f.dir.path().join("fifo.yaml")).unwrap();
    f.scan();
    assert_eq!(f.folder.findings().problems.len(), 2);
}
