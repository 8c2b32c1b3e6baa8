//! `demo`: what `make demo` shows. See [`ferrule_tests::demo`].

use std::io::{self, Write as _};
use std::process::ExitCode;

fn main() -> ExitCode {
    match ferrule_tests::demo::run(&mut io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _nowhere_else_to_say_it = writeln!(io::stderr(), "\ndemo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
