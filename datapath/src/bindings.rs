//! The ways in which VIPs are bound, and the VIPs that are.
//!
//! IPVS takes requests on their way to a local socket, so the kernel must hold a VIP
//! for local: by an address of the VIP device ([`crate::vip`]), by a local route
//! ([`routes`]) or by an address of a device that is another's ([`aliases`]). Which way
//! a VIP goes is decided elsewhere; here all three are made, found and undone, for what
//! a former configuration left must be found, too.

mod aliases;
mod routes;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ferrule_model::binding::{Binding, VipBinding};
use ferrule_model::names::IfName;
use ferrule_netlink::{Error, Protocol, Socket};

pub(crate) use self::aliases::{check_kernel, is_alias};
pub(crate) use self::routes::vip_of;
use crate::vip::{DeviceError, VipDevice};

/// One VIP and one way in which it is bound, or is to be.
pub type Bound = (IpAddr, Binding);

/// The way to all bindings of a network namespace.
#[derive(Debug)]
pub struct Bindings {
    socket: Socket,
    vip_device: IfName,
    wanted: VipBinding,
    /// Absent where VIPs are bound otherwise and nothing is left of a former time.
    device: Option<VipDevice>,
}

impl Bindings {
    /// Prepares for VIPs to be bound as wanted, in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn open(vip_device: &IfName, wanted: &VipBinding) -> Result<Self, DeviceError> {
        let device = match wanted {
            VipBinding::Address => Some(VipDevice::ensure(vip_device).await?),
            VipBinding::Route => Self::leftover(vip_device).await?,
            VipBinding::Device(device) => {
                check_kernel(device)?;
                Self::leftover(vip_device).await?
            }
        };
        Ok(Self {
            socket: Self::socket(vip_device)?,
            vip_device: vip_device.clone(),
            wanted: wanted.clone(),
            device,
        })
    }

    /// What there is, whichever way is wanted; makes nothing. A device of the name that
    /// is no dummy is another's.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn find(vip_device: &IfName) -> Result<Self, DeviceError> {
        Ok(Self {
            socket: Self::socket(vip_device)?,
            vip_device: vip_device.clone(),
            wanted: VipBinding::Route,
            device: Self::leftover(vip_device).await?,
        })
    }

    fn socket(vip_device: &IfName) -> Result<Socket, DeviceError> {
        Socket::open(Protocol::Route).map_err(|source| DeviceError::Kernel {
            action: "find",
            device: vip_device.clone(),
            source,
        })
    }

    async fn leftover(vip_device: &IfName) -> Result<Option<VipDevice>, DeviceError> {
        match VipDevice::find(vip_device).await {
            Err(DeviceError::Taken { .. }) => Ok(None),
            found => found,
        }
    }

    /// Every binding that is ours. Every host address of the VIP device is.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn list(&self) -> Result<BTreeSet<Bound>, Error> {
        let mut bound = BTreeSet::new();
        if let Some(device) = &self.device {
            let addresses = device.addresses().await?;
            bound.extend(addresses.into_iter().map(|ip| (ip, Binding::Address)));
        }
        bound.extend(routes::list(&self.socket).await?);
        bound.extend(aliases::list(&self.socket, self.device_index()).await?);
        Ok(bound)
    }

    /// Binds VIPs. What is there already is fine. The i-th result is that of the i-th.
    pub async fn bind(&self, bound: &[Bound]) -> Vec<Result<(), Error>> {
        let mut results = Results::of(bound);
        let addresses = results.addresses();
        let made = match &self.device {
            Some(device) => device.bind(&results.ips(&addresses)).await,
            None => addresses
                .iter()
                .map(|_| Err(gone(&self.vip_device)))
                .collect(),
        };
        results.put(&addresses, made);
        let routes = results.routes();
        let made = routes::bind(&self.socket, &results.bound(&routes)).await;
        results.put(&routes, made);
        let aliases = results.aliases();
        let made = aliases::bind(&self.socket, &results.bound(&aliases)).await;
        results.put(&aliases, made);
        results.done()
    }

    /// Undoes bindings. What is gone already is fine. The i-th result is that of the i-th.
    pub async fn unbind(&self, bound: &[Bound]) -> Vec<Result<(), Error>> {
        let mut results = Results::of(bound);
        let addresses = results.addresses();
        let undone = match &self.device {
            Some(device) => device.unbind(&results.ips(&addresses)).await,
            // They went with it.
            None => addresses.iter().map(|_| Ok(())).collect(),
        };
        results.put(&addresses, undone);
        let routes = results.routes();
        let undone = routes::unbind(&self.socket, &results.bound(&routes)).await;
        results.put(&routes, undone);
        let aliases = results.aliases();
        let undone = aliases::unbind(&self.socket, &results.bound(&aliases)).await;
        results.put(&aliases, undone);
        results.done()
    }

    /// Whether the VIP device was another and had to be made anew, or found. Where VIPs
    /// are bound otherwise none is made.
    ///
    /// # Errors
    /// [`DeviceError`].
    pub async fn ensure_device(&mut self) -> Result<bool, DeviceError> {
        if self.wanted != VipBinding::Address {
            self.device = Self::leftover(&self.vip_device).await?;
            return Ok(false);
        }
        // Renamed it has our VIPs still, and beside another one they would be a foreign device's.
        if VipDevice::find(&self.vip_device).await?.is_none()
            && let Some(device) = &self.device
            && device.take_name_back().await?
        {
            return Ok(true);
        }
        let device = VipDevice::ensure(&self.vip_device).await?;
        let another = Some(device.index()) != self.device_index();
        if another {
            self.device = Some(device);
        }
        Ok(another)
    }

    /// Index of the VIP device, where there is one.
    #[must_use]
    pub fn device_index(&self) -> Option<u32> {
        self.device.as_ref().map(VipDevice::index)
    }

    /// Removes the VIP device. One that is gone is fine.
    ///
    /// # Errors
    /// [`Error`]; it stays then.
    pub async fn remove_device(&mut self) -> Result<(), Error> {
        if let Some(device) = &self.device {
            device.remove().await?;
        }
        self.device = None;
        Ok(())
    }

    /// Removes the VIP device where VIPs are bound otherwise and none is left on it.
    /// Whether it was removed.
    ///
    /// # Errors
    /// [`Error`]; it stays then.
    pub async fn remove_unused_device(&mut self) -> Result<bool, Error> {
        let Some(device) = &self.device else {
            return Ok(false);
        };
        if self.wanted == VipBinding::Address || !device.addresses().await?.is_empty() {
            return Ok(false);
        }
        self.remove_device().await?;
        Ok(true)
    }
}

fn gone(device: &IfName) -> Error {
    Error::Refused {
        errno: rustix::io::Errno::NODEV,
        reason: Some(format!("there is no device {device}")),
    }
}

/// One result for each of several bindings, that are carried out way by way.
struct Results<'a> {
    bound: &'a [Bound],
    results: Vec<Result<(), Error>>,
}

impl<'a> Results<'a> {
    fn of(bound: &'a [Bound]) -> Self {
        // One without a result must not pass for one that was made.
        let results = bound.iter().map(|_| Err(Error::Closed)).collect();
        Self { bound, results }
    }

    fn those(&self, which: impl Fn(&Binding) -> bool) -> Vec<usize> {
        let all = self.bound.iter().enumerate();
        let those = all.filter(|(_, (_, binding))| which(binding));
        those.map(|(index, _)| index).collect()
    }

    fn addresses(&self) -> Vec<usize> {
        self.those(|binding| matches!(binding, Binding::Address))
    }

    fn routes(&self) -> Vec<usize> {
        self.those(|binding| matches!(binding, Binding::Route { .. }))
    }

    fn aliases(&self) -> Vec<usize> {
        self.those(|binding| matches!(binding, Binding::Alias { .. }))
    }

    fn bound(&self, which: &[usize]) -> Vec<&'a Bound> {
        which
            .iter()
            .filter_map(|index| self.bound.get(*index))
            .collect()
    }

    fn ips(&self, which: &[usize]) -> Vec<IpAddr> {
        self.bound(which).into_iter().map(|(ip, _)| *ip).collect()
    }

    fn put(&mut self, which: &[usize], results: Vec<Result<(), Error>>) {
        for (index, result) in which.iter().zip(results) {
            if let Some(slot) = self.results.get_mut(*index) {
                *slot = result;
            }
        }
    }

    fn done(self) -> Vec<Result<(), Error>> {
        self.results
    }
}
