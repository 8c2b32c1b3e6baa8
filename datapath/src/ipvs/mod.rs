//! The kernel's IPVS over generic netlink (family `IPVS`, version 1).
//!
//! The codec says everything that `linux/ip_vs.h` has about virtual services,
//! real servers, time-outs and the table, for both families. Attributes that it
//! does not know are passed over; one that is too short, or of a length that
//! cannot be, is an error that names it. [`Client`] sends and receives.
//!
//! Words are those of `ipvsadm(8)`: virtual service, real server.

mod attribute;
mod client;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod server;
mod service;
mod stats;
mod timeouts;

pub use client::{Client, Order};
pub use ferrule_model::service::ServiceKey;
pub use server::{ForwardMethod, RealServer, ServerSettings, Tunnel};
pub use service::{Service, ServiceFlags, ServiceSettings};
pub use stats::Stats;
pub use timeouts::{Info, Timeouts};
