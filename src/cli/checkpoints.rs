//! `trainer checkpoints`

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output::{self, Table},
    store,
};
use crate::{
    error::Result,
    history::{self, Checkpoint},
    journal::{self, CheckpointStatus, RunState},
    report::human,
};

/// List a run's checkpoints
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer checkpoints --run-id first --json")]
pub struct Checkpoints {
    #[command(flatten)]
    pub(super) run: RunArg,
    #[command(flatten)]
    json: JsonArg,
}

impl Checkpoints {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let state = store::block_on(async { history::read(&self.run.store.open()?, &self.run.run_id).await })?;
        let checkpoints: Vec<Listed<'_>> = state.checkpoints().iter().map(|c| Listed::of(&state, c)).collect();
        let text = if self.json.json {
            output::json_lines(&checkpoints)?
        } else {
            table(&checkpoints, Timestamp::now()) + &total(&checkpoints)
        };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A checkpoint and its cost.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    checkpoint: Checkpoint<'a>,
    /// US dollars, estimated; 0 if pruned.
    usd_per_month: f64,
    /// When it was read whole after it had been found damaged.
    cleared: Option<Timestamp>,
}

impl<'a> Listed<'a> {
    fn of(state: &RunState, checkpoint: &'a journal::Checkpoint) -> Self {
        let bytes = if checkpoint.status == CheckpointStatus::Pruned { 0 } else { checkpoint.committed.bytes };
        let cleared = state.clearances().iter().rev().find(|cleared| cleared.point == checkpoint.point());
        Self {
            checkpoint: Checkpoint::from(checkpoint),
            // Pricing looks through all changed settings: skip it for the many checkpoints that cost nothing.
            usd_per_month: if bytes == 0 { 0.0 } else { history::monthly_cost(state, bytes) },
            cleared: cleared.map(|cleared| cleared.at),
        }
    }
}

/// The total of all checkpoints in the store.
fn total(checkpoints: &[Listed<'_>]) -> String {
    let kept: Vec<&Listed<'_>> = checkpoints.iter().filter(|listed| listed.checkpoint.status != "pruned").collect();
    let bytes = kept.iter().map(|listed| listed.checkpoint.committed.bytes).fold(0, u64::saturating_add);
    format!(
        "{} in the store: {}, about {} a month\n",
        human::plural(kept.len() as u64, "checkpoint"),
        human::bytes(bytes),
        human::dollars(kept.iter().map(|listed| listed.usd_per_month).sum())
    )
}

fn table(checkpoints: &[Listed<'_>], now: Timestamp) -> String {
    let headings = [
        ">step",
        ">generation",
        ">size",
        ">loss",
        ">validation loss",
        ">stall",
        ">copy",
        ">durable",
        "committed",
        "status",
    ];
    let shown = |loss: Option<f64>| loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"));
    let mut table = Table::new(&headings);
    for Listed { checkpoint: Checkpoint { committed, at, status, damage }, cleared, .. } in checkpoints {
        let standing = match cleared {
            Some(cleared) if *status == "good" => {
                format!("{status}: read whole {}, after doubt", human::ago(*cleared, now))
            }
            _ => (*status).to_owned(),
        };
        table.row([
            committed.step.to_string(),
            committed.generation.to_string(),
            human::bytes(committed.bytes),
            shown(committed.loss),
            shown(committed.validation_loss),
            human::seconds(committed.cost.stall_s),
            human::seconds(committed.cost.copy_s),
            human::seconds(committed.cost.durable_s),
            human::ago(*at, now),
            damage.map_or(standing, |damage| format!("{status}: {damage}")),
        ]);
    }
    table.text()
}
