//! Threads apart from the caller's, for bulk transfers.
//!
//! A bulk transfer copies, sums and decrypts, at some two GiB per second and core. While the trainer needs the cores,
//! transfers should use only idle time ([`crate::threads`]); while training waits for them, all cores. Either kind has
//! a runtime and a client of its own, so that the journal or a heartbeat never waits for a connection, timer or lock of
//! theirs.

use std::future::Future;

use tokio::{runtime::Runtime, task::JoinHandle};

use crate::threads::give_way;

/// The most threads with low priority that work on transfers at once.
const MOST_BACKGROUND: usize = 4;
/// The most threads that work on transfers for which training waits: enough for 200 Gbit/s.
const MOST: usize = 16;

/// A runtime for transfers.
pub(super) struct Pool {
    runtime: Option<Runtime>,
}

impl Pool {
    /// Threads, including those for blocking work, that yield to all others.
    pub(super) fn background() -> std::io::Result<Self> {
        Self::start(MOST_BACKGROUND, give_way)
    }

    /// Threads like all others, about as many as there are cores.
    pub(super) fn urgent() -> std::io::Result<Self> {
        Self::start(MOST, || {})
    }

    fn start(most: usize, begin: impl Fn() + Send + Sync + 'static) -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(cores.clamp(1, most))
            .thread_name("bulk")
            .on_thread_start(begin)
            .enable_all()
            .build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Runs `work` there. Dropping the result stops it.
    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<Task<T>> {
        Some(Task(self.runtime.as_ref()?.spawn(work)))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // Dropping a runtime waits for its threads, which must not be done on a thread of another one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A task that stops when it is dropped.
pub(super) struct Task<T>(pub(super) JoinHandle<T>);

impl<T> Task<T> {
    /// Its result; `None` if its runtime stopped first. A panic of the task becomes one of ours.
    pub(super) async fn end(mut self) -> Option<T> {
        match (&mut self.0).await {
            Ok(value) => Some(value),
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => None,
            },
        }
    }
}

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
