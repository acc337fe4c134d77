//! Who is in the run: heartbeats in the store, and whether another agent that formed a generation still lives.
pub mod heartbeat;
