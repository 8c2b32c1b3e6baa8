//! What the reconciler tells about its passes, for the node's health and for metrics.

use std::collections::BTreeMap;
use std::time::Instant;

use ferrule_model::cluster::{Event, Touched};
use ferrule_model::kube::{Kind, Object, TRIGGER_TIME_ANNOTATION};
use ferrule_model::names::ObjectName;

use super::Reconciler;
use crate::programming::Noticed;
use crate::source::Update;

/// When changes of endpoints were caused, by the Service.
pub(super) type Triggers = Vec<(ObjectName, String)>;

/// A pass of the reconciler that has begun.
#[derive(Debug)]
pub(super) struct Pass {
    began: Instant,
    has_work: bool,
    compares_all: bool,
}

impl Reconciler {
    /// Counts what an update brings, and takes the times out of it: nothing is decided by
    /// them, and they would be kept with each slice.
    pub(super) fn note_update(&self, update: &mut Update) -> Triggers {
        let mut noticed = Noticed::default();
        let mut triggers = Triggers::new();
        for event in &mut update.events {
            match event {
                Event::Applied(object) => match &mut **object {
                    Object::EndpointSlice(slice) => {
                        noticed.slices += 1;
                        let annotations = &mut slice.metadata.annotations;
                        let caused = annotations.remove(TRIGGER_TIME_ANNOTATION);
                        if annotations.is_empty() {
                            // A map that was emptied keeps its room, half a kilobyte.
                            *annotations = BTreeMap::new();
                        }
                        triggers.extend(slice.service().zip(caused));
                    }
                    Object::Service(_) => noticed.services += 1,
                    Object::Node(_) | Object::ServiceCidr(_) => {}
                },
                Event::Deleted(key) => match key.kind {
                    Kind::EndpointSlice => noticed.slices += 1,
                    Kind::Service => noticed.services += 1,
                    Kind::Node | Kind::ServiceCidr => {}
                },
            }
        }
        self.programming.note_changes(noticed, update.seen);
        triggers
    }

    /// Notes what the update came to. A slice that was told again as it was is no change.
    pub(super) fn note_touched(&self, touched: &Touched, triggers: Triggers) {
        for (service, caused) in triggers {
            if touched.services.contains(&service) {
                self.programming.note_trigger(&caused);
            }
        }
        let node = self.view.node();
        if touched.nodes.contains(node)
            && let Some(object) = self.view.cluster().node(node)
        {
            self.programming.note_node(object.is_leaving());
        }
    }

    pub(super) fn begin_pass(&self) -> Pass {
        let due = self.retry_at.is_none_or(|retry| retry <= Instant::now());
        Pass {
            began: Instant::now(),
            has_work: !self.dirty.is_empty() || (due && !self.waiting.is_empty()),
            compares_all: self.observed.is_none(),
        }
    }

    /// A change that the kernel refuses by itself is a problem of its object: kube-proxy's
    /// IPVS mode goes on and calls itself up to date, too. A kernel that cannot be had is not.
    pub(super) fn end_pass(&self, pass: &Pass) {
        if self.kernel.is_none() || self.observed.is_none() {
            return;
        }
        if pass.has_work || pass.compares_all {
            self.programming
                .note_pass(pass.began.elapsed(), pass.compares_all);
        }
        // A scheduler that was missing made new work on the way.
        if self.dirty.is_empty() {
            self.programming.note_up_to_date();
        }
    }
}
