//! Where facts about the cluster come from.
//!
//! A source tells [`Update`]s over a bounded channel: first everything it has,
//! then what changes. It keeps the last good state of an object that it cannot
//! read any longer, and never tells that something is gone unless it is.

pub(crate) mod document;
pub(crate) mod folder;
mod tree;
pub(crate) mod watch;
mod yaml;

use std::time::Instant;

use ferrule_model::cluster::Event;

use self::folder::Report;

/// What a source tells at a time.
#[derive(Debug)]
pub(crate) struct Update {
    /// Changes, in order.
    pub(crate) events: Vec<Event>,
    /// Whether everything that the source holds has been told without a doubt.
    /// Before that nothing may be removed from the kernel.
    pub(crate) complete: bool,
    /// What is wrong with the source now, if that is news.
    pub(crate) report: Option<Report>,
    /// When the change was noticed.
    pub(crate) seen: Instant,
}
