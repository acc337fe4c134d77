//! Signals as notices.
//!
//! - SIGTERM, SIGINT, SIGHUP: stop. Always heard, but for a SIGHUP that was ignored when this process began.
//! - SIGUSR1: the machine goes away, as with Slurm's `--signal=B:USR1@120`.
//! - SIGUSR2: save now and train on.
//!
//! Where the configuration does not name `signals`, the last two are taken and not acted on: by default they would end
//! the process.

use std::io;

use super::{
    Confidence, Kind, Notice,
    inbox::{self, Inbox, Signal},
    window::Windows,
};

/// Listens for the signals that ask something of a process.
#[derive(Debug)]
pub struct Signals {
    inbox: Inbox,
    heard: u64,
    /// SIGUSR1 and SIGUSR2 count.
    pub all: bool,
    /// How long each leaves.
    pub windows: Windows,
}

impl Signals {
    /// Takes the signals over from here on: they no longer end the process. What has come before and nobody has taken
    /// comes first.
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
            // What such surroundings usually leave is no more than a hint.
            let confidence = if known { Confidence::Certain } else { Confidence::Advisory };
            return Notice { kind, deadline, source, id: self.heard.to_string(), confidence };
        }
    }
}
