//! A queue consumer: takes a job from a queue of SQS, trains its run, and reports to a job API.
//!
//! The queue says *that* a run is wanted; the state of the run is in its journal and nowhere else. So a message may
//! come twice, late, or to two consumers at once: the journal lets one of them write, the other finds the run alive or
//! completed. [`job`] reads a message, [`allow`] limits the places that it may name, [`lease`] keeps it hidden,
//! [`handover`] decides its fate, [`api`] reports on it.
//!
//! # One message
//! receive → hide it lease by lease → read the run's journal → train, unless the run is complete → settle. A message is
//! deleted when its run is complete, and not before. It is renewed (a fresh copy, whose receives count from 0) when the
//! machine goes away, when another consumer has the run, when the fault is this consumer's own (its store does not
//! answer or refuses, several runs in a row fail), and when SQS would hide it no longer. It is left to the redrive
//! policy when the job itself failed, can't be understood, or needs a service that does not answer: it is reported,
//! becomes visible again after a pause, and after `maxReceiveCount` receives goes to the dead-letter queue. A run's
//! `on_complete` action for the machine is not taken here: there may be another job.
//!
//! *Crash*: the lease runs out, another consumer receives the message and resumes from the newest checkpoint; see
//! [`handover`] for each moment. *Retry*: settling twice is fine. *Cancel*: the agent handles SIGTERM while training
//! (it saves, and exits with 75 or 76). Then the message is settled first (bounded in time, whatever the queue does),
//! the party that waits for the machine is told second that it may go (the lifecycle hook is completed, the scheduled
//! event approved: [`run::launch_then`]), and the job API is told third: a machine that is taken the moment it may go
//! has left its job to the next one. Between two jobs, and while a job's journal and configuration are read, any notice
//! that this machine goes away, and any request to stop, ends this consumer with 75 (`lookout.rs`). Signals that come
//! just before the agent listens wait for it.
#![doc = include_str!("README.md")]

pub mod allow;
pub mod api;
pub mod handover;
pub mod job;
pub mod lease;
mod lookout;
mod tracker;
mod outcome;

use std::{
    cell::RefCell,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use serde::Serialize;
use tokio::runtime::Runtime;

use self::{
    allow::{Allowed, Use},
    api::{Api, Facts, Reports, Stage},
    handover::{Carried, End, INTERRUPTIONS, STEP, Settle, Suspicion, made_progress, settle},
    job::{Job, Source},
    lease::{Hold, Holder, Terms, lock},
    lookout::Lookout,
    outcome::JobOutcome,
    tracker::{Head, Tracker},
};
use crate::{
    boot::{self, stop::Heard},
    cloud::{
        hardware, region,
        sqs::{Message, Queue},
    },
    config::{self, Device, Encryption, Machine, RunConfig, Sources, StorageConfig, Text},
    error::{Context, Error, Kind, Result},
    ids::{RunId, random_hex},
    journal::Reached,
    layout,
    report::{Listener, Reporter},
    run::{
        self, Begin, Launch, LaunchOptions,
        open::{self, Completed, Found},
    },
    storage::Store,
};

/// How long the exit waits for the last reports.
const LAST_REPORTS: Duration = Duration::from_secs(15);
/// The same when the machine may be about to go away.
const HURRIED_REPORTS: Duration = Duration::from_secs(5);
/// Pause before a queue that did not answer is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long a queue may stay silent before the consumer exits.
const PATIENCE: Duration = Duration::from_secs(5 * 60);
/// Limits if no run gives others.
const LIMITS: StorageConfig = StorageConfig::plain(16, 16);
/// How long the check of this consumer's own store may take.
const STORE_PATIENCE: Duration = Duration::from_secs(20);
/// The limit for deleting the object written for that check.
const SWEEP_PATIENCE: Duration = Duration::from_secs(2);
/// How long renewing the message of a job whose machine goes away may take: notices leave as little as 30 s, the last
/// save included.
const RENEWAL: Duration = Duration::from_secs(10);
/// A consumer's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The queue's URL.
    pub queue: String,
    /// The store of runs whose jobs name none.
    pub store: Option<String>,
    /// The places that messages may name.
    pub allowed: Allowed,
    /// Workers on this node: as the configuration has it, and as a number.
    pub workers: Option<(String, u32)>,
    /// Exit when the queue stayed empty for this long; `None`: never.
    pub idle_exit: Option<Duration>,
    /// Exit after one job.
    pub once: bool,
    /// How long a message is held.
    pub terms: Terms,
    /// How long to wait for the driver of this machine's GPUs.
    pub device_wait: Duration,
}

/// Reads a small remote object: folder and name.
pub type FetchLater<'a> = dyn Fn(&str, &str) -> BoxFuture<'static, Result<Vec<u8>>> + 'a;

/// The tools that a consumer gets from its caller.
pub struct Tools<'a> {
    /// Makes the reporter of one run, whose events also go to the listener.
    pub reporter: &'a dyn Fn(Listener) -> Reporter,
    /// Receives the events of jobs.
    pub say: Arc<dyn Fn(&Said) + Send + Sync>,
    /// Reads a small remote object.
    pub fetch: &'a FetchLater<'a>,
    /// The requests to this process by signals, from its beginning on.
    pub heard: Heard,
    /// Relative paths are taken from here.
    pub working_directory: &'a Path,
    /// The environment.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// Makes the machine leave when the queue stayed empty, and returns whether it does; `None`: it is not to.
    pub leave: Option<&'a dyn Fn() -> Result<bool>>,
}

/// Events of jobs: lines of `--json`, beside the events of their runs.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Said {
    /// An event of a job.
    Job {
        /// The event.
        state: State,
        /// The run; `None`: the message names none.
        run_id: Option<RunId>,
        /// The message, by the queue's id for it.
        message_id: String,
        /// How often it was received, this time included.
        received: u32,
        /// How often its run was handed over because its machine went away.
        interruptions: u64,
        /// Why.
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// The exit code that `trainer run` would have ended with.
        #[serde(skip_serializing_if = "Option::is_none")]
        exit_code: Option<u8>,
    },
    /// The queue stayed empty: this consumer exits, unless its machine was to leave with it and can't.
    Idle {
        /// How long it was empty.
        after_s: f64,
    },
}

/// The state of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It was received.
    Claimed,
    /// Its message was held for as long as SQS allows: a copy is in the queue, and training continues.
    HandedOver,
    /// Its run has progressed since it was sent, so a fresh copy is in the queue.
    Renewed,
    /// Another consumer has its run.
    StandBy,
    /// Its run is complete.
    Completed,
    /// Its machine goes away.
    Interrupted,
    /// Something that it needs does not answer.
    Unreachable,
    /// It needs a person, unless another consumer succeeds with it.
    Failed,
}

/// Why a consumer exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The queue stayed empty.
    Idle,
    /// It was asked to, between two jobs.
    Asked,
    /// A job ended with this exit code.
    Job(u8),
}

/// Takes jobs until the queue stays empty, the machine goes away, or the only job requested is over. Call it from the
/// main thread: see [`run::launch`].
pub fn run(settings: Settings, tools: Tools<'_>) -> Result<Left> {
    let api = Api::from(tools.variable)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("work-io")
        .enable_all()
        .build()
        .map_err(|error| Error::from_source(Kind::Bug, error).context("start the consumer"))?;
    let reports = Reports::start(api, runtime.handle());
    let heard = tools.heard.clone();
    let (queue, max_receive_count) = match runtime.block_on(heard.unless(open(&settings))) {
        Ok(opened) => opened,
        Err(error) => {
            // The exit does not wait for a name look-up on a machine without a network.
            runtime.shutdown_timeout(Duration::ZERO);
            return if heard.asked() { Ok(Left::Asked) } else { Err(error) };
        }
    };
    tracing::info!(queue = queue.url(), "waiting for jobs");
    let lookout = Lookout::new(heard);
    let (suspicion, encryption) = (RefCell::default(), RefCell::default());
    let consumer =
        Consumer { settings, tools, reports, lookout, suspicion, encryption, queue, max_receive_count, runtime };
    let left = consumer.work();
    let hurried = matches!(left, Ok(Left::Asked)) || consumer.lookout.told();
    if hurried {
        consumer.runtime.block_on(consumer.lookout.let_machine_go());
    }
    let unheard =
        consumer.runtime.block_on(consumer.reports.flush(if hurried { HURRIED_REPORTS } else { LAST_REPORTS }));
    if unheard > 0 {
        tracing::warn!(unheard, "reports were not received by the job API");
    }
    consumer.runtime.shutdown_timeout(Duration::from_secs(1));
    left
}

/// Waits for this machine's devices and finds the queue; returns how often its messages may be received.
async fn open(settings: &Settings) -> Result<(Queue, Option<u32>)> {
    // A job that begins before the driver is there would train on the CPU until its end.
    if let Some(devices) = boot::await_gpus(&hardware::root(), Device::Auto, settings.device_wait).await? {
        tracing::info!("{devices}");
    }
    // If only the machine itself names the region, the S3 client takes it from there.
    region::find().await;
    let queue = Queue::open(&settings.queue).await?;
    let max_receive_count = redrive(&queue).await?;
    Ok((queue, max_receive_count))
}

/// How often a message may be received, as far as the queue reports it; detects whether there is such a queue.
async fn redrive(queue: &Queue) -> Result<Option<u32>> {
    match queue.redrive().await {
        Ok(Some(policy)) => Ok(Some(policy.max_receive_count)),
        Ok(None) => {
            tracing::warn!("queue has no dead-letter queue: a job that always fails comes back forever");
            Ok(None)
        }
        // Reading attributes is a permission of its own, and not needed.
        Err(error) if error.kind() == Kind::Permission => {
            tracing::debug!("whether the queue has a dead-letter queue is not known: {error}");
            Ok(None)
        }
        Err(error) => Err(error.context(format!("look at queue {}", queue.url()))),
    }
}

/// The result of a look at the queue.
enum Next {
    Message(Box<Message>),
    Nothing,
    Asked,
}

/// The inputs of a run's start, or why it does not start.
enum Prepared {
    Launch {
        store: Store,
        begin: Begin,
    },
    /// The run was completed before, at this step, with this loss.
    Done {
        step: u64,
        loss: Option<f64>,
    },
    /// The run has reached a cap.
    Capped(Reached),
    /// Its message is renewed first: the run has progressed this far since it was sent.
    Renew {
        committed: u64,
    },
}

/// A message that this consumer has received.
struct Claim<'a> {
    message: &'a Message,
    run_id: Option<RunId>,
    /// The newest committed step when it came.
    begun_at: u64,
    carried: Arc<Mutex<Carried>>,
}

struct Consumer<'a> {
    settings: Settings,
    tools: Tools<'a>,
    reports: Reports,
    lookout: Lookout,
    /// The suspicion against this consumer itself.
    suspicion: RefCell<Suspicion>,
    /// How this turn's run has its objects encrypted: a bucket may accept no others.
    encryption: RefCell<(Encryption, Option<String>)>,
    queue: Queue,
    max_receive_count: Option<u32>,
    runtime: Runtime,
}

impl Consumer<'_> {
    fn work(&self) -> Result<Left> {
        let mut idle_since = Instant::now();
        loop {
            let until_idle = idle_since.saturating_duration_since(Instant::now());
            let left = self.settings.idle_exit.map(|limit| (limit + until_idle).saturating_sub(idle_since.elapsed()));
            let message = match self.runtime.block_on(self.next(left.unwrap_or(Duration::MAX)))? {
                Next::Asked => return Ok(Left::Asked),
                Next::Nothing => {
                    let idle = idle_since.elapsed();
                    if self.settings.idle_exit.is_some_and(|limit| idle >= limit) {
                        (self.tools.say)(&Said::Idle { after_s: idle.as_secs_f64() });
                        if self.machine_may_leave()? {
                            return Ok(Left::Idle);
                        }
                        // The machine is paid for: it may as well take the next job.
                        idle_since = Instant::now();
                    }
                    continue;
                }
                Next::Message(message) => message,
            };
            let (JobOutcome { end, state, code, .. }, what) = self.turn(&message);
            // A run that another consumer trains for weeks must not keep this one waiting for weeks.
            if !matches!(state, State::StandBy | State::Renewed) {
                idle_since = Instant::now();
                // The message, put back, is still in the queue: exiting now would leave it without a consumer, and
                // without a dead-letter queue forever.
                if let Settle::Return(after) = what
                    && self.max_receive_count.is_some()
                {
                    idle_since += after;
                }
            }
            if matches!(end, End::Interrupted | End::CutOff) {
                return Ok(Left::Job(code));
            }
            if self.lookout.told() {
                return Ok(Left::Asked);
            }
            if self.settings.once && !matches!(state, State::StandBy | State::Renewed) {
                return Ok(Left::Job(code));
            }
        }
    }

    /// Whether nothing prevents the exit: the machine leaves with this consumer, or was not to.
    fn machine_may_leave(&self) -> Result<bool> {
        let Some(leave) = self.tools.leave else { return Ok(true) };
        // This consumer asked for the machine's end itself: a notice of it is no news.
        self.runtime.block_on(self.lookout.rest());
        // The machine may be gone before the reports are.
        self.runtime.block_on(self.reports.flush(LAST_REPORTS));
        leave()
    }

    /// The result of `work`, unless this consumer is told to exit.
    fn or_notice<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(self.lookout.unless(work))
    }

    /// The next message, waited for up to `left`, but with at least one look at the queue.
    async fn next(&self, left: Duration) -> Result<Next> {
        let mut failing: Option<Instant> = None;
        let receive = async {
            loop {
                // A receive that does not wait asks only some of the queue's servers.
                let wait = left.max(Duration::from_secs(1));
                match self.queue.receive(self.settings.terms.lease, wait).await {
                    Ok(found) => return Ok(found.map_or(Next::Nothing, |message| Next::Message(Box::new(message)))),
                    Err(error) if error.kind() == Kind::Unavailable => {
                        let since = *failing.get_or_insert_with(Instant::now);
                        if since.elapsed() > PATIENCE {
                            return Err(error);
                        }
                        tracing::warn!("queue does not answer, retrying: {error}");
                        tokio::time::sleep(ASK_AGAIN).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        match self.lookout.unless(receive).await {
            Err(_) if self.lookout.told() => Ok(Next::Asked),
            next => next,
        }
    }

    /// One message, from its claim until it is settled, and the outcome.
    fn turn(&self, message: &Message) -> (JobOutcome, Settle) {
        let number = |name| message.number(name).unwrap_or_default();
        let carried = Carried { interruptions: number(INTERRUPTIONS), step: number(STEP) };
        let run_id = Job::name_of(&message.body);
        let say = {
            let (say, run_id) = (Arc::clone(&self.tools.say), run_id.clone());
            let (message_id, received) = (message.id.clone(), message.received);
            move |state, reason: Option<String>, exit_code| {
                let (run_id, message_id) = (run_id.clone(), message_id.clone());
                let interruptions = carried.interruptions;
                say(&Said::Job { state, run_id, message_id, received, interruptions, reason, exit_code });
            }
        };
        say(State::Claimed, None, None);
        let times = match self.max_receive_count {
            Some(most) => format!("{} of {most}", message.received),
            None => message.received.to_string(),
        };
        let name = run_id.as_ref().map_or("without a run", RunId::as_str);
        tracing::info!(run = name, received = times, interruptions = carried.interruptions, "job received");

        let claim =
            Claim { message, run_id: run_id.clone(), begun_at: carried.step, carried: Arc::new(Mutex::new(carried)) };
        let tracker = Arc::new(Mutex::new(Tracker::new(
            self.reports.clone(),
            Head {
                run_id: run_id.clone(),
                message_id: message.id.clone(),
                claim: random_hex(8),
                received: message.received,
            },
            Arc::clone(&claim.carried),
        )));
        let (outcome, what) = match Job::parse(&message.body) {
            Err(error) => {
                let outcome = JobOutcome::new(End::Unintelligible, State::Failed, Kind::Config.exit_code());
                self.conclude(&claim, None, JobOutcome { reason: Some(error.to_string()), ..outcome })
            }
            Ok(job) => {
                let holder = {
                    let _context = self.runtime.enter();
                    let handed_over = {
                        let say = say.clone();
                        move || say(State::HandedOver, None, None)
                    };
                    let (queue, terms) = (self.queue.clone(), self.settings.terms);
                    Holder::start(queue, message.clone(), Arc::clone(&claim.carried), terms, handed_over)
                };
                let conclude = |outcome| self.conclude(&claim, Some(holder), outcome);
                self.train(&job, message.received, &tracker, conclude)
            }
        };
        if let Some(reason) = &outcome.reason {
            let reason = crate::report::human::plain(reason);
            tracing::warn!(run = name, received = times, state = ?outcome.state, "job is not done: {reason}");
        }
        let stage = match outcome.state {
            State::Completed => Some(Stage::Completed),
            // The run continues elsewhere.
            State::Failed | State::Unreachable if matches!(what, Settle::Renew { .. }) => Some(Stage::Interrupted),
            State::Failed => Some(Stage::Failed),
            State::Unreachable if matches!(what, Settle::Return(_)) => Some(Stage::Failed),
            State::Interrupted | State::Unreachable => Some(Stage::Interrupted),
            State::Claimed | State::HandedOver | State::Renewed | State::StandBy => None,
        };
        if let Some(stage) = stage {
            lock(&tracker).end(stage, outcome.reason.clone(), outcome.code);
        }
        say(outcome.state, outcome.reason.clone(), Some(outcome.code));
        (outcome, what)
    }

    /// Settles a message after its turn: the machine may have seconds left, so this comes before everything else.
    fn conclude(&self, claim: &Claim<'_>, holder: Option<Holder>, mut outcome: JobOutcome) -> (JobOutcome, Settle) {
        let goes_away = outcome.end == End::Interrupted;
        let further = lock(&claim.carried).step > claim.begun_at;
        let mut suspicion = self.suspicion.borrow_mut();
        let no_good = claim.run_id.as_ref().is_some_and(|run| suspicion.is_confirmed_by(run, outcome.error, further));
        drop(suspicion);
        if no_good {
            tracing::error!(
                "two consecutive jobs failed on this machine: returning the message to the queue and exiting"
            );
            outcome.end = End::CutOff;
        }
        let work = async {
            // While the message is still held: this may take some time.
            let asks =
                matches!(outcome.error, Some(Kind::Unavailable | Kind::Permission)) && outcome.end != End::CutOff;
            if asks && self.is_cut_off().await {
                outcome.end = End::CutOff;
            }
            let hold = match holder {
                Some(holder) => holder.stop().await,
                None => Hold::Ours,
            };
            let message = claim.message;
            let carried = *lock(&claim.carried);
            let dead_letters = self.max_receive_count.is_some();
            let what = settle(outcome.end, hold, message.received, further, dead_letters, self.settings.terms.lease);
            self.settle(message, what, carried).await;
            what
        };
        let what = self.runtime.block_on(async {
            if !goes_away {
                return work.await;
            }
            tokio::time::timeout(RENEWAL, work).await.unwrap_or_else(|_| {
                let limit = RENEWAL.as_secs();
                tracing::warn!(
                    "message was not renewed within {limit} s: it becomes visible when its lease ends, and this \
                    receive counts"
                );
                Settle::Leave
            })
        });
        (outcome, what)
    }

    fn encrypts(&self, storage: &StorageConfig) {
        *self.encryption.borrow_mut() = (storage.encryption, storage.kms_key_id.clone());
    }

    /// Whether this consumer's own store does not answer or refuses, too.
    async fn is_cut_off(&self) -> bool {
        let Some(uri) = &self.settings.store else { return false };
        let Ok(uri) = config::absolute_uri(uri, self.tools.working_directory) else { return false };
        let (encryption, kms_key_id) = self.encryption.borrow().clone();
        let Ok(store) = Store::open(&uri, &StorageConfig { encryption, kms_key_id, ..LIMITS }) else { return false };
        let key = format!("{}/{}", layout::PROBES, random_hex(16));
        // One request: the caller has already waited as long as a store is given.
        let put = store.put_once(&key, Bytes::from_static(b"whether this store answers"), STORE_PATIENCE);
        tokio::select! {
            biased;
            // There is no time to find out where the fault is.
            () = self.lookout.heard.wait() => true,
            put = tokio::time::timeout(STORE_PATIENCE, put) => match put {
                Ok(Ok(())) => {
                    // A leftover is a few bytes of garbage, below a folder known for it.
                    let _ = tokio::time::timeout(SWEEP_PATIENCE, store.delete(&key)).await;
                    false
                }
                Ok(Err(error)) => matches!(Error::from(error).kind(), Kind::Unavailable | Kind::Permission),
                Err(_) => true,
            },
        }
    }

    /// Trains the run of a job to its end, or as far as it can; returns what `conclude` makes of that. `conclude` runs
    /// before the party that waits for this machine is told that it may go.
    fn train<T>(
        &self,
        job: &Job,
        received: u32,
        tracker: &Arc<Mutex<Tracker>>,
        conclude: impl FnOnce(JobOutcome) -> T,
    ) -> T {
        let (store, begin) = match self.prepare(job, received, tracker) {
            Ok(Prepared::Launch { store, begin }) => (store, begin),
            Ok(Prepared::Done { step, loss }) => {
                let facts = Facts { step: Some(step), loss: loss.filter(|l| l.is_finite()), ..Facts::default() };
                lock(tracker).facts = facts;
                return conclude(JobOutcome::new(End::Completed, State::Completed, 0));
            }
            Ok(Prepared::Capped(cap)) => return conclude(JobOutcome::capped(&cap)),
            Ok(Prepared::Renew { committed }) => {
                lock(&lock(tracker).carried).step = committed;
                return conclude(JobOutcome::new(End::Further, State::Renewed, 0));
            }
            Err(_) if self.lookout.told() => return conclude(JobOutcome::not_begun()),
            Err(error) => return conclude(JobOutcome::of_error(&error)),
        };
        if self.lookout.told() {
            return conclude(JobOutcome::not_begun());
        }
        // The agent polls the metadata service for itself.
        self.runtime.block_on(self.lookout.rest());
        let listener: Listener = Box::new({
            let tracker = Arc::clone(tracker);
            move |event| lock(&tracker).hear(event, Instant::now())
        });
        let reporter = (self.tools.reporter)(listener);
        let launch = Launch {
            store,
            run_id: job.run_id.clone(),
            begin,
            nproc_per_node: self.settings.workers.as_ref().map(|(_, count)| *count),
            options: LaunchOptions { cache: boot::cache(&hardware::root()), ..LaunchOptions::default() },
            reporter: reporter.clone(),
        };
        let concluded = run::launch_then(launch, |outcome| conclude(JobOutcome::of_outcome(&outcome)));
        reporter.finish();
        concluded
    }

    /// Finds the run, or prepares to create it.
    fn prepare(&self, job: &Job, received: u32, tracker: &Arc<Mutex<Tracker>>) -> Result<Prepared> {
        self.encryption.take();
        self.settings.allowed.check_settings(job)?;
        let named = job.store.as_deref().or(self.settings.store.as_deref());
        let (uri, config) = match named {
            Some(uri) => {
                let uri = config::absolute_uri(uri, self.tools.working_directory)
                    .map_err(|expected| Error::new(Kind::Config, format!("store of the job: expected {expected}")))?;
                self.settings.allowed.check("store", &uri, Use::Write)?;
                (uri, None)
            }
            None => {
                let config = self.config(job, None)?;
                (config.store.clone(), Some(config))
            }
        };
        let (run_id, reading) = (&job.run_id, config::reading_settings(&job.set)?);
        // The store may be silent, and requests to it may take minutes.
        let found = self.or_notice(open::find(&uri, &reading, run_id, Vec::new()));
        match found.context(format!("read journal of run {run_id}"))? {
            Found::Complete(_, Completed { step, loss, .. }) => Ok(Prepared::Done { step: step.get(), loss }),
            Found::Capped(_, cap) => Ok(Prepared::Capped(cap)),
            Found::Existing(run) => {
                let committed = run.state.newest().map_or(0, |checkpoint| checkpoint.committed.step.get());
                let carried = *lock(&lock(tracker).carried);
                if self.max_receive_count.is_some() && made_progress(received, carried, committed) {
                    return Ok(Prepared::Renew { committed });
                }
                self.encrypts(&run.config.storage);
                let (store, begin) = run.resume(None);
                Ok(Prepared::Launch { store, begin })
            }
            Found::New => {
                let config = match config {
                    Some(config) => config,
                    None => self.config(job, Some(uri.clone()))?,
                };
                self.encrypts(&config.storage);
                let store = Store::open(&uri, &config.storage)?;
                Ok(Prepared::Launch {
                    store,
                    begin: Begin::CreateOrResume { config: Box::new(config), overrides: Vec::new() },
                })
            }
        }
    }

    /// The configuration that a job names, as `trainer run` would resolve it.
    fn config(&self, job: &Job, store: Option<String>) -> Result<RunConfig> {
        let (toml, name, folder) = match &job.config {
            Source::Inline(toml) => (toml.clone(), format!("configuration of job {}", job.run_id), None),
            Source::At { folder, name } => {
                let uri = format!("{folder}/{name}");
                self.settings.allowed.check("config_uri", &uri, Use::Read)?;
                let doing = || format!("read configuration {uri}");
                let bytes = self.fetch(folder, name).map_err(|error| error.as_config_error().context(doing()))?;
                let toml = String::from_utf8(bytes)
                    .map_err(|error| Error::from_source(Kind::Config, error.utf8_error()).context(doing()))?;
                (toml, uri, Some(folder.as_str()))
            }
        };
        let guard = |key: &'static str, uri: &str| {
            let used = if key == "store" { Use::Write } else { Use::Read };
            self.settings.allowed.check(key, uri, used)
        };
        let mut flags = Vec::new();
        if let Some(store) = store {
            flags.push(("store of the job or --store", "store", store));
        }
        if let Some((setting, _)) = &self.settings.workers {
            flags.push(("--nproc-per-node", "parallel.nproc_per_node", setting.clone()));
        }
        let sources = Sources {
            file: None,
            text: Some(Text { name: Path::new(&name), toml: &toml, folder, guard: Some(&guard) }),
            flags,
            set: &job.set,
            working_directory: self.tools.working_directory,
            machine: Machine::detect(),
            fetch: &|folder, name| self.fetch(folder, name),
        };
        Ok(config::load(&sources)?)
    }

    fn fetch(&self, folder: &str, name: &str) -> Result<Vec<u8>> {
        self.or_notice((self.tools.fetch)(folder, name))
    }

    /// Carries out the decision. On a failure the message stays where it is, and becomes visible again when its lease
    /// ends.
    async fn settle(&self, message: &Message, what: Settle, carried: Carried) {
        let done = match what {
            Settle::Leave => Ok(()),
            Settle::Delete => self.queue.delete(message).await,
            Settle::Return(after) => self.queue.hide(message, after).await.map(drop),
            Settle::Renew { delay, interrupted } => {
                let interruptions = carried.interruptions.saturating_add(u64::from(interrupted));
                let carried = Carried { interruptions, ..carried };
                match self.queue.send_copy(message, &carried.numbers(), delay).await {
                    Ok(()) => self.queue.delete(message).await,
                    Err(error) => {
                        tracing::warn!("message can't be renewed, so this receive counts: {error}");
                        self.queue.hide(message, delay).await.map(drop)
                    }
                }
            }
        };
        if let Err(error) = done {
            tracing::warn!("message becomes visible again when its lease ends: {error}");
        }
    }
}
