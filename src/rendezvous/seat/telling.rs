//! What a seat tells whoever asks.

use super::{Phase, Rules, Seat};
use crate::{
    ids::{Generation, NodeId},
    rendezvous::{heartbeat::PATIENCE, policy::Roster},
};

impl<R: Rules> Seat<R> {
    /// The newest generation in the journal, whether or not it has ended.
    pub fn newest(&self) -> Option<&Roster> {
        self.newest.as_ref()
    }

    /// The nodes that it can go on with, itself included; see `policy::ending`.
    pub fn nodes(&self) -> usize {
        match self.phase {
            Phase::Leader => self.here().count() + self.outside().count(),
            Phase::Follower => self.newest.as_ref().map_or(1, |roster| roster.members.len()),
            Phase::CutOff | Phase::Outside | Phase::Gone => self.live.len().max(1),
        }
    }

    /// Whether this node takes part in `generation`, as its leader or a follower in touch, as far as it knows now.
    pub fn stands_in(&self, generation: Generation) -> bool {
        let works = matches!(self.phase, Phase::Leader | Phase::Follower);
        works && self.open().is_some_and(|roster| roster.generation == generation)
    }

    /// The members that this leader has lost.
    pub fn missing(&self) -> impl Iterator<Item = &NodeId> {
        self.lost.iter()
    }

    /// Whether a leader is at work, as far as this node knows: then there is something to wait for.
    pub fn is_led(&self) -> bool {
        let suspect = &self.suspect;
        match self.phase {
            Phase::Leader | Phase::Follower => self.open().is_some(),
            Phase::Outside => {
                let gone = suspect.left || suspect.refused || suspect.listed_dead;
                self.open().is_some() && !gone && suspect.watch.still() < PATIENCE
            }
            Phase::CutOff | Phase::Gone => false,
        }
    }

    /// What it does and waits for, as a sentence.
    pub fn explain(&self) -> String {
        let generation = self.newest.as_ref().map_or(0, |roster| roster.generation.get());
        let members = self.newest.as_ref().map_or(0, |roster| roster.members.len());
        let leader = self.leader().map_or("nobody", |leader| leader.as_str());
        let mut text = match self.phase {
            Phase::Gone => "this node has left its generation and comes back under a new id".to_owned(),
            _ if self.appending => format!("writes into the journal, after generation {generation}"),
            _ if self.round.is_some() => {
                format!("asks the others whether they are ready for generation {}", self.next())
            }
            Phase::Leader if self.broken.is_some() => {
                format!("leads generation {generation} of {members} nodes, which can't go on")
            }
            Phase::Leader if self.touch.len() < members => {
                format!("leads generation {generation}: {} of {members} nodes have come", self.touch.len())
            }
            Phase::Leader => format!("leads generation {generation} of {members} nodes"),
            Phase::Follower if self.welcomed => format!("follows {leader} in generation {generation}"),
            Phase::Follower => format!("waits for {leader}, which leads generation {generation}"),
            Phase::CutOff => format!("lost {leader}, which leads generation {generation}"),
            Phase::Outside if self.journal_at.is_none() => "reads the journal".to_owned(),
            Phase::Outside if self.open().is_some() => {
                format!("waits outside of generation {generation}, which {leader} leads")
            }
            Phase::Outside => format!("waits for generation {}", self.next()),
        };
        let working = matches!(self.phase, Phase::Follower) || self.phase == Phase::Leader && self.broken.is_none();
        if let Some(promise) = self.promised.as_ref().filter(|it| !working && it.until > self.now) {
            text = format!("{text}; it is ready for {}", promise.to);
        } else if !self.why.is_empty() && !working {
            text = format!("{text}: {}", self.why);
        }
        if self.busy {
            text.push_str("; workers of the last generation are still being ended");
        }
        if self.store_failed {
            text.push_str("; the store did not answer the last request");
        }
        text
    }
}
