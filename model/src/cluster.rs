//! Facts about the cluster.
