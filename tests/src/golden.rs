//! Comparison with files below `tests/golden`; `UPDATE_GOLDEN=1` writes them.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use similar::TextDiff;

/// Compares `actual` with the golden file of that name.
///
/// # Errors
/// When they differ, with the difference; when there is no such file.
pub fn check(name: &str, actual: &str) -> anyhow::Result<()> {
    check_file(&folder().join(name), actual)
}

/// Compares `actual` with a file. Writing it prints what is new in it, to be read.
///
/// # Errors
/// When they differ, with the difference; when there is no such file.
pub fn check_file(path: &Path, actual: &str) -> anyhow::Result<()> {
    let name = path.display();
    if std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1") {
        let before = fs::read_to_string(path).unwrap_or_default();
        if before != actual || !path.exists() {
            let news = difference(&before, actual);
            writeln!(io::stdout(), "{name} is written anew:\n{news}")?;
            fs::write(path, actual).with_context(|| format!("write {name}"))?;
        }
        return Ok(());
    }
    let expected = fs::read_to_string(path)
        .with_context(|| format!("golden file {name}; UPDATE_GOLDEN=1 writes it\n{actual}"))?;
    if expected == actual {
        return Ok(());
    }
    bail!(
        "{name} differs; if that is right, UPDATE_GOLDEN=1 writes it\n{}",
        difference(&expected, actual)
    )
}

/// The lines in which two texts differ, with their neighbours.
#[must_use]
pub fn difference(expected: &str, actual: &str) -> String {
    TextDiff::from_lines(expected, actual)
        .unified_diff()
        .context_radius(2)
        .header("expected", "kernel")
        .to_string()
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}
