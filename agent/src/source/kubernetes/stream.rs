//! Bodies of answers: whole, or line by line, within bounds of size and time.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use kube_client::client::Body;
use tokio::time::{Instant, timeout, timeout_at};

use super::failure::{Cause, Failure, chain};

/// Most bytes of a page, and of a list from a server that knows no pages.
const LONGEST_PAGE: usize = 512 * 1024 * 1024;

/// Most bytes of an event; an object has 1.5 MB at most, and as much again of
/// what the server adds.
const LONGEST_FRAME: usize = 16 * 1024 * 1024;

/// How long the body of a list may pause.
const PAGE_SILENCE: Duration = Duration::from_secs(30);

/// How long it may take altogether: who sends a byte now and then is not silent.
const PAGE_TIME: Duration = Duration::from_mins(5);

/// A body, of whatever it is made.
pub(super) trait Parts:
    hyper::body::Body<Data = Bytes, Error: std::error::Error> + Unpin
{
}

impl<B: hyper::body::Body<Data = Bytes, Error: std::error::Error> + Unpin> Parts for B {}

/// The whole body of an answer.
pub(super) async fn whole<B: Parts>(body: B) -> Result<Vec<u8>, Failure> {
    timeout(PAGE_TIME, all_of(body))
        .await
        .unwrap_or_else(|_| Err(silent(format!("a list took more than {PAGE_TIME:?}"))))
}

async fn all_of<B: Parts>(mut body: B) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    loop {
        let frame = timeout(PAGE_SILENCE, body.frame())
            .await
            .map_err(|_| silent(format!("a list paused for more than {PAGE_SILENCE:?}")))?;
        let Some(frame) = frame else {
            return Ok(bytes);
        };
        let frame = frame.map_err(|error| silent(chain(&error)))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > LONGEST_PAGE {
            return Err(Failure::nonsense(format!(
                "a list of more than {LONGEST_PAGE} bytes"
            )));
        }
        bytes.extend_from_slice(&data);
    }
}

/// The lines of a body.
pub(super) struct Frames<B = Body> {
    body: B,
    buffer: BytesMut,
    /// Up to where there is no end of line.
    searched: usize,
}

impl<B: Parts> Frames<B> {
    pub(super) fn new(body: B) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
        }
    }

    fn end_of_line(&mut self) -> Option<usize> {
        let end = self.buffer[self.searched..]
            .iter()
            .position(|b| *b == b'\n');
        let end = end.map(|end| end + self.searched);
        self.searched = end.unwrap_or(self.buffer.len());
        end
    }

    /// Whether the next line is here already.
    pub(super) fn has_line(&mut self) -> bool {
        self.end_of_line().is_some()
    }

    /// The next line; `None` at the end. What is left behind the last line was
    /// cut off, and is no line. A part of one, or a blank one, is no sign of life.
    pub(super) async fn next(&mut self, longest: Duration) -> Result<Option<BytesMut>, Failure> {
        let deadline = Instant::now() + longest;
        loop {
            if let Some(end) = self.end_of_line() {
                let mut line = self.buffer.split_to(end + 1);
                self.searched = 0;
                line.truncate(end);
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return Ok(Some(line));
            }
            let frame = timeout_at(deadline, self.body.frame())
                .await
                .map_err(|_| silent(format!("the server was silent for {longest:?}")))?;
            let Some(frame) = frame else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| silent(chain(&error)))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if self.buffer.len() + data.len() > LONGEST_FRAME + 1 {
                let words = format!("an event of more than {LONGEST_FRAME} bytes");
                return Err(Failure::nonsense(words));
            }
            self.buffer.extend_from_slice(&data);
        }
    }
}

fn silent(words: String) -> Failure {
    Failure::new(Cause::Unreachable, words)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http_body_util::StreamBody;
    use hyper::body::Frame;

    use super::*;

    /// A body that says `part` every ten seconds, without an end.
    fn dripping(part: &'static [u8]) -> impl Parts {
        let parts = stream::unfold((), move |()| async move {
            tokio::time::sleep(Duration::from_secs(10)).await;
            let frame = Frame::data(Bytes::from_static(part));
            Some((Ok::<_, Infallible>(frame), ()))
        });
        StreamBody::new(Box::pin(parts))
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_line_is_no_sign_of_life() {
        for part in [&b"\n"[..], b" ", b"x"] {
            let mut frames = Frames::new(dripping(part));
            let failure = frames.next(Duration::from_mins(1)).await.unwrap_err();
            assert_eq!(failure.cause, Cause::Unreachable, "{}", failure.words);
        }
        let mut frames = Frames::new(dripping(b"{}\n"));
        for _ in 0..20 {
            let line = frames.next(Duration::from_mins(1)).await.unwrap();
            assert_eq!(line.unwrap(), "{}");
        }
        let failure = whole(dripping(b"x")).await.unwrap_err();
        assert_eq!(failure.cause, Cause::Unreachable, "{}", failure.words);
    }
}
