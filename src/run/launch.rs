//! An agent's task, and its outcome.
//!
//! Values only. *Crash, retry:* the same [`Launch`] can be given to another process: [`Begin::CreateOrResume`] finds
//! the run that a killed one has created, [`Begin::Create`] then fails because the run exists. *Cancel:* see [`super`].

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use crate::{
    config::{CompleteAction, RunConfig, Strategy},
    error::{Error, Kind, Result},
    ids::{RunId, Step},
    journal::{Reached, RunState},
    rendezvous::policy::{self, ending::Wait},
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
#[derive(Clone, Debug)]
pub struct LaunchOptions {
    /// How many nodes train together.
    pub nodes: NodeBounds,
    /// How long to wait for [`NodeBounds::min`] of them.
    pub wait: Wait,

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

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            nodes: NodeBounds::ONE,
            wait: Wait::RUN,
            standby: Duration::ZERO,
            cache: None,
            since: None,
            dedicated: false,
            accepts_data: false,
        }
    }
}

impl LaunchOptions {
    /// The limits of a group of this run's nodes.
    pub fn bounds(&self, config: &RunConfig) -> policy::Bounds {
        let NodeBounds { min, max } = self.nodes;
        let (train, parallel) = (&config.workload.train, &config.workload.parallel);
        policy::Bounds { min, max, global_batch: train.global_batch, mixed: parallel.mixed }
    }

    /// What to do with the machine when the run is complete.
    pub(super) fn then(&self, config: &RunConfig, trained_here: bool) -> OnComplete {
        let action = if self.dedicated || trained_here { config.on_complete.action } else { CompleteAction::Exit };
        OnComplete { action, lifecycle_hook: config.notice.lifecycle_hook.clone() }
    }
}

/// How many nodes train together. Written `3`, which is `3:3`, or `2:8`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeBounds {
    /// With fewer, nothing is trained; at least 1.
    pub min: u32,
    /// More wait until one is gone; at least `min`, at most [`NodeBounds::MOST`].
    pub max: u32,
}

impl NodeBounds {
    /// A run with one node.
    pub const ONE: Self = Self { min: 1, max: 1 };
    /// The most nodes of a run. Its records name them all, and a message must hold such a record.
    pub const MOST: u32 = 4096;

    /// Refuses a store in which no other node can meet this one.
    ///
    /// # Errors
    /// Wrong usage, if several nodes are wanted and the store is in this process's memory.
    pub fn meet_in(self, store: &str) -> Result<()> {
        if self.max == 1 || !store.starts_with("memory:") {
            return Ok(());
        }
        let what = format!("--nodes {self}: no other machine reaches the store {store}, which is in this process");
        Err(Error::new(Kind::Usage, what)
            .with_hint("name a bucket (s3://…, gs://…, az://…), or file:// and a folder that all machines share"))
    }
}

impl NodeBounds {
    /// Refuses a strategy that works on one node only.
    ///
    /// # Errors
    /// Wrong configuration, if several nodes are wanted and `parallel.strategy` is `shard`.
    pub fn carry(self, config: &RunConfig) -> Result<()> {
        if self.max == 1 || config.workload.parallel.strategy != Strategy::Shard {
            return Ok(());
        }
        let what = format!("--nodes {self}: parallel.strategy = \"shard\" works on one node only");
        Err(Error::new(Kind::Config, what)
            .with_hint("give --nodes 1, or set parallel.strategy to \"zero1\": --set parallel.strategy=zero1"))
    }
}

impl fmt::Display for NodeBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { min, max } if min == max => write!(f, "{min}"),
            Self { min, max } => write!(f, "{min}:{max}"),
        }
    }
}

/// Why a text is no [`NodeBounds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected MIN or MIN:MAX, such as 2 or 2:8, from 1 to {}, and MIN not above MAX", NodeBounds::MOST)]
pub struct InvalidBounds;

impl FromStr for NodeBounds {
    type Err = InvalidBounds;

    fn from_str(text: &str) -> Result<Self, InvalidBounds> {
        // "+2" is a number for `parse`.
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse::<u32>().ok().filter(|number| digits && (1..=Self::MOST).contains(number)).ok_or(InvalidBounds)
        };
        let (min, max) = text.split_once(':').unwrap_or((text, text));
        let (min, max) = (number(min)?, number(max)?);
        if min <= max { Ok(Self { min, max }) } else { Err(InvalidBounds) }
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
#[derive(Clone, Debug, PartialEq)]
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
    /// It has reached a cap; a higher one lets it go on.
    Capped {
        /// The cap.
        cap: Reached,
        /// Finished steps that no checkpoint holds.
        lost_steps: u64,
        /// What to do with this machine then: as after the last step.
        then: OnComplete,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::testing::config;

    #[test]
    fn nodes_are_a_number_or_a_range() {
        for (text, min, max) in [("1", 1, 1), ("3", 3, 3), ("2:8", 2, 8), ("1:4096", 1, 4096), ("5:5", 5, 5)] {
            let bounds: NodeBounds = text.parse().unwrap();
            assert_eq!(bounds, NodeBounds { min, max }, "{text}");
            assert_eq!(bounds.to_string().parse(), Ok(bounds));
        }
        assert_eq!(NodeBounds { min: 3, max: 3 }.to_string(), "3");
        for bad in ["", "0", "0:2", "3:2", "4097", "1:4097", "1:", ":2", "1:2:3", "-1", "+2", "1-2", "two", " 2", "2.0"]
        {
            assert_eq!(bad.parse::<NodeBounds>(), Err(InvalidBounds), "{bad:?}");
        }
        assert_eq!(
            InvalidBounds.to_string(),
            "expected MIN or MIN:MAX, such as 2 or 2:8, from 1 to 4096, and MIN not above MAX"
        );
    }

    #[test]
    fn weights_are_divided_on_one_node_only() {
        let mut config = config();
        let nodes: NodeBounds = "1:2".parse().unwrap();
        assert!(nodes.carry(&config).is_ok());
        config.workload.parallel.strategy = Strategy::Shard;
        assert!(NodeBounds::ONE.carry(&config).is_ok());
        let error = nodes.carry(&config).unwrap_err();
        assert_eq!(error.kind(), Kind::Config);
        assert_eq!(error.to_string(), "--nodes 1:2: parallel.strategy = \"shard\" works on one node only");
        assert!(error.hint().unwrap().contains("--set parallel.strategy=zero1"));
    }

    #[test]
    fn several_nodes_need_a_store_that_they_all_reach() {
        let several = NodeBounds { min: 1, max: 2 };
        for store in ["s3://bucket/runs", "file:///mnt/shared"] {
            several.meet_in(store).unwrap();
        }
        NodeBounds::ONE.meet_in("memory://").unwrap();
        let error = several.meet_in("memory://").unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().starts_with("--nodes 1:2: no other machine reaches the store memory://"), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("s3://")));
    }

    #[test]
    fn a_groups_limits_come_from_the_command_and_the_configuration() {
        let mut config = config();
        (config.workload.train.global_batch, config.workload.parallel.mixed) = (12, true);
        let options = LaunchOptions { nodes: NodeBounds { min: 2, max: 8 }, ..LaunchOptions::default() };
        let expected = policy::Bounds { min: 2, max: 8, global_batch: 12, mixed: true };
        assert_eq!(options.bounds(&config), expected);
        let usual = LaunchOptions::default();
        assert_eq!((usual.nodes, usual.wait), (NodeBounds::ONE, Wait::RUN));
    }

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
