//! `trainer status`

use std::{io::IsTerminal, process::ExitCode, time::Duration};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    history::{self, Checkpoint, History, Interruption, State},
    output, store,
};
use crate::{
    config::{self, Cadence, RunConfig},
    error::{Error, Kind, Result},
    ids::{Generation, RunId, Step, WorldSize},
    report::human,
};

/// Between two looks with `--watch`.
const WATCH: Duration = Duration::from_secs(2);
/// Interruptions that are listed; the others are counted.
const SHOWN: usize = 5;

/// Show one run's state
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  trainer status --run-id first\n  trainer status --run-id first --watch")]
pub struct Status {
    #[command(flatten)]
    run: RunArg,
    /// Look again every two seconds, until the run has ended
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    run_id: &'a RunId,
    store: String,
    state: &'a State,
    generation: Option<Generation>,
    world_size: Option<WorldSize>,
    step: Option<Step>,
    total_steps: u64,
    newest_checkpoint: Option<&'a Checkpoint>,
    /// Steps that were finished after the newest checkpoint, where a record names one.
    lag_steps: u64,
    checkpoints: usize,
    interruptions: &'a [Interruption],
    lost_steps: u64,
    worker_restarts: u64,
    created: Timestamp,
    last_activity: Timestamp,
    overrides: &'a [(String, String)],
    config: &'a RunConfig,
}

impl Status {
    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let root = self.run.store.open()?;
            // Elsewhere than on a terminal each look is added below the last: a log of JSON lines, or of tables.
            let redraw = self.watch && !self.json.json && std::io::stdout().is_terminal();
            loop {
                let history = history::read(&root, &self.run.run_id).await?;
                let report = Report::new(&self.run.run_id, root.uri(), &history);
                let text = if self.json.json { output::json_lines([&report])? } else { report.text(Timestamp::now()) };
                output::emit(&if redraw { format!("\x1b[H\x1b[J{text}") } else { text })?;
                let ended = !matches!(history.state, State::Created | State::InProgress);
                if !self.watch || ended {
                    return Ok(ExitCode::SUCCESS);
                }
                tokio::select! {
                    () = tokio::time::sleep(WATCH) => {}
                    stop = tokio::signal::ctrl_c() => {
                        return stop
                            .map(|()| ExitCode::SUCCESS)
                            .map_err(|error| Error::from_source(Kind::Bug, error).context("listen for Ctrl-C"));
                    }
                }
            }
        })
    }
}

impl<'a> Report<'a> {
    fn new(run_id: &'a RunId, store: String, history: &'a History) -> Self {
        let newest = history.newest();
        let safe = newest.map_or(0, |checkpoint| checkpoint.committed.step.get());
        Self {
            run_id,
            store,
            state: &history.state,
            generation: history.generation,
            world_size: history.world_size,
            step: history.last_step,
            total_steps: history.config.train.steps,
            newest_checkpoint: newest,
            lag_steps: history.last_step.unwrap_or_default().get().saturating_sub(safe),
            checkpoints: history.good().count(),
            interruptions: &history.interruptions,
            lost_steps: history.lost_steps(),
            worker_restarts: history.worker_restarts,
            created: history.created,
            last_activity: history.last_activity,
            overrides: &history.overrides,
            config: &history.config,
        }
    }

    fn text(&self, now: Timestamp) -> String {
        let mut lines: Vec<(&str, String)> = vec![
            ("run", format!("{} in {}", self.run_id, self.store)),
            ("state", self.state_text(now)),
            ("created", human::ago(self.created, now)),
        ];
        if let (Some(generation), Some(world)) = (self.generation, self.world_size) {
            let restarts = human::plural(self.worker_restarts, "worker restart");
            lines.push((
                "generation",
                format!("{generation}, {}, {restarts}", human::plural(world.get().into(), "worker")),
            ));
        }
        let step = self.step.unwrap_or_default();
        lines.push(("step", format!("{step} of {} (the last that the journal names)", self.total_steps)));
        lines.push(("checkpoint", self.checkpoint_text(now)));
        let count = human::plural(self.interruptions.len() as u64, "interruption");
        lines.push(("lost", format!("{} in {count}", human::plural(self.lost_steps, "step"))));
        for (key, value) in self.overrides {
            lines.push(("changed", format!("{key} = {value}")));
        }
        for interruption in self.interruptions.iter().rev().take(SHOWN) {
            lines.push((
                "interrupted",
                format!(
                    "{} after step {}, {} lost: {}",
                    human::ago(interruption.at, now),
                    interruption.step,
                    human::plural(interruption.lost_steps, "step"),
                    interruption.verdict
                ),
            ));
        }
        lines.extend(summary(self.config));
        let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        lines.iter().map(|(name, value)| format!("{name:<width$}  {}\n", human::plain(value))).collect()
    }

    fn state_text(&self, now: Timestamp) -> String {
        match self.state {
            State::InProgress => format!("in progress, last heard of {}", human::ago(self.last_activity, now)),
            State::Failed(reason) => format!("failed {}: {reason}", human::ago(self.last_activity, now)),
            other => format!("{} {}", other.word(), human::ago(self.last_activity, now)),
        }
    }

    fn checkpoint_text(&self, now: Timestamp) -> String {
        match self.newest_checkpoint {
            None => "none yet".into(),
            Some(checkpoint) => format!(
                "step {}, {}, {}; {} in all; {} after it",
                checkpoint.committed.step,
                human::bytes(checkpoint.committed.bytes),
                human::ago(checkpoint.at, now),
                self.checkpoints,
                human::plural(self.lag_steps, "step"),
            ),
        }
    }
}

fn saving(every: Cadence) -> String {
    match every {
        Cadence::Auto => "automatic".into(),
        _ => format!("every {}", config::format_cadence(every)),
    }
}

/// The settings that people ask for first.
fn summary(config: &RunConfig) -> Vec<(&'static str, String)> {
    let train = &config.train;
    vec![
        ("data", format!("{}, sequences of {}", config.data.train, config.data.sequence_length)),
        (
            "training",
            format!(
                "{} a step, seed {}, lr {:e}, {} a worker",
                human::plural(train.global_batch.into(), "sequence"),
                train.seed,
                train.optimizer.lr,
                human::plural(train.threads.into(), "CPU thread")
            ),
        ),
        ("saving", format!("{}, the newest {} are kept", saving(config.checkpoint.every), config.checkpoint.keep.last)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::history::tests::{entries, story};

    #[test]
    fn a_state_is_told_to_people_and_to_machines() {
        let history = History::of(&entries(story())).unwrap();
        let id = RunId::new("first").unwrap();
        let report = Report::new(&id, "s3://b/runs".into(), &history);
        let now = Timestamp::from_second(1_000_000 + 720).unwrap();
        assert_eq!(
            report.text(now),
            "\
run          first in s3://b/runs
state        in progress, last heard of 2m ago
created      12m ago
generation   3, 2 workers, 1 worker restart
step         25 of 500 (the last that the journal names)
checkpoint   step 25, 3.00 MiB, 2m ago; 2 in all; 0 steps after it
lost         4 steps in 1 interruption
changed      train.steps = 500
interrupted  6m ago after step 34, 4 steps lost: no time
data         s3://b/d, sequences of 512
training     32 sequences a step, seed 1234, lr 3e-4, 1 CPU thread a worker
saving       automatic, the newest 3 are kept
"
        );
        let json: serde_json::Value = serde_json::from_str(&output::json_lines([&report]).unwrap()).unwrap();
        assert_eq!(
            (&json["state"], &json["step"], &json["lost_steps"]),
            (&"in_progress".into(), &25.into(), &4.into())
        );
        assert_eq!(json["newest_checkpoint"]["step"], 25);
        assert_eq!(json["config"]["train"]["steps"], 500);
    }
}
