//! Signals as notices. The handler is tokio's: it sets a flag and wakes the loop, nothing more.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Confidence, Kind, Notice};

/// Listens for the signals that ask a process to stop.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    heard: u64,
}

impl Signals {
    /// Takes the signals over from here on: they no longer end the process.
    pub fn listen() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())?, heard: 0 })
    }

    /// The next one. Safe to drop and call again.
    pub async fn next(&mut self) -> Notice {
        let source = tokio::select! {
            _ = self.terminate.recv() => "sigterm",
            _ = self.interrupt.recv() => "sigint",
        };
        self.heard += 1;
        Notice { kind: Kind::Stop, deadline: None, source, id: self.heard.to_string(), confidence: Confidence::Certain }
    }
}
