//! How long packets of pods may be.
