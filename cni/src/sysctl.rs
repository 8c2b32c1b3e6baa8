//! Settings of one interface below `/proc/sys/net`, in the namespace that the
//! calling thread is in.

use std::fs;
use std::io;
use std::path::PathBuf;

use ferrule_model::names::IfName;

use crate::failure::{Code, Failure};

/// A setting that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {value} to {}: {source}", path.display())]
pub(crate) struct SysctlError {
    path: PathBuf,
    value: &'static str,
    source: io::Error,
}

impl From<SysctlError> for Failure {
    fn from(error: SysctlError) -> Self {
        Self::new(Code::Io, error.to_string())
    }
}

/// A setting of an interface and its value.
pub(crate) type Setting = (Family, &'static str, &'static str);

/// Half of the tree.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Family {
    Ipv4,
    Ipv6,
}

/// No duplicate-address detection: on a link with two ends that we number
/// ourselves it finds nothing, and keeps the link-local address unusable for
/// one to three seconds.
pub(crate) const NO_DAD: Setting = (Family::Ipv6, "accept_dad", "0");

/// Redirects make no sense where the link has one neighbour only.
pub(crate) const NO_REDIRECTS: Setting = (Family::Ipv4, "send_redirects", "0");

/// No pod is a router of its node.
pub(crate) const NO_ADVERTISEMENTS: Setting = (Family::Ipv6, "accept_ra", "0");

/// Some runtimes start containers with IPv6 off in `conf/default`.
pub(crate) const IPV6_ON: Setting = (Family::Ipv6, "disable_ipv6", "0");

/// For a device that carries the frames of others and none of its own.
pub(crate) const IPV6_OFF: Setting = (Family::Ipv6, "disable_ipv6", "1");

/// Writes settings of an interface, each only if it has another value: a write
/// takes the kernel's one lock over all network configuration, a read does not.
///
/// A setting that this kernel does not have is passed over.
pub(crate) fn apply(interface: &IfName, settings: &[Setting]) -> Result<(), SysctlError> {
    for (family, name, value) in settings {
        let family = match family {
            Family::Ipv4 => "ipv4",
            Family::Ipv6 => "ipv6",
        };
        // An IfName has neither '/' nor is it "..".
        let path = PathBuf::from(format!("/proc/sys/net/{family}/conf/{interface}/{name}"));
        let write = || {
            if fs::read_to_string(&path)?.trim() == *value {
                return Ok(());
            }
            fs::write(&path, value)
        };
        match write() {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(SysctlError {
                    path,
                    value,
                    source,
                });
            }
        }
    }
    Ok(())
}
