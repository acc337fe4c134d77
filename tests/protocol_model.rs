//! The commit and fencing protocol, model-checked: every order of events of a small world is tried.
//!
//! The world: a store with an atomic create-once put, and agents that replay the journal, form generations, save and
//! commit. At any moment an agent may be killed or paused for any time, a request may succeed and its answer be lost, a
//! request that was given up may arrive later or never, a save may be given up and repeated, a person may turn the run
//! back with `--from`, and any process may condemn a checkpoint and withdraw that, rightly or not. Heartbeats are left
//! out: any agent may form at any time, which is the worst case.
//!
//! The real code decides here, too: [`RunState::apply`] reads the journal, [`admit`] says what may be appended, and
//! [`RunState::candidates`] says where to look for the newest checkpoint. Around it the loops of `Journal::append` and
//! of a save are modelled in small steps, so that an agent can be killed between any two requests.
//!
//! [`Bug`]s seeded into the model must each be found: a checker that finds nothing proves nothing.
//!
//! The search is a plain breadth-first one over whole states (no hashing that could hide one), so that a counterexample
//! is as short as possible; it prints its trace.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    rc::Rc,
};

use trainer::{
    ids::{AttemptId, Generation, NodeId, Step, WorldSize},
    journal::{
        Committed, Entry, FormedReason, Means, Metrics, Record, Refusal, ResumePoint, RosterEntry, RunState, SaveCost,
        admit,
    },
};

use crate::support::samples;

/// (step, generation).
type Point = (u8, u8);
/// (boot, number): an attempt of the agent's boot, unique.
type Attempt = (u8, u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum What {
    Formed { generation: u8, resume: Option<Point>, turned_back: bool },
    Committed { point: Point, manifest: Attempt },
    Damaged { point: Point },
    Cleared { point: Point },
    Notice { generation: u8 },
}

/// A journal record, identified by its writer's attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Rec {
    attempt: Attempt,
    what: What,
}

/// A request on its way to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Request {
    Append { number: usize, rec: Rec },
    Shards { point: Point, boot: u8 },
    Manifest { point: Point, attempt: Attempt },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Doing {
    /// Not running.
    Down,
    /// It has read the journal and looks for a checkpoint.
    Choosing,
    /// It appends `formed`; `looked`: only with [`Bug::CheckThenWrite`], it has seen that the number is free.
    Forming { rec: Rec, looked: bool },
    /// It holds a generation and trains.
    Training,
    /// It puts shards and receipt.
    Sharding { point: Point, attempt: Attempt },
    /// It creates the manifest.
    Manifesting { point: Point, attempt: Attempt },
    /// It appends `committed`.
    Committing { rec: Rec, looked: bool },
    /// Has given the request for `commit` up, appends a notice, and then `commit` again.
    Noting { rec: Rec, commit: Rec },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Agent {
    doing: Doing,
    /// Each start of an agent is a new node.
    boot: u8,
    /// Records read.
    seen: usize,
    /// The generation that it has formed.
    held: Option<u8>,
    /// The last step whose save was begun, or that was loaded.
    step: u8,
    /// Attempts used.
    attempts: u8,
    saves: u8,
}

const DOWN: Agent = Agent { doing: Doing::Down, boot: 0, seen: 0, held: None, step: 0, attempts: 0, saves: 0 };

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct World {
    journal: Vec<Rec>,
    /// The writer of the bytes: a boot's state at a step is always the same.
    shards: BTreeMap<Point, u8>,
    manifests: BTreeMap<Point, Attempt>,
    /// In no order, since the agents are alike.
    agents: Vec<Agent>,
    /// Given up by their senders; each may still arrive.
    late: BTreeSet<Request>,
    /// Commits that were confirmed to an agent.
    told: BTreeSet<Point>,
    boots: u8,
    faults: u8,
    verdicts: u8,
    notices: u8,
    turned_back: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// A create checks first and puts later.
    CheckThenWrite,
    /// A commit is appended without asking the rule book.
    NoFence,
    /// The record is written before the manifest.
    RecordFirst,
    /// A claim based on an older reading is appended behind newer records.
    ClaimAfterReading,
    /// A repeated append doesn't check whether its first attempt exists.
    BlindRetry,
    /// So does one that was given up for a notice.
    BlindAfterNotice,
    /// A checkpoint is condemned without asking the rule book.
    HardVerdict,
}

/// The size of a world.
#[derive(Clone, Copy)]
struct Bounds {
    agents: usize,
    boots: u8,
    saves: u8,
    faults: u8,
    /// Checkpoints condemned or cleared.
    verdicts: u8,
    /// Notices that come while a commit's request is given up.
    notices: u8,
    turns_back: bool,
}

/// Events that must happen somewhere, or the model is too small to prove anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Sight {
    Fenced,
    Overtaken,
    LandedLate,
    AnswerLost,
    TookOver,
    TurnedBack,
    SecondGenerationCommits,
    Condemned,
    Cleared,
    /// An agent continues from another checkpoint than the newest, which is condemned.
    SteppedBack,
    /// A commit that was given up for a notice is found to stand, or stands after it.
    CommittedAfterNotice,
}

/// The real code's reading of a journal: a state, or the reason of its refusal.
type Read = Result<Rc<RunState>, String>;

thread_local! {
    /// The real code's reading of each journal met.
    static REPLAYED: RefCell<HashMap<Vec<Rec>, Read>> = RefCell::default();
}

fn real(point: Point) -> ResumePoint {
    ResumePoint { step: Step(point.0.into()), generation: Generation(point.1.into()) }
}

fn small(point: &ResumePoint) -> Point {
    (u8::try_from(point.step.get()).expect("small"), u8::try_from(point.generation.get()).expect("small"))
}

/// The record of node `boot`.
fn record(boot: u8, what: What) -> Record {
    match what {
        What::Formed { generation, resume, .. } => Record::Formed {
            generation: Generation(generation.into()),
            roster: vec![RosterEntry::new(node(boot), 1)],
            world_size: WorldSize(1),
            resume: resume.map(real),
            overrides: Vec::new(),
            reason: FormedReason::Started,
            data: None,
            continues: None,
            gone: Vec::new(),
            joined: Vec::new(),
            why: None,
        },
        What::Committed { point, manifest } => Record::Committed(Committed {
            step: Step(point.0.into()),
            generation: Generation(point.1.into()),
            manifest: String::new(),
            manifest_crc64: format!("{manifest:?}"),
            bytes: 0,
            loss: Some(0.0),
            validation_loss: None,
            metrics: Metrics::new(),
            cost: SaveCost::default(),
        }),
        What::Damaged { point } => {
            let ResumePoint { step, generation } = real(point);
            Record::Damaged { step, generation, reason: String::new() }
        }
        What::Cleared { point } => {
            let ResumePoint { step, generation } = real(point);
            Record::Cleared { step, generation }
        }
        What::Notice { generation } => {
            let (source, means) = (String::new(), Means::Interruption);
            Record::Notice { generation: Generation(generation.into()), source, deadline_s: None, means }
        }
    }
}

fn node(boot: u8) -> NodeId {
    NodeId::new(format!("n{boot}")).expect("valid")
}

fn entry(node: NodeId, attempt: String, record: Record) -> Entry {
    let attempt = AttemptId::new(attempt).expect("valid");
    Entry { format: record.format(), attempt, at: jiff::Timestamp::UNIX_EPOCH, node, record }
}

/// The real code's reading of a journal.
fn replay(journal: &[Rec]) -> Read {
    if let Some(known) = REPLAYED.with_borrow(|known| known.get(journal).cloned()) {
        return known;
    }
    let state = match journal.split_last() {
        None => {
            let created = Record::Created { run_id: samples::run_id(), config: Box::new(samples::config()) };
            RunState::begin(&samples::run_id(), entry(node(0), "a0".into(), created)).map_err(|e| e.to_string())
        }
        Some((last, before)) => replay(before).and_then(|state| {
            let (boot, number) = last.attempt;
            let mut state = RunState::clone(&state);
            let entry = entry(node(boot), format!("a{boot}.{number}"), record(boot, last.what));
            state.apply(state.next(), entry).map_err(|error| error.to_string())?;
            Ok(state)
        }),
    };
    let state = state.map(Rc::new);
    REPLAYED.with_borrow_mut(|known| known.insert(journal.to_vec(), state.clone()));
    state
}

/// Whether the last verdict on a checkpoint, if any, is that it is damaged.
fn is_condemned(journal: &[Rec], wanted: Point) -> bool {
    let mut verdicts = journal.iter().filter_map(|rec| match rec.what {
        What::Damaged { point } if point == wanted => Some(true),
        What::Cleared { point } if point == wanted => Some(false),
        _ => None,
    });
    verdicts.next_back().unwrap_or(false)
}

/// The newest checkpoint that is not condemned, computed independently: the highest that the newest generation
/// committed, else the highest up to its resume point, and so on back.
fn newest(journal: &[Rec]) -> Option<Point> {
    let formed = |wanted: Option<u8>| {
        journal.iter().rev().find_map(|rec| match rec.what {
            What::Formed { generation, resume, .. } if wanted.is_none_or(|wanted| wanted == generation) => {
                Some((generation, resume))
            }
            _ => None,
        })
    };
    let (mut line, mut limit) = (formed(None), u8::MAX);
    while let Some((generation, resume)) = line {
        let found = journal.iter().filter_map(|rec| match rec.what {
            What::Committed { point, .. } if point.1 == generation && point.0 <= limit => Some(point),
            _ => None,
        });
        if let Some(newest) = found.filter(|point| !is_condemned(journal, *point)).max() {
            return Some(newest);
        }
        line = resume.and_then(|point| {
            limit = point.0;
            formed(Some(point.1))
        });
    }
    None
}

impl World {
    fn new(bounds: Bounds) -> Self {
        Self { agents: vec![DOWN; bounds.agents], ..Self::default() }
    }

    /// The result of a discovery that compares the manifest with the record and the files with the manifest.
    fn is_whole(&self, point: Point, manifest: &str) -> bool {
        let stands = self.manifests.get(&point);
        stands.is_some_and(|stands| format!("{stands:?}") == manifest && self.shards.get(&point) == Some(&stands.0))
    }

    /// `formed` and `committed` must hold in this state and in every state that follows.
    fn check(&self) -> Result<(), String> {
        let state = replay(&self.journal).map_err(|error| format!("the journal can't be read: a record {error}"))?;
        let mut holder = None;
        let mut points = BTreeSet::new();
        for (number, rec) in self.journal.iter().enumerate() {
            match rec.what {
                What::Formed { generation, resume, turned_back } => {
                    holder = Some((generation, rec.attempt.0));
                    let before = &self.journal[..number];
                    if !turned_back && resume != newest(before) {
                        return Err(format!(
                            "generation {generation} resumes from {resume:?}, {:?} is newer",
                            newest(before)
                        ));
                    }
                    let stands = |wanted: Point| {
                        before.iter().any(|rec| matches!(rec.what, What::Committed { point, .. } if point == wanted))
                    };
                    if resume.is_some_and(|point| !stands(point)) {
                        return Err(format!("generation {generation} resumes from {resume:?}, which is no checkpoint"));
                    }
                }
                What::Committed { point, manifest } => {
                    if holder != Some((point.1, rec.attempt.0)) {
                        return Err(format!(
                            "{point:?} is committed by boot {} while {holder:?} holds the run",
                            rec.attempt.0
                        ));
                    }
                    if !points.insert(point) {
                        return Err(format!("{point:?} is committed twice"));
                    }
                    if !self.is_whole(point, &format!("{manifest:?}")) {
                        return Err(format!("{point:?} is committed, and its data is not there"));
                    }
                }
                What::Damaged { .. } | What::Cleared { .. } | What::Notice { .. } => {}
            }
        }
        if !points.is_empty() && newest(&self.journal).is_none() {
            return Err("every checkpoint is condemned, and nobody can go on".to_owned());
        }
        if let Some(lost) = self.told.iter().find(|point| !points.contains(point)) {
            return Err(format!("{lost:?} was committed, and its record is gone"));
        }
        let found = state.newest().map(|checkpoint| small(&checkpoint.point()));
        if found != newest(&self.journal) {
            return Err(format!("discovery finds {found:?}, the newest is {:?}", newest(&self.journal)));
        }
        Ok(())
    }

    /// The store executes a request; `false`: another object has the key.
    fn serve(&mut self, request: Request, bug: Bug) -> bool {
        match request {
            Request::Append { number, rec } if bug == Bug::CheckThenWrite && number < self.journal.len() => {
                self.journal[number] = rec;
                true
            }
            Request::Append { number, rec } => {
                if number == self.journal.len() {
                    self.journal.push(rec);
                }
                self.journal.get(number) == Some(&rec)
            }
            Request::Shards { point, boot } => {
                self.shards.insert(point, boot);
                true
            }
            Request::Manifest { point, attempt } => *self.manifests.entry(point).or_insert(attempt) == attempt,
        }
    }

    /// All events that can happen next.
    fn next(&self, bounds: Bounds, bug: Bug, saw: &mut BTreeSet<Sight>) -> Vec<(String, Self)> {
        let mut all = Vec::new();
        for (index, agent) in self.agents.iter().enumerate() {
            // Agents that are alike do the same.
            if self.agents[..index].contains(agent) {
                continue;
            }
            self.next_of(index, bounds, bug, saw, &mut all);
        }
        for &request in &self.late {
            let mut world = self.clone();
            world.late.remove(&request);
            if world.serve(request, bug) && world.journal != self.journal {
                saw.insert(Sight::LandedLate);
            }
            all.push((format!("lands late: {request:?}"), world));
        }
        self.next_verdicts(bounds, bug, saw, &mut all);
        for (_, world) in &mut all {
            world.agents.sort_unstable();
        }
        all
    }

    /// A process reads the journal and appends or withdraws a verdict, in one step, since it does nothing else.
    fn next_verdicts(&self, bounds: Bounds, bug: Bug, saw: &mut BTreeSet<Sight>, all: &mut Vec<(String, Self)>) {
        if self.verdicts >= bounds.verdicts {
            return;
        }
        let Ok(state) = replay(&self.journal) else { return };
        for point in state.checkpoints().iter().map(|checkpoint| small(&checkpoint.point())) {
            let (what, sight) = if is_condemned(&self.journal, point) {
                (What::Cleared { point }, Sight::Cleared)
            } else {
                (What::Damaged { point }, Sight::Condemned)
            };
            if admit(&state, &node(u8::MAX), None, &record(u8::MAX, what)).is_err() && bug != Bug::HardVerdict {
                continue;
            }
            saw.insert(sight);
            let mut world = self.clone();
            world.verdicts += 1;
            world.journal.push(Rec { attempt: (u8::MAX, world.verdicts), what });
            all.push((format!("somebody appends {what:?}"), world));
        }
    }

    fn next_of(
        &self,
        index: usize,
        bounds: Bounds,
        bug: Bug,
        saw: &mut BTreeSet<Sight>,
        all: &mut Vec<(String, Self)>,
    ) {
        let agent = self.agents[index];
        let with = |change: &mut dyn FnMut(&mut Self, &mut Agent)| {
            let (mut world, mut agent) = (self.clone(), agent);
            change(&mut world, &mut agent);
            world.agents[index] = agent;
            world
        };
        let boot = agent.boot;
        if agent.doing == Doing::Down {
            if self.boots < bounds.boots {
                let world = with(&mut |world, agent| {
                    world.boots += 1;
                    *agent = Agent { doing: Doing::Choosing, boot: world.boots, seen: world.journal.len(), ..DOWN };
                });
                all.push((format!("boot {} reads the journal", self.boots + 1), world));
            }
            return;
        }
        all.push((format!("boot {boot} is killed"), with(&mut |_, agent| *agent = Agent { boot: 0, ..DOWN })));
        let Ok(known) = replay(&self.journal[..agent.seen.min(self.journal.len())]) else { return };
        match agent.doing {
            Doing::Down => {}
            Doing::Choosing => {
                // Newest first, as the catalogue does.
                let mut candidates: Vec<_> = known.candidates().iter().map(|c| c.committed.clone()).collect();
                candidates.sort_by_key(|c| std::cmp::Reverse((c.generation, c.step)));
                let point = |c: &Committed| small(&ResumePoint { step: c.step, generation: c.generation });
                let found = candidates.iter().find(|c| self.is_whole(point(c), &c.manifest_crc64)).map(point);
                let condemned = |c: &&trainer::journal::Checkpoint| is_condemned(&self.journal, small(&c.point()));
                if known.checkpoints().iter().filter(condemned).any(|c| Some(small(&c.point())) > found) {
                    saw.insert(Sight::SteppedBack);
                }
                let mut claim = |resume: Option<Point>, turned_back: bool| {
                    let generation = small(&ResumePoint { step: Step(0), generation: known.generation().next() }).1;
                    let world = with(&mut |world, agent| {
                        world.turned_back |= turned_back;
                        agent.attempts += 1;
                        let attempt = (boot, agent.attempts);
                        let rec = Rec { attempt, what: What::Formed { generation, resume, turned_back } };
                        agent.doing = Doing::Forming { rec, looked: false };
                    });
                    all.push((format!("boot {boot} chooses {resume:?} for generation {generation}"), world));
                };
                claim(found, false);
                if bounds.turns_back && !self.turned_back {
                    for older in known.good().iter().map(|c| small(&c.point())).filter(|point| Some(*point) != found) {
                        saw.insert(Sight::TurnedBack);
                        claim(Some(older), true);
                    }
                }
            }
            Doing::Training if agent.saves < bounds.saves => {
                let held = agent.held.expect("who trains holds a generation");
                let mut save = |step: u8, what: &str| {
                    let world = with(&mut |_, agent| {
                        agent.attempts += 1;
                        agent.saves += 1;
                        agent.step = step;
                        let (point, attempt) = ((step, held), (boot, agent.attempts));
                        let rec = Rec { attempt, what: What::Committed { point, manifest: attempt } };
                        agent.doing = match bug {
                            Bug::RecordFirst => Doing::Committing { rec, looked: false },
                            _ => Doing::Sharding { point, attempt },
                        };
                    });
                    all.push((format!("boot {boot} saves step {step}{what}"), world));
                };
                save(agent.step + 1, "");
                if agent.saves > 0 && !self.told.contains(&(agent.step, held)) {
                    save(agent.step, " again");
                }
            }
            Doing::Training => {}
            Doing::Sharding { point, attempt } => {
                // An existing manifest of an earlier attempt of our own, with the same bytes, is taken over.
                if self.manifests.contains_key(&point) {
                    let world = with(&mut |_, agent| agent.doing = Doing::Manifesting { point, attempt });
                    all.push((format!("boot {boot} finds its manifest of {point:?}"), world));
                } else {
                    self.send(index, Request::Shards { point, boot }, bounds, bug, saw, all);
                }
            }
            Doing::Manifesting { point, attempt } => {
                self.send(index, Request::Manifest { point, attempt }, bounds, bug, saw, all);
            }
            Doing::Noting { rec, .. } => {
                let held = agent.held.map(|held| Generation(held.into()));
                if admit(&known, &node(boot), held, &record(boot, rec.what)).is_err() {
                    all.push((format!("boot {boot} leaves"), with(&mut |_, agent| *agent = DOWN)));
                    return;
                }
                self.send(index, Request::Append { number: agent.seen, rec }, bounds, bug, saw, all);
            }
            Doing::Forming { rec, looked } | Doing::Committing { rec, looked } => {
                let commits = matches!(rec.what, What::Committed { .. });
                let is_standing = |found: &Rec| found.what == rec.what && commits;
                let blind = matches!(bug, Bug::BlindRetry | Bug::BlindAfterNotice);
                if !blind && self.journal[..agent.seen].iter().any(is_standing) {
                    let noted = |found: &Rec| matches!(found.what, What::Notice { .. });
                    if self.journal[..agent.seen].iter().any(noted) {
                        saw.insert(Sight::CommittedAfterNotice);
                    }
                    let world = with(&mut |world, agent| agent.is_told(world, rec));
                    all.push((format!("boot {boot} finds {:?} committed", rec.what), world));
                    return;
                }
                let careless = (blind || bug == Bug::NoFence) && commits;
                let held = agent.held.map(|held| Generation(held.into()));
                match admit(&known, &node(boot), held, &record(boot, rec.what)) {
                    Err(refusal) if !careless => {
                        if matches!(refusal, Refusal::Fenced { .. }) {
                            saw.insert(Sight::Fenced);
                        }
                        all.push((format!("boot {boot} leaves: {refusal:?}"), with(&mut |_, agent| *agent = DOWN)));
                    }
                    _ if bug == Bug::CheckThenWrite && !looked => {
                        let world = with(&mut |world, agent| agent.looks(world, rec));
                        all.push((format!("boot {boot} looks whether {} is free", agent.seen), world));
                    }
                    _ => self.send(index, Request::Append { number: agent.seen, rec }, bounds, bug, saw, all),
                }
            }
        }
    }

    /// The fates of a request: it is answered; it is done and its answer lost; it is given up and may arrive later.
    fn send(
        &self,
        index: usize,
        request: Request,
        bounds: Bounds,
        bug: Bug,
        saw: &mut BTreeSet<Sight>,
        all: &mut Vec<(String, Self)>,
    ) {
        let agent = self.agents[index];
        let boot = agent.boot;
        let mut world = self.clone();
        let ours = world.serve(request, bug);
        let mut after = agent;
        after.hears(&mut world, request, ours, bug, saw);
        world.agents[index] = after;
        all.push((format!("boot {boot}: {request:?} is answered: {}", if ours { "done" } else { "taken" }), world));
        if self.faults >= bounds.faults {
            return;
        }
        saw.insert(Sight::AnswerLost);
        let mut unsure = agent;
        if let (Bug::BlindRetry, Doing::Committing { rec, .. }) = (bug, agent.doing) {
            // It takes the lost answer for a failure, and appends again.
            unsure.attempts += 1;
            unsure.doing = Doing::Committing { rec: Rec { attempt: (boot, unsure.attempts), ..rec }, looked: false };
        }
        // A save or a formation is given up; the agent trains on, or exits.
        let mut gave_up = agent;
        gave_up.doing = match agent.doing {
            Doing::Noting { commit, .. } => Doing::Committing { rec: commit, looked: false },
            _ => Doing::Training,
        };
        if matches!(agent.doing, Doing::Forming { .. }) {
            gave_up = DOWN;
        }
        let mut then = vec![(unsure, "and is sent again"), (gave_up, "and is given up")];
        if let Doing::Committing { rec: commit, .. } = agent.doing
            && self.notices < bounds.notices
        {
            let mut notes = agent;
            notes.attempts += 1;
            let generation = agent.held.expect("who commits holds a generation");
            let rec = Rec { attempt: (boot, notes.attempts), what: What::Notice { generation } };
            let commit = if bug == Bug::BlindAfterNotice {
                notes.attempts += 1;
                Rec { attempt: (boot, notes.attempts), ..commit }
            } else {
                commit
            };
            notes.doing = Doing::Noting { rec, commit };
            then.push((notes, "and is given up for a notice"));
        }
        for (then, what) in then {
            for is_late in [false, true] {
                let mut world = self.clone();
                world.faults += 1;
                world.notices += u8::from(matches!(then.doing, Doing::Noting { .. }) && then.doing != agent.doing);
                world.agents[index] = then;
                let how = if is_late {
                    world.late.insert(request);
                    "may land late"
                } else {
                    world.serve(request, bug);
                    "is done, its answer is lost"
                };
                all.push((format!("boot {boot}: {request:?} {how}, {what}"), world));
            }
        }
    }
}

impl Agent {
    fn is_told(&mut self, world: &mut World, rec: Rec) {
        match rec.what {
            What::Committed { point, .. } => {
                world.told.insert(point);
            }
            What::Formed { generation, resume, .. } => {
                self.held = Some(generation);
                self.step = resume.map_or(0, |point| point.0);
            }
            What::Damaged { .. } | What::Cleared { .. } | What::Notice { .. } => {}
        }
        self.doing = match self.doing {
            Doing::Noting { commit, .. } => Doing::Committing { rec: commit, looked: false },
            _ => Doing::Training,
        };
    }

    /// [`Bug::CheckThenWrite`]: the check.
    fn looks(&mut self, world: &mut World, rec: Rec) {
        if self.seen < world.journal.len() {
            self.reads_on(world, rec, Bug::CheckThenWrite, &mut BTreeSet::new());
            return;
        }
        self.doing = match self.doing {
            Doing::Forming { rec, .. } => Doing::Forming { rec, looked: true },
            _ => Doing::Committing { rec, looked: true },
        };
    }

    fn hears(&mut self, world: &mut World, request: Request, ours: bool, bug: Bug, saw: &mut BTreeSet<Sight>) {
        match request {
            Request::Shards { point, .. } => {
                let Doing::Sharding { attempt, .. } = self.doing else { return };
                self.doing = Doing::Manifesting { point, attempt };
            }
            Request::Manifest { point, attempt } => {
                // The number is taken by an earlier attempt of this boot, since no other node holds this generation:
                // keep it.
                let manifest = if ours { attempt } else { *world.manifests.get(&point).expect("taken") };
                if !ours {
                    saw.insert(Sight::TookOver);
                }
                if bug == Bug::RecordFirst {
                    self.doing = Doing::Training;
                    return;
                }
                self.attempts += 1;
                let rec = Rec { attempt: (self.boot, self.attempts), what: What::Committed { point, manifest } };
                self.doing = Doing::Committing { rec, looked: false };
            }
            Request::Append { number, rec } if ours => {
                self.seen = number + 1;
                if let What::Committed { point, manifest } = rec.what {
                    if point.1 > 1 {
                        saw.insert(Sight::SecondGenerationCommits);
                    }
                    self.is_told(world, rec);
                    if bug == Bug::RecordFirst {
                        self.doing = Doing::Sharding { point, attempt: manifest };
                    }
                } else {
                    self.is_told(world, rec);
                }
            }
            Request::Append { rec, .. } => self.reads_on(world, rec, bug, saw),
        }
    }

    /// The number was taken: reads the records to the end, and decides what that means for `rec`.
    fn reads_on(&mut self, world: &mut World, rec: Rec, bug: Bug, saw: &mut BTreeSet<Sight>) {
        let came = world.journal[self.seen..].to_vec();
        let own = came.iter().position(|found| *found == rec).filter(|_| bug != Bug::BlindRetry);
        if let Some(own) = own {
            self.seen += own + 1;
            self.is_told(world, rec);
            return;
        }
        self.seen = world.journal.len();
        self.doing = match rec.what {
            What::Committed { .. } => Doing::Committing { rec, looked: false },
            // Its choice may no longer be right.
            What::Formed { .. } if bug != Bug::ClaimAfterReading => {
                saw.insert(Sight::Overtaken);
                Doing::Choosing
            }
            What::Formed { resume, turned_back, .. } => {
                let formed = |rec: &&Rec| matches!(rec.what, What::Formed { .. });
                let generation = u8::try_from(world.journal.iter().filter(formed).count() + 1).expect("small");
                Doing::Forming {
                    rec: Rec { what: What::Formed { generation, resume, turned_back }, ..rec },
                    looked: false,
                }
            }
            // It notes on.
            What::Notice { .. } => self.doing,
            What::Damaged { .. } | What::Cleared { .. } => return,
        };
    }
}

struct Explored {
    states: usize,
    saw: BTreeSet<Sight>,
    /// The shortest path to a state that breaks an invariant, and that invariant.
    flaw: Option<(Vec<String>, String)>,
}

/// Breadth first from the empty run, until all states are seen or an invariant is broken.
fn explore(bounds: Bounds, bug: Bug) -> Explored {
    let mut known: HashMap<Rc<World>, usize> = HashMap::new();
    // Each state's parent, and the event in between.
    let mut ways: Vec<(usize, String)> = vec![(0, String::new())];
    let start = Rc::new(World::new(bounds));
    known.insert(Rc::clone(&start), 0);
    let mut queue = VecDeque::from([(0, start)]);
    let mut saw = BTreeSet::new();
    while let Some((id, world)) = queue.pop_front() {
        if let Err(flaw) = world.check() {
            let mut trace = Vec::new();
            let mut at = id;
            while at != 0 {
                trace.push(ways[at].1.clone());
                at = ways[at].0;
            }
            trace.reverse();
            return Explored { states: known.len(), saw, flaw: Some((trace, flaw)) };
        }
        for (what, next) in world.next(bounds, bug, &mut saw) {
            if known.contains_key(&next) {
                continue;
            }
            let next = Rc::new(next);
            known.insert(Rc::clone(&next), ways.len());
            queue.push_back((ways.len(), next));
            ways.push((id, what));
        }
    }
    Explored { states: known.len(), saw, flaw: None }
}

const SMALL: Bounds = Bounds { agents: 2, boots: 2, saves: 2, faults: 1, verdicts: 0, notices: 0, turns_back: true };

fn expect_sound(bounds: Bounds, sights: &[Sight]) {
    let Explored { states, saw, flaw } = explore(bounds, Bug::None);
    println!("{states} states, saw {saw:?}");
    if let Some((trace, flaw)) = flaw {
        panic!("{flaw}, after\n  {}", trace.join("\n  "));
    }
    let missing: Vec<_> = sights.iter().filter(|sight| !saw.contains(sight)).collect();
    assert!(missing.is_empty(), "the model never met {missing:?}");
}

#[test]
fn two_leaders_with_lost_answers_and_late_requests_never_commit_twice_and_lose_nothing() {
    use Sight::*;
    let bounds = Bounds { faults: 2, ..SMALL };
    expect_sound(bounds, &[Fenced, Overtaken, LandedLate, AnswerLost, TookOver, SecondGenerationCommits]);
}

#[test]
fn a_commit_that_is_given_up_for_a_notice_and_tried_again_stands_once() {
    use Sight::*;
    let bounds = Bounds { faults: 2, notices: 1, saves: 1, ..SMALL };
    expect_sound(bounds, &[Fenced, LandedLate, AnswerLost, CommittedAfterNotice]);
}

#[test]
fn three_boots_find_the_newest_even_if_one_turns_the_run_back() {
    use Sight::*;
    let bounds = Bounds { boots: 3, saves: 1, ..SMALL };
    expect_sound(bounds, &[Fenced, Overtaken, LandedLate, AnswerLost, TurnedBack, SecondGenerationCommits]);
}

#[test]
fn verdicts_and_withdrawals_always_leave_a_checkpoint_to_resume_from() {
    use Sight::*;
    let bounds = Bounds { faults: 0, verdicts: 3, ..SMALL };
    expect_sound(bounds, &[Fenced, Overtaken, TurnedBack, SecondGenerationCommits, Condemned, Cleared, SteppedBack]);
}

#[test]
fn every_seeded_bug_is_found() {
    for (bug, flaw) in [
        (Bug::CheckThenWrite, "holds the run"),
        (Bug::NoFence, "while 2 is the newest"),
        (Bug::RecordFirst, "its data is not there"),
        (Bug::ClaimAfterReading, "is newer"),
        (Bug::BlindRetry, "a second time"),
        (Bug::BlindAfterNotice, "a second time"),
        (Bug::HardVerdict, "every checkpoint is condemned"),
    ] {
        let (verdicts, notices) = (u8::from(bug == Bug::HardVerdict), u8::from(bug == Bug::BlindAfterNotice));
        let explored = explore(Bounds { verdicts, notices, ..SMALL }, bug);
        let Some((trace, found)) = explored.flaw else {
            panic!("{bug:?} was not found in {} states", explored.states);
        };
        println!("{bug:?}: {found}, in {} states, after\n  {}", explored.states, trace.join("\n  "));
        assert!(found.contains(flaw), "{bug:?}: {found}");
    }
}
