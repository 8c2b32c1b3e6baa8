//! Tells the health checks of load-balanced Services what to say.

use std::sync::Arc;

use ferrule_api::status::Problem;
use tokio::sync::watch;

use super::Reconciler;
use super::faults::About;
use crate::health::{self, Board, Check, Faults};
use crate::programming::Programming;

/// The reconciler's end.
#[derive(Debug)]
pub(super) struct HealthChecks {
    board: watch::Sender<Arc<Board>>,
    faults: Faults,
    /// Whether services were programmed once: looking anew at the kernel takes nothing from it.
    programmed: bool,
}

impl HealthChecks {
    pub(super) fn new() -> Self {
        Self {
            board: watch::Sender::new(Arc::default()),
            faults: Faults::default(),
            programmed: false,
        }
    }

    /// Serves them until the program ends.
    pub(super) fn serve(&self, programming: &Arc<Programming>) {
        tokio::spawn(health::run(
            self.board.subscribe(),
            Arc::clone(&self.faults),
            Arc::clone(programming),
        ));
    }

    pub(super) fn problems(&self) -> Vec<Problem> {
        health::problems(&self.faults)
    }
}

impl Reconciler {
    /// Puts what holds now on the board, if that is news.
    pub(super) fn tell_health_checks(&mut self) {
        self.health_checks.programmed |= self.complete && self.observed.is_some();
        let desired = self.view.desired();
        if desired.health_checks().is_empty() && self.health_checks.board.borrow().checks.is_empty()
        {
            return;
        }
        let checks = desired.health_checks().into_iter().map(|(service, check)| {
            let told = Check {
                service: service.clone(),
                health: check.clone(),
            };
            (check.port, told)
        });
        let board = Board {
            checks: checks.collect(),
            node: desired.facts().node_ports.clone(),
            vips: desired.asked().map(|addr| (addr.ip, addr.port)).collect(),
            healthy: self.health_checks.programmed && !self.faults.has(About::Kernel),
        };
        self.health_checks.board.send_if_modified(|known| {
            let news = **known != board;
            if news {
                *known = Arc::new(board);
            }
            news
        });
    }
}
