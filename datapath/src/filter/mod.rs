//! Our nftables table: the guard.
//!
//! The ruleset is text that the program `nft` loads, once at the start
//! (in `ruleset`); the elements of its sets come and go over netlink
//! (in `elements`), which is a thousand times cheaper. Hooks and priorities are
//! in the table of ARCHITECTURE.md, the reasons in ADR 1.

mod elements;
mod ruleset;

pub use elements::{Element, Elements};
pub use ruleset::{RulesetError, load, remove};
