//! The command `ferrule-agent status`: asks a running agent and shows what it says.
//!
//! It is a client of the agent's socket and nothing else: it reads no kernel
//! and no disk, keeps no log and needs no runtime. What it prints as text is
//! made in [`text`] and [`listing`]; `docs/status.md` promises its JSON.

mod listing;
mod text;
pub(crate) mod words;

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use ferrule_api::status::{FrontendRow, Health, PodRow, Status};
use ferrule_api::{Answer, Call, CallError, Client, ClientError};
use serde::Serialize;

use crate::settings::{ColorChoice, Listing, Output, StatusSettings};
use crate::status::text::{Look, Palette};
use crate::status::words::{plain, plain_json};

/// Version of what `-o json` prints. Fields that are added do not raise it.
const OUTPUT_VERSION: u32 = 1;

/// How long the agent may take for one answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Exit code when the agent says that something is wrong.
const DEGRADED: u8 = 1;

/// Exit code when there is no answer that could be shown; also clap's for a wrong command line.
const NO_ANSWER: u8 = 2;

/// Width of text where there is no terminal to ask.
const DEFAULT_WIDTH: usize = 100;

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("{}", no_answer(socket, source))]
    NoAnswer {
        socket: PathBuf,
        source: ClientError,
    },
    #[error("the agent at {} refuses to tell: {source}", socket.display())]
    Refused { socket: PathBuf, source: CallError },
    #[error("the agent answered something else than was asked for: install one release throughout")]
    OtherAnswer,
    #[error(
        "the agent's list of {list} does not come to its end: the part after {after:?} says that the next one is after {next:?}; restart the agent, and report this"
    )]
    Loop {
        list: &'static str,
        after: String,
        next: String,
    },
    #[error(
        "the agent's list of {list} is longer than {} rows",
        listing::MAX_TOTAL
    )]
    TooLong { list: &'static str },
    #[error("the answer cannot be written as JSON: {source}")]
    Json {
        #[from]
        source: serde_json::Error,
    },
    #[error("cannot write to standard output: {source}")]
    Write { source: io::Error },
}

/// One sentence: what is wrong with the socket, and the remedy.
fn no_answer(socket: &Path, error: &ClientError) -> String {
    let path = socket.display();
    let running = "is the agent running? See `systemctl status ferrule-agent` or the DaemonSet's pod on this node; if it listens elsewhere, give --socket";
    match error {
        ClientError::Connect { source, .. } => match source.kind() {
            io::ErrorKind::NotFound => format!("there is no socket {path}: {running}"),
            io::ErrorKind::ConnectionRefused => format!("nobody listens at {path}: {running}"),
            io::ErrorKind::PermissionDenied => {
                format!("this user may not ask the agent at {path}: run it as root")
            }
            _ => format!("{error}: {running}"),
        },
        ClientError::Closed => format!(
            "the agent at {path} closed the connection without an answer: run this as root; if you did, {running}"
        ),
        ClientError::ConnectTimeout { .. } => format!("{error}: {running}"),
        ClientError::Timeout { .. } => {
            format!("no answer from {path}: {error}; its log may say why, or restart it")
        }
        ClientError::Io { .. }
        | ClientError::Protocol { .. }
        | ClientError::Unsendable { .. }
        | ClientError::Version { .. } => format!("no answer from {path}: {error}"),
    }
}

/// What will be printed, and with which exit code.
struct Shown {
    text: String,
    code: ExitCode,
}

/// Asks, prints and tells the exit code.
pub(crate) fn run(settings: &StatusSettings) -> ExitCode {
    let outcome = show(settings).and_then(|shown| {
        print(&shown.text)?;
        Ok(shown.code)
    });
    outcome.unwrap_or_else(|error| {
        let message = error.to_string();
        // Where stderr is closed as well, the exit code still tells.
        let _unheard = writeln!(io::stderr(), "ferrule-agent: {}", plain(&message));
        ExitCode::from(NO_ANSWER)
    })
}

fn show(settings: &StatusSettings) -> Result<Shown, StatusError> {
    let look = look(settings.color);
    let text = match &settings.listing {
        None => return show_status(settings, &look),
        Some(Listing::Services(listing)) => {
            listing::show::<FrontendRow>(settings, listing.interval, &look)?
        }
        Some(Listing::Pods(listing)) => listing::show::<PodRow>(settings, listing.interval, &look)?,
    };
    Ok(Shown {
        text,
        code: ExitCode::SUCCESS,
    })
}

fn show_status(settings: &StatusSettings, look: &Look) -> Result<Shown, StatusError> {
    let Answer::Status(status) = Agent::connect(&settings.socket)?.ask(Call::Status)? else {
        return Err(StatusError::OtherAnswer);
    };
    let text = match settings.output {
        Output::Text => text::render(&status, look),
        Output::Json => status_json(&status)?,
    };
    let code = match status.health {
        Health::Healthy => ExitCode::SUCCESS,
        Health::Degraded => ExitCode::from(DEGRADED),
    };
    Ok(Shown { text, code })
}

fn status_json(status: &Status) -> Result<String, StatusError> {
    #[derive(Serialize)]
    struct Versioned<'a> {
        version: u32,
        #[serde(flatten)]
        status: &'a Status,
    }
    pretty(&Versioned {
        version: OUTPUT_VERSION,
        status,
    })
}

/// Pretty JSON, a newline at its end.
fn pretty<T: Serialize>(value: &T) -> Result<String, StatusError> {
    let mut json = plain_json(&serde_json::to_string_pretty(value)?);
    json.push('\n');
    Ok(json)
}

/// A connection to the agent that names its socket in errors.
pub(crate) struct Agent<'a> {
    socket: &'a Path,
    client: Client,
}

impl<'a> Agent<'a> {
    pub(crate) fn connect(socket: &'a Path) -> Result<Self, StatusError> {
        let client = Client::connect(socket, PATIENCE).map_err(|source| StatusError::NoAnswer {
            socket: socket.to_owned(),
            source,
        })?;
        Ok(Self { socket, client })
    }

    pub(crate) fn ask(&mut self, call: Call) -> Result<Answer, StatusError> {
        match self.client.call(call) {
            Ok(Answer::Error(source)) => Err(StatusError::Refused {
                socket: self.socket.to_owned(),
                source,
            }),
            Ok(answer) => Ok(answer),
            Err(source) => Err(StatusError::NoAnswer {
                socket: self.socket.to_owned(),
                source,
            }),
        }
    }
}

/// How text looks here: colours and width.
fn look(choice: ColorChoice) -> Look {
    let stdout = io::stdout();
    let coloured = match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => stdout.is_terminal() && terminal_wants_colour(),
    };
    // Where stdout is no terminal this fails, and where the terminal does not
    // know its width it says 0.
    let width = rustix::termios::tcgetwinsize(&stdout)
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|columns| *columns > 0);
    Look {
        width: width.unwrap_or(DEFAULT_WIDTH),
        palette: if coloured {
            Palette::COLOURED
        } else {
            Palette::PLAIN
        },
    }
}

/// <https://no-color.org>: set and not empty means none.
fn terminal_wants_colour() -> bool {
    let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = env::var_os("TERM").is_some_and(|value| value == "dumb");
    !refused && !dumb
}

/// Prints all at once. A reader that has read enough (`| head`) is no error.
fn print(text: &str) -> Result<(), StatusError> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => {
            Err(StatusError::Write { source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
