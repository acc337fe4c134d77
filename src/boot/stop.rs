//! Being asked to stop while nobody else listens: before the agent does, and between two jobs.
//!
//! Listening begins with the process. Until then a signal ends it by default, which nobody can tell from a crash; and to the first process of a
//! container the kernel does not deliver a signal at all that nobody listens for, so that it would begin to train in its last seconds and be
//! killed. What has to be saved is the agent's affair: as long as nothing trains there is nothing to save, and whatever is waited for is
//! left where it is.
//!
//! Signals are counted. The agent listens for itself from its start on; what came in the moment before is sent again once it listens
//! ([`Heard::pass_on`]). Nothing is stored here.

use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::error::{Error, Kind, Result};

/// Listens as long as it lives, on a runtime of its own.
#[derive(Debug)]
pub struct Stop {
    /// `None`: this is being dropped.
    runtime: Option<Runtime>,
    heard: Heard,
}

/// What was heard so far. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Heard(watch::Receiver<u32>);

impl Stop {
    /// Takes over, from here on, the signals that ask a process to stop: SIGTERM, SIGINT, SIGUSR1. SIGUSR2 asks for a save, and is no longer
    /// the end of a process that has nothing to save.
    pub fn listen() -> Result<Self> {
        let failed = |error| Error::from_source(Kind::Bug, error).context("listen for signals");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("begin-io")
            .enable_all()
            .build()
            .map_err(failed)?;
        let (sender, receiver) = watch::channel(0_u32);
        let context = runtime.enter();
        let on = |kind| signal(kind).map_err(failed);
        let (mut terminate, mut interrupt) = (on(SignalKind::terminate())?, on(SignalKind::interrupt())?);
        let (mut usr1, mut usr2) = (on(SignalKind::user_defined1())?, on(SignalKind::user_defined2())?);
        drop(context);
        runtime.spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                    _ = usr1.recv() => {}
                    _ = usr2.recv() => continue,
                }
                sender.send_modify(|count| *count = count.saturating_add(1));
            }
        });
        Ok(Self { runtime: Some(runtime), heard: Heard(receiver) })
    }

    /// What is heard, for those who wait elsewhere.
    pub fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// Runs `work` to its end, unless this process is asked to stop.
    pub fn block_on<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match &self.runtime {
            Some(runtime) => runtime.block_on(self.heard.unless(work)),
            None => Err(Error::new(Kind::Bug, "nobody listens for signals any more")),
        }
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Whatever it waits for is given up: a look-up of a name can't be cancelled and may take long.
            runtime.shutdown_timeout(Duration::ZERO);
        }
    }
}

impl Heard {
    /// Whether this process was asked to stop.
    pub fn asked(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// Waits until it is.
    pub async fn wait(&self) {
        if self.0.clone().wait_for(|count| *count > 0).await.is_err() {
            // Nobody listens any more.
            std::future::pending::<()>().await;
        }
    }

    /// What comes of `work`; an error of the kind "interrupted" if this process is asked to stop before.
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.wait() => Err(Error::new(Kind::Interrupted, "asked to stop before the run was started")),
            done = work => done,
        }
    }

    /// Asks this process once more, if it was asked: whoever listens by now is to hear of it.
    pub fn pass_on(&self) {
        if self.asked() {
            let _ = kill_process(getpid(), Signal::TERM);
        }
    }
}
