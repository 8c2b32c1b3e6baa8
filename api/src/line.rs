//! One message, one line: how a value becomes bytes and comes back.
//!
//! Both sides use it. It never reads or writes a socket; whoever does has to
//! stop at [`MAX_LINE`] bytes without a newline.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::MAX_LINE;

/// Why a line is no message, or a message no line.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// More than [`MAX_LINE`] bytes.
    #[error("a message of {length} bytes is longer than the {MAX_LINE} bytes allowed")]
    TooLong {
        /// Bytes of the line, its newline included.
        length: usize,
    },
    /// Nothing between two newlines.
    #[error("the line is empty")]
    Empty,
    /// The bytes are no text.
    #[error("the line is not UTF-8 from column {column}")]
    NotUtf8 {
        /// First bad byte, counted from one.
        column: usize,
    },
    /// The text is no JSON object.
    #[error("the line is not JSON at column {column}: {source}")]
    NotJson {
        /// Where the parser stopped, counted from one.
        column: usize,
        /// What it said.
        source: serde_json::Error,
    },
    /// JSON, but not a message of this protocol: the reason names the unknown
    /// call or the field that is missing or wrong.
    #[error("the message is not understood: {source}")]
    NotUnderstood {
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// More came after the line, although nothing was asked for yet.
    #[error("more bytes follow the line that answers the call")]
    Trailing,
    /// The value cannot be written as JSON.
    #[error("the message cannot be written as JSON: {source}")]
    Unwritable {
        /// What the serializer said.
        source: serde_json::Error,
    },
}

/// Writes a message as one line, its newline included.
///
/// # Errors
/// When the line would be longer than [`MAX_LINE`] or the value is no JSON.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    // serde_json escapes newlines in strings and writes none of its own, so
    // the one pushed here is the only one.
    let mut line =
        serde_json::to_vec(message).map_err(|source| FrameError::Unwritable { source })?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(FrameError::TooLong { length: line.len() });
    }
    Ok(line)
}

/// Reads a message from one line, with or without its newline.
///
/// # Errors
/// Names what is wrong with the line, and where.
pub fn decode<T: DeserializeOwned>(line: &[u8]) -> Result<T, FrameError> {
    if line.len() > MAX_LINE {
        return Err(FrameError::TooLong { length: line.len() });
    }
    let text = std::str::from_utf8(line).map_err(|error| FrameError::NotUtf8 {
        column: error.valid_up_to() + 1,
    })?;
    if text.trim().is_empty() {
        return Err(FrameError::Empty);
    }
    serde_json::from_str(text).map_err(|source| match source.classify() {
        Category::Data => FrameError::NotUnderstood { source },
        Category::Syntax | Category::Eof | Category::Io => FrameError::NotJson {
            column: source.column(),
            source,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Answer, CallError, ErrorCode, Reply, Request};

    const ALLOCATE: &str = r#"{"version":1,"call":"allocate","attachment":{"container_id":"abc","interface":"eth0"},"pod":{"namespace":"default","name":"web"}}"#;

    #[test]
    fn a_message_is_one_line_and_comes_back() {
        let request: Request = decode(ALLOCATE.as_bytes()).unwrap();
        let line = encode(&request).unwrap();
        assert_eq!(
            line.iter().position(|byte| *byte == b'\n'),
            Some(line.len() - 1)
        );
        assert_eq!(line, format!("{ALLOCATE}\n").as_bytes());
        assert_eq!(decode::<Request>(&line).unwrap(), request);
        let reply = Reply::new(Answer::Error(CallError {
            code: ErrorCode::PoolExhausted,
            message: "two\nlines".to_owned(),
        }));
        let line = encode(&reply).unwrap();
        assert_eq!(
            line.iter().position(|byte| *byte == b'\n'),
            Some(line.len() - 1)
        );
        assert_eq!(decode::<Reply>(&line).unwrap(), reply);
    }

    #[test]
    fn fields_of_a_later_version_are_let_pass() {
        let line = ALLOCATE.replace("\"version\"", "\"later\":{\"a\":[1]},\"version\"");
        assert!(decode::<Request>(line.as_bytes()).is_ok());
    }

    #[test]
    fn errors_say_what_and_where() {
        let said = |line: &[u8]| decode::<Request>(line).unwrap_err().to_string();
        assert_eq!(said(b"\n"), "the line is empty");
        assert_eq!(
            said(b"{\"a\xff\":1}"),
            "the line is not UTF-8 from column 4"
        );
        assert!(said(b"{\"version\":1,,}").contains("not JSON at column 14"));
        assert!(said(b"{\"version\":1").contains("not JSON at column 12"));
        assert!(said(br#"{"version":1,"call":"fly"}"#).contains("unknown variant `fly`"));
        assert!(said(br#"{"call":"fly"}"#).contains("version"));
        assert!(said(ALLOCATE.replace("\"abc\"", "\"../x\"").as_bytes()).contains("../x"));
        assert!(said(&vec![b' '; MAX_LINE + 1]).contains("65537 bytes"));
        let nested = format!("{{\"version\":1,\"x\":{}", "[".repeat(MAX_LINE - 20));
        assert!(said(nested.as_bytes()).contains("recursion limit"));
    }

    #[test]
    fn a_message_too_long_is_not_sent() {
        let reply = Reply::new(Answer::Error(CallError {
            code: ErrorCode::Internal,
            message: "x".repeat(MAX_LINE),
        }));
        assert!(matches!(encode(&reply), Err(FrameError::TooLong { .. })));
    }
}
