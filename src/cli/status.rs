//! `trainer status`

use std::{process::ExitCode, time::Duration};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output, store,
};
use crate::{
    config::{self, Cadence, RunConfig, TrainTask},
    error::{Error, Kind, Result},
    history::{self, Checkpoint, Interruption, Standing},
    ids::{Generation, RunId, Step, WorldSize},
    journal::{Outcome, RunState},
    report::human,
};

/// The interval between two looks with `--watch`.
const WATCH: Duration = Duration::from_secs(2);
/// The most interruptions that are listed; the others are counted.
const SHOWN: usize = 5;

/// Show the state of a run
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  trainer status --run-id first\n  trainer status --run-id first --watch")]
pub struct Status {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Refresh every two seconds, until the run has ended
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
    state: Standing,
    /// The reason for a failure.
    failure: Option<&'a str>,
    generation: Generation,
    world_size: Option<WorldSize>,
    /// The last finished step that the journal names.
    step: Option<Step>,
    total_steps: u64,
    newest_checkpoint: Option<Checkpoint<'a>>,
    /// From the newest checkpoint to `step`.
    lag_steps: u64,
    checkpoints: usize,
    interruptions: Vec<Interruption<'a>>,
    lost_steps: u64,
    worker_restarts: u64,
    created: Timestamp,
    last_activity: Timestamp,
    overrides: Vec<(String, String)>,
    config: RunConfig,
}

impl Status {
    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let root = self.run.store.open()?;
            // Off a terminal each look is appended to the last: a log of JSON lines, or of tables.
            let redraw = self.watch && !self.json.json && output::is_terminal();
            let mut journal = history::open(&root, &self.run.run_id).await?;
            if !self.watch {
                let report = Report::new(journal.state(), root.uri());
                output::emit(&self.text(&report)?)?;
                return Ok(ExitCode::SUCCESS);
            }
            let watch = async {
                loop {
                    let report = Report::new(journal.state(), root.uri());
                    let (text, is_end) = (self.text(&report)?, report.state.is_end());
                    let text = if redraw { format!("\x1b[H\x1b[J{text}") } else { text };
                    if !output::show_beside(text).await? || is_end {
                        return Ok(ExitCode::SUCCESS);
                    }
                    tokio::time::sleep(WATCH).await;
                    history::read_on(&mut journal).await?;
                }
            };
            tokio::select! {
                end = watch => end,
                stop = tokio::signal::ctrl_c() => stop
                    .map(|()| ExitCode::SUCCESS)
                    .map_err(|error| Error::from_source(Kind::Bug, error).context("listen for Ctrl-C")),
            }
        })
    }

    fn text(&self, report: &Report<'_>) -> Result<String> {
        if self.json.json { output::json_lines([report]) } else { Ok(report.text(Timestamp::now())) }
    }
}

impl<'a> Report<'a> {
    fn new(state: &'a RunState, store: String) -> Self {
        let config = history::config(state);
        let (newest, step) = (state.newest(), history::last_step(state));
        let safe = newest.map_or(Step(0), |checkpoint| checkpoint.committed.step);
        Self {
            run_id: state.run_id(),
            store,
            state: Standing::of(state),
            failure: match state.outcome() {
                Outcome::Failed { reason, .. } => Some(reason),
                Outcome::Open | Outcome::Completed { .. } => None,
            },
            generation: state.generation(),
            world_size: state.formed().map(|formed| formed.world_size),
            step,
            total_steps: config.workload.train.steps,
            newest_checkpoint: newest.map(Checkpoint::from),
            lag_steps: step.unwrap_or_default().get().saturating_sub(safe.get()),
            checkpoints: state.good().len(),
            interruptions: state.interruptions().iter().map(Interruption::from).collect(),
            lost_steps: history::lost_steps(state),
            worker_restarts: history::worker_restarts(state),
            created: state.created_at(),
            last_activity: state.last_activity().0,
            overrides: state.overrides(),
            config,
        }
    }

    fn text(&self, now: Timestamp) -> String {
        let mut lines: Vec<(&str, String)> = vec![
            ("run", format!("{} in {}", self.run_id, self.store)),
            ("state", self.state_text(now)),
            ("created", human::ago(self.created, now)),
        ];
        if let Some(world) = self.world_size {
            let (workers, restarts) = (u64::from(world.get()), self.worker_restarts);
            let (workers, restarts) = (human::plural(workers, "worker"), human::plural(restarts, "worker restart"));
            lines.push(("generation", format!("{}, {workers}, {restarts}", self.generation)));
        }
        let step = self.step.unwrap_or_default();
        lines.push(("step", format!("{step} of {} (the last in the journal)", self.total_steps)));
        lines.push(("checkpoint", self.checkpoint_text(now)));
        let count = human::plural(self.interruptions.len() as u64, "interruption");
        lines.push(("lost", format!("{} in {count}", human::plural(self.lost_steps, "step"))));
        for (key, value) in &self.overrides {
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
        lines.extend(summary(&self.config));
        let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        lines.iter().map(|(name, value)| format!("{name:<width$}  {}\n", human::plain(value))).collect()
    }

    fn state_text(&self, now: Timestamp) -> String {
        let when = human::ago(self.last_activity, now);
        match (self.state, self.failure) {
            (Standing::InProgress, _) => format!("in progress, last heard of {when}"),
            (state, Some(reason)) => format!("{} {when}: {reason}", state.word()),
            (state, None) => format!("{} {when}", state.word()),
        }
    }

    fn checkpoint_text(&self, now: Timestamp) -> String {
        match &self.newest_checkpoint {
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
    let TrainTask { data, train, .. } = &config.workload;
    vec![
        ("data", format!("{}, sequences of {}", data.train, data.sequence_length)),
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
    use crate::history::tests::{state, story};

    #[test]
    fn a_state_is_shown_as_text_and_as_json() {
        let state = state(story());
        let report = Report::new(&state, "s3://b/runs".into());
        let now = Timestamp::from_second(1_000_000 + 720).unwrap();
        assert_eq!(
            report.text(now),
            "\
run          first in s3://b/runs
state        in progress, last heard of 2m ago
created      12m ago
generation   3, 2 workers, 1 worker restart
step         25 of 500 (the last in the journal)
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
