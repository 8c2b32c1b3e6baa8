//! Whether the kernel still is what we made it, as far as that takes more than
//! reading: the nftables table and the VIP device, which are also put back here.

use ferrule_model::source_nat::SourceNat;
use ferrule_netlink::{Error, Socket};
use rustix::io::Errno;

use crate::filter::{self, TableState};
use crate::node::{Node, ObserveError, OpenError, Settings};
use crate::vip::VipDevice;

/// What was wrong with our table and was put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterDrift {
    /// It was gone.
    Missing,
    /// A rule, chain or set of it was another.
    Changed,
}

/// Loads the ruleset and returns what the table is like from then on.
pub(crate) async fn load_filter(
    settings: &Settings,
    socket: &Socket,
    nat: &SourceNat,
) -> Result<[u8; 32], OpenError> {
    let name = &settings.nft_table;
    let unread = |source| OpenError::ReadBack {
        table: name.clone(),
        source,
    };
    let before = filter::table(socket, name).await.map_err(unread)?;
    let chains = before.map_or_else(Vec::new, |state| state.chains);
    filter::load(&settings.nft_program, name, nat, &chains).await?;
    let after = filter::table(socket, name).await.map_err(unread)?;
    after.map(|state| state.fingerprint).ok_or_else(|| {
        unread(Error::Refused {
            errno: Errno::NOENT,
            reason: Some("removed by another while it was loaded".to_owned()),
        })
    })
}

impl Node {
    /// Makes source NAT as described. Whether that changed anything.
    ///
    /// # Errors
    /// [`OpenError`]; the rules stay what they were.
    pub async fn set_source_nat(&mut self, nat: &SourceNat) -> Result<bool, OpenError> {
        if self.nat == *nat {
            return Ok(false);
        }
        self.fingerprint = load_filter(&self.settings, &self.netfilter, nat).await?;
        self.nat = nat.clone();
        Ok(true)
    }

    /// The generation of the kernel's ruleset, if it is another than when the
    /// table was last compared. Costs one message.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn filter_moved(&self) -> Result<Option<u32>, ObserveError> {
        let generation = filter::generation(&self.netfilter).await;
        let generation =
            generation.map_err(ObserveError::of("the generation of the nftables ruleset"))?;
        Ok((self.generation != Some(generation)).then_some(generation))
    }

    /// Notes that the table and its sets were compared at this generation.
    pub fn filter_compared(&mut self, generation: u32) {
        self.generation = Some(generation);
    }

    /// What is wrong with chains, rules and sets of our table, elements aside. Changes nothing.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn filter_drift(&self) -> Result<Option<FilterDrift>, ObserveError> {
        let state = filter::table(&self.netfilter, &self.settings.nft_table).await;
        let state = state.map_err(ObserveError::of("our nftables table"))?;
        Ok(match state {
            None => Some(FilterDrift::Missing),
            Some(TableState { fingerprint, .. }) if fingerprint != self.fingerprint => {
                Some(FilterDrift::Changed)
            }
            Some(_) => None,
        })
    }

    /// Loads our table anew; elements of its sets stay, if it was there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn repair_filter(&mut self) -> Result<(), OpenError> {
        self.fingerprint = load_filter(&self.settings, &self.netfilter, &self.nat).await?;
        Ok(())
    }

    /// Whether the VIP device was another and had to be made anew, or found.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn ensure_device(&mut self) -> Result<bool, OpenError> {
        let device = VipDevice::ensure(&self.settings.vip_device).await?;
        let another = device.index() != self.device.index();
        if another {
            self.device = device;
        }
        Ok(another)
    }

    /// Index of the VIP device.
    #[must_use]
    pub fn device_index(&self) -> u32 {
        self.device.index()
    }

    /// Packets by the name of the counter in our table.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn packet_counters(
        &self,
    ) -> Result<std::collections::BTreeMap<String, u64>, ObserveError> {
        let counters = filter::counters(&self.netfilter, &self.settings.nft_table).await;
        let counters = counters.map_err(ObserveError::of("the counters of our nftables table"))?;
        Ok(counters
            .into_iter()
            .map(|(name, (packets, _bytes))| (name, packets))
            .collect())
    }
}
