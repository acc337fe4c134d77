//! Listens, while no agent does, for requests that this consumer exit: signals, and notices that its machine goes away.
//!
//! An idle machine is taken back, or scaled in, like any other. The cloud waits for it, and it is paid for meanwhile; a
//! job that it claims in its last minutes is only interrupted. While a run trains its agent listens for itself, and
//! with the run's settings; only one of the two polls the metadata service at a time.

use std::cell::Cell;

use tokio::sync::Mutex;

use crate::{
    boot::stop::Heard,
    config::NoticeConfig,
    error::{Error, Kind, Result},
    notice::{self, Notices},
};

/// See the module.
pub(super) struct Lookout {
    /// Signals, from the beginning of this process on.
    pub heard: Heard,
    /// `None`: not listening yet, or the agent is.
    notices: Mutex<Option<Notices>>,
    /// The machine goes away.
    leaving: Cell<bool>,
}

impl Lookout {
    pub fn new(heard: Heard) -> Self {
        Self { heard, notices: Mutex::default(), leaving: Cell::new(false) }
    }

    /// Whether this consumer is to exit.
    pub fn told(&self) -> bool {
        self.heard.asked() || self.leaving.get()
    }

    /// Waits until it is to exit. Safe to drop and call again.
    async fn wait(&self) -> Result<()> {
        let mut notices = self.notices.lock().await;
        let notices = match &mut *notices {
            Some(notices) => notices,
            none => {
                let failed = |error| Error::from_source(Kind::Bug, error).context("listen for notices");
                let notices = none.insert(Notices::listen().map_err(failed)?);
                // No run says which sources to use.
                notices.begin(&NoticeConfig::default());
                notices
            }
        };
        loop {
            let notice = tokio::select! {
                biased;
                () = self.heard.wait() => return Ok(()),
                notice = notices.next() => notice,
            };
            // There is nothing to save.
            if notice.kind != notice::Kind::Rebalance {
                tracing::info!(source = notice.source, "this consumer was asked to exit");
                self.leaving.set(true);
                return Ok(());
            }
        }
    }

    /// The result of `work`; an error if this consumer is asked to exit first ([`Self::told`]).
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            told = self.wait() => {
                told?;
                Err(Error::new(Kind::Interrupted, "asked to exit"))
            }
            done = work => done,
        }
    }

    /// Another listener takes over from here on, or none is needed.
    pub async fn rest(&self) {
        *self.notices.lock().await = None;
    }

    /// Tells the parties that wait for this machine that it may go: its work is settled. An agent does so itself.
    pub async fn let_machine_go(&self) {
        // Bounded, and nobody else has a use for the notices meanwhile: this consumer is about to exit.
        if let Some(notices) = &mut *self.notices.lock().await {
            notices.release(true).await;
        }
    }
}
