//! When a node looks, and what it decides when it has looked.

use std::{collections::BTreeSet, time::Duration};

use super::{Output, Phase, Rules, Seat, Timer, rounds::Purpose};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{
        cost::FENCE,
        heartbeat::PATIENCE,
        membership::{FOLLOWER_JOURNAL, LOOK, Role, URGENT_LOOK, list_every},
        policy::{
            Roster,
            succession::{Bereaved, Candidacy, GoOn, Opening, PROPOSERS, Turn, who_proposes},
        },
    },
};

/// From a change of a node's part to its first look: its first beat is in the store by then.
const FIRST_LOOK: Duration = Duration::from_millis(300);
/// Time is compared in whole milliseconds: a timer that comes a fraction early would find nothing due.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// What a timer is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum When {
    Look(u64),
    Think(u64),
    Round(u64),
    Join(Generation),
    Welcome(Generation),
    /// The leader said that this generation is over.
    Over(NodeId, Generation),
    Vouch(u64),
    Early,
}

impl<R: Rules> Seat<R> {
    pub(super) fn after(&mut self, pause: Duration, when: When) {
        self.out.push(Output::After(pause, Timer(when)));
    }

    pub(super) fn due(&mut self, when: When) {
        match when {
            When::Look(epoch) if epoch == self.epoch => {
                let pause = self.look();
                self.after(pause, When::Look(epoch));
            }
            When::Think(number) if self.thought.is_some_and(|(_, it)| it == number) => {
                self.thought = None;
                self.think();
            }
            When::Round(id) if self.round.as_ref().is_some_and(|round| round.id == id) => self.conclude(),
            When::Join(generation) if self.leads(generation) => self.join_by(),
            When::Welcome(generation) => self.welcome_by(generation),
            When::Over(node, generation) if self.open().is_some_and(|it| it.generation == generation) => {
                self.lost(&node, false);
            }
            When::Vouch(ticket) => self.vouch_by(ticket),
            When::Early => self.greet_again(),
            // What it was for is over.
            When::Look(_) | When::Think(_) | When::Round(_) | When::Join(_) | When::Over(..) => {}
        }
    }

    /// This node's part changed: it looks as often as the new one needs.
    pub(super) fn look_soon(&mut self) {
        self.epoch += 1;
        self.after(FIRST_LOOK, When::Look(self.epoch));
    }

    /// Thinks after `pause`, or before.
    pub(super) fn think_in(&mut self, pause: Duration) {
        let at = self.now + pause;
        if self.thought.is_none_or(|(before, _)| at < before) {
            self.thoughts += 1;
            self.thought = Some((at, self.thoughts));
            self.after(pause, When::Think(self.thoughts));
        }
    }

    /// Asks the store for what is due; the pause until the next look.
    fn look(&mut self) -> Duration {
        let leader = self.leader().cloned();
        let lowest = self.live.is_empty() || self.live.iter().take(PROPOSERS).any(|node| self.is_me(node));
        let max = usize::try_from(self.bounds.max).unwrap_or(usize::MAX);
        let full = self.newest.as_ref().is_some_and(|roster| roster.members.len() >= max);
        // A member that found too few others looks for newcomers.
        let failing = self.phase == Phase::CutOff && self.failed > 0;
        let role = if failing { Role::Waiting } else { self.role() };
        let every = list_every(role, lowest && (leader.is_none() || failing), full, self.since(self.waiting_since));
        let due = |at: Option<Duration>, every: Duration| at.is_none_or(|at| self.now >= at + every);
        let list = every.is_some_and(|every| due(self.listed_at, every));
        let journal = due(self.journal_at, FOLLOWER_JOURNAL);
        if list {
            // The first list follows the first beat. Later, one's own beat may be old: then others look younger.
            self.listed_at = Some(self.now);
            self.out.push(Output::List);
        }
        match self.phase {
            Phase::Leader => {
                self.out.push(Output::ReadJournal);
                // A record that the store did not take is tried again.
                self.think();
                FENCE
            }
            Phase::Follower => {
                if journal {
                    self.out.push(Output::ReadJournal);
                }
                LOOK
            }
            Phase::CutOff => {
                self.out.push(Output::ReadJournal);
                self.out.push(Output::ReadBeats(leader.into_iter().collect()));
                self.think();
                URGENT_LOOK
            }
            Phase::Outside | Phase::Gone => {
                if leader.is_none() || journal {
                    self.out.push(Output::ReadJournal);
                }
                let watches = leader.is_some();
                if let Some(leader) = leader {
                    self.out.push(Output::ReadBeats(vec![leader]));
                }
                self.think();
                match every {
                    _ if watches && self.suspect.listed_dead => URGENT_LOOK,
                    Some(every) if !watches => every.min(LOOK),
                    _ => LOOK,
                }
            }
        }
    }

    /// Proposes if it is this node's turn and nothing speaks against it.
    pub(super) fn think(&mut self) {
        if self.busy || self.round.is_some() || self.appending || self.journal_at.is_none() {
            return;
        }
        if self.phase == Phase::Leader {
            if self.broken.is_some() {
                self.think_as_leader();
            }
            return;
        }
        if let Some(promise) = self.promised.as_ref().filter(|promise| promise.until > self.now) {
            let left = promise.until.saturating_sub(self.now);
            return self.think_in(left + TICK);
        }
        let still = self.suspect.watch.still();
        match self.phase {
            Phase::CutOff if !self.suspect.held_back || still >= PATIENCE || self.suspect.left => {
                self.think_of_a_loss(self.cut_off_at);
            }
            Phase::Outside if self.open().is_none() => self.think_of_a_start(),
            Phase::Outside if self.suspect.left || still >= self.rules.patience(self.suspect.listed_dead) => {
                self.think_of_a_loss(self.waiting_since);
            }
            _ => {}
        }
    }

    /// The members that are not known to be lost, this leader included.
    pub(super) fn here(&self) -> impl Iterator<Item = &NodeId> {
        let members = self.newest.iter().flat_map(|roster| &roster.members).map(|member| &member.node);
        members.filter(|node| !self.lost.contains(*node) && !self.goes(node))
    }

    /// Nodes that live and are no members.
    pub fn outside(&self) -> impl Iterator<Item = &NodeId> {
        self.live.iter().filter(|node| !self.is_member(node) && !self.goes(node))
    }

    fn think_as_leader(&mut self) {
        let Some(roster) = self.newest.clone() else { return };
        if !self.lost.is_empty() {
            let behind = self.here().cloned().collect();
            let nodes = self.nodes();
            let (next, why) = self.go_on(&roster, &behind, nodes);
            match next {
                GoOn::Reform => self.why = why,
                GoOn::Yield(pause) => return self.think_in(pause + TICK),
                GoOn::StepDown => return self.step_down(roster.generation, &why),
            }
        }
        let live = self.live.clone();
        self.ask_all(Purpose::Reform, roster.members.into_iter().map(|member| member.node).chain(live));
    }

    pub(super) fn go_on(&mut self, roster: &Roster, behind: &BTreeSet<NodeId>, nodes: usize) -> (GoOn, String) {
        let gone = self.going();
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        let view = Bereaved { roster, behind, gone: &gone, nodes };
        let (next, why) = self.rules.go_on(&view, self.since(self.broken.unwrap_or(self.now)), self.bounds);
        let what = match next {
            GoOn::Reform => "forms anew",
            GoOn::Yield(_) => "leaves it to others to form",
            GoOn::StepDown => "can't go on",
        };
        self.reason(what, why.clone());
        (next, why)
    }

    fn think_of_a_loss(&mut self, since: Duration) {
        let Some(roster) = self.newest.clone() else { return };
        let outside: Vec<NodeId> = self.outside().cloned().collect();
        let gone = self.going();
        let opening = Opening::Loss { roster: &roster, gone: &gone, outside: &outside };
        let turn = self.turn(opening, since);
        let live = self.live.clone();
        self.take_turn(turn, roster.members.iter().map(|member| member.node.clone()).chain(live));
    }

    fn think_of_a_start(&mut self) {
        let Some(enough) = self.enough_at else {
            self.why = format!("{} of at least {} nodes live", self.live.len(), self.bounds.min);
            return;
        };
        let live = self.live.clone();
        let turn = self.turn(Opening::Cold { live: &live }, enough);
        self.take_turn(turn, live);
    }

    fn turn(&mut self, opening: Opening<'_>, since: Duration) -> Turn {
        let since = if self.failed > 0 { self.failed_at } else { since };
        let quiet = self.since(self.newcomer_at);
        let view = Candidacy { opening, me: &self.me.member.node, failed: self.failed, quiet };
        let (turn, why) = who_proposes(&view, self.since(since), self.bounds);
        self.why = why;
        turn
    }

    fn take_turn(&mut self, turn: Turn, nodes: impl IntoIterator<Item = NodeId>) {
        match turn {
            Turn::Now => self.ask_all(Purpose::Form, nodes),
            Turn::In(pause) => self.think_in(pause + TICK),
            Turn::NotMine => {}
        }
    }
}
