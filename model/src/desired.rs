//! What this node should have programmed.
