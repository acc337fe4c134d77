//! The parent on each node: it forms generations, runs worker groups, saves, restores, and keeps the journal.
//!
//! # A run
//! [`launch`] opens or creates the journal, makes sure that no other agent is at work, chooses the resume point, writes
//! `formed`, and runs one generation after the other until the run is complete, is told to stop, or can't go on.
//!
//! # Crash consistency
//! Everything that a restart needs is in the store. A generation exists when its `formed` record stands, which is
//! written before its resume point is used; a checkpoint exists when its `committed` record stands. Killing this
//! process at any instant leaves the newest checkpoint, and data that no record names.
//!
//! # Two agents
//! Both replay the same journal; the one whose `formed` record is written first has the run. The other checks the first
//! one's heartbeat: if it is alive, the other exits with code 79, or waits until it is dead ([`Manner::standby`]); if
//! it is dead, the other forms the next generation. An agent that was wrongly taken for dead learns of it when it tries
//! to commit or to form the next generation, stops its workers and exits with code 79: two writers can never both
//! commit. It does not come back under its name, even if the other is dead by then: it is fenced for good.
#![doc = include_str!("README.md")]

pub mod initial;

mod companions;
mod doubt;
mod drain;
mod effects;
mod fence;
mod generation;
mod launch;
mod loopback;
mod opening;
mod parting;
mod phase;
mod provenance;
mod restart;
mod save;
mod upkeep;
mod words;
mod workers;

pub use launch::{Afterwards, Begin, Launch, Manner, Outcome};
pub use opening::effective;

use std::{cell::Cell, time::Duration};

use tokio::sync::mpsc;

use self::{
    drain::estimate::Estimates,
    generation::{End, Left, Load, Plan, Source},
    opening::{Opening, Resolved, completed, resolve},
    save::{slots::Slots, upload},
};
use crate::{
    checkpoint::{condemn::Docket, restore},
    config::NoticeConfig,
    error::{Context, Error, Kind, Result},
    goodput::Observed,
    ids::{Generation, NodeId, RunId, Step, WorldSize},
    journal::{Committed, Formed, FormedReason, JournalError, JournalWriter, Record, ResumePoint, RosterEntry},
    layout,
    notice::{self, Notices},
    rendezvous::{
        heartbeat::{self, Process, Pulse, Turning},
        policy::{self, Move, View},
    },
    report::{Event, Reporter},
    snapshot::cadence::Measured,
    storage::Store,
};

/// How long removing the heartbeat at the end may take. If it stays, the next agent only waits a little longer.
const FAREWELL: Duration = Duration::from_secs(2);

/// Executes a run on this node to its end. Call it from the main thread: the workers' lives are tied to the thread that
/// starts them.
pub fn launch(launch: Launch) -> Result<Outcome> {
    launch_then(launch, |outcome| outcome)
}

/// The same; returns what `last` makes of the outcome. `last` runs after the run's last record is written and before
/// the party that waits for this machine is told that it may go: the machine may be gone a moment later. Until then
/// that party is kept waiting.
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
    // Uploads of a run lost to another writer may hang on a dead store.
    runtime.shutdown_timeout(Duration::from_secs(1));
    made
}

/// The work left when a run has ended on this node and its last record is written.
struct Farewell {
    notices: Notices,
    /// Present once it beats.
    pulse: Option<Pulse>,
    /// The agent was told to leave, and nothing is lost.
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
    journal: JournalWriter,
    /// The snapshot slots; their content outlives the workers.
    slots: Slots,
    /// Measured times of steps and saves on this node.
    estimates: Estimates,
    reporter: Reporter,
    nproc_per_node: Option<u32>,
    manner: Manner,
    overrides: Vec<(String, String)>,
    from: Option<Step>,
    /// The damage that this process has found.
    docket: Docket,
    /// Nodes found dead. Others see from their heartbeats how long they have stood still, so the heartbeats stay until
    /// a later generation exists.
    dead: Vec<NodeId>,
}

/// What precedes the next generation.
enum Before {
    /// Nothing: this node takes the run up.
    Start,
    /// The workers of the last generation died.
    Backoff(Duration),
    /// The last generation could not load its checkpoint.
    Reread { load: Load, object: String, reason: String },
}

/// The result of taking up the run.
enum Next {
    /// This node has formed a generation, which starts from `load`.
    Formed { generation: Generation, load: Load },
    /// The run is complete.
    Completed(Afterwards),
}

/// Waits for a notice to leave.
async fn told_to_leave(notices: &mut Notices, reporter: &Reporter) {
    loop {
        let notice = notices.next().await;
        let deadline_s = notice.deadline.map(|left| left.as_secs_f64());
        let means = notice.kind.name();
        let (source, binding) = (notice.source.to_owned(), notice.deadline_binds());
        reporter.event(&Event::Notice { source, deadline_s, means, binding });
        // There is no state to save yet.
        if notice.kind != notice::Kind::Rebalance {
            return;
        }
    }
}

/// Does `work`; `None`: a notice to leave came first. `work` must be droppable at any moment.
async fn unless_told<T>(notices: &mut Notices, reporter: &Reporter, work: impl Future<Output = T>) -> Option<T> {
    let (_none, mut known) = mpsc::unbounded_channel();
    unless_told_as(notices, &mut known, reporter, work).await
}

/// The same, for `work` that itself finds out the run's settings for notices and sends them to `known`.
async fn unless_told_as<T>(
    notices: &mut Notices,
    known: &mut mpsc::UnboundedReceiver<NoticeConfig>,
    reporter: &Reporter,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            Some(settings) = known.recv() => notices.begin(&settings),
            () = told_to_leave(notices, reporter) => return None,
            done = &mut work => return Some(done),
        }
    }
}

impl Agent {
    /// The outcome, and what is said afterwards to anyone who waits for this node.
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
            // Whether the run may exist: after the first request that creates it, the outcome of that request is
            // unknown if this process stops.
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
            // The machine may go away while data is downloaded, which can take long.
            let Some(opened) = unless_told_as(notices, &mut known, &reporter, opening).await else {
                if let Some(step) = newest {
                    reporter.event(&Event::Interrupted { step, lost_steps: 0 });
                }
                let nothing_lost = Outcome::Interrupted { lost_steps: 0 };
                return Ok(if exists.get() { nothing_lost } else { Outcome::NotCreated });
            };
            opened?
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
            journal: JournalWriter::start(journal),
            slots: Slots::create()?,
            estimates: Estimates::default(),
            reporter,
            nproc_per_node,
            manner,
            overrides,
            from,
            docket: Docket::default(),
            dead: Vec::new(),
        };
        let taking_up = async {
            let held = agent.run.hold().await.context("hold the run's folder")?;
            let beating = Pulse::start(agent.run.clone(), agent.node.clone(), turning.clone()).await?;
            Ok::<_, Error>((held, beating))
        };
        let Some(taken_up) = unless_told(notices, &agent.reporter, taking_up).await else {
            return agent.told_between_lives("its heartbeat was begun", None).await;
        };
        let (_held, beating) = taken_up?;
        *pulse = Some(beating);
        agent.live(resolved, notices).await
    }

    /// Forms generations and runs them, one after the other, until the run has ended on this node.
    async fn live(&mut self, mut resolved: Resolved, notices: &mut Notices) -> Result<Outcome> {
        let reporter = self.reporter.clone();
        let mut deaths = Vec::new();
        let (mut before, mut reason) = (Before::Start, FormedReason::Started);
        // The last finished step, once this node has formed a generation.
        let mut finished = None;
        loop {
            // Between two generations nothing is at stake: any work may be dropped when a notice comes.
            let doing = Cell::new("the run was taken up");
            let (settings, mut known) = mpsc::unbounded_channel();
            let taking_up = self.take_up(before, &mut resolved, reason, &doing, &settings);
            let Some(next) = unless_told_as(notices, &mut known, &reporter, taking_up).await else {
                return self.told_between_lives(doing.get(), finished).await;
            };
            let (generation, load) = match next? {
                Next::Formed { generation, load } => (generation, load),
                Next::Completed(then) => return Ok(Outcome::Completed { then }),
            };
            finished = Some(load.step());
            if let Some(since) = self.manner.since.take() {
                tracing::info!("boot to joined: {:.2} s", since.elapsed().as_secs_f64());
            }
            notices.formed(&self.run, generation);
            self.reporter.event(&Event::Formed {
                generation,
                world_size: WorldSize(resolved.workers),
                resume_step: (load.step() > Step(0)).then_some(load.step()),
                total_steps: resolved.config.train.steps,
            });
            let began = tokio::time::Instant::now();
            let plan = self.plan(generation, &load, &resolved, began);
            if let Some(newest) = self.journal.state().newest() {
                self.estimates.seed(&newest.committed);
            }
            let mut left = Left::default();
            let lived =
                generation::run(plan, &mut self.slots, &mut self.estimates, notices, &self.reporter, &mut left).await;
            before = match lived {
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
                Ok(End::Damaged { object, reason }) => Before::Reread { load, object, reason },
                Ok(End::Diverged { step, reason }) => return Err(self.diverged(generation, step, &reason).await),
                Ok(End::Died { step, reason: why }) => {
                    deaths.push(restart::Death::of(step, &why));
                    (finished, reason) = (Some(step), FormedReason::WorkerDied);
                    tracing::debug!(generation_s = began.elapsed().as_secs_f64(), "the workers are gone");
                    Before::Backoff(self.died(generation, step, &why, &deaths, &resolved).await?)
                }
                Err(error) => {
                    // A store that does not answer needs no person, and would not accept the record.
                    if !matches!(error.kind(), Kind::Fenced | Kind::Unavailable) {
                        let step = self.newest_committed();
                        self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                    }
                    return Err(error);
                }
            };
        }
    }

    /// A worker died at `step`: how long to wait before the group starts again, or why it does not.
    async fn died(
        &mut self,
        generation: Generation,
        step: Step,
        why: &str,
        deaths: &[restart::Death],
        resolved: &Resolved,
    ) -> Result<Duration> {
        match restart::decide(deaths, &resolved.config.restart) {
            restart::Decision::GiveUp { reason, out_of_memory } => {
                let (reason, train) = (format!("{reason}: {why}"), &resolved.config.train);
                let error = restart::given_up(reason, out_of_memory, &self.run_id, train, resolved.workers);
                if error.kind() != Kind::Unavailable {
                    self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                }
                Err(error)
            }
            restart::Decision::Restart { after } => {
                self.reporter.event(&Event::WorkerDied {
                    step,
                    reason: why.to_owned(),
                    restarts: u32::try_from(deaths.len()).unwrap_or(u32::MAX),
                    backoff_s: after.as_secs_f64(),
                });
                // `--from` has been honoured; later generations continue from the newest checkpoint.
                self.from = None;
                Ok(after)
            }
        }
    }

    /// Everything a generation starts with.
    fn plan(&self, generation: Generation, load: &Load, resolved: &Resolved, formed: tokio::time::Instant) -> Plan {
        Plan {
            config: resolved.config.clone(),
            data_dir: resolved.data.dir().to_owned(),
            sequences: resolved.sequences,
            workers: resolved.workers,
            load: load.clone(),
            upload: upload::Context {
                run: self.run.clone(),
                run_id: self.run_id.clone(),
                node: self.node.clone(),
                generation,
                formed,
                world_size: WorldSize(resolved.workers),
                data: resolved.identity.clone(),
                journal: self.journal.clone(),
            },
            companions: resolved.companions.clone(),
            docket: self.docket.clone(),
            measured: self.measured(),
        }
    }

    /// Goes from any state of the run to a generation of this node. `doing` holds the current activity; `settings`
    /// receives the run's settings for notices when they have changed. May be dropped at any moment.
    async fn take_up(
        &mut self,
        before: Before,
        resolved: &mut Resolved,
        reason: FormedReason,
        doing: &Cell<&'static str>,
        settings: &mpsc::UnboundedSender<NoticeConfig>,
    ) -> Result<Next> {
        // Whether another node may be at work.
        let mut look = matches!(before, Before::Start);
        match before {
            Before::Start => {}
            Before::Backoff(after) => {
                doing.set("workers were to be started again");
                tokio::time::sleep(after).await;
            }
            Before::Reread { load, object, reason } => {
                doing.set("a checkpoint that seemed damaged was read again");
                self.step_over(&load, &object, &reason).await?;
            }
        }
        // Whether the journal has gone on since `resolved` was made of it.
        let mut stale = false;
        loop {
            if look {
                doing.set("another node was looked at");
                stale |= self.wait_for_the_leader().await?;
            }
            if stale {
                doing.set("data was fetched");
                match self.resolve_again().await? {
                    Ok(again) => *resolved = again,
                    Err(then) => return Ok(Next::Completed(then)),
                }
                // The receiver waits for the end of this function.
                let _ = settings.send(resolved.config.notice.clone());
            }
            provenance::is_still_there(resolved)?;
            doing.set("a checkpoint to go on from was looked for");
            let load = self.choose_with_data(resolved).await?;
            doing.set("a generation was formed");
            if let Some(generation) = self.form(&load, resolved, reason).await? {
                return Ok(Next::Formed { generation, load });
            }
            (look, stale) = (true, true);
        }
    }

    /// Another node may be at work on this run: does what [`policy::decide`] says until this node may form a
    /// generation. Returns whether the journal has gone on meanwhile, also under a third node.
    async fn wait_for_the_leader(&mut self) -> Result<bool> {
        let (began, settings) = (tokio::time::Instant::now(), policy::Settings { standby: self.manner.standby });
        let mut view = View::of(&self.journal.state(), &self.node);
        let (mut went_on, mut standing_by_for) = (false, None);
        loop {
            let (next, reason) = policy::decide(&view, began.elapsed(), settings);
            tracing::debug!(?next, "{reason}");
            match next {
                Move::Form => return Ok(went_on),
                Move::Leave(leader) => return Err(words::taken(&self.run_id, &leader)),
                Move::Look(leader) => {
                    self.reporter.event(&Event::Phase { doing: format!("looking whether node {leader} still lives") });
                    view.liveness = Some(heartbeat::look(&self.run, &leader).await?);
                }
                Move::StandBy(leader, pause) => {
                    if standing_by_for.as_ref() != Some(&leader) {
                        self.reporter.event(&Event::Standby { node: leader.to_string() });
                        standing_by_for = Some(leader);
                    }
                    tokio::time::sleep(pause).await;
                    went_on |= self.journal.refresh().await? > 0;
                    view = View::of(&self.journal.state(), &self.node);
                }
                Move::ReadOn => {
                    if self.journal.refresh().await? > 0 {
                        went_on = true;
                        view = View::of(&self.journal.state(), &self.node);
                    } else {
                        view.read_on = true;
                    }
                }
                Move::TakeOver(leader, process) => {
                    self.found_dead(leader, process);
                    return Ok(went_on);
                }
            }
        }
    }

    /// The leader stopped without a last record: the steps that it finished since its newest checkpoint are lost.
    fn found_dead(&mut self, leader: NodeId, process: Option<Process>) {
        let state = self.journal.state();
        self.reporter.event(&Event::FoundDead {
            node: leader.to_string(),
            generation: state.formed().map_or_else(Generation::default, |formed| formed.generation),
            same_machine: process.as_ref().map(Process::is_of_this_machine),
            pid: process.map(|process| process.pid),
            checkpoint: state.newest().map(|checkpoint| checkpoint.committed.step),
        });
        self.dead.push(leader);
    }

    /// The journal went on under another agent: its changes of settings hold, and it may have finished the run (`Err`:
    /// what to do with this machine then).
    async fn resolve_again(&mut self) -> Result<Result<Resolved, Afterwards>> {
        let state = self.journal.state();
        let (config, overrides) = effective(&state, &self.overrides)?;
        if let Some(step) = completed(&state, &config, self.from) {
            tracing::info!(run = %self.run_id, %step, "run has been completed by another node");
            return Ok(Err(self.manner.then(&config, false)));
        }
        let holders = companions::holders(&state);
        self.overrides = overrides;
        let cache = self.manner.cache.as_deref();
        let mut resolved = resolve(&config, self.nproc_per_node, cache, &self.reporter).await?;
        provenance::data_agrees(&self.journal.state(), &resolved, self.accepts_data())?;
        companions::of_existing_run(&mut resolved, &self.run, &holders).await?;
        Ok(Ok(resolved))
    }

    /// [`choose`](Self::choose), while the rest of the data is verified against its checksums.
    async fn choose_with_data(&mut self, resolved: &Resolved) -> Result<Load> {
        let whole = async { Ok::<_, Error>(resolved.data.whole().await?) };
        let (load, ()) = tokio::try_join!(self.choose(resolved), whole)?;
        Ok(load)
    }

    fn accepts_data(&self) -> bool {
        self.manner.accepts_data || provenance::names_data(&self.overrides)
    }

    /// The newest usable checkpoint, or the start of a new run. Damage is reported; [`Docket`] says what follows from
    /// it.
    async fn choose(&mut self, resolved: &Resolved) -> Result<Load> {
        loop {
            let candidates = self.candidates().await?;
            if let Some(load) = self.in_memory(&candidates).await {
                return Ok(load);
            }
            let state = self.journal.state();
            let made_of = provenance::MadeOf::new(&state, resolved, self.accepts_data());
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
        if self.journal.state().checkpoints().is_empty() {
            return self.beginning(resolved).await;
        }
        Err(self.nothing_usable().await)
    }

    /// The newest checkpoint, if a slot of this node still holds it: then the store need not be read.
    async fn in_memory(&mut self, candidates: &[Committed]) -> Option<Load> {
        // Newest first.
        let Committed { step, generation, .. } = *candidates.first()?;
        let (slot, files) = self.slots.find(step, generation).filter(|_| self.from.is_none())?;
        if !self.slots.whole(slot).await {
            tracing::info!(%step, slot, "snapshot in memory is no longer that checkpoint, reading the store");
            return None;
        }
        tracing::info!(%step, slot, "workers start again from the snapshot in memory");
        Some(Load::Checkpoint { step, generation, from: Source::Slot { slot, files } })
    }

    /// The start of a run without a checkpoint.
    async fn beginning(&self, resolved: &Resolved) -> Result<Load> {
        let Some(uri) = &resolved.config.model.init_from else { return Ok(Load::Nothing) };
        let folder = initial::open(uri, &resolved.config)?;
        let files = initial::weights(&resolved.config, uri, &folder).await?;
        Ok(Load::Weights { folder, files })
    }

    fn warn_of_damage(&self, step: Step, object: &str, reason: &str) {
        let message = format!("checkpoint of step {step} is damaged and skipped: {object}: {reason}");
        self.reporter.event(&Event::Warning { message });
    }

    /// Forms the next generation, which starts from `load`. `None`: the journal went on meanwhile, so everything must
    /// be checked again.
    async fn form(&mut self, load: &Load, resolved: &Resolved, reason: FormedReason) -> Result<Option<Generation>> {
        let (step, last) = (load.step(), resolved.config.train.steps);
        if step.get() > last {
            // Reported before it is recorded: a change by one generation holds for all later ones.
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
        match self.journal.form(formed).await {
            Ok(generation) => {
                // They hold for every later generation, too: one report is enough.
                self.overrides.clear();
                self.manner.accepts_data = false;
                for dead in self.dead.drain(..) {
                    let run = self.run.clone();
                    tokio::spawn(async move { heartbeat::bury(&run, &dead).await });
                }
                return Ok(Some(generation));
            }
            // Who has held a generation is fenced from now on, and could form none however often it tried.
            Err(error @ JournalError::Overtaken { .. }) if self.journal.view().held.is_some() => {
                return Err(error.into());
            }
            // The next loop checks the one that was first.
            Err(JournalError::Overtaken { .. } | JournalError::Moved { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(None)
    }

    fn newest_committed(&self) -> Step {
        self.journal.state().newest().map_or(Step(0), |checkpoint| checkpoint.committed.step)
    }

    /// The lifetimes of machines, from the journal. Times are the writers' wall clocks: good enough for an estimate,
    /// and only the cadence follows from it. A machine whose loss was announced in time, and drained, lost no step: it
    /// is no reason to save more often.
    fn measured(&self) -> Measured {
        let observed = Observed::of(&self.journal.state());
        Measured { trained_s: observed.trained_s, interruptions: observed.lossy, ..Measured::NOTHING }
    }

    async fn diverged(&self, generation: Generation, step: Step, reason: &str) -> Error {
        // A step's loss describes the state before its update: the state that this step began with is suspect, too.
        let good = {
            let state = self.journal.state();
            let steps: Vec<Step> = state.candidates().iter().map(|c| c.committed.step).collect();
            steps.into_iter().find(|good| good.next() < step).unwrap_or_default()
        };
        let reason = format!("training diverged at step {step}: {reason}");
        self.append_last(Record::Failed { generation, step, reason: reason.clone() }).await;
        let hint = if good > Step(0) {
            format!(
                "the last good checkpoint is step {good}; lower the learning rate and carry on: trainer resume \
                --run-id {} --from {good} --set train.optimizer.lr=…",
                self.run_id
            )
        } else {
            words::LOWER_RATE.to_owned()
        };
        Error::new(Kind::Config, reason).with_hint(hint)
    }
}
