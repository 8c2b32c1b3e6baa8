//! Ways in which a request goes wrong.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::body::{Body, Part};

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is refused with this code, and asked to come back after so many seconds.
    Status(u16, Option<u64>),
    /// There is no answer.
    Silent,
    /// The answer begins late.
    Late(Duration),
    /// The body breaks off after so many bytes.
    Break(usize),
    /// The body ends, as if that were all, after so many bytes.
    End(usize),
    /// Nothing comes after so many bytes, and the connection stays open.
    HalfOpen(usize),
    /// After so many bytes comes something that is no JSON, then the rest.
    Garbage(usize),
    /// The event that stands after so many bytes is cut off, then others follow.
    Cut(usize),
    /// The event that stands after so many bytes comes behind the one that follows it.
    Swap(usize),
}

/// How often what goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    random: Option<fastrand::Rng>,
    /// In percent of the requests.
    often: u32,
    /// A fixed list that comes before chance.
    next: Vec<Fault>,
    /// How long what hangs does so before the connection breaks; `None`: for ever.
    pub(crate) patience: Option<Duration>,
}

impl Faults {
    /// Nothing goes wrong.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// The next requests go wrong like this, one after the other.
    #[must_use]
    pub fn these(mut faults: Vec<Fault>) -> Self {
        faults.reverse();
        Self {
            next: faults,
            ..Self::default()
        }
    }

    /// So many percent of the requests go wrong in any way.
    #[must_use]
    pub fn often(percent: u32, seed: u64) -> Self {
        Self {
            random: Some(fastrand::Rng::with_seed(seed)),
            often: percent,
            ..Self::default()
        }
    }

    /// What hangs, or is late, does so no longer than this: a test with a clock
    /// that cannot be moved sees more faults in its time.
    #[must_use]
    pub fn no_longer_than(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    pub(crate) fn next(&mut self) -> Option<Fault> {
        if let Some(fault) = self.next.pop() {
            return Some(fault);
        }
        let random = self.random.as_mut()?;
        if random.u32(0..100) >= self.often {
            return None;
        }
        let bytes = random.usize(0..4000);
        Some(match random.u32(0..15) {
            0 => Fault::Status(429, Some(random.u64(0..5))),
            1 => Fault::Status(401, None),
            2 => Fault::Status(500, None),
            3 => Fault::Status(503, Some(1)),
            4 => Fault::Status(410, None),
            5 => Fault::Status(403, None),
            6 => Fault::Silent,
            7 => Fault::Late(Duration::from_secs(random.u64(0..40))),
            8 => Fault::Break(bytes),
            9 => Fault::End(bytes),
            10 => Fault::HalfOpen(bytes),
            11 => Fault::Garbage(bytes),
            12 => Fault::Cut(bytes),
            13 => Fault::Swap(bytes),
            _ => Fault::Status(404, None),
        })
    }
}

/// Lets a body go wrong.
pub(crate) fn spoil(mut body: Body, fault: Option<Fault>, patience: Option<Duration>) -> Body {
    let Some(fault) = fault else {
        return body;
    };
    let after = match fault {
        Fault::Break(after)
        | Fault::End(after)
        | Fault::HalfOpen(after)
        | Fault::Garbage(after)
        | Fault::Cut(after)
        | Fault::Swap(after) => after,
        Fault::Status(..) | Fault::Silent | Fault::Late(_) => return body,
    };
    let (out, spoiled) = Body::channel(1);
    tokio::spawn(async move {
        let mut left = after;
        let mut done = false;
        let mut held = None;
        while let Some(part) = body.next().await {
            let Part::Bytes(bytes) = part else {
                return;
            };
            if done || bytes.len() <= left {
                left = left.saturating_sub(bytes.len());
                let mut parts = [Some(bytes), held.take()];
                // Behind the end of a list would be an object that the list lacks.
                if parts[0].as_deref().is_some_and(ends_a_list) {
                    parts.reverse();
                }
                for bytes in parts.into_iter().flatten() {
                    if out.send(Part::Bytes(bytes)).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            done = true;
            if let Fault::Swap(_) = fault {
                held = Some(bytes);
            } else if at(&fault, &bytes, left, patience, &out).await.is_err() {
                return;
            }
        }
        if let Some(bytes) = held {
            let _the_client_is_gone = out.send(Part::Bytes(bytes)).await;
        }
    });
    spoiled
}

fn ends_a_list(event: &[u8]) -> bool {
    let mark = b"initial-events-end";
    event.windows(mark.len()).any(|part| part == mark)
}

struct Over;

impl From<mpsc::error::SendError<Part>> for Over {
    fn from(_: mpsc::error::SendError<Part>) -> Self {
        Self
    }
}

/// Does what goes wrong within `bytes`, `left` of which come as they are.
async fn at(
    fault: &Fault,
    bytes: &Bytes,
    left: usize,
    patience: Option<Duration>,
    out: &mpsc::Sender<Part>,
) -> Result<(), Over> {
    out.send(Part::Bytes(bytes.slice(..left))).await?;
    match fault {
        Fault::Break(_) => {
            out.send(Part::Break).await?;
            Err(Over)
        }
        Fault::End(_) => Err(Over),
        Fault::HalfOpen(_) => {
            match patience {
                None => out.closed().await,
                Some(patience) => {
                    let _closed = tokio::time::timeout(patience, out.closed()).await;
                    out.send(Part::Break).await?;
                }
            }
            Err(Over)
        }
        Fault::Garbage(_) => {
            let garbage = Bytes::from_static(b"\xff\xfe{]\n}}\n");
            out.send(Part::Bytes(garbage)).await?;
            Ok(out.send(Part::Bytes(bytes.slice(left..))).await?)
        }
        // Each event is a part of its own. Something is left of it: an event that is not
        // there at all is none that was cut off, and nobody could know of it.
        Fault::Cut(_) => Ok(out.send(Part::Bytes(Bytes::from_static(b"{\n"))).await?),
        Fault::Status(..) | Fault::Silent | Fault::Late(_) | Fault::Swap(_) => Ok(()),
    }
}
