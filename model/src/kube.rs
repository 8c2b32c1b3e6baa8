//! The parts of Kubernetes objects that Ferrule reads.
