//! One small layer over netlink-proto.
