//! The simulated world: virtual time, a store with latency, machines, links between them, and what is counted.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    rc::Rc,
};

use trainer::{
    ids::{Generation, NodeId},
    random::SplitMix64,
    rendezvous::{
        cost::Requests,
        membership::Role,
        policy::{Bounds, Roster},
        seat::{Body, Seat, Timer},
    },
};

use super::host::Broken;

/// Milliseconds of virtual time.
pub type Ms = u64;
/// A node: one entry of [`Sim::nodes`]. A machine that restarts, or that is left out, becomes another node.
pub type Node = usize;
/// A machine.
pub type Host = usize;

/// The silence after which a channel is closed; pings are a second apart.
pub const SILENCE: Ms = 5_000;
/// Time between two checkpoints; nodes join at a checkpoint.
pub const COMMIT: Ms = 60_000;
/// A request to a store that is away fails after so long.
pub const STORE_TIMEOUT: Ms = 4_000;

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    None,
    /// Half of the workers are enough for a take-over.
    HalfIsEnough,
    /// A node outside of the generation takes over a live leader.
    Stranger,
    /// A heartbeat is deleted before the generation stands, and a missing one is a dead one.
    BuryFirst,
    /// A beat's stamp is compared with this machine's clock.
    Clocks,
    /// A leader with less than half goes on at once.
    NoYield,
}

#[derive(Clone, Debug)]
pub struct Formed {
    pub roster: Rc<Roster>,
    pub members: Vec<Node>,
    pub at: Ms,
}

#[derive(Clone, Debug)]
pub enum Record {
    Formed(Formed),
    Committed(Generation),
    Interrupted(Generation),
}

#[derive(Clone, Copy, Debug)]
pub struct Beat {
    pub counter: u64,
    pub landed: Ms,
    /// The beats before it, the newest first: what the checks compare with.
    pub before: [Ms; 4],
    pub role: Role,
    pub every_s: u32,
    pub left: bool,
}

#[derive(Clone, Debug)]
pub enum Op {
    Beat { node: Node, beat: Beat },
    List,
    Beats(Vec<Node>),
    Journal,
    Append { at: usize, record: Record },
    Bury(Vec<Node>),
}

#[derive(Clone, Debug)]
pub enum Done {
    Nothing,
    Listed(Vec<(Node, Ms)>),
    Beats {
        began: Ms,
        beats: Vec<(Node, Option<Beat>)>,
    },
    Journal {
        len: usize,
    },
    /// It stands, the number was taken, or nobody knows.
    Appended {
        record: Record,
        stands: Option<bool>,
    },
    Failed,
}

#[derive(Clone, Debug)]
pub enum Event {
    Beat {
        epoch: u64,
    },
    /// The seat's number, since a machine that is left out takes another seat.
    Timer {
        seat: u64,
        timer: Timer,
    },
    Probed {
        seat: u64,
        round: u64,
        by: Node,
        unreachable: BTreeSet<NodeId>,
    },
    Land {
        seat: u64,
        op: Op,
    },
    Done {
        seat: u64,
        done: Done,
    },
    Message {
        to: Node,
        from: Node,
        body: Body,
    },
    Lost {
        peer: Node,
        refused: bool,
    },
    /// A leader looks whether somebody asks for a drain.
    Drain {
        generation: Generation,
    },
    Commit {
        generation: Generation,
    },
    /// The workers of the last generation are gone.
    Idle {
        seat: u64,
        busy: u64,
    },
    Append {
        at: usize,
        record: Record,
    },
}

#[derive(Clone, Debug)]
pub enum Fault {
    Start(Host),
    /// `refuses`: the machine lives on, so its port refuses.
    Kill {
        host: Host,
        refuses: bool,
    },
    Pause(Host),
    Resume(Host),
    Link {
        from: Host,
        to: Host,
        up: bool,
    },
    Store {
        host: Host,
        up: bool,
    },
    /// A worker dies on a machine that leads.
    Again(Host),
    /// Stops the machine for so long as soon as it has decided to form.
    Trap {
        host: Host,
        pause: Ms,
    },
}

#[derive(Clone, Debug)]
enum What {
    Of { host: Host, life: u32, event: Event },
    Silent { a: Host, b: Host, epoch: u64 },
    Fault(Fault),
}

struct Item {
    at: Ms,
    seq: u64,
    what: What,
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.seq == other.seq
    }
}
impl Eq for Item {}
impl PartialOrd for Item {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Item {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Outside,
    Follower,
    Lost,
    Leader,
}

/// A machine and the agent on it.
pub struct Machine {
    pub up: bool,
    pub refuses: bool,
    pub paused: bool,
    pub life: u32,
    pub deferred: Vec<Event>,
    pub store: bool,
    pub trap: Option<Ms>,
    /// How wrong its clock is.
    pub skew: i64,
    pub workers: u32,
    pub node: Node,
    // The agent around the seat.
    pub seat: Option<Seat<Broken>>,
    pub seats: u64,
    pub role: Role,
    pub counter: u64,
    pub epoch: u64,
    /// Records that the seat has seen.
    pub read: usize,
    /// Nodes whose address it knows.
    pub known: BTreeSet<Node>,
    pub appending: bool,
    /// Its commits that failed in a row, in the generation that it leads.
    pub failed: u32,
    /// The generation that it leads can't go on, so nothing more is saved of it.
    pub broken: bool,
    pub busy: u64,
    // What an outsider sees of it.
    pub phase: Phase,
    /// The generation that it leads or follows.
    pub generation: Generation,
    /// A leader: the members that it has welcomed, itself included. A follower: the leader that has welcomed it.
    pub touch: BTreeSet<Node>,
}

pub struct Sim {
    pub now: Ms,
    pub bug: Bug,
    pub bounds: Bounds,
    pub rng: SplitMix64,
    seq: u64,
    queue: BinaryHeap<Reverse<Item>>,
    pub hosts: Vec<Machine>,
    /// `up[a][b]`: packets from a reach b.
    pub up: Vec<Vec<bool>>,
    silent: BTreeMap<(Host, Host), u64>,
    /// Whether links can break: with a thousand machines there are half a million.
    pub breakable: bool,
    pub nodes: Vec<NodeId>,
    pub owner: Vec<Host>,
    pub by_id: BTreeMap<NodeId, Node>,
    pub journal: Vec<Record>,
    pub beats: BTreeMap<Node, Beat>,
    /// How long it takes at most to end the workers of a generation that can't go on.
    pub ending: Ms,
    pub requests: Requests,
    /// Messages that were sent.
    pub messages: u64,
    /// Generations that were proposed in vain, since another record had the number.
    pub in_vain: u64,
    pub wrong: Vec<String>,
    pub trace: Vec<String>,
    pub tracing: bool,
}

impl Sim {
    pub fn new(seed: u64, bug: Bug, bounds: Bounds, workers: &[u32]) -> Self {
        let count = workers.len();
        let mut sim = Self {
            now: 0,
            bug,
            bounds,
            rng: SplitMix64::named(seed, "world"),
            seq: 0,
            queue: BinaryHeap::new(),
            hosts: Vec::new(),
            up: vec![vec![true; count]; count],
            silent: BTreeMap::new(),
            breakable: count < 50,
            nodes: Vec::new(),
            owner: Vec::new(),
            by_id: BTreeMap::new(),
            journal: Vec::new(),
            beats: BTreeMap::new(),
            ending: 0,
            requests: Requests::default(),
            messages: 0,
            in_vain: 0,
            wrong: Vec::new(),
            trace: Vec::new(),
            tracing: false,
        };
        for workers in workers {
            let skew = sim.below(600_000) as i64 - 300_000;
            let machine = Machine::new(*workers, skew);
            sim.hosts.push(machine);
        }
        sim
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.rng.next_u64() % limit.max(1)
    }

    pub fn say(&mut self, host: Host, text: impl FnOnce(&Self) -> String) {
        if self.tracing {
            let line = format!("{:>9.3} host {host} {}: {}", self.now as f64 / 1e3, self.id(host), text(self));
            self.trace.push(line);
        }
    }

    pub fn id(&self, host: Host) -> NodeId {
        self.nodes.get(self.hosts[host].node).cloned().unwrap_or_else(|| NodeId::new("none").unwrap())
    }

    /// A new node on `host`, under a random id.
    pub fn rename(&mut self, host: Host) {
        let node = self.nodes.len();
        let id = NodeId::new(format!("n{:06x}{node:04}", self.below(1 << 24))).unwrap();
        self.nodes.push(id.clone());
        self.owner.push(host);
        self.by_id.insert(id, node);
        self.hosts[host].node = node;
        self.hosts[host].counter = 0;
    }

    fn push(&mut self, at: Ms, what: What) {
        self.seq += 1;
        self.queue.push(Reverse(Item { at, seq: self.seq, what }));
    }

    pub fn after(&mut self, host: Host, pause: Ms, event: Event) {
        let life = self.hosts[host].life;
        self.push(self.now + pause, What::Of { host, life, event });
    }

    pub fn plan(&mut self, at: Ms, fault: Fault) {
        self.push(at, What::Fault(fault));
    }

    /// Sends a request to the store.
    pub fn ask(&mut self, host: Host, op: Op) {
        let (pause, seat) = (10 + self.below(50), self.hosts[host].seats);
        self.after(host, pause, Event::Land { seat, op });
    }

    /// Whether two machines' packets reach each other.
    pub fn linked(&self, a: Host, b: Host) -> bool {
        let on = |host: Host| self.hosts[host].up || self.hosts[host].refuses;
        on(a) && on(b) && (a == b || self.up[a][b] && self.up[b][a])
    }

    /// Whether they answer each other.
    pub fn healthy(&self, a: Host, b: Host) -> bool {
        let well = |host: Host| self.hosts[host].up && !self.hosts[host].paused;
        self.linked(a, b) && well(a) && well(b)
    }

    pub fn send(&mut self, host: Host, to: Node, body: Body) {
        let other = self.owner[to];
        if !self.linked(host, other) {
            return;
        }
        let pause = 1 + self.below(2);
        if matches!(body, Body::Invite { .. }) && self.hosts[host].known.insert(to) {
            // No record that it has read names the address: it reads the heartbeat. That takes no time here.
            self.requests.get += 1;
            if !self.hosts[host].store || !self.beats.contains_key(&to) {
                self.hosts[host].known.remove(&to);
                return;
            }
        }
        let from = self.hosts[host].node;
        if self.hosts[other].up && self.hosts[other].node == to {
            self.messages += 1;
            self.after(other, pause, Event::Message { to, from, body });
        } else {
            self.after(host, pause, Event::Lost { peer: to, refused: true });
        }
    }

    /// Runs until `end`.
    pub fn run(&mut self, end: Ms) {
        while self.queue.peek().is_some_and(|Reverse(item)| item.at <= end) {
            let Some(Reverse(Item { at, what, .. })) = self.queue.pop() else { return };
            self.now = at;
            match what {
                What::Fault(fault) => self.fault(fault),
                What::Silent { a, b, epoch } => self.silent(a, b, epoch),
                What::Of { host, life, event: Event::Land { seat, op } } => {
                    self.land(host, life, seat, op);
                }
                What::Of { host, life, event } => {
                    let machine = &mut self.hosts[host];
                    if machine.up && machine.life == life {
                        if machine.paused {
                            machine.deferred.push(event);
                        } else {
                            self.handle(host, event);
                        }
                    }
                }
            }
        }
        self.now = end;
    }

    /// A request arrives at the store, whatever has become of its sender.
    fn land(&mut self, host: Host, life: u32, seat: u64, op: Op) {
        let back = 10 + self.below(50);
        let done = if self.hosts[host].store {
            let began = self.now.saturating_sub(60);
            let done = self.perform(op, began);
            // Now and then an answer is lost.
            match done {
                Done::Appended { record, .. } if self.below(20) == 0 => Done::Appended { record, stands: None },
                done => done,
            }
        } else if let Op::Append { record, .. } = op {
            Done::Appended { record, stands: None }
        } else {
            Done::Failed
        };
        let pause = if self.hosts[host].store { back } else { STORE_TIMEOUT };
        self.push(self.now + pause, What::Of { host, life, event: Event::Done { seat, done } });
    }

    fn perform(&mut self, op: Op, began: Ms) -> Done {
        match op {
            Op::Beat { node, beat } => {
                self.requests.put += 1;
                let old = self.beats.get(&node).map(|old| [old.landed, old.before[0], old.before[1], old.before[2]]);
                let beat = Beat { landed: self.now, before: old.unwrap_or_default(), ..beat };
                self.beats.insert(node, beat);
                Done::Nothing
            }
            Op::List => {
                self.requests.list += 1;
                Done::Listed(self.beats.iter().map(|(node, beat)| (*node, beat.landed)).collect())
            }
            Op::Beats(nodes) => {
                self.requests.get += nodes.len() as u64;
                let beats = nodes.into_iter().map(|node| (node, self.beats.get(&node).copied())).collect();
                Done::Beats { began, beats }
            }
            Op::Journal => {
                self.requests.get += 1;
                Done::Journal { len: self.journal.len() }
            }
            Op::Append { at, record } => {
                self.requests.put += 1;
                let stands = at == self.journal.len();
                let mut record = record;
                if let Record::Formed(formed) = &mut record {
                    formed.at = self.now;
                    self.in_vain += u64::from(!stands);
                }
                if stands {
                    self.check_record(&record);
                    self.journal.push(record.clone());
                }
                Done::Appended { record, stands: Some(stands) }
            }
            Op::Bury(nodes) => {
                for node in nodes {
                    self.beats.remove(&node);
                }
                Done::Nothing
            }
        }
    }

    pub fn newest(&self) -> Option<&Formed> {
        self.journal.iter().rev().find_map(|record| match record {
            Record::Formed(formed) => Some(formed),
            _ => None,
        })
    }

    pub fn formed(&self) -> Vec<&Formed> {
        let mut formed = Vec::new();
        for record in &self.journal {
            if let Record::Formed(one) = record {
                formed.push(one);
            }
        }
        formed
    }

    /// Whether the newest generation's end is recorded.
    pub fn ended(&self) -> bool {
        let last = self.journal.iter().rev().find(|record| !matches!(record, Record::Committed(_)));
        !matches!(last, Some(Record::Formed(_)))
    }

    /// The journal itself: numbers fence whoever speaks for an older generation.
    fn check_record(&mut self, record: &Record) {
        let newest = self.newest().map_or(Generation(0), |formed| formed.roster.generation);
        let ended = self.ended();
        let wrong = match record {
            Record::Formed(formed) => formed.roster.generation != newest.next(),
            Record::Committed(generation) | Record::Interrupted(generation) => *generation != newest || ended,
        };
        if wrong {
            self.wrong.push(format!("{} s: {record:?} was appended behind generation {newest}", self.now / 1000));
        }
    }

    fn fault(&mut self, fault: Fault) {
        if self.tracing {
            self.trace.push(format!("{:>9.3} {fault:?}", self.now as f64 / 1e3));
        }
        match fault {
            Fault::Start(host) => {
                if !self.hosts[host].up {
                    self.start(host);
                    self.links_changed(host);
                }
            }
            Fault::Kill { host, refuses } => {
                if !self.hosts[host].up {
                    return;
                }
                let peers: Vec<Host> = (0..self.hosts.len()).filter(|peer| self.linked(host, *peer)).collect();
                let (node, old) = (self.hosts[host].node, &self.hosts[host]);
                let new = Machine {
                    life: old.life + 1,
                    refuses,
                    store: old.store,
                    node,
                    ..Machine::new(old.workers, old.skew)
                };
                self.hosts[host] = new;
                if refuses || !self.breakable {
                    for peer in peers.into_iter().filter(|peer| *peer != host) {
                        let pause = if refuses { 1 + self.below(4) } else { SILENCE + self.below(1000) };
                        self.after(peer, pause, Event::Lost { peer: node, refused: refuses });
                    }
                }
                self.links_changed(host);
            }
            Fault::Pause(host) => {
                self.hosts[host].paused = true;
                self.links_changed(host);
            }
            Fault::Resume(host) => self.resume(host),
            Fault::Link { from, to, up } => {
                self.up[from][to] = up;
                self.link_changed(from, to);
            }
            Fault::Again(host) => self.again(host),
            Fault::Store { host, up } => self.hosts[host].store = up,
            Fault::Trap { host, pause } => self.hosts[host].trap = Some(pause),
        }
    }

    fn resume(&mut self, host: Host) {
        self.hosts[host].paused = false;
        self.links_changed(host);
        for event in std::mem::take(&mut self.hosts[host].deferred) {
            self.after(host, 0, event);
        }
    }

    pub fn pause_for(&mut self, host: Host, pause: Ms) {
        self.hosts[host].paused = true;
        self.links_changed(host);
        self.plan(self.now + pause, Fault::Resume(host));
    }

    fn links_changed(&mut self, host: Host) {
        for other in 0..self.hosts.len() {
            if other != host && self.breakable {
                self.link_changed(host, other);
            }
        }
    }

    fn link_changed(&mut self, a: Host, b: Host) {
        let (a, b) = (a.min(b), a.max(b));
        let healthy = self.healthy(a, b);
        let epoch = self.silent.entry((a, b)).or_default();
        // Even: it was well.
        if healthy != epoch.is_multiple_of(2) {
            *epoch += 1;
            let epoch = *epoch;
            if !healthy {
                let pause = SILENCE + self.below(1000);
                self.push(self.now + pause, What::Silent { a, b, epoch });
            }
        }
    }

    fn silent(&mut self, a: Host, b: Host, epoch: u64) {
        if self.silent.get(&(a, b)) == Some(&epoch) {
            for (host, peer) in [(a, b), (b, a)] {
                // One that never started had no link.
                let peer = self.hosts[peer].node;
                if peer != Node::MAX {
                    self.after(host, 0, Event::Lost { peer, refused: false });
                }
            }
        }
    }
}

impl Machine {
    pub fn new(workers: u32, skew: i64) -> Self {
        Self {
            up: false,
            refuses: true,
            paused: false,
            life: 0,
            deferred: Vec::new(),
            store: true,
            trap: None,
            skew,
            workers,
            node: Node::MAX,
            seat: None,
            seats: 0,
            role: Role::Waiting,
            counter: 0,
            epoch: 0,
            read: 0,
            known: BTreeSet::new(),
            appending: false,
            failed: 0,
            broken: false,
            busy: 0,
            phase: Phase::Outside,
            generation: Generation(0),
            touch: BTreeSet::new(),
        }
    }
}
