//! The only crate that changes the node for services.
//!
//! [`Node`] is the kernel of one network namespace: [`Node::open`] prepares it,
//! [`Node::observe`] says what of ours is there, and [`apply()`] carries out
//! changes. What to change is decided elsewhere (`ferrule_model::diff`).

pub mod apply;
mod audit;
pub mod bindings;
mod cleanup;
pub mod conntrack;
pub mod filter;
mod glimpse;
pub mod ipvs;
pub mod local_ports;
pub mod modules;
pub mod news;
mod node;
pub mod probe;
pub mod routes;
mod sysctl;
pub mod tuning;
pub mod vip;

pub use apply::{Applied, ChangeError, Kernel, apply};
pub use audit::FilterDrift;
pub use cleanup::{CleanupError, cleanup};
pub use ferrule_netlink::Error;
pub use node::{Node, ObserveError, OpenError, Settings};
pub use sysctl::{Changed, SysctlError, Sysctls, ensure_forwarding};
