//! Signals as notices. The handler is tokio's: it sets a flag and wakes the loop, nothing more.
//!
//! - SIGTERM, SIGINT: stop. Always heard.
//! - SIGUSR1: the machine goes away, as with Slurm's `--signal=B:USR1@120`.
//! - SIGUSR2: save now and train on.
//!
//! Where the configuration does not name `signals`, the last two are taken and not acted on: by default they would end the process.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Confidence, Kind, Notice, window::Windows};

/// Listens for the signals that ask something of a process.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    usr1: Signal,
    usr2: Signal,
    heard: u64,
    /// SIGUSR1 and SIGUSR2 count.
    pub all: bool,
    /// How long each leaves.
    pub windows: Windows,
}

impl Signals {
    /// Takes the signals over from here on: they no longer end the process.
    pub fn listen(windows: Windows) -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            usr1: signal(SignalKind::user_defined1())?,
            usr2: signal(SignalKind::user_defined2())?,
            heard: 0,
            all: true,
            windows,
        })
    }

    /// The next one. Safe to drop and call again.
    pub async fn next(&mut self) -> Notice {
        loop {
            let (source, kind, deadline) = tokio::select! {
                _ = self.terminate.recv() => ("sigterm", Kind::Stop, self.windows.stop),
                _ = self.interrupt.recv() => ("sigint", Kind::Stop, self.windows.stop),
                _ = self.usr1.recv() => ("sigusr1", Kind::Interruption, self.windows.usr1),
                _ = self.usr2.recv() => ("sigusr2", Kind::Rebalance, None),
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
