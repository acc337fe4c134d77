//! One simulated agent around the real machine (`rendezvous::seat`): it tells the machine what happens in this world,
//! does what it asks for, and breaks rules on purpose. What an outsider sees of it is checked here, too.

use std::{collections::BTreeSet, rc::Rc, time::Duration};

use jiff::Timestamp;
use trainer::{
    ids::{Generation, NodeId, NodeKey},
    rendezvous::{
        cost::FENCE,
        heartbeat::{Group, PATIENCE, State},
        membership::{Listed, Role, beat_every},
        policy::{
            Bounds, Member, Roster,
            ending::FAILED_SAVES,
            roster::Formation,
            succession::{self, Bereaved, CONFIRM, GoOn, Ground, Heir, TakeOver, YIELD, may_take_over},
        },
        seat::{self, Body, Input, Line, Me, Output, Rules, Seat},
    },
};

use super::world::{Beat, Bug, COMMIT, Done, Event, Formed, Host, Machine, Ms, Node, Op, Phase, Record, Sim};

const PROGRAM: &str = "trainer 1";

fn ms(duration: Duration) -> Ms {
    duration.as_millis() as Ms
}

fn secs(ms: Ms) -> Duration {
    Duration::from_millis(ms)
}

/// The store stamps objects in whole seconds.
fn stamp(at: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + at.div_euclid(1000)).unwrap()
}

/// The real rules, or a broken one.
#[derive(Clone, Copy, Debug)]
pub struct Broken {
    bug: Bug,
    /// How wrong this machine's clock is.
    skew: i64,
}

impl Rules for Broken {
    fn may_take_over(&self, heir: &Heir<'_>) -> (TakeOver, String) {
        let member = heir.roster.has(heir.me);
        let half = heir.roster.workers_of(heir.behind) * 2 >= heir.roster.workers();
        match self.bug {
            Bug::HalfIsEnough if member && half => (TakeOver::Now(Ground::Majority), "half".into()),
            Bug::Stranger if !member => (TakeOver::Now(Ground::Majority), "a stranger".into()),
            _ => may_take_over(heir, PATIENCE),
        }
    }

    fn go_on(&self, view: &Bereaved<'_>, lost: Duration, bounds: Bounds) -> (GoOn, String) {
        succession::go_on(view, if self.bug == Bug::NoYield { YIELD } else { lost }, bounds)
    }

    fn patience(&self, listed_dead: bool) -> Duration {
        match self.bug {
            Bug::Stranger => Duration::ZERO,
            _ if listed_dead => CONFIRM,
            _ => PATIENCE,
        }
    }

    fn beside(&self, own: Timestamp, now: Duration) -> Timestamp {
        if self.bug == Bug::Clocks { stamp(ms(now) as i64 + self.skew) } else { own }
    }

    fn missing_is_left(&self) -> bool {
        self.bug == Bug::BuryFirst
    }
}

impl Sim {
    fn me(&self, host: Host) -> &Machine {
        &self.hosts[host]
    }

    fn my(&mut self, host: Host) -> &mut Machine {
        &mut self.hosts[host]
    }

    pub fn start(&mut self, host: Host) {
        let old = self.me(host).node;
        let life = self.me(host).life + 1;
        let before = self.me(host);
        let fresh = Machine { up: true, life, store: before.store, ..Machine::new(before.workers, before.skew) };
        self.hosts[host] = fresh;
        if old != Node::MAX {
            // Whoever still holds a connection to the old process learns that it is gone.
            for peer in 0..self.hosts.len() {
                if peer != host && self.linked(host, peer) {
                    self.after(peer, 5, Event::Lost { peer: old, refused: true });
                }
            }
        }
        self.sit_down(host);
    }

    /// A new node on this machine, and its seat.
    fn sit_down(&mut self, host: Host) {
        self.rename(host);
        let member = Member { node: self.id(host), workers: self.me(host).workers, kind: "A100".into() };
        let rules = Broken { bug: self.bug, skew: self.me(host).skew };
        let (seat, outputs) = Seat::new(Me { member, program: PROGRAM.into() }, self.bounds, rules, secs(self.now));
        let me = self.my(host);
        (me.seat, me.seats) = (Some(seat), me.seats + 1);
        (me.read, me.phase, me.appending) = (0, Phase::Outside, false);
        me.touch.clear();
        self.act(host, outputs);
    }

    fn tell(&mut self, host: Host, input: Input) {
        let now = secs(self.now);
        let Some(seat) = self.my(host).seat.as_mut() else { return };
        let outputs = seat.handle(input, now);
        self.act(host, outputs);
    }

    fn beat(&mut self, host: Host, left: bool) {
        self.my(host).counter += 1;
        let me = self.me(host);
        let every_s = beat_every(me.role, false).as_secs() as u32;
        let beat = Beat { counter: me.counter, landed: 0, before: [0; 4], role: me.role, every_s, left };
        let node = me.node;
        self.ask(host, Op::Beat { node, beat });
    }

    // What happens to the agent.

    pub fn handle(&mut self, host: Host, event: Event) {
        let seats = self.me(host).seats;
        match event {
            Event::Beat { epoch } if epoch == self.me(host).epoch => {
                self.beat(host, false);
                self.beat_later(host);
            }
            Event::Timer { seat, timer } if seat == seats => self.tell(host, Input::Timer(timer)),
            Event::Probed { seat, round, by, unreachable } if seat == seats => {
                let by = self.nodes[by].clone();
                self.tell(host, Input::Probed { round, by, unreachable });
            }
            Event::Done { seat, done } if seat == seats => self.done(host, done),
            Event::Message { to, from, body } if to == self.me(host).node => self.message(host, from, body),
            Event::Lost { peer, refused } => {
                let peer = self.nodes[peer].clone();
                self.tell(host, Input::Lost { peer, refused });
            }
            Event::Drain { generation } if self.leads(host, generation) => {
                self.requests.head += 1;
                self.after(host, ms(FENCE), Event::Drain { generation });
            }
            Event::Commit { generation } if self.leads(host, generation) => self.commit(host, generation),
            Event::Idle { seat, busy } if seat == seats && busy == self.me(host).busy => {
                self.tell(host, Input::Busy(false));
            }
            Event::Append { at, record } => self.ask(host, Op::Append { at, record }),
            // Of another life, another seat, another generation.
            _ => {}
        }
    }

    fn leads(&self, host: Host, generation: Generation) -> bool {
        let me = self.me(host);
        me.phase == Phase::Leader && me.generation == generation
    }

    fn message(&mut self, host: Host, from: Node, body: Body) {
        let me = self.me(host);
        match body {
            // A connection that broke while this machine was stopped.
            Body::Hello { .. } if !self.linked(host, self.owner[from]) => return,
            Body::Welcome { generation } if me.phase == Phase::Follower && me.generation == generation => {
                self.my(host).touch.insert(from);
            }
            _ => {}
        }
        self.my(host).known.insert(from);
        let from = self.nodes[from].clone();
        self.tell(host, Input::Message { from, body });
    }

    fn done(&mut self, host: Host, done: Done) {
        match done {
            Done::Nothing => {}
            Done::Failed => self.tell(host, Input::Failed),
            Done::Journal { len } => self.read(host, len),
            Done::Listed(list) => {
                let listed =
                    |(node, at): &(Node, Ms)| Listed { node: self.nodes[*node].clone(), stored: stamp(*at as i64) };
                let list = list.iter().map(listed).collect();
                self.tell(host, Input::Listed(list));
            }
            Done::Beats { began, beats } => {
                self.my(host).known.extend(beats.iter().filter(|(_, beat)| beat.is_some()).map(|(node, _)| *node));
                let read = |beat: Beat| seat::Beat { counter: beat.counter, group: group(&beat) };
                let beats = beats.into_iter().map(|(node, beat)| (self.nodes[node].clone(), beat.map(read))).collect();
                self.tell(host, Input::Beats { began: secs(began), beats });
            }
            Done::Appended { record: Record::Committed(generation), stands } => {
                self.committed(host, generation, stands);
            }
            Done::Appended { stands, .. } => {
                self.my(host).appending = false;
                self.tell(host, Input::Appended { stands });
            }
        }
    }

    fn read(&mut self, host: Host, len: usize) {
        let from = self.me(host).read.min(len);
        self.my(host).read = len.max(from);
        let mut lines = Vec::new();
        for record in &self.journal[from..len] {
            lines.push(match record {
                Record::Formed(formed) => {
                    self.hosts[host].known.extend(&formed.members);
                    Line::Formed((*formed.roster).clone())
                }
                Record::Committed(generation) => Line::Committed(*generation),
                Record::Interrupted(generation) => Line::Ended(*generation),
            });
        }
        self.tell(host, Input::Journal(lines));
    }

    /// A worker dies on a machine that leads.
    pub fn again(&mut self, host: Host) {
        let me = self.me(host);
        if me.up && !me.paused && me.phase == Phase::Leader {
            self.my(host).broken = true;
            self.end_workers(host);
            self.tell(host, Input::Again { kills: 1 });
        }
    }

    // What the agent does.

    fn act(&mut self, host: Host, outputs: Vec<Output>) {
        let seats = self.me(host).seats;
        for output in outputs {
            match output {
                Output::Say { role, left } => {
                    self.my(host).role = role;
                    self.beat(host, left);
                    self.my(host).epoch += 1;
                    self.beat_later(host);
                }
                Output::List => self.ask(host, Op::List),
                Output::ReadBeats(nodes) => {
                    let nodes = nodes.iter().map(|node| self.by_id[node]).collect();
                    self.ask(host, Op::Beats(nodes));
                }
                Output::ReadJournal => self.ask(host, Op::Journal),
                Output::Form { generation, formation, previous, ended, ground } => {
                    self.say(host, |_| format!("forms generation {generation}: {ground}"));
                    self.form(host, generation, &formation, previous.filter(|_| !ended));
                }
                Output::StepDown { generation } => self.append(host, Record::Interrupted(generation)),
                Output::Bury(nodes) => {
                    let nodes = nodes.iter().map(|node| self.by_id[node]).collect();
                    self.ask(host, Op::Bury(nodes));
                }
                Output::Send { to, body } => {
                    let to = self.by_id[&to];
                    if matches!(body, Body::Welcome { .. }) {
                        self.my(host).touch.insert(to);
                    }
                    self.send(host, to, body);
                }
                Output::Probe { round, by, nodes } => {
                    let reached = |node: &NodeId| self.linked(host, self.owner[self.by_id[node]]);
                    let unreachable: BTreeSet<NodeId> = nodes.into_iter().filter(|node| !reached(node)).collect();
                    let by = self.by_id[&by];
                    let pause = 2 + self.below(8);
                    self.after(host, pause, Event::Probed { seat: seats, round, by, unreachable });
                }
                Output::After(pause, timer) => self.after(host, ms(pause), Event::Timer { seat: seats, timer }),
                Output::Lead(roster) => self.lead(host, roster.generation),
                Output::Follow(roster) => {
                    let me = self.my(host);
                    (me.phase, me.generation) = (Phase::Follower, roster.generation);
                    me.touch.clear();
                }
                Output::Wait => {
                    self.my(host).phase = Phase::Outside;
                    self.my(host).touch.clear();
                }
                Output::Parted { node, .. } => {
                    let node = self.by_id[&node];
                    self.my(host).touch.remove(&node);
                    self.my(host).broken = true;
                    self.end_workers(host);
                }
                Output::CutOff { .. } => {
                    self.my(host).phase = Phase::Lost;
                    self.my(host).touch.clear();
                    self.end_workers(host);
                }
                Output::LeftOut | Output::HandOver => {
                    self.say(host, |_| "takes another seat".into());
                    return self.sit_down(host);
                }
                Output::Log(text) => self.say(host, |_| text),
            }
        }
    }

    fn beat_later(&mut self, host: Host) {
        let (every, epoch) = (ms(beat_every(self.me(host).role, false)), self.me(host).epoch);
        self.after(host, every, Event::Beat { epoch });
    }

    fn lead(&mut self, host: Host, generation: Generation) {
        let me = self.my(host);
        (me.phase, me.generation, me.touch) = (Phase::Leader, generation, BTreeSet::from([me.node]));
        (me.broken, me.failed) = (false, 0);
        self.after(host, 300, Event::Drain { generation });
        self.after(host, COMMIT, Event::Commit { generation });
    }

    /// The workers of the last generation need a while to end.
    fn end_workers(&mut self, host: Host) {
        let pause = self.below(self.ending.max(1));
        if pause > 0 {
            self.my(host).busy += 1;
            self.tell(host, Input::Busy(true));
            let me = self.me(host);
            self.after(host, pause, Event::Idle { seat: me.seats, busy: me.busy });
        }
    }

    fn form(&mut self, host: Host, generation: Generation, next: &Formation, open: Option<Roster>) {
        if let Some(roster) = &open {
            self.check_take_over(host, roster);
        }
        let members: Vec<Node> = next.places.iter().map(|place| self.by_id[&place.member.node]).collect();
        let places = next.places.iter().map(|place| place.member.clone()).collect();
        let roster = Rc::new(Roster { generation, members: places });
        let mut rank = 0;
        for place in &next.places {
            assert_eq!(place.first_rank.get(), rank);
            rank += place.member.workers;
        }
        let (at, now) = (self.me(host).read, self.now);
        let record = Record::Formed(Formed { roster, members, at: now });
        self.my(host).appending = true;
        // It may be stopped between its decision and its request, or right after that.
        let trap = self.my(host).trap.take();
        let early = self.bug == Bug::BuryFirst || self.below(2) == 0;
        let mut pause = 1;
        if self.bug == Bug::BuryFirst {
            let old = open.and_then(|old| old.leader().map(|leader| self.by_id[leader]));
            let dead = old.filter(|node| *node != self.me(host).node);
            let (seat, op) = (self.me(host).seats, Op::Bury(dead.into_iter().collect()));
            self.after(host, trap.unwrap_or(0) + 10, Event::Land { seat, op });
            pause = 100;
        }
        if early {
            self.after(host, pause, Event::Append { at, record });
        } else {
            self.ask(host, Op::Append { at, record });
        }
        if let Some(pause) = trap {
            self.pause_for(host, pause);
        }
    }

    fn append(&mut self, host: Host, record: Record) {
        self.my(host).appending = true;
        let at = self.me(host).read;
        self.ask(host, Op::Append { at, record });
    }

    fn commit(&mut self, host: Host, generation: Generation) {
        self.after(host, COMMIT, Event::Commit { generation });
        let me = self.me(host);
        let members = me.seat.as_ref().and_then(Seat::newest).map_or(0, |roster| roster.members.len());
        if members == me.touch.len() && !me.broken && !me.appending {
            self.append(host, Record::Committed(generation));
        }
    }

    fn committed(&mut self, host: Host, generation: Generation, stands: Option<bool>) {
        self.my(host).appending = false;
        let (read, len) = (self.me(host).read, self.journal.len());
        // If only the answer was lost, the journal, which it reads next, shows that the record stands.
        let shown = self.me(host).store && len > read;
        if stands.is_none() && !shown {
            let failed = self.me(host).failed + 1;
            self.my(host).failed = failed;
            if failed == FAILED_SAVES {
                self.tell(host, Input::HandOver { why: "its saves fail".into() });
            }
        } else if stands == Some(true) && self.leads(host, generation) {
            self.read(host, (read + 1).min(len));
            self.my(host).failed = 0;
            return self.tell(host, Input::Saved);
        }
        self.ask(host, Op::Journal);
    }

    // What an outsider sees.

    /// A leader that works with half of its workers or more, and whose beats arrive, is not taken over.
    fn check_take_over(&mut self, host: Host, roster: &Roster) {
        let members: Vec<Node> = roster.members.iter().map(|member| self.by_id[&member.node]).collect();
        let node = members[0];
        let owner = self.owner[node];
        let leader = &self.hosts[owner];
        let generation = roster.generation;
        if owner == host || !leader.up || leader.paused || leader.node != node || !self.leads(owner, generation) {
            return;
        }
        let works = |it: &Node| {
            let member = &self.hosts[self.owner[*it]];
            *it == node
                || leader.touch.contains(it)
                    && member.node == *it
                    && member.up
                    && !member.paused
                    && member.phase == Phase::Follower
                    && self.linked(owner, self.owner[*it])
        };
        let at_work = members.iter().filter(|it| works(it)).map(|it| self.nodes[*it].clone()).collect();
        let half = roster.workers_of(&at_work) * 2 >= roster.workers();
        let beat = self.beats.get(&node);
        let beats = beat.map(|beat| [beat.landed, beat.before[0], beat.before[1], beat.before[2], beat.before[3]]);
        let window = self.now.saturating_sub(12_000)..self.now.saturating_sub(7_000);
        let fresh = beats.unwrap_or_default().iter().any(|at| window.contains(at));
        if half && fresh {
            let me = self.id(host);
            self.wrong
                .push(format!("{} s: {me} takes generation {generation} over from a live leader", self.now / 1000));
        }
    }
}

fn group(beat: &Beat) -> Group {
    Group {
        address: String::new(),
        key: NodeKey::new("00".repeat(32)).unwrap(),
        every_s: beat.every_s,
        state: match beat.role {
            Role::Leader => State::Leader,
            Role::Follower => State::Member,
            Role::Waiting => State::Waiting,
        },
        kind: String::new(),
        workers: 1,
        program: String::new(),
        puts_off: None,
        unreachable: Vec::new(),
        left: beat.left,
    }
}
