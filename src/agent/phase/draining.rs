//! Ranks are asked to stop, or have stopped, because of a notice. This phase ends only with the generation.

use std::{
    ops::ControlFlow::{Break, Continue},
    time::Duration,
};

use super::{Cause, Event, Flow, Phase, Salvage, Stage, Training, Turn};
use crate::agent::{drain::timeline::Planned, effects::Effect, workers::WorkerEvent};

/// Ranks that are to stop but have finished no step for this long, or for ten usual steps if that is longer, are
/// killed.
const STUCK: Duration = Duration::from_secs(120);
/// The usual step while none was measured.
const UNKNOWN_STEP: Duration = Duration::from_secs(1200);

/// A group that saves as much as there is time for and exits.
#[derive(Debug)]
pub struct Draining {
    pub(super) training: Training,
    /// The plan; a later notice may change it.
    pub(super) planned: Planned,
}

impl Draining {
    pub(super) fn handle(mut self, event: Event, turn: &mut Turn<'_>) -> Flow<Phase> {
        let Self { training, planned } = &mut self;
        let stage = Stage::Draining(planned);
        match event {
            Event::Notice(notice) => {
                if let Some(next) = training.on_notice(&notice, stage, turn)? {
                    *planned = next;
                }
            }
            Event::Worker(WorkerEvent::Message(rank, message)) => {
                if let Some(cause) = training.hear(rank, message, stage, turn)? {
                    return self.loses(cause, turn);
                }
            }
            Event::Worker(WorkerEvent::Exited(rank, reason)) => return self.loses(Cause::exited(rank, &reason), turn),
            Event::Save(event) => training.on_save(event, stage, turn)?,
            Event::Retry { slot } => training.tries_again(slot, stage, turn)?,
            // Said before `Go`.
            Event::LaidOut { .. } | Event::Fetched(_) => {}
            Event::HeldUp { after_s } => {
                turn.does(Effect::GiveUpSave { after_s });
                let verdict =
                    format!("a node held up the save of the last step, which came no further for {after_s} s");
                return Break(Ok(training.stopped(verdict, Some(planned))));
            }
            Event::Lost(error) => return Break(Err(error)),
            Event::Tick => {
                let actions = training.scheduler.tick(turn.now);
                training.act(actions, stage, turn)?;
                training.look_at_the_time(Some(planned), turn)?;
                if let Some(cause) = self.look_at_the_stuck(turn) {
                    return self.loses(cause, turn);
                }
            }
        }
        Continue(Phase::Draining(self))
    }

    fn loses(self, cause: Cause, turn: &mut Turn<'_>) -> Flow<Phase> {
        Salvage::new(self.training, Some(self.planned), cause).begin(turn)
    }

    /// Ends a drain without a deadline, too: ranks that have not moved for long will not stop by themselves.
    fn look_at_the_stuck(&mut self, turn: &Turn<'_>) -> Option<Cause> {
        let Training { scheduler, timeline, stepped, .. } = &mut self.training;
        if scheduler.has_ended() {
            return None;
        }
        let usual = turn
            .shared
            .estimates
            .step
            .estimate()
            .map_or(UNKNOWN_STEP, |step| Duration::try_from_secs_f64(10.0 * step.high).unwrap_or(UNKNOWN_STEP));
        let patience = usual.max(STUCK);
        if turn.now.saturating_sub(*stepped) < patience || timeline.since(turn.now) < patience.as_secs_f64() {
            return None;
        }
        let reason = format!("no step was finished for {} s after the notice", patience.as_secs());
        timeline.says(turn.now, reason.clone());
        Some(Cause::Died(reason))
    }
}
