//! What a node makes of heartbeats: who lives, whether a leader's beats stand still, whom a leader buries.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::Timestamp;

use super::{Beat, Output, Phase, Rules, Seat};
use crate::{
    ids::NodeId,
    rendezvous::{
        heartbeat::{PATIENCE, State},
        membership::{Judged, Listed, Watch, judge, may_bury, may_live},
        policy::succession::PROPOSERS,
    },
};

/// The pause between two reads of the journal because of what a heartbeat says.
const STALE: Duration = Duration::from_secs(5);

/// What this node knows of a leader that it does not reach.
#[derive(Debug, Default)]
pub(super) struct Suspect {
    pub(super) watch: Watch,
    /// When the last look began.
    pub(super) seen: Option<Duration>,
    pub(super) refused: bool,
    pub(super) left: bool,
    pub(super) listed_dead: bool,
    /// A proposal showed that the leader may live, and nothing new speaks against it since.
    pub(super) held_back: bool,
}

/// A list that is being judged: some heartbeats must be read for it.
#[derive(Debug)]
pub(super) struct Judging {
    own: Timestamp,
    stored: BTreeMap<NodeId, Timestamp>,
    /// Those that may live, by id.
    live: Vec<NodeId>,
    /// How many of them were read, or need not be.
    next: usize,
    /// How many of those live.
    found: usize,
    dead: BTreeSet<NodeId>,
    buried: Vec<NodeId>,
    /// Reads that were not answered yet.
    open: BTreeSet<NodeId>,
}

impl<R: Rules> Seat<R> {
    pub(super) fn listed(&mut self, list: &[Listed]) {
        // Without this node's own beat nothing can be said.
        let me = self.me.member.node.clone();
        let Some(own) = list.iter().find(|listed| listed.node == me).map(|listed| listed.stored) else { return };
        if self.phase == Phase::Follower {
            return;
        }
        let stored: BTreeMap<NodeId, Timestamp> =
            list.iter().map(|listed| (listed.node.clone(), listed.stored)).collect();
        self.raise(&stored);
        let live = may_live(list, &me);
        let mut open = BTreeSet::new();
        if self.phase == Phase::Leader {
            // The dead, to bury them, and who is new, for its address.
            let (lives, known): (BTreeSet<_>, BTreeSet<_>) = (live.iter().collect(), self.live.iter().collect());
            let dead = stored.keys().filter(|node| !lives.contains(node));
            open.extend(dead.chain(live.iter().filter(|node| !known.contains(node))).cloned());
            open.remove(&me);
        } else if self.phase == Phase::Outside {
            // A node that comes while a leader may be dead sees it in the same list.
            open.extend(self.leader().filter(|leader| stored.contains_key(*leader)).cloned());
        }
        let (dead, buried) = (BTreeSet::new(), Vec::new());
        let mut judging = Judging { own, stored, live, next: 0, found: 0, dead, buried, open };
        self.read_the_lowest(&mut judging);
        self.judge_on(judging);
    }

    /// Whoever was gone and beats later lives.
    fn raise(&mut self, stored: &BTreeMap<NodeId, Timestamp>) {
        let mut raised = Vec::new();
        for (node, seen) in &mut self.gone {
            let Some(at) = stored.get(node) else { continue };
            if *at > *seen.get_or_insert(*at) {
                raised.push(node.clone());
            }
        }
        for node in raised {
            self.log(format!("{node} was gone, and beats again"));
            self.gone.remove(&node);
        }
    }

    /// Asks for nodes in the order of their ids until enough of them are known to be alive.
    fn read_the_lowest(&self, judging: &mut Judging) {
        let mut wanted = PROPOSERS.saturating_sub(judging.found);
        while self.phase != Phase::Leader && wanted > 0 {
            let Some(node) = judging.live.get(judging.next).filter(|node| !self.is_me(node)) else { return };
            judging.next += 1;
            if !self.gone.contains_key(node) {
                judging.open.insert(node.clone());
                wanted -= 1;
            }
        }
    }

    /// Waits for what was asked for, or is done.
    fn judge_on(&mut self, judging: Judging) {
        if judging.open.is_empty() {
            return self.judged(judging);
        }
        self.out.push(Output::ReadBeats(judging.open.iter().cloned().collect()));
        self.judging = Some(judging);
    }

    pub(super) fn beats(&mut self, began: Duration, beats: Vec<(NodeId, Option<Beat>)>) {
        let mut judging = self.judging.take();
        for (node, beat) in beats {
            self.saw(began, &node, beat.as_ref());
            if let Some(judging) = &mut judging
                && judging.open.remove(&node)
            {
                self.weigh(judging, node, beat.as_ref());
            }
        }
        match judging {
            Some(mut judging) if judging.open.is_empty() => {
                self.read_the_lowest(&mut judging);
                self.judge_on(judging);
            }
            judging => self.judging = judging,
        }
        self.think();
    }

    /// A node that does not lead looked at its leader's heartbeat.
    fn saw(&mut self, began: Duration, node: &NodeId, beat: Option<&Beat>) {
        let late = self.suspect.seen.is_some_and(|seen| began < seen);
        if self.leader() != Some(node) || self.is_me(node) || late {
            return;
        }
        let missing_is_left = self.rules.missing_is_left();
        let suspect = &mut self.suspect;
        suspect.watch.saw(began, beat.map(|beat| beat.counter));
        suspect.seen = Some(began);
        suspect.left |= beat.map_or(missing_is_left, |beat| beat.group.left);
        // It no longer leads, or is dead: the journal says what came after it.
        let stale = suspect.watch.still() >= PATIENCE
            || beat.is_none_or(|beat| beat.group.left || beat.group.state != State::Leader);
        let read = self.journal_at.is_none_or(|at| self.now > at + STALE);
        if self.phase == Phase::Outside && stale && read {
            self.journal_at = self.journal_at.and(Some(self.now));
            self.out.push(Output::ReadJournal);
        }
    }

    /// What a heartbeat says of a node in the list.
    fn weigh(&mut self, judging: &mut Judging, node: NodeId, beat: Option<&Beat>) {
        let Some(stored) = judging.stored.get(&node).copied() else { return };
        let own = self.rules.beside(judging.own, self.now);
        let judged = beat.map(|beat| judge(own, stored, &beat.group).0);
        if self.phase == Phase::Leader {
            if judged == Some(Judged::Left) {
                self.gone.insert(node.clone(), Some(stored));
            }
            let formed = self.newest.as_ref().zip(judged).filter(|_| !judging.live.contains(&node));
            if formed.is_some_and(|(formed, judged)| may_bury(&self.me.member.node, &node, formed, judged).0) {
                judging.buried.push(node);
            }
            return;
        }
        if self.phase == Phase::Outside && self.leader() == Some(&node) {
            match judged {
                Some(Judged::Alive) => self.suspect.listed_dead = false,
                Some(Judged::Dead) => self.suspect.listed_dead = true,
                // `saw` has read the tombstone. One that is missing proves nothing.
                Some(Judged::Left) | None => {}
            }
        }
        match judged {
            Some(Judged::Alive) if judging.live[..judging.next].contains(&node) => judging.found += 1,
            Some(Judged::Alive) => {}
            Some(Judged::Left) => {
                self.gone.insert(node, Some(stored));
            }
            Some(Judged::Dead) | None => {
                judging.dead.insert(node);
            }
        }
    }

    /// The list has been judged.
    fn judged(&mut self, judging: Judging) {
        let Judging { live, dead, buried, .. } = judging;
        if !buried.is_empty() {
            self.out.push(Output::Bury(buried));
        }
        let live: Vec<NodeId> =
            live.into_iter().filter(|node| !dead.contains(node) && !self.gone.contains_key(node)).collect();
        let known: BTreeSet<&NodeId> = self.live.iter().collect();
        if live.iter().any(|node| !known.contains(node)) {
            (self.newcomer_at, self.failed) = (self.now, 0);
        }
        self.live = live;
        let enough = self.live.len() >= usize::try_from(self.bounds.min).unwrap_or(usize::MAX);
        self.enough_at = if enough { self.enough_at.or(Some(self.now)) } else { None };
        self.think();
    }
}
