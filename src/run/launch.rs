//! An agent's task, and its outcome.
//!
//! Values only. *Crash, retry:* the same [`Launch`] can be given to another process: [`Begin::CreateOrResume`] finds
//! the run that a killed one has created, [`Begin::Create`] then fails because the run exists. *Cancel:* see [`super`].

use std::{path::PathBuf, time::Duration};

use crate::{
    config::{CompleteAction, RunConfig},
    ids::{RunId, Step},
    journal::RunState,
    report::Reporter,
    storage::Store,
};

/// The run to execute.
#[derive(Debug)]
pub struct Launch {
    /// The store that holds all runs.
    pub store: Store,
    /// The run.
    pub run_id: RunId,
    /// New, or resumed.
    pub begin: Begin,
    /// Workers on this node, if given on the command line.
    pub nproc_per_node: Option<u32>,
    /// How the agent behaves.
    pub options: LaunchOptions,
    /// Receives the events.
    pub reporter: Reporter,
}

/// How an agent behaves; the default is that of `run` and `resume`.
#[derive(Clone, Debug, Default)]
pub struct LaunchOptions {
    /// How long to wait for another live agent that has the run; zero: exit at once. While waiting, it watches the
    /// other's heartbeat: if that stops, it takes over; if the run completes, it has nothing to do.
    pub standby: Duration,
    /// Where datasets from an object store are kept on this machine; `None`: in the user's cache.
    pub cache: Option<PathBuf>,
    /// When this machine began to look for work; the time from there to the first generation is reported.
    pub since: Option<std::time::Instant>,
    /// This machine is dedicated to the run: apply `on_complete` even if another node completed it. Otherwise only the
    /// node that finished the run applies it: asking for a complete run must not end the asker's machine.
    pub dedicated: bool,
    /// A person has named the data with this very command: if the run was trained on other data so far, it uses this
    /// data from here on.
    pub accepts_data: bool,
}

impl LaunchOptions {
    /// What to do with the machine when the run is complete.
    pub(super) fn then(&self, config: &RunConfig, trained_here: bool) -> OnComplete {
        let action = if self.dedicated || trained_here { config.on_complete.action } else { CompleteAction::Exit };
        OnComplete { action, lifecycle_hook: config.notice.lifecycle_hook.clone() }
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
        /// Its journal's state when it was found; reading continues from there.
        state: Box<RunState>,
    },
    /// As [`Begin::Create`]; of several nodes that do so at once one creates the run, and the others resume it as with
    /// [`Begin::Resume`].
    CreateOrResume {
        /// The new run's configuration, overrides applied.
        config: Box<RunConfig>,
        /// For a run that already exists.
        overrides: Vec<(String, String)>,
    },
}

/// What to do with this machine when the run is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnComplete {
    /// The action.
    pub action: CompleteAction,
    /// The lifecycle hook that delays its end: `notice.lifecycle_hook`.
    pub lifecycle_hook: String,
}

/// How a run ended, if it ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step is committed.
    Completed {
        /// What to do with this machine then.
        then: OnComplete,
    },
    /// It was asked to stop before it created the run; nothing is lost, and the same command can be given again.
    NotCreated,
    /// It was asked to stop; some steps must be done again.
    Interrupted {
        /// Finished steps that no checkpoint holds.
        lost_steps: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::config;

    #[test]
    fn only_the_node_that_finished_a_run_or_is_dedicated_to_it_acts_on_its_end() {
        for (dedicated, trained_here, acts) in
            [(false, false, false), (false, true, true), (true, false, true), (true, true, true)]
        {
            let mut config = config();
            config.on_complete.action = CompleteAction::Terminate;
            config.notice.lifecycle_hook = "hook".into();
            let then = LaunchOptions { dedicated, ..LaunchOptions::default() }.then(&config, trained_here);
            let action = if acts { CompleteAction::Terminate } else { CompleteAction::Exit };
            assert_eq!(then, OnComplete { action, lifecycle_hook: "hook".into() }, "{dedicated} {trained_here}");
        }
    }
}
