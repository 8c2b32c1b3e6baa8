//! Which address a pod gets.
