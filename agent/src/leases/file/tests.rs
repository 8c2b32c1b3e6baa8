//! What stands in a file is either what was written or an error, and an error
//! leaves the file as it was.

use ferrule_api::Wanted;
use ferrule_model::ipam::PodRange;
use ferrule_model::names::{Attachment, ContainerId, IfName};
use tempfile::TempDir;

use super::*;
use crate::clock::Moment;
use crate::leases::{LeaseError, Leases};

const LEASED: usize = 40;

fn attachment(number: usize) -> Attachment {
    Attachment {
        container_id: ContainerId::try_from(format!("container-{number}")).unwrap(),
        interface: IfName::try_from("eth0".to_owned()).unwrap(),
    }
}

/// A folder with the file of an agent that leased and released.
fn written(dir: &TempDir) -> (PathBuf, Leases) {
    let path = dir.path().join("leases.redb");
    let leases = Leases::open(&path).unwrap();
    leases.set_ranges(vec![PodRange::parse("10.1.0.0/24").unwrap()]);
    for number in 0..LEASED + 5 {
        leases
            .allocate(&Wanted::new(attachment(number)), Moment::default())
            .unwrap();
    }
    for number in LEASED..LEASED + 5 {
        leases.release_while(&attachment(number), || true).unwrap();
    }
    (path, leases)
}

/// As an agent leaves it that stopped, and as one that was killed.
fn files() -> [Vec<u8>; 2] {
    let dir = tempfile::tempdir().unwrap();
    let (path, leases) = written(&dir);
    let crashed = fs::read(&path).unwrap();
    drop(leases);
    [fs::read(&path).unwrap(), crashed]
}

fn leases_of(contents: &Contents) -> (&[(String, String)], usize) {
    (&contents.leases, contents.released.len())
}

/// Puts it in place, and checks that whoever refuses it leaves it alone.
fn open_with(bytes: &[u8]) -> Result<Leases, LeaseError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    fs::write(&path, bytes).unwrap();
    let opened = Leases::open(&path);
    if opened.is_err() {
        assert!(fs::read(&path).unwrap() == bytes, "the file was changed");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    opened
}

#[test]
fn a_file_that_was_cut_off_is_refused_and_left_alone() {
    for bytes in files() {
        let len = bytes.len();
        assert_eq!(open_with(&bytes).unwrap().count(), LEASED);
        let cuts = [
            0, 1, 8, 9, 10, 63, 64, 65, 191, 192, 193, 319, 320, 321, 4095, 4096, 4097, 8192,
        ];
        let near_the_end = [len / 4, len / 2, len - 4097, len - 4096, len - 1];
        for cut in cuts.into_iter().chain(near_the_end) {
            let error = open_with(&bytes[..cut]).unwrap_err().to_string();
            assert!(
                error.contains("is damaged") && error.contains("drain the node"),
                "cut at {cut}: {error}"
            );
        }
    }
}

#[test]
fn garbage_is_refused_and_left_alone() {
    let random: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
        .take(70_000)
        .collect();
    let mut headed = random.clone();
    headed[..9].copy_from_slice(MAGIC);
    for bytes in [vec![0; 4096], b"{}".to_vec(), random, headed] {
        assert!(open_with(&bytes).is_err());
    }
}

#[test]
fn a_flipped_bit_is_found_or_does_no_harm() {
    for bytes in files() {
        let sound = in_memory(&bytes).unwrap();
        // One bit says which of the last two commits counts, both of them whole: it stands nowhere
        // else, and a crash between the two phases of a commit leaves just the same.
        let head: Vec<usize> = (0..320 * 8)
            .filter(|bit| *bit != 9 * 8)
            .step_by(5)
            .collect();
        // Whatever the tree's pages hold: each page is checked as a whole.
        let used = (4096..bytes.len()).filter(|at| bytes[*at] != 0);
        let body = used.step_by(1009).map(|at| at * 8 + at % 8);
        let mut found = 0;
        for bit in head.into_iter().chain(body) {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if check_head(&flipped).is_err() {
                found += 1;
                continue;
            }
            match in_memory(&flipped) {
                Ok(contents) => {
                    assert!(leases_of(&contents) == leases_of(&sound), "bit {bit}");
                }
                Err(_) => found += 1,
            }
        }
        assert!(found > 100, "{found}");
    }
}

#[test]
fn a_newer_file_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let (path, leases) = written(&dir);
    drop(leases);
    let mut format = fs::read(&path).unwrap();
    for offset in FORMAT_OFFSETS {
        format[offset] = 4;
    }
    let error = open_with(&format).unwrap_err().to_string();
    assert!(
        error.contains("storage format 4") && error.contains("up to 3"),
        "{error}"
    );
    let database = Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    write
        .open_table(META)
        .unwrap()
        .insert(VERSION_KEY, VERSION + 1)
        .unwrap();
    write.commit().unwrap();
    drop(database);
    let error = open_with(&fs::read(&path).unwrap())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("version 2") && error.contains("install the release"),
        "{error}"
    );
}

#[test]
fn a_file_without_a_version_is_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let (path, leases) = written(&dir);
    drop(leases);
    let database = Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    assert!(write.delete_table(META).unwrap());
    write.commit().unwrap();
    assert!(!has_tables(&database).unwrap());
    drop(database);
    assert_eq!(read(&path).unwrap().unwrap().version, 1);
    assert_eq!(Leases::open(&path).unwrap().count(), LEASED);
    let database = Database::open(&path).unwrap();
    assert!(has_tables(&database).unwrap());
}

#[test]
fn what_is_in_the_place_of_the_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    assert!(read(&path).unwrap().is_none());
    fs::create_dir(&path).unwrap();
    let error = read(&path).unwrap_err().to_string();
    assert!(error.contains("move aside"), "{error}");
}
