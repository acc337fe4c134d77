//! What a node's seat hears of the journal: which generations were formed and which have ended, in order.

use crate::{
    ids::Generation,
    journal::{self, RosterEntry, RunState},
    rendezvous::{
        policy::{Member, Roster},
        seat::Line,
    },
};

/// What the seat knows of the journal.
#[derive(Debug, Default)]
pub(super) struct Read {
    newest: Generation,
    ended: bool,
}

impl Read {
    /// What is new in `state`, in order.
    pub(super) fn lines(&mut self, state: &RunState) -> Vec<Line> {
        let mut lines = Vec::new();
        let before = self.newest;
        let new = state.formations().iter().filter(|formed| formed.generation > before);
        for formed in new {
            lines.push(Line::Formed(roster_of(formed.generation, &formed.roster)));
            (self.newest, self.ended) = (formed.generation, false);
        }
        if !self.ended && self.newest > Generation(0) && has_ended(state, self.newest) {
            self.ended = true;
            lines.push(Line::Ended(self.newest));
        }
        lines
    }
}

/// A stored roster, as policy sees it: what its nodes compute with, it does not say.
fn roster_of(generation: Generation, entries: &[RosterEntry]) -> Roster {
    let member = |entry: &RosterEntry| Member { node: entry.node.clone(), workers: entry.workers, kind: String::new() };
    Roster { generation, members: entries.iter().map(member).collect() }
}

/// Whether the end of the newest generation is recorded.
pub(super) fn has_ended(state: &RunState, newest: Generation) -> bool {
    let said = state.interruptions().iter().any(|end| end.generation == newest);
    said || *state.outcome() != journal::Outcome::Open
}
