//! Who is in the run: heartbeats in the store, and what a node does about another one that leads the run.

pub mod heartbeat;
pub mod policy;
