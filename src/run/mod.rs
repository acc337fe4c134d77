//! One run on this node: one generation after the other, until the run has ended here.
//!
//! # A run
//! [`launch`] opens or creates the journal, makes sure that no other agent is at work, chooses the resume point, writes
//! `formed`, and runs one generation after the other until the run is complete, is told to stop, or can't go on.
//!
//! Between two generations the loop is `observe; decide; do`: [`View`] is what this node knows of another one that
//! leads the run, [`policy::decide`] says what to do about it, and the loop does it. Nothing is at stake there: a
//! notice drops any of that work.
//!
//! # Crash consistency
//! Everything that a restart needs is in the store. A generation exists when its `formed` record stands, which is
//! written before its resume point is used; a checkpoint exists when its `committed` record stands. Killing this
//! process at any instant leaves the newest checkpoint, and data that no record names.
//!
//! *Retry:* a group whose worker died is restarted within the bounds of `agent/restart.rs`; a process that has exited
//! is started again by whoever started it, and finds everything in the store. *Cancel:* a notice drops the work between
//! two generations; a record that was being appended may or may not stand then, and the next reader of the journal sees
//! which. Within a generation nothing is dropped: it ends as `agent/generation.rs` says.
//!
//! # Two agents
//! Both replay the same journal; the one whose `formed` record is written first has the run. The other checks the first
//! one's heartbeat: if it is alive, the other exits with code 79, or waits until it is dead
//! ([`LaunchOptions::standby`]); if it is dead, the other forms the next generation. An agent that was wrongly taken
//! for dead learns of it when it tries to commit or to form the next generation, stops its workers and exits with code
//! 79: two writers can never both commit. It does not come back under its name, even if the other is dead by then: it
//! is fenced for good.

mod choose;
mod doubt;
mod launch;
pub mod open;
mod parting;
mod resolved;
mod together;
mod words;

use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    ops::ControlFlow,
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::{sync::mpsc, time::Instant};

pub use self::launch::{Begin, InvalidBounds, Launch, LaunchOptions, NodeBounds, OnComplete, Outcome};
use self::{
    open::{Opened, Opening, Overrides, Ready, Resolving, Standing},
    resolved::Resolved,
};
use crate::{
    agent::{
        Estimates, Neighbours, Slots, Stopping,
        generation::{self, End, Left, Load, Plan},
        restart, upload,
    },
    checkpoint::{Flaw, condemn::Docket},
    config::{NetworkConfig, NoticeConfig},
    error::{Context, Error, Kind, Result},
    goodput::Observed,
    history::{self, spent::Spent},
    ids::{Generation, NodeId, NodeRanks, RunId, Step, WorldSize},
    journal::{
        Formed, FormedReason, JournalError, JournalWriter, Reached, Record, ResumePoint, RosterEntry, RunState,
        Succession,
    },
    notice::{self, Notices},
    rendezvous::{
        channel::{LinkSettings, LocalNode},
        heartbeat::{self, Process, Pulse, Turning},
        policy::{self, Move, View},
    },
    report::{Event, Reporter},
    snapshot::cadence::Measured,
    storage::{Held, Store},
    workload::{self, Collectives},
};

/// How long removing the heartbeat at the end may take. If it stays, the next agent only waits a little longer.
const HEARTBEAT_END: Duration = Duration::from_secs(2);

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
    let (outcome, shutdown) = runtime.block_on(run(launch));
    let made = last(outcome);
    if let Some(shutdown) = shutdown {
        runtime.block_on(shutdown.finish());
    }
    // Uploads of a run lost to another writer may hang on a dead store.
    runtime.shutdown_timeout(Duration::from_secs(1));
    made
}

/// The outcome, and what is left to do afterwards.
async fn run(launch: Launch) -> (Result<Outcome>, Option<Shutdown>) {
    let listening = Notices::listen().map_err(|e| Error::from_source(Kind::Bug, e).context("listen for signals"));
    let mut notices = match listening {
        Ok(notices) => notices,
        Err(error) => return (Err(error), None),
    };
    let turning = Turning::default();
    let (result, pulse) = turning.during(open_and_live(launch, &mut notices, &turning)).await;
    // After a run that is complete the machine may have other work.
    let left = matches!(result, Ok(Outcome::Interrupted { lost_steps: 0 } | Outcome::NotCreated));
    (result, Some(Shutdown { notices, pulse, left }))
}

/// The outcome, and the heartbeat, if it beats by then.
async fn open_and_live(launch: Launch, notices: &mut Notices, turning: &Turning) -> (Result<Outcome>, Option<Pulse>) {
    match Runner::open(launch, notices, turning).await {
        Ok(Start::Run(mut runner)) => {
            let together = runner.is_together();
            let outcome = if together { runner.live_together(notices).await } else { runner.live(notices).await };
            (outcome, runner.pulse.take())
        }
        Ok(Start::Over(outcome)) => (Ok(outcome), None),
        Err(error) => (Err(error), None),
    }
}

/// The work left when a run has ended on this node and its last record is written.
struct Shutdown {
    notices: Notices,
    /// Present once it beats.
    pulse: Option<Pulse>,
    /// The agent was told to leave, and nothing is lost.
    left: bool,
}

impl Shutdown {
    async fn finish(mut self) {
        self.notices.release(self.left).await;
        if let Some(pulse) = self.pulse {
            let limit = parting::within(HEARTBEAT_END, self.notices.left());
            let _ = tokio::time::timeout(limit, pulse.stop()).await;
        }
    }
}

/// An opened run on this node.
struct Runner {
    run: Store,
    run_id: RunId,
    node: NodeId,
    journal: JournalWriter,
    resolved: Arc<Resolved>,
    /// The snapshot slots; their content outlives the workers.
    slots: Slots,
    /// Measured times of steps and saves on this node.
    estimates: Estimates,
    reporter: Reporter,
    nproc_per_node: Option<u32>,
    options: LaunchOptions,
    overrides: Overrides,
    from: Option<Step>,
    /// The damage that this process has found.
    docket: Docket,
    /// Nodes found dead. Others see from their heartbeats how long they have stood still, so the heartbeats stay until
    /// a later generation exists.
    dead: Vec<NodeId>,
    turning: Turning,
    /// The run's folder, once this node has taken up the run.
    held: Option<Held>,
    /// This node's heartbeat, from then on.
    pulse: Option<Pulse>,
    /// This machine's network, of a run that may have several nodes: as its command says, whatever other nodes set.
    network: Option<NetworkConfig>,
    /// This node on the channel, and the limits there, once it has taken a seat.
    channel: Option<(Arc<LocalNode>, LinkSettings)>,
}

/// What a command finds to do on this node.
enum Start {
    Run(Box<Runner>),
    Over(Outcome),
}

/// A node's place in a generation.
struct Seating {
    ranks: NodeRanks,
    /// All nodes, this one included.
    members: Vec<NodeId>,
    /// The others, with their ranks.
    others: Vec<(NodeId, NodeRanks)>,
    /// Where rank 0 serves the ranks' store, if it is this node's.
    store: SocketAddr,
    /// The others whose memory may have files of the checkpoint that is loaded.
    neighbours: Option<Neighbours>,
}

impl Seating {
    /// Of a node that is alone.
    fn alone(node: NodeId, workers: u32) -> Self {
        let store = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
        Self { ranks: NodeRanks::alone(workers), members: vec![node], others: Vec::new(), store, neighbours: None }
    }
}

/// What precedes the next generation.
enum Before {
    /// Nothing: this node takes the run up.
    Start,
    /// The workers of the last generation died.
    Backoff(Duration),
    /// The last generation could not load its checkpoint.
    Reread { load: Load, object: String, reason: Flaw },
}

/// The result of taking up the run.
enum Next {
    /// This node has formed a generation, which starts from `load`.
    Formed { generation: Generation, load: Load },
    /// The run is complete.
    Completed(OnComplete),
    /// The run has reached a cap.
    Capped(Reached),
}

/// The generations of this node so far.
struct Story {
    deaths: Vec<restart::Death>,
    /// Why the next generation is formed.
    reason: FormedReason,
    /// The last finished step, once this node has formed a generation.
    finished: Option<Step>,
    /// What differed between the states of the ranks, if that has ended the last generation.
    differed: Option<String>,
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
async fn or_notice<T>(notices: &mut Notices, reporter: &Reporter, work: impl Future<Output = T>) -> Option<T> {
    let (_none, mut known) = mpsc::unbounded_channel();
    or_notice_as(notices, &mut known, reporter, work).await
}

/// The same, for `work` that itself finds out the run's settings for notices and sends them to `known`.
async fn or_notice_as<T>(
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

impl Runner {
    /// Opens or creates the run.
    async fn open(launch: Launch, notices: &mut Notices, turning: &Turning) -> Result<Start> {
        let Launch { store, run_id, begin, nproc_per_node, options, reporter } = launch;
        let (run, node) = (store.folder(run_id.as_str()), NodeId::random());
        let (settings, mut known) = mpsc::unbounded_channel();
        // Whether the run may exist: after the first request that creates it, the outcome of that request is unknown
        // if this process stops.
        let exists = Cell::new(matches!(begin, Begin::Resume { .. }));
        let newest = match &begin {
            Begin::Resume { state, .. } => state.newest().map(|newest| newest.committed.step),
            _ => None,
        };
        let opening = async {
            reporter.event(&Event::Phase { doing: "checking the store".to_owned() });
            store.prove_create_is_atomic().await?;
            let (options, reporter, settings) = (&options, &reporter, &settings);
            let resolving = Resolving { run: &run, nproc_per_node, options, reporter, settings };
            Opening { resolving, node: &node, run_id: &run_id, exists: &exists }.open(begin).await
        };
        // The machine may go away while data is downloaded, which can take long.
        let Some(opened) = or_notice_as(notices, &mut known, &reporter, opening).await else {
            if let Some(step) = newest {
                reporter.event(&Event::Interrupted { step, lost_steps: 0, cap: None });
            }
            let nothing_lost = Outcome::Interrupted { lost_steps: 0 };
            return Ok(Start::Over(if exists.get() { nothing_lost } else { Outcome::NotCreated }));
        };
        let Ready { journal, resolved, overrides, from } = match opened? {
            Opened::Ready(ready) => *ready,
            Opened::Complete(then) => return Ok(Start::Over(Outcome::Completed { then })),
            Opened::Capped(cap, then) => return Ok(Start::Over(Outcome::Capped { cap, lost_steps: 0, then })),
        };
        notices.begin(&resolved.config.notice);
        Ok(Start::Run(Box::new(Self {
            run,
            run_id,
            node,
            journal: JournalWriter::start(journal),
            slots: Slots::create(resolved.config.checkpoint.slots)?,
            resolved: Arc::new(resolved),
            estimates: Estimates::default(),
            reporter,
            nproc_per_node,
            options,
            overrides,
            from,
            docket: Docket::default(),
            dead: Vec::new(),
            turning: turning.clone(),
            held: None,
            pulse: None,
            network: None,
            channel: None,
        })))
    }

    /// Forms generations and runs them, one after the other, until the run has ended on this node.
    async fn live(&mut self, notices: &mut Notices) -> Result<Outcome> {
        let mut story = Story { deaths: Vec::new(), reason: FormedReason::Started, finished: None, differed: None };
        let mut before = Before::Start;
        loop {
            // Between two generations nothing is at stake: any work may be dropped when a notice comes.
            let doing = Cell::new("taking up the run");
            let (settings, mut known) = mpsc::unbounded_channel();
            let reporter = self.reporter.clone();
            let because = (story.reason, story.differed.clone());
            let taking_up = self.take_up(before, because, &doing, &settings);
            let Some(next) = or_notice_as(notices, &mut known, &reporter, taking_up).await else {
                return self.told_between_generations(doing.get(), story.finished, notices.left()).await;
            };
            let (generation, load) = match next? {
                Next::Formed { generation, load } => (generation, load),
                Next::Completed(then) => return Ok(Outcome::Completed { then }),
                Next::Capped(cap) => return Ok(self.at_its_cap(cap, 0, false)),
            };
            story.finished = Some(load.step());
            before = match self.generation(generation, load, &mut story, notices).await? {
                ControlFlow::Continue(before) => before,
                ControlFlow::Break(outcome) => return Ok(outcome),
            };
        }
    }

    /// Goes from any state of the run to a generation of this node. `doing` holds the current activity; `settings`
    /// receives the run's settings for notices when they have changed. May be dropped at any moment.
    async fn take_up(
        &mut self,
        before: Before,
        because: (FormedReason, Option<String>),
        doing: &Cell<&'static str>,
        settings: &mpsc::UnboundedSender<NoticeConfig>,
    ) -> Result<Next> {
        match before {
            Before::Start => {
                doing.set("starting the heartbeat");
                self.held = Some(self.run.hold().await.context("hold the run's folder")?);
                self.pulse = Some(Pulse::start(self.run.clone(), self.node.clone(), self.turning.clone()).await?);
            }
            Before::Backoff(after) => {
                doing.set("waiting to restart the workers");
                tokio::time::sleep(after).await;
            }
            Before::Reread { load, object, reason } => {
                doing.set("re-reading a checkpoint that seemed damaged");
                self.step_over(&load, &object, &reason).await?;
            }
        }
        let standby = policy::Settings { standby: self.options.standby };
        let (mut began, mut view) = (Instant::now(), self.look_around());
        // Whether the journal has gone on under another node since the run was resolved.
        let mut went_on = false;
        let mut standing_by_for = None;
        loop {
            let (next, why) = policy::decide(&view, began.elapsed(), standby);
            tracing::debug!(?next, "{why}");
            match next {
                Move::Form => {}
                Move::TakeOver(leader, process) => self.found_dead(leader, process),
                Move::Leave(leader) => return Err(words::taken(&self.run_id, &leader)),
                Move::Look(leader) => {
                    doing.set("checking another node");
                    self.reporter.event(&Event::Phase { doing: format!("checking whether node {leader} is alive") });
                    view.liveness = Some(heartbeat::look(&self.run, &leader).await?);
                    continue;
                }
                Move::StandBy(leader, pause) => {
                    if standing_by_for.as_ref() != Some(&leader) {
                        self.reporter.event(&Event::Standby { node: leader.to_string() });
                        standing_by_for = Some(leader);
                    }
                    tokio::time::sleep(pause).await;
                    went_on |= self.journal.refresh().await? > 0;
                    view = self.look_around();
                    continue;
                }
                Move::ReadOn => {
                    if self.journal.refresh().await? > 0 {
                        went_on = true;
                        view = self.look_around();
                    } else {
                        view.read_on = true;
                    }
                    continue;
                }
            }
            if went_on {
                doing.set("fetching the data");
                if let Some(over) = self.resolve_again(settings).await? {
                    return Ok(over);
                }
            }
            self.resolved.workload.is_still_there()?;
            doing.set("choosing a checkpoint");
            let load = self.choose_with_data().await?;
            doing.set("forming a generation");
            if let Some(generation) = self.form(&load, &because).await? {
                return Ok(Next::Formed { generation, load });
            }
            // Another node was first.
            went_on = true;
            standing_by_for = None;
            (began, view) = (Instant::now(), self.look_around());
        }
    }

    /// The journal's view of another node that leads the run.
    fn look_around(&self) -> View {
        View::of(&self.journal.state(), &self.node)
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

    /// The journal went on under another agent: its changes of settings hold. `Some`: it has finished the run, or
    /// brought it to a cap.
    async fn resolve_again(&mut self, settings: &mpsc::UnboundedSender<NoticeConfig>) -> Result<Option<Next>> {
        let (run, nproc_per_node, options, reporter) = (&self.run, self.nproc_per_node, &self.options, &self.reporter);
        let resolving = Resolving { run, nproc_per_node, options, reporter, settings };
        match resolving.existing_run(&self.journal.state(), &self.overrides, self.from).await? {
            Standing::Open(resolved, overrides) => {
                self.slots.set_count(resolved.config.checkpoint.slots)?;
                (self.resolved, self.overrides) = (Arc::from(resolved), overrides);
                Ok(None)
            }
            Standing::Complete(step, then) => {
                tracing::info!(run = %self.run_id, %step, "run has been completed by another node");
                Ok(Some(Next::Completed(then)))
            }
            Standing::Capped(cap, _) => Ok(Some(Next::Capped(cap))),
        }
    }

    /// Forms the next generation, which starts from `load`. `None`: the journal went on meanwhile, so everything must
    /// be checked again.
    async fn form(
        &mut self,
        load: &Load,
        (reason, why): &(FormedReason, Option<String>),
    ) -> Result<Option<Generation>> {
        let (step, last) = (load.step(), self.resolved.workload.last_step());
        if step > last {
            // Reported before it is recorded: a change by one generation holds for all later ones.
            return Err(workload::words::beyond(&self.run_id, step, last));
        }
        let resume = match load {
            Load::Checkpoint { step, generation, .. } => Some(ResumePoint { step: *step, generation: *generation }),
            _ => None,
        };
        let formed = Formed {
            roster: vec![RosterEntry::new(self.node.clone(), self.resolved.workload.workers())],
            world_size: WorldSize(self.resolved.workload.workers()),
            resume,
            overrides: self.overrides.clone(),
            reason: *reason,
            data: Some(self.resolved.workload.data().clone()),
            succession: Succession { why: why.as_deref().map(words::short), ..Succession::default() },
        };
        match self.journal.form(formed).await {
            Ok(generation) => {
                // They hold for every later generation, too: one report is enough.
                self.overrides.clear();
                self.options.accepts_data = false;
                for dead in self.dead.drain(..) {
                    let run = self.run.clone();
                    tokio::spawn(async move { heartbeat::remove_stale(&run, &dead).await });
                }
                Ok(Some(generation))
            }
            // Whoever has held a generation is fenced for good, and could form none however often it tried.
            Err(error @ JournalError::Overtaken { .. }) if self.journal.view().held.is_some() => Err(error.into()),
            // The next look finds the one that was first.
            Err(JournalError::Overtaken { .. } | JournalError::Moved { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Runs a generation that was formed, and records how it ended, if the run ends with it.
    async fn generation(
        &mut self,
        generation: Generation,
        load: Load,
        story: &mut Story,
        notices: &mut Notices,
    ) -> Result<ControlFlow<Outcome, Before>> {
        if let Some(since) = self.options.since.take() {
            tracing::info!("boot to joined: {:.2} s", since.elapsed().as_secs_f64());
        }
        notices.formed(&self.run, generation, &self.journal.state().continued(generation));
        let world_size = WorldSize(self.resolved.workload.workers());
        self.reporter.event(&Event::Counted(Box::new(history::counted(&self.journal.state()))));
        self.reporter.event(&Event::Formed {
            generation,
            world_size,
            shares: self.resolved.workload.uneven_shares(world_size),
            resume_step: (load.step() > Step(0)).then_some(load.step()),
            total_steps: self.resolved.workload.last_step().get(),
            nodes: None,
            leader: None,
        });
        let began = Instant::now();
        let seating = Seating::alone(self.node.clone(), world_size.get());
        let plan = self.plan(generation, &load, began, &seating, story.differed.is_some());
        if let Some(newest) = self.journal.state().newest() {
            self.estimates.seed(&newest.committed);
        }
        let mut left = Left::default();
        let (slots, estimates) = (&mut self.slots, &mut self.estimates);
        let ended = generation::run(plan, None, slots, estimates, notices, &self.reporter, &mut left).await;
        story.differed = left.members.differed.take();
        match ended {
            Ok(End::Completed { step, loss, early }) => {
                let outcome = self.complete(generation, step, loss, early, notices).await?;
                match outcome {
                    Outcome::Completed { .. } => self.tidy(left, notices).await,
                    _ => _ = self.gone(left).await,
                }
                Ok(ControlFlow::Break(outcome))
            }
            Ok(End::Stopped(stopped)) => {
                let outcome = self.interrupted(generation, stopped, notices.left()).await;
                let _ = self.gone(left).await;
                Ok(ControlFlow::Break(outcome?))
            }
            Ok(End::Damaged { object, reason }) => Ok(ControlFlow::Continue(Before::Reread { load, object, reason })),
            Ok(End::Diverged { step, reason }) => Err(self.diverged(generation, step, &reason).await),
            Ok(End::Died { step, reason }) => {
                story.deaths.push(restart::Death::of(step, &reason));
                (story.finished, story.reason) = (Some(step), FormedReason::WorkerDied);
                tracing::debug!(generation_s = began.elapsed().as_secs_f64(), "the workers are gone");
                Ok(ControlFlow::Continue(Before::Backoff(self.died(generation, step, &reason, &story.deaths).await?)))
            }
            Err(error) => {
                if is_recorded(error.kind()) {
                    let step = self.newest_committed();
                    self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                }
                Err(error)
            }
        }
    }

    /// Everything a generation starts with.
    fn plan(&self, generation: Generation, load: &Load, formed: Instant, seating: &Seating, differed: bool) -> Plan {
        let resolved = &self.resolved;
        Plan {
            config: resolved.config.clone(),
            workload: Arc::clone(&resolved.workload),
            load: load.clone(),
            upload: upload::Context {
                run: self.run.clone(),
                run_id: self.run_id.clone(),
                node: self.node.clone(),
                generation,
                formed,
                ranks: seating.ranks,
                members: seating.members.clone(),
                journal: self.journal.clone(),
            },
            docket: self.docket.clone(),
            stopping: self.stopping(load),
            measured: self.measured(),
            nearest: self.is_together(),
            neighbours: seating.neighbours.clone(),
            store: seating.store,
            // Of a run that may have several nodes, workers may live until others come.
            collectives: Arc::new(if self.is_together() {
                resolved.workload.collectives(seating.store.ip())
            } else {
                Collectives::default()
            }),
            doubted: differed,
            spent: Spent::of(&self.journal.state(), Timestamp::now()),
            kept: None,
        }
    }

    /// How early stopping stands with the state to load.
    fn stopping(&self, load: &Load) -> Stopping {
        let state = self.journal.state();
        let loaded = match load {
            Load::Checkpoint { step, generation, .. } => state.checkpoint(*step, *generation),
            _ => None,
        };
        Stopping::of(&self.resolved.config, loaded.map(|checkpoint| &checkpoint.committed))
    }

    /// A worker died at `step`: how long to wait before the group starts again, or why it does not.
    async fn died(
        &mut self,
        generation: Generation,
        step: Step,
        why: &str,
        deaths: &[restart::Death],
    ) -> Result<Duration> {
        match restart::decide(deaths, &self.resolved.config.restart) {
            restart::Verdict::GiveUp { reason, out_of_memory } => {
                let less_memory = out_of_memory.then(|| self.resolved.workload.less_memory(&self.run_id, why));
                let error = restart::given_up(format!("{reason}: {why}"), less_memory, &self.run_id);
                if error.kind() != Kind::Unavailable {
                    self.append_last(Record::Failed { generation, step, reason: error.to_string() }).await;
                }
                Err(error)
            }
            restart::Verdict::Restart { after } => {
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
        let good = last_good(&self.journal.state(), step);
        let reason = format!("training diverged at step {step}: {reason}");
        self.append_last(Record::Failed { generation, step, reason: reason.clone() }).await;
        Error::new(Kind::Config, reason).with_hint(workload::words::lower_rate(&self.run_id, step, good))
    }
}

/// Whether an error that ends a run on this node is recorded in its journal. A lost run is another node's; a store that
/// does not answer needs no person, and would not accept the record.
fn is_recorded(kind: Kind) -> bool {
    !matches!(kind, Kind::Fenced | Kind::Unavailable)
}

/// The newest checkpoint that a divergence at `step` does not make suspect. A step's loss describes the state before
/// its update: the state that this step began with is suspect, too.
fn last_good(state: &RunState, step: Step) -> Option<Step> {
    let steps: Vec<Step> = state.candidates().iter().map(|checkpoint| checkpoint.committed.step).collect();
    steps.into_iter().find(|good| good.next() < step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::{checkpoint, memory_store, state_after};

    #[tokio::test]
    async fn a_divergence_makes_the_state_that_its_step_began_with_suspect() {
        let store = memory_store();
        let mut commits = Vec::new();
        for step in [3, 5, 6] {
            commits.push(checkpoint(&store, step, 1, 1, step).await.0);
        }
        let state = state_after(commits, vec![]);
        for (diverged, good) in [(8, Some(6)), (7, Some(5)), (6, Some(3)), (5, Some(3)), (4, None), (1, None)] {
            assert_eq!(last_good(&state, Step(diverged)), good.map(Step), "{diverged}");
        }
    }

    #[test]
    fn an_end_that_needs_no_person_is_not_recorded() {
        for (kind, recorded) in [
            (Kind::Fenced, false),
            (Kind::Unavailable, false),
            (Kind::Bug, true),
            (Kind::Config, true),
            (Kind::Data, true),
            (Kind::Permission, true),
        ] {
            assert_eq!(is_recorded(kind), recorded, "{kind:?}");
        }
    }
}
