//! The only crate that changes the node for services.
