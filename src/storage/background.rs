//! Threads that run only when nobody else wants the processor.
//!
//! A bulk transfer copies, sums and encrypts: on a machine whose cores are the trainer's, it should take what they leave ([`crate::threads`]).
//! These threads have a runtime and a client of their own, so that no
//! connection, timer or lock of theirs is one that the journal or a heartbeat waits for.

use std::future::Future;

use tokio::{runtime::Runtime, task::JoinHandle};

use crate::threads::give_way;

/// At most so many threads at once work on transfers; one sums and copies several GB a second.
const MOST_THREADS: usize = 4;

/// A runtime whose threads, those for blocking work included, give way to all others.
pub(super) struct Background {
    runtime: Option<Runtime>,
}

impl Background {
    pub(super) fn start() -> std::io::Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(cores.clamp(1, MOST_THREADS))
            .thread_name("bulk")
            .on_thread_start(give_way)
            .enable_all()
            .build()?;
        Ok(Self { runtime: Some(runtime) })
    }

    /// Runs `work` there. Dropping the result stops it.
    pub(super) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<Task<T>> {
        Some(Task(self.runtime.as_ref()?.spawn(work)))
    }
}

impl Drop for Background {
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
    /// Its end; `None` if its runtime stopped first. A panic of the task is one of ours.
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
