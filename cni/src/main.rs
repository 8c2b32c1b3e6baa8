//! `ferrule`, the CNI plugin: gives a pod its interface and takes it away.
//!
//! A container runtime executes it once for each verb, with the call in the
//! environment and the network configuration on standard input; it prints a
//! result or an error object and ends. It is small and static and starts in
//! less than a millisecond. Addresses come from the node's agent over a Unix
//! socket; links, addresses, routes and neighbour entries it makes itself.
//! It never changes the node for services: that is the agent's work.
//!
//! [`environment`] and [`config`] take the call apart, one module a verb
//! carries it out ([`add`], [`del`], [`check`], [`gc`], [`agent::status`],
//! [`version::reply`]), those that change something under a [`lock`].
//! [`wishes`] are what a runtime wants for one pod;
//! [`pair`] knows what is made and [`kernel`] makes it; [`bandwidth`], [`tc`]
//! and [`shaper`] are the same for a pod's limits.

mod add;
mod agent;
mod bandwidth;
mod check;
mod config;
mod del;
mod environment;
mod failure;
mod fault;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod gc;
mod kernel;
mod lock;
mod netns;
mod pair;
mod ports;
mod removal;
mod report;
mod shaper;
mod sysctl;
mod tc;
mod undo;
mod version;
mod wishes;

use std::io::{self, Write as _};
use std::process::ExitCode;

use serde_json::Value;

use crate::config::Config;
use crate::environment::{Command, Environment};
use crate::failure::{Code, Failure};
use crate::version::SpecVersion;
use crate::wishes::Wishes;

const HELP: &str = "ferrule is a CNI plugin: a container runtime executes it, with CNI_COMMAND set, to connect pods.
Install it in /opt/cni/bin and name it in a list in /etc/cni/net.d; for this node's state ask `ferrule-agent status`.";

fn main() -> ExitCode {
    #[cfg(feature = "fault-injection")]
    if std::env::args().nth(1).as_deref() == Some("--fault-steps") {
        let listed = io::stdout().write_all(fault::listing().as_bytes());
        return ExitCode::from(u8::from(listed.is_err()));
    }
    let environment = Environment(std::env::var_os::<&'static str>);
    let command = match environment.command() {
        Ok(Some(command)) => command,
        Ok(None) => {
            eprintln!("{HELP}");
            return ExitCode::FAILURE;
        }
        // The configuration is read for the version of the error alone.
        Err(error) => return failed(&error.into(), &input_or_empty()),
    };
    let input = match config::read_input(io::stdin().lock()) {
        Ok(input) => input,
        Err(failure) => return failed(&failure, b""),
    };
    match serve(command, &environment, &input) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failed(&failure, &input),
    }
}

/// Standard input, where it matters little.
fn input_or_empty() -> Vec<u8> {
    config::read_input(io::stdin().lock()).unwrap_or_default()
}

/// Carries a verb out and prints its result, if it has one.
fn serve<L>(command: Command, environment: &Environment<L>, input: &[u8]) -> Result<(), Failure>
where
    L: Fn(&'static str) -> Option<std::ffi::OsString>,
{
    if command == Command::Version {
        return print(&version::reply(input));
    }
    let config = Config::parse(input)?;
    if command != Command::Del {
        config.check_socket()?;
    }
    match command {
        Command::Add => {
            let attachment = environment.attachment()?;
            let netns = environment.netns()?;
            let network = config.network()?;
            let request = add::Request {
                attachment: &attachment,
                netns: &netns,
                pod: environment.pod()?,
                network: &network,
                mtu: config.mtu()?,
                wishes: Wishes::read(&config, environment)?,
            };
            runtime()?.block_on(add::run(&config, request, print))
        }
        Command::Del => {
            let attachment = environment.attachment()?;
            // One that is missing or makes no sense is none.
            let netns = environment.netns().ok();
            runtime()?.block_on(del::run(&config, &attachment, netns.as_deref()))
        }
        Command::Check => {
            config.version.require(SpecVersion::V0_4_0, "CHECK")?;
            let attachment = environment.attachment()?;
            let netns = environment.netns()?;
            runtime()?.block_on(check::run(&config, &attachment, &netns))
        }
        Command::Status => {
            config.version.require(SpecVersion::V1_1_0, "STATUS")?;
            agent::status(&config)
        }
        Command::Gc => {
            config.version.require(SpecVersion::V1_1_0, "GC")?;
            runtime()?.block_on(gc::run(&config))
        }
        Command::Version => Ok(()),
    }
}

/// One thread only: which namespace a socket belongs to depends on the thread
/// that opens it.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Code::Io, format!("cannot start: {error}")))
}

/// Prints an object on standard output, which is where the runtime reads it.
fn print(object: &Value) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer(&mut stdout, object)
        .map_err(io::Error::from)
        .and_then(|()| stdout.write_all(b"\n"))
        .and_then(|()| stdout.flush())
        .map_err(|error| {
            Failure::new(
                Code::Io,
                format!("cannot write to standard output: {error}"),
            )
        })
}

/// Prints the error object. Should that fail too, the exit code says enough.
fn failed(failure: &Failure, input: &[u8]) -> ExitCode {
    if let Err(second) = print(&failure.reply(Config::version_of(input))) {
        eprintln!("ferrule: {failure}; {second}");
    }
    ExitCode::FAILURE
}
