//! The run's numbered, create-once records: the only authority on the run.
//!
//! Stored layout: `<run>/journal/<20 digits>.json`, numbered from 0 without a gap, each one [`Entry`]. Records are only
//! ever created, never changed, never deleted while the run lives. [`RunState`] is the result of reading them in order;
//! [`Journal`] reads and appends, [`JournalWriter`] is the task that owns it while an agent lives; [`admit`] is the
//! rule book. Beside them are summaries (`summary`), which hold the same records in few objects, so that a long journal
//! opens fast; only the records decide.
//!
//! Invariants
//! - **One order.** A record is appended by creating the next number, which succeeds for one writer only, and only
//!   after the writer has read every record before it. So each record was admitted against exactly the state before it.
//! - **Fencing.** A generation exists once its `formed` record does. From then on whoever speaks for an older one finds
//!   its number taken, reads the newer `formed`, and gets [`JournalError::Fenced`], or [`JournalError::LeftOut`] if its
//!   own group goes on without it. Two generations can't both commit.
//! - **Members.** A generation has a roster. Any member may write `committed`, so that a finished save outlives its
//!   leader; only the leader says how the generation ends (`members`).
//! - **No clock, listing or heartbeat** decides anything here; `at` is for people.
//! - A record that breaks these rules is not accepted when it is read, either: [`JournalError::Damaged`] names the
//!   object.
//!
//! Crash: a record exists or does not. Retry: an append whose answer was lost is ours if our attempt id is in the body;
//! after an error, appending the same record again settles it and never writes it twice. Cancel: dropping an append is
//! like losing its answer. A request that was given up may still arrive later; then the record exists, so the objects
//! that a failed `committed` names must not be deleted without asking the journal again.

mod admit;
mod cap;
mod checkpoints;
mod doubt;
mod error;
mod log;
mod members;
mod pack;
mod record;
mod replay;
mod speed;
mod stagnation;
mod state;
mod summary;
mod writer;

#[cfg(test)]
mod rules_tests;
#[cfg(test)]
mod scans_tests;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
mod summary_tests;
#[cfg(test)]
mod testing;

pub use admit::{Refusal, admit, fenced};
pub use cap::{Cap, Reached};
pub use checkpoints::Checkpoints;
pub use doubt::Clearance;
pub use error::JournalError;
pub use log::{Formed, Journal, list_runs};
pub use record::*;
pub use replay::{audit, replay};
pub use speed::{SPEED, Speed};
pub use stagnation::{EarlyStop, HELD_OUT, Stagnation};
pub use state::{
    Basis, Checkpoint, CheckpointStatus, Formation, Inconsistent, Interruption, NoticeHeard, Outcome, RunState,
};
pub use writer::{JournalWriter, Urgency, View};
