//! The effects that the state machine of a generation asks for, and their performer.
//!
//! [`Effects`] are plain values that [`StateMachine::handle`](super::phase::StateMachine::handle) gives back;
//! [`Performer::perform`] carries them out, in order. None of them waits: an effect that takes time runs as a task of
//! its own, whose end comes back as an [`Event`]. An immediate answer is an event, too.
//!
//! All effects of one event are performed, also those after one that fails; a failure is answered by [`Event::Lost`].
//! Only then does the generation end, if it does.
//!
//! Owns: worker processes and all tasks of the generation. The snapshot slots are the node's, and are lent to it.
//! Decides nothing but what an end means for the work under way.
//!
//! *Crash:* work under way is lost, and no record names it. *Cancel:* [`Performer::end`] ends all of it; requests
//! already sent to the store may land.

use std::{ops::ControlFlow, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinHandle, JoinSet},
    time::Instant,
};

use super::{
    fence,
    generation::{End, Left, Load, Plan, Source},
    phase::Event,
    save::{
        ledger::Transfer,
        slots::{Fetched, Fetching, Slots},
        upload::{self, SaveEvent, Snapshot},
    },
    upkeep::retention::Retention,
    workers::{WorkerEvent, Workers},
};
use crate::{
    checkpoint::CheckpointError,
    error::Result,
    ids::{Generation, Rank, Step},
    journal::{Record, SaveCost, Urgency},
    protocol::ToWorker,
    report::{self, Reporter},
    snapshot::{
        mode::{CaptureMode, Choice},
        plan::TensorSpec,
    },
    storage::Crc64,
};

/// How long workers may take to exit when asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long the end of a generation waits for the records of notices, which yield to all others.
const NOTED: Duration = Duration::from_secs(1);
/// How long killed processes may take to be gone. One that hangs in the kernel never is.
const GONE: Duration = Duration::from_secs(10);

/// One thing to do.
#[derive(Debug)]
pub enum Effect {
    /// Tell every worker.
    TellAll(ToWorker),
    /// Size the slots for this state, and tell each worker where it writes. Answered by [`Event::LaidOut`].
    LayOut(Vec<TensorSpec>),
    /// The fetched checkpoint lies in its slot: hold it there for workers that crash.
    Received,
    /// This checkpoint was restored from, so every byte of its tensors was verified against its checksums.
    Vouch {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
    },
    /// Upload a slot and commit it. Followed by [`Event::Save`].
    Upload(Transfer),
    /// The cost of the save under way so far.
    Cost(SaveCost),
    /// A slot's snapshot is committed: hold it for workers that crash.
    Hold {
        /// The slot.
        slot: u8,
        /// Its checkpoint's step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
        /// The checksum of every file, by name.
        checksums: Vec<(String, Crc64)>,
    },
    /// Answer with [`Event::Retry`] later.
    Retry {
        /// The slot whose upload has failed.
        slot: u8,
        /// The pause.
        after: Duration,
    },
    /// Check whether the run is still ours. A bad answer is [`Event::Lost`].
    Look,
    /// Append a notice's record, if the journal is free.
    Note(Record),
    /// From now on the store and the journal are reserved for the last saves.
    Hush,
    /// Whether the store has more important work than checking kept checkpoints: a restore, or a save.
    Busy(bool),
    /// Delete the checkpoints that are no longer wanted.
    Prune,
    /// Kill all workers; no effect if already done.
    Kill,
    /// Tell people.
    Report(report::Event),
    /// Write to the log.
    Log(Log),
}

/// A line of the log.
#[derive(Debug)]
pub enum Log {
    /// The model is built.
    Built {
        /// The device that rank 0 computes on.
        device: String,
        /// Trained parameters.
        parameters: u64,
        /// Workers on this node.
        workers: u32,
    },
    /// The way in which captures are made from now on.
    Chosen(Choice),
    /// Why a notice leaves time to train on.
    TrainsOn(String),
    /// Transfers no longer yield to other threads: a save took too long to be durable.
    Starved {
        /// Seconds.
        durable_s: f64,
    },
}

/// All effects of one event, in order, and how the generation has ended, if it has.
#[must_use]
#[derive(Debug, Default)]
pub struct Effects {
    list: Vec<Effect>,
    end: Option<Result<End>>,
}

impl Effects {
    /// Adds an effect after those before it.
    pub fn push(&mut self, effect: Effect) {
        self.list.push(effect);
    }

    /// The same effects, and then the end.
    pub fn ending(self, end: Result<End>) -> Self {
        Self { end: Some(end), ..self }
    }

    /// The effects, in order.
    #[cfg(test)]
    pub fn list(&self) -> &[Effect] {
        &self.list
    }

    /// How the generation has ended.
    #[cfg(test)]
    pub fn end(&self) -> Option<&Result<End>> {
        self.end.as_ref()
    }
}

/// Where the tasks of a generation report what has happened.
pub struct Senders {
    /// Reports from workers.
    pub workers: mpsc::UnboundedSender<WorkerEvent>,
    /// Results of uploads.
    pub saves: mpsc::UnboundedSender<SaveEvent>,
    /// The result of the fetch.
    pub fetched: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>,
    /// All other events.
    pub later: mpsc::UnboundedSender<Event>,
}

/// What the tasks of a generation report.
pub struct Answers {
    workers: mpsc::UnboundedReceiver<WorkerEvent>,
    saves: mpsc::UnboundedReceiver<SaveEvent>,
    fetched: mpsc::UnboundedReceiver<Result<Fetched, CheckpointError>>,
    later: mpsc::UnboundedReceiver<Event>,
}

/// Both ends, for one generation.
pub fn channels() -> (Senders, Answers) {
    let (to_workers, workers) = mpsc::unbounded_channel();
    let (to_saves, saves) = mpsc::unbounded_channel();
    let (to_fetched, fetched) = mpsc::unbounded_channel();
    let (to_later, later) = mpsc::unbounded_channel();
    let senders = Senders { workers: to_workers, saves: to_saves, fetched: to_fetched, later: to_later };
    (senders, Answers { workers, saves, fetched, later })
}

impl Answers {
    /// The next event. May be dropped at any moment: nothing is lost.
    pub async fn next(&mut self) -> Event {
        tokio::select! {
            biased;
            Some(event) = self.workers.recv() => Event::Worker(event),
            Some(event) = self.saves.recv() => Event::Save(event),
            Some(result) = self.fetched.recv() => Event::Fetched(result),
            Some(event) = self.later.recv() => event,
            else => std::future::pending().await,
        }
    }
}

/// The save under way.
struct Saving {
    cost: watch::Sender<SaveCost>,
    give_up: AbortHandle,
}

/// What the end of a generation means for its work under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parting {
    /// The save under way is given up: a snapshot that is not a checkpoint by now must not become one, since the
    /// journal is about to say so.
    gives_up_save: bool,
    /// The workers are asked to exit, and not killed.
    dismisses: bool,
    /// The journal's last record is more urgent than the end of the workers.
    leaves_rest: bool,
}

impl Parting {
    const fn of(end: &Result<End>) -> Self {
        match end {
            Ok(End::Completed { .. }) => Self { gives_up_save: false, dismisses: true, leaves_rest: true },
            // If steps are lost, the workers are in the middle of another one, and there may be no time to wait for its
            // end.
            Ok(End::Stopped(stopped)) => {
                let dismisses = stopped.committed.get() >= stopped.step.get();
                Self { gives_up_save: true, dismisses, leaves_rest: true }
            }
            Ok(End::Died { .. } | End::Damaged { .. } | End::Diverged { .. }) | Err(_) => {
                Self { gives_up_save: false, dismisses: false, leaves_rest: false }
            }
        }
    }
}

/// Performs the effects.
pub struct Performer<'a> {
    start: &'a Plan,
    /// When the generation began: the zero of its time.
    began: Instant,
    slots: &'a mut Slots,
    reporter: &'a Reporter,
    /// `None`: they are being killed.
    workers: Option<Workers>,
    killing: Option<JoinHandle<()>>,
    /// The fetch of the state to load, if there is one.
    fetching: Fetching,
    retention: Retention,
    /// The look at the journal, if one is under way.
    looking: Option<AbortHandle>,
    /// Notices being recorded.
    notes: JoinSet<()>,
    /// The save begun last.
    saving: Option<Saving>,
    senders: Senders,
}

impl<'a> Performer<'a> {
    /// For a generation that began at `began`, with its `workers`, which are given their assignments, and its fetch.
    pub fn begin(
        start: &'a Plan,
        began: Instant,
        slots: &'a mut Slots,
        reporter: &'a Reporter,
        workers: Workers,
        fetching: Fetching,
        senders: Senders,
    ) -> Result<Self> {
        let upload::Context { run, journal, .. } = &start.upload;
        let retention = Retention::begin(run, journal, start.config.checkpoint, &start.docket);
        for rank in (0..start.workload.workers()).map(Rank) {
            let assignment = start.workload.assignment(rank, start.upload.generation, start.load.step())?;
            workers.tell(rank, ToWorker::Start(Box::new(assignment)));
        }
        Ok(Self {
            start,
            began,
            slots,
            reporter,
            workers: Some(workers),
            killing: None,
            fetching,
            retention,
            looking: None,
            notes: JoinSet::new(),
            saving: None,
            senders,
        })
    }

    /// Performs all of them; returns the immediate answers, or how the generation has ended.
    pub fn perform(&mut self, effects: Effects) -> ControlFlow<Result<End>, Vec<Event>> {
        let Effects { list, end } = effects;
        let answers = list.into_iter().filter_map(|effect| self.perform_one(effect)).collect();
        match end {
            Some(end) => ControlFlow::Break(end),
            None => ControlFlow::Continue(answers),
        }
    }

    fn perform_one(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::TellAll(message) => {
                if let Some(workers) = &self.workers {
                    workers.tell_all(&message);
                }
            }
            Effect::LayOut(tensors) => return Some(self.lay_out(&tensors).unwrap_or_else(Event::Lost)),
            Effect::Received => {
                if let Load::Checkpoint { step, generation, from: Source::Store { files, .. } } = &self.start.load {
                    self.slots.received(*step, *generation, &self.fetching.places, files);
                }
            }
            Effect::Vouch { step, generation } => self.retention.restored(step, generation),
            Effect::Upload(transfer) => return self.upload(transfer).err().map(Event::Lost),
            Effect::Cost(cost) => {
                if let Some(saving) = &self.saving {
                    saving.cost.send_replace(cost);
                }
            }
            Effect::Hold { slot, step, generation, checksums } => self.slots.hold(slot, step, generation, &checksums),
            Effect::Retry { slot, after } => {
                let later = self.senders.later.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let _ = later.send(Event::Retry { slot });
                });
            }
            Effect::Look => self.look(),
            Effect::Note(record) => self.note(record),
            Effect::Hush => self.hush(),
            Effect::Busy(busy) => self.retention.busy(busy),
            Effect::Prune => self.retention.start(),
            Effect::Kill => {
                if let Some(workers) = self.workers.take() {
                    self.killing = Some(tokio::spawn(workers.kill()));
                }
            }
            Effect::Report(event) => self.reporter.event(&event),
            Effect::Log(line) => log(line),
        }
        None
    }

    fn lay_out(&mut self, tensors: &[TensorSpec]) -> Result<Event> {
        let mut bytes = 0;
        for (plan, base) in self.slots.lay_out(tensors, self.start.upload.world_size)? {
            bytes += plan.shards.iter().map(|shard| shard.len).sum::<u64>();
            if let Some(workers) = &self.workers {
                workers.tell(plan.rank, ToWorker::Layout { plan: Box::new(plan.clone()), base });
            }
        }
        Ok(Event::LaidOut { bytes })
    }

    fn upload(&mut self, transfer: Transfer) -> Result<()> {
        let Transfer { step, slot, figures, validation_loss, cost, taken, priority } = transfer;
        let (uploads, index) = self.slots.uploads(slot)?;
        let small = self.start.workload.small_files(step, index)?;
        let mut context = self.start.upload.clone();
        context.run = context.run.at_priority(priority);
        let taken = self.began + taken;
        let (cost, costs) = watch::channel(cost);
        let snapshot = Snapshot { step, slot, uploads, small, figures, validation_loss, cost: costs, taken };
        self.saving = Some(Saving { cost, give_up: upload::start(context, snapshot, self.senders.saves.clone()) });
        Ok(())
    }

    fn look(&mut self) {
        let (journal, run) = (self.start.upload.journal.clone(), self.start.upload.run.clone());
        let (me, generation) = (self.start.upload.node.clone(), self.start.upload.generation);
        let later = self.senders.later.clone();
        let look = tokio::spawn(async move {
            if let Some(error) = fence::look_once(&journal, &run, &me, generation).await {
                let _ = later.send(Event::Lost(error));
            }
        });
        self.looking = Some(look.abort_handle());
    }

    /// In the background: neither the drain nor the commit at its end waits for it. If the record lands after it was
    /// given up, the next append simply reads one more record before its own.
    fn note(&mut self, record: Record) {
        let journal = self.start.upload.journal.clone();
        self.notes.spawn(async move {
            if let Err(error) = journal.append_if(Urgency::Notice, record, |_| true).await {
                tracing::debug!(%error, "notice not written to the journal");
            }
        });
    }

    fn hush(&mut self) {
        if let Some(looking) = self.looking.take() {
            looking.abort();
        }
        self.retention.hush();
    }

    /// Ends all work under way. Waits until the workers are gone, unless something is more urgent: then the rest is
    /// returned.
    pub async fn end(mut self, end: &Result<End>) -> Result<Option<Left>> {
        let parting = Parting::of(end);
        self.hush();
        self.fetching.stop();
        if parting.gives_up_save {
            if let Some(saving) = self.saving.take() {
                saving.give_up.abort();
            }
            let written = async { while self.notes.join_next().await.is_some() {} };
            let _ = tokio::time::timeout(NOTED, written).await;
            self.notes.shutdown().await;
        }
        let workers = self.workers.take().map(|workers| {
            if parting.dismisses { tokio::spawn(workers.dismiss(GRACE)) } else { tokio::spawn(workers.kill()) }
        });
        let processes = [workers, self.killing.take()];
        let gone = async move {
            let mut gone = true;
            for process in processes.into_iter().flatten() {
                if tokio::time::timeout(GONE, process).await.is_err() {
                    tracing::warn!("worker processes were killed and are not gone yet");
                    gone = false;
                }
            }
            gone
        };
        if parting.leaves_rest {
            let leaving = tokio::spawn(async move { _ = gone.await });
            return Ok(Some(Left { leaving: Some(leaving), retention: Some(self.retention) }));
        }
        // The next generation needs their devices' memory, and the slots for itself.
        let gone = gone.await;
        if matches!(end, Ok(End::Died { .. } | End::Damaged { .. })) {
            self.slots.end_generation(gone).await?;
        }
        Ok(None)
    }
}

fn log(line: Log) {
    match line {
        Log::Built { device, parameters, workers } => tracing::info!(device, parameters, workers, "model built"),
        Log::Chosen(Choice { mode, overlap_s, blocking_s, copy_s }) => {
            let how = match mode {
                CaptureMode::Overlap => "captures run beside the next step",
                CaptureMode::Blocking => "captures hold the loop up",
            };
            match blocking_s {
                Some(blocking_s) => tracing::info!(overlap_s, blocking_s, copy_s, "{how}: measured to cost less"),
                None => tracing::info!(overlap_s, copy_s, "{how}: a save costs no more than the bare copy"),
            }
        }
        Log::TrainsOn(reason) => tracing::info!("{reason}"),
        Log::Starved { durable_s } => {
            tracing::info!(durable_s, "saves are starved of CPU: uploads now run at normal priority")
        }
    }
}

#[cfg(test)]
mod tests;
