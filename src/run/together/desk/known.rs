//! What a node knows of the others of its run: what their heartbeats say, and why links to them ended.
//!
//! Whoever may write into the run's folder, or knock at the port, adds to it. So there is a bound: of more than
//! [`MOST`] nodes those are forgotten first that have left, then those that were met longest ago. A member of the
//! newest generation may be among them; the journal has its address and key, too.

use std::collections::{BTreeMap, BTreeSet};

use crate::{ids::NodeId, rendezvous::heartbeat::Group};

/// Nodes that are remembered: several times the largest group.
const MOST: usize = 4096;
/// Kinds of devices that are told of, one line each.
const KINDS: usize = 16;

/// The other nodes.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// What each one's newest heartbeat says, and when it was met, by a count.
    beats: BTreeMap<NodeId, (u64, Group)>,
    met: u64,
    /// Why the last link to a node ended.
    ends: BTreeMap<NodeId, String>,
    /// Kinds of devices that were told of.
    kinds: BTreeSet<String>,
}

impl Known {
    /// What a node's heartbeat says.
    pub fn get(&self, node: &NodeId) -> Option<&Group> {
        self.beats.get(node).map(|(_, group)| group)
    }

    /// A node's heartbeat was read; returns the nodes that are forgotten for it.
    pub fn meet(&mut self, node: &NodeId, group: &Group) -> Vec<NodeId> {
        self.met += 1;
        self.beats.insert(node.clone(), (self.met, group.clone()));
        let mut forgotten = Vec::new();
        while self.beats.len() > MOST {
            let oldest = self.beats.iter().min_by_key(|(_, (met, group))| (!group.left, *met));
            let Some(oldest) = oldest.map(|(node, _)| node.clone()) else { break };
            self.beats.remove(&oldest);
            self.ends.remove(&oldest);
            forgotten.push(oldest);
        }
        forgotten
    }

    /// A link to a node ended; whether the reason is another one than before.
    pub fn ended(&mut self, node: &NodeId, why: String) -> bool {
        if self.ends.len() >= MOST && !self.ends.contains_key(node) {
            // It may have no heartbeat at all.
            let stranger = self.ends.keys().find(|node| !self.beats.contains_key(*node)).cloned();
            let out = stranger.or_else(|| self.ends.keys().next().cloned());
            out.map(|node| self.ends.remove(&node));
        }
        self.ends.insert(node.clone(), why.clone()) != Some(why)
    }

    /// Why the last link to a node ended.
    pub fn end(&self, node: &NodeId) -> Option<&String> {
        self.ends.get(node)
    }

    /// Whether nodes of this kind were not told of yet; from now on they are.
    pub fn is_new_kind(&mut self, kind: &str) -> bool {
        self.kinds.len() < KINDS && self.kinds.insert(kind.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rendezvous::heartbeat::testing::group;

    fn id(at: usize) -> NodeId {
        NodeId::new(format!("n{at}")).unwrap()
    }

    #[test]
    fn of_too_many_nodes_those_are_forgotten_first_that_have_left_and_then_the_oldest() {
        let mut known = Known::default();
        for at in 0..MOST {
            assert!(known.meet(&id(at), &Group { left: at == 7, ..group() }).is_empty());
        }
        assert!(known.meet(&id(0), &group()).is_empty(), "it is met again");
        let forgotten: Vec<NodeId> = (0..3).flat_map(|more| known.meet(&id(MOST + more), &group())).collect();
        assert_eq!(forgotten, [id(7), id(1), id(2)]);
        assert!(known.get(&id(7)).is_none() && known.get(&id(0)).is_some() && known.get(&id(MOST)).is_some());
    }

    #[test]
    fn the_reason_of_an_end_is_news_once_and_there_are_only_so_many() {
        let mut known = Known::default();
        assert!(known.ended(&id(0), "silent".into()) && !known.ended(&id(0), "silent".into()));
        assert!(known.ended(&id(0), "refused".into()));
        let _ = known.meet(&id(0), &group());
        (1..2 * MOST).for_each(|at| _ = known.ended(&id(at), "silent".into()));
        assert_eq!((known.ends.len(), known.end(&id(0))), (MOST, Some(&"refused".to_owned())));
    }

    #[test]
    fn a_kind_is_told_of_once_and_not_without_end() {
        let mut known = Known::default();
        assert!(known.is_new_kind("A") && !known.is_new_kind("A"));
        assert_eq!((0..1000).filter(|at| known.is_new_kind(&at.to_string())).count(), KINDS - 1);
    }
}
