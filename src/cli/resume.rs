//! `trainer resume`

use std::process::ExitCode;

use clap::Args;

use super::{
    args::{JsonArg, RunArg, SetArg, Workers, WorkersArg},
    boot, run, store,
};
use crate::{agent::Begin, error::Result, ids::Step, report::Screen};

/// Carry a run on from its newest checkpoint that verifies
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer resume --run-id first --store s3://bucket/runs
  trainer resume --run-id first --nproc-per-node 4     # any number of workers resumes any checkpoint
  trainer resume --run-id first --set train.steps=2000

The run keeps the settings it was created with. What --set changes stays changed; what belongs to the run for life (its \
model, the cut and the order of its samples) is refused.")]
pub struct Resume {
    #[command(flatten)]
    run: RunArg,
    /// Resume from this step's checkpoint instead of the newest
    #[arg(long, value_name = "STEP")]
    from: Option<Step>,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    set: SetArg,
    /// Print events as JSON, one object a line
    #[arg(long)]
    json: bool,
}

impl Resume {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        let begin = Begin::Resume { from: self.from, overrides: self.set.set };
        let nproc_per_node = self.workers.nproc_per_node.map(Workers::count);
        let store = self.run.store.open()?;
        // What the run's configuration says of its store (encryption, storage class, limits) holds for its whole life.
        let store = boot::find(&store.uri(), &store::LIMITS, &self.run.run_id)?.unwrap_or(store);
        run::launch(screen, JsonArg { json: self.json }, store, self.run.run_id, begin, nproc_per_node)
    }
}
