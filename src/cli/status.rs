//! `trainer status`

use std::{process::ExitCode, time::Duration};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    nodes, output, store,
};
use crate::{
    config::{self, Cadence, CapsConfig, RunConfig, TrainTask},
    error::{Error, Kind, Result},
    history::{self, Checkpoint, HeldOut, Interruption, Standing, spent::Spent},
    ids::{Generation, RunId, Step, WorldSize},
    journal::{Formation, Outcome, RunState, Speed},
    rendezvous::overview::{self, Overview, Sighting},
    report::human,
    storage::Store,
};

/// The interval between two looks with `--watch`.
const WATCH: Duration = Duration::from_secs(2);
/// Looks at the journal between two looks at the nodes' heartbeats, which are a request each.
const BEATS: u32 = 5;
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
    /// Why the run is complete before its last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    early: Option<String>,
    /// The cap that it has reached, and what lets it go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    cap: Option<String>,
    /// What it has taken so far, of what its caps allow.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    spent: Vec<String>,
    generation: Generation,
    world_size: Option<WorldSize>,
    /// Of a run with several nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<Overview<'a>>,
    /// The last finished step that the journal names.
    step: Option<Step>,
    total_steps: u64,
    newest_checkpoint: Option<Checkpoint<'a>>,
    /// The newest checkpoint whose held-out loss was measured, and the one with the lowest.
    #[serde(skip_serializing_if = "Option::is_none")]
    held_out: Option<HeldOut>,
    /// As last recorded with a checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    speed: Option<Recorded>,
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

/// How fast the run was.
#[derive(Debug, Serialize)]
struct Recorded {
    /// At this step.
    step: Step,
    #[serde(flatten)]
    speed: Speed,
}

impl Recorded {
    /// The newest of the run's current line.
    fn of(state: &RunState) -> Option<Self> {
        let committed = state.candidates().into_iter().map(|checkpoint| &checkpoint.committed);
        let mut found = committed.filter_map(|it| Some(Self { step: it.step, speed: Speed::of(&it.metrics)? }));
        found.next()
    }

    fn text(&self) -> String {
        let Self { step, speed } = self;
        let share = |seconds: f64| format!("{:.0}%", 100.0 * seconds / speed.step_s.max(1e-9));
        let mut text = format!(
            "{} tokens/s at step {step}; of {} a step, data {}, forward {}, backward {}, reduction {}, optimizer {}, \
             capture {}",
            human::count(speed.tokens_per_s),
            human::seconds(speed.step_s),
            share(speed.data_s),
            share(speed.forward_s),
            share(speed.backward_s),
            share(speed.reduce_s),
            share(speed.optimizer_s),
            share(speed.capture_s),
        );
        if let Some(mfu) = speed.mfu {
            text += &format!("; {:.1}% of the devices' peak", 100.0 * mfu);
        }
        // Whole bytes.
        let bytes = |bytes: f64| human::bytes(bytes as u64);
        if let Some(device) = speed.device_peak_bytes {
            text += &format!("; at most {} of a GPU", bytes(device));
        }
        if let Some(host) = speed.host_peak_bytes {
            text += &format!("; at most {} of host memory a worker", bytes(host));
        }
        text
    }
}

impl Status {
    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let root = self.run.store.open()?;
            // Off a terminal each look is appended to the last: a log of JSON lines, or of tables.
            let redraw = self.watch && !self.json.json && output::is_terminal();
            let mut journal = history::open(&root, &self.run.run_id).await?;
            let folder = root.folder(self.run.run_id.as_str());
            let mut seen = sightings(&folder, journal.state()).await?;
            if !self.watch {
                let report = Report::new(journal.state(), root.uri(), &seen, Timestamp::now());
                output::emit(&self.text(&report)?)?;
                return Ok(ExitCode::SUCCESS);
            }
            let watch = async {
                for look in 1_u32.. {
                    let report = Report::new(journal.state(), root.uri(), &seen, Timestamp::now());
                    let (text, is_end) = (self.text(&report)?, report.state.is_end());
                    let text = if redraw { format!("\x1b[H\x1b[J{text}") } else { text };
                    if !output::show_beside(text).await? || is_end {
                        return Ok(ExitCode::SUCCESS);
                    }
                    tokio::time::sleep(WATCH).await;
                    history::read_on(&mut journal).await?;
                    if look.is_multiple_of(BEATS) {
                        seen = sightings(&folder, journal.state()).await?;
                    }
                }
                Ok(ExitCode::SUCCESS)
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

/// Whether heartbeats say more than the journal: those of a run of several nodes that has not ended. A run that has no
/// generation yet may become one.
fn may_have_nodes(state: &RunState) -> bool {
    match Standing::of(state) {
        Standing::Completed | Standing::Failed => false,
        Standing::Created => true,
        Standing::InProgress | Standing::Interrupted | Standing::Capped => {
            state.formed().is_some_and(Formation::is_of_several)
        }
    }
}

async fn sightings(folder: &Store, state: &RunState) -> Result<Vec<Sighting>> {
    if may_have_nodes(state) { Ok(overview::sightings(folder).await?) } else { Ok(Vec::new()) }
}

impl<'a> Report<'a> {
    fn new(state: &'a RunState, store: String, seen: &'a [Sighting], now: Timestamp) -> Self {
        let config = history::config(state);
        let (newest, step) = (state.newest(), history::last_step(state));
        let safe = newest.map_or(Step(0), |checkpoint| checkpoint.committed.step);
        let mixed = config.workload.parallel.mixed;
        Self {
            run_id: state.run_id(),
            store,
            state: Standing::of(state),
            failure: match state.outcome() {
                Outcome::Failed { reason, .. } => Some(reason),
                Outcome::Open | Outcome::Completed { .. } => None,
            },
            cap: state.capped().map(|cap| format!("{cap}; to go on: trainer resume with {}", cap.remedy())),
            spent: spent(state, &config, now),
            early: history::early(state).map(|early| format!("stopped early: {early}")),
            held_out: HeldOut::of(state),
            speed: Recorded::of(state),
            generation: state.generation(),
            world_size: state.formed().map(|formed| formed.world_size),
            group: may_have_nodes(state).then(|| overview::overview(state.formed(), seen, now, mixed)).flatten(),
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
        if let Some(group) = &self.group {
            lines.extend(nodes::lines(group, now));
        }
        let step = self.step.unwrap_or_default();
        lines.push(("step", format!("{step} of {} (the last in the journal)", self.total_steps)));
        lines.push(("checkpoint", self.checkpoint_text(now)));
        if let Some(held_out) = &self.held_out {
            lines.push(("held out", held_out.to_string()));
        }
        if let Some(speed) = &self.speed {
            lines.push(("speed", speed.text()));
        }
        let count = human::plural(self.interruptions.len() as u64, "interruption");
        lines.push(("lost", format!("{} in {count}", human::plural(self.lost_steps, "step"))));
        lines.extend(self.spent.iter().map(|spent| ("spent", spent.clone())));
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
        match (self.state, self.failure.or(self.early.as_deref()).or(self.cap.as_deref())) {
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

/// What a run has taken so far, if it has caps or a price. A run that goes on takes more than its journal shows yet.
fn spent(state: &RunState, config: &RunConfig, now: Timestamp) -> Vec<String> {
    // A run that is over waits for nobody.
    let ended = matches!(Standing::of(state), Standing::Completed | Standing::Failed);
    let now = if ended { state.last_activity().0 } else { now };
    if config.run == CapsConfig::default() { Vec::new() } else { Spent::of(state, now).lines(&config.run) }
}

fn saving(every: Cadence) -> String {
    match every {
        Cadence::Auto => "automatic".into(),
        _ => format!("every {}", config::format_cadence(every)),
    }
}

/// The settings that people ask for first.
fn summary(config: &RunConfig) -> Vec<(&'static str, String)> {
    let TrainTask { model, data, train, .. } = &config.workload;
    let (subject, samples) = match model.task() {
        Some(own) => (("task", format!("{}, version {}", own.name, own.version)), "sample"),
        None => (("data", format!("{}, sequences of {}", data.train, data.sequence_length)), "sequence"),
    };
    vec![
        subject,
        (
            "training",
            format!(
                "{} a step, seed {}, lr {:e}, {} a worker",
                human::plural(train.global_batch.into(), samples),
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
    use crate::{
        history::tests::{changed, committed, created, group, state, story},
        ids::NodeId,
        journal::Record,
        rendezvous::{heartbeat::State, overview::testing::sighting},
    };

    #[test]
    fn a_state_is_shown_as_text_and_as_json() {
        let state = state(story());
        let now = Timestamp::from_second(1_000_000 + 720).unwrap();
        let report = Report::new(&state, "s3://b/runs".into(), &[], now);
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
        assert!(json.get("group").is_none(), "a run of one node is shown as ever");
    }

    #[test]
    fn the_nodes_of_a_run_of_several_are_shown() {
        let nodes = [("n1", 4), ("n2", 4), ("n3", 1), ("n4", 0)];
        let running = vec![created(), group(1, None, &nodes), committed(10, 1)];
        let node = |name| NodeId::new(name).unwrap();
        let second = 1_000_000 + 180;
        let seen = [
            sighting("n1", second - 2, |group| {
                (group.state, group.every_s, group.unreachable) = (State::Leader, 4, vec![node("n2")]);
            }),
            sighting("n2", second - 120, |_| {}),
            sighting("n3", second - 20, |group| group.state = State::CutOff),
            sighting("n9", second - 5, |group| (group.state, group.kind) = (State::Waiting, "B".into())),
        ];
        let now = Timestamp::from_second(second).unwrap();
        let state = state(running.clone());
        let report = Report::new(&state, "s3://b/runs".into(), &seen, now);
        let text = report.text(now);
        let expected = "\
generation  1, 9 workers, 0 worker restarts
nodes       4, led by n1; 1 silent; 1 without a heartbeat; 1 waits outside
node        n1: ranks 0 to 3, leads; alive, last beat 2s ago
node        n2: ranks 4 to 7; silent, last beat 2m ago; out of reach of n1
node        n3: rank 8; alive, last beat 20s ago; has lost its leader
node        n4: a spare without workers; no heartbeat
waiting     n9: 8 workers; alive, last beat 5s ago; it computes with \"B\", and others with \
                    \"NVIDIA A100-SXM4-40GB\" (parallel.mixed)
step        10 of";
        assert!(text.contains(expected), "{text}");
        let json: serde_json::Value = serde_json::from_str(&output::json_lines([&report]).unwrap()).unwrap();
        let group = &json["group"];
        assert_eq!((&group["generation"], &group["leader"]), (&1.into(), &"n1".into()));
        assert_eq!(group["members"][1]["sign"], "silent");
        assert_eq!(group["members"][1]["out_of_reach_of"][0], "n1");
        assert_eq!(group["members"][2]["first_rank"], 8);
        assert_eq!((&group["outside"][0]["says"], &group["outside"][0]["workers"]), (&"waiting".into(), &8.into()));

        // Nobody is asked for a beat when the run has ended.
        let (generation, step) = (Generation(1), Step(10));
        let last = Record::Completed { generation, step, loss: Some(1.0), early: None };
        let ended = self::state(running.into_iter().chain([last]).collect());
        assert!(!may_have_nodes(&ended));
        assert_eq!(Report::new(&ended, String::new(), &seen, now).group, None);
    }

    #[test]
    fn heartbeats_are_read_only_if_they_say_more_than_the_journal() {
        assert!(may_have_nodes(&state(vec![created()])), "several nodes may wait for the first generation");
        assert!(!may_have_nodes(&state(story())));
        let several = || vec![created(), group(1, None, &[("n1", 1), ("n2", 1)])];
        assert!(may_have_nodes(&state(several())));
        let mut left_over = several();
        left_over.push(changed(group(2, Some(1), &[("n2", 1)]), &[("n1", "it left")], &[]));
        assert!(may_have_nodes(&state(left_over)), "one is left of two");
    }
}
