//! The run's numbered, create-once records: the only authority on what is true of the run.
mod record;
pub use record::*;
