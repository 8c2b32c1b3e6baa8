//! The agent's parsers, for the fuzz targets.
//!
//! The files are the agent's own. What they need of their neighbours stands here:
//! a module that begins to use another one gets a line more.

#[path = "../../agent/src/links.rs"]
mod links;
#[path = "../../agent/src/server/request.rs"]
mod request;
#[path = "../../agent/src/source/"]
mod source {
    pub(crate) mod document;
    #[path = "kubernetes/wire.rs"]
    pub(crate) mod wire;
    mod yaml;
}

pub mod fuzz;
