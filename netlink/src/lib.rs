//! One small layer over `netlink-proto`.
//!
//! It sends requests in batches that are bounded, gives up after a time, and
//! returns dumps that are complete or an error. What the messages mean is the
//! business of its users: here they are a type and bytes ([`RawMessage`]), so
//! that one layer serves routing, generic netlink and netfilter, and so that a
//! reply that cannot be decoded is an error of the one who asked instead of a
//! line in a log.
//!
//! A [`Socket`] belongs to the network namespace in which the calling thread
//! was when it was opened, and so does a [`Monitor`], which hears what changes.

mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
pub mod generic;
mod message;
mod monitor;
pub mod route;
mod socket;

pub use error::Error;
pub use message::RawMessage;
pub use monitor::Monitor;
pub use socket::{MAX_BATCH, Protocol, Socket};
