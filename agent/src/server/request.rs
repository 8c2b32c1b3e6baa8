//! From a line of the socket to a request, and what is said of one that is none.
//!
//! It knows bytes only; who sent them, and how slowly, is its caller's business.

use ferrule_api::status::cut;
use ferrule_api::{CallError, ErrorCode, FrameError, MAX_LINE, Request, VERSION};

/// The version is looked at before the rest: another generation's call would
/// otherwise be reported as one that is not understood.
pub(crate) fn parse(line: &[u8]) -> Result<Request, CallError> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    if line.last() != Some(&b'\n') {
        return Err(bad_request(format!(
            "a request is one line of at most {MAX_LINE} bytes that ends with a newline; got {} bytes without one",
            line.len()
        )));
    }
    let bad = |error: FrameError| bad_request(error.to_string());
    let Versioned { version } = ferrule_api::decode(line).map_err(bad)?;
    if version != VERSION {
        return Err(bad_request(format!(
            "version {version} of the protocol is not spoken here, only {VERSION}; install plugin and agent of one release"
        )));
    }
    let request: Request = ferrule_api::decode(line).map_err(bad)?;
    #[cfg(feature = "fuzzing")]
    if let ferrule_api::Call::Release { attachment } = &request.call {
        let name = attachment.interface.as_str();
        ferrule_model::planted::bug(
            "socket-request",
            [name.len() > 3, name.len() > 4, name.len() > 5],
        );
    }
    Ok(request)
}

/// What is answered to a line that is no request, or none in time.
pub(crate) fn bad_request(mut message: String) -> CallError {
    // It quotes what came, and that may be as long as a line.
    cut(&mut message);
    CallError {
        code: ErrorCode::BadRequest,
        message,
    }
}
