//! Whether all ranks have the same state, decided without I/O.
//!
//! Ranks that compute the same update each for itself part silently when one of them computes or remembers wrongly; a
//! checkpoint, of which every rank writes a part, is then a mixture. So each rank says the fingerprint of what all
//! ranks have ([`crate::train::state`]) when it has loaded, and at every 16th save of a generation. One rank has nobody
//! to be compared with, and says nothing.
//!
//! | ranks differ | then |
//! |---|---|
//! | at a save | it is not committed; the group loads again from the newest checkpoint |
//! | when they have loaded | the group loads again |
//! | when they have loaded, though they loaded because they differed | see [`Difference::settle`] |
//!
//! More than half of all ranks are right, and the others are named with their nodes. If there is no such majority,
//! nobody knows who is right, and all are named.
//!
//! What lies between two comparisons is not known: a rank that went wrong ten saves ago has written its part into ten
//! checkpoints.
//!
//! *Crash:* the next generation compares again. *Retry:* as the table says. *Cancel:* nothing is under way.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    error::{Error, Kind},
    ids::{Fingerprint, NodeId, NodeRanks, Rank},
};

/// The most ranks that a text names.
const NAMED: usize = 8;

/// Which node has which ranks.
#[derive(Clone, Debug)]
pub struct Seats {
    me: NodeId,
    nodes: Vec<(NodeId, NodeRanks)>,
}

impl Seats {
    /// Of a leader with these ranks, and the other nodes of its generation.
    pub fn new(me: NodeId, own: NodeRanks, others: &[(NodeId, NodeRanks)]) -> Self {
        let nodes = std::iter::once((me.clone(), own)).chain(others.iter().cloned()).collect();
        Self { me, nodes }
    }

    /// Whether the generation has several nodes.
    pub fn are_several(&self) -> bool {
        self.nodes.len() > 1
    }

    /// Whether all ranks are of one node.
    pub fn are_of_one_node(&self) -> bool {
        self.nodes.len() == 1
    }

    fn of(&self, rank: Rank) -> Option<&NodeId> {
        self.nodes.iter().find(|(_, ranks)| ranks.local(rank).is_some()).map(|(node, _)| node)
    }
}

/// The fingerprints of one moment.
#[derive(Clone, Debug, Default)]
pub struct Roll(BTreeMap<Rank, Fingerprint>);

impl Roll {
    /// A rank's fingerprint. `Some`: it is the last of `ranks`, and they are not all the same.
    pub fn hear(&mut self, rank: Rank, fingerprint: Fingerprint, ranks: u32, seats: &Seats) -> Option<Difference> {
        self.0.insert(rank, fingerprint);
        if self.0.len() < ranks as usize {
            return None;
        }
        let mut votes: BTreeMap<Fingerprint, usize> = BTreeMap::new();
        for fingerprint in self.0.values() {
            *votes.entry(*fingerprint).or_default() += 1;
        }
        if votes.len() < 2 {
            return None;
        }
        let right = votes.into_iter().find(|(_, votes)| 2 * votes > self.0.len()).map(|(fingerprint, _)| fingerprint);
        let wrong = self.0.iter().filter(|(_, fingerprint)| Some(**fingerprint) != right);
        let wrong: Vec<Rank> = wrong.map(|(rank, _)| *rank).collect();
        Some(Difference::new(&wrong, right.is_some(), seats))
    }
}

/// Ranks whose states are not the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Whether this node has ranks that differ from the majority or, if there is none, any.
    has_me: bool,
    /// The other nodes that have such ranks.
    others: Vec<NodeId>,
    /// What differs, for people: ranks and nodes.
    pub what: String,
}

/// What becomes of nodes whose ranks differ again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// These other nodes are left out, and the group goes on without them.
    LeaveOut(Vec<NodeId>),
    /// This node ends; so do these others.
    GiveUp(Vec<NodeId>),
}

impl Difference {
    fn new(wrong: &[Rank], majority: bool, seats: &Seats) -> Self {
        let nodes: BTreeSet<&NodeId> = wrong.iter().filter_map(|rank| seats.of(*rank)).collect();
        let name = |rank: &Rank| match seats.of(*rank) {
            Some(node) => format!("worker {rank} of node {node}"),
            None => format!("worker {rank}"),
        };
        let named: Vec<String> = wrong.iter().take(NAMED).map(name).collect();
        let more = match wrong.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named = format!("{}{more}", named.join(", "));
        let what = if majority {
            format!("the ranks' states differ: {named} from all others")
        } else {
            format!("the ranks' states differ, and no majority says who is right: {named}")
        };
        let others = nodes.iter().filter(|node| ***node != seats.me).map(|node| (*node).clone()).collect();
        Self { has_me: nodes.contains(&seats.me), others, what }
    }

    /// What follows if they differ again, though all have just loaded the same bytes: a machine computes or remembers
    /// wrongly. Nodes that a majority names are left out if this one is not among them. Without a majority nobody can
    /// be trusted, and every node ends.
    pub fn settle(self) -> Remedy {
        if self.has_me { Remedy::GiveUp(self.others) } else { Remedy::LeaveOut(self.others) }
    }
}

/// The error of a node that must not go on.
pub fn wrong(what: &str) -> Error {
    let text =
        format!("this machine computes or remembers wrongly: {what}, though all had loaded the same bytes again");
    Error::new(Kind::Unavailable, text).with_hint(
        "replace the machine, or have its memory and its GPUs tested; every checkpoint before is still there, and \
         another machine can resume the run",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::WorldSize;

    fn id(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    /// `me` has ranks 0 and 1, `a` ranks 2 and 3, `b` rank 4.
    fn seats() -> Seats {
        let ranks = |first, workers| NodeRanks { first: Rank(first), workers, world: WorldSize(5) };
        Seats::new(id("me"), ranks(0, 2), &[(id("a"), ranks(2, 2)), (id("b"), ranks(4, 1))])
    }

    /// What the ranks say, in an order that is not theirs.
    fn roll(says: &[u64]) -> Option<Difference> {
        let mut roll = Roll::default();
        let ranks = u32::try_from(says.len()).unwrap();
        let mut found = None;
        for (rank, said) in says.iter().enumerate().rev() {
            assert!(found.is_none(), "decided before all have spoken");
            let rank = Rank(u32::try_from(rank).unwrap());
            // Said twice is said once.
            let _ = roll.hear(rank, Fingerprint(*said), ranks + 1, &seats());
            found = roll.hear(rank, Fingerprint(*said), ranks, &seats());
        }
        found
    }

    #[test]
    fn equal_states_are_no_difference() {
        assert_eq!(roll(&[7]), None);
        assert_eq!(roll(&[7, 7]), None);
        assert_eq!(roll(&[7, 7, 7, 7, 7]), None);
    }

    #[test]
    fn whoever_differs_from_the_majority_is_named_with_its_node() {
        let found = roll(&[7, 7, 7, 8, 7]).unwrap();
        assert_eq!(found.what, "the ranks' states differ: worker 3 of node a from all others");
        assert_eq!(found.settle(), Remedy::LeaveOut(vec![id("a")]));
        let found = roll(&[7, 7, 8, 9, 7]).unwrap();
        assert_eq!(found.what, "the ranks' states differ: worker 2 of node a, worker 3 of node a from all others");
        assert_eq!(found.settle(), Remedy::LeaveOut(vec![id("a")]));
        let found = roll(&[7, 7, 8, 7, 8]).unwrap();
        assert_eq!(found.settle(), Remedy::LeaveOut(vec![id("a"), id("b")]));
    }

    #[test]
    fn a_node_that_is_named_itself_ends_and_so_does_everybody_without_a_majority() {
        assert_eq!(roll(&[8, 7, 7, 7, 7]).unwrap().settle(), Remedy::GiveUp(vec![]));
        assert_eq!(roll(&[8, 7, 7, 9, 7]).unwrap().settle(), Remedy::GiveUp(vec![id("a")]));
        // Half is no majority.
        let found = roll(&[7, 7, 8, 8]).unwrap();
        assert!(
            found.what.starts_with("the ranks' states differ, and no majority says who is right: worker 0 of node me")
        );
        assert!(found.what.ends_with("worker 3 of node a"), "{}", found.what);
        assert_eq!(found.settle(), Remedy::GiveUp(vec![id("a")]));
        assert_eq!(roll(&[1, 2, 3, 4, 5]).unwrap().settle(), Remedy::GiveUp(vec![id("a"), id("b")]));
    }

    #[test]
    fn a_text_names_a_few_ranks() {
        let many = NodeRanks { first: Rank(0), workers: 100, world: WorldSize(100) };
        let mut roll = Roll::default();
        let found = (0..100).find_map(|rank| {
            roll.hear(Rank(rank), Fingerprint(u64::from(rank).min(80)), 100, &Seats::new(id("me"), many, &[]))
        });
        let what = found.unwrap().what;
        assert!(what.contains("worker 7 of node me and 92 more") && what.len() < 400, "{what}");
        let error = wrong(&what);
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.to_string().starts_with("this machine computes or remembers wrongly: "), "{error}");
    }
}
