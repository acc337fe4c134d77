//! One generation on one node: its workers, its saves, its restore, its drain.
//!
//! `generation.rs` is the event loop; `phase.rs` decides without I/O, and `effects.rs` performs. [`crate::run`] forms
//! one generation after the other.
//!
//! | part | what it does |
//! |---|---|
//! | `generation`, `phase`, `effects` | the loop, the decisions, their performance |
//! | `save` | when a step is saved, where it lies in memory, how it gets to the store |
//! | `drain` | the response to a notice: how much can still be saved, and how long that takes |
//! | `upkeep` | the care for checkpoints that the run keeps |
//! | `workers` | the worker processes |
//! | `fence` | a look at the journal now and then: is the run still ours? |
//! | `restart` | whether workers that died or hang are started again |
//! | `opening` | what all generations have in common: configuration and work |
//!
//! # Crash, retry, cancel
//! Everything that a restart needs is in the store. A checkpoint exists when its `committed` record stands. Killing
//! this process at any instant leaves the newest checkpoint, and data that no record names.
#![doc = include_str!("README.md")]

mod drain;
mod effects;
mod fence;
pub(crate) mod generation;
pub(crate) mod opening;
mod phase;
pub(crate) mod restart;
mod save;
mod upkeep;
mod workers;

pub(crate) use self::{
    drain::estimate::Estimates,
    save::{slots::Slots, upload},
};
