//! A save that a leader has ordered of every node of its generation: the account of its attempt, and what a successor
//! can make of it. Pure; nothing is stored.
//!
//! # Protocol
//! The leader makes an attempt id and orders the save of every node, itself included. Each node uploads its files and
//! its receipt, which names the attempt, and says that the save has *ended* there: with the receipt, or without. The
//! leader creates the manifest from the receipts and commits.
//!
//! # Invariants
//! - **A receipt of another attempt counts for nothing**, neither as files nor as an end. It may have come late, or be
//!   of a save that was repeated; its node may still be uploading for this one.
//! - **A slot is given out again once the save in it has ended on every node** ([`Ordered::is_over`]), whatever became
//!   of it. A node that fails, or a leader that has lost patience, says nothing about the uploads of the others: pages
//!   written over meanwhile would be torn, and their checksum, which is summed as they are sent, would not show it.
//! - **An abandoned save is never committed**, whatever receipts come later.
//!
//! # Crash, retry, cancel
//! If the leader dies, so does its account. The receipts are in the store; a member that was given the order knows the
//! attempt, and [`prospect`] says whether the save can still be finished. Two members, or a member and a leader that
//! was taken for dead, may finish one save at once: of one attempt they create the same manifest, byte for byte, and
//! the record of the second is found to stand. A repeated save is a new attempt.

use std::collections::{BTreeMap, BTreeSet};

use super::save::{Receipt, Save, assemble};
use crate::ids::{AttemptId, NodeId};

/// How a save ended on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Put(Receipt),
    Failed,
}

/// What a leader knows of the save that it has ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ordered {
    attempt: AttemptId,
    /// Of each node; `None`: it has not ended there.
    ends: BTreeMap<NodeId, Option<End>>,
    abandoned: bool,
}

impl Ordered {
    /// The save `attempt`, ordered of these nodes.
    pub fn new(attempt: AttemptId, nodes: impl IntoIterator<Item = NodeId>) -> Self {
        let ends = nodes.into_iter().map(|node| (node, None)).collect();
        Self { attempt, ends, abandoned: false }
    }

    /// A node says that its part of `attempt` has ended, with its receipt or without. The first word of a node counts.
    /// The error says why it counts for nothing.
    pub fn ended(&mut self, node: &NodeId, attempt: &AttemptId, receipt: Option<Receipt>) -> Result<(), String> {
        if *attempt != self.attempt {
            return Err(format!("node {node} has ended attempt {attempt}, not {}", self.attempt));
        }
        if receipt.as_ref().is_some_and(|receipt| receipt.attempt != *attempt || receipt.node != *node) {
            return Err(format!("node {node} has a receipt that is not for its part of attempt {attempt}"));
        }
        match self.ends.get_mut(node) {
            None => Err(format!("node {node} has no part in attempt {attempt}")),
            Some(Some(_)) => Err(format!("node {node} has ended its part of attempt {attempt} before")),
            Some(end) => {
                *end = Some(receipt.map_or(End::Failed, End::Put));
                Ok(())
            }
        }
    }

    /// Its receipts are not waited for any more, and it is never committed. It is not over yet.
    pub fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Whether it has ended on every node: its slots may be given out again.
    pub fn is_over(&self) -> bool {
        self.ends.values().all(Option::is_some)
    }

    /// The receipts to commit it from; the error says why it can't be committed, or not yet.
    pub fn receipts(&self) -> Result<Vec<Receipt>, CannotCommit> {
        if self.abandoned {
            return Err(CannotCommit::Abandoned);
        }
        let receipt = |(node, end): (&NodeId, &Option<End>)| match end {
            Some(End::Put(receipt)) => Ok(receipt.clone()),
            Some(End::Failed) => Err(CannotCommit::Failed(node.clone())),
            None => Err(CannotCommit::Waits(node.clone())),
        };
        self.ends.iter().map(receipt).collect()
    }
}

/// Why a save can't be committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CannotCommit {
    /// It was abandoned.
    Abandoned,
    /// It failed on this node.
    Failed(NodeId),
    /// Not yet: it has not ended on this node.
    Waits(NodeId),
}

/// What a member can make of the save that its lost leader had ordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prospect {
    /// All its files are put: create the manifest from these receipts, and commit.
    Whole(Vec<Receipt>),
    /// These files are not put yet, and survivors hold them: wait for as long as such an upload takes.
    Waits(Vec<String>),
    /// It can't be finished: why.
    Lost(String),
}

/// Judges the save of which `order` has the attempt and the step. `found`: the receipts in its folder. `expected`: the
/// name of every file, over all nodes. `held`: those that survivors have in their slots and still upload.
///
/// Nothing here proves that the leader is dead. It need not be: [the module's header](self) says why two may finish one
/// save.
pub fn prospect(order: &Save, found: &[Receipt], expected: &[String], held: &BTreeSet<String>) -> Prospect {
    let ours: Vec<Receipt> = found.iter().filter(|receipt| receipt.attempt == order.attempt).cloned().collect();
    let put: BTreeSet<&String> = ours.iter().flat_map(|receipt| &receipt.files).map(|file| &file.name).collect();
    let missing: Vec<&String> = expected.iter().filter(|name| !put.contains(name)).collect();
    if let Some(lost) = missing.iter().find(|name| !held.contains(**name)) {
        return Prospect::Lost(format!("no survivor has file {lost}, and no receipt of this attempt names it"));
    }
    if !missing.is_empty() {
        return Prospect::Waits(missing.into_iter().cloned().collect());
    }
    match assemble(order, &ours, expected) {
        Ok(_) => Prospect::Whole(ours),
        Err(reason) => Prospect::Lost(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{
        save::put_shards,
        testing::{expected, memory_store, save},
    };

    /// Receipts of two nodes for one attempt, the order, and the names of all files.
    async fn two_parts() -> (Save, [Receipt; 2], Vec<String>) {
        let all = save(7, 2, 2, 1);
        let store = memory_store();
        let part = |keep: &str, small| Save {
            node: NodeId::random(),
            uploads: all.uploads.iter().filter(|upload| upload.name.contains(keep)).cloned().collect(),
            small,
            ..all.clone()
        };
        let (first, second) = (part("-00001-of", all.small.clone()), part("-00002-of", vec![]));
        let receipts =
            [put_shards(&store, &first, |_| {}).await.unwrap(), put_shards(&store, &second, |_| {}).await.unwrap()];
        let names = expected(&all);
        (all, receipts, names)
    }

    fn ordered(order: &Save, receipts: &[Receipt; 2]) -> Ordered {
        Ordered::new(order.attempt.clone(), receipts.iter().map(|receipt| receipt.node.clone()))
    }

    #[tokio::test]
    async fn a_save_is_committed_from_the_receipts_of_every_node_for_this_attempt() {
        let (order, receipts, _) = two_parts().await;
        let mut save = ordered(&order, &receipts);
        let [first, second] = receipts.clone();
        save.ended(&first.node, &order.attempt, Some(first.clone())).unwrap();
        assert_eq!(save.receipts(), Err(CannotCommit::Waits(second.node.clone())));
        assert!(!save.is_over());
        let other = AttemptId::random();
        let late = Receipt { attempt: other.clone(), ..second.clone() };
        let stranger = NodeId::random();
        for (node, attempt, receipt, part) in [
            (&second.node, &other, Some(late.clone()), "has ended attempt"),
            (&second.node, &other, None, "has ended attempt"),
            (&second.node, &order.attempt, Some(late), "not for its part"),
            (&second.node, &order.attempt, Some(first.clone()), "not for its part"),
            (&stranger, &order.attempt, None, "no part"),
            (&first.node, &order.attempt, None, "before"),
        ] {
            let refused = save.ended(node, attempt, receipt).unwrap_err();
            assert!(refused.contains(part), "{part}: {refused}");
            assert!(!save.is_over(), "{part}");
        }
        save.ended(&second.node, &order.attempt, Some(second.clone())).unwrap();
        assert!(save.is_over());
        let mut found = save.receipts().unwrap();
        found.sort_by(|a, b| a.files.len().cmp(&b.files.len()).reverse());
        assert_eq!(found, receipts);
    }

    #[tokio::test]
    async fn a_save_that_failed_on_one_node_is_over_when_the_others_have_ended() {
        let (order, receipts, _) = two_parts().await;
        let [first, second] = receipts.clone();
        let mut save = ordered(&order, &receipts);
        save.ended(&first.node, &order.attempt, None).unwrap();
        assert!(!save.is_over(), "the other one still reads its pages");
        save.ended(&second.node, &order.attempt, Some(second.clone())).unwrap();
        assert!(save.is_over());
        assert_eq!(save.receipts(), Err(CannotCommit::Failed(first.node)));
    }

    #[tokio::test]
    async fn an_abandoned_save_is_never_committed_and_not_over_before_its_end() {
        let (order, receipts, _) = two_parts().await;
        let mut save = ordered(&order, &receipts);
        save.abandon();
        assert!(!save.is_over());
        for receipt in receipts {
            save.ended(&receipt.node.clone(), &order.attempt, Some(receipt)).unwrap();
        }
        assert!(save.is_over());
        assert_eq!(save.receipts(), Err(CannotCommit::Abandoned));
    }

    #[tokio::test]
    async fn a_member_finishes_a_save_whose_files_are_put_or_held() {
        let (order, receipts, names) = two_parts().await;
        let [first, second] = receipts.clone();
        let held: BTreeSet<String> = second.files.iter().map(|file| file.name.clone()).collect();
        let none = BTreeSet::new();
        assert_eq!(prospect(&order, &receipts, &names, &none), Prospect::Whole(receipts.to_vec()));
        let Prospect::Waits(files) = prospect(&order, &receipts[..1], &names, &held) else { panic!("it is not lost") };
        assert_eq!(files, held.iter().cloned().collect::<Vec<_>>());
        // Nobody who lives has the second node's files.
        assert!(matches!(prospect(&order, &receipts[..1], &names, &none), Prospect::Lost(_)));
        // A receipt of another attempt names files that may not be what this one has put.
        let late = Receipt { attempt: AttemptId::random(), ..second.clone() };
        assert!(matches!(prospect(&order, &[first.clone(), late.clone()], &names, &none), Prospect::Lost(_)));
        assert!(matches!(prospect(&order, &[first.clone(), late.clone()], &names, &held), Prospect::Waits(_)));
        // One beside the others is no harm.
        let all = [first.clone(), second.clone(), Receipt { node: NodeId::random(), ..late }];
        assert_eq!(prospect(&order, &all, &names, &none), Prospect::Whole(receipts.to_vec()));
        // Receipts that contradict each other are no checkpoint.
        let again = Receipt { node: NodeId::random(), ..second };
        assert!(matches!(prospect(&order, &[first, again.clone(), again], &names, &none), Prospect::Lost(_)));
    }
}
