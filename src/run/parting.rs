//! How a run ends on this node: the last record in the journal, and the work left after it.
//!
//! The record computes the lost steps from the journal as it stands at that very record: a save that was given up but
//! whose `committed` landed all the same counts as committed, and no such commit can come after the record and
//! contradict it. Exit code and events agree with the record.

use std::time::Duration;

use super::{Outcome, Runner, or_notice, told_to_leave};
use crate::{
    agent::generation::{Left, Stopped},
    error::Result,
    ids::{Generation, Step},
    journal::{self, CheckpointStatus, EarlyStop, JournalError, Reached, Record, RunState, Urgency},
    notice::Notices,
    report::Event,
};

/// How long the last record may take when the run ends on a store that does not answer, if nobody waits for this
/// process's end.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// The shortest limit, whatever time is left: whoever wants the end may be late.
const LEAST: Duration = Duration::from_millis(300);
/// The time before a deadline at which the last record is given up: the process must also exit.
const EXITING: Duration = Duration::from_millis(600);
/// How long the record of a completed run may take when this node is told to leave meanwhile.
const COMPLETING: Duration = Duration::from_secs(2);
/// How long the end of a completed run waits for old checkpoints to be deleted.
const TIDYING: Duration = Duration::from_secs(20);

/// The content of `interrupted` after the records of `state`. Commits of this generation count even if its event loop
/// did not hear of them.
pub(super) fn interruption(state: &RunState, generation: Generation, stopped: &Stopped) -> Record {
    let Stopped { step, committed, verdict, drain, cap } = stopped.clone();
    let ours = |checkpoint: &&journal::Checkpoint| {
        checkpoint.committed.generation == generation && checkpoint.status == CheckpointStatus::Good
    };
    let late = state.checkpoints().iter().filter(ours).map(|checkpoint| checkpoint.committed.step).max();
    let late = late.filter(|late| *late > committed);
    let committed = late.unwrap_or(committed);
    let found = |late| format!("{verdict}; then it was found that step {late} is committed");
    let verdict = late.map_or_else(|| verdict.clone(), found);
    Record::Interrupted {
        generation,
        step,
        committed: (committed > Step(0)).then_some(committed),
        lost_steps: step.get().saturating_sub(committed.get()),
        verdict,
        drain: drain.map(Box::new),
        cap,
    }
}

/// A limit for the work that remains when this process is expected to be ended in `left`, if that is known: killed in
/// the middle of it, the process would report neither what was lost nor its exit code.
pub(super) fn within(limit: Duration, left: Option<Duration>) -> Duration {
    left.map_or(limit, |left| left.saturating_sub(EXITING).max(LEAST).min(limit))
}

impl Runner {
    /// A notice to leave came while no worker was at work. `step`: the last one finished under a generation of this
    /// node, if it has formed one.
    pub(super) async fn told_between_generations(
        &self,
        doing: &str,
        step: Option<Step>,
        left: Option<Duration>,
    ) -> Result<Outcome> {
        let committed = self.newest_committed();
        let (Some(generation), Some(step)) = (self.journal.view().held, step) else {
            tracing::info!("asked to stop before this node has taken up the run: it has nothing to save");
            if committed > Step(0) {
                self.reporter.event(&Event::Interrupted { step: committed, lost_steps: 0, cap: None });
            }
            return Ok(Outcome::Interrupted { lost_steps: 0 });
        };
        let verdict = format!("asked to stop while {doing}");
        self.interrupted(generation, Stopped { step, committed, verdict, drain: None, cap: None }, left).await
    }

    /// The run's last step is committed; `early`: why it is the last one, if there would be more.
    pub(super) async fn complete(
        &self,
        generation: Generation,
        step: Step,
        loss: Option<f64>,
        early: Option<EarlyStop>,
        notices: &mut Notices,
    ) -> Result<Outcome> {
        // A run killed between its last commit and this record makes no step in its last generation: the commit knows
        // the loss.
        let loss = loss.or_else(|| self.journal.state().newest()?.committed.loss);
        let completed = {
            let completing =
                self.journal.append(Urgency::LastWords, Record::Completed { generation, step, loss, early });
            tokio::pin!(completing);
            tokio::select! {
                biased;
                completed = &mut completing => Some(completed),
                () = told_to_leave(notices, &self.reporter) => {
                    tokio::time::timeout(COMPLETING, completing).await.ok()
                }
            }
        };
        let outcome = match completed {
            Some(completed) => completed.map(|_| None)?,
            None => {
                let verdict = "asked to stop while completion was being recorded".to_owned();
                let stopped = Stopped { step, committed: step, verdict, drain: None, cap: None };
                self.last_words(generation, &stopped, notices.left()).await
            }
        };
        if let Some(lost_steps) = outcome {
            self.reporter.event(&Event::Interrupted { step, lost_steps, cap: None });
            return Ok(Outcome::Interrupted { lost_steps });
        }
        self.reporter.event(&Event::Completed { step, loss, early: early.map(|early| early.to_string()) });
        Ok(Outcome::Completed { then: self.options.then(&self.resolved.config, true) })
    }

    /// The run was asked to stop.
    pub(super) async fn interrupted(
        &self,
        generation: Generation,
        stopped: Stopped,
        left: Option<Duration>,
    ) -> Result<Outcome> {
        let lost_steps = self.last_words(generation, &stopped, left).await.unwrap_or(0);
        let cap = stopped.cap.map(|cap| cap.to_string());
        self.reporter.event(&Event::Interrupted { step: stopped.step, lost_steps, cap });
        Ok(match stopped.cap {
            Some(cap) => self.at_its_cap(cap, lost_steps, true),
            None => Outcome::Interrupted { lost_steps },
        })
    }

    /// The run has reached a cap; `trained_here`: this node has taken part in that.
    pub(super) fn at_its_cap(&self, cap: Reached, lost_steps: u64, trained_here: bool) -> Outcome {
        let then = self.options.then(&self.resolved.config, trained_here);
        Outcome::Capped { cap, lost_steps, then }
    }

    /// Records what was lost, and returns it as far as the journal is known by then. `None`: the run is complete.
    pub(super) async fn last_words(
        &self,
        generation: Generation,
        stopped: &Stopped,
        left: Option<Duration>,
    ) -> Option<u64> {
        let words = self.journal.last_words({
            let stopped = stopped.clone();
            move |state| interruption(state, generation, &stopped)
        });
        said(tokio::time::timeout(within(LAST_WORDS, left), words).await);
        let state = self.journal.state();
        let lost = match interruption(&state, generation, stopped) {
            Record::Interrupted { lost_steps, .. } => lost_steps,
            _ => 0,
        };
        (!matches!(state.outcome(), journal::Outcome::Completed { .. })).then_some(lost)
    }

    /// Writes a record that is useful but not worth hanging for: the run ends whether or not the store answers.
    pub(super) async fn append_last(&self, record: Record) {
        said(tokio::time::timeout(LAST_WORDS, self.journal.append(Urgency::LastWords, record)).await);
    }

    /// The work for which a completed run has time, unless this node is told to leave.
    pub(super) async fn tidy(&self, mut left: Left, notices: &mut Notices) {
        if let Some(mut retention) = left.retention.take() {
            or_notice(notices, &self.reporter, retention.complete(TIDYING)).await;
        }
        let _ = self.gone(left).await;
    }

    /// Waits until the last generation's workers are gone; whether they are.
    pub(super) async fn gone(&self, left: Left) -> bool {
        match left.leaving {
            Some(leaving) => leaving.await.unwrap_or(false),
            None => true,
        }
    }
}

fn said(written: Result<Result<u64, JournalError>, tokio::time::error::Elapsed>) {
    match written {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the journal's last record was not written"),
        Err(_) => tracing::warn!("the journal's last record was not written: the store does not answer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{checkpoint, memory_store, state_after};

    fn stopped(step: u64, committed: u64) -> Stopped {
        Stopped {
            step: Step(step),
            committed: Step(committed),
            verdict: "the time was up".into(),
            drain: None,
            cap: None,
        }
    }

    fn told(record: Record) -> (Option<Step>, u64, String) {
        match record {
            Record::Interrupted { committed, lost_steps, verdict, .. } => (committed, lost_steps, verdict),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_last_words_leave_time_to_exit() {
        let seconds = Duration::from_secs_f64;
        for (left, limit) in [(None, 30.0), (Some(120.0), 30.0), (Some(10.0), 9.4), (Some(1.5), 0.9), (Some(0.0), 0.3)]
        {
            assert_eq!(within(LAST_WORDS, left.map(seconds)), seconds(limit), "{left:?}");
        }
        assert_eq!(within(seconds(0.1), Some(seconds(0.2))), seconds(0.1), "never more than usual");
    }

    #[tokio::test]
    async fn what_is_lost_is_what_the_journal_does_not_hold() {
        let store = memory_store();
        let (first, second) = (checkpoint(&store, 1, 1, 1, 1).await.0, checkpoint(&store, 2, 1, 1, 2).await.0);
        let state = state_after(vec![first, second], vec![]);
        let of = |stopped, generation| told(interruption(&state, Generation(generation), &stopped));
        assert_eq!(of(stopped(5, 2), 1), (Some(Step(2)), 3, "the time was up".into()));
        // Step 2 is committed, and its generation has not heard of it.
        let late = "the time was up; then it was found that step 2 is committed".to_owned();
        assert_eq!(of(stopped(2, 1), 1), (Some(Step(2)), 0, late));
        // What another generation has committed is not this one's.
        assert_eq!(of(stopped(2, 1), 2), (Some(Step(1)), 1, "the time was up".into()));
        assert_eq!(of(stopped(2, 0), 2).0, None);
    }
}
