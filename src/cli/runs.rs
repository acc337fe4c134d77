//! `trainer runs`

use std::process::ExitCode;

use clap::Args;
use futures::{StreamExt, stream};
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, StoreArg},
    output::{self, Table},
    store,
};
use crate::{
    error::{Kind, Result},
    history::{self, Standing},
    ids::{RunId, Step},
    journal::{self, RunState},
    report::human,
};

/// Journals read at once.
const AT_ONCE: usize = 8;

/// List the runs of a store
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer runs --store s3://bucket/runs")]
pub struct Runs {
    #[command(flatten)]
    store: StoreArg,
    #[command(flatten)]
    json: JsonArg,
}

/// One run of the list.
#[derive(Debug, Serialize)]
struct Line {
    run_id: RunId,
    state: Standing,
    step: Option<Step>,
    total_steps: u64,
    checkpoints: usize,
    interruptions: usize,
    lost_steps: u64,
    created: Timestamp,
    last_activity: Timestamp,
}

impl Line {
    fn new(run_id: RunId, state: &RunState) -> Self {
        Self {
            run_id,
            state: Standing::of(state),
            step: history::last_step(state),
            total_steps: history::config(state).workload.train.steps,
            checkpoints: state.good().len(),
            interruptions: state.interruptions().len(),
            lost_steps: history::lost_steps(state),
            created: state.created_at(),
            last_activity: state.last_activity().0,
        }
    }
}

impl Runs {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let mut lines = store::block_on(self.read())?;
        lines.sort_by(|a, b| b.last_activity.cmp(&a.last_activity).then_with(|| a.run_id.cmp(&b.run_id)));
        let text = if self.json.json { output::json_lines(&lines)? } else { table(&lines, Timestamp::now()) };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }

    async fn read(&self) -> Result<Vec<Line>> {
        let root = self.store.open()?;
        let runs = journal::list_runs(&root).await?;
        let root = &root;
        let read: Vec<_> = stream::iter(runs)
            .map(async |id| match history::read(root, &id).await {
                Ok(state) => Ok(Some(Line::new(id, &state))),
                // One unreadable journal must not hide the other runs.
                Err(error) if error.kind() == Kind::Data => {
                    tracing::warn!("{}", human::plain(&error.to_string()));
                    Ok(None)
                }
                Err(error) => Err(error),
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        read.into_iter().filter_map(Result::transpose).collect()
    }
}

fn table(lines: &[Line], now: Timestamp) -> String {
    let mut table = Table::new(&["run", "state", ">step", ">of", ">checkpoints", ">lost steps", "last activity"]);
    for line in lines {
        table.row([
            line.run_id.to_string(),
            line.state.word().to_owned(),
            line.step.map_or_else(|| "-".into(), |step| step.to_string()),
            line.total_steps.to_string(),
            line.checkpoints.to_string(),
            line.lost_steps.to_string(),
            human::ago(line.last_activity, now),
        ]);
    }
    table.text()
}
