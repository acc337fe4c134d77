//! The parent on each node: what a command asks of it.

use crate::{
    config::RunConfig,
    error::{Error, Kind, Result},
    ids::{RunId, Step},
    report::Reporter,
    storage::Store,
};

/// A run, or the next part of one.
#[derive(Debug)]
pub struct Launch {
    /// The root of the store; the run lives in its folder `run_id`.
    pub store: Store,
    /// The run.
    pub run_id: RunId,
    /// How it starts.
    pub start: Start,
    /// Workers on this node, where the command line says so; else the configuration does.
    pub nproc_per_node: Option<u32>,
    /// Where events go.
    pub reporter: Reporter,
}

/// How a run starts.
#[derive(Debug)]
pub enum Start {
    /// As a new one; an id that exists is refused.
    Create(Box<RunConfig>),
    /// From its newest checkpoint that verifies.
    Resume {
        /// From this checkpoint instead.
        from: Option<Step>,
        /// `--set key=value`, as typed; see [`crate::config::canonical_overrides`].
        overrides: Vec<(String, String)>,
    },
}

/// How it ended, where nothing went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step is committed.
    Completed,
    /// Asked to stop.
    Interrupted {
        /// Steps that will be done again.
        lost_steps: u64,
    },
}

/// Starts the workers and carries the run to its end, or to the end of this machine.
///
/// # Errors
/// Whatever stops the run and is no interruption.
pub fn launch(launch: Launch) -> Result<Outcome> {
    Err(Error::new(Kind::Bug, format!("no agent to launch run {}", launch.run_id)))
}
