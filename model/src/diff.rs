//! From observed to desired.
