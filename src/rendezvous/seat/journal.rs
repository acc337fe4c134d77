//! What a node reads in the journal, and what its part is then; how members come to their leader, and are lost.

use std::{collections::BTreeSet, time::Duration};

use super::{Body, JOIN, Line, Output, Phase, Rules, Seat, WELCOME, beats::Suspect, looks::When};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{membership::Role, policy::Roster},
};

/// A node that hears of a record reads it, and looks again after so long if it was not there.
const READ_AGAIN: Duration = Duration::from_millis(200);

impl<R: Rules> Seat<R> {
    pub(super) fn journal(&mut self, lines: Vec<Line>) {
        self.journal_at = Some(self.now);
        let before = self.newest.as_ref().map(|roster| roster.generation);
        let ended = self.ended;
        for line in lines {
            match line {
                Line::Formed(roster) => {
                    self.used |= roster.has(&self.me.member.node);
                    (self.newest, self.ended) = (Some(roster), false);
                }
                Line::Ended(generation) => {
                    self.ended |= self.newest.as_ref().is_some_and(|roster| roster.generation == generation);
                }
                Line::Committed(generation) => {
                    // It got further than where this node had ended it.
                    if generation > self.killed {
                        self.kills = 0;
                    }
                }
            }
        }
        self.change(before, ended);
        if self.phase == Phase::Gone {
            return;
        }
        self.greet_early();
        self.answer_after_reading(before != self.newest.as_ref().map(|roster| roster.generation));
        self.think();
    }

    /// What the journal makes of this node.
    fn change(&mut self, before: Option<Generation>, ended: bool) {
        let Some(newest) = &self.newest else { return };
        let generation = newest.generation;
        let (changed, leads) = (before != Some(generation), newest.leader() == Some(&self.me.member.node));
        if self.phase == Phase::Leader
            && (changed && !leads || self.ended)
            && let Some(before) = before
        {
            self.over_with(before);
        }
        if !changed {
            match self.phase {
                _ if !self.ended || ended => {}
                // It waits as before; the run may be complete.
                Phase::Outside => self.out.push(Output::Wait),
                _ => {
                    self.log(format!("generation {generation} has ended"));
                    self.forget();
                    self.wait();
                }
            }
            return;
        }
        self.forget();
        match self.newest.clone() {
            Some(newest) if leads && !self.ended => self.lead(newest),
            Some(newest) if newest.has(&self.me.member.node) && !self.ended => self.follow(newest),
            // Its id is used up, even if it had left that generation before: no later one may name it.
            Some(newest) if self.used && !newest.has(&self.me.member.node) => {
                self.log(format!("generation {generation} stands without this node"));
                self.leave(Output::LeftOut);
            }
            _ => self.wait(),
        }
    }

    /// A new generation stands, or this one ended: what was known of the old leader and the old members is over.
    fn forget(&mut self) {
        self.touch.clear();
        self.lost.clear();
        self.leaving.clear();
        self.suspect = Suspect::default();
        (self.welcomed, self.broken, self.failed) = (false, None, 0);
        (self.promised, self.probing, self.round, self.judging) = (None, None, None, None);
        self.why.clear();
    }

    fn say(&mut self) {
        let role = self.role();
        if self.said != role {
            self.said = role;
            self.out.push(Output::Say { role, left: false });
        }
    }

    fn wait(&mut self) {
        self.phase = Phase::Outside;
        (self.waiting_since, self.enough_at, self.listed_at) = (self.now, None, None);
        self.live.clear();
        self.say();
        self.out.push(Output::Wait);
        self.look_soon();
    }

    fn follow(&mut self, roster: Roster) {
        let generation = roster.generation;
        self.log(format!("follows in generation {generation}"));
        self.phase = Phase::Follower;
        self.say();
        if let Some(leader) = roster.leader() {
            self.send(leader.clone(), Body::Hello { generation });
        }
        self.after(WELCOME, When::Welcome(generation));
        self.out.push(Output::Follow(roster));
        self.look_soon();
    }

    fn lead(&mut self, roster: Roster) {
        let generation = roster.generation;
        let names: Vec<&str> = roster.members.iter().map(|member| member.node.as_str()).collect();
        self.log(format!("leads generation {generation} of {}", names.join(" ")));
        self.phase = Phase::Leader;
        self.listed_at = Some(self.now);
        self.touch = BTreeSet::from([self.me.member.node.clone()]);
        self.say();
        for member in roster.members.iter().skip(1) {
            self.send(member.node.clone(), Body::Formed { generation });
        }
        self.after(JOIN, When::Join(generation));
        self.out.push(Output::Lead(roster));
        self.look_soon();
    }

    /// The end of this machine.
    pub(super) fn leave(&mut self, end: Output) {
        self.phase = Phase::Gone;
        self.out.push(Output::Say { role: Role::Waiting, left: true });
        self.out.push(end);
    }

    /// Tells the members that this node leads them no longer.
    pub(super) fn over(&mut self) {
        if let Some(generation) = self.newest.as_ref().map(|roster| roster.generation) {
            self.over_with(generation);
        }
    }

    fn over_with(&mut self, generation: Generation) {
        for node in std::mem::take(&mut self.touch) {
            if !self.is_me(&node) {
                self.send(node, Body::Over { generation });
            }
        }
    }

    // How members come.

    pub(super) fn greeted(&mut self, from: NodeId, generation: Generation) {
        if self.is_behind(generation) {
            // This node's own record stands, and it has not read that yet.
            if self.early.len() < super::MOST_ASKED {
                self.early.insert(from, (generation, self.now + JOIN));
            }
            self.out.push(Output::ReadJournal);
            return self.after(READ_AGAIN, When::Early);
        }
        if !self.leads(generation) || !self.is_member(&from) {
            return self.send(from, Body::Over { generation });
        }
        self.send(from.clone(), Body::Welcome { generation });
        self.lost.remove(&from);
        self.touch.insert(from);
    }

    /// Answers those that came before this node had read of their generation.
    fn greet_early(&mut self) {
        let now = self.now;
        self.early.retain(|_, (_, until)| *until > now);
        let newest = self.newest.as_ref().map_or(Generation(0), |roster| roster.generation);
        let known: Vec<NodeId> =
            self.early.iter().filter(|(_, (it, _))| *it <= newest).map(|(node, _)| node.clone()).collect();
        for node in known {
            if let Some((generation, _)) = self.early.remove(&node) {
                self.greeted(node, generation);
            }
        }
    }

    pub(super) fn greet_again(&mut self) {
        let now = self.now;
        self.early.retain(|_, (_, until)| *until > now);
        if !self.early.is_empty() {
            self.out.push(Output::ReadJournal);
            self.after(READ_AGAIN, When::Early);
        }
    }

    pub(super) fn welcomed(&mut self, from: NodeId, generation: Generation) {
        let follows =
            self.phase == Phase::Follower && self.newest.as_ref().is_some_and(|it| it.generation == generation);
        if follows && self.leader() == Some(&from) {
            self.welcomed = true;
        } else {
            // This node has closed that connection long ago.
            self.send(from, Body::Bye { generation });
        }
    }

    pub(super) fn over_there(&mut self, from: NodeId, generation: Generation) {
        let its = self.leader() == Some(&from) && self.newest.as_ref().is_some_and(|it| it.generation == generation);
        if its || self.is_behind(generation) {
            // The journal may say why. The node itself may live on.
            self.out.push(Output::ReadJournal);
        }
        if its {
            self.after(READ_AGAIN, When::Over(from, generation));
        }
    }

    // How they are lost.

    /// Members that have not come in time are lost.
    pub(super) fn join_by(&mut self) {
        let late: Vec<NodeId> = self.here().filter(|node| !self.touch.contains(*node)).cloned().collect();
        for node in late {
            self.part(&node, "it did not come");
        }
    }

    pub(super) fn welcome_by(&mut self, generation: Generation) {
        let waits = self.phase == Phase::Follower && !self.welcomed;
        if let Some(roster) = self.open().filter(|roster| waits && roster.generation == generation)
            && let Some(leader) = roster.leader().cloned()
        {
            self.lost(&leader, false);
        }
    }

    /// A member is lost to this leader.
    pub(super) fn part(&mut self, node: &NodeId, why: &str) {
        self.touch.remove(node);
        if self.is_me(node) || !self.lost.insert(node.clone()) {
            return;
        }
        self.log(format!("lost {node}: {why}"));
        self.broken.get_or_insert(self.now);
        self.out.push(Output::Parted { node: node.clone(), why: why.into() });
        // Not at once: the owner has workers to end, and says so first.
        self.think_in(Duration::ZERO);
    }

    pub(super) fn lost(&mut self, peer: &NodeId, refused: bool) {
        if refused {
            self.gone.entry(peer.clone()).or_default();
            self.promised = self.promised.take().filter(|promise| promise.to != *peer);
        }
        let leader = self.leader() == Some(peer);
        let why = if refused { "its process is gone" } else { "the link to it ended" };
        match self.phase {
            Phase::Leader if self.is_member(peer) => self.part(peer, why),
            Phase::Follower if leader => {
                self.log(format!("lost its leader, {peer}: {why}"));
                self.phase = Phase::CutOff;
                self.welcomed = false;
                (self.cut_off_at, self.failed) = (self.now, 0);
                (self.suspect.refused, self.suspect.held_back) = (refused, false);
                self.out.push(Output::CutOff { why: format!("{peer} leads, and {why}") });
                self.look_soon();
                self.answer_without_a_leader();
                self.think_in(Duration::ZERO);
            }
            Phase::CutOff | Phase::Outside if leader && refused => {
                (self.suspect.refused, self.suspect.held_back) = (true, false);
                self.think_in(Duration::ZERO);
            }
            _ => {}
        }
        self.drop_from_round(peer);
    }
}
