//! Signals as notices.
//!
//! - SIGTERM, SIGINT, SIGHUP: stop. Always received, except a SIGHUP that was ignored when this process began.
//! - SIGUSR1: the machine goes away, as with Slurm's `--signal=B:USR1@120`.
//! - SIGUSR2: save now and train on.
//!
//! If the configuration does not name `signals`, the last two are caught but not acted on: by default they would end
//! the process.

use std::io;

use super::{
    inbox::{self, Inbox, Signal},
    types::{Confidence, Kind, Notice},
    window::Windows,
};

/// Listens for the signals that ask something of a process.
#[derive(Debug)]
pub struct Signals {
    inbox: Inbox,
    heard: u64,
    /// Whether SIGUSR1 and SIGUSR2 count.
    pub all: bool,
    /// The time that each leaves.
    pub windows: Windows,
}

impl Signals {
    /// Installs the handlers: from here on signals no longer end the process. Signals that arrived before and were not
    /// taken come first.
    pub fn listen(windows: Windows) -> io::Result<Self> {
        Ok(Self { inbox: inbox::open()?, heard: 0, all: true, windows })
    }

    /// The next one. Safe to drop and call again.
    pub async fn next(&mut self) -> Notice {
        loop {
            let (source, kind, deadline) = match self.inbox.take().await {
                Signal::Terminate => ("sigterm", Kind::Stop, self.windows.stop),
                Signal::Interrupt => ("sigint", Kind::Stop, self.windows.stop),
                Signal::HangUp => ("sighup", Kind::Stop, self.windows.stop),
                Signal::User1 => ("sigusr1", Kind::Interruption, self.windows.usr1),
                Signal::User2 => ("sigusr2", Kind::Rebalance, None),
            };
            if !self.all && kind != Kind::Stop {
                tracing::debug!("{source} is not listened to: notice.sources does not name signals");
                continue;
            }
            self.heard += 1;
            let known = match kind {
                Kind::Stop => self.windows.stop_is_known,
                Kind::Interruption => self.windows.usr1_is_known,
                Kind::Rebalance => true,
            };
            // The usual window of these surroundings is only a hint.
            let confidence = if known { Confidence::Certain } else { Confidence::Advisory };
            return Notice { kind, deadline, source, id: self.heard.to_string(), confidence };
        }
    }
}
