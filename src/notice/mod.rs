//! "This machine, or this run, goes away": one type for all sources, and one stream.
//!
//! | source | where | meaning |
//! |---|---|---|
//! | signals (`signal.rs`) | everywhere | stop; the machine goes away; save now |
//! | metadata services (`aws.rs`, `gcp.rs`, `azure.rs`) | in that cloud | the machine goes away; save now |
//! | a watched file (`file.rs`) | if one is configured | the machine goes away |
//! | `trainer drain` ([`drain`]) | in the run's folder | stop |
//!
//! `types.rs` holds the type, `stream.rs` the stream. Sources only report notices; the agent decides what they mean.
//! The stream drops repeats, by source and id: a metadata service repeats a notice with every poll. Signals are not
//! repeats of each other: the second of the same signal asks to leave at once.
//!
//! Sources are polled by tasks of their own, so that one that hangs delays neither the others nor training; they end
//! with the [`Notices`] that started them. A request takes two seconds at most
//! (except for Azure's list of events, which may take two minutes the first time and gets ten seconds later, and
//! Google's values, which wait a minute for a change). Each source has one request at a time, and fewer while there are
//! no answers; a service that is absent or misbehaves is never a reason to stop. With `sources = "auto"` every cloud's
//! service is looked for, and the first that answers correctly is the only one polled from then on.
//!
//! Only a request to drain is stored. *Crash:* the next process asks afresh, so a notice that still stands is heard
//! again. *Retry:* a source that fails is polled again, less often. *Cancel:* dropping [`Notices`] ends its tasks.
#![doc = include_str!("README.md")]

mod aws;
mod azure;
pub mod drain;
mod file;
mod gcp;
pub mod inbox;
mod poll;
mod signal;
mod stream;
#[cfg(test)]
mod testing;
mod types;
pub mod window;

pub use self::{
    poll::running_for,
    stream::Notices,
    types::{Confidence, Kind, Notice},
};
