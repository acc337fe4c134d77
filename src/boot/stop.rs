//! Requests to stop that arrive while no agent listens: before it starts, and between two jobs.
//!
//! Listening begins with the process ([`inbox`]). Saving is the agent's task: while nothing trains there is nothing to
//! save, and any wait is simply abandoned.
//!
//! Here signals are only counted: the agent listens for itself once it starts, and finds those that came just before.
//! Nothing is stored here.

use std::time::Duration;

use tokio::runtime::Runtime;

use crate::{
    error::{Error, Kind, Result},
    notice::inbox::{self, Inbox},
    report,
};

/// How long work that can't be cancelled (a read of a file that hangs) may delay the exit of a process that was asked
/// to stop and has begun nothing.
const STUCK: Duration = Duration::from_secs(2);

/// Watches for requests to stop. The work that runs meanwhile has its own runtime.
#[derive(Debug)]
pub struct Stop {
    /// `None`: this is being dropped.
    runtime: Option<Runtime>,
    heard: Heard,
}

/// The requests received so far. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Heard {
    inbox: Inbox,
    /// Requests before this count are ignored.
    before: u32,
}

impl Stop {
    /// Hears the signals that ask a process to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1) from the beginning of this
    /// process on. SIGUSR2 asks for a save; from here on it does not end a process that has nothing to save.
    pub fn listen() -> Result<Self> {
        Self::start(|_| 0)
    }

    /// The same, without those that an agent has obeyed.
    pub fn listen_anew() -> Result<Self> {
        Self::start(Inbox::obeyed)
    }

    fn start(before: impl Fn(&Inbox) -> u32) -> Result<Self> {
        let failed = |error| Error::from_source(Kind::Bug, error).context("listen for signals");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("begin-io")
            .enable_all()
            .build()
            .map_err(failed)?;
        let inbox = inbox::open().map_err(failed)?;
        let before = before(&inbox);
        Ok(Self { runtime: Some(runtime), heard: Heard { inbox, before } })
    }

    /// While this exists, a process that is asked to stop exits even if its main thread is stuck. Use it only while no
    /// work can be lost.
    pub fn leave_when_stuck(&self) {
        let heard = self.heard();
        let leave = async move {
            heard.wait().await;
            tokio::time::sleep(STUCK).await;
            report::say("stopped before the run began, nothing lost: run the same command again\n");
            report::flush();
            std::process::exit(Kind::Interrupted.exit_code().into());
        };
        if let Some(runtime) = &self.runtime {
            runtime.spawn(leave);
        }
    }

    /// The requests received, for those who wait elsewhere.
    pub fn heard(&self) -> Heard {
        self.heard.clone()
    }

    /// Runs `work` to its end, unless this process is asked to stop.
    pub fn block_on<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match &self.runtime {
            Some(runtime) => runtime.block_on(self.heard.unless(work)),
            None => Err(Error::new(Kind::Bug, "the signal listener has stopped")),
        }
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Any wait is abandoned: a name look-up can't be cancelled and may take long.
            runtime.shutdown_timeout(Duration::ZERO);
        }
    }
}

impl Heard {
    /// Whether this process was asked to stop.
    pub fn asked(&self) -> bool {
        self.inbox.asked() > self.before
    }

    /// Waits until this process is asked to stop.
    pub async fn wait(&self) {
        self.inbox.asked_again(self.before).await;
    }

    /// The result of `work`; an error of the kind "interrupted" if this process is asked to stop first.
    pub async fn unless<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.wait() => Err(Error::new(Kind::Interrupted, "asked to stop before the run was started")),
            done = work => done,
        }
    }
}
