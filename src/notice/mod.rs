//! "This machine, or this run, goes away": one type, whatever said so, and one stream of them.
//!
//! Sources only say what they heard; the agent decides what it means. The stream drops repeats of what it has given, by source and id:
//! a metadata service repeats a notice with every poll. Signals are not repeats of each other: of the same signal, the second one asks
//! to leave at once.
//!
//! Nothing is stored. Sources are polled by tasks of their own, so that one that hangs holds up neither the others nor training; they
//! end with the [`Notices`] that started them.
pub mod signal;

use std::{io, time::Duration};

use self::signal::Signals;
use crate::{config::NoticeConfig, ids::Generation, storage::Store};

/// What is going to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The machine goes away: save and leave.
    Interruption,
    /// Somebody asks this process to stop: save and leave.
    Stop,
    /// The machine is likelier than others to go away: save now and train on.
    Rebalance,
}

impl Kind {
    /// As events and the journal name it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interruption => "interruption",
            Self::Stop => "stop",
            Self::Rebalance => "rebalance",
        }
    }
}

/// How sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Confidence {
    /// It may well not happen.
    Advisory,
    /// It happens, unless whoever announced it changes his mind.
    Announced,
    /// It is happening.
    Certain,
}

/// A warning, or a wish, that this node stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// What is going to happen.
    pub kind: Kind,
    /// Time left when it was heard, where known. Counted on the monotonic clock from there.
    pub deadline: Option<Duration>,
    /// What said so: `sigterm`, `aws-spot`, …
    pub source: &'static str,
    /// The source's own name for it: what has the same one is the same notice.
    pub id: String,
    /// How sure it is.
    pub confidence: Confidence,
}

/// All sources as one stream.
#[derive(Debug)]
pub struct Notices {
    signals: Signals,
}

impl Notices {
    /// Takes the signals over from here on: they no longer end the process.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { signals: Signals::listen()? })
    }

    /// Starts asking the other sources, as the configuration says. Called again, it follows a changed configuration.
    pub fn begin(&mut self, _settings: &NoticeConfig) {}

    /// This node trains in `generation` of the run whose folder is `run`: whoever asks that generation to stop is heard.
    pub fn formed(&mut self, _run: &Store, _generation: Generation) {}

    /// The next notice. Safe to drop and call again.
    pub async fn next(&mut self) -> Notice {
        self.signals.next().await
    }

    /// The run has ended on this node and its last words are written; `saved`: its last finished step is durable. Whoever waits
    /// for this node is told so, within a bounded time.
    pub async fn release(&mut self, _saved: bool) {}
}

impl Notice {
    /// Whether it is a signal that asks this process to stop: of those, the same one twice means "at once".
    pub fn is_signal(&self) -> bool {
        matches!(self.source, "sigterm" | "sigint")
    }
}
