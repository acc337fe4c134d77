//! A group that trains: steps, saves, and the response to a notice.
//!
//! A group that is asked to stop, or that has lost a worker, is still one that had trained: the code that the phases
//! after [`Training`] share with it is here, with the [`Stage`] as an argument.

use std::{
    ops::ControlFlow::{Break, Continue},
    time::Duration,
};

use super::{Cause, Draining, Event, Flow, Phase, Salvage, Settings, Stage, Turn};
use crate::{
    agent::{
        drain::{
            estimate::Estimate,
            plan::{self, Decision, Situation},
            timeline::{Planned, Timeline},
        },
        effects::{Effect, Log, Order},
        generation::{End, Stopped},
        restart::{self, Standstill},
        save::{
            ledger::Ledger,
            scheduler::{Action, Moment, Scheduler},
            upload::{SaveEvent, Saved},
        },
        states::{Difference, Roll},
        stopping::{Outlook, Stopping},
        workers::WorkerEvent,
    },
    checkpoint::CheckpointError,
    error::{Error, Kind, Result},
    ids::{Fingerprint, Rank, SlotCount, Step},
    journal::{DrainPlan, JournalError},
    notice::{self, Notice},
    protocol::{FromWorker, StepReport, ToWorker},
    report::{self, StartParts},
    storage::{Adrift, StorageError},
    workload::{Diverged, Measured, Progress, Reports},
};

/// Consecutive failed saves, of the last state that can be saved, after which it is given up. Each includes the store's
/// own retries.
const LAST_SAVE_TRIES: u32 = 8;
/// The same after a notice, for an error that does not go away by itself: somebody waits for this process's end.
const LASTING_TRIES: u32 = 3;

/// A group that has been told to go.
#[derive(Debug)]
pub struct Training {
    pub(super) scheduler: Scheduler,
    pub(super) ledger: Ledger,
    /// Reports of steps that not every rank has finished.
    reports: Reports,
    /// Whether the run stops early.
    stopping: Stopping,
    /// When the newest step was finished, or the generation began.
    pub(super) stepped: Moment,
    standstill: Quiet,
    /// The notices, and the response to them.
    pub(super) timeline: Timeline,
    /// The save that a notice with time to spare asks for has been ordered.
    insured: bool,
    /// The slot whose upload failed, while it waits to be tried again.
    pub(super) retrying: Option<u8>,
    /// Bytes of one save's shards.
    bytes: u64,
    /// The step whose states are being compared, and what ranks have said of theirs.
    compared: (Step, Roll),
    /// Until the first step is finished: what the start was spent on, and when the ranks were told to go.
    start: Option<(Box<StartParts>, Moment)>,
}

/// How long nothing has moved, and how often that was reported.
#[derive(Debug)]
struct Quiet {
    since: Moment,
    told: u32,
}

impl Training {
    /// Every rank has loaded, and is told to go.
    pub(super) fn begin(settings: &Settings, scheduler: Scheduler, bytes: u64, now: Moment) -> Self {
        Self {
            scheduler,
            ledger: Ledger::begin(now),
            reports: Reports::new(settings.outline),
            stopping: settings.stopping,
            stepped: Moment::ZERO,
            standstill: Quiet { since: now, told: 0 },
            timeline: Timeline::default(),
            insured: false,
            retrying: None,
            bytes,
            compared: (Step(0), Roll::default()),
            start: None,
        }
    }

    /// The end of the first step will be reported, with what the start was spent on.
    pub(super) fn reports_its_start(&mut self, parts: StartParts, now: Moment) {
        self.start = Some((Box::new(parts), now));
    }

    /// Bytes of one save's shards.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn handle(mut self, event: Event, turn: &mut Turn<'_>) -> Flow<Phase> {
        let stage = Stage::Training;
        match event {
            Event::Notice(notice) => {
                if let Some(planned) = self.on_notice(&notice, stage, turn)? {
                    return Continue(Phase::Draining(Draining { training: self, planned }));
                }
            }
            Event::Worker(WorkerEvent::Message(rank, message)) => {
                if let Some(cause) = self.hear(rank, message, stage, turn)? {
                    return Salvage::new(self, None, cause).begin(turn);
                }
            }
            Event::Worker(WorkerEvent::Exited(rank, reason)) => {
                return Salvage::new(self, None, Cause::exited(rank, &reason)).begin(turn);
            }
            Event::Save(event) => self.on_save(event, stage, turn)?,
            Event::Retry { slot } => self.tries_again(slot, stage, turn)?,
            // Said before `Go`, or of a drain.
            Event::LaidOut { .. } | Event::Fetched(_) | Event::HeldUp { .. } => {}
            Event::Lost(error) => return Break(Err(error)),
            Event::Tick => {
                turn.looks_at_the_journal();
                let actions = self.scheduler.tick(turn.now);
                self.act(actions, stage, turn)?;
                if self.timeline.is_called()
                    && let Some(planned) = self.reconsider(stage, turn)?
                {
                    return Continue(Phase::Draining(Draining { training: self, planned }));
                }
                if let Some(cause) = self.look_at_the_standstill(turn) {
                    return Salvage::new(self, None, cause).begin(turn);
                }
            }
        }
        Continue(Phase::Training(self))
    }

    /// Detects a run whose steps have stopped coming: a hung kernel, a collective that waits for a rank, data that does
    /// not arrive. It is reported, or the workers are given up.
    fn look_at_the_standstill(&mut self, turn: &mut Turn<'_>) -> Option<Cause> {
        // Once all ranks have stopped, training waits for the store, which reports for itself.
        if self.scheduler.has_ended() {
            return None;
        }
        let step = self.scheduler.finished();
        let quiet = turn.now.saturating_sub(self.standstill.since);
        let usual = turn.shared.estimates.step.estimate();
        let usual = usual.and_then(|step| Duration::try_from_secs_f64(step.high).ok());
        let config = &turn.shared.settings.config;
        match restart::standstill(quiet, usual, self.standstill.told, &config.restart) {
            Standstill::Wait => None,
            // The last state may be waiting for a slot that a silent store occupies: ending the workers then would lose
            // it.
            Standstill::End if step >= turn.shared.settings.outline.last => None,
            Standstill::Tell => {
                self.standstill.told += 1;
                turn.reports(report::Event::NoProgress {
                    step,
                    quiet_s: quiet.as_secs_f64(),
                    lag_steps: step.get() - self.scheduler.committed().get(),
                    lag_s: self.ledger.lag(turn.now).as_secs_f64(),
                });
                None
            }
            Standstill::End => {
                Some(Cause::Died(format!("no step was finished for {} s after step {step}", quiet.as_secs())))
            }
        }
    }
}

/// The store's error behind that of a save: two errors speak in its place, and don't name it as their cause.
fn of_the_store(error: &Error) -> Option<&StorageError> {
    match (error.cause(), error.cause()) {
        (Some(CheckpointError::Storage(error)), _) | (_, Some(JournalError::Storage(error))) => Some(error),
        _ => error.cause(),
    }
}

/// Shared by this phase and those after it.
impl Training {
    /// Carries out the scheduler's decisions.
    pub(super) fn act(&mut self, actions: Vec<Action>, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow {
        let now = turn.now;
        for action in actions {
            match action {
                Action::Freeze { ticket } => turn.tell_all(ToWorker::Freeze { ticket }),
                Action::Thaw { saves, stop_after } => {
                    if let Some(step) = stop_after {
                        self.timeline.says(now, format!("all ranks stop after step {step}"));
                    }
                    turn.tell_all(ToWorker::Thaw { saves, stop_after });
                }
                Action::Upload { step, slot } => {
                    self.scheduler.copied(self.ledger.copy_s(step, now));
                    self.timeline.says(now, format!("upload of step {step} began"));
                    // Nobody trains any more, or not for long.
                    let urgent = !matches!(stage, Stage::Training) || self.scheduler.has_ended();
                    if urgent {
                        turn.does(Effect::Hush);
                    }
                    match self.ledger.upload(step, slot, urgent, self.bytes, now) {
                        Ok(transfer) => turn.does(Effect::Upload(transfer)),
                        Err(error) => return Break(Err(error)),
                    }
                    turn.does(Effect::Busy(true));
                }
                Action::Chosen(choice) => turn.does(Effect::Log(Log::Chosen(choice))),
                Action::Finished { step } => return Break(self.finish(step, stage, turn)),
            }
        }
        Continue(())
    }

    /// The loop has ended at `step`, and its state is committed or can't be.
    fn finish(&mut self, step: Step, stage: Stage<'_>, turn: &Turn<'_>) -> Result<End> {
        let last = turn.shared.settings.outline.last;
        let committed = self.scheduler.committed();
        let early = self.stopping.stops_after(step);
        if (step == last || early.is_some()) && committed >= step {
            // A run that was complete when it was loaded makes no step in this generation.
            return Ok(End::Completed { step, loss: self.ledger.loss(step), early });
        }
        let planned = stage.planned();
        if committed >= step {
            return Ok(self.stopped("the last finished step is committed", planned));
        }
        let error = self.ledger.take_error();
        if planned.is_some_and(|planned| planned.plan == DrainPlan::FinishInFlight) {
            let verdict = match error {
                Some(error) if self.ledger.last_failed() > committed => {
                    format!("the save under way failed, and there was no time for one of step {step}: {error}")
                }
                _ => format!("there was time for the save of step {committed}, not for one of step {step}"),
            };
            return Ok(self.stopped(verdict, planned));
        }
        let error = error.unwrap_or_else(|| Error::new(Kind::Bug, "last save failed"));
        if planned.is_none() {
            return Err(error.context(format!("save the last step, {step}")));
        }
        Ok(self.stopped(format!("the last step could not be saved: {error}"), planned))
    }

    /// The run was asked to stop; this is the outcome.
    pub(super) fn stopped(&self, verdict: impl Into<String>, planned: Option<&Planned>) -> End {
        End::Stopped(Stopped {
            step: self.scheduler.finished(),
            committed: self.scheduler.committed(),
            verdict: verdict.into(),
            drain: planned.and_then(|planned| self.timeline.story(planned)),
            cap: None,
        })
    }

    /// A worker speaks. `Some`: the group can't go on.
    pub(super) fn hear(
        &mut self,
        rank: Rank,
        message: FromWorker,
        stage: Stage<'_>,
        turn: &mut Turn<'_>,
    ) -> Flow<Option<Cause>> {
        let now = turn.now;
        let actions = match message {
            FromWorker::Frozen { ticket, started } => self.scheduler.frozen(ticket, started, now),
            FromWorker::Step(report) => return self.on_step(report, stage, turn),
            FromWorker::Captured { step, slot, copy_s, fingerprint } => {
                // The bytes of a rank that went wrong may be among them: this snapshot is not uploaded.
                if let Some(fingerprint) = fingerprint
                    && let Some(cause) = self.compare(rank, step, fingerprint, turn)
                {
                    return Continue(Some(cause));
                }
                self.ledger.captured(step, copy_s, now);
                self.scheduler.captured(rank, slot, step, now)
            }
            FromWorker::Stopped { step } => self.scheduler.rank_stopped(step, now),
            FromWorker::Stalled { step, stall_s } => {
                if let Some(cost) = self.ledger.stalled(step, stall_s, now) {
                    turn.does(Effect::Cost(cost));
                }
                return Continue(None);
            }
            FromWorker::Validated { step, sums } => {
                self.standstill = Quiet { since: now, told: 0 };
                match self.reports.validated(step, sums) {
                    Some(measured) => self.on_measured(&measured, turn),
                    None => return Continue(None),
                }
            }
            FromWorker::Failed { message, hint, permanent } => {
                return Continue(Some(Cause::said(rank, &message, hint, permanent)));
            }
            // Said before `Go`.
            FromWorker::Listening { .. } | FromWorker::Built { .. } | FromWorker::Ready { .. } => {
                return Continue(None);
            }
        };
        self.act(actions, stage, turn)?;
        Continue(None)
    }

    /// A rank says the fingerprint of what all ranks have at `step`. `Some`: it is the last, and they are not the same.
    fn compare(&mut self, rank: Rank, step: Step, fingerprint: Fingerprint, turn: &mut Turn<'_>) -> Option<Cause> {
        if self.compared.0 != step {
            self.compared = (step, Roll::default());
        }
        let Settings { outline, seats, .. } = &turn.shared.settings;
        let Difference { what, .. } = self.compared.1.hear(rank, fingerprint, outline.workers, seats)?;
        turn.shared.differed = Some(what.clone());
        Some(Cause::Died(format!("{what}, after step {step}")))
    }

    fn on_step(&mut self, report: StepReport, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow<Option<Cause>> {
        let now = turn.now;
        let progress = match self.reports.step(report) {
            None => return Continue(None),
            Some(Ok(progress)) => progress,
            // Snapshots captured before are good: they are committed first.
            Some(Err(Diverged { step, reason })) => {
                self.scheduler.condemn(step);
                return Continue(Some(Cause::Diverged { step, reason }));
            }
        };
        let Progress { step, step_s, .. } = progress;
        self.ledger.finished(step, progress.figures());
        self.stepped = now;
        self.standstill = Quiet { since: now, told: 0 };
        turn.shared.estimates.step.push(step_s);
        turn.shared.estimates.pace.step(step_s);
        let actions = self.scheduler.step_finished(step, step_s, now);
        let lag_steps = step.get() - self.scheduler.committed().get();
        turn.reports(progress.event(lag_steps, self.ledger.lag(now).as_secs_f64()));
        if let Some((mut parts, went)) = self.start.take() {
            parts.step_s = now.saturating_sub(went).as_secs_f64();
            parts.total_s = parts.invite_s + now.as_secs_f64();
            let generation = turn.shared.settings.generation;
            turn.reports(report::Event::FirstStep { step, generation, parts });
        }
        self.act(actions, stage, turn)?;
        Continue(None)
    }

    /// Every rank has measured its share of a state.
    fn on_measured(&mut self, measured: &Measured, turn: &mut Turn<'_>) -> Vec<Action> {
        if let Some(loss) = measured.loss {
            self.ledger.validated(measured.step, loss);
            self.ledger.measured(measured.step, measured.figures());
        }
        if let Some(event) = measured.event() {
            turn.reports(event);
        }
        self.judge(measured.step, measured.loss, turn)
    }

    /// Whether the run goes on after the state of `step`, at which every rank waits, if the run may stop early. If it
    /// does not, they are asked where they are, which is there, and end there: as at any other end.
    pub(super) fn judge(&mut self, step: Step, loss: Option<f64>, turn: &mut Turn<'_>) -> Vec<Action> {
        let verdict = self.stopping.judge(step, loss);
        self.ledger.stands(step, self.stopping.figures());
        match verdict {
            Outlook::Free => {}
            Outlook::Proceed => turn.tell_all(ToWorker::Proceed { step }),
            Outlook::Stop => return self.scheduler.stop_here(turn.now),
        }
        Vec::new()
    }

    /// An upload has progressed, or has ended.
    pub(super) fn on_save(&mut self, event: SaveEvent, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow {
        match event {
            SaveEvent::Progress { step, bytes } => {
                if let Some((sent, total)) = self.ledger.progress(bytes, turn.now) {
                    turn.reports(report::Event::Upload { step, sent, total });
                }
                Continue(())
            }
            SaveEvent::Ended { slot, result: Ok(saved), .. } => self.on_saved(slot, saved, stage, turn),
            SaveEvent::Ended { step, slot, result: Err(error) } => self.on_failed(step, slot, error, stage, turn),
        }
    }

    fn on_saved(&mut self, slot: u8, saved: Saved, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow {
        let now = turn.now;
        let Saved { committed, checksums } = saved;
        let (step, generation, cost) = (committed.step, committed.generation, committed.cost);
        turn.does(Effect::Busy(false));
        if let Some(change) = self.ledger.committed(&committed, &mut turn.shared.estimates, now) {
            self.scheduler.set_haste(change.hasty);
            turn.does(Effect::Log(Log::Haste(change)));
        }
        turn.does(Effect::Nodes(Order::Hold { slot, step, generation, checksums }));
        turn.reports(report::Event::Checkpoint {
            step,
            generation,
            bytes: committed.bytes,
            stall_s: cost.stall_s,
            copy_s: cost.copy_s,
            durable_s: cost.durable_s,
        });
        self.timeline.says(now, format!("step {step} is committed"));
        let in_flight = stage.planned().is_some_and(|planned| planned.plan == DrainPlan::FinishInFlight);
        if in_flight || self.scheduler.agreed_end().is_some_and(|end| step >= end) {
            self.timeline.saved(now);
        }
        // On a machine that is about to go, or at the end of the run, there is more important work.
        if !self.timeline.is_called() && !self.scheduler.has_ended() {
            turn.does(Effect::Prune);
        }
        self.scheduler.saved(cost.stall_s, cost.durable_s);
        let actions = self.scheduler.uploaded(slot, true, now);
        self.act(actions, stage, turn)
    }

    /// A save has failed. It is tried again after a pause; meanwhile the run trains on, or the drain goes on. Three
    /// failures are final: the run is lost, the store is no longer the one it was, or this process can write to the
    /// journal no more.
    fn on_failed(&mut self, step: Step, slot: u8, error: Error, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow {
        turn.does(Effect::Busy(false));
        if error.kind() == Kind::Fenced {
            return Break(Err(error));
        }
        if matches!(error.cause(), Some(JournalError::NoWriter)) {
            return Break(Err(error.context(format!("save step {step}"))));
        }
        if error.comes_of::<Adrift>() {
            let newest = self.scheduler.committed();
            let doing = format!("save step {step}; the newest checkpoint is of step {newest}");
            return Break(Err(error.context(doing)));
        }
        let lasts = of_the_store(&error).is_some_and(StorageError::lasts);
        let tries = if lasts && self.timeline.is_called() { LASTING_TRIES } else { LAST_SAVE_TRIES };
        let failure = self.ledger.failed(step, error, turn.now);
        if let Some(message) = failure.warning {
            turn.reports(report::Event::Warning { message });
        }
        let actions = match stage {
            // Nobody trains meanwhile: without a pause, and with a bound.
            Stage::Salvaging(_) => self.scheduler.salvage_failed(slot, turn.now),
            _ if self.scheduler.has_ended() && failure.times >= tries => self.scheduler.give_up_the_end(slot, turn.now),
            _ => {
                self.retrying = Some(slot);
                turn.does(Effect::Retry { slot, after: Duration::from_millis(250 << failure.times.min(5)) });
                return Continue(());
            }
        };
        self.act(actions, stage, turn)
    }

    /// The pause after a failed upload is over, unless a notice has ended it.
    pub(super) fn tries_again(&mut self, slot: u8, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow {
        if self.retrying.take_if(|waiting| *waiting == slot).is_none() {
            return Continue(());
        }
        let actions = self.scheduler.uploaded(slot, false, turn.now);
        self.act(actions, stage, turn)
    }

    /// A notice arrived. `Some`: the response, and this node leaves; `None`: it trains on.
    pub(super) fn on_notice(
        &mut self,
        notice: &Notice,
        stage: Stage<'_>,
        turn: &mut Turn<'_>,
    ) -> Flow<Option<Planned>> {
        turn.announces(notice);
        if notice.kind == notice::Kind::Rebalance {
            // A group about to stop saves anyway.
            if !self.timeline.is_called() {
                let actions = self.scheduler.save_now(turn.now);
                self.act(actions, stage, turn)?;
            }
            return Continue(stage.planned().cloned());
        }
        if self.timeline.hear(notice, turn.now) {
            let verdict = format!("left at once on a second {}", notice.source);
            return Break(Ok(self.stopped(verdict, stage.planned())));
        }
        self.reconsider(stage, turn)
    }

    /// Decides what can still be saved, and begins it. `Some`: the plan from now on; `None`: training goes on.
    fn reconsider(&mut self, stage: Stage<'_>, turn: &mut Turn<'_>) -> Flow<Option<Planned>> {
        let now = turn.now;
        let situation = self.situation(turn);
        let (decision, reason) = plan::decide(&situation);
        let (plan, needs) = match decision {
            Decision::TrainOn { .. } if stage.planned().is_some() => return Continue(stage.planned().cloned()),
            Decision::TrainOn { .. } => {
                if !std::mem::replace(&mut self.insured, true) {
                    self.timeline.says(now, reason.clone());
                    turn.does(Effect::Log(Log::TrainsOn(reason)));
                    let actions = self.scheduler.save_now(now);
                    self.act(actions, stage, turn)?;
                }
                return Continue(None);
            }
            Decision::Drain { plan, needs } => (plan, needs.map(|needs| needs.mean)),
        };
        let planned = match stage.planned() {
            Some(before) if before.plan == plan => before.clone(),
            _ => {
                let planned = self.timeline.plans(now, plan, &reason, needs);
                let (plan, left_s) = (plan.name(), situation.left_s);
                turn.reports(report::Event::Drain { plan, left_s, predicted_s: needs, reason: reason.clone() });
                planned
            }
        };
        if plan == DrainPlan::StopEarly {
            return Break(Ok(self.stopped(reason, Some(&planned))));
        }
        let begins = stage.planned().is_none();
        let actions = match plan {
            DrainPlan::FinishInFlight => self.scheduler.drain_unsaved(now),
            _ if begins => self.scheduler.drain(now),
            _ => Vec::new(),
        };
        if begins {
            // There may have been time to train on since the notice.
            turn.does(Effect::Hush);
        }
        self.act(actions, Stage::Draining(&planned), turn)?;
        if let Some(slot) = self.retrying.filter(|_| begins) {
            // No time is left for a pause.
            self.tries_again(slot, Stage::Draining(&planned), turn)?;
        }
        Continue(Some(planned))
    }

    /// Everything the decision depends on.
    fn situation(&self, turn: &Turn<'_>) -> Situation {
        let estimates = &turn.shared.estimates;
        let config = &turn.shared.settings.config;
        let since = turn.now.saturating_sub(self.stepped).as_secs_f64();
        let ended = self.scheduler.has_ended();
        let step = if ended { None } else { estimates.step.estimate() };
        let parts = u64::from(config.storage.concurrency) * (u64::from(config.storage.part_mib) << 20);
        let under_way = self.ledger.under_way(turn.now);
        let rest = under_way.and_then(|(total, sent, elapsed)| estimates.rest(total, sent, parts, elapsed));
        Situation {
            left_s: self.timeline.left_s(turn.now),
            usual: self.timeline.usual(),
            may_train_on: config.notice.train_in_spare_time && self.timeline.leaves_the_time_to_us(),
            finished: self.scheduler.finished(),
            committed: self.scheduler.committed(),
            ended,
            in_flight: self.scheduler.in_flight().map(|step| (step, rest)),
            step: step.map_or(Estimate::exactly(0.0), |step| step.after(since)),
            whole_step: step.unwrap_or(Estimate::exactly(0.0)),
            copy: estimates.copy.estimate().unwrap_or(Estimate::exactly(0.0)),
            copy_waits: config.checkpoint.slots == SlotCount::ONE,
            save: estimates.upload(self.bytes),
        }
    }

    /// The time of the last record has come: state that is not durable by now is lost.
    pub(super) fn look_at_the_time(&mut self, planned: Option<&Planned>, turn: &Turn<'_>) -> Flow {
        let left_s = self.timeline.left_s(turn.now).unwrap_or(f64::INFINITY);
        if left_s > plan::LAST_WORDS_S {
            return Continue(());
        }
        let (finished, committed) = (self.scheduler.finished(), self.scheduler.committed());
        self.timeline.says(turn.now, "the time is up");
        let verdict = if committed >= finished {
            format!("the time was up; step {finished} is committed")
        } else {
            format!("the time was up before step {finished} was durable")
        };
        Break(Ok(self.stopped(verdict, planned)))
    }
}
