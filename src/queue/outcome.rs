//! The outcome of a job's turn on this consumer, for the queue, the job API and the caller.

use super::{State, handover::End};
use crate::{
    error::{Error, Kind, Result},
    journal::Reached,
    run::Outcome,
};

/// The longest reason that is reported, characters.
const REASON: usize = 2000;

/// The outcome of a turn.
pub(super) struct JobOutcome {
    pub end: End,
    pub state: State,
    /// The exit code if this were the only job.
    pub code: u8,
    pub reason: Option<String>,
    /// The kind of its error, if any.
    pub error: Option<Kind>,
}

impl JobOutcome {
    pub fn new(end: End, state: State, code: u8) -> Self {
        Self { end, state, code, reason: None, error: None }
    }

    /// The machine goes away before there is anything to save.
    pub fn not_begun() -> Self {
        let outcome = Self::new(End::Interrupted, State::Interrupted, Kind::Interrupted.exit_code());
        Self { reason: Some("asked to stop before the run was started".into()), ..outcome }
    }

    /// Its run has reached a cap: another try would not change that.
    pub fn capped(cap: &Reached) -> Self {
        let outcome = Self::new(End::Capped, State::Failed, Kind::Capped.exit_code());
        Self {
            reason: Some(format!("the run is at its cap: {cap}; to go on: trainer resume {}", cap.remedy())),
            ..outcome
        }
    }

    pub fn of_outcome(outcome: &Result<Outcome>) -> Self {
        match outcome {
            Ok(Outcome::Completed { .. }) => Self::new(End::Completed, State::Completed, 0),
            Ok(Outcome::Capped { cap, .. }) => Self::capped(cap),
            Ok(Outcome::NotCreated) => Self::not_begun(),
            Ok(Outcome::Interrupted { lost_steps }) => {
                let kind = if *lost_steps == 0 { Kind::Interrupted } else { Kind::InterruptedWithLoss };
                Self::new(End::Interrupted, State::Interrupted, kind.exit_code())
            }
            Err(error) => Self::of_error(error),
        }
    }

    pub fn of_error(error: &Error) -> Self {
        if let Some(hint) = error.hint() {
            tracing::warn!("hint: {}", crate::report::human::plain(hint));
        }
        let end = End::of_error(error.kind());
        let state = match end {
            End::Completed => State::Completed,
            End::Interrupted => State::Interrupted,
            End::Elsewhere => State::StandBy,
            End::Further => State::Renewed,
            End::Unreachable | End::CutOff => State::Unreachable,
            End::Failed | End::Unintelligible | End::Capped => State::Failed,
        };
        let reason = Some(error.to_string().chars().take(REASON).collect());
        Self { end, state, code: error.kind().exit_code(), reason, error: Some(error.kind()) }
    }
}
