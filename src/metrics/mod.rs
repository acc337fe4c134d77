//! The figures of every step, as one curve however often machines vanished.
//!
//! The leader of a generation keeps the figures of the steps that it hears of, and puts them into the store as small
//! Parquet files: one with each save, before the save's record, and one after five minutes without a save. So every
//! step that a checkpoint contains has its figures in the store, and a kill costs the figures of those steps alone that
//! are done again.
//!
//! # Stored layout
//! `metrics/gGENERATION-sFIRST-sLAST-ATTEMPT.parquet`: one row a step, with the columns `step` (int64), `generation`
//! (int64), `at` (milliseconds since 1970, UTC) and one optional double for each figure, whose names are those of
//! `trainer metrics`. Files are created once and never changed. Small ones are put together now and then into a larger
//! one that replaces them; the small ones are deleted after it is written.
//!
//! # Invariants
//! What is stored is a *set* of rows: a row that occurs twice, in a small file and in a larger one, counts once. So
//! whoever writes, merges or deletes may die at any instant, and two leaders, of which one does not know yet that it
//! leads no more, may merge the same files. A generation's steps replace the same and all later steps of earlier
//! generations, which did them before a resume from an older checkpoint: that is computed when rows are read
//! ([`Series::curve`]), whatever the order in which they arrived.
//!
//! *Crash:* rows that were not put yet are lost; their steps are in no checkpoint and are done again. *Retry:* rows
//! whose put failed go with the next save; a save never fails because of them. *Cancel:* as a crash.
#![doc = include_str!("README.md")]

mod exposition;
mod file;
mod listen;
mod read;
mod recorder;
mod series;
pub mod tensorboard;

pub use self::{
    exposition::{Exposition, Form},
    file::{MetricsError, encode},
    listen::{Exporter, Places, address},
    read::read,
    recorder::{Put, Recorder},
    series::{Row, Series},
};
