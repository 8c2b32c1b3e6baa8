//! `kernel-suite`: runs the kernel tests of [`ferrule_tests::cases`].
//!
//! Exit status: 0 when all that were chosen passed, 1 when not, 2 when the
//! command line is wrong or nothing was chosen.

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use ferrule_tests::cases;
use ferrule_tests::runner::{self, Group, Selection, Test};

const USAGE: &str = "\
usage: kernel-suite [OPTIONS] [FILTER ...]

  FILTER, --filter FILTER  only tests whose name has FILTER in it
  --exact                  a FILTER is a whole name
  --without PART           no tests whose name has PART in it
  --group native|ipvs      only tests that need no more of the kernel; or that need IPVS
  --group counted          only tests that need a clock that counts; without a FILTER or
                           this they are left out
  --short                  without what a short run leaves out
  --part K/N               only the Kth of N parts of what is chosen otherwise
  --rounds N               run everything N times
  --list                   print names and groups, run nothing
Environment: FERRULE_BIN_DIR (folder of ferrule-agent and ferrule), UPDATE_GOLDEN=1.
";

#[derive(Default)]
struct Options {
    selection: Selection,
    rounds: Option<u32>,
    part: Option<(usize, usize)>,
    short: bool,
    list: bool,
    help: bool,
}

fn main() -> ExitCode {
    let outcome = parse(std::env::args().skip(1)).and_then(|options| run(&options));
    let mut stderr = io::stderr();
    let code = match outcome {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(error) => {
            let _nowhere_else_to_say_it = writeln!(stderr, "kernel-suite: {error:#}");
            2
        }
    };
    // Not by returning: a test that hung has threads that would be waited for.
    std::process::exit(code)
}

fn parse(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<Options> {
    let mut options = Options::default();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--filter" => options.selection.filters.push(value()?),
            "--without" => options.selection.without.push(value()?),
            "--part" => options.part = Some(part(&value()?)?),
            "--short" => options.short = true,
            "--exact" => options.selection.exact = true,
            "--group" => {
                options.selection.group = Some(match value()?.as_str() {
                    "native" => Group::Native,
                    "ipvs" => Group::Ipvs,
                    "counted" => Group::Counted,
                    other => bail!("{other:?} is no group; there are native, ipvs and counted"),
                });
            }
            "--rounds" => options.rounds = Some(value()?.parse().context("--rounds")?),
            "--list" => {
                options.list = true;
                options.selection.counted_too = true;
            }
            "--help" | "-h" => options.help = true,
            _ if argument.starts_with('-') => bail!("unknown option {argument}\n{USAGE}"),
            _ => options.selection.filters.push(argument),
        }
    }
    Ok(options)
}

/// Such as `1/2`.
fn part(text: &str) -> anyhow::Result<(usize, usize)> {
    let wrong = || format!("--part {text}: give K/N, such as 1/2");
    let (first, parts) = text.split_once('/').with_context(wrong)?;
    let (first, parts): (usize, usize) = (
        first.parse().with_context(wrong)?,
        parts.parse().with_context(wrong)?,
    );
    anyhow::ensure!((1..=parts).contains(&first), wrong());
    Ok((first, parts))
}

fn run(options: &Options) -> anyhow::Result<bool> {
    let mut out = io::stdout();
    if options.help {
        out.write_all(USAGE.as_bytes())?;
        return Ok(true);
    }
    let mut all = cases::all();
    if options.short {
        all = cases::for_a_short_run(all);
    }
    let chosen = all.into_iter();
    let chosen = chosen.filter(|test| options.selection.has(test));
    let (first, step) = options.part.unwrap_or((1, 1));
    // Neighbours are alike: each part gets some of every kind.
    let chosen: Vec<Test> = chosen.skip(first - 1).step_by(step).collect();
    if chosen.is_empty() {
        bail!("no test is called so; --list names them");
    }
    if options.list {
        for test in chosen {
            writeln!(
                out,
                "{:7} {}",
                format!("{:?}", test.group).to_lowercase(),
                test.name
            )?;
        }
        return Ok(true);
    }
    runner::run(&chosen, options.rounds.unwrap_or(1), &mut out)
}
