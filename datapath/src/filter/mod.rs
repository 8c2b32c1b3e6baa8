//! Our nftables table: the guard and source NAT.
//!
//! The ruleset is text that the program `nft` loads, once at the start
//! (in `ruleset`); the elements of its sets come and go over netlink
//! (in `elements`, of what is in `element`), which is a thousand times cheaper. Whether the table is still
//! what was loaded is told over netlink, too (in `inspect`). Hooks and priorities
//! are in the table of ARCHITECTURE.md, the reasons in ADR 1.

pub mod counters;
mod element;
mod elements;
mod inspect;
mod ruleset;

pub use element::{Element, Swap};
pub use elements::{Elements, Strange};
#[cfg(feature = "fuzzing")]
pub use inspect::fuzz;
pub use inspect::{TableState, counters, generation, table};
pub(crate) use ruleset::SOURCE_NAT_CHAINS;
pub use ruleset::{RulesetError, check, load, load_anew, remove};
