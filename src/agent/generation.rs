//! One life of a worker group: from its processes' start to their end.
//!
//! One event loop, no shared state: `select!` arms only make an [`Input`]; [`Life::handle`] changes state and acts. What to do
//! about saves and about the end is decided by the [`Scheduler`]; this file carries it out.
//!
//! A life ends in one of the ways of [`End`]. Whatever the way, its processes are gone afterwards, or on their way out
//! ([`Left`]), and snapshots that every rank had captured have been uploaded and committed, unless the run was lost to
//! another writer or there was no time to wait: then the save under way is given up, so that what is said of it stays
//! true.

mod drain;
mod look;
mod progress;

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinHandle, JoinSet},
    time::Instant,
};

use super::{
    drain::{estimate::Estimates, timeline::Timeline},
    save::{
        ledger::Ledger,
        scheduler::{Action, Moment, Scheduler, Setup},
        slots::{Fetched, RESTORE_SLOT, Slots},
        upload::{self, SaveEvent},
    },
    upkeep::retention::Retention,
    workers::{WorkerEvent, Workers},
};
use crate::{
    checkpoint::{CheckpointError, condemn::Docket, restore::RemoteFile},
    config::RunConfig,
    error::{Error, Kind, Result},
    ids::{Generation, Rank, Step},
    journal::{Drain, DrainPlan},
    notice::{Notice, Notices},
    protocol::{Assignment, FromWorker, StepReport, ToWorker},
    report::{Event, Reporter},
    snapshot::{
        cadence::Measured,
        mode::{CaptureMode, Choice},
        plan::TensorSpec,
    },
    storage::{Adrift, Store},
};

const TICK: Duration = Duration::from_millis(200);
/// How long workers that were asked to leave may take.
const GRACE: Duration = Duration::from_secs(5);
/// Failed saves of the last state in a row, after which it is given up. Each has the store's own retries within it.
const LAST_SAVE_TRIES: u32 = 8;
/// How long the end of a life waits for the records of notices, which give way to all others.
const NOTED: Duration = Duration::from_secs(1);
/// How long processes that were killed may take to be gone. One that hangs in the kernel never is.
const GONE: Duration = Duration::from_secs(10);

/// What a life starts with.
pub struct Plan {
    /// The run's configuration, overrides applied.
    pub config: RunConfig,
    /// Local folder of the token shards.
    pub data_dir: std::path::PathBuf,
    /// Sequences of one pass over the data.
    pub sequences: std::num::NonZeroU64,
    /// Workers on this node.
    pub workers: u32,
    /// What is loaded.
    pub load: Load,
    /// For saves.
    pub upload: upload::Context,
    /// Files that stand beside the shards in every checkpoint.
    pub companions: Vec<(String, Bytes)>,
    /// What is known of the cost of saves and the life of machines.
    pub measured: Measured,
    /// What this process has found damaged.
    pub docket: Docket,
}

/// What the workers' state is made from.
#[derive(Clone, Debug)]
pub enum Load {
    /// Weights from the seed.
    Nothing,
    /// A model folder's weights, moments of zero.
    Weights {
        /// The folder.
        folder: Store,
        /// Its files.
        files: Vec<RemoteFile>,
    },
    /// A checkpoint.
    Checkpoint {
        /// Its step.
        step: Step,
        /// The generation that wrote it.
        generation: Generation,
        /// Where it is read.
        from: Source,
    },
}

/// Where a checkpoint is read.
#[derive(Clone, Debug)]
pub enum Source {
    /// In the store.
    Store {
        /// Its folder's key in the run.
        folder: String,
        /// Its shards.
        files: Vec<RemoteFile>,
    },
    /// In this node's memory: a slot holds it, checked.
    Slot {
        /// The slot.
        slot: u8,
        /// Each file's first byte and length in the slot.
        files: Vec<(u64, u64)>,
    },
}

impl Load {
    /// The step whose state this is.
    pub fn step(&self) -> Step {
        match self {
            Self::Checkpoint { step, .. } => *step,
            _ => Step(0),
        }
    }
}

/// How a life ended.
#[derive(Debug)]
pub enum End {
    /// The last step is committed.
    Completed {
        /// Its loss.
        loss: f64,
    },
    /// Asked to stop.
    Stopped(Stopped),
    /// A worker died; the group must be started again.
    Died {
        /// The last finished step.
        step: Step,
        /// What is known.
        reason: String,
    },
    /// The checkpoint is damaged in a way that only reading it all could show.
    Damaged {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A loss or gradient is not finite.
    Diverged {
        /// The step.
        step: Step,
        /// Which number.
        reason: String,
    },
}

/// A run that was asked to stop.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// The last finished step.
    pub step: Step,
    /// The newest checkpoint, if there is one.
    pub committed: Step,
    /// What became of the save of the last step.
    pub verdict: String,
    /// How the drain went, if there was one.
    pub drain: Option<Drain>,
}

/// Everything that can happen to a life.
enum Input {
    Worker(WorkerEvent),
    Save(SaveEvent),
    Fetch(Result<Fetched, CheckpointError>),
    Notice(Notice),
    Retry {
        slot: u8,
    },
    /// The run can't go on here.
    Over(Error),
    Tick,
}

struct Life<'a> {
    start: Plan,
    reporter: &'a Reporter,
    slots: &'a mut Slots,
    workers: Option<Workers>,
    built: Vec<Option<Vec<TensorSpec>>>,
    /// Where what is to be loaded lies: its slot, and each file's place in it.
    places: (u8, Vec<(u64, u64)>),
    fetched: Option<Fetched>,
    loading_since: Instant,
    ready: u32,
    /// `None` before `Go`.
    scheduler: Option<Scheduler>,
    ledger: Ledger,
    reports: BTreeMap<Step, Vec<StepReport>>,
    validations: BTreeMap<Step, (u32, f64, u64)>,
    estimates: &'a mut Estimates,
    /// When the newest step was finished.
    stepped: Instant,
    standstill: progress::Quiet,
    /// What said that the run is to stop, and what is done about it.
    timeline: Timeline,
    /// Notices that were written to the journal.
    written: u32,
    /// Those that are being written.
    notes: JoinSet<()>,
    /// The save that a notice with time to spare asks for has been ordered.
    insured: bool,
    draining: bool,
    /// A worker has died or said why it can't go on; what is left is to finish uploads.
    dead: Option<Death>,
    retention: Retention,
    clock: Instant,
    looked: Instant,
    /// The look at the journal that may be under way.
    looking: Option<AbortHandle>,
    killing: Option<JoinHandle<()>>,
    retries: mpsc::UnboundedSender<u8>,
    fence: mpsc::UnboundedSender<Error>,
}

/// Why the workers can't go on.
enum Death {
    /// One died; its group may be started again.
    Died(String),
    /// Said by the worker itself: starting again will not help.
    Permanent(Error),
    /// A loss or gradient is not finite.
    Diverged { step: Step, reason: String },
}

/// What a life that has ended well leaves to be done once the journal's last words are written, which are more urgent.
#[derive(Debug, Default)]
pub struct Left {
    /// Workers that are on their way out; it ends when they are gone.
    pub leaving: Option<JoinHandle<()>>,
    /// Of a run that is complete: has the time to leave the store as `checkpoint.keep` says.
    pub retention: Option<Retention>,
}

/// Runs a life to its end. `images` and `estimates` are the node's: what they hold outlives it. `left` is filled by a life
/// that is complete or was asked to stop.
pub async fn run(
    start: Plan,
    slots: &mut Slots,
    estimates: &mut Estimates,
    notices: &mut Notices,
    reporter: &Reporter,
    left: &mut Left,
) -> Result<End> {
    let (worker_events, mut from_workers) = mpsc::unbounded_channel();
    let (saves, mut from_saver) = mpsc::unbounded_channel();
    let (retries, mut retry) = mpsc::unbounded_channel();
    let (fence, mut fenced) = mpsc::unbounded_channel();
    let (fetch_done, mut fetching) = mpsc::unbounded_channel();

    slots.begin_generation();
    let workers = Workers::start(start.workers, slots.shared(), start.config.train.threads, &worker_events)?;
    let now = Instant::now();
    let (places, fetched) = begin_load(&start, slots, fetch_done)?;
    let mut life = Life {
        ledger: Ledger::new(start.upload.clone(), start.companions.clone(), start.sequences, saves),
        reporter,
        slots,
        workers: Some(workers),
        built: vec![None; start.workers as usize],
        places,
        fetched,
        loading_since: now,
        ready: 0,
        scheduler: None,
        reports: BTreeMap::new(),
        validations: BTreeMap::new(),
        estimates,
        stepped: now,
        standstill: progress::Quiet::begin(now),
        timeline: Timeline::default(),
        written: 0,
        notes: JoinSet::new(),
        insured: false,
        draining: false,
        dead: None,
        retention: Retention::begin(&start.upload.run, &start.upload.journal, start.config.checkpoint, &start.docket),
        clock: now,
        looked: now,
        looking: None,
        killing: None,
        retries,
        fence,
        start,
    };
    life.assign();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let end = loop {
        // Messages first, then the clock: what a worker said before it died must be heard before its death is acted on.
        let input = tokio::select! {
            biased;
            notice = notices.next() => Input::Notice(notice),
            Some(event) = from_workers.recv() => Input::Worker(event),
            Some(event) = from_saver.recv() => Input::Save(event),
            Some(result) = fetching.recv() => Input::Fetch(result),
            Some(slot) = retry.recv() => Input::Retry { slot },
            Some(error) = fenced.recv() => Input::Over(error),
            _ = tick.tick() => Input::Tick,
        };
        match life.handle(input) {
            Ok(None) => {}
            Ok(Some(end)) => break Ok(end),
            Err(error) => break Err(error),
        }
    };
    life.hush();
    if matches!(end, Ok(End::Stopped(_))) {
        life.ledger.give_up();
        let written = async { while life.notes.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(NOTED, written).await;
        life.notes.shutdown().await;
    }
    let workers = life.workers.take().map(|workers| match &end {
        Ok(End::Completed { .. }) => tokio::spawn(workers.dismiss(GRACE)),
        // Where steps are lost they are in the midst of another one, and there may be no time to wait for its end.
        Ok(End::Stopped(stopped)) if stopped.committed >= stopped.step => tokio::spawn(workers.dismiss(GRACE)),
        _ => tokio::spawn(workers.kill()),
    });
    let processes = [workers, life.killing.take()];
    let gone = async move {
        for process in processes.into_iter().flatten() {
            if tokio::time::timeout(GONE, process).await.is_err() {
                tracing::warn!("worker processes were killed and are not gone yet");
            }
        }
    };
    if matches!(end, Ok(End::Stopped(_) | End::Completed { .. })) {
        *left = Left { leaving: Some(tokio::spawn(gone)), retention: Some(life.retention) };
        return end;
    }
    // The next life needs their devices' memory.
    gone.await;
    end
}

/// A slot, and where in it each file lies.
type Places = (u8, Vec<(u64, u64)>);

/// Starts getting what is to be loaded, while the workers start. Gives where it will lie; what a slot holds is there already.
fn begin_load(
    start: &Plan,
    slots: &mut Slots,
    done: mpsc::UnboundedSender<Result<Fetched, CheckpointError>>,
) -> Result<(Places, Option<Fetched>)> {
    let (store, folder, files) = match &start.load {
        Load::Nothing => return Ok(((RESTORE_SLOT, Vec::new()), None)),
        Load::Checkpoint { from: Source::Slot { slot, files }, .. } => {
            let bytes = files.iter().map(|(_, len)| len).sum();
            return Ok(((*slot, files.clone()), Some(Fetched { bytes, seconds: 0.0 })));
        }
        Load::Weights { folder, files } => (folder.clone(), String::new(), files.clone()),
        Load::Checkpoint { from: Source::Store { folder, files }, .. } => {
            (start.upload.run.clone(), folder.clone(), files.clone())
        }
    };
    let fetch = slots.receive(files, u64::from(start.config.storage.part_mib) << 20)?;
    let places = fetch.files.clone();
    fetch.start(store, folder, done);
    Ok(((RESTORE_SLOT, places), None))
}

impl Life<'_> {
    fn now(&self) -> Moment {
        self.clock.elapsed()
    }

    fn tell_all(&self, message: &ToWorker) {
        if let Some(workers) = &self.workers {
            workers.tell_all(message);
        }
    }

    fn tell(&self, rank: Rank, message: ToWorker) {
        if let Some(workers) = &self.workers {
            workers.tell(rank, message);
        }
    }

    fn assign(&self) {
        for rank in 0..self.start.workers {
            let assignment = Assignment {
                rank: Rank(rank),
                local_rank: Rank(rank),
                world_size: self.start.upload.world_size,
                generation: self.start.upload.generation,
                config: self.start.config.clone(),
                data_dir: self.start.data_dir.clone(),
                data: self.start.upload.data.clone(),
                resume_step: self.start.load.step(),
            };
            self.tell(Rank(rank), ToWorker::Start(Box::new(assignment)));
        }
    }

    /// The only place that changes state.
    fn handle(&mut self, input: Input) -> Result<Option<End>> {
        match input {
            Input::Notice(notice) => return self.on_notice(&notice),
            Input::Worker(WorkerEvent::Message(rank, message)) => return self.on_message(rank, message),
            Input::Worker(WorkerEvent::Exited(rank, reason)) => self.on_exit(rank, &reason),
            Input::Save(event) => return self.on_save(event),
            Input::Fetch(Ok(fetched)) => {
                if let Load::Checkpoint { step, generation, from: Source::Store { .. } } = &self.start.load {
                    self.retention.restored(*step, *generation);
                }
                self.fetched = Some(fetched);
                self.load_if_possible();
            }
            Input::Fetch(Err(CheckpointError::Damaged { object, reason }))
                if matches!(self.start.load, Load::Checkpoint { .. }) =>
            {
                return Ok(Some(End::Damaged { object, reason }));
            }
            Input::Fetch(Err(error)) => return Err(Error::from(error).context("restore")),
            // The snapshot is taken up by the salvage of what the dead have left.
            Input::Retry { .. } if self.dead.is_some() => {}
            Input::Retry { slot } => {
                let now = self.now();
                let actions = self.scheduler.as_mut().map(|c| c.uploaded(slot, false, now)).unwrap_or_default();
                return self.act(actions);
            }
            Input::Over(error) => return Err(error),
            Input::Tick => {
                self.look_at_the_journal();
                let now = self.now();
                let actions = self.scheduler.as_mut().map(|c| c.tick(now)).unwrap_or_default();
                if let Some(end) = self.act(actions)? {
                    return Ok(Some(end));
                }
                if let Some(end) = self.look_at_the_deadline()? {
                    return Ok(Some(end));
                }
                self.look_at_the_standstill();
            }
        }
        self.end_of_the_dead()
    }

    fn finished(&self) -> Step {
        self.scheduler.as_ref().map_or(self.start.load.step(), Scheduler::finished)
    }

    fn committed(&self) -> Step {
        self.scheduler.as_ref().map_or(self.start.load.step(), Scheduler::committed)
    }

    fn stopped(&self, verdict: impl Into<String>) -> End {
        let drain = self.timeline.story();
        End::Stopped(Stopped { step: self.finished(), committed: self.committed(), verdict: verdict.into(), drain })
    }

    fn on_message(&mut self, rank: Rank, message: FromWorker) -> Result<Option<End>> {
        let now = self.now();
        match message {
            FromWorker::Listening { port } => self.tell_all(&ToWorker::Peers { host: "127.0.0.1".into(), port }),
            FromWorker::Built { tensors, device, parameters } => {
                if rank == Rank(0) {
                    tracing::info!(device, parameters, workers = self.start.workers, "model built");
                }
                if let Some(place) = self.built.get_mut(rank.get() as usize) {
                    *place = Some(tensors);
                }
                if self.built.iter().all(Option::is_some) {
                    self.lay_out()?;
                    self.load_if_possible();
                }
            }
            FromWorker::Ready => {
                self.ready += 1;
                if self.ready == self.start.workers {
                    self.go();
                }
            }
            FromWorker::Frozen { ticket, started } => {
                let actions = self.scheduler.as_mut().map(|c| c.frozen(ticket, started, now)).unwrap_or_default();
                return self.act(actions);
            }
            FromWorker::Step(report) => return self.on_step(report),
            FromWorker::Captured { step, slot, copy_s } => {
                self.ledger.captured(step, copy_s);
                let actions = self.scheduler.as_mut().map(|c| c.captured(slot, step, now)).unwrap_or_default();
                return self.act(actions);
            }
            FromWorker::Stalled { step, stall_s } => self.ledger.stalled(step, stall_s),
            FromWorker::Validated { step, loss_sum, sequences } => self.on_validated(step, loss_sum, sequences),
            FromWorker::Stopped { step } => {
                let actions = self.scheduler.as_mut().map(|c| c.rank_stopped(step, now)).unwrap_or_default();
                return self.act(actions);
            }
            FromWorker::Failed { message, hint, permanent } => {
                let text = format!("worker {rank}: {message}");
                let death = if permanent {
                    let error = Error::new(Kind::Config, text);
                    Death::Permanent(match hint {
                        Some(hint) => error.with_hint(hint),
                        None => error,
                    })
                } else {
                    Death::Died(text)
                };
                self.dead.get_or_insert(death);
            }
        }
        Ok(None)
    }

    fn on_exit(&mut self, rank: Rank, reason: &str) {
        self.dead.get_or_insert(Death::Died(format!("worker {rank} {reason}")));
    }

    /// After a death: the other ranks can't go on either; whole snapshots are still uploaded and committed.
    fn end_of_the_dead(&mut self) -> Result<Option<End>> {
        if self.dead.is_none() {
            return Ok(None);
        }
        if let Some(workers) = self.workers.take() {
            self.killing = Some(tokio::spawn(workers.kill()));
        }
        if self.ledger.is_uploading() {
            return Ok(None);
        }
        if let Some(scheduler) = &mut self.scheduler {
            let actions = scheduler.salvage();
            if !actions.is_empty() {
                return self.act(actions);
            }
        }
        let step = self.finished();
        match self.dead.take() {
            None => Ok(None),
            Some(Death::Permanent(error)) => Err(error),
            Some(Death::Diverged { step, reason }) => Ok(Some(End::Diverged { step, reason })),
            // For the time that is left, starting them again is not worth it.
            Some(Death::Died(reason)) if self.timeline.is_called() => {
                Ok(Some(self.stopped(format!("workers died after the notice: {reason}"))))
            }
            Some(Death::Died(reason)) => Ok(Some(End::Died { step, reason })),
        }
    }

    /// Every rank has said what its state is: each learns what it writes, and where.
    fn lay_out(&mut self) -> Result<()> {
        let mut lists = self.built.iter().flatten();
        let Some(tensors) = lists.next() else { return Ok(()) };
        if let Some(other) = lists.find(|list| *list != tensors) {
            return Err(Error::new(
                Kind::Bug,
                format!("ranks differ in their state: {} and {} tensors", tensors.len(), other.len()),
            ));
        }
        let workers = self.workers.as_ref();
        for (plan, base) in self.slots.lay_out(tensors, self.start.upload.world_size)? {
            if let Some(workers) = workers {
                workers.tell(plan.rank, ToWorker::Layout { plan: Box::new(plan.clone()), base });
            }
        }
        Ok(())
    }

    /// What is to be loaded is there and the workers have their layout: they can load.
    fn load_if_possible(&self) {
        if self.fetched.is_some() && self.slots.is_laid_out() {
            let weights_only = matches!(self.start.load, Load::Weights { .. });
            let (slot, files) = self.places.clone();
            self.tell_all(&ToWorker::Restore { slot, files, weights_only });
        }
    }

    fn go(&mut self) {
        if let (Some(fetched), step) = (&self.fetched, self.start.load.step()) {
            self.reporter.event(&Event::Restored {
                step,
                bytes: fetched.bytes,
                fetch_s: fetched.seconds,
                restore_s: self.loading_since.elapsed().as_secs_f64(),
                from: match &self.start.load {
                    Load::Checkpoint { from: Source::Slot { .. }, .. } => "memory",
                    _ => "store",
                },
            });
        }
        let held = match &self.start.load {
            Load::Nothing | Load::Weights { .. } => None,
            Load::Checkpoint { step, generation, from } => {
                if let Source::Store { files, .. } = from {
                    self.slots.received(*step, *generation, &self.places.1, files);
                }
                Some(self.places.0)
            }
        };
        let setup = Setup {
            ranks: self.start.workers,
            done: self.start.load.step(),
            last: Step(self.start.config.train.steps),
            cadence: self.start.config.checkpoint.every,
            ranked: progress::ranked(&self.start.config),
            held,
        };
        let now = self.now();
        let mut scheduler = Scheduler::new(setup, self.start.measured, now);
        let saves = scheduler.first_orders(now);
        self.scheduler = Some(scheduler);
        self.standstill = progress::Quiet::begin(Instant::now());
        self.ledger.training_begins();
        self.retention.busy(false);
        self.tell_all(&ToWorker::Go { saves });
    }

    fn on_step(&mut self, report: StepReport) -> Result<Option<End>> {
        let reports = self.reports.entry(report.step).or_default();
        reports.push(report);
        if reports.len() < self.start.workers as usize {
            return Ok(None);
        }
        let Some(reports) = self.reports.remove(&report.step) else { return Ok(None) };
        let step = report.step;
        // Summed in no particular order of arrival would differ in the last bit: sum sorted.
        let mut losses: Vec<f64> = reports.iter().map(|r| r.loss).collect();
        losses.sort_by(f64::total_cmp);
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        if !loss.is_finite() || !report.grad_norm.is_finite() {
            let reason = format!("loss {loss}, gradient norm {}", report.grad_norm);
            // What was captured before is good: it is committed first.
            self.dead.get_or_insert(Death::Diverged { step, reason });
            return self.end_of_the_dead();
        }
        self.ledger.finished(step, loss);
        self.stepped = Instant::now();
        self.standstill = progress::Quiet::begin(self.stepped);
        let slowest = |f: fn(&StepReport) -> f64| reports.iter().map(f).fold(0.0, f64::max);
        let (step_s, stall_s) = (slowest(|r| r.step_s), slowest(|r| r.stall_s));
        self.estimates.step.push(step_s);
        let config = &self.start.config;
        let tokens = u64::from(config.train.global_batch) * u64::from(config.data.sequence_length);
        let now = self.now();
        let actions = self.scheduler.as_mut().map(|c| c.step_finished(step, step_s, now)).unwrap_or_default();
        self.reporter.event(&Event::Step {
            step,
            loss,
            lr: report.lr,
            grad_norm: report.grad_norm,
            tokens: tokens.saturating_mul(step.get()),
            tokens_per_s: tokens as f64 / step_s.max(1e-9),
            step_s,
            stall_s,
            lag_steps: step.get() - self.committed().get(),
            lag_s: self.ledger.lag().as_secs_f64(),
        });
        self.act(actions)
    }

    fn on_validated(&mut self, step: Step, loss_sum: f64, sequences: u64) {
        self.standstill = progress::Quiet::begin(Instant::now());
        let entry = self.validations.entry(step).or_default();
        *entry = (entry.0 + 1, entry.1 + loss_sum, entry.2 + sequences);
        if entry.0 == self.start.workers
            && let Some((_, sum, count)) = self.validations.remove(&step)
            && count > 0
        {
            let loss = sum / count as f64;
            self.ledger.validated(step, loss);
            self.reporter.event(&Event::Validation { step, loss });
        }
    }

    fn act(&mut self, actions: Vec<Action>) -> Result<Option<End>> {
        for action in actions {
            match action {
                Action::Freeze { ticket } => self.tell_all(&ToWorker::Freeze { ticket }),
                Action::Thaw { saves, stop_after } => {
                    if let Some(step) = stop_after {
                        self.timeline.says(Instant::now(), format!("all ranks stop after step {step}"));
                    }
                    self.tell_all(&ToWorker::Thaw { saves, stop_after });
                }
                Action::Upload { step, slot } => {
                    let copy_s = self.ledger.copy_s(step);
                    if let Some(scheduler) = &mut self.scheduler {
                        scheduler.copied(copy_s);
                    }
                    let ended = self.scheduler.as_ref().is_some_and(Scheduler::has_ended);
                    self.timeline.says(Instant::now(), format!("upload of step {step} began"));
                    let urgent = self.draining || self.dead.is_some() || ended;
                    if urgent {
                        self.hush();
                    }
                    self.ledger.upload(step, slot, urgent, self.slots, &self.start.config)?;
                    self.retention.busy(true);
                }
                Action::Chosen(choice) => say_choice(&choice),
                Action::Finished { step } => return Ok(Some(self.finish(step)?)),
            }
        }
        self.end_of_the_dead()
    }

    fn finish(&mut self, step: Step) -> Result<End> {
        let last = Step(self.start.config.train.steps);
        if step == last && self.committed() >= last {
            // A run that was complete when it was loaded has made no step in this life.
            let loss = self.ledger.loss(last).unwrap_or(f64::NAN);
            return Ok(End::Completed { loss });
        }
        if self.committed() >= step {
            return Ok(self.stopped("the last finished step is committed"));
        }
        if self.timeline.plan() == Some(DrainPlan::FinishInFlight) {
            let committed = self.committed();
            return Ok(
                self.stopped(format!("there was time for the save of step {committed}, not for one of step {step}"))
            );
        }
        let error = self.ledger.take_error().unwrap_or_else(|| Error::new(Kind::Bug, "last save failed"));
        if !self.draining {
            return Err(error.context(format!("save the last step, {step}")));
        }
        Ok(self.stopped(format!("the last step could not be saved: {error}")))
    }

    fn on_save(&mut self, event: SaveEvent) -> Result<Option<End>> {
        let (step, slot, result) = match event {
            SaveEvent::Progress { step, bytes } => {
                self.ledger.progress(step, bytes, self.reporter);
                return Ok(None);
            }
            SaveEvent::Ended { step, slot, result } => (step, slot, result),
        };
        self.retention.busy(false);
        let now = self.now();
        match result {
            Ok(saved) => {
                self.ledger.committed(slot, &saved, self.slots, self.estimates, self.reporter);
                let instant = Instant::now();
                self.timeline.says(instant, format!("step {step} is committed"));
                let whole = self.scheduler.as_ref().and_then(Scheduler::agreed_end).is_some_and(|end| step >= end);
                if whole || self.timeline.plan() == Some(DrainPlan::FinishInFlight) {
                    self.timeline.saved(instant);
                }
                let ended = self.scheduler.as_ref().is_some_and(Scheduler::has_ended);
                // On a machine that is about to go, or at the end of the run, there is more important work.
                if !(self.draining || self.timeline.is_called() || ended) {
                    self.retention.start();
                }
                let Some(scheduler) = &mut self.scheduler else { return Ok(None) };
                let cost = saved.committed.cost;
                scheduler.saved(cost.stall_s, cost.durable_s);
                let actions = scheduler.uploaded(slot, true, now);
                self.act(actions)
            }
            Err(error) if error.kind() == Kind::Fenced => Err(error),
            Err(error) if error.comes_of::<Adrift>() => {
                Err(error.context(format!("save step {step}; the newest checkpoint is of step {}", self.committed())))
            }
            Err(error) => {
                let times = self.ledger.failed(step, error, self.reporter);
                let Some(scheduler) = &mut self.scheduler else { return Ok(None) };
                if self.dead.is_some() {
                    let actions = scheduler.uploaded(slot, false, now);
                    return self.act(actions);
                }
                if scheduler.has_ended() && times >= LAST_SAVE_TRIES {
                    let actions = scheduler.give_up_the_end(slot, now);
                    return self.act(actions);
                }
                let (retries, pause) = (self.retries.clone(), Duration::from_millis(250 << times.min(5)));
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    let _ = retries.send(slot);
                });
                Ok(None)
            }
        }
    }
}

fn say_choice(choice: &Choice) {
    let Choice { mode, overlap_s, blocking_s, copy_s } = *choice;
    let how = match mode {
        CaptureMode::Overlap => "captures run beside the next step",
        CaptureMode::Blocking => "captures hold the loop up",
    };
    match blocking_s {
        Some(blocking_s) => tracing::info!(overlap_s, blocking_s, copy_s, "{how}: measured to cost less"),
        None => tracing::info!(overlap_s, copy_s, "{how}: a save costs no more than the bare copy"),
    }
}
