//! Bodies that come at once or bit by bit.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::Frame;
use tokio::sync::mpsc;

/// What is sent next.
#[derive(Debug)]
pub(crate) enum Part {
    /// These bytes.
    Bytes(Bytes),
    /// The connection breaks.
    Break,
}

/// The body of an answer.
#[derive(Debug)]
pub struct Body {
    parts: mpsc::Receiver<Part>,
}

/// A connection that broke off.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection breaks off, as the test wants it")
    }
}

impl std::error::Error for Broken {}

impl From<Infallible> for Broken {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl Body {
    pub(crate) fn whole(text: String) -> Self {
        let (sender, body) = Self::channel(1);
        let _there_is_room = sender.try_send(Part::Bytes(text.into()));
        body
    }

    /// One that breaks off before it begins.
    pub(crate) fn broken() -> Self {
        let (sender, body) = Self::channel(1);
        let _there_is_room = sender.try_send(Part::Break);
        body
    }

    pub(crate) fn channel(room: usize) -> (mpsc::Sender<Part>, Self) {
        let (sender, parts) = mpsc::channel(room);
        (sender, Self { parts })
    }

    pub(crate) async fn next(&mut self) -> Option<Part> {
        self.parts.recv().await
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        self.parts.poll_recv(context).map(|part| {
            Some(match part? {
                Part::Bytes(bytes) => Ok(Frame::data(bytes)),
                Part::Break => Err(Broken),
            })
        })
    }
}
