//! What a step has to look at: the addresses whose desired state may differ from before.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::address::FrontendAddr;
use crate::change::Change;
use crate::cluster::Left;
use crate::drain::Server;
use crate::service::ServiceKey;

/// How much of what was said of backends waits to be followed.
const MOST_TOLD: usize = 65_536;

/// Addresses whose desired state may have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Frontends.
    pub frontends: BTreeSet<FrontendAddr>,
    /// VIPs.
    pub vips: BTreeSet<IpAddr>,
    /// Addresses of backends on this node.
    pub hairpins: BTreeSet<IpAddr>,
    /// Virtual services by mark.
    pub marked: BTreeSet<ServiceKey>,
    /// Backends of host ports whose pods are gone: they need no drain.
    pub ended: BTreeSet<Server>,
    /// What was said last of endpoints that a slice names no longer.
    pub left: Left,
}

impl Scope {
    /// Adds another scope to this one.
    pub fn merge(&mut self, other: Self) {
        self.frontends.extend(other.frontends);
        self.vips.extend(other.vips);
        self.hairpins.extend(other.hairpins);
        self.marked.extend(other.marked);
        // Where nothing can be followed for long, the oldest of it tells least: without it a
        // drain lasts until its bound.
        if self.left.len() + self.ended.len() > MOST_TOLD {
            self.left.clear();
            self.ended.clear();
        }
        self.ended.extend(other.ended);
        self.left.extend(other.left);
    }

    /// Adds what a change is about.
    pub fn insert_change(&mut self, change: &Change) {
        if let Some(key) = change.service() {
            self.insert_service(key);
        } else if let Change::AddHairpin(ip) | Change::RemoveHairpin(ip) = change {
            self.hairpins.insert(*ip);
        } else if let Some(frontend) = change.frontend() {
            self.insert(frontend);
        } else {
            self.vips.extend(change.ip());
        }
    }

    /// Adds what a virtual service is about.
    pub fn insert_service(&mut self, key: ServiceKey) {
        match key {
            ServiceKey::Address(frontend) => self.insert(frontend),
            ServiceKey::Mark { .. } => {
                self.marked.insert(key);
            }
        }
    }

    /// How many addresses it names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frontends.len() + self.vips.len() + self.hairpins.len() + self.marked.len()
    }

    /// Adds a frontend and its VIP.
    pub fn insert(&mut self, frontend: FrontendAddr) {
        self.frontends.insert(frontend);
        self.vips.insert(frontend.ip);
    }

    /// Whether there is nothing in it. What left a slice counts though it names no address:
    /// a backend that drains is about to be told by it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.ended.is_empty() && self.left.is_empty()
    }
}
