//! From the name of a run to an agent's inputs: the run's journal, its settings, its store.
//!
//! Stored layout: none of its own. *Crash, retry, cancel:* everything here only reads; it may be dropped at any moment.

pub mod open;
