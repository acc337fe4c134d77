//! The nodes of a run: heartbeats in the store, and a node's response to another one that leads the run.
#![doc = include_str!("README.md")]

pub mod channel;
pub mod heartbeat;
pub mod policy;
