//! Whose fault it is that saves fail, or don't end, and what follows: pure decisions.
//!
//! A save of several nodes is whole or nothing, so one node that can't reach the store costs all of them every
//! checkpoint. It is told apart by the others: their parts of the same save ended well. If nobody's part did, the store
//! is away for everybody, and a group that changed its nodes would only lose its workers' state, too.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{ids::NodeId, rendezvous::policy::ending::FAILED_SAVES};

/// How the parts of one save stand. A part that is in neither list has ended well.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Nodes whose part has not ended.
    pub missing: BTreeSet<NodeId>,
    /// Nodes whose part has failed, or was given up.
    pub failed: BTreeSet<NodeId>,
}

impl Standing {
    /// A save that has just begun.
    pub fn of(members: impl IntoIterator<Item = NodeId>) -> Self {
        Self { missing: members.into_iter().collect(), failed: BTreeSet::new() }
    }
}

/// The nodes of a generation.
#[derive(Clone, Debug)]
pub struct Group {
    /// The leader, which writes the manifest and the record.
    pub leader: NodeId,
    /// All nodes, the leader included.
    pub members: BTreeSet<NodeId>,
    /// Nodes without which nothing is trained.
    pub min: usize,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Consequence {
    /// Nothing.
    GoOn,
    /// These are no members of the next generation.
    LeaveOut(BTreeSet<NodeId>),
    /// The leader is at fault, and others lead better.
    HandOver,
    /// These are at fault, and too few nodes would be left without them.
    Stay(BTreeSet<NodeId>),
}

impl Group {
    /// Whose fault it is that a save is not a checkpoint; nobody's if no part ended well. If all parts did, the leader
    /// could not write the manifest or the record.
    pub fn at_fault(&self, standing: &Standing) -> BTreeSet<NodeId> {
        let found: BTreeSet<NodeId> = standing.missing.union(&standing.failed).cloned().collect();
        match found.len() {
            0 => BTreeSet::from([self.leader.clone()]),
            all if all >= self.members.len() => BTreeSet::new(),
            _ => found,
        }
    }

    /// What follows if the group goes on without these.
    pub fn without(&self, found: BTreeSet<NodeId>) -> Consequence {
        let left = self.members.difference(&found).count();
        if found.is_empty() {
            Consequence::GoOn
        } else if left < self.min.max(1) {
            Consequence::Stay(found)
        } else if found.contains(&self.leader) {
            Consequence::HandOver
        } else {
            Consequence::LeaveOut(found)
        }
    }

    /// The verdict on a save that was given up because it did not end.
    pub fn given_up(&self, standing: &Standing) -> Consequence {
        self.without(self.at_fault(standing))
    }
}

/// Saves that failed in a row, by the node at fault.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<NodeId, u32>);

impl Tally {
    /// A save is committed.
    pub fn saved(&mut self) {
        self.0.clear();
    }

    /// A save has failed: the verdict. Who can't be done without is named once, and again each time its failures have
    /// doubled.
    pub fn failed(&mut self, standing: &Standing, group: &Group) -> Consequence {
        let found = group.at_fault(standing);
        if found.is_empty() {
            return Consequence::GoOn;
        }
        self.0.retain(|node, _| found.contains(node));
        for node in found {
            let times = self.0.entry(node).or_default();
            *times = times.saturating_add(1);
        }
        let unfit = self.0.iter().filter(|(_, times)| **times >= FAILED_SAVES).map(|(node, _)| node.clone()).collect();
        match group.without(unfit) {
            Consequence::Stay(nodes) => {
                let due = |node: &NodeId| {
                    self.times(node).is_multiple_of(FAILED_SAVES) && (self.times(node) / FAILED_SAVES).is_power_of_two()
                };
                let nodes: BTreeSet<NodeId> = nodes.into_iter().filter(due).collect();
                if nodes.is_empty() { Consequence::GoOn } else { Consequence::Stay(nodes) }
            }
            verdict => verdict,
        }
    }

    /// How many saves in a row failed because of this node.
    pub fn times(&self, node: &NodeId) -> u32 {
        self.0.get(node).copied().unwrap_or(0)
    }
}

/// Why a save was given up, in words for the record of the next generation.
#[derive(Clone, Copy, Debug)]
pub enum Reason {
    /// This many in a row failed.
    Failed(u32),
    /// It did not end, or come further, in this many seconds, while the generation waited for it.
    Unfinished(u64),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(times) => write!(f, "its saves failed {times} times in a row, and others' did not"),
            Self::Unfinished(seconds) => {
                write!(f, "its save did not end in {seconds} s, and others' did")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &str) -> BTreeSet<NodeId> {
        names.split_whitespace().map(|name| NodeId::new(name).unwrap()).collect()
    }

    fn group(names: &str, min: usize) -> Group {
        Group { leader: NodeId::new("a").unwrap(), members: ids(names), min }
    }

    fn failed(names: &str) -> Standing {
        Standing { missing: ids(""), failed: ids(names) }
    }

    /// The verdicts on saves that fail one after the other because of these nodes; `!` is a commit.
    fn verdicts(group: &Group, saves: &[&str]) -> Vec<Consequence> {
        let mut tally = Tally::default();
        let verdict = |names: &&str| match *names {
            "!" => {
                tally.saved();
                Consequence::GoOn
            }
            names => tally.failed(&failed(names), group),
        };
        saves.iter().map(verdict).collect()
    }

    fn last(group: &Group, saves: &[&str]) -> Consequence {
        verdicts(group, saves).pop().unwrap()
    }

    #[test]
    fn a_node_whose_saves_fail_three_times_in_a_row_is_left_out_and_a_leader_hands_over() {
        let three = group("a b c", 2);
        let out = Consequence::LeaveOut(ids("b"));
        assert_eq!(verdicts(&three, &["b", "b", "b"]), [Consequence::GoOn, Consequence::GoOn, out.clone()]);
        assert_eq!(last(&three, &["a", "a", "a"]), Consequence::HandOver);
        assert_eq!(last(&three, &["", "", ""]), Consequence::HandOver, "all parts stand, and no record does");
        assert_eq!(last(&three, &["", "a", ""]), Consequence::HandOver);
        for interrupted in [["b", "b", "!", "b"], ["b", "b", "c", "b"], ["b", "b", "", "b"]] {
            assert_eq!(last(&three, &interrupted), Consequence::GoOn, "{interrupted:?}");
        }
        assert_eq!(last(&three, &["b c", "b", "b"]), out, "another one's failure is its own");
        assert_eq!(last(&three, &["a b", "a b", "a b"]), Consequence::Stay(ids("a b")), "one is too few");
    }

    #[test]
    fn a_store_that_is_away_for_all_is_nobodys_fault_and_changes_no_count() {
        let three = group("a b c", 1);
        assert_eq!(verdicts(&three, &["a b c"; 9]), vec![Consequence::GoOn; 9]);
        assert_eq!(last(&three, &["b", "b", "a b c", "b"]), Consequence::LeaveOut(ids("b")));
        assert_eq!(last(&group("a", 1), &["a"; 9]), Consequence::GoOn, "alone");
    }

    #[test]
    fn who_can_not_be_done_without_is_named_and_stays() {
        let two = group("a b", 2);
        let named: Vec<usize> = verdicts(&two, &["b"; 30])
            .iter()
            .enumerate()
            .filter(|(_, verdict)| **verdict == Consequence::Stay(ids("b")))
            .map(|(at, _)| at + 1)
            .collect();
        assert_eq!(named, [3, 6, 12, 24]);
        assert_eq!(last(&two, &["", "", ""]), Consequence::Stay(ids("a")), "a leader, too");
        assert_eq!(last(&group("a", 1), &["", "", ""]), Consequence::Stay(ids("a")), "and a node that is alone");
        assert_eq!(last(&group("a b", 1), &["b"; 3]), Consequence::LeaveOut(ids("b")));
    }

    #[test]
    fn a_save_that_does_not_end_is_the_fault_of_those_that_keep_it() {
        let standing = |missing: &str, failed: &str| Standing { missing: ids(missing), failed: ids(failed) };
        for (min, missing, failed, verdict) in [
            (2, "c", "", Consequence::LeaveOut(ids("c"))),
            (1, "c", "b", Consequence::LeaveOut(ids("b c"))),
            (2, "c", "b", Consequence::Stay(ids("b c"))),
            (1, "a", "", Consequence::HandOver),
            (1, "a b", "", Consequence::HandOver),
            (1, "", "", Consequence::HandOver),
            (1, "a b c", "", Consequence::GoOn),
            (1, "a", "b c", Consequence::GoOn),
        ] {
            assert_eq!(group("a b c", min).given_up(&standing(missing, failed)), verdict, "{missing:?} {failed:?}");
        }
    }
}
