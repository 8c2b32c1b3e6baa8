//! Whether a path leads to a file that can be read to its end. A pipe in its place
//! would keep who reads it waiting for ever, and a device would never end.

use std::io;
use std::path::Path;

/// Longest file of configuration or credentials, in bytes.
const LONGEST: u64 = 16 * 1024 * 1024;

/// Looks before a file is read. What is put there a moment later is not guarded
/// against: only who may write there could do so.
///
/// # Errors
/// When it is no file, is too long, or cannot be looked at.
pub(crate) fn check(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    if !metadata.is_file() {
        let words = "it is a pipe, a socket or a device; put a file there";
        return Err(io::Error::other(words));
    }
    if metadata.len() > LONGEST {
        let words = format!("it is longer than {LONGEST} bytes; put the right file there");
        return Err(io::Error::other(words));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_of_sensible_length_will_do() {
        // The tests against a kernel include this file, too, and have no tempfile.
        let folder = std::env::temp_dir().join(format!("plain-file.{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = |name: &str| folder.join(name);
        std::fs::write(path("file"), "x").unwrap();
        check(&path("file")).unwrap();
        let said = |name: &str| check(&path(name)).unwrap_err().to_string();
        assert!(said("absent").contains("No such file"));
        assert!(said(".").contains("directory"));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        assert!(said("pipe").contains("a pipe"));
        let long = std::fs::File::create(path("long")).unwrap();
        long.set_len(LONGEST + 1).unwrap();
        assert!(said("long").contains("longer than"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
