//! The only crate that changes the node for services.
//!
//! [`Node`] is the kernel of one network namespace: [`Node::open`] prepares it,
//! [`Node::observe`] says what of ours is there, and [`apply()`] carries out
//! changes. What to change is decided elsewhere (`ferrule_model::diff`).

pub mod apply;
mod audit;
pub mod filter;
pub mod ipvs;
pub mod local_ports;
pub mod modules;
pub mod news;
mod node;
pub mod probe;
pub mod routes;
mod sysctl;
pub mod vip;

pub use apply::{Applied, ChangeError, Kernel, apply};
pub use audit::FilterDrift;
pub use ferrule_netlink::Error;
pub use node::{CleanupError, Node, ObserveError, OpenError, Settings, cleanup};
pub use sysctl::{SysctlError, ensure_forwarding};
