//! `trainer resume`

use std::process::ExitCode;

use clap::Args;

use super::{
    args::{RunArg, SetArg, Workers, WorkersArg},
    run,
};
use crate::{
    agent::{Begin, Manner},
    boot::{self, stop::Stop},
    config,
    error::{Kind, Result},
    ids::Step,
    journal,
    report::{Reporter, Screen},
    storage::Store,
};

/// Continue a run from its newest checkpoint that verifies
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer resume --run-id first --store s3://bucket/runs
  trainer resume --run-id first --nproc-per-node 4     # any number of workers resumes any checkpoint
  trainer resume --run-id first --set train.steps=2000

The run keeps the settings and the data it was created with.
Another dataset in its place is refused unless --set data.train=… names it.
What --set changes stays changed. Changes to the model, or to the cut and order of the samples, are refused.
Settings of storage in --set apply from the first request.")]
pub struct Resume {
    #[command(flatten)]
    run: RunArg,
    /// Resume from this step's checkpoint instead of the newest one
    #[arg(long, value_name = "STEP")]
    from: Option<Step>,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    set: SetArg,
    /// Print events as JSON, one object per line
    #[arg(long)]
    json: bool,
}

impl Resume {
    pub(super) fn execute(self, screen: Screen) -> Result<ExitCode> {
        let (run_id, overrides) = (self.run.run_id, self.set.set);
        let nproc_per_node = self.workers.nproc_per_node.map(Workers::count);
        let stop = Stop::listen()?;
        stop.leave_when_stuck();
        let prepare = || {
            let store = Store::open(&self.run.store.open()?.uri(), &config::reading_settings(&overrides)?)?;
            let look = async { Ok(journal::replay(&store.folder(run_id.as_str()), &run_id).await?) };
            let state = stop.block_on(look)?;
            // What the run says of its store (encryption, storage class, limits) holds on every machine.
            Ok((boot::open(&store.uri(), &state, &overrides)?, state))
        };
        let Some((store, state)) = run::unless_asked(&stop, prepare())? else {
            return Ok(Kind::Interrupted.exit_code().into());
        };
        drop(stop);
        let accepts_data = config::names(&overrides, "data.train")?;
        let begin = Begin::Resume { from: self.from, overrides, state: Box::new(state) };
        let manner = Manner { accepts_data, ..Manner::default() };
        run::launch_as(Reporter::new(screen, self.json), store, run_id, begin, nproc_per_node, manner)
    }
}
