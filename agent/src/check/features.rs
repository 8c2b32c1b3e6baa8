//! What the kernel and the program `nft` can do, asked of themselves.
//!
//! A question may have the kernel load a module. So where modules wait on the
//! disk, nothing is asked unless loading them is wanted.

use std::thread;

use ferrule_datapath::{Settings, filter, probe};
use ferrule_model::binding::VipBinding;
use ferrule_model::names::IfName;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::{Finding, Outcome};

const IPVS: &str = "IPVS";
const PROGRAM: &str = "program nft";
const RULESET: &str = "nftables";
const DEVICE: &str = "VIP device";

/// The oldest program that our ruleset is written for.
const OLDEST: [u32; 2] = [1, 0];

/// The program, and whether it is one that can load our ruleset.
pub(super) async fn program(settings: &Settings) -> Finding {
    let path = &settings.nft_program;
    match probe::version_of(path).await {
        Ok(text) => judge_version(&path.display().to_string(), &text),
        Err(error) => Finding::new(
            PROGRAM,
            Outcome::Failed,
            format!(
                "{} cannot be run, without which there is neither guard nor source NAT: {error}",
                path.display()
            ),
            "install nftables, or name the program by --nft-program",
        ),
    }
}

fn judge_version(path: &str, text: &str) -> Finding {
    // "nftables v1.0.6 (Lester Gooch #5)"
    let version = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix('v'))
        .unwrap_or_default();
    let mut numbers = version.split('.').map_while(|part| part.parse().ok());
    let [Some(major), Some(minor)] = [numbers.next(), numbers.next()] else {
        return Finding::new(
            PROGRAM,
            Outcome::Warning,
            format!("{path} says {text:?} and no version"),
            "name the program of nftables by --nft-program",
        );
    };
    if [major, minor] < OLDEST {
        return Finding::new(
            PROGRAM,
            Outcome::Warning,
            format!(
                "{path} has version {version}, and our ruleset is written for {}.{} or newer; it may \
                 be refused, and there is neither guard nor source NAT then",
                OLDEST[0], OLDEST[1]
            ),
            "install a newer nftables",
        );
    }
    Finding::ok(PROGRAM, format!("{path}, version {version}"))
}

/// IPVS, nftables and the VIP device; `harmless`: asking loads no modules.
pub(super) async fn kernel(settings: &Settings, harmless: bool) -> Vec<Finding> {
    if !harmless {
        let found = "not asked, for that may load modules";
        let skipped = |check| Finding::new(check, Outcome::Ok, found, "--load-modules asks");
        let device = device(settings, false).await;
        return vec![skipped(IPVS), skipped(RULESET), device];
    }
    let ipvs = match probe::ipvs().await {
        Ok(()) => Finding::ok(IPVS, "the kernel has it"),
        Err(error) => Finding::of_error(IPVS, Outcome::Failed, &error.to_string()),
    };
    let ruleset = match filter::check(&settings.nft_program, &settings.nft_table).await {
        Ok(()) => Finding::ok(RULESET, "the kernel takes our ruleset"),
        Err(error @ filter::RulesetError::Refused { .. }) if forbidden(&error.to_string()) => {
            unseen(RULESET)
        }
        Err(error) => Finding::of_error(RULESET, Outcome::Failed, &error.to_string()),
    };
    vec![ipvs, ruleset, device(settings, true).await]
}

/// What `nft` says to who is not root.
fn forbidden(words: &str) -> bool {
    words.contains("Operation not permitted")
}

fn unseen(check: &'static str) -> Finding {
    let found = "could not be asked: only root may";
    Finding::new(check, Outcome::Warning, found, "run the check as root")
}

/// Whether VIPs can be bound as the configuration says, by names alone.
pub(super) fn vip_device(settings: &Settings, binding: &VipBinding) -> Finding {
    match binding {
        VipBinding::Device(device) if *device == settings.vip_device => Finding::new(
            DEVICE,
            Outcome::Failed,
            format!("vipDevice: {device} is the dummy device of vipBinding: address"),
            "name a device of the node, or write vipBinding: address",
        ),
        VipBinding::Address | VipBinding::Route | VipBinding::Device(_) => {
            Finding::ok(DEVICE, "as configured")
        }
    }
}

async fn device(settings: &Settings, harmless: bool) -> Finding {
    let name = &settings.vip_device;
    let by_name = vip_device(settings, &settings.vip_binding);
    match &settings.vip_binding {
        _ if by_name.result != Outcome::Ok => return by_name,
        VipBinding::Address => {}
        VipBinding::Route => {
            return Finding::ok(DEVICE, "none is needed: vipBinding is route");
        }
        VipBinding::Device(device) => {
            return match probe::alias_device(device).await {
                Ok(true) => Finding::ok(DEVICE, format!("{device} is there")),
                Ok(false) => Finding::new(
                    DEVICE,
                    Outcome::Warning,
                    format!("vipDevice: {device} is not there, and no VIP is bound before it is"),
                    "correct the name, or make the device",
                ),
                Err(error) => Finding::of_error(DEVICE, Outcome::Failed, &error.to_string()),
            };
        }
    }
    match probe::vip_device(name).await {
        Ok(true) => Finding::ok(DEVICE, format!("{name} is there")),
        Err(error) => Finding::of_error(DEVICE, Outcome::Failed, &error.to_string()),
        Ok(false) if !harmless => Finding::ok(DEVICE, format!("{name} will be made")),
        Ok(false) => match try_elsewhere(name.clone()) {
            None => unseen(DEVICE),
            Some(Ok(())) => Finding::ok(DEVICE, format!("{name} will be made; the kernel can")),
            Some(Err(error)) => Finding::of_error(DEVICE, Outcome::Failed, &error),
        },
    }
}

/// Makes the device in a network namespace of its own, which ends with the thread.
/// `None`: we may not.
fn try_elsewhere(name: IfName) -> Option<Result<(), String>> {
    let attempt = thread::spawn(move || {
        // SAFETY: only unsharing the table of descriptors could leave other threads with
        // descriptors that mean something else; the network alone does not.
        match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
            Ok(()) => {}
            Err(Errno::PERM) => return None,
            Err(errno) => return Some(Err(format!("no namespace to try it in: {errno}"))),
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        Some(match runtime {
            Ok(runtime) => runtime
                .block_on(probe::make_device(&name))
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        })
    });
    attempt.join().unwrap_or(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_program_is_told_from_a_new_one_and_from_none() {
        for (text, result) in [
            ("nftables v1.0.6 (Lester Gooch #5)", Outcome::Ok),
            ("nftables v1.1.3 (Commodore Bullmoose #4)", Outcome::Ok),
            ("nftables v2.0 (X)", Outcome::Ok),
            ("nftables v0.9.8 (E.D.S.)", Outcome::Warning),
            ("BusyBox v1", Outcome::Warning),
            ("", Outcome::Warning),
        ] {
            assert_eq!(judge_version("nft", text).result, result, "{text}");
        }
        let old = judge_version("/sbin/nft", "nftables v0.9.8 (E.D.S.)");
        assert!(
            old.found.contains("/sbin/nft") && old.found.contains("0.9.8"),
            "{old:?}"
        );
    }
}
