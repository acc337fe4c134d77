//! One generation: its workers, its saves, its restore, its drain.
//!
//! `generation.rs` is the event loop. `phase.rs` decides without I/O. `lead.rs` performs what concerns the group, and
//! `node.rs` what every node does for its own workers and memory; a node that is alone has both roles.
//! [`crate::run`] forms one generation after the other.
//!
//! | part | what it does |
//! |---|---|
//! | `generation`, `phase`, `effects` | the loop, the decisions, what they ask for |
//! | `lead` | the group's part: saves, the journal, upkeep, reports |
//! | `group` | the other nodes of a generation, as its leader has them, and the messages between the two |
//! | `node` | this node's part: its workers, its slots, its files of each save |
//! | `follow` | a generation on a node that does not lead it |
//! | `finish` | a save whose leader was lost before its record |
//! | `states` | whether all ranks have the same state |
//! | `stopping` | whether the run ends early |
//! | `save` | when a step is saved, where it lies in memory, how it gets to the store |
//! | `drain` | the response to a notice: how much can still be saved, and how long that takes |
//! | `traces` | what ranks tell of their collectives before they are killed |
//! | `upkeep` | the care for checkpoints that the run keeps |
//! | `workers` | the worker processes |
//! | `keep` | workers that live through a planned change of their group |
//! | `fence` | a look at the journal now and then: is the run still ours? |
//! | `restart` | whether workers that died or hang are started again |
//! | `pace` | how long ranks of several nodes wait for each other in a first step |
//! | `blame` | whether a node leaves a group because its workers kill it again and again |
//!
//! # Crash, retry, cancel
//! Everything that a restart needs is in the store. A checkpoint exists when its `committed` record stands. Killing
//! this process at any instant leaves the newest checkpoint, and data that no record names.
#![doc = include_str!("README.md")]

pub(crate) mod blame;
mod drain;
mod effects;
mod fence;
mod finish;
pub(crate) mod follow;
pub(crate) mod generation;
pub(crate) mod group;
pub(crate) mod keep;
mod lead;
mod node;
mod pace;
mod phase;
pub(crate) mod restart;
mod save;
mod states;
mod stopping;
mod traces;
mod upkeep;
mod workers;

pub(crate) use self::{
    drain::estimate::Estimates,
    save::{borrow::Neighbours, shelf, slots::Slots, upload},
    stopping::Stopping,
};
