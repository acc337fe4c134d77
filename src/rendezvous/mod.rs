//! The nodes of a run: heartbeats in the store, and a node's response to another one that leads the run.

pub mod cost;
pub mod heartbeat;
pub mod membership;
pub mod policy;
