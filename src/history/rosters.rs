//! Who trained a run: the nodes of each generation, who came, who is gone and why. From records alone.

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    ids::{Generation, NodeId, WorldSize},
    journal::{Formation, FormedReason, Gone, RunState},
};

/// The nodes of one generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RosterView<'a> {
    /// The generation.
    pub generation: Generation,
    /// When it was formed, by its leader's clock.
    pub at: Timestamp,
    /// Its leader.
    pub leader: &'a NodeId,
    /// Its nodes.
    pub nodes: usize,
    /// Workers of all nodes.
    pub workers: WorldSize,
    /// Why it was formed.
    pub reason: FormedReason,
    /// The same in words, where the reason has none for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'a str>,
    /// The generation that goes on in it; `None`: a person or a boot started it.
    pub continues: Option<Generation>,
    /// The nodes that came.
    pub joined: &'a [NodeId],
    /// The nodes that are gone, and why.
    pub gone: &'a [Gone],
}

impl<'a> From<&'a Formation> for RosterView<'a> {
    fn from(formed: &'a Formation) -> Self {
        Self {
            generation: formed.generation,
            at: formed.at,
            leader: &formed.node,
            nodes: formed.roster.len(),
            workers: formed.world_size,
            reason: formed.reason,
            why: formed.succession.why.as_deref(),
            continues: formed.succession.continues,
            joined: &formed.succession.joined,
            gone: &formed.succession.gone,
        }
    }
}

/// The nodes of every generation, the oldest first; none if no generation had several nodes.
pub fn rosters(state: &RunState) -> Vec<RosterView<'_>> {
    if !state.formations().iter().any(Formation::is_of_several) {
        return Vec::new();
    }
    state.formations().iter().map(RosterView::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::{changed, created, formed, group, state};

    #[test]
    fn rosters_are_told_of_runs_with_several_nodes_alone() {
        assert_eq!(rosters(&state(vec![created(), formed(1, None, &[]), formed(2, None, &[])])), []);
        let records = vec![
            created(),
            formed(1, None, &[]),
            group(2, None, &[("a", 2), ("b", 2)]),
            changed(group(3, Some(2), &[("b", 2)]), &[("a", "it does not answer")], &[]),
        ];
        let state = state(records);
        let told = rosters(&state);
        let short: Vec<_> =
            told.iter().map(|roster| (roster.leader.as_str(), roster.nodes, roster.workers.get())).collect();
        assert_eq!(short, [("n1", 1, 2), ("a", 2, 4), ("b", 1, 2)]);
        assert_eq!((told[2].continues, told[2].gone[0].why.as_str()), (Some(Generation(2)), "it does not answer"));
    }
}
