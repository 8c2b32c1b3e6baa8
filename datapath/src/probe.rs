//! Whether the kernel can do what services need, found out without changing it.
//!
//! A question may have the kernel load the module that answers it; who does not
//! want that asks only where the module is there.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ferrule_model::names::IfName;
use ferrule_netlink::{Error, Protocol, Socket};
use netlink_packet_route::link::InfoKind;
use tokio::process::Command;
use tokio::time::timeout;

use crate::bindings;
use crate::ipvs;
use crate::node::OpenError;
use crate::vip::{DeviceError, VipDevice, is_of_kind, link_named};

/// How long a program may take that is asked for its version.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Whether there is IPVS.
///
/// # Errors
/// [`OpenError`], with a remedy.
pub async fn ipvs() -> Result<(), OpenError> {
    match ipvs::Client::open().await {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() => Err(OpenError::NoIpvs(error)),
        Err(error) => Err(OpenError::Socket(error)),
    }
}

/// Whether the VIP device exists.
///
/// # Errors
/// When the name belongs to another kind of device.
pub async fn vip_device(name: &IfName) -> Result<bool, DeviceError> {
    VipDevice::find(name).await.map(|found| found.is_some())
}

/// Whether a device on which VIPs are to be bound exists.
///
/// # Errors
/// When the kernel cannot tell VIPs there from others' addresses.
pub async fn alias_device(name: &IfName) -> Result<bool, DeviceError> {
    bindings::check_kernel(name)?;
    match VipDevice::find(name).await {
        // It is a device, and that is enough.
        Err(DeviceError::Taken { .. }) => Ok(true),
        found => found.map(|found| found.is_some()),
    }
}

/// Whether a device of this name is a bridge.
///
/// # Errors
/// When the kernel cannot be asked.
pub async fn is_bridge(name: &str) -> Result<bool, Error> {
    let socket = Socket::open(Protocol::Route)?;
    let link = link_named(&socket, name).await?;
    Ok(link.is_some_and(|link| is_of_kind(&link, InfoKind::Bridge)))
}

/// Makes a device for VIPs; to be called in a namespace that nobody uses.
///
/// # Errors
/// [`DeviceError`], with a remedy.
pub async fn make_device(name: &IfName) -> Result<(), DeviceError> {
    VipDevice::ensure(name).await.map(drop)
}

/// What a program prints when it is asked for its version.
///
/// # Errors
/// When it cannot be run, fails, or takes longer than five seconds.
pub async fn version_of(program: &Path) -> Result<String, std::io::Error> {
    let run = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(TIMEOUT, run)
        .await
        .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
    if !output.status.success() {
        return Err(std::io::Error::other(format!(
            "it ended with {}",
            output.status
        )));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The error of a question that we may not ask.
#[must_use]
pub fn is_forbidden(error: &Error) -> bool {
    matches!(
        error.errno(),
        Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS)
    )
}
