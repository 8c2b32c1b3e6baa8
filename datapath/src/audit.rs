//! Whether the kernel still is what we made it, as far as that takes more than
//! reading: the nftables table and the VIP device, which are also put back here.

use ferrule_model::source_nat::SourceNat;
use ferrule_netlink::{Error, Socket};
use rustix::io::Errno;
use tracing::warn;

use crate::filter::{self, Elements, RulesetError, TableState};
use crate::node::{Node, ObserveError, OpenError, Settings};

/// What was wrong with our table and was put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FilterDrift {
    /// It was gone.
    Missing,
    /// A rule, chain or set of it was another.
    Changed,
}

/// Our table as it was loaded last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    /// What it is like.
    pub(crate) fingerprint: [u8; 32],
    /// Its rules of source NAT are those that were there before.
    pub(crate) kept: bool,
}

/// Loads the ruleset. With `keep`, rules of source NAT that are there stay as they are.
pub(crate) async fn load_filter(
    settings: &Settings,
    socket: &Socket,
    nat: &SourceNat,
    keep: bool,
) -> Result<Loaded, OpenError> {
    let name = &settings.nft_table;
    let unread = |source| OpenError::ReadBack {
        table: name.clone(),
        source,
    };
    let before = filter::table(socket, name).await.map_err(unread)?;
    let before_none = before.is_none();
    let chains = before.map_or_else(Vec::new, |state| state.chains);
    let mut kept = keep
        && filter::SOURCE_NAT_CHAINS
            .iter()
            .all(|ours| chains.iter().any(|chain| chain == ours));
    let wanted = (!kept).then_some(nat);
    if let Err(error) = filter::load(&settings.nft_program, name, wanted, &chains).await {
        let cannot = matches!(error, RulesetError::Refused { .. } | RulesetError::Name(_));
        if !cannot || before_none {
            return Err(error.into());
        }
        // What another made of it cannot be put right in its place. Elements are proof of what is
        // ours, so they stay; one that cannot be read is missed by whoever observes next.
        let elements = Elements::open(name)
            .map_err(OpenError::Socket)?
            .list()
            .await;
        let elements = elements.unwrap_or_default();
        let anew = filter::load_anew(&settings.nft_program, name, nat, &elements).await;
        // The first refusal says more about what is wrong.
        anew.map_err(|_| error)?;
        kept = false;
        warn!(table = %name, "another had changed our table beyond repair; it was made anew");
    }
    let after = filter::table(socket, name).await.map_err(unread)?;
    let after = after.ok_or_else(|| {
        unread(Error::Refused {
            errno: Errno::NOENT,
            reason: Some("removed by another while it was loaded".to_owned()),
        })
    })?;
    Ok(Loaded {
        fingerprint: after.fingerprint,
        kept,
    })
}

impl Node {
    /// Makes source NAT as described. Whether that changed anything.
    ///
    /// # Errors
    /// [`OpenError`]; the rules stay what they were.
    pub async fn set_source_nat(&mut self, nat: &SourceNat) -> Result<bool, OpenError> {
        if self.nat == *nat && !self.loaded.kept {
            return Ok(false);
        }
        self.loaded = load_filter(&self.settings, &self.netfilter, nat, false).await?;
        self.nat = nat.clone();
        Ok(true)
    }

    /// Whether the rules of source NAT are those that a former agent made.
    #[must_use]
    pub fn keeps_former_source_nat(&self) -> bool {
        self.loaded.kept
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
            Some(TableState { fingerprint, .. }) if fingerprint != self.loaded.fingerprint => {
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
        let keep = self.loaded.kept;
        self.loaded = load_filter(&self.settings, &self.netfilter, &self.nat, keep).await?;
        Ok(())
    }

    /// Whether the VIP device was another and had to be made anew, or found.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn ensure_device(&mut self) -> Result<bool, OpenError> {
        Ok(self.bindings.ensure_device().await?)
    }

    /// Removes the VIP device where VIPs are bound otherwise and none is left on it.
    /// Whether it was removed.
    ///
    /// # Errors
    /// [`ObserveError`]; it stays then.
    pub async fn remove_unused_device(&mut self) -> Result<bool, ObserveError> {
        let removed = self.bindings.remove_unused_device().await;
        removed.map_err(ObserveError::of("the VIP device, which is not used"))
    }

    /// Index of the VIP device, where there is one.
    #[must_use]
    pub fn device_index(&self) -> Option<u32> {
        self.bindings.device_index()
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
