//! What an agent is asked to do, and how it says that it ended.

use std::{path::PathBuf, time::Duration};

use crate::{
    config::{CompleteAction, RunConfig},
    ids::{RunId, Step},
    journal::RunState,
    report::Reporter,
    storage::Store,
};

/// What is to be run.
#[derive(Debug)]
pub struct Launch {
    /// The store that holds all runs.
    pub store: Store,
    /// The run.
    pub run_id: RunId,
    /// New, or carried on.
    pub begin: Begin,
    /// Workers on this node, if the command line says.
    pub nproc_per_node: Option<u32>,
    /// How it goes about it.
    pub manner: Manner,
    /// Hears what happens.
    pub reporter: Reporter,
}

/// How an agent goes about a run; the default is what `run` and `resume` do.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// How long to wait for another agent that has the run and lives; nothing: leave at once. While it waits, it
    /// watches the other's heartbeat; when that stops, it takes over, and when the run is complete, it has nothing to
    /// do.
    pub standby: Duration,
    /// Where datasets that lie in an object store are kept on this machine; `None`: in the user's cache.
    pub cache: Option<PathBuf>,
    /// When this machine began to look for work; the time from there to the first generation is told.
    pub since: Option<std::time::Instant>,
    /// This machine is there for the run: what the run's `on_complete` says is done even where others have completed
    /// it. Else it is done by who trained the run to its end: to ask for a run that is complete must not end the
    /// machine of who asks.
    pub dedicated: bool,
    /// A person has named the data with this very command: if it is not what the run was trained on so far, it is from
    /// here on.
    pub accepts_data: bool,
}

impl Manner {
    /// What is to be done with the machine when the run is complete.
    pub(super) fn then(&self, config: &RunConfig, trained_here: bool) -> Afterwards {
        let action = if self.dedicated || trained_here { config.on_complete.action } else { CompleteAction::Exit };
        Afterwards { action, lifecycle_hook: config.notice.lifecycle_hook.clone() }
    }
}

/// How a run begins.
#[derive(Clone, Debug)]
pub enum Begin {
    /// It must not exist yet.
    Create(Box<RunConfig>),
    /// It must exist.
    Resume {
        /// The checkpoint's step; `None`: the newest that verifies.
        from: Option<Step>,
        /// `--set key=value`, as typed; see [`crate::config::canonical_overrides`].
        overrides: Vec<(String, String)>,
        /// What its journal said when it was found; it is read on from there.
        state: Box<RunState>,
    },
    /// As [`Begin::Create`]; of several nodes that do so at once one creates it, and the others do as with
    /// [`Begin::Resume`].
    CreateOrResume {
        /// The new run's configuration, overrides applied.
        config: Box<RunConfig>,
        /// For a run that exists by then.
        overrides: Vec<(String, String)>,
    },
}

/// What is to be done with this machine when the run is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Afterwards {
    /// Whether it goes.
    pub action: CompleteAction,
    /// The hook that holds up its end: `notice.lifecycle_hook`.
    pub lifecycle_hook: String,
}

/// How a run ended, when it ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step is committed.
    Completed {
        /// What is to be done with this machine then.
        then: Afterwards,
    },
    /// It was asked to stop before it had created the run: the same command again is as good as new.
    NotCreated,
    /// It was asked to stop; so many steps must be done again.
    Interrupted {
        /// Finished steps that no checkpoint holds.
        lost_steps: u64,
    },
}
