//! Kernel modules: which of those that services need are there, or can be loaded.

use ferrule_datapath::modules::{
    Lists, Module, NEEDED, State, connection_table_bits, of_scheduler, remedy, wanted_table_bits,
};

use super::{Finding, Outcome, rights};

const CHECK: &str = "kernel modules";
const TABLE: &str = "connection table";

/// What pods' interfaces are. The kernel loads it by itself.
const VETH: Module = Module {
    name: "veth",
    serves: "pods",
};

/// What is known about modules.
pub(super) struct Modules {
    /// What to tell about it.
    pub(super) finding: Finding,
    /// Asking the kernel for a feature loads nothing: all is there, or nothing can be.
    pub(super) asking_is_harmless: bool,
}

/// Looks for all of them and that of the scheduler; `may_load`: settings allow it.
pub(super) fn look(may_load: bool, scheduler: &str) -> Modules {
    let lists = Lists::read();
    let states: Vec<(Module, State)> = NEEDED
        .into_iter()
        .chain(of_scheduler(scheduler))
        .chain([VETH])
        .map(|module| (module, lists.state(module.name)))
        .collect();
    let asking_is_harmless =
        !lists.modular() || states.iter().all(|(_, state)| *state == State::There);
    Modules {
        finding: judge(
            &states,
            lists.modular(),
            may_load,
            rights::may_load_modules(),
        ),
        asking_is_harmless,
    }
}

/// Whether IPVS's connection table has as many buckets as is asked for; nothing while there is no
/// IPVS, which gets them when it is loaded.
pub(super) fn connection_table(configured: Option<u8>) -> Option<Finding> {
    let wanted = wanted_table_bits(configured);
    connection_table_bits().map(|bits| judge_table(bits, wanted))
}

fn judge_table(bits: u8, wanted: Option<u8>) -> Finding {
    let buckets = 1_u64 << bits.min(63);
    let Some(wanted) = wanted.filter(|wanted| *wanted > bits) else {
        return Finding::ok(TABLE, format!("{buckets} buckets"));
    };
    Finding::new(
        TABLE,
        Outcome::Ok,
        format!(
            "{buckets} buckets instead of {}, as somebody else has loaded IPVS: with many times as \
             many connections each packet takes longer",
            1_u64 << wanted.min(63)
        ),
        format!(
            "write `options ip_vs conn_tab_bits={wanted}` into /etc/modprobe.d/ferrule.conf; it \
             holds from the next boot on"
        ),
    )
}

fn judge(states: &[(Module, State)], modular: bool, may_load: bool, able: bool) -> Finding {
    let of = |wanted: State| -> Vec<Module> {
        let of = states.iter().filter(|(_, state)| *state == wanted);
        of.map(|(module, _)| *module).collect()
    };
    let (absent, loadable, unknown) = (of(State::Absent), of(State::Loadable), of(State::Unknown));
    if !absent.is_empty() {
        let found = format!("this kernel lacks {}", list(&absent));
        return Finding::new(CHECK, Outcome::Failed, found, remedy(&all(&absent)));
    }
    // The kernel itself loads veth when the first pod comes, with rights of its own.
    let waiting: Vec<Module> = loadable
        .into_iter()
        .filter(|module| *module != VETH)
        .collect();
    if !waiting.is_empty() && may_load && able {
        return Finding::ok(
            CHECK,
            format!("`run` will load {}", all(&waiting).join(", ")),
        );
    }
    if !waiting.is_empty() {
        let why = if may_load {
            "this process lacks CAP_SYS_MODULE"
        } else {
            "--no-load-modules forbids it"
        };
        let found = format!("not loaded, and {why}: {}", list(&waiting));
        return Finding::new(CHECK, Outcome::Warning, found, remedy(&all(&waiting)));
    }
    if unknown.is_empty() {
        return Finding::ok(CHECK, "all are there");
    }
    if modular {
        let found = format!(
            "neither loaded nor listed below /lib/modules, so that it cannot be told whether they \
             can be had: {}",
            list(&unknown)
        );
        return Finding::new(CHECK, Outcome::Warning, found, remedy(&all(&unknown)));
    }
    Finding::ok(
        CHECK,
        "this kernel loads none; what is compiled in, the checks of features tell",
    )
}

fn all(modules: &[Module]) -> Vec<&'static str> {
    modules.iter().map(|module| module.name).collect()
}

/// `ip_vs (services), dummy (VIPs)`.
fn list(modules: &[Module]) -> String {
    let words: Vec<String> = modules
        .iter()
        .map(|module| format!("{} ({})", module.name, module.serves))
        .collect();
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_what_it_serves() {
        let states = |state| vec![(NEEDED[0], state), (VETH, State::There)];
        let judged = |state, may_load, able| judge(&states(state), true, may_load, able);
        assert_eq!(
            judged(State::There, true, true),
            Finding::ok(CHECK, "all are there")
        );
        assert_eq!(judged(State::Loadable, true, true).result, Outcome::Ok);
        for (may_load, why) in [(true, "CAP_SYS_MODULE"), (false, "--no-load-modules")] {
            let finding = judged(State::Loadable, may_load, false);
            assert_eq!(finding.result, Outcome::Warning);
            assert!(finding.found.contains(why), "{finding:?}");
        }
        let absent = judged(State::Absent, true, true);
        assert_eq!(absent.result, Outcome::Failed);
        assert!(absent.found.contains("ip_vs (services)"), "{absent:?}");
        assert!(absent.remedy.contains("modules-load.d"), "{absent:?}");
        assert_eq!(judged(State::Unknown, true, true).result, Outcome::Warning);
        let fixed = judge(&states(State::Unknown), false, true, true);
        assert_eq!(fixed.result, Outcome::Ok);
        // The kernel sees to veth by itself.
        let veth = [(VETH, State::Loadable)];
        assert_eq!(judge(&veth, true, false, false).result, Outcome::Ok);
    }
}
