//! Who answers which call of the socket.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ferrule_api::status::{SocketStatus, Status};
use ferrule_api::{Answer, Call, CallError, ErrorCode};
use ferrule_datapath::Sysctls;
use ferrule_model::names::Attachment;

use crate::hostports;
use crate::housekeeping;
use crate::links;
use crate::pods::Pods;
use crate::reconcile::Asker;

/// Answers calls; counts what came over the socket.
#[derive(Debug)]
pub(crate) struct Desk {
    pods: Arc<Pods>,
    asker: Asker,
    sysctls: Sysctls,
    calls: AtomicU64,
    bad_requests: AtomicU64,
    refused_connections: AtomicU64,
}

impl Desk {
    pub(crate) fn new(pods: Arc<Pods>, asker: Asker, sysctls: Sysctls) -> Self {
        Self {
            pods,
            asker,
            sysctls,
            calls: AtomicU64::new(0),
            bad_requests: AtomicU64::new(0),
            refused_connections: AtomicU64::new(0),
        }
    }

    /// Answers one call.
    pub(crate) async fn call(&self, call: Call) -> Answer {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if matches!(call, Call::Allocate(_) | Call::Lease { .. } | Call::Ready) {
            housekeeping::look_first(&self.pods).await;
        }
        match call {
            Call::Allocate(wanted) if !wanted.ports.is_empty() => {
                hostports::allocate(&self.pods, &self.asker, wanted).await
            }
            Call::Allocate(_) | Call::Lease { .. } | Call::Release { .. } => {
                Arc::clone(&self.pods).call(call).await
            }
            Call::Ready => self.ready(call).await,
            Call::Tidy => match housekeeping::tidy(&self.pods, self.pods.started()).await {
                Ok(()) => Answer::Tidied,
                Err(error) => internal(format!(
                    "leases cannot be compared with pods' interfaces: {error:#}"
                )),
            },
            Call::Status => match self.status().await {
                Some(status) => Answer::Status(status),
                None => busy(),
            },
            Call::Frontends { after } => match self.asker.frontends(after).await {
                Some(rows) => Answer::Frontends(rows),
                None => busy(),
            },
            Call::Trace(asked) => match self.asker.trace(asked).await {
                Some(Ok(trace)) => Answer::Trace { trace },
                Some(Err(error)) => Answer::Error(error),
                None => busy(),
            },
            Call::Pods { after } => {
                let counters = links::counters().await.unwrap_or_else(|error| {
                    tracing::warn!(%error, "cannot read the counters of pods' interfaces");
                    BTreeMap::new()
                });
                Arc::clone(&self.pods).rows(after, counters).await
            }
        }
    }

    /// Ends a lease, if whoever asked for it is still there when its turn has come.
    pub(crate) async fn release(
        &self,
        attachment: Attachment,
        is_there: impl FnOnce() -> bool + Send + 'static,
    ) -> Answer {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Arc::clone(&self.pods)
            .release_for(attachment, is_there)
            .await
    }

    /// How many leases there are.
    #[cfg(test)]
    pub(crate) fn leases(&self) -> usize {
        self.pods.leases().count()
    }

    #[cfg(test)]
    pub(crate) fn pods(&self) -> &Pods {
        &self.pods
    }

    /// Whether pods can be made, and whether those that are there have a way out.
    async fn ready(&self, call: Call) -> Answer {
        let sysctls = self.sysctls.clone();
        let forwarding = move || ferrule_datapath::ensure_forwarding(&sysctls);
        match tokio::task::spawn_blocking(forwarding).await {
            Ok(Ok(())) => Arc::clone(&self.pods).call(call).await,
            Ok(Err(error)) => Answer::Error(CallError {
                code: ErrorCode::Disconnected,
                message: format!("pods cannot reach beyond this node: {error}"),
            }),
            Err(error) => internal(format!("the agent failed to look: {error}")),
        }
    }

    /// How the node fares; `None` when nothing can be said in time.
    pub(crate) async fn status(&self) -> Option<Box<Status>> {
        let mut status = self.asker.status().await?;
        status.socket = SocketStatus {
            calls: self.calls.load(Ordering::Relaxed),
            bad_requests: self.bad_requests.load(Ordering::Relaxed),
            refused_connections: self.refused_connections.load(Ordering::Relaxed),
        };
        Some(status)
    }

    pub(crate) fn note_bad_request(&self) {
        self.bad_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_refused_connection(&self) {
        self.refused_connections.fetch_add(1, Ordering::Relaxed);
    }
}

fn internal(message: String) -> Answer {
    Answer::Error(CallError {
        code: ErrorCode::Internal,
        message,
    })
}

fn busy() -> Answer {
    Answer::Error(CallError {
        code: ErrorCode::NotReady,
        message: "the agent is busy changing the kernel, or has not read its manifests yet; ask again in a moment".to_owned(),
    })
}
