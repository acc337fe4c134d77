//! Decisions of the nodes of a run, as pure functions: what a node knows, the time that has passed and the operator's
//! settings go in; a decision and its reason come out (the form of torchft's `quorum_compute`). The caller looks, asks,
//! appends and waits; nothing here does.
//!
//! - [`single`] is the rule of a run with one node: one leader trains, others wait for it.
//! - [`succession`]: who proposes the next generation, who may form it while another leader may be alive, and who says
//!   "ready".
//! - [`roster`]: which of the nodes that are ready form it, and why the others don't; and whether to grow.
//! - [`ending`]: whether a group that lost nodes goes on, waits or gives up.
//! - [`growth`]: whether a group stops to take up nodes that wait.
//!
//! # How a generation is formed
//! A node whose turn it is asks the others over the channel whether they are ready for generation G+1, and appends
//! `formed` if policy allows it. Each member reads that record itself. Everything before the record is a hint: two
//! nodes may propose at once, an answer may be late, a node may be paused between any two steps. The journal's
//! create-once numbers let one `formed` win, and the loser reads in it whether it is a member. So these rules do not
//! make a run safe, they make it *quiet*: one generation a change, no group that two sides take from each other, no
//! newcomer that fences a working group.
//!
//! # Does not own
//! Heartbeats, the channel and the journal (the caller reads them and puts the results into the views), time (passed
//! in), the numbers of generations.

pub mod ending;
pub mod growth;
pub mod roster;
pub mod single;
pub mod succession;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub use self::single::{Move, Settings, View, decide};
use crate::ids::{Generation, NodeId};

/// The operator's settings for a run with several nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Nodes without which nothing is trained; at least 1.
    pub min: u32,
    /// The most nodes of a generation; at least `min`.
    pub max: u32,
    /// Sequences of an optimizer step, and so the most workers: one without a sequence would never join a reduction.
    pub global_batch: u32,
    /// Whether one generation may have devices of several kinds.
    pub mixed: bool,
}

/// A node of a generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The node.
    pub node: NodeId,
    /// Its workers, one a device.
    pub workers: u32,
    /// What it computes with: the device's name, or the CPU's model and flags. Nodes of one kind round alike.
    pub kind: String,
}

/// The nodes of a generation, the leader first. Survivors keep their order in the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// The generation.
    pub generation: Generation,
    /// Its nodes.
    pub members: Vec<Member>,
}

impl Roster {
    /// The leader; `None`: nobody is in it.
    pub fn leader(&self) -> Option<&NodeId> {
        self.members.first().map(|member| &member.node)
    }

    /// Whether `node` is a member.
    pub fn has(&self, node: &NodeId) -> bool {
        self.members.iter().any(|member| member.node == *node)
    }

    /// All workers.
    pub fn workers(&self) -> u64 {
        self.members.iter().map(|member| u64::from(member.workers)).sum()
    }

    /// The workers of those members that are in `nodes`.
    pub fn workers_of(&self, nodes: &BTreeSet<NodeId>) -> u64 {
        self.members.iter().filter(|member| nodes.contains(&member.node)).map(|member| u64::from(member.workers)).sum()
    }
}
