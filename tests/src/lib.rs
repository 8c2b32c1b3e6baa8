//! Tests of Ferrule against a real kernel: namespaces, packets, the real agent
//! and the real plugin.
//!
//! A test is a function that gets a [`context::Context`] and says why it failed;
//! [`runner`] gives it fresh namespaces and a folder, a limit of time, and looks
//! afterwards that nothing is left. [`cases`] lists the tests. What they build
//! on, from the ground up: [`netns`] and [`link`] make the networks, [`sock`]
//! speaks through them, [`process`] starts programs in them, [`node`] and [`pod`]
//! are a node with the agent and a pod that the plugin made, [`runtime`] is the
//! node's containerd, [`http`] asks the agent as balancers do, [`api`] is a cluster's API beside them, [`disk`] one that
//! fills up, [`dump`] reads the
//! kernel back, [`golden`] compares. [`scenario`] runs the folders of `tests/scenarios`.
//!
//! Nothing here but `cases::codec` and what speaks through the agent's socket
//! (`cases::socket`, `cases::start`, `cases::walk`), and the scenarios, use Ferrule's own crates: the agent is known by its command
//! line, the plugin by the CNI specification, both by what the kernel then holds.
//! Namespaces, mounts and sockets are made by system call; programs such as
//! `ip` serve to set up and to read back, because under emulation each start of
//! a process costs a tenth of a second.

pub mod api;
pub mod cases;
pub mod chain;
pub mod context;
pub mod demo;
pub mod disk;
pub mod dump;
pub mod golden;
pub mod http;
pub mod link;
pub mod netns;
pub mod node;
pub mod pod;
pub mod process;
pub mod random;
pub mod runner;
pub mod runtime;
pub mod scenario;
pub mod sock;
pub mod wait;

// The agent's own readers of configuration and manifests, so that a scenario means here
// what it means there. They find each other by these names.
#[path = "../../agent/src/config.rs"]
#[expect(dead_code, reason = "what concerns the agent alone")]
mod config;
#[path = "../../agent/src/plain_file.rs"]
mod plain_file;
#[path = "../../agent/src/source/"]
mod source {
    #[expect(dead_code, reason = "what concerns the agent alone")]
    pub(crate) mod document;
    mod yaml;
}
