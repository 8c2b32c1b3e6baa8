//! What the machine tells about modules that are not loaded.

use std::fs;
use std::path::Path;

use super::is_loaded;

/// How a module stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the kernel.
    There,
    /// It lies on the disk.
    Loadable,
    /// It is nowhere.
    Absent,
    /// There is no list that could tell, as in a container without `/lib/modules`.
    Unknown,
}

/// What there is of lists.
#[derive(Debug, Default)]
pub struct Lists {
    /// `modules.builtin` and `modules.dep` of the running kernel.
    built_in: Option<String>,
    on_disk: Option<String>,
    /// The kernel can load modules at all.
    modular: bool,
}

impl Lists {
    /// Those of the running kernel.
    #[must_use]
    pub fn read() -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let folder = Path::new("/lib/modules").join(release.trim());
        Self {
            built_in: fs::read_to_string(folder.join("modules.builtin")).ok(),
            on_disk: fs::read_to_string(folder.join("modules.dep")).ok(),
            modular: Path::new("/proc/modules").exists(),
        }
    }

    /// Whether the kernel can load modules at all.
    #[must_use]
    pub fn modular(&self) -> bool {
        self.modular
    }

    /// How a module stands.
    #[must_use]
    pub fn state(&self, module: &str) -> State {
        self.judge(module, is_loaded(module))
    }

    fn judge(&self, module: &str, loaded: bool) -> State {
        let lists = |text: &Option<String>| text.as_ref().is_some_and(|text| names(text, module));
        if loaded || lists(&self.built_in) {
            State::There
        } else if !self.modular || self.on_disk.is_none() {
            State::Unknown
        } else if lists(&self.on_disk) {
            State::Loadable
        } else {
            State::Absent
        }
    }
}

/// Whether a list of paths such as `kernel/net/netfilter/ipvs/ip_vs.ko.xz: ...` has the module.
fn names(list: &str, module: &str) -> bool {
    list.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        let stem = file.split(".ko").next().unwrap_or_default();
        stem.replace('-', "_") == module
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_found_by_its_name_alone() {
        let lists = Lists {
            built_in: Some("kernel/drivers/net/veth.ko\n".to_owned()),
            on_disk: Some(
                "kernel/net/netfilter/ipvs/ip_vs.ko.xz: kernel/net/netfilter/nf_conntrack.ko.xz\n\
                 kernel/net/netfilter/nf-tables.ko:\n"
                    .to_owned(),
            ),
            modular: true,
        };
        for (module, state) in [
            ("veth", State::There),
            ("ip_vs", State::Loadable),
            ("nf_tables", State::Loadable),
            // Another module needs it; that alone puts it nowhere.
            ("nf_conntrack", State::Absent),
            ("ip_v", State::Absent),
        ] {
            assert_eq!(lists.judge(module, false), state, "{module}");
            assert_eq!(lists.judge(module, true), State::There, "{module}");
        }
        assert_eq!(Lists::default().judge("ip_vs", false), State::Unknown);
    }
}
