//! From a step's state in memory to a checkpoint: when one is taken, where it lies, and how it gets to the store.

pub mod borrow;
pub mod fault;
pub mod gather;
pub mod haste;
pub mod holdup;
pub mod ledger;
pub mod put;
pub mod scheduler;
pub mod shelf;
pub mod slots;
pub mod upload;
