//! One node's seat in the group: the loop around the policy, as a state machine without I/O and without a clock.
//!
//! The owner reads the store, holds the links and sets the timers. It tells the machine what it found ([`Input`]) and
//! does what the machine asks for ([`Output`]), in order. The simulation (`tests/rendezvous_sim`) and the program run
//! this same machine; only their owners differ.
//!
//! # A generation's way
//! ```text
//!           Invite ──►            ◄── Probe and Probed are between a node and its owner
//!  proposer         asked node
//!           ◄── Ready, or No                 Form ──► the journal
//!  leader ── Formed ──► member: reads the journal ── Hello ──► leader ── Welcome ──► member
//! ```
//! A follower that is asked by another node than its leader first asks its leader (`Ask`, `Here`): it vouches only for
//! a leader that answers now. A node that is ready keeps its promise from the moment at which it was asked.
//!
//! # Invariants
//! - A roster comes from the journal alone. A message makes the machine read, ask or wait, and nothing else.
//! - Between [`Output::Form`] or [`Output::StepDown`] and [`Input::Appended`] it proposes nothing. While the node's
//!   workers of the last generation are being ended ([`Input::Busy`]), it starts no round and appends nothing, and
//!   answers as ever; a round that has all its answers by then is held until the workers are gone.
//! - The first [`Output::Parted`] of a generation, and [`Output::CutOff`], are followed by a timer of zero and not by a
//!   proposal, so that an owner that says `Busy(true)` at once is in time.
//! - After [`Output::LeftOut`] or [`Output::HandOver`] the machine does nothing more. Its owner makes another one under
//!   a new id, which reads the journal from its beginning or from the newest `formed`.
//! - A stranger's message, one of an unknown round and one of a far generation change nothing; lists in messages are
//!   bounded by [`MOST_ASKED`].
//!
//! # Crash, retry, cancel
//! Nothing is stored: after a crash the journal and the heartbeats are all that is known. A request that failed
//! ([`Input::Failed`]) is repeated by the next look; a record whose fate is unknown is looked up in the journal. The
//! machine may be dropped at any moment; its node then looks dead, and is.

mod answers;
#[cfg(test)]
mod answers_tests;
mod beats;
mod journal;
mod looks;
mod rounds;
mod telling;
mod words;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;

pub use self::words::{Beat, Body, Input, Line, Me, Output, Timer};
use self::{
    answers::{Invitation, Probing, Promise},
    beats::{Judging, Suspect},
    rounds::Round,
};
use super::{
    heartbeat::PATIENCE,
    membership::Role,
    policy::{
        Bounds, Roster,
        roster::Candidate,
        succession::{self, Bereaved, CONFIRM, GoOn, Heir, TakeOver},
    },
};
use crate::ids::{Generation, NodeId};

/// The most nodes that an invitation or an answer names; a longer one is ignored.
pub const MOST_ASKED: usize = 4096;
/// A member that has not come to its leader so long after the generation was formed is lost.
pub const JOIN: Duration = Duration::from_secs(15);
/// A leader that has not answered a member's `Hello` for so long is lost. As long as a link may be silent.
pub const WELCOME: Duration = Duration::from_secs(5);

/// The rules that the simulation breaks on purpose. [`Sound`] are the real ones.
pub trait Rules {
    /// Whether a proposer may form although the leader may live.
    fn may_take_over(&self, heir: &Heir<'_>) -> (TakeOver, String) {
        succession::may_take_over(heir, PATIENCE)
    }
    /// A leader's way on after a loss.
    fn go_on(&self, view: &Bereaved<'_>, lost: Duration, bounds: Bounds) -> (GoOn, String) {
        succession::go_on(view, lost, bounds)
    }
    /// How long a node outside sees a leader's heartbeat stand still before it asks the others.
    fn patience(&self, listed_dead: bool) -> Duration {
        if listed_dead { CONFIRM } else { PATIENCE }
    }
    /// What the stamps of a list are compared with: this node's own stamp in the same list.
    fn beside(&self, own: Timestamp, _now: Duration) -> Timestamp {
        own
    }
    /// Whether a heartbeat that is missing is a tombstone.
    fn missing_is_left(&self) -> bool {
        false
    }
}

/// The real rules.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sound;

impl Rules for Sound {}

/// A node's part, in more detail than its heartbeat says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No member of the newest generation, or that one has ended.
    Outside,
    Follower,
    /// A member that lost its leader.
    CutOff,
    Leader,
    /// Left out, or handed over: this machine has ended.
    Gone,
}

/// The machine; see the [module](self).
#[derive(Debug)]
pub struct Seat<R> {
    me: Me,
    bounds: Bounds,
    rules: R,
    now: Duration,
    out: Vec<Output>,
    phase: Phase,
    said: Role,

    /// When the journal was last read; `None`: never, and so this node knows nothing.
    journal_at: Option<Duration>,
    newest: Option<Roster>,
    ended: bool,
    /// Members that said `Hello` for a generation that this node has not read, and until when each is waited with.
    early: BTreeMap<NodeId, (Generation, Duration)>,

    /// To a leader: the members that came, itself included.
    touch: BTreeSet<NodeId>,
    lost: BTreeSet<NodeId>,
    /// Since when its generation can't go on.
    broken: Option<Duration>,
    /// To a follower: its leader has seen it come.
    welcomed: bool,
    cut_off_at: Duration,
    suspect: Suspect,

    /// Nodes whose process is certainly gone, and the stamp of the beat that was listed next: one that beats later
    /// lives (a firewall had refused).
    gone: BTreeMap<NodeId, Option<Timestamp>>,
    leaving: BTreeSet<NodeId>,
    /// A generation has named this node: one that does not name it leaves it out.
    used: bool,
    /// The nodes that live, by id, without those that are gone.
    live: Vec<NodeId>,
    newcomer_at: Duration,
    enough_at: Option<Duration>,
    judging: Option<Judging>,

    rounds: u64,
    round: Option<Round>,
    appending: bool,
    /// Proposals that came to nothing, and when the last one did.
    failed: u32,
    failed_at: Duration,

    promised: Option<Promise>,
    probing: Option<Probing>,
    /// Invitations that wait for the journal or for the leader's answer, the oldest first.
    waiting: Vec<Invitation>,
    tickets: u64,

    busy: bool,
    kills: u32,
    /// The generation in which the last of them happened.
    killed: Generation,
    /// Saves that failed in a row because of this node, until it is trusted again.
    failed_saves: u32,

    /// Looks of an older epoch are over.
    epoch: u64,
    listed_at: Option<Duration>,
    waiting_since: Duration,
    /// When it thinks next, and the number of that timer.
    thought: Option<(Duration, u64)>,
    thoughts: u64,
    store_failed: bool,
    /// The last line of the log, and the last reason for what it does or waits for.
    told: String,
    why: String,
}

impl<R: Rules> Seat<R> {
    /// A node that knows nothing yet, and what it does first. `now`, here and later: this node's own monotonic time.
    pub fn new(me: Me, bounds: Bounds, rules: R, now: Duration) -> (Self, Vec<Output>) {
        let mut seat = Self {
            me,
            bounds,
            rules,
            now,
            out: vec![Output::Say { role: Role::Waiting, left: false }, Output::ReadJournal],
            phase: Phase::Outside,
            said: Role::Waiting,
            journal_at: None,
            newest: None,
            ended: false,
            early: BTreeMap::new(),
            touch: BTreeSet::new(),
            lost: BTreeSet::new(),
            broken: None,
            welcomed: false,
            cut_off_at: now,
            suspect: Suspect::default(),
            gone: BTreeMap::new(),
            leaving: BTreeSet::new(),
            used: false,
            live: Vec::new(),
            newcomer_at: now,
            enough_at: None,
            judging: None,
            rounds: 0,
            round: None,
            appending: false,
            failed: 0,
            failed_at: now,
            promised: None,
            probing: None,
            waiting: Vec::new(),
            tickets: 0,
            busy: false,
            kills: 0,
            killed: Generation(0),
            failed_saves: 0,
            epoch: 0,
            listed_at: None,
            waiting_since: now,
            thought: None,
            thoughts: 0,
            store_failed: false,
            told: String::new(),
            why: String::new(),
        };
        seat.look_soon();
        let out = std::mem::take(&mut seat.out);
        (seat, out)
    }

    /// Takes in what the owner found; what it is to do.
    pub fn handle(&mut self, input: Input, now: Duration) -> Vec<Output> {
        self.now = self.now.max(now);
        if self.phase != Phase::Gone {
            self.take(input);
        }
        std::mem::take(&mut self.out)
    }

    fn take(&mut self, input: Input) {
        self.store_failed &= !matches!(input, Input::Journal(_) | Input::Listed(_) | Input::Beats { .. });
        match input {
            Input::Timer(Timer(when)) => self.due(when),
            Input::Journal(lines) => self.journal(lines),
            Input::Listed(list) => self.listed(&list),
            Input::Beats { began, beats } => self.beats(began, beats),
            Input::Message { from, body } if from != self.me.member.node => self.message(from, body),
            Input::Message { .. } => {}
            Input::Lost { peer, refused } => self.lost(&peer, refused),
            Input::Probed { round, by, unreachable } => self.probed(round, &by, &unreachable),
            Input::Appended { stands } => self.appended(stands),
            // The next look asks again.
            Input::Failed => self.store_failed = true,
            Input::Busy(busy) => self.busy(busy),
            Input::Again { kills } => self.again(kills),
            Input::Leaving(nodes) => {
                self.leaving = nodes;
                self.leaving.remove(&self.me.member.node);
            }
            Input::Saved => self.grow(),
            Input::Fails { saves } => self.failed_saves = saves,
            Input::HandOver { why } => self.hand_over(why),
        }
    }

    fn message(&mut self, from: NodeId, body: Body) {
        match body {
            Body::Invite { asked, .. } if asked.len() > MOST_ASKED => {
                self.log(format!("{from} asks {} nodes, more than {MOST_ASKED}: ignored", asked.len()));
            }
            Body::Invite { round, generation, asked, program } => {
                self.invited(Invitation { from, round, generation, asked, program, read: false, ticket: None }, false);
            }
            Body::Ready { round, candidate } => self.ready(from, round, candidate),
            Body::No { round, leader_lives, why } => self.refused(from, round, leader_lives, &why),
            Body::Release => self.released(&from),
            Body::Formed { generation } => {
                if self.is_behind(generation) {
                    self.out.push(Output::ReadJournal);
                }
            }
            Body::Hello { generation } => self.greeted(from, generation),
            Body::Welcome { generation } => self.welcomed(from, generation),
            Body::Over { generation } => self.over_there(from, generation),
            Body::Bye { generation } => {
                if self.open().is_some_and(|roster| roster.generation == generation) {
                    self.lost(&from, false);
                }
            }
            Body::Ask { ticket } => self.asked(from, ticket),
            Body::Here { ticket } => self.vouched(&from, ticket),
        }
    }

    // What the parts of the machine share.

    fn since(&self, at: Duration) -> Duration {
        self.now.saturating_sub(at)
    }

    fn log(&mut self, text: String) {
        if self.told != text {
            self.out.push(Output::Log(text.clone()));
            self.told = text;
        }
    }

    /// A decision's reason: for the log, and for whoever asks.
    fn reason(&mut self, what: &str, why: String) {
        self.log(format!("{what}: {why}"));
        self.why = why;
    }

    fn send(&mut self, to: NodeId, body: Body) {
        self.out.push(Output::Send { to, body });
    }

    /// The newest generation, if it has no end.
    fn open(&self) -> Option<&Roster> {
        self.newest.as_ref().filter(|_| !self.ended)
    }

    fn leader(&self) -> Option<&NodeId> {
        self.open().and_then(Roster::leader)
    }

    fn is_me(&self, node: &NodeId) -> bool {
        self.me.member.node == *node
    }

    fn leads(&self, generation: Generation) -> bool {
        self.phase == Phase::Leader && self.open().is_some_and(|roster| roster.generation == generation)
    }

    fn is_behind(&self, generation: Generation) -> bool {
        self.newest.as_ref().is_none_or(|roster| roster.generation < generation)
    }

    fn is_member(&self, node: &NodeId) -> bool {
        self.newest.as_ref().is_some_and(|roster| roster.has(node))
    }

    /// The generation that comes next.
    fn next(&self) -> Generation {
        self.newest.as_ref().map_or(Generation(1), |roster| roster.generation.next())
    }

    /// Whether a node is certainly gone, or will go.
    fn goes(&self, node: &NodeId) -> bool {
        self.gone.contains_key(node) || self.leaving.contains(node)
    }

    /// Those nodes.
    fn going(&self) -> BTreeSet<NodeId> {
        self.gone.keys().chain(&self.leaving).cloned().collect()
    }

    fn role(&self) -> Role {
        match self.phase {
            Phase::Leader => Role::Leader,
            Phase::Follower | Phase::CutOff => Role::Follower,
            Phase::Outside | Phase::Gone => Role::Waiting,
        }
    }

    /// As itself, to whoever proposes.
    fn candidate(&self, unreachable: BTreeSet<NodeId>) -> Candidate {
        Candidate {
            member: self.me.member.clone(),
            program: self.me.program.clone(),
            unreachable,
            kills: self.kills,
            failed_saves: self.failed_saves,
        }
    }
}
