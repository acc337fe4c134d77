//! One generation on this node: from its workers' start to their end.
//!
//! One event loop: `select!` arms only make an [`Event`], [`StateMachine::handle`] decides what it changes, [`Lead`]
//! performs the effects, and [`Node`] those for this node's own workers and memory. Notices come first, then messages,
//! then the clock: a worker's last messages must be heard before its death is acted on.
//!
//! A generation ends in one of the ways of [`End`]. In every case its processes are then gone, or exiting ([`Left`]),
//! and snapshots that every rank had captured have been uploaded and committed, unless the run was lost to another
//! writer or there was no time to wait: then the save under way is given up, so that the report about it stays true. If
//! another generation may follow, nobody of this one can write into a slot any more ([`Slots::end_generation`]).

use std::{collections::VecDeque, net::SocketAddr, ops::ControlFlow, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};

use super::{
    blame::{Blame, Watch},
    drain::estimate::Estimates,
    effects,
    finish::FINISHING,
    group::{Company, Heard, Others, Progressed, ToLeader},
    keep::{Keeping, Kept},
    lead::Lead,
    node::{Crew, Node},
    pace,
    phase::{Event, Loading, Settings, StateMachine},
    save::{
        borrow::Neighbours,
        fault::Group,
        slots::Slots,
        upload::{self, SaveEvent},
    },
    states::Seats,
    stopping::Stopping,
    upkeep::retention::Retention,
    workers::{WorkerEvent, Workers},
};
use crate::{
    checkpoint::{Flaw, condemn::Docket, restore::RemoteFile},
    config::RunConfig,
    error::Result,
    faults::{self, At},
    history::spent::Spent,
    ids::{Generation, NodeId, Step},
    journal::{Drain, EarlyStop, Reached},
    notice::{self, Confidence, Notice, Notices},
    protocol::FromWorker,
    report::Reporter,
    snapshot::cadence::Measured,
    storage::Store,
    workload::{Collectives, Workload},
};

/// How long the crash point `save.hasty` lets a save take to be finished.
const HASTY: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(200);
/// How long the other nodes' workers may take to build their state.
const FORMING: Duration = Duration::from_secs(120);
/// A machine's connections break in any order: how long the word of a lost node may come after its workers' deaths.
const SAME_LOSS: Duration = Duration::from_millis(500);

/// Everything a generation starts with.
pub struct Plan {
    /// The run's configuration, overrides applied.
    pub config: RunConfig,
    /// The work.
    pub workload: Arc<Workload>,
    /// The state to load.
    pub load: Load,
    /// For saves.
    pub upload: upload::Context,
    /// How early stopping stands with the state to load.
    pub stopping: Stopping,
    /// Measured costs of saves and lifetimes of machines.
    pub measured: Measured,
    /// The damage that this process has found.
    pub docket: Docket,
    /// Each file of a checkpoint comes from the nearest place. A node that is alone has all of them in one slot, or
    /// reads the store.
    pub nearest: bool,
    /// The nodes whose memory may have files of it; `None`: there are none.
    pub neighbours: Option<Neighbours>,
    /// Where rank 0 serves the ranks' store; port 0: one of the kernel's choice.
    pub store: SocketAddr,
    /// What workers are told of their collectives.
    pub collectives: Arc<Collectives>,
    /// The generation before this one has ended because the states of its ranks differed.
    pub doubted: bool,
    /// What the run has taken before this generation.
    pub spent: Spent,
    /// This node's workers of the generation before, which go on in this one; `None`: new ones start.
    pub kept: Option<Kept>,
}

/// The source of the workers' state.
#[derive(Clone, Debug)]
pub enum Load {
    /// None: weights from the seed.
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
        /// Where to read it.
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
    /// In this node's memory: a slot holds it, verified.
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

/// How a generation ended.
#[derive(Debug)]
pub enum End {
    /// The last step is committed.
    Completed {
        /// The step.
        step: Step,
        /// Its loss; `None`: it has none, or was finished in an earlier generation.
        loss: Option<f64>,
        /// Why there is no other, if the run stopped early.
        early: Option<EarlyStop>,
    },
    /// Asked to stop.
    Stopped(Stopped),
    /// A worker died; the group must be started again.
    Died {
        /// The last finished step.
        step: Step,
        /// The cause, as far as known.
        reason: String,
    },
    /// The checkpoint is damaged in a way that only reading it all could show.
    Damaged {
        /// The object.
        object: String,
        /// The damage.
        reason: Flaw,
    },
    /// A loss or gradient is not finite.
    Diverged {
        /// The step.
        step: Step,
        /// Which number is not finite.
        reason: String,
    },
}

/// The end of a run that was asked to stop.
#[derive(Clone, Debug)]
pub struct Stopped {
    /// The last finished step.
    pub step: Step,
    /// The newest checkpoint, if there is one.
    pub committed: Step,
    /// The outcome of the save of the last step.
    pub verdict: String,
    /// How the drain went, if there was one.
    pub drain: Option<Drain>,
    /// The cap that the run has reached, if that is why.
    pub cap: Option<Reached>,
}

/// Work that a generation which ended well leaves until the journal's last record, which is more urgent, is written.
#[derive(Debug, Default)]
pub struct Left {
    /// Workers that are exiting; it ends when they are gone, or not in time: whether they are.
    pub leaving: Option<JoinHandle<bool>>,
    /// Of a completed run: there is time to leave the store as `checkpoint.keep` says.
    pub retention: Option<Retention>,
    /// What has become of the other nodes.
    pub members: Members,
    /// This node's workers, which may go on in the next generation.
    pub kept: Option<Kept>,
    /// When the first and the last step of the generation were finished, if any were.
    pub stepped: Option<(Instant, Instant)>,
}

/// Why a generation of several nodes has ended, as far as its nodes are the reason.
#[derive(Debug, Default)]
pub struct Members {
    /// This node was told to leave.
    pub asked_here: bool,
    /// A person asked the run to stop: no other generation follows.
    pub ends_the_run: bool,
    /// Other nodes that were told to leave.
    pub leaving: Vec<NodeId>,
    /// Other nodes that are lost, and why.
    pub parted: Vec<(NodeId, String)>,
    /// The states of the ranks were not the same: what differed.
    pub differed: Option<String>,
    /// This node led it, and its saves fail: another one leads better.
    pub hands_over: Option<String>,
    /// This node's workers have ended the group again and again: it leaves.
    pub blamed: Option<String>,
    /// What this node remembers of its workers' deaths, before and after.
    pub blame: Blame,
}

impl Members {
    /// A notice to this node.
    fn hear(&mut self, notice: &Notice) {
        self.asked_here |= notice.kind != notice::Kind::Rebalance;
        self.ends_the_run |= notice.source == notice::drain::DRAIN;
    }

    /// The run has reached a cap: for all of its nodes, as if a person had asked it to stop.
    fn reach(&mut self, cap: Reached) -> Notice {
        self.asked_here = true;
        self.ends_the_run = true;
        let (kind, confidence) = (notice::Kind::Stop, Confidence::Certain);
        Notice { kind, deadline: None, source: cap.cap.key(), id: String::new(), confidence }
    }
}

impl Plan {
    /// This node's workers: those that were kept, or new ones. Their words go to `events`.
    pub fn crew(&mut self, slots: &mut Slots, events: &mpsc::UnboundedSender<WorkerEvent>) -> Result<Crew> {
        slots.begin_generation()?;
        let ranks = self.upload.ranks;
        Ok(match self.kept.take() {
            Some(kept) => {
                // What a process was told when it started can't be told again.
                self.collectives = kept.collectives();
                let keeps_state = kept.keeps_state();
                Crew { workers: kept.take_up(ranks, events), regroups: true, keeps_state }
            }
            None => {
                let workers = Workers::start(&self.workload, &self.collectives, ranks, &slots.shared(), events)?;
                Crew { workers, regroups: false, keeps_state: false }
            }
        })
    }

    /// What this generation's workers need to be kept after it.
    pub fn keeping(&self, slots: &Slots) -> Keeping {
        Keeping {
            workload: Arc::clone(&self.workload),
            collectives: Arc::clone(&self.collectives),
            generation: self.upload.generation,
            loaded: match &self.load {
                Load::Checkpoint { step, generation, .. } => Some((*step, *generation)),
                _ => None,
            },
            births: slots.births(),
        }
    }

    /// The cap that the run has reached when this generation has lived for `lived`; `None`: none. A run whose last step
    /// was loaded lacks nothing but its last record.
    fn cap_after(&self, lived: Duration, finished: Option<Step>) -> Option<Reached> {
        let caps = &self.config.run;
        if !caps.has_any() || self.load.step() >= self.config.workload.last_step() {
            return None;
        }
        let spent = self.spent.after(lived.as_secs_f64(), self.upload.members.len());
        // A test does not wait for hours.
        let hasty = faults::check("run.cap", At { rank: None, step: finished.map(Step::get) }).is_err();
        let first = spent.of_caps(caps).next().filter(|_| hasty);
        spent.reached(caps).or(first)
    }
}

/// The next word of another node; a node that is alone hears none.
async fn next_word(company: &mut Option<mpsc::UnboundedReceiver<Heard>>) -> Heard {
    match company {
        // The other end lives as long as the agent.
        Some(heard) => match heard.recv().await {
            Some(word) => word,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// The node that its workers died of: one that is lost, or that leaves because of them.
async fn why_it_died(company: &mut Option<mpsc::UnboundedReceiver<Heard>>) -> (NodeId, String) {
    loop {
        match next_word(company).await {
            Heard::Parted(node, why) | Heard::Said(node, ToLeader::Blamed { why }) => return (node, why),
            Heard::Said(..) | Heard::Regroup(_) | Heard::Overtaken => {}
        }
    }
}

/// Runs a generation that this node leads to its end. `slots` and `estimates` belong to the node and outlive it.
/// `company`: its other nodes, if there are any. `left` is filled by a generation that completed the run or was asked
/// to stop, except for its members, of which every end tells.
pub async fn run(
    mut start: Plan,
    company: Option<Company>,
    slots: &mut Slots,
    estimates: &mut Estimates,
    notices: &mut Notices,
    reporter: &Reporter,
    left: &mut Left,
) -> Result<End> {
    let (senders, mut answers) = effects::channels();
    let crew = start.crew(slots, &senders.workers)?;
    // Workers that were kept and have not started again.
    let mut tardy = if crew.regroups { start.upload.ranks.workers } else { 0 };
    let mut node = Node::begin(&start, slots, crew)?;
    let began = Instant::now();
    let incoming = node.load(senders.fetched.clone())?;
    let others = company.as_ref().map_or(&[][..], |company| &company.others);
    // A test does not wait for minutes.
    let hasty = faults::check("save.hasty", At::default()).is_err();
    let settings = Settings {
        outline: start.workload.outline(start.upload.ranks.world),
        generation: start.upload.generation,
        config: start.config.clone(),
        load: start.load.clone(),
        stopping: start.stopping,
        measured: start.measured,
        store_host: start.store.ip(),
        seats: Seats::new(start.upload.node.clone(), start.upload.ranks, others),
        doubted: start.doubted,
        finishing: if hasty { HASTY } else { FINISHING },
        first_step: pace::least(),
        invited: began.saturating_duration_since(start.upload.formed),
    };
    let group = company.as_ref().map(|company| {
        let leader = start.upload.node.clone();
        Group { leader, members: start.upload.members.iter().cloned().collect(), min: company.min }
    });
    let (others, mut company, saves) = match company {
        Some(Company { others, to, heard, saves, min: _ }) => (Others::of(others, to), Some(heard), Some(saves)),
        None => (Others::none(), None, None),
    };
    let mut machine = StateMachine::new(settings, *estimates, Loading::new(start.upload.ranks.world, incoming));
    let mut lead = Lead::begin(&start, began, node, (others, group), reporter, senders);
    let mut blame = std::mem::take(&mut left.members.blame);
    let mut watch = Watch::new(&mut blame, start.load.step());
    let mut cap = None;
    // The last step that every rank has finished, and when the first and the last one were.
    let (mut finished, mut stepped) = (start.load.step(), None::<(Instant, Instant)>);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut end = 'generation: loop {
        let mut events = tokio::select! {
            biased;
            notice = notices.next() => {
                left.members.hear(&notice);
                VecDeque::from([Event::Notice(notice)])
            }
            event = answers.next() => {
                if let Event::Worker(event) = &event
                    && let Some(why) = watch.hears(event)
                {
                    lead.is_blamed(why);
                }
                if matches!(event, Event::Worker(WorkerEvent::Message(_, FromWorker::Built { .. }))) {
                    tardy = tardy.saturating_sub(1);
                }
                lead.own(event).into_iter().collect()
            }
            word = next_word(&mut company) => lead.hear(word).into(),
            _ = tick.tick() => {
                if let Some(limit) = machine.waits_for_its_last_save(began.elapsed()) {
                    lead.look_at_the_last_save(limit);
                }
                let late = began.elapsed() > FORMING;
                let mut lost = if late { lead.late() } else { Vec::new() };
                if late && std::mem::take(&mut tardy) > 0 {
                    let why = "was kept, and did not start again in time".to_owned();
                    lost.push(Event::Worker(WorkerEvent::Exited(start.upload.ranks.first, why)));
                }
                // A notice is heard once, and is never taken back.
                let mut reached = None;
                if cap.is_none() {
                    cap = start.cap_after(start.upload.formed.elapsed(), machine.finished());
                    reached = cap.map(|cap| Event::Notice(left.members.reach(cap)));
                }
                lost.into_iter().chain(reached).chain([Event::Tick]).collect()
            }
        };
        while let Some(event) = events.pop_front() {
            if let (Event::Save(SaveEvent::Ended { result: Ok(_), .. }), Some(saves)) = (&event, &saves) {
                let step = machine.finished().unwrap_or_else(|| start.load.step());
                let step_s = machine.estimates().step.estimate().map(|step| step.mean);
                let _ = saves.send(Progressed { step, step_s, first: stepped.map(|(first, _)| first) });
            }
            match &event {
                Event::Save(event) => lead.follow_the_save(event),
                Event::Notice(notice) if notice.kind != notice::Kind::Rebalance => lead.is_asked(),
                _ => {}
            }
            let ended = lead.judge(&event, machine.trains());
            match lead.perform(machine.handle(event, began.elapsed())) {
                ControlFlow::Continue(answers) => events.extend(answers),
                ControlFlow::Break(end) => break 'generation end,
            }
            events.extend(ended);
            if machine.finished().is_some_and(|step| step > finished) {
                finished = machine.finished().unwrap_or(finished);
                let now = Instant::now();
                stepped = Some((stepped.map_or(now, |(first, _)| first), now));
            }
            if let Some(why) = lead.hands_over() {
                let step = machine.finished().unwrap_or_else(|| start.load.step());
                break 'generation Ok(End::Died { step, reason: why.to_owned() });
            }
        }
    };
    if matches!(end, Ok(End::Died { .. })) && lead.has_killed() {
        // Others' words about a death may come before it: one of this node's workers may have died of its own.
        lead.killed().await;
        while let Some(event) = answers.ready() {
            if let Event::Worker(event) = &event
                && let Some(why) = watch.hears(event)
            {
                lead.is_blamed(why);
            }
        }
    }
    if let Ok(End::Stopped(stopped)) = &mut end {
        stopped.cap = cap;
    }
    *estimates = machine.estimates();
    left.stepped = stepped;
    lead.tells(&mut left.members);
    left.members.blame = blame;
    left.members.differed = machine.differed().map(str::to_owned);
    if let Some(open) = lead.end(&end, &left.members).await? {
        (left.leaving, left.retention, left.kept) = (open.leaving, open.retention, open.kept);
    }
    let alone_to_blame = left.members.hands_over.is_some() || left.members.blamed.is_some();
    if matches!(end, Ok(End::Died { .. })) && company.is_some() && left.members.parted.is_empty() && !alone_to_blame {
        let why = tokio::time::timeout(SAME_LOSS, why_it_died(&mut company)).await;
        left.members.parted.extend(why.ok());
    }
    end
}
