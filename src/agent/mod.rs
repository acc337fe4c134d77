//! The parent on each node: it forms generations, runs worker groups, saves, restores, and keeps the journal.
//!
//! # A run
//! [`launch`] opens or creates the journal, makes sure that nobody else is at work, chooses the resume point, writes `formed`, and
//! lives through one life of a worker group after the other until the run is complete, is told to stop, or can't go on.
//!
//! # Crash consistency
//! Nothing is kept outside the store that a restart needs. A generation exists when its `formed` record stands, which is
//! written before its resume point is used; a checkpoint exists when its `committed` record stands. Killing this process at any
//! instant leaves the newest checkpoint, and data that no record names.
//!
//! # Two agents
//! Both replay the same journal; the one whose `formed` record is written first has the run. The other looks at its heartbeat:
//! alive, and it leaves with exit code 79, or stands by until that one is dead ([`Manner::standby`]); dead, and it forms the next
//! generation. An agent that was taken for dead learns of
//! it when it tries to commit, stops its workers and leaves with 79: two writers can never both commit.

pub mod conductor;

mod companions;
mod deadline;
mod doubt;
mod gauge;
mod images;
pub mod initial;
mod life;
mod loopback;
mod opening;
mod parting;
mod provenance;
mod restart;
mod retention;
mod saver;
mod saves;
mod scrub;
mod shared;
mod watch;
mod words;
mod workers;

use std::{cell::Cell, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::mpsc;

use self::{
    gauge::Gauges,
    images::Images,
    life::{End, Left, Load, Plan, Source},
    opening::{Opening, Resolved, completed, effective, resolve},
    shared::SharedJournal,
};
use crate::{
    checkpoint::{condemn::Docket, restore},
    config::{CompleteAction, RunConfig},
    error::{Context, Error, Kind, Result},
    goodput::Observed,
    ids::{Generation, NodeId, RunId, Step, WorldSize},
    journal::{self, Committed, Formed, FormedReason, JournalError, Record, ResumePoint, RosterEntry, RunState},
    layout,
    notice::{self, Notices},
    rendezvous::heartbeat::{self, Process, Pulse, Turning},
    report::{Event, Reporter},
    snapshot::cadence::Measured,
    storage::Store,
};

/// Pause between two looks at the heartbeat of the agent that one stands by for.
const STANDBY_PAUSE: Duration = Duration::from_secs(2);
/// How long it may take to take the heartbeat away at the end: whoever does not find it so waits a little longer.
const FAREWELL: Duration = Duration::from_secs(2);

/// What is to be run.
#[derive(Debug)]
pub struct Launch {
    /// The store that holds all runs.
    pub store: Store,
    /// The run.
    pub run_id: RunId,
    /// New, or carried on.
    pub begin: Begin,
    /// Workers on this node, if the command line says.
    pub nproc_per_node: Option<u32>,
    /// How it goes about it.
    pub manner: Manner,
    /// Hears what happens.
    pub reporter: Reporter,
}

/// How an agent goes about a run; the default is what `run` and `resume` do.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// How long to wait for another agent that has the run and lives; nothing: leave at once. While it waits, it watches the other's
    /// heartbeat; when that stops, it takes over, and when the run is complete, it has nothing to do.
    pub standby: Duration,
    /// Where datasets that lie in an object store are kept on this machine; `None`: in the user's cache.
    pub cache: Option<PathBuf>,
    /// When this machine began to look for work; the time from there to the first generation is told.
    pub since: Option<std::time::Instant>,
    /// This machine is there for the run: what the run's `on_complete` says is done even where others have completed it. Else it is
    /// done by who trained the run to its end: to ask for a run that is complete must not end the machine of who asks.
    pub dedicated: bool,
    /// A person has named the data with this very command: if it is not what the run was trained on so far, it is from here on.
    pub accepts_data: bool,
}

impl Manner {
    /// What is to be done with the machine when the run is complete.
    fn then(&self, config: &RunConfig, trained_here: bool) -> Afterwards {
        let action = if self.dedicated || trained_here { config.on_complete.action } else { CompleteAction::Exit };
        Afterwards { action, lifecycle_hook: config.notice.lifecycle_hook.clone() }
    }
}

/// How a run begins.
#[derive(Clone, Debug)]
pub enum Begin {
    /// It must not exist yet.
    Create(Box<RunConfig>),
    /// It must exist.
    Resume {
        /// The checkpoint's step; `None`: the newest that verifies.
        from: Option<Step>,
        /// `--set key=value`, as typed; see [`crate::config::canonical_overrides`].
        overrides: Vec<(String, String)>,
        /// What its journal said when it was found; it is read on from there.
        state: Box<RunState>,
    },
    /// As [`Begin::Create`]; of several nodes that do so at once one creates it, and the others do as with [`Begin::Resume`].
    CreateOrResume {
        /// The new run's configuration, overrides applied.
        config: Box<RunConfig>,
        /// For a run that exists by then.
        overrides: Vec<(String, String)>,
    },
}

/// What is to be done with this machine when the run is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Afterwards {
    /// Whether it goes.
    pub action: CompleteAction,
    /// The hook that holds up its end: `notice.lifecycle_hook`.
    pub lifecycle_hook: String,
}

/// How a run ended, when it ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step is committed.
    Completed {
        /// What is to be done with this machine then.
        then: Afterwards,
    },
    /// It was asked to stop before it had created the run: the same command again is as good as new.
    NotCreated,
    /// It was asked to stop; so many steps must be done again.
    Interrupted {
        /// Finished steps that no checkpoint holds.
        lost_steps: u64,
    },
}

/// Runs a run on this node to its end. Call it from the main thread: the workers' lives are tied to the thread that starts them.
pub fn launch(launch: Launch) -> Result<Outcome> {
    launch_then(launch, |outcome| outcome)
}

/// The same; gives what `last` makes of the outcome. `last` comes after the run's last words and before whoever waits for this machine
/// is told that it may go: the machine may be gone a moment later. Until then it is kept waiting.
pub fn launch_then<T>(launch: Launch, last: impl FnOnce(Result<Outcome>) -> T) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agent-io")
        .enable_all()
        .build()
        .map_err(|error| Error::from_source(Kind::Bug, error).context("start the agent"));
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return last(Err(error)),
    };
    let (outcome, farewell) = runtime.block_on(Agent::run(launch));
    let made = last(outcome);
    if let Some(farewell) = farewell {
        runtime.block_on(farewell.say());
    }
    // Uploads of a run that was lost to another writer may hang on a dead store.
    runtime.shutdown_timeout(Duration::from_secs(1));
    made
}

/// What is left to do when a run has ended on this node and its last words are written.
struct Farewell {
    notices: Notices,
    /// Once it beats.
    pulse: Option<Pulse>,
    /// It was told to leave, and nothing is lost.
    left: bool,
}

impl Farewell {
    async fn say(mut self) {
        self.notices.release(self.left).await;
        if let Some(pulse) = self.pulse {
            let _ = tokio::time::timeout(FAREWELL, pulse.stop()).await;
        }
    }
}

struct Agent {
    run: Store,
    run_id: RunId,
    node: NodeId,
    journal: Arc<SharedJournal>,
    /// The snapshot slots; what they hold outlives the workers.
    images: Images,
    /// What steps and saves take here.
    gauges: Gauges,
    reporter: Reporter,
    nproc_per_node: Option<u32>,
    manner: Manner,
    overrides: Vec<(String, String)>,
    from: Option<Step>,
    /// What this process has found damaged.
    docket: Docket,
    /// Nodes that were found dead. Their heartbeats tell others how long they have stood still until there is a
    /// generation after theirs.
    dead: Vec<NodeId>,
}

/// What came of waiting for another agent.
#[derive(Clone, Copy, Debug)]
enum Waited {
    /// It is gone, or there was none.
    NothingNew,
    /// It is gone, and the journal has gone on meanwhile.
    WentOn,
}

/// Waits for a notice to leave.
async fn told_to_leave(notices: &mut Notices, reporter: &Reporter) {
    loop {
        let notice = notices.next().await;
        let deadline_s = notice.deadline.map(|left| left.as_secs_f64());
        let means = notice.kind.name();
        let (source, binding) = (notice.source.to_owned(), notice.deadline_binds());
        reporter.event(&Event::Notice { source, deadline_s, means, binding });
        // For a save there is no state.
        if notice.kind != notice::Kind::Rebalance {
            return;
        }
    }
}

/// Does `work`; `None`: a notice to leave came first. Only for work that may be dropped at any moment.
async fn unless_told<T>(notices: &mut Notices, reporter: &Reporter, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = told_to_leave(notices, reporter) => None,
        done = work => Some(done),
    }
}

impl Agent {
    /// What came of it, and what is to be said afterwards to those who wait for this node, if anybody can.
    async fn run(launch: Launch) -> (Result<Outcome>, Option<Farewell>) {
        let listening = Notices::listen().map_err(|e| Error::from_source(Kind::Bug, e).context("listen for signals"));
        let mut notices = match listening {
            Ok(notices) => notices,
            Err(error) => return (Err(error), None),
        };
        let (mut pulse, turning) = (None, Turning::default());
        let result = turning.during(Self::run_with(launch, &mut notices, &mut pulse, &turning)).await;
        // After a run that is complete the machine may have other work.
        let left = matches!(result, Ok(Outcome::Interrupted { lost_steps: 0 } | Outcome::NotCreated));
        (result, Some(Farewell { notices, pulse, left }))
    }

    async fn run_with(
        launch: Launch,
        notices: &mut Notices,
        pulse: &mut Option<Pulse>,
        turning: &Turning,
    ) -> Result<Outcome> {
        let Launch { store, run_id, begin, nproc_per_node, manner, reporter } = launch;
        let run = store.folder(run_id.as_str());
        let node = NodeId::random();
        let doing = |doing: &str| reporter.event(&Event::Phase { doing: doing.to_owned() });

        let opened = {
            let (settings, mut known) = mpsc::unbounded_channel();
            // Whether the run may exist: who stops after the first request that creates it does not know what came of that.
            let exists = Cell::new(matches!(begin, Begin::Resume { .. }));
            let newest = match &begin {
                Begin::Resume { state, .. } => state.newest().map(|newest| newest.committed.step),
                _ => None,
            };
            let opening = async {
                doing("checking the store");
                store.prove_create_is_atomic().await?;
                let (run, node, run_id, manner) = (&run, &node, &run_id, &manner);
                let (settings, exists) = (&settings, &exists);
                let opening = Opening { run, node, run_id, nproc_per_node, manner, settings, exists };
                opening.open(begin, &reporter).await
            };
            tokio::pin!(opening);
            loop {
                tokio::select! {
                    biased;
                    // The machine may go away while data is downloaded, which may take long.
                    Some(settings) = known.recv() => notices.begin(&settings),
                    // Nothing is lost if it is not.
                    () = told_to_leave(notices, &reporter) => {
                        if let Some(step) = newest {
                            reporter.event(&Event::Interrupted { step, lost_steps: 0 });
                        }
                        let nothing_lost = Outcome::Interrupted { lost_steps: 0 };
                        return Ok(if exists.get() { nothing_lost } else { Outcome::NotCreated });
                    }
                    opened = &mut opening => break opened?,
                }
            }
        };
        let (journal, resolved, overrides, from) = match opened {
            Ok(opened) => opened,
            Err(then) => return Ok(Outcome::Completed { then }),
        };
        notices.begin(&resolved.config.notice);
        let mut agent = Self {
            run,
            run_id,
            node,
            journal: Arc::new(SharedJournal::new(journal)),
            images: Images::create()?,
            gauges: Gauges::default(),
            reporter,
            nproc_per_node,
            manner,
            overrides,
            from,
            docket: Docket::default(),
            dead: Vec::new(),
        };
        let _held = agent.run.hold().await.context("hold the run's folder")?;
        let beating = Pulse::start(agent.run.clone(), agent.node.clone(), turning.clone());
        match unless_told(notices, &agent.reporter, beating).await {
            Some(beating) => *pulse = Some(beating?),
            None => {
                tracing::info!("asked to stop before this node has taken up the run: it has nothing to save");
                return agent.told_between_lives("its heartbeat was begun", None).await;
            }
        }
        agent.live(resolved, notices).await
    }

    async fn live(&mut self, mut resolved: Resolved, notices: &mut Notices) -> Result<Outcome> {
        let reporter = self.reporter.clone();
        let mut deaths = Vec::new();
        let mut reason = FormedReason::Started;
        // Whether another agent is at work, and whether the journal has gone on since `resolved` was looked at.
        let (mut look, mut stale) = (true, false);
        // The last finished step, once this node has formed a generation.
        let mut finished = None;
        loop {
            if look {
                match unless_told(notices, &reporter, self.wait_for_the_other()).await {
                    None => {
                        if finished.is_none() {
                            tracing::info!(
                                "asked to stop before this node has taken up the run: it has nothing to save"
                            );
                        }
                        return self.told_between_lives("another node was looked at", finished).await;
                    }
                    Some(waited) => stale |= matches!(waited?, Waited::WentOn),
                }
            }
            if stale {
                match unless_told(notices, &reporter, self.resolve_again()).await {
                    None => return self.told_between_lives("data was fetched", finished).await,
                    Some(again) => match again? {
                        Ok(again) => {
                            resolved = again;
                            notices.begin(&resolved.config.notice);
                        }
                        Err(then) => return Ok(Outcome::Completed { then }),
                    },
                }
            }
            provenance::is_still_there(&resolved)?;
            let choosing = self.choose_with_data(&resolved);
            let Some(load) = unless_told(notices, &reporter, choosing).await else {
                return self.told_between_lives("a checkpoint to go on from was looked for", finished).await;
            };
            let load = load?;
            let formed = match unless_told(notices, &reporter, self.form(&load, &resolved, reason)).await {
                Some(formed) => formed?,
                None => return self.told_between_lives("a generation was formed", finished).await,
            };
            let Some(generation) = formed else {
                (look, stale) = (true, true);
                continue;
            };
            (look, stale) = (false, false);
            finished = Some(load.step());
            if let Some(since) = self.manner.since.take() {
                tracing::info!("boot to joined: {:.2} s", since.elapsed().as_secs_f64());
            }
            notices.formed(&self.run, generation);
            let world_size = WorldSize(resolved.workers);
            self.reporter.event(&Event::Formed {
                generation,
                world_size,
                resume_step: (load.step() > Step(0)).then_some(load.step()),
                total_steps: resolved.config.train.steps,
            });
            let began = tokio::time::Instant::now();
            let plan = Plan {
                config: resolved.config.clone(),
                data_dir: resolved.data.dir().to_owned(),
                sequences: resolved.sequences,
                workers: resolved.workers,
                load: load.clone(),
                saver: saver::Context {
                    run: self.run.clone(),
                    run_id: self.run_id.clone(),
                    node: self.node.clone(),
                    generation,
                    formed: began,
                    world_size,
                    data: resolved.identity.clone(),
                    journal: Arc::clone(&self.journal),
                },
                companions: resolved.companions.clone(),
                docket: self.docket.clone(),
                measured: self.measured().await,
            };
            if let Some(newest) = self.journal.lock().await.state().newest() {
                self.gauges.suppose(&newest.committed);
            }
            let mut left = Left::default();
            let lived = life::run(plan, &mut self.images, &mut self.gauges, notices, &self.reporter, &mut left).await;
            match lived {
                Ok(End::Completed { loss }) => {
                    let outcome = self.complete(generation, &resolved, loss, notices).await?;
                    match outcome {
                        Outcome::Completed { .. } => self.tidy(left, notices).await,
                        _ => self.gone(left).await,
                    }
                    return Ok(outcome);
                }
                Ok(End::Stopped(stopped)) => {
                    let outcome = self.interrupted(generation, stopped).await;
                    self.gone(left).await;
                    return outcome;
                }
                Ok(End::Damaged { object, reason }) => {
                    let reading = self.step_over(&load, &object, &reason);
                    match unless_told(notices, &reporter, reading).await {
                        Some(done) => done?,
                        None => {
                            let doing = "a checkpoint that seemed damaged was read again";
                            return self.told_between_lives(doing, finished).await;
                        }
                    }
                }
                Ok(End::Diverged { step, reason }) => return Err(self.diverged(generation, step, &reason).await),
                Ok(End::Died { step, reason: why }) => {
                    deaths.push(restart::Death::of(step, &why));
                    finished = Some(step);
                    match restart::decide(&deaths, &resolved.config.restart) {
                        restart::Decision::GiveUp { reason, out_of_memory } => {
                            let reason = format!("{reason}: {why}");
                            let (train, workers) = (&resolved.config.train, resolved.workers);
                            let error = restart::given_up(reason, out_of_memory, &self.run_id, train, workers);
                            if error.kind() != Kind::Unavailable {
                                self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                            }
                            return Err(error);
                        }
                        restart::Decision::Restart { after } => {
                            self.reporter.event(&Event::WorkerDied {
                                step,
                                reason: why,
                                restarts: u32::try_from(deaths.len()).unwrap_or(u32::MAX),
                                backoff_s: after.as_secs_f64(),
                            });
                            if unless_told(notices, &reporter, tokio::time::sleep(after)).await.is_none() {
                                return self.told_between_lives("workers were to be started again", finished).await;
                            }
                        }
                    }
                    tracing::debug!(life_s = began.elapsed().as_secs_f64(), "life ended");
                    reason = FormedReason::WorkerDied;
                    // What `--from` asked for has been done; later lives carry on from the newest.
                    self.from = None;
                }
                Err(error) => {
                    // A store that does not answer needs no person, and would not take the record.
                    if !matches!(error.kind(), Kind::Fenced | Kind::Unavailable) {
                        let step = self.newest_committed().await;
                        self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                    }
                    return Err(error);
                }
            }
        }
    }

    /// Another agent may be at work on this run. If it lives, stand by as long as that is wanted, then leave; if it has gone, carry
    /// on. The journal may go on meanwhile, also under a third one, which is looked at in the same way.
    async fn wait_for_the_other(&mut self) -> Result<Waited> {
        let began = tokio::time::Instant::now();
        let mut waited = Waited::NothingNew;
        let mut standing_by_for = None;
        loop {
            let leader = unfinished_leader(self.journal.lock().await.state());
            let Some(other) = leader.filter(|node| *node != self.node) else { return Ok(waited) };
            self.reporter.event(&Event::Phase { doing: format!("looking whether node {other} still lives") });
            let life = heartbeat::look(&self.run, &other).await?;
            if life == heartbeat::Life::Alive {
                let left = self.manner.standby.saturating_sub(began.elapsed());
                if left.is_zero() {
                    return Err(words::taken(&self.run_id, &other));
                }
                if standing_by_for.as_ref() != Some(&other) {
                    self.reporter.event(&Event::Standby { node: other.to_string() });
                    standing_by_for = Some(other.clone());
                }
                tokio::time::sleep(STANDBY_PAUSE.min(left)).await;
            }
            if self.journal.first().await.refresh().await? > 0 {
                waited = Waited::WentOn;
                continue;
            }
            let heartbeat::Life::Gone(process) = life else { continue };
            // It left without a word: what it had finished since its newest checkpoint is lost.
            let journal = self.journal.lock().await;
            let generation = journal.state().formed().map_or_else(Generation::default, |formed| formed.generation);
            let checkpoint = journal.state().newest().map(|checkpoint| checkpoint.committed.step);
            self.reporter.event(&Event::FoundDead {
                node: other.to_string(),
                generation,
                same_machine: process.as_ref().map(Process::is_of_this_machine),
                pid: process.map(|process| process.pid),
                checkpoint,
            });
            drop(journal);
            self.dead.push(other);
            return Ok(waited);
        }
    }

    /// The journal went on under another agent: its changes of settings hold, and it may have finished the run (`Err`: what is
    /// to be done with this machine then).
    async fn resolve_again(&mut self) -> Result<Result<Resolved, Afterwards>> {
        let (config, overrides, holders) = {
            let journal = self.journal.lock().await;
            let (config, overrides) = effective(journal.state(), &self.overrides)?;
            if let Some(step) = completed(journal.state(), &config, self.from) {
                tracing::info!(run = %self.run_id, %step, "run has been completed by another node");
                return Ok(Err(self.manner.then(&config, false)));
            }
            (config, overrides, companions::holders(journal.state()))
        };
        self.overrides = overrides;
        let cache = self.manner.cache.as_deref();
        let mut resolved = resolve(&config, self.nproc_per_node, cache, &self.reporter).await?;
        provenance::data_agrees(self.journal.lock().await.state(), &resolved, self.accepts_data())?;
        companions::of_existing_run(&mut resolved, &self.run, &holders).await?;
        Ok(Ok(resolved))
    }

    /// [`choose`](Self::choose), while the rest of the data is held against its checksums.
    async fn choose_with_data(&mut self, resolved: &Resolved) -> Result<Load> {
        let whole = async { Ok::<_, Error>(resolved.data.whole().await?) };
        let (load, ()) = tokio::try_join!(self.choose(resolved), whole)?;
        Ok(load)
    }

    fn accepts_data(&self) -> bool {
        self.manner.accepts_data || provenance::names_data(&self.overrides)
    }

    /// The newest usable checkpoint, or what a new run starts from. Damage is reported; what comes of it says [`Docket`].
    async fn choose(&mut self, resolved: &Resolved) -> Result<Load> {
        loop {
            let candidates = self.candidates().await?;
            if let Some(load) = self.in_memory(&candidates).await {
                return Ok(load);
            }
            let made_of = provenance::MadeOf::new(self.journal.lock().await.state(), resolved, self.accepts_data());
            let outcome = self.newest_usable(&candidates, &made_of).await?;
            for damage in outcome.stepped_over.iter().filter(|damage| self.docket.suspect(damage)) {
                self.warn_of_damage(damage.step, &damage.object, &damage.reason);
            }
            let Some((committed, manifest)) = outcome.found else { break };
            if self.is_whole_if_turned_back_to(&committed).await? {
                return Ok(Load::Checkpoint {
                    step: committed.step,
                    generation: committed.generation,
                    from: Source::Store {
                        folder: layout::checkpoint(committed.step, committed.generation),
                        files: restore::tensor_files(&manifest),
                    },
                });
            }
        }
        if self.journal.lock().await.state().checkpoints().is_empty() {
            return self.beginning(resolved).await;
        }
        Err(self.nothing_usable().await)
    }

    /// The newest checkpoint, if a slot of this node still holds it: the store need not be read.
    async fn in_memory(&mut self, candidates: &[Committed]) -> Option<Load> {
        // Newest first.
        let Committed { step, generation, .. } = *candidates.first()?;
        let (slot, files) = self.images.find(step, generation).filter(|_| self.from.is_none())?;
        if !self.images.whole(slot).await {
            tracing::info!(%step, slot, "snapshot in memory is no longer that checkpoint, reading the store");
            return None;
        }
        tracing::info!(%step, slot, "workers start again from the snapshot in memory");
        Some(Load::Checkpoint { step, generation, from: Source::Slot { slot, files } })
    }

    /// What a run without a checkpoint starts from.
    async fn beginning(&self, resolved: &Resolved) -> Result<Load> {
        let Some(uri) = &resolved.config.model.init_from else { return Ok(Load::Nothing) };
        let folder = initial::open(uri, &resolved.config)?;
        let files = initial::weights(&resolved.config, uri, &folder).await?;
        Ok(Load::Weights { folder, files })
    }

    fn warn_of_damage(&self, step: Step, object: &str, reason: &str) {
        let message = format!("checkpoint of step {step} is damaged and stepped over: {object}: {reason}");
        self.reporter.event(&Event::Warning { message });
    }

    /// Forms the next generation, which starts from `load`. `None`: the journal went on meanwhile, so look again at everything.
    async fn form(&mut self, load: &Load, resolved: &Resolved, reason: FormedReason) -> Result<Option<Generation>> {
        let (step, last) = (load.step(), resolved.config.train.steps);
        if step.get() > last {
            // Said before it is written down: what a generation has changed holds for all later ones.
            let what = format!("run {} is at step {step} already, beyond train.steps = {last}", self.run_id);
            return Err(Error::new(Kind::Config, what).with_hint(words::more_steps(&self.run_id)));
        }
        let resume = match load {
            Load::Checkpoint { step, generation, .. } => Some(ResumePoint { step: *step, generation: *generation }),
            _ => None,
        };
        let formed = Formed {
            roster: vec![RosterEntry { node: self.node.clone(), workers: resolved.workers }],
            world_size: WorldSize(resolved.workers),
            resume,
            overrides: self.overrides.clone(),
            reason,
            data: Some(resolved.identity.clone()),
        };
        let mut journal = self.journal.first().await;
        match journal.form(formed).await {
            Ok(generation) => {
                // They hold for every later generation, too: said once is enough.
                self.overrides.clear();
                self.manner.accepts_data = false;
                for dead in self.dead.drain(..) {
                    let run = self.run.clone();
                    tokio::spawn(async move { heartbeat::bury(&run, &dead).await });
                }
                return Ok(Some(generation));
            }
            // Whoever was first is looked at next.
            Err(JournalError::Overtaken { .. } | JournalError::Moved { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    }

    async fn newest_committed(&self) -> Step {
        self.journal.lock().await.state().newest().map_or(Step(0), |checkpoint| checkpoint.committed.step)
    }

    /// What the journal says of the life of machines. Times are the writers' wall clocks: good enough for an estimate, and
    /// nothing but the cadence follows from it. A loss that was announced in time, and drained, lost no step: it is no reason
    /// to save more often.
    async fn measured(&self) -> Measured {
        let observed = Observed::of(self.journal.lock().await.state());
        Measured { trained_s: observed.trained_s, interruptions: observed.lossy, ..Measured::NOTHING }
    }

    async fn diverged(&self, generation: Generation, step: Step, reason: &str) -> Error {
        // A step's loss speaks for the state before its update: the state that this step began with is under suspicion, too.
        let good = {
            let journal = self.journal.lock().await;
            let steps: Vec<Step> = journal.state().candidates().iter().map(|c| c.committed.step).collect();
            steps.into_iter().find(|good| good.next() < step).unwrap_or_default()
        };
        let reason = format!("training diverged at step {step}: {reason}");
        self.append_last(Record::Failed { generation, step, reason: reason.clone() }).await;
        let hint = if good > Step(0) {
            format!(
                "the last good checkpoint is step {good}; lower the learning rate and carry on: trainer resume --run-id {} --from {good} --set train.optimizer.lr=…",
                self.run_id
            )
        } else {
            words::LOWER_RATE.to_owned()
        };
        Error::new(Kind::Config, reason).with_hint(hint)
    }
}

/// The leader of a generation that has not said how it ended: it may still be at work.
fn unfinished_leader(state: &RunState) -> Option<NodeId> {
    let formed = state.formed()?;
    let said = state.interruptions().iter().any(|end| end.generation == formed.generation);
    let open = *state.outcome() == journal::Outcome::Open;
    (open && !said).then(|| formed.node.clone())
}
