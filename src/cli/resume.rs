//! `trainer resume`

use std::process::ExitCode;

use clap::Args;

use super::{
    args::{NodesArg, RunArg, SetArg, WatchersArg, Workers, WorkersArg},
    run,
};
use crate::{
    boot::stop::Stop,
    config,
    error::{Kind, Result},
    ids::Step,
    rendezvous::policy::ending::Wait,
    report::Screen,
    run::{LaunchOptions, open},
    workload,
};

/// Continue a run from its newest checkpoint that verifies
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer resume --run-id first --store s3://bucket/runs
  trainer resume --run-id first --nproc-per-node 4     # any number of workers
  trainer resume --run-id first --set train.steps=2000

The run keeps the settings and the data it was created with.
A different dataset is refused, unless --set data.train=… names it.
Changes by --set are permanent.
Changes to the model, or to the cut and order of the samples, are refused.
Settings of storage in --set apply from the first request.")]
pub struct Resume {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Resume from this step's checkpoint instead of the newest one
    #[arg(long, value_name = "STEP")]
    from: Option<Step>,
    #[command(flatten)]
    workers: WorkersArg,
    #[command(flatten)]
    nodes: NodesArg,
    #[command(flatten)]
    set: SetArg,
    #[command(flatten)]
    watchers: WatchersArg,
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
        let mut accepts_data = false;
        for key in workload::DATA {
            accepts_data |= config::names(&overrides, key)?;
        }
        let prepare = || {
            let (uri, reading) = (self.run.store.open()?.uri(), config::reading_settings(&overrides)?);
            let found = stop.block_on(open::find(&uri, &reading, &run_id, overrides))?;
            self.nodes.nodes.meet_in(&uri)?;
            Ok(found.existing(&run_id, &uri)?.resume(self.from))
        };
        let Some((store, begin)) = run::unless_asked(&stop, prepare())? else {
            return Ok(Kind::Interrupted.exit_code().into());
        };
        drop(stop);
        let options = LaunchOptions {
            nodes: self.nodes.nodes,
            wait: self.nodes.wait.unwrap_or(Wait::RUN),
            accepts_data,
            ..LaunchOptions::default()
        };
        let watchers = self.watchers.start(Some(run_id.clone()))?;
        run::launch(
            &watchers,
            watchers.reporter(screen, self.json, None),
            store,
            run_id,
            begin,
            nproc_per_node,
            options,
        )
    }
}
