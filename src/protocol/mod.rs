//! The typed messages between an agent and its workers.
//!
//! They travel over a Unix stream socket that the worker inherits as its standard input (`frames`). Both ends are one
//! binary, so there are no versions here. Either side treats the end of the stream as the death of the other: an agent
//! restarts the group, a worker exits at once.
//!
//! Order of a worker's life: `Start` → (`Listening` by rank 0) → `Built` → (`Peers`) → `Layout` → (`Restore`) →
//! `Ready` → `Go` → steps → `Stopped`. Between steps come reports of steps, captures, stalls and validations; a worker
//! waits for no answer to them, but where its run may stop early: a measured state waits for `Proceed`, or for its end.
//!
//! # Does not know
//! What is computed: a worker's task is a JSON value here ([`Assignment::task`]). So a process that computes learns
//! nothing of stores, notices and prices.

mod frames;
mod messages;

pub use frames::{MAX_MESSAGE, read_message, write_message};
pub use messages::{
    Assignment, BASE_FD, DeviceUsage, FromWorker, HeldOutSum, SLOT_FDS, SaveOrder, Split, StartSplit, StepReport,
    ToWorker, Usage, WORKER_SUBCOMMAND,
};
