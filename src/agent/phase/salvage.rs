//! The workers can't go on: snapshots that every rank had captured are uploaded and committed, then the generation
//! ends.
//!
//! In a group of several nodes that has a limit ([`finish::limit`]), since all of them wait: one that is cut off from
//! the store would hold up the others for as long as it tries. The save is given up then, and is nobody's any more.
//! A node that is alone waits for nobody, and tries for as long as the store's settings say.

use std::ops::ControlFlow::{Break, Continue};

use super::{Cause, Event, Flow, Phase, Stage, Training, Turn};
use crate::{
    agent::{
        drain::timeline::Planned,
        effects::{Effect, Order},
        finish,
        generation::End,
        save::{scheduler::Moment, upload::SaveEvent},
        workers::WorkerEvent,
    },
    error::Result,
};

/// A group that has lost a worker.
#[derive(Debug)]
pub struct Salvage {
    pub(super) training: Training,
    /// The plan that a notice has asked for, if any, before or since.
    planned: Option<Planned>,
    /// The first reason; later ones follow from it.
    cause: Cause,
    /// When a worker was lost, or the newest commit since then.
    since: Moment,
}

impl Salvage {
    pub(super) fn new(mut training: Training, planned: Option<Planned>, cause: Cause) -> Self {
        // Every snapshot is taken up here, one that waits to be tried again too.
        training.retrying = None;
        Self { training, planned, cause, since: Moment::ZERO }
    }

    /// A worker is lost. Its own report is acted on when its process has ended, or at the next tick.
    pub(super) fn begin(mut self, turn: &mut Turn<'_>) -> Flow<Phase> {
        self.since = turn.now;
        match self.cause {
            Cause::Failed(_) | Cause::Permanent(_) => Continue(Phase::Salvaging(self)),
            Cause::Died(_) | Cause::Diverged { .. } => Continue(Phase::Salvaging(self.settle(turn)?)),
        }
    }

    pub(super) fn handle(mut self, event: Event, turn: &mut Turn<'_>) -> Flow<Phase> {
        let Self { training, planned, since, .. } = &mut self;
        let stage = Stage::Salvaging(planned.as_ref());
        match event {
            Event::Notice(notice) => *planned = training.on_notice(&notice, stage, turn)?,
            // All messages that a worker had sent before it died are handled.
            Event::Worker(WorkerEvent::Message(rank, message)) => {
                training.hear(rank, message, stage, turn)?;
                return Continue(Phase::Salvaging(self));
            }
            Event::Save(event @ SaveEvent::Progress { .. }) => {
                training.on_save(event, stage, turn)?;
                return Continue(Phase::Salvaging(self));
            }
            Event::Save(event @ SaveEvent::Ended { .. }) => {
                if matches!(event, SaveEvent::Ended { result: Ok(_), .. }) {
                    // The store takes saves from all nodes: the next one has its own time.
                    *since = turn.now;
                }
                training.on_save(event, stage, turn)?;
            }
            // The snapshot is taken up with everything else that is left.
            Event::Worker(WorkerEvent::Exited(..)) | Event::Retry { .. } => {}
            // Said before `Go`.
            Event::LaidOut { .. } | Event::Fetched(_) | Event::HeldUp { .. } => {
                return Continue(Phase::Salvaging(self));
            }
            Event::Lost(error) => return Break(Err(error)),
            Event::Tick => {
                if planned.is_none() {
                    turn.looks_at_the_journal();
                }
                let actions = training.scheduler.tick(turn.now);
                training.act(actions, stage, turn)?;
                let mut salvage = self.settle(turn)?;
                salvage.training.look_at_the_time(salvage.planned.as_ref(), turn)?;
                return Continue(Phase::Salvaging(salvage));
            }
        }
        Continue(Phase::Salvaging(self.settle(turn)?))
    }

    /// The other ranks can't go on either. Whole snapshots are still uploaded and committed, one after the other.
    fn settle(mut self, turn: &mut Turn<'_>) -> Flow<Self> {
        turn.does(Effect::Nodes(Order::Kill));
        if !self.training.ledger.is_uploading() {
            let actions = self.training.scheduler.salvage();
            if actions.is_empty() {
                return Break(self.end());
            }
            self.training.act(actions, Stage::Salvaging(self.planned.as_ref()), turn)?;
        }
        if let Some(after_s) = self.is_overdue(turn) {
            turn.does(Effect::GiveUpSave { after_s });
            return Break(self.end());
        }
        Continue(self)
    }

    /// `Some`: other nodes have waited for long enough, this many seconds.
    fn is_overdue(&self, turn: &Turn<'_>) -> Option<u64> {
        let settings = &turn.shared.settings;
        let limit = finish::limit(settings.finishing, &turn.shared.estimates, self.training.bytes());
        let waited = turn.now.saturating_sub(self.since);
        (settings.seats.are_several() && waited >= limit).then_some(waited.as_secs())
    }

    fn end(self) -> Result<End> {
        let Self { training, planned, cause, since: _ } = self;
        match cause {
            // The time left is too short to start them again.
            Cause::Failed(reason) | Cause::Died(reason) if training.timeline.is_called() => {
                let verdict = format!("workers died after the notice: {reason}");
                Ok(training.stopped(verdict, planned.as_ref()))
            }
            cause => cause.end(training.scheduler.finished()),
        }
    }
}
