//! A proposal: whom a node asks, what it makes of the answers, and what it appends.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    Body, MOST_ASKED, Output, Phase, Rules, Seat,
    looks::{TICK, When},
};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::policy::{
        Roster,
        roster::{Answers, Candidate, Composed, Formation, Why, compose, may_grow},
        succession::{ANSWER, GoOn, Heir, Leader, PROMISE, TakeOver},
    },
};

/// Why a node proposes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// There is no generation, or its leader is lost.
    Form,
    /// The one that it leads can't go on.
    Reform,
    /// It leads, all is well, and nodes wait.
    Grow,
}

/// An open proposal.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) id: u64,
    at: Duration,
    generation: Generation,
    purpose: Purpose,
    /// Who was asked and has not answered.
    open: BTreeSet<NodeId>,
    ready: BTreeMap<NodeId, Candidate>,
    /// A node that is in touch with the leader.
    vouched: Option<NodeId>,
    /// It has its answers or its time is over, and this node's workers are still being ended.
    held: bool,
}

impl<R: Rules> Seat<R> {
    pub(super) fn ask_all(&mut self, purpose: Purpose, nodes: impl IntoIterator<Item = NodeId>) {
        self.rounds += 1;
        let (id, generation, me) = (self.rounds, self.next(), self.me.member.node.clone());
        let nodes: BTreeSet<NodeId> = nodes.into_iter().filter(|node| *node != me && !self.goes(node)).collect();
        let open: BTreeSet<NodeId> = nodes.into_iter().take(MOST_ASKED - 1).collect();
        let names: Vec<&str> = open.iter().map(NodeId::as_str).collect();
        self.log(format!("proposes generation {generation} ({purpose:?}) to {}", names.join(" ")));
        let asked: Vec<NodeId> = open.iter().cloned().chain([me]).collect();
        for node in &open {
            let program = self.me.program.clone();
            self.send(node.clone(), Body::Invite { round: id, generation, asked: asked.clone(), program });
        }
        let (at, ready) = (self.now, BTreeMap::new());
        self.round = Some(Round { id, at, generation, purpose, open, ready, vouched: None, held: false });
        self.after(ANSWER, When::Round(id));
        self.check_answers();
    }

    /// Takes an answer to the open round from a node that was asked and has not answered.
    fn replied(&mut self, from: &NodeId, round: u64, apply: impl FnOnce(&mut Round)) {
        if let Some(open) = self.round.as_mut().filter(|open| open.id == round)
            && open.open.remove(from)
        {
            apply(open);
            self.check_answers();
        }
    }

    pub(super) fn ready(&mut self, from: NodeId, round: u64, candidate: Candidate) {
        let it_is = candidate.member.node == from && candidate.unreachable.len() <= MOST_ASKED;
        if it_is {
            self.replied(&from.clone(), round, |open| {
                open.ready.insert(from, candidate);
            });
        }
    }

    pub(super) fn refused(&mut self, from: NodeId, round: u64, leader_lives: bool, why: &str) {
        let told = format!("{from} is not ready: {why}");
        let mut counts = false;
        self.replied(&from.clone(), round, |open| {
            counts = true;
            open.vouched = open.vouched.take().or(leader_lives.then_some(from));
        });
        if counts {
            self.log(told);
        }
    }

    /// A node that is lost is not waited for, and forms nothing with this one.
    pub(super) fn drop_from_round(&mut self, peer: &NodeId) {
        if let Some(round) = &mut self.round {
            round.ready.remove(peer);
            if round.open.remove(peer) {
                self.check_answers();
            }
        }
    }

    fn check_answers(&mut self) {
        let Some(round) = &self.round else { return };
        // A leader that is silent is not waited for if the others are enough.
        let open = self.open();
        let leader = open.and_then(Roster::leader);
        let only_leader = round.open.iter().all(|node| Some(node) == leader);
        let enough = round.open.is_empty()
            || only_leader && open.is_some_and(|roster| roster.workers_of(&self.behind(round)) * 2 > roster.workers());
        if enough {
            self.conclude();
        }
    }

    fn behind(&self, round: &Round) -> BTreeSet<NodeId> {
        round.ready.keys().chain([&self.me.member.node]).cloned().collect()
    }

    fn fail(&mut self) {
        self.failed = self.failed.saturating_add(1);
        self.failed_at = self.now;
    }

    fn release(&mut self, round: &Round) {
        for node in round.ready.keys() {
            self.send(node.clone(), Body::Release);
        }
    }

    /// The round has its answers, or its time is over.
    pub(super) fn conclude(&mut self) {
        if self.busy {
            if let Some(round) = &mut self.round {
                round.held = true;
            }
            return;
        }
        let Some(round) = self.round.take() else { return };
        // Another generation came meanwhile.
        if round.generation != self.next() {
            return self.release(&round);
        }
        let mut grounds = Vec::new();
        if let Some(roster) = self.open().cloned() {
            let going = match round.purpose {
                Purpose::Form => self.as_heir(&round, &roster),
                Purpose::Reform => self.as_leader(&round, &roster),
                Purpose::Grow => Some(String::new()),
            };
            match going {
                Some(ground) => grounds.push(ground),
                None => return,
            }
        }
        self.compose(&round, grounds);
    }

    /// Whether this node may form the next generation although `roster` has no end: the reason, or `None`.
    fn as_heir(&mut self, round: &Round, roster: &Roster) -> Option<String> {
        let leader = Leader {
            refused: self.suspect.refused,
            left: self.suspect.left,
            still: self.suspect.watch.still(),
            listed_dead: self.suspect.listed_dead,
            seen: self.since(self.suspect.seen.unwrap_or_default()),
        };
        let (behind, asked) = (self.behind(round), self.since(round.at));
        let me = &self.me.member.node;
        let heir = Heir { roster, me, behind: &behind, leader, vouched: round.vouched.as_ref(), asked };
        let (next, why) = self.rules.may_take_over(&heir);
        let what = match next {
            TakeOver::Now(_) => "takes over",
            TakeOver::Wait => "does not take over",
        };
        self.reason(what, why.clone());
        if next != TakeOver::Wait {
            return Some(why);
        }
        (self.suspect.held_back, self.suspect.listed_dead) = (true, false);
        if self.phase == Phase::Outside {
            self.suspect.watch = Default::default();
        }
        self.release(round);
        self.fail();
        None
    }

    /// Whether this leader may form anew without those that are not ready: the reason, or `None`.
    fn as_leader(&mut self, round: &Round, roster: &Roster) -> Option<String> {
        let others = roster.members.iter().map(|member| &member.node).filter(|node| !self.is_me(node));
        let (ready, absent): (Vec<_>, Vec<_>) =
            others.cloned().partition(|node| round.ready.contains_key(node) || self.leaving.contains(node));
        for node in absent {
            self.part(&node, "it did not answer");
        }
        for node in ready {
            self.lost.remove(&node);
        }
        let (next, why) = self.go_on(roster, &self.behind(round), round.ready.len() + 1);
        match next {
            GoOn::Reform => Some(why),
            GoOn::Yield(pause) => {
                self.think_in(pause + TICK);
                None
            }
            GoOn::StepDown => {
                self.step_down(roster.generation, &why);
                None
            }
        }
    }

    fn compose(&mut self, round: &Round, mut grounds: Vec<String>) {
        let (own, ready) = (self.candidate(BTreeSet::new()), round.ready.values().cloned().collect::<Vec<_>>());
        let previous = self.newest.clone();
        let answers = Answers { proposer: &own, ready: &ready, previous: previous.as_ref() };
        let (composed, why) = compose(&answers, self.bounds);
        self.reason("composes", why.clone());
        grounds.push(why);
        match composed {
            Composed::Form(next) if round.purpose == Purpose::Grow => {
                let (grows, why) = match &previous {
                    Some(roster) => may_grow(roster, &next),
                    None => (false, "there is nothing to grow".into()),
                };
                self.reason(if grows { "grows" } else { "does not grow" }, why.clone());
                if grows {
                    return self.form(round.generation, next, previous, why);
                }
                self.release(round);
                // It may have lost members meanwhile, or ended.
                self.think_in(Duration::ZERO);
            }
            Composed::Form(mut next) => {
                self.tell_who_left(&mut next);
                grounds.retain(|ground| !ground.is_empty());
                self.form(round.generation, next, previous, grounds.join("; "));
            }
            Composed::Few(_) | Composed::Defer(_) if round.purpose == Purpose::Reform => {
                let generation = previous.map_or(Generation(0), |roster| roster.generation);
                self.step_down(generation, &grounds.join("; "));
            }
            Composed::Few(_) | Composed::Defer(_) => {
                self.release(round);
                if round.purpose == Purpose::Form {
                    self.fail();
                }
                self.think();
            }
        }
    }

    /// A leader that said good-bye is not taken for one that fell silent.
    fn tell_who_left(&self, next: &mut Formation) {
        let Some(leader) = self.leader().filter(|_| self.phase != Phase::Leader && self.suspect.left) else { return };
        for (node, why) in &mut next.out {
            if node == leader && *why == Why::Silent {
                *why = Why::Left;
            }
        }
    }

    fn form(&mut self, generation: Generation, formation: Formation, previous: Option<Roster>, ground: String) {
        self.appending = true;
        let ended = self.ended;
        self.out.push(Output::Form { generation, formation, previous, ended, ground });
    }

    pub(super) fn step_down(&mut self, generation: Generation, why: &str) {
        self.log(format!("steps down from generation {generation}: {why}"));
        self.appending = true;
        self.out.push(Output::StepDown { generation });
    }

    pub(super) fn appended(&mut self, stands: Option<bool>) {
        if !std::mem::take(&mut self.appending) {
            return;
        }
        // Whether it stands or another one does: the journal says so.
        self.out.push(Output::ReadJournal);
        if stands.is_none() {
            self.log("nobody knows whether the record stands".into());
            self.fail();
        }
    }

    pub(super) fn busy(&mut self, busy: bool) {
        self.busy = busy;
        if busy {
            return;
        }
        match self.round.take_if(|round| round.held) {
            // Whoever was ready may have turned to another proposer by now.
            Some(round) if self.since(round.at) > PROMISE => self.release(&round),
            Some(round) => {
                self.round = Some(round);
                self.conclude();
            }
            None => {}
        }
        self.think();
    }

    pub(super) fn again(&mut self, kills: u32) {
        self.kills = kills;
        self.killed = self.newest.as_ref().map_or(Generation(0), |roster| roster.generation);
        if self.phase == Phase::Leader && self.open().is_some() {
            self.broken.get_or_insert(self.now);
            self.log(format!("generation {} ended here: forms anew", self.killed));
            self.think();
        }
    }

    /// It comes back as another node when it reaches the store.
    pub(super) fn hand_over(&mut self, why: String) {
        if self.phase == Phase::Leader && self.open().is_some() {
            self.reason("hands over", why);
            self.over();
            self.leave(Output::HandOver);
        }
    }

    /// After a commit, nodes that wait may join.
    pub(super) fn grow(&mut self) {
        let Some(roster) = self.open().filter(|_| self.phase == Phase::Leader) else { return };
        let room = roster.members.len() < usize::try_from(self.bounds.max).unwrap_or(usize::MAX);
        let idle = !self.busy && self.broken.is_none() && self.round.is_none() && !self.appending;
        if !room || !idle {
            return;
        }
        let waiting: Vec<NodeId> = self.outside().cloned().collect();
        if !waiting.is_empty() {
            let members: Vec<NodeId> = roster.members.iter().map(|member| member.node.clone()).collect();
            self.ask_all(Purpose::Grow, members.into_iter().chain(waiting));
        }
    }
}
