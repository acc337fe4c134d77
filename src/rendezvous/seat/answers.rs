//! What a node says to whoever proposes.

use std::{collections::BTreeSet, time::Duration};

use super::{
    Body, Output, Phase, Rules, Seat,
    looks::{TICK, When},
};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::policy::succession::{self, Answer, Asked, PROMISE, VOUCH},
};

/// Invitations that wait for an answer, at most one of each proposer: more nodes than ever propose at once.
pub(super) const MOST_WAITING: usize = 64;

/// A question whether this node is ready.
#[derive(Debug)]
pub(super) struct Invitation {
    pub(super) from: NodeId,
    pub(super) round: u64,
    pub(super) generation: Generation,
    pub(super) asked: Vec<NodeId>,
    pub(super) program: String,
    /// The journal was read after it came.
    pub(super) read: bool,
    /// It waits for the leader's answer to this question; `None`: for the journal.
    pub(super) ticket: Option<u64>,
}

/// To whom this node said, or will say, "ready".
#[derive(Debug)]
pub(super) struct Promise {
    pub(super) to: NodeId,
    pub(super) until: Duration,
}

/// A "ready" that waits until this node knows whom it reaches.
#[derive(Debug)]
pub(super) struct Probing {
    round: u64,
    by: NodeId,
    nodes: BTreeSet<NodeId>,
}

impl<R: Rules> Seat<R> {
    /// Answers an invitation now or later; `vouched`: the leader has answered since it came.
    pub(super) fn invited(&mut self, invitation: Invitation, vouched: bool) {
        if self.journal_at.is_none() {
            // The first read is under way.
            return self.park(invitation);
        }
        let promised = self.promised.as_ref().filter(|promise| promise.until > self.now);
        let view = Asked {
            generation: invitation.generation,
            by: &invitation.from,
            program: &invitation.program,
            own_program: &self.me.program,
            newest: self.newest.as_ref(),
            ended: self.ended,
            in_touch: self.phase == Phase::Leader || self.phase == Phase::Follower && self.welcomed,
            promised: promised.map(|promise| &promise.to),
        };
        let (answer, why) = succession::answer(&view);
        match answer {
            Answer::LeaderLives if self.phase == Phase::Follower && !vouched => self.ask_leader(invitation),
            Answer::ReadOn if !invitation.read => {
                self.out.push(Output::ReadJournal);
                self.park(invitation);
            }
            Answer::Ready => self.promise(invitation, &why),
            Answer::LeaderLives | Answer::ReadOn | Answer::OtherProgram | Answer::Stale | Answer::Promised => {
                self.log(format!("is not ready for {}: {why}", invitation.from));
                let leader_lives = answer == Answer::LeaderLives;
                self.send(invitation.from, Body::No { round: invitation.round, leader_lives, why });
            }
        }
    }

    /// Keeps an invitation until it can be answered; whoever asked first is answered first.
    fn park(&mut self, invitation: Invitation) {
        self.waiting.retain(|other| other.from != invitation.from);
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push(invitation);
        }
    }

    /// A follower asks its leader before it vouches for it.
    fn ask_leader(&mut self, mut invitation: Invitation) {
        let Some(leader) = self.leader().cloned() else { return };
        self.tickets += 1;
        invitation.ticket = Some(self.tickets);
        self.park(invitation);
        self.send(leader, Body::Ask { ticket: self.tickets });
        self.after(VOUCH, When::Vouch(self.tickets));
    }

    /// A member asks whether this leader is there.
    pub(super) fn asked(&mut self, from: NodeId, ticket: u64) {
        if self.phase == Phase::Leader && self.is_member(&from) {
            self.send(from, Body::Here { ticket });
        } else if let Some(generation) = self.newest.as_ref().map(|roster| roster.generation) {
            // Whoever believes otherwise has not read what came since.
            self.send(from, Body::Over { generation });
        }
    }

    /// The leader answered all questions up to `ticket`.
    pub(super) fn vouched(&mut self, from: &NodeId, ticket: u64) {
        if self.phase == Phase::Follower && self.leader() == Some(from) {
            self.answer_those(true, |invitation| invitation.ticket.is_some_and(|it| it <= ticket));
        }
    }

    /// The leader's time to answer is over.
    pub(super) fn vouch_by(&mut self, ticket: u64) {
        let unanswered = self.waiting.iter().any(|invitation| invitation.ticket.is_some_and(|it| it <= ticket));
        if let Some(leader) = self.leader().filter(|_| unanswered && self.phase == Phase::Follower).cloned() {
            self.lost(&leader, false);
        }
    }

    /// The journal was read; `changed`: another generation is the newest.
    pub(super) fn answer_after_reading(&mut self, changed: bool) {
        for invitation in &mut self.waiting {
            invitation.read = true;
        }
        self.answer_those(false, |invitation| changed || invitation.ticket.is_none());
    }

    /// The leader is lost: nobody vouches for it.
    pub(super) fn answer_without_a_leader(&mut self) {
        self.answer_those(false, |invitation| invitation.ticket.is_some());
    }

    fn answer_those(&mut self, vouched: bool, which: impl Fn(&Invitation) -> bool) {
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting).into_iter().partition(which);
        self.waiting = later;
        for mut invitation in now {
            invitation.ticket = None;
            self.invited(invitation, vouched);
        }
    }

    /// This node is ready from now on, and says so when it knows whom it reaches.
    fn promise(&mut self, invitation: Invitation, why: &str) {
        let Invitation { from, round, asked, .. } = invitation;
        self.log(format!("is ready for {from}: {why}"));
        self.promised = Some(Promise { to: from.clone(), until: self.now + PROMISE });
        self.think_in(PROMISE + TICK);
        let nodes: BTreeSet<NodeId> = asked.into_iter().filter(|node| *node != from && !self.is_me(node)).collect();
        self.probing = Some(Probing { round, by: from.clone(), nodes: nodes.clone() });
        if nodes.is_empty() {
            self.probed(round, &from, &BTreeSet::new());
        } else {
            self.out.push(Output::Probe { round, by: from, nodes: nodes.into_iter().collect() });
        }
    }

    pub(super) fn probed(&mut self, round: u64, by: &NodeId, unreachable: &BTreeSet<NodeId>) {
        let its = self.probing.take_if(|probing| probing.round == round && probing.by == *by);
        let promised = self.promised.as_ref().is_some_and(|promise| promise.to == *by && promise.until > self.now);
        if let Some(probing) = its.filter(|_| promised) {
            let unreachable = probing.nodes.intersection(unreachable).cloned().collect();
            let candidate = self.candidate(unreachable);
            self.send(probing.by, Body::Ready { round, candidate });
        }
    }

    pub(super) fn released(&mut self, from: &NodeId) {
        self.promised = self.promised.take().filter(|promise| promise.to != *from);
    }
}
