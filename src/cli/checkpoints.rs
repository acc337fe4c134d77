//! `trainer checkpoints`

use std::process::ExitCode;

use clap::Args;
use jiff::Timestamp;

use super::{
    args::{JsonArg, RunArg},
    history::{self, Checkpoint},
    output::{self, Table},
    store,
};
use crate::{error::Result, report::human};

/// List a run's checkpoints
#[derive(Debug, Args)]
#[command(after_help = "Example: trainer checkpoints --run-id first --json")]
pub struct Checkpoints {
    #[command(flatten)]
    run: RunArg,
    #[command(flatten)]
    json: JsonArg,
}

impl Checkpoints {
    pub(super) fn execute(self) -> Result<ExitCode> {
        let state = store::block_on(async { history::read(&self.run.store.open()?, &self.run.run_id).await })?;
        let checkpoints: Vec<Checkpoint<'_>> = state.checkpoints().iter().map(Checkpoint::from).collect();
        let text =
            if self.json.json { output::json_lines(&checkpoints)? } else { table(&checkpoints, Timestamp::now()) };
        output::emit(&text)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn table(checkpoints: &[Checkpoint<'_>], now: Timestamp) -> String {
    let headings =
        [">step", ">generation", ">size", ">loss", ">held out", ">stall", ">copy", ">durable", "committed", "status"];
    let mut table = Table::new(&headings);
    for Checkpoint { committed, at, status, damage } in checkpoints {
        table.row([
            committed.step.to_string(),
            committed.generation.to_string(),
            human::bytes(committed.bytes),
            format!("{:.4}", committed.loss),
            committed.validation_loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}")),
            human::seconds(committed.cost.stall_s),
            human::seconds(committed.cost.copy_s),
            human::seconds(committed.cost.durable_s),
            human::ago(*at, now),
            damage.map_or_else(|| (*status).to_owned(), |damage| format!("{status}: {damage}")),
        ]);
    }
    table.text()
}
