//! Care for the checkpoints that a run keeps, while it trains.

pub mod retention;
mod scrub;
