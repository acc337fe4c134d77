//! A notice: what is announced, by whom, how certain, and when.

use std::time::Duration;

/// The kind of event announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The machine goes away: save and leave.
    Interruption,
    /// Somebody asks this process to stop: save and leave.
    Stop,
    /// The machine is more likely than others to go away: save now and train on.
    Rebalance,
}

impl Kind {
    /// Its name in events and the journal.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Interruption => "interruption",
            Self::Stop => "stop",
            Self::Rebalance => "rebalance",
        }
    }
}

/// How certain it is, including its deadline: an uncertain deadline is no reason to give up a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Confidence {
    /// It may well not happen, or at another time.
    Advisory,
    /// It happens, unless its source withdraws it.
    Announced,
    /// It is happening.
    Certain,
}

/// A warning, or a request, that this node stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The kind of event announced.
    pub kind: Kind,
    /// Time left when it was received, if known. Counted on the monotonic clock from there.
    pub deadline: Option<Duration>,
    /// Its source: `sigterm`, `aws-spot`, …
    pub source: &'static str,
    /// The source's own id for it: notices with the same id are the same notice.
    pub id: String,
    /// How certain it is.
    pub confidence: Confidence,
}

impl Notice {
    /// Whether it is a signal that asks this process to stop: the same one twice means "at once". A closing terminal
    /// sends SIGHUP more than once, without meaning that.
    pub fn is_signal(&self) -> bool {
        matches!(self.source, "sigterm" | "sigint")
    }

    /// Whether its deadline binds: work not done by then is not done.
    pub fn deadline_binds(&self) -> bool {
        self.deadline.is_some() && self.confidence > Confidence::Advisory
    }
}
