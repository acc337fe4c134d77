//! From the name of a run to what an agent needs to begin: the run's journal, its settings, its store.
//!
//! Stored layout: none of its own. *Crash, retry, cancel:* everything here only reads; it may be dropped at any moment.

pub mod open;
