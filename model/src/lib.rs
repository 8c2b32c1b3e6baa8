//! Ferrule's decisions, without I/O.
//!
//! Facts about the cluster come in ([`kube`] objects, gathered in
//! [`cluster::ClusterState`]), what this node should have programmed comes out
//! ([`desired::Desired`]), and [`diff`] says how to get there from what the
//! kernel was observed to hold ([`observed::Observed`]). The same facts always
//! give the same result, byte for byte. Reading files, talking to the kernel
//! and waiting are the business of other crates; this one has no dependency
//! that could do any of it.

pub mod address;
pub mod binding;
pub mod change;
pub mod cluster;
pub mod condition;
pub mod desired;
pub mod diff;
pub mod drain;
pub mod endpoints;
pub mod frontend;
mod health_checks;
pub mod host_ports;
pub mod ipam;
pub mod kube;
pub mod marks;
pub mod names;
pub mod network;
pub mod observed;
pub mod ownership;
pub mod plan;
mod planner;
#[cfg(feature = "fuzzing")]
pub mod planted;
mod policy_words;
pub mod routes;
pub mod scheduling;
mod scope;
pub mod service;
pub mod source_nat;
mod source_ranges;
pub mod time;
pub mod trace;
pub mod verdict;
pub mod view;
mod vips;
