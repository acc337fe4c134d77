//! The nodes of a run: heartbeats in the store, and a node's response to another one that leads the run.

pub mod heartbeat;
pub mod policy;
