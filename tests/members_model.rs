//! Members, saves and slots, model-checked: every order of events of a small group of nodes is tried.
//!
//! `protocol_model.rs` has one writer a generation; here a generation has members. The world: the journal, a store, and
//! nodes that form generations with each other, save into one slot each, and tell each other what they do. At any
//! moment a node may be killed or paused for any time, its request may succeed and the answer be lost, or arrive later
//! or never, and any message may come late, twice, or never. A leader may abandon a save at any moment, a member may
//! take its leader for lost at any moment and finish the save or form the next generation, and so may a stranger:
//! heartbeats and channels, which make that rare, are left out, since nothing here may rest on them.
//!
//! A slot is pages of memory. An upload reads its two halves one after the other; if the slot is given to the next save
//! in between, what it puts is torn, and its checksum is that of the torn bytes.
//!
//! The real code decides: [`RunState::apply`] reads the journal, [`admit`] and [`fenced`] say who may do what,
//! [`Ordered`] keeps the leader's account of a save, and [`prospect`] says whether a save can be finished.
//!
//! Frozen ranks have a world of their own at the end of this file, without real code: there the rule is all there is.
//!
//! [`Bug`]s seeded into the model must each be found.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    rc::Rc,
};

use trainer::{
    checkpoint::{
        manifest::{FileEntry, FileKind},
        ordered::{Ordered, Prospect, prospect},
        save::{Receipt, Save},
    },
    ids::{AttemptId, Generation, NodeId, Rank, Step, WorldSize},
    journal::{
        Committed, Entry, FormedReason, Gone, Metrics, Record, Refusal, ResumePoint, RosterEntry, RunState, SaveCost,
        admit, fenced,
    },
    storage::Crc64,
};

use crate::support::{
    samples,
    search::{Model, expect_found, expect_sound},
};

/// (step, generation).
type Point = (u8, u8);
/// A boot of an agent, which is a node; 0: none.
type Boot = u8;
/// A save's attempt: the generation that ordered it, and its number there.
type SaveId = (u8, u8);
/// The members of a generation in the order of their ranks, the leader first, as bits after the leader.
type Others = u8;
/// The bytes of a file: whose state, and the steps that its halves are of.
type Content = (Boot, u8, u8);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum What {
    Formed { generation: u8, resume: Option<Point>, others: Others, continues: bool },
    Committed { point: Point, manifest: SaveId, save: SaveId },
    Interrupted { generation: u8 },
}

/// A journal record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Rec {
    by: Boot,
    /// The writer's attempt.
    attempt: u8,
    what: What,
}

/// What one agent tells others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Message {
    Order { save: SaveId, step: u8 },
    Ended { save: SaveId, by: Boot, put: Option<Content> },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Request {
    Append { number: usize, rec: Rec },
    Shard { point: Point, rank: u8, content: Content },
    Manifest { point: Point, manifest: Manifest },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Manifest {
    save: SaveId,
    files: Vec<Content>,
}

/// An upload of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Upload {
    save: SaveId,
    step: u8,
    /// The step that its first half is of, once that is read.
    first: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Doing {
    /// It works in its generation, or waits for one that names it.
    Working,
    Forming(Rec),
    Burying(Boot),
    Manifesting {
        point: Point,
        manifest: Manifest,
    },
    Committing(Rec),
    Ending(Rec),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Agent {
    /// 0: it is down.
    boot: Boot,
    /// Records read.
    seen: usize,
    /// The generation that it works in; 0: none.
    life: u8,
    /// The generation that it has formed; 0: none.
    held: u8,
    /// The step whose state lies in its slot.
    slot: u8,
    /// The newest save of this life: its number and its step.
    newest: (u8, u8),
    uploads: BTreeSet<Upload>,
    /// The leader's: what it has heard of the newest save, and whether it has abandoned it.
    heard: BTreeSet<Message>,
    abandoned: bool,
    /// Whether its record was begun, whose fate may be unknown.
    begun: bool,
    doing: Doing,
    attempts: u8,
}

impl Agent {
    fn down() -> Self {
        Self {
            boot: 0,
            seen: 0,
            life: 0,
            held: 0,
            slot: 0,
            newest: (0, 0),
            uploads: BTreeSet::new(),
            heard: BTreeSet::new(),
            abandoned: false,
            begun: false,
            doing: Doing::Working,
            attempts: 0,
        }
    }

    fn leads(&self) -> bool {
        self.life > 0 && self.held == self.life
    }

    /// The save that it has ordered or obeyed last.
    fn save(&self) -> SaveId {
        (self.life, self.newest.0)
    }

    fn begins(&mut self, generation: u8) {
        (self.life, self.newest, self.abandoned, self.begun) = (generation, (0, 0), false, false);
        self.heard.clear();
    }

    /// The workers write the state of `step` into the slot, and the upload of it begins.
    fn captures(&mut self, number: u8, step: u8) {
        (self.slot, self.newest) = (step, (number, step));
        self.uploads.insert(Upload { save: self.save(), step, first: 0 });
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Bug {
    None,
    /// A node that is no member finishes a save without asking the rule book.
    Stranger,
    /// The end of another attempt counts for this one.
    OtherAttempt,
    /// A slot is given out again when the save in it is abandoned or has ended here.
    SlotEarly,
    /// A leader that has abandoned a save commits it when its receipts come all the same.
    CommitAbandoned,
    /// A follower that leaves writes `interrupted` without asking the rule book.
    FollowerInterrupts,
    /// The heartbeat of a leader that is taken for dead is removed before the next generation is formed.
    BuryFirst,
    /// A node works in the generation that it was invited to, and has not read the record.
    RosterFromMemory,
}

/// Events that must happen somewhere, or the model is too small to prove anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Sight {
    /// A save is ordered again after it was abandoned or had failed.
    Repeated,
    /// A slot is used for a second save.
    SlotAgain,
    LandedLate,
    /// A member that is not the leader puts a manifest.
    Finishes,
    /// The record of a follower stands.
    FollowerCommits,
    /// A manifest of another member, or of an earlier attempt, is taken over.
    TookOver,
    Fenced,
    LeftOut,
    /// A formed generation is read by a node that it names.
    Joined,
    /// A generation continues one with a node less.
    Shrunk,
    Interrupted,
    /// A message of an older attempt is refused.
    OldWord,
    Abandoned,
    Waits,
}

/// The size of a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bounds {
    agents: u8,
    /// Boots beyond the first of each agent.
    reboots: u8,
    generations: u8,
    /// Saves that a leader orders in one generation.
    saves: u8,
    faults: u8,
    abandons: u8,
    kills: u8,
    /// `interrupted` records that are tried.
    ends: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    bounds: Bounds,
    bug: Bug,
    journal: Vec<Rec>,
    files: BTreeMap<(Point, u8), Content>,
    /// Of each point and node: the attempt, the rank, and the bytes as they were sent.
    receipts: BTreeMap<(Point, Boot), (SaveId, u8, Content)>,
    manifests: BTreeMap<Point, Manifest>,
    agents: Vec<Agent>,
    /// Everything ever said; anyone may hear it at any time, and again.
    wire: BTreeSet<Message>,
    late: BTreeSet<Request>,
    told: BTreeSet<Point>,
    /// Which node has abandoned which save.
    abandoned: BTreeSet<(SaveId, Boot)>,
    buried: BTreeSet<Boot>,
    boots: u8,
    faults: u8,
    kills: u8,
    ends: u8,
}

type Read = Result<Rc<RunState>, String>;

thread_local! {
    /// The real code's reading of each journal met.
    static REPLAYED: RefCell<HashMap<Vec<Rec>, Read>> = RefCell::default();
}

fn node(boot: Boot) -> NodeId {
    NodeId::new(format!("n{boot}")).expect("valid")
}

fn boot_of(node: &NodeId) -> Boot {
    node.as_str()[1..].parse().expect("one of ours")
}

fn attempt(save: SaveId) -> AttemptId {
    AttemptId::new(format!("s{}.{}", save.0, save.1)).expect("valid")
}

fn generation(number: u8) -> Generation {
    Generation(number.into())
}

fn real(point: Point) -> ResumePoint {
    ResumePoint { step: Step(point.0.into()), generation: generation(point.1) }
}

fn small(point: &ResumePoint) -> Point {
    (u8::try_from(point.step.get()).expect("small"), u8::try_from(point.generation.get()).expect("small"))
}

fn members(leader: Boot, others: Others) -> Vec<Boot> {
    std::iter::once(leader).chain((1..8).filter(|boot| others & (1 << boot) != 0)).collect()
}

/// The record, with who went and who came since the state before it.
fn record(state: Option<&RunState>, rec: &Rec) -> Record {
    match rec.what {
        What::Formed { generation: number, resume, others, continues } => {
            let nodes: Vec<NodeId> = members(rec.by, others).into_iter().map(node).collect();
            let place = |(rank, node): (u32, &NodeId)| RosterEntry {
                first_rank: Some(Rank(rank)),
                ..RosterEntry::new(node.clone(), 1)
            };
            let roster: Vec<_> = (0..).zip(&nodes).map(place).collect();
            let before = state.and_then(RunState::formed).filter(|_| continues);
            let old: Vec<NodeId> =
                before.map(|formed| formed.roster.iter().map(|m| m.node.clone()).collect()).unwrap_or_default();
            let went = old.iter().filter(|node| !nodes.contains(node));
            Record::Formed {
                generation: generation(number),
                world_size: WorldSize(u32::try_from(nodes.len()).expect("small")),
                roster,
                resume: resume.map(real),
                overrides: Vec::new(),
                reason: FormedReason::NodeLost,
                data: None,
                continues: before.map(|formed| formed.generation),
                gone: went.map(|node| Gone { node: node.clone(), why: "lost".into() }).collect(),
                joined: nodes.iter().filter(|node| before.is_some() && !old.contains(node)).cloned().collect(),
                why: None,
            }
        }
        What::Committed { point, manifest, .. } => Record::Committed(Committed {
            step: Step(point.0.into()),
            generation: generation(point.1),
            manifest: String::new(),
            manifest_crc64: format!("{manifest:?}"),
            bytes: 0,
            loss: Some(0.0),
            validation_loss: None,
            metrics: Metrics::new(),
            cost: SaveCost::default(),
        }),
        What::Interrupted { generation: number } => Record::Interrupted {
            generation: generation(number),
            step: Step(0),
            committed: None,
            lost_steps: 0,
            verdict: String::new(),
            drain: None,
            cap: None,
        },
    }
}

fn entry(node: NodeId, attempt: String, record: Record) -> Entry {
    let attempt = AttemptId::new(attempt).expect("valid");
    Entry { format: record.format(), attempt, at: jiff::Timestamp::UNIX_EPOCH, node, record }
}

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
            let mut state = RunState::clone(&state);
            let entry = entry(node(last.by), format!("a{}.{}", last.by, last.attempt), record(Some(&state), last));
            state.apply(state.next(), entry).map_err(|error| error.to_string())?;
            Ok(state)
        }),
    };
    let state = state.map(Rc::new);
    REPLAYED.with_borrow_mut(|known| known.insert(journal.to_vec(), state.clone()));
    state
}

/// A receipt as it is stored. Every node puts the small file, which says the step alone.
fn receipt(point: Point, boot: Boot, (save, rank, content): (SaveId, u8, Content)) -> Receipt {
    let file = |name: String, kind, crc64| FileEntry { name, kind, bytes: 100, crc64: Crc64(crc64) };
    let sum = u64::from_be_bytes([0, 0, 0, 0, 1, content.0, content.1, content.2]);
    Receipt {
        format: 1,
        attempt: attempt(save),
        run_id: samples::run_id(),
        step: Step(point.0.into()),
        generation: generation(point.1),
        node: node(boot),
        files: vec![
            file(shard(rank), FileKind::Model, sum),
            file("trainer_state.json".into(), FileKind::Meta, point.0.into()),
        ],
    }
}

fn shard(rank: u8) -> String {
    format!("model-{rank}")
}

/// The save as its leader has ordered it.
fn order(point: Point, save: SaveId, by: Boot) -> Save {
    Save {
        attempt: attempt(save),
        run_id: samples::run_id(),
        step: Step(point.0.into()),
        generation: generation(point.1),
        node: node(by),
        world_size: WorldSize(1),
        uploads: Vec::new(),
        small: Vec::new(),
    }
}

impl World {
    /// Generation 1 of all agents, the first of which leads, just formed and read by all.
    fn new(bounds: Bounds, bug: Bug) -> Self {
        let others = (2..=bounds.agents).fold(0, |bits, boot| bits | (1 << boot));
        let what = What::Formed { generation: 1, resume: None, others, continues: false };
        let agent = |boot| Agent { boot, seen: 1, life: 1, held: u8::from(boot == 1), ..Agent::down() };
        Self {
            bounds,
            bug,
            journal: vec![Rec { by: 1, attempt: 0, what }],
            files: BTreeMap::new(),
            receipts: BTreeMap::new(),
            manifests: BTreeMap::new(),
            agents: (1..=bounds.agents).map(agent).collect(),
            wire: BTreeSet::new(),
            late: BTreeSet::new(),
            told: BTreeSet::new(),
            abandoned: BTreeSet::new(),
            buried: BTreeSet::new(),
            boots: bounds.agents,
            faults: 0,
            kills: 0,
            ends: 0,
        }
    }

    /// The members of a generation by the journal, the leader first.
    fn roster(&self, wanted: u8) -> Vec<Boot> {
        let formed = self.journal.iter().find_map(|rec| match rec.what {
            What::Formed { generation, others, .. } if generation == wanted => Some(members(rec.by, others)),
            _ => None,
        });
        formed.unwrap_or_default()
    }

    /// The store executes a request; `false`: another object has the key.
    fn serve(&mut self, request: &Request) -> bool {
        match request {
            Request::Append { number, rec } => {
                if *number == self.journal.len() {
                    self.journal.push(*rec);
                }
                self.journal.get(*number) == Some(rec)
            }
            Request::Shard { point, rank, content } => {
                self.files.insert((*point, *rank), *content);
                true
            }
            Request::Manifest { point, manifest } => {
                self.manifests.entry(*point).or_insert_with(|| manifest.clone()).files == manifest.files
            }
        }
    }

    /// The leader's account of its newest save, by the real code.
    fn account(&self, agent: &Agent) -> Ordered {
        let save = agent.save();
        let mut ordered = Ordered::new(attempt(save), self.roster(agent.life).into_iter().map(node));
        if agent.abandoned && self.bug != Bug::CommitAbandoned {
            ordered.abandon();
        }
        for message in &agent.heard {
            let _ = self.hears(agent, &mut ordered, *message);
        }
        ordered
    }

    /// The real code takes an end into account; the error says why it counts for nothing.
    fn hears(&self, agent: &Agent, ordered: &mut Ordered, message: Message) -> Result<(), String> {
        let Message::Ended { save, by, put } = message else { return Err("it is an order".into()) };
        // The channel drops messages of other generations.
        if save.0 != agent.life {
            return Err("of another generation".into());
        }
        let save = if self.bug == Bug::OtherAttempt { agent.save() } else { save };
        let point = (agent.newest.1, agent.life);
        let rank = self.roster(agent.life).iter().position(|member| *member == by);
        let rank = u8::try_from(rank.unwrap_or_default()).expect("small");
        let receipt = put.map(|content| receipt(point, by, (save, rank, content)));
        ordered.ended(&node(by), &attempt(save), receipt)
    }

    /// What each rank has put, by receipts.
    fn manifest(&self, save: SaveId, receipts: &[Receipt]) -> Manifest {
        let content = |file: &FileEntry| {
            let [.., boot, first, second] = file.crc64.0.to_be_bytes();
            (boot, first, second)
        };
        let files: BTreeMap<String, Content> = receipts
            .iter()
            .flat_map(|receipt| &receipt.files)
            .filter(|file| file.kind == FileKind::Model)
            .map(|file| (file.name.clone(), content(file)))
            .collect();
        Manifest { save, files: files.into_values().collect() }
    }

    /// The fates of a request: it is answered; it is done and its answer lost; it is given up and may arrive later.
    fn send(
        &self,
        index: usize,
        request: &Request,
        all: &mut Vec<(String, Self)>,
        answered: impl FnOnce(&mut Self, &mut Agent, bool),
        gave_up: impl Fn(&mut Self, &mut Agent),
    ) {
        let boot = self.agents[index].boot;
        let mut world = self.clone();
        let mut agent = self.agents[index].clone();
        let ours = world.serve(request);
        answered(&mut world, &mut agent, ours);
        world.agents[index] = agent;
        all.push((format!("node {boot}: {request:?} is answered: {}", if ours { "done" } else { "taken" }), world));
        if self.faults >= self.bounds.faults {
            return;
        }
        for is_late in [false, true] {
            let mut world = self.clone();
            let mut agent = self.agents[index].clone();
            world.faults += 1;
            gave_up(&mut world, &mut agent);
            world.agents[index] = agent;
            let how = if is_late {
                world.late.insert(request.clone());
                "may land late"
            } else {
                world.serve(request);
                "is done, its answer is lost"
            };
            all.push((format!("node {boot}: {request:?} {how}, and is given up"), world));
        }
    }

    /// Appends as `Journal::append` does: the rule book says whether, another record in its place is read first.
    fn append(&self, index: usize, rec: Rec, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let Ok(state) = replay(&self.journal[..agent.seen]) else { return };
        let with = |change: &dyn Fn(&mut Self, &mut Agent)| {
            let (mut world, mut agent) = (self.clone(), agent.clone());
            change(&mut world, &mut agent);
            world.agents[index] = agent;
            world
        };
        // `committed_as`: the very manifest is committed already.
        let stands = self.journal[..agent.seen].iter().any(|found| match (found.what, rec.what) {
            (What::Committed { point, manifest, .. }, What::Committed { point: wanted, manifest: of, .. }) => {
                (point, manifest) == (wanted, of)
            }
            _ => false,
        });
        if stands {
            let world = with(&|world, agent| agent.is_told(world, rec));
            all.push((format!("node {boot} finds {:?} committed", rec.what), world));
            return;
        }
        let held = (agent.held > 0).then(|| generation(agent.held));
        let refused = admit(&state, &node(boot), held, &record(Some(&state), &rec)).err();
        let careless = match rec.what {
            What::Committed { .. } => self.bug == Bug::Stranger,
            What::Interrupted { .. } => self.bug == Bug::FollowerInterrupts,
            What::Formed { .. } => false,
        };
        if let Some(refusal) = refused.filter(|_| !careless) {
            let sight = match refusal {
                Refusal::Fenced { .. } => Some(Sight::Fenced),
                Refusal::LeftOut { .. } => Some(Sight::LeftOut),
                Refusal::Wrong(_) => None,
            };
            saw.extend(sight);
            // Its life ends; if the newest generation names the node, it goes on there.
            let named = !matches!(refusal, Refusal::Wrong(_)) && state.is_member(&node(boot), state.generation());
            let world = with(&|_, agent| {
                if named {
                    (agent.doing, agent.life) = (Doing::Working, 0);
                } else {
                    *agent = Agent::down();
                }
            });
            all.push((format!("node {boot} does not append {:?}: {refusal:?}", rec.what), world));
            return;
        }
        let request = Request::Append { number: agent.seen, rec };
        if self.journal.len() == agent.seen {
            match rec.what {
                What::Committed { .. } if !agent.leads() => saw.push(Sight::FollowerCommits),
                What::Interrupted { .. } => saw.push(Sight::Interrupted),
                _ => {}
            }
        }
        let answered = |world: &mut Self, agent: &mut Agent, ours: bool| {
            if ours {
                agent.seen += 1;
                agent.is_told(world, rec);
                return;
            }
            let own = world.journal.contains(&rec);
            agent.seen = world.journal.len();
            if own {
                agent.is_told(world, rec);
            } else if matches!(rec.what, What::Formed { .. }) {
                // Its choice may be wrong now.
                agent.doing = Doing::Working;
            }
        };
        let gave_up = |_: &mut Self, agent: &mut Agent| match rec.what {
            What::Committed { .. } => agent.doing = Doing::Working,
            // It exits.
            _ => *agent = Agent::down(),
        };
        self.send(index, &request, all, answered, gave_up);
    }

    /// Everything that one agent can do next.
    fn next_of(&self, index: usize, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let with = |change: &dyn Fn(&mut Self, &mut Agent)| {
            let (mut world, mut agent) = (self.clone(), agent.clone());
            change(&mut world, &mut agent);
            world.agents[index] = agent;
            world
        };
        if boot == 0 {
            if self.boots < self.bounds.agents + self.bounds.reboots {
                let world = with(&|world, agent| {
                    world.boots += 1;
                    *agent = Agent { boot: world.boots, seen: world.journal.len(), ..Agent::down() };
                });
                all.push((format!("node {} boots and reads the journal", self.boots + 1), world));
            }
            return;
        }
        if self.kills < self.bounds.kills {
            let world = with(&|world, agent| {
                world.kills += 1;
                *agent = Agent::down();
            });
            all.push((format!("node {boot} is killed"), world));
        }
        let Ok(state) = replay(&self.journal[..agent.seen]) else { return };
        for upload in &agent.uploads {
            self.next_of_upload(index, *upload, all);
        }
        match &agent.doing {
            Doing::Forming(rec) | Doing::Committing(rec) | Doing::Ending(rec) => {
                self.append(index, *rec, all, saw);
                return;
            }
            Doing::Manifesting { point, manifest } => {
                self.put_manifest(index, *point, manifest, all, saw);
                return;
            }
            Doing::Burying(dead) => {
                let world = with(&|world, agent| {
                    world.buried.insert(*dead);
                    agent.doing = Doing::Working;
                });
                all.push((format!("node {boot} removes the heartbeat of node {dead}"), world));
                return;
            }
            Doing::Working => {}
        }
        if agent.seen < self.journal.len() {
            let world = with(&|world, agent| agent.seen = world.journal.len());
            all.push((format!("node {boot} reads on"), world));
        }
        let newest = u8::try_from(state.generation().get()).expect("small");
        if newest > agent.life {
            self.leave_or_join(index, &state, newest, all, saw);
        }
        self.next_saves(index, &state, all, saw);
        self.next_formation(index, &state, all, saw);
        let last = self.ends < self.bounds.ends && agent.life > 0 && agent.life == newest;
        if last && (agent.leads() || self.bug == Bug::FollowerInterrupts) {
            let world = with(&|world, agent| {
                world.ends += 1;
                agent.attempts += 1;
                let what = What::Interrupted { generation: agent.life };
                agent.doing = Doing::Ending(Rec { by: agent.boot, attempt: agent.attempts, what });
            });
            all.push((format!("node {boot} is asked to leave"), world));
        }
    }

    /// It has read that a newer generation than its own exists.
    fn leave_or_join(
        &self,
        index: usize,
        state: &RunState,
        newest: u8,
        all: &mut Vec<(String, Self)>,
        saw: &mut Vec<Sight>,
    ) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let mut world = self.clone();
        if agent.life > 0
            && let Some(refusal) = fenced(state, &node(boot), generation(agent.life))
        {
            saw.push(if matches!(refusal, Refusal::LeftOut { .. }) { Sight::LeftOut } else { Sight::Fenced });
            // It comes back under a new id.
            world.agents[index] = Agent::down();
            all.push((format!("node {boot} leaves: {refusal:?}"), world));
        } else if state.is_member(&node(boot), generation(newest)) && agent.uploads.is_empty() {
            saw.push(Sight::Joined);
            world.agents[index].begins(newest);
            all.push((format!("node {boot} reads that it is a member of generation {newest}"), world));
        } else if !agent.uploads.is_empty() {
            // Its uploads are stopped first: nothing more of them is sent.
            world.agents[index].uploads.clear();
            all.push((format!("node {boot} stops its uploads"), world));
        }
    }

    fn next_of_upload(&self, index: usize, upload: Upload, all: &mut Vec<(String, Self)>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let Upload { save, step, first } = upload;
        if first == 0 {
            let mut world = self.clone();
            let agent = &mut world.agents[index];
            agent.uploads.remove(&upload);
            agent.uploads.insert(Upload { first: agent.slot, ..upload });
            all.push((format!("node {boot} sends half of step {step}, attempt {save:?}"), world));
            return;
        }
        let point = (step, save.0);
        let rank = self.roster(save.0).iter().position(|member| *member == boot);
        let rank = u8::try_from(rank.unwrap_or(7)).expect("small");
        let content = (boot, first, agent.slot);
        let ended = |world: &mut Self, agent: &mut Agent, put: Option<Content>| {
            agent.uploads.remove(&upload);
            let message = Message::Ended { save, by: boot, put };
            if agent.leads() && agent.save() == save {
                agent.heard.insert(message);
            } else {
                world.wire.insert(message);
            }
        };
        let request = Request::Shard { point, rank, content };
        let answered = |world: &mut Self, agent: &mut Agent, _| {
            world.receipts.insert((point, boot), (save, rank, content));
            ended(world, agent, Some(content));
        };
        self.send(index, &request, all, answered, |world, agent| ended(world, agent, None));
    }

    fn next_saves(&self, index: usize, state: &RunState, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        if agent.life == 0 {
            if self.bug == Bug::Stranger {
                self.finish(index, state, all, saw);
            }
            return;
        }
        let with = |change: &dyn Fn(&mut Self, &mut Agent)| {
            let (mut world, mut agent) = (self.clone(), agent.clone());
            change(&mut world, &mut agent);
            world.agents[index] = agent;
            world
        };
        if !agent.leads() {
            for message in &self.wire {
                let Message::Order { save, step } = *message else { continue };
                if save.0 == agent.life && save.1 > agent.newest.0 {
                    let world = with(&|_, agent| agent.captures(save.1, step));
                    all.push((format!("node {boot} obeys {message:?}"), world));
                }
            }
            self.finish(index, state, all, saw);
            return;
        }
        let (number, step) = agent.newest;
        let account = self.account(agent);
        let committed = number > 0 && state.checkpoint(Step(step.into()), generation(agent.life)).is_some();
        for message in &self.wire {
            if agent.heard.contains(message) || matches!(message, Message::Order { .. }) {
                continue;
            }
            match self.hears(agent, &mut account.clone(), *message) {
                Ok(()) => {
                    let world = with(&|_, agent| {
                        agent.heard.insert(*message);
                    });
                    all.push((format!("node {boot} hears {message:?}"), world));
                }
                Err(_) => saw.push(Sight::OldWord),
            }
        }
        let given_up = u8::try_from(self.abandoned.len()).expect("small");
        if number > 0 && !committed && !agent.abandoned && !agent.begun && given_up < self.bounds.abandons {
            saw.push(Sight::Abandoned);
            let world = with(&|world, agent| {
                agent.abandoned = true;
                world.abandoned.insert((agent.save(), agent.boot));
            });
            all.push((format!("node {boot} abandons attempt {:?}", agent.save()), world));
        }
        let receipts = account.receipts();
        if number > 0
            && !committed
            && let Ok(receipts) = &receipts
        {
            let manifest = self.manifest(agent.save(), receipts);
            let point = (step, agent.life);
            let world = with(&|_, agent| agent.doing = Doing::Manifesting { point, manifest: manifest.clone() });
            all.push((format!("node {boot} has all receipts of {point:?}"), world));
        }
        // Its own upload has ended, but perhaps not the others'.
        let early = self.bug == Bug::SlotEarly && agent.uploads.is_empty();
        if number < self.bounds.saves && (number == 0 || account.is_over() || early) {
            let mut begin = |step: u8| {
                let world = with(&|world, agent| {
                    agent.heard.clear();
                    (agent.abandoned, agent.begun) = (false, false);
                    agent.captures(number + 1, step);
                    world.wire.insert(Message::Order { save: agent.save(), step });
                });
                all.push((format!("node {boot} orders attempt {} of step {step}", number + 1), world));
            };
            if number > 0 {
                saw.push(Sight::SlotAgain);
            }
            begin(step + 1);
            // The same snapshot again.
            if number > 0 && !committed {
                saw.push(Sight::Repeated);
                begin(step);
            }
        }
    }

    /// It takes its leader for lost, and finishes the newest save that it knows of.
    fn finish(&self, index: usize, state: &RunState, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let known = match self.bug {
            // It has no part in the save, and reads of it in the store.
            Bug::Stranger if agent.life == 0 => {
                self.receipts.iter().map(|((point, _), (save, ..))| (*point, *save)).next_back()
            }
            _ => Some(((agent.newest.1, agent.life), agent.save())).filter(|((step, _), _)| *step > 0),
        };
        let Some((point, save)) = known else { return };
        if state.generation() != generation(point.1)
            || state.checkpoint(real(point).step, generation(point.1)).is_some()
        {
            return;
        }
        let roster = self.roster(point.1);
        let found: Vec<Receipt> = self
            .receipts
            .iter()
            .filter(|((of, _), _)| *of == point)
            .map(|((of, by), put)| receipt(*of, *by, *put))
            .collect();
        let ranks = (0_u8..).zip(&roster);
        let mut expected: Vec<String> = ranks.clone().map(|(rank, _)| shard(rank)).collect();
        expected.push("trainer_state.json".into());
        // Files that survivors hold: each still uploads its own.
        let uploads = |by: Boot| self.agents.iter().any(|a| a.boot == by && a.uploads.iter().any(|u| u.save == save));
        let held: BTreeSet<String> = ranks.filter(|(_, by)| uploads(**by)).map(|(rank, _)| shard(rank)).collect();
        match prospect(&order(point, save, boot), &found, &expected, &held) {
            Prospect::Whole(receipts) => {
                saw.push(Sight::Finishes);
                let manifest = self.manifest(save, &receipts);
                let mut world = self.clone();
                world.agents[index].doing = Doing::Manifesting { point, manifest };
                all.push((format!("node {boot} finishes {point:?}, attempt {save:?}"), world));
            }
            Prospect::Waits(_) => saw.push(Sight::Waits),
            Prospect::Lost(_) => {}
        }
    }

    fn put_manifest(
        &self,
        index: usize,
        point: Point,
        manifest: &Manifest,
        all: &mut Vec<(String, Self)>,
        saw: &mut Vec<Sight>,
    ) {
        if self.manifests.get(&point).is_some_and(|stands| stands.files == manifest.files) {
            saw.push(Sight::TookOver);
        }
        let request = Request::Manifest { point, manifest: manifest.clone() };
        let answered = |world: &mut Self, agent: &mut Agent, ours: bool| {
            // Of another save: this one has failed.
            if !ours {
                agent.doing = Doing::Working;
                return;
            }
            let stands = world.manifests.get(&point).expect("just put").save;
            agent.attempts += 1;
            agent.begun = true;
            let what = What::Committed { point, manifest: stands, save: manifest.save };
            agent.doing = Doing::Committing(Rec { by: agent.boot, attempt: agent.attempts, what });
        };
        self.send(index, &request, all, answered, |_, agent| agent.doing = Doing::Working);
    }

    /// It takes its leader for dead, or has found a member gone or a newcomer, and forms the next generation.
    fn next_formation(&self, index: usize, state: &RunState, all: &mut Vec<(String, Self)>, saw: &mut Vec<Sight>) {
        let agent = &self.agents[index];
        let boot = agent.boot;
        let formed = state.formed().expect("the first is formed");
        let newest = u8::try_from(formed.generation.get()).expect("small");
        if newest >= self.bounds.generations {
            return;
        }
        if self.bug == Bug::RosterFromMemory {
            for other in &self.agents {
                let Doing::Forming(Rec { what: What::Formed { generation: next, others, .. }, .. }) = other.doing
                else {
                    continue;
                };
                if others & (1 << boot) != 0 && agent.life < next && agent.uploads.is_empty() {
                    let mut world = self.clone();
                    world.agents[index].begins(next);
                    all.push((format!("node {boot} works in generation {next}, as node {} said", other.boot), world));
                }
            }
        }
        // A node enters a generation, its own too, with no upload of the last one.
        if !agent.uploads.is_empty() || state.is_member(&node(boot), formed.generation) != (agent.life == newest) {
            return;
        }
        let up: Vec<Boot> = self.agents.iter().map(|other| other.boot).filter(|other| *other != 0).collect();
        let old: Vec<Boot> = formed.roster.iter().map(|member| boot_of(&member.node)).collect();
        // A leader of a whole group has no reason.
        if agent.leads() && old.len() == up.len() && old.iter().all(|member| up.contains(member)) {
            return;
        }
        let continues = old.contains(&boot);
        // Whom it can invite: of the others that are up, all or none.
        let fresh = |other: &Boot| old.contains(other) || !self.journal.iter().any(|rec| rec.has_member(*other));
        let everyone =
            up.iter().filter(|other| **other != boot && fresh(other)).fold(0, |bits, other| bits | (1 << other));
        let resume = state.newest().map(|checkpoint| small(&checkpoint.point()));
        for others in BTreeSet::from([0, everyone]) {
            if continues && members(boot, others).len() < old.len() {
                saw.push(Sight::Shrunk);
            }
            let mut world = self.clone();
            if self.bug == Bug::BuryFirst && old[0] != boot {
                world.buried.insert(old[0]);
            }
            let agent = &mut world.agents[index];
            agent.attempts += 1;
            let what = What::Formed { generation: newest + 1, resume, others, continues };
            agent.doing = Doing::Forming(Rec { by: boot, attempt: agent.attempts, what });
            all.push((format!("node {boot} invites {:?} to generation {}", members(boot, others), newest + 1), world));
        }
    }
}

impl Rec {
    fn has_member(&self, boot: Boot) -> bool {
        matches!(self.what, What::Formed { others, .. } if members(self.by, others).contains(&boot))
    }
}

impl Agent {
    fn is_told(&mut self, world: &mut World, rec: Rec) {
        self.doing = Doing::Working;
        match rec.what {
            What::Committed { point, .. } => {
                world.told.insert(point);
            }
            What::Formed { generation, .. } => {
                self.held = generation;
                self.begins(generation);
                // Whoever led before, if it is not among them.
                let before = world.journal.iter().rev().filter(|rec| matches!(rec.what, What::Formed { .. })).nth(1);
                if let Some(before) = before.filter(|before| !rec.has_member(before.by)) {
                    self.doing = Doing::Burying(before.by);
                }
            }
            What::Interrupted { .. } => *self = Self::down(),
        }
    }
}

impl Model for World {
    type Sight = Sight;

    fn next(&self, saw: &mut Vec<Sight>) -> Vec<(String, Self)> {
        let mut all = Vec::new();
        for index in 0..self.agents.len() {
            self.next_of(index, &mut all, saw);
        }
        for request in &self.late {
            let mut world = self.clone();
            world.late.remove(request);
            let before = (world.journal.len(), world.files.clone());
            world.serve(request);
            if before != (world.journal.len(), world.files.clone()) {
                saw.push(Sight::LandedLate);
            }
            all.push((format!("lands late: {request:?}"), world));
        }
        all
    }

    fn check(&self) -> Result<(), String> {
        replay(&self.journal).map_err(|error| format!("the journal can't be read: a record {error}"))?;
        let mut newest: Option<(u8, Vec<Boot>)> = None;
        let mut points = BTreeSet::new();
        for rec in &self.journal {
            match rec.what {
                What::Formed { generation, others, .. } => newest = Some((generation, members(rec.by, others))),
                What::Committed { point, manifest, save } => {
                    let Some((_, roster)) = newest.as_ref().filter(|(newest, _)| *newest == point.1) else {
                        return Err(format!("{point:?} is committed by node {} out of its generation", rec.by));
                    };
                    if !roster.contains(&rec.by) {
                        return Err(format!("{point:?} is committed by node {}, which is no member", rec.by));
                    }
                    if !points.insert(point) {
                        return Err(format!("{point:?} is committed twice"));
                    }
                    if self.abandoned.contains(&(save, rec.by)) {
                        return Err(format!("{point:?} is committed by node {}, which had abandoned it", rec.by));
                    }
                    self.is_whole(point, manifest, roster)?;
                }
                What::Interrupted { .. } => {
                    let leader = newest.as_ref().map(|(_, roster)| roster[0]);
                    if leader != Some(rec.by) {
                        return Err(format!("the end is recorded by node {}, and node {leader:?} leads", rec.by));
                    }
                }
            }
        }
        if let Some(lost) = self.told.iter().find(|point| !points.contains(point)) {
            return Err(format!("{lost:?} was committed, and its record is gone"));
        }
        let leader = newest.as_ref().map(|(_, roster)| roster[0]);
        if leader.is_some_and(|leader| self.buried.contains(&leader)) {
            return Err(format!("the heartbeat of node {leader:?} is removed, and it leads"));
        }
        for agent in self.agents.iter().filter(|agent| agent.life > 0) {
            if !self.roster(agent.life).contains(&agent.boot) {
                return Err(format!("node {} works in generation {}, which does not name it", agent.boot, agent.life));
            }
        }
        Ok(())
    }
}

impl World {
    /// A committed checkpoint is of one step, and each file is of the node whose rank it has.
    fn is_whole(&self, point: Point, manifest: SaveId, roster: &[Boot]) -> Result<(), String> {
        let stands = self.manifests.get(&point).filter(|stands| stands.save == manifest);
        let Some(stands) = stands.filter(|stands| stands.files.len() == roster.len()) else {
            return Err(format!("{point:?} is committed, and its manifest is not there"));
        };
        for (rank, boot) in (0_u8..).zip(roster) {
            let found = self.files.get(&(point, rank));
            if found != Some(&(*boot, point.0, point.0)) {
                return Err(format!("{point:?} is committed, and rank {rank} of it is torn: {found:?}"));
            }
            if stands.files.get(usize::from(rank)) != found {
                return Err(format!("{point:?} is committed, and rank {rank} is not what the manifest says"));
            }
        }
        Ok(())
    }
}

/// Two members that save, repeat and abandon.
const SAVES: Bounds =
    Bounds { agents: 2, reboots: 0, generations: 1, saves: 2, faults: 1, abandons: 1, kills: 0, ends: 0 };
/// Two members of which one is lost, wrongly or not.
const LOSSES: Bounds =
    Bounds { agents: 2, reboots: 1, generations: 2, saves: 1, faults: 1, abandons: 0, kills: 1, ends: 0 };

#[test]
fn saves_of_two_members_are_never_torn_and_an_abandoned_one_is_never_committed() {
    use Sight::*;
    expect_sound(
        World::new(SAVES, Bug::None),
        &[Repeated, SlotAgain, LandedLate, Finishes, FollowerCommits, TookOver, OldWord, Abandoned, Waits],
    );
}

#[test]
fn a_member_finishes_and_forms_and_whoever_is_left_out_writes_nothing() {
    use Sight::*;
    expect_sound(
        World::new(LOSSES, Bug::None),
        &[Finishes, FollowerCommits, TookOver, Fenced, LeftOut, Joined, Shrunk, LandedLate],
    );
}

#[test]
fn larger_worlds_are_sound() {
    if std::env::var_os("TRAINER_TESTS_ALL").is_none() {
        println!("TRAINER_TESTS_ALL is not set: skipped");
        return;
    }
    expect_sound(World::new(Bounds { saves: 3, faults: 2, ..SAVES }, Bug::None), &[Sight::SlotAgain]);
    let three = Bounds { agents: 3, reboots: 0, faults: 0, ..LOSSES };
    expect_sound(World::new(three, Bug::None), &[Sight::FollowerCommits, Sight::Joined, Sight::Shrunk]);
    expect_sound(World::new(Bounds { ends: 1, ..LOSSES }, Bug::None), &[Sight::Interrupted]);
}

#[test]
fn every_seeded_bug_among_members_is_found() {
    let two = Bounds { faults: 0, ..LOSSES };
    for (bug, bounds, flaw) in [
        (Bug::Stranger, two, "which is no member"),
        (Bug::OtherAttempt, Bounds { saves: 3, faults: 0, ..SAVES }, "is torn"),
        (Bug::SlotEarly, Bounds { saves: 3, faults: 0, abandons: 0, ..SAVES }, "is torn"),
        (Bug::CommitAbandoned, SAVES, "had abandoned it"),
        (Bug::FollowerInterrupts, Bounds { ends: 1, ..two }, "the end is recorded by"),
        (Bug::BuryFirst, two, "and it leads"),
        (Bug::RosterFromMemory, two, "which does not name it"),
    ] {
        expect_found(&format!("{bug:?}"), World::new(bounds, bug), flaw);
    }
}
