//! The answer to `trace`: the way of a packet by what is desired, and by the kernel.
//!
//! It reads what is on the packet's way and changes nothing: what it finds amiss is left
//! to the audit.

use ferrule_api::status::cut;
use ferrule_api::{CallError, ErrorCode, TraceRequest};
use ferrule_datapath::FilterDrift;
use ferrule_model::desired::Scope;
use ferrule_model::trace::live::{Ruleset, Seen, scope};
use ferrule_model::trace::{QuestionError, Trace};

use super::Reconciler;
use super::faults::About;

/// What is answered.
pub(crate) type TraceReply = Result<Box<Trace>, CallError>;

impl Reconciler {
    pub(super) async fn trace(&self, asked: &TraceRequest) -> TraceReply {
        let question = &asked.question;
        let mut trace = Trace::new(&self.view, question).map_err(|error| bad_question(&error))?;
        if !self.complete && !is_known(&trace) {
            return Err(unread(&trace, &self.source.missing()));
        }
        if asked.live {
            let scope = scope(&self.view, question).map_err(|error| bad_question(&error))?;
            let seen = self.see(&scope).await.map_err(|error| unseen(&error))?;
            let compared = trace.compare(&self.view, question, &seen);
            compared.map_err(|error| bad_question(&error))?;
        }
        Ok(Box::new(trace))
    }

    /// What the kernel holds at these addresses, or why that is not known.
    async fn see(&self, scope: &Scope) -> Result<Seen, String> {
        let Some(kernel) = &self.kernel else {
            let fault = self.faults.words(About::Kernel);
            return Err(fault.unwrap_or_else(|| "it was not opened yet".to_owned()));
        };
        let drift = kernel.filter_drift().await;
        let observed = kernel.glimpse(self.view.desired(), scope).await;
        Ok(Seen {
            ruleset: match drift.map_err(|error| error.to_string())? {
                None => Ruleset::AsLoaded,
                Some(FilterDrift::Missing) => Ruleset::Missing,
                Some(FilterDrift::Changed) => Ruleset::Changed,
            },
            table: self.settings.nft_table.clone(),
            observed: observed.map_err(|error| error.to_string())?,
            faults: self.faults_at(scope),
        })
    }

    /// What was tried in vain there.
    fn faults_at(&self, scope: &Scope) -> Vec<String> {
        let frontends = scope.frontends.iter().copied().map(About::Frontend);
        let addresses = scope.vips.iter().chain(&scope.hairpins).copied();
        let marked = scope.marked.iter().copied().map(About::Marked);
        let abouts = [About::Kernel, About::SourceNat]
            .into_iter()
            .chain(frontends)
            .chain(addresses.map(About::Address))
            .chain(marked);
        let words = abouts.filter_map(|about| self.faults.words(about));
        let words = words.map(|mut words| {
            cut(&mut words);
            words
        });
        words.collect()
    }
}

/// Whether what is said holds whatever else is read: that nothing is there, no endpoint or no
/// Service, may only seem so.
fn is_known(trace: &Trace) -> bool {
    trace.outcome.verdict == "forwarded" || trace.outcome.rule.as_deref() == Some("notAdmitted")
}

/// `missing`: of what, since when and why.
fn unread(trace: &Trace, missing: &str) -> CallError {
    CallError {
        code: ErrorCode::NotReady,
        message: format!(
            "this agent has not read everything of {missing}, so it cannot know what {} is, nor \
             whether the kernel has it from an agent before; see `ferrule-agent status` for what \
             it waits for, and ask again when that is read",
            trace.to
        ),
    }
}

fn bad_question(error: &QuestionError) -> CallError {
    CallError {
        code: ErrorCode::BadRequest,
        message: error.to_string(),
    }
}

fn unseen(error: &str) -> CallError {
    CallError {
        code: ErrorCode::NotReady,
        message: format!(
            "the kernel cannot be looked at: {error}; ask again in a moment, or without --live"
        ),
    }
}

#[cfg(test)]
mod tests {
    use ferrule_model::network::Policy;
    use ferrule_model::trace::{Question, parse_from, parse_to};
    use ferrule_model::view::NodeView;

    use super::*;

    #[test]
    fn who_has_read_nothing_does_not_say_that_it_is_nobodys() {
        let view = NodeView::new("a", Policy::default());
        let from = parse_from("10.244.1.10").unwrap();
        let question = Question::new(from, parse_to("10.96.0.10:80/tcp").unwrap(), None).unwrap();
        let trace = Trace::new(&view, &question).unwrap();
        assert_eq!(trace.outcome.verdict, "passed");
        assert!(!is_known(&trace));
        let error = unread(
            &trace,
            "https://192.0.2.1 since its start 5 s ago (refused)",
        );
        assert_eq!(error.code, ErrorCode::NotReady);
        assert!(
            error.message.starts_with(
                "this agent has not read everything of https://192.0.2.1 since its start 5 s ago \
                 (refused), so it cannot know what 10.96.0.10:80/TCP is"
            ),
            "{}",
            error.message
        );
    }
}
