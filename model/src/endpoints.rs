//! Which endpoints a frontend uses.
