//! What of the kernel's settings we changed, and what was there before: kept on disk, so
//! that it can be put back after the agent is gone.
//!
//! The first value that is found counts, through any number of starts of one boot; a boot
//! begins with its own values.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::ipvs::Timeouts;

/// Where the kernel says which boot this is, below `/proc/sys`.
const BOOT: &str = "kernel/random/boot_id";

/// Stands in the record for IPVS's time-outs, which are no file below `/proc/sys`: those of
/// TCP, TCP after a FIN and UDP, in seconds.
pub(crate) const TIMEOUTS: &str = "ipvs/timeouts";

/// Only one thread writes the file at a time.
static WRITING: Mutex<()> = Mutex::new(());

/// A setting that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Path below `/proc/sys`.
    pub key: String,
    /// What was there first.
    pub before: String,
    /// What we wrote last.
    pub value: String,
}

/// The file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Content {
    boot_id: String,
    changed: Vec<Changed>,
}

/// The kernel's settings, and where changes of them are recorded.
#[derive(Clone, Debug)]
pub struct Sysctls {
    /// Where `/proc/sys` is.
    pub root: PathBuf,
    /// The record; without one nothing is recorded.
    pub record: Option<PathBuf>,
}

impl Sysctls {
    /// Writes a setting if another value is there, and returns that.
    pub(crate) fn write(&self, key: &str, value: &str) -> io::Result<Option<String>> {
        let path = self.root.join(key);
        let before = fs::read_to_string(&path)?.trim().to_owned();
        if before == value {
            return Ok(None);
        }
        for (other, made) in self.implied(key, value) {
            // Our write leaves it as it is; to put ours back would not.
            self.note(&other, made, made);
        }
        self.note(key, &before, value);
        fs::write(&path, value)?;
        info!(sysctl = %path.display(), before, value, "set");
        Ok(Some(before))
    }

    /// Settings that the kernel makes anew with every write of this one, where they are now as
    /// they will be then.
    fn implied(&self, key: &str, value: &str) -> Vec<(String, &'static str)> {
        let family = match (key, value) {
            ("net/ipv4/ip_forward", "1") => "ipv4",
            ("net/ipv6/conf/all/forwarding", "1") => "ipv6",
            _ => return Vec::new(),
        };
        let folder = format!("net/{family}/conf");
        let devices = fs::read_dir(self.root.join(&folder)).into_iter().flatten();
        let devices = devices.flatten().map(|entry| entry.file_name());
        let names = devices.filter_map(|name| name.into_string().ok());
        let forwarding = names.map(|name| (format!("{folder}/{name}/forwarding"), "1"));
        let mut all: Vec<(String, &'static str)> = forwarding.collect();
        if family == "ipv4" {
            // A router takes no redirects, and a host does.
            all.push((format!("{folder}/all/accept_redirects"), "0"));
        }
        all.retain(|(other, made)| {
            let present = fs::read_to_string(self.root.join(other)).unwrap_or_default();
            other != key && present.trim() == *made
        });
        all.sort();
        all
    }

    /// Notes that IPVS's time-outs are to be others.
    pub(crate) fn note_timeouts(&self, before: &Timeouts, value: &Timeouts) {
        self.note(TIMEOUTS, &written(before), &written(value));
    }

    /// IPVS's time-outs as they were and as we made them, if we did.
    pub(crate) fn timeouts(&self) -> Option<(Timeouts, Timeouts)> {
        let changed = self.content().ok()?.changed;
        let noted = changed.iter().find(|one| one.key == TIMEOUTS)?;
        Some((read(&noted.before)?, read(&noted.value)?))
    }

    /// What was there before we wrote a setting first, if we did.
    pub(super) fn first(&self, key: &str) -> Option<String> {
        let changed = self.content().ok()?.changed;
        let noted = changed.into_iter().find(|one| one.key == key)?;
        Some(noted.before)
    }

    /// Everything that was changed in this boot.
    ///
    /// # Errors
    /// When the record cannot be read.
    pub fn changed(&self) -> io::Result<Vec<Changed>> {
        let mut changed = self.content()?.changed;
        changed.retain(|one| one.before != one.value);
        Ok(changed)
    }

    fn boot_id(&self) -> String {
        let id = fs::read_to_string(self.root.join(BOOT));
        id.map(|id| id.trim().to_owned()).unwrap_or_default()
    }

    fn content(&self) -> io::Result<Content> {
        let fresh = || Content {
            boot_id: self.boot_id(),
            changed: Vec::new(),
        };
        let Some(path) = &self.record else {
            return Ok(fresh());
        };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            Err(error) => return Err(error),
        };
        let content: Content = serde_json::from_slice(&text)?;
        Ok(Some(content)
            .filter(|content| content.boot_id == self.boot_id())
            .unwrap_or_else(fresh))
    }

    /// Before the setting is written: what is not recorded could not be put back. Services
    /// work without a record, so that it fails is no reason not to write.
    fn note(&self, key: &str, before: &str, value: &str) {
        let Some(path) = &self.record else {
            return;
        };
        let _one_at_a_time = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = self.content().and_then(|mut content| {
            match content.changed.iter_mut().find(|one| one.key == key) {
                Some(one) => value.clone_into(&mut one.value),
                None => content.changed.push(Changed {
                    key: key.to_owned(),
                    before: before.to_owned(),
                    value: value.to_owned(),
                }),
            }
            replace(path, &serde_json::to_vec_pretty(&content)?)
        });
        if let Err(error) = noted {
            warn!(
                sysctl = key,
                before,
                %error,
                "not recorded in {}; cleanup will not put it back",
                path.display()
            );
        }
    }

    /// Puts back what was changed, the last first, unless somebody has changed it since, and
    /// ends the record. What is needed still stays as it is, and in the record. Returns what
    /// could not be put back, in words.
    pub(crate) fn restore(&self, is_needed: impl Fn(&str) -> bool) -> Vec<String> {
        let Some(path) = &self.record else {
            return Vec::new();
        };
        let _one_at_a_time = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut content = match self.content() {
            Ok(content) => content,
            Err(error) => return vec![format!("{}: {error}", path.display())],
        };
        let changed = std::mem::take(&mut content.changed);
        // Who restores sets them, and says so where that failed.
        let (timeouts, changed): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|one| one.key == TIMEOUTS);
        // What goes with a setting that stays waits for it.
        let stays = changed.iter().any(|one| is_needed(&one.key));
        let (mut needed, changed): (Vec<_>, Vec<_>) = changed
            .into_iter()
            .partition(|one| is_needed(&one.key) || (stays && one.before == one.value));
        needed.extend(timeouts.into_iter().filter(|one| is_needed(&one.key)));
        let mut problems = Vec::new();
        // All are read before one is written, for one may change another.
        let present: Vec<io::Result<String>> = changed
            .iter()
            .map(|one| fs::read_to_string(self.root.join(&one.key)))
            .collect();
        for (Changed { key, before, value }, present) in changed.iter().zip(present).rev() {
            let file = self.root.join(key);
            match present {
                Ok(present) if present.trim() == value => match fs::write(&file, before) {
                    Ok(()) => info!(sysctl = %file.display(), value = before, "put back"),
                    Err(error) => problems.push(format!("sysctl {}: {error}", file.display())),
                },
                Ok(present) => info!(
                    sysctl = %file.display(),
                    value = present.trim(),
                    "left as somebody has set it since"
                ),
                // Its device or module is gone, and it with that.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => problems.push(format!("sysctl {}: {error}", file.display())),
            }
        }
        if !problems.is_empty() {
            return problems;
        }
        let ended = if needed.is_empty() {
            fs::remove_file(path)
        } else {
            content.changed = needed;
            serde_json::to_vec_pretty(&content)
                .map_err(io::Error::from)
                .and_then(|text| replace(path, &text))
        };
        match ended {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                vec![format!("{}: {error}", path.display())]
            }
            Ok(()) | Err(_) => Vec::new(),
        }
    }
}

fn written(timeouts: &Timeouts) -> String {
    let spans = [timeouts.tcp, timeouts.tcp_fin, timeouts.udp];
    spans.map(|span| span.as_secs().to_string()).join(" ")
}

fn read(text: &str) -> Option<Timeouts> {
    let mut spans = text.split(' ').map(|word| word.parse().ok());
    let mut next = || spans.next().flatten().map(Duration::from_secs);
    Some(Timeouts {
        tcp: next()?,
        tcp_fin: next()?,
        udp: next()?,
    })
}

/// Another content at once: a reader sees the one or the other.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("draft");
    fs::write(&draft, content)?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Place {
        _folder: tempfile::TempDir,
        sysctls: Sysctls,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path().join("sys");
            let place = Self {
                sysctls: Sysctls {
                    root,
                    record: Some(folder.path().join("sysctls.json")),
                },
                _folder: folder,
            };
            place.put(BOOT, "first");
            place.put("net/a", "0");
            place.put("net/b", "0");
            place
        }

        fn put(&self, key: &str, value: &str) {
            let path = self.sysctls.root.join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }

        fn get(&self, key: &str) -> String {
            let text = fs::read_to_string(self.sysctls.root.join(key)).unwrap();
            text.trim().to_owned()
        }
    }

    #[test]
    fn the_first_value_is_put_back() {
        let place = Place::new();
        assert_eq!(place.sysctls.write("net/a", "1").unwrap().unwrap(), "0");
        assert_eq!(place.sysctls.write("net/a", "1").unwrap(), None);
        // Somebody changed it, and the agent once more.
        place.put("net/a", "5");
        assert_eq!(place.sysctls.write("net/a", "2").unwrap().unwrap(), "5");
        let changed = place.sysctls.changed().unwrap();
        assert_eq!(changed.len(), 1);
        assert_eq!((&*changed[0].before, &*changed[0].value), ("0", "2"));
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.get("net/a"), "0");
        assert_eq!(place.sysctls.changed().unwrap(), []);
    }

    #[test]
    fn time_outs_of_ipvs_stand_in_the_record_too() {
        let place = Place::new();
        let timeouts = |seconds: [u64; 3]| {
            let [tcp, tcp_fin, udp] = seconds.map(Duration::from_secs);
            Timeouts { tcp, tcp_fin, udp }
        };
        let (before, value) = (timeouts([900, 120, 300]), timeouts([60, 120, 30]));
        place.sysctls.note_timeouts(&before, &value);
        assert_eq!(place.sysctls.timeouts(), Some((before, value)));
        let later = timeouts([70, 120, 30]);
        place.sysctls.note_timeouts(&value, &later);
        assert_eq!(place.sysctls.timeouts(), Some((before, later)));
        // They could not be put back: the next attempt needs the record.
        let failed = |key: &str| key == TIMEOUTS;
        assert_eq!(place.sysctls.restore(failed), Vec::<String>::new());
        assert_eq!(place.sysctls.timeouts(), Some((before, later)));
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.sysctls.timeouts(), None);
    }

    /// The kernel does that: what is not told here is not put back by it.
    #[test]
    fn what_goes_with_forwarding_is_put_back_with_it() {
        let place = Place::new();
        let (forward, device) = ("net/ipv4/ip_forward", "net/ipv4/conf/eth0/forwarding");
        let redirects = "net/ipv4/conf/all/accept_redirects";
        place.put(forward, "0");
        place.put(device, "1");
        place.put(redirects, "0");
        place.put("net/ipv4/conf/eth1/forwarding", "0");
        place.sysctls.write(forward, "1").unwrap();
        let changed = place.sysctls.changed().unwrap();
        assert_eq!(changed.len(), 1, "{changed:?}");
        assert_eq!(place.sysctls.content().unwrap().changed.len(), 3);
        // Pods are there still: all of it waits.
        let for_pods = |key: &str| key == forward;
        assert_eq!(place.sysctls.restore(for_pods), Vec::<String>::new());
        assert_eq!(place.sysctls.content().unwrap().changed.len(), 3);
        assert_eq!(place.get(forward), "1");
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.get(forward), "0");
        assert_eq!((&*place.get(device), &*place.get(redirects)), ("1", "0"));
    }

    #[test]
    fn what_others_have_set_since_stays() {
        let place = Place::new();
        place.sysctls.write("net/a", "1").unwrap();
        place.sysctls.write("net/b", "1").unwrap();
        place.put("net/b", "7");
        fs::remove_file(place.sysctls.root.join("net/a")).unwrap();
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.get("net/b"), "7");
    }

    #[test]
    fn what_is_needed_still_stays() {
        let place = Place::new();
        place.sysctls.write("net/a", "1").unwrap();
        place.sysctls.write("net/b", "1").unwrap();
        let problems = place.sysctls.restore(|key| key == "net/b");
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(
            (place.get("net/a"), place.get("net/b")),
            ("0".to_owned(), "1".to_owned())
        );
        assert_eq!(place.sysctls.changed().unwrap().len(), 1);
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.get("net/b"), "0");
    }

    #[test]
    fn a_boot_begins_anew() {
        let place = Place::new();
        place.sysctls.write("net/a", "1").unwrap();
        place.put(BOOT, "second");
        place.put("net/a", "3");
        assert_eq!(place.sysctls.changed().unwrap(), []);
        place.sysctls.write("net/a", "1").unwrap();
        assert_eq!(place.sysctls.restore(|_| false), Vec::<String>::new());
        assert_eq!(place.get("net/a"), "3");
    }

    #[test]
    fn a_damaged_record_stops_nothing_and_stays() {
        let place = Place::new();
        let path = place.sysctls.record.clone().unwrap();
        fs::write(&path, "{").unwrap();
        assert_eq!(place.sysctls.write("net/a", "1").unwrap().unwrap(), "0");
        assert_eq!(place.get("net/a"), "1");
        assert!(place.sysctls.changed().is_err());
        let problems = place.sysctls.restore(|_| false);
        assert!(problems[0].contains("sysctls.json"), "{problems:?}");
        assert_eq!(fs::read_to_string(path).unwrap(), "{");
    }
}
