//! "This machine, or this run, goes away": one type, whatever said so.
//!
//! Sources only say what they heard; the agent decides what it means. A repeat of a notice that is being acted on is not an
//! error: of signals, the second one asks to leave at once.
pub mod signal;

use std::time::Duration;

/// A warning, or a wish, that this node stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What said so: `sigterm`, `sigint`.
    pub source: &'static str,
    /// Time left when it was heard, where known.
    pub deadline: Option<Duration>,
}
