//! The nodes of a run: who lives, who leads, and how they talk.
//!
//! | part | what it does |
//! |---|---|
//! | `heartbeat` | a node's sign of life in the store; `look` says whether another node is dead |
//! | `policy` | decisions from that: wait, take over, form, step down; pure functions |
//! | `membership` | judgements of heartbeats by watching and by one list; pure functions |
//! | `seat` | the loop around all that, as a state machine without I/O |
//! | `channel` | messages between the agents of one generation; requests and hints, never facts |
//! | `peers` | one agent's links to all others, by node: dials, reads, says who is lost |
//! | `overview` | the nodes of a run as a person outside of it sees them |
//! | `cost` | what all that costs in requests and money |
//!
//! A run with one node uses `heartbeat` and `policy::single` alone.
//!
//! # Invariant
//! Nothing here makes a run safe. Safety is the journal's fencing: these parts decide who waits, and for how long.
//!
//! *Crash:* a heartbeat stays with its last counter, and others see it stand still. *Retry:* a missed beat is not
//! repeated, the next one is newer. *Cancel:* all of it may be dropped at any moment.
#![doc = include_str!("README.md")]

pub mod channel;
pub mod cost;
pub mod heartbeat;
pub mod membership;
pub mod peers;
pub mod overview;
pub mod policy;
pub mod seat;
