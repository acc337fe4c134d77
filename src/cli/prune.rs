//! `trainer prune`

use std::{process::ExitCode, sync::Arc, time::Duration};

use clap::Args;
use serde::Serialize;
use tokio::sync::Mutex;

use super::{
    args::{JsonArg, RunArg},
    history,
    output::{self, Table},
    store,
};
use crate::{
    checkpoint::prune::{Abandoned, apply_prune, plan_for},
    config::Keep,
    error::{Context, Error, Result},
    ids::NodeId,
    journal::{Journal, Record, ResumePoint, RunState},
    report::human,
    storage::Store,
};

/// What a killed upload has left behind is swept after so long; an upload under way is younger.
const STALE: Duration = Duration::from_secs(24 * 60 * 60);

/// Delete old checkpoints by plan
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  trainer prune --run-id first --dry-run
  trainer prune --run-id first --keep-last 1 --keep-every 1000

The newest checkpoint that verifies is never deleted, nor the one that the newest generation has resumed from.")]
pub struct Prune {
    #[command(flatten)]
    run: RunArg,
    /// Keep the newest so many [default: the run's setting]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    keep_last: Option<u32>,
    /// And every checkpoint whose step is a multiple of this [default: the run's setting]
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    keep_every: Option<u64>,
    /// Print the plan and delete nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// One checkpoint of the plan.
#[derive(Debug, Serialize)]
struct Doomed {
    #[serde(flatten)]
    point: ResumePoint,
    bytes: u64,
    deleted: bool,
}

impl Prune {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let doomed = store::block_on(self.prune())?;
        output::emit(&if self.json.json { output::json_lines(&doomed)? } else { table(&doomed) })?;
        Ok(ExitCode::SUCCESS)
    }

    async fn prune(&self) -> Result<Vec<Doomed>> {
        let root = self.run.store.open()?;
        let folder = root.folder(self.run.run_id.as_str());
        let journal = Journal::open(folder.clone(), NodeId::random(), self.run.run_id.clone()).await?;
        let plan = self.plan(&folder, journal.state()).await?;
        let bytes = |point: &ResumePoint| {
            journal.state().checkpoint(point.step, point.generation).map_or(0, |checkpoint| checkpoint.committed.bytes)
        };
        let doomed = plan
            .iter()
            .map(|point| Doomed { point: point.clone(), bytes: bytes(point), deleted: !self.dry_run })
            .collect();
        if !self.dry_run {
            let journal = Arc::new(Mutex::new(journal));
            apply_prune(&folder, &plan, |point: ResumePoint| {
                let journal = Arc::clone(&journal);
                async move {
                    let record = Record::Pruned { step: point.step, generation: point.generation };
                    journal.lock().await.append(record).await?;
                    Ok::<_, Error>(())
                }
            })
            .await
            .context(format!("prune run {}", self.run.run_id))?;
            folder.sweep_unfinished(STALE).await?;
        }
        Ok(doomed)
    }

    async fn plan(&self, folder: &Store, state: &RunState) -> Result<Vec<ResumePoint>> {
        let config = history::config(state).checkpoint.keep;
        let keep = Keep { last: self.keep_last.unwrap_or(config.last), every: self.keep_every.or(config.every) };
        Ok(plan_for(folder, state, keep, Abandoned::Delete).await?)
    }
}

fn table(doomed: &[Doomed]) -> String {
    let mut table = Table::new(&[">step", ">generation", ">size", ""]);
    for Doomed { point, bytes, deleted } in doomed {
        let done = if *deleted { "deleted" } else { "would be deleted" };
        table.row([point.step.to_string(), point.generation.to_string(), human::bytes(*bytes), done.to_owned()]);
    }
    if doomed.is_empty() { "nothing to delete\n".into() } else { table.text() }
}
