//! `trainer drain`

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg},
    output, store,
};
use crate::{
    error::{Error, Kind, Result},
    history::{self, Standing},
    ids::{Generation, RunId, Step},
    journal::{Journal, Outcome, RunState},
    notice::drain,
    rendezvous::heartbeat::{self, Liveness},
    report::{self, human},
    storage::Store,
};

/// The interval between two looks at the journal.
const LOOK: Duration = Duration::from_secs(1);
/// The number of looks after which the node's heartbeat is checked, too.
const PULSE: u32 = 10;

/// Ask a live run to save and stop
#[derive(Debug, Args)]
#[command(after_help = "\
Example: trainer drain --run-id first

The run exits with code 75; `trainer resume` continues it.
A generation that another process forms later is not stopped.")]
pub struct Drain {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Do not wait until the run has stopped
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    json: JsonArg,
}

/// What `--json` prints.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report<'a> {
    run_id: &'a RunId,
    generation: Generation,
    /// The generation had already been asked.
    asked_before: bool,
    #[serde(flatten)]
    end: Option<End>,
}

/// How a generation ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct End {
    state: Standing,
    step: Step,
    /// The newest checkpoint.
    committed: Option<Step>,
    lost_steps: u64,
    reason: Option<String>,
}

/// The journal's state of a generation that was asked to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Progress {
    AtWork,
    Ended(End),
    /// A later one has been formed, and this one recorded no end.
    Followed(Generation),
}

fn progress(state: &RunState, generation: Generation) -> Progress {
    if let Some(end) = state.interruptions().iter().rfind(|end| end.generation == generation) {
        return Progress::Ended(End {
            state: Standing::Interrupted,
            step: end.step,
            committed: end.committed,
            lost_steps: end.lost_steps,
            reason: Some(end.verdict.clone()),
        });
    }
    let committed = state.newest().map(|checkpoint| checkpoint.committed.step);
    match state.outcome() {
        Outcome::Completed { generation: ended, step, .. } if *ended == generation => {
            Progress::Ended(End { state: Standing::Completed, step: *step, committed, lost_steps: 0, reason: None })
        }
        Outcome::Failed { generation: ended, step, reason, .. } if *ended == generation => Progress::Ended(End {
            state: Standing::Failed,
            step: *step,
            committed,
            lost_steps: step.get().saturating_sub(committed.unwrap_or_default().get()),
            reason: Some(reason.clone()),
        }),
        _ if state.generation() > generation => Progress::Followed(state.generation()),
        _ => Progress::AtWork,
    }
}

impl Drain {
    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let (root, run_id) = (self.run.store.open()?, &self.run.run_id);
            let folder = root.folder(run_id.as_str());
            let mut journal = history::open(&root, run_id).await?;
            let generation = alive(&folder, journal.state()).await?;
            let first = drain::ask(&folder, generation).await?;
            let asked = if first { "is asked" } else { "had been asked before" };
            report::say(format!("generation {generation} of run {run_id} {asked} to save and stop\n"));
            let end = if self.no_wait { None } else { Some(wait(&folder, &mut journal, generation).await?) };
            let report = Report { run_id, generation, asked_before: !first, end };
            let text = if self.json.json { output::json_lines([&report])? } else { report.text() };
            output::emit(&text)?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// The generation that is now at work on the run.
async fn alive(folder: &Store, state: &RunState) -> Result<Generation> {
    let run_id = state.run_id();
    let standing = Standing::of(state);
    let Some(formed) = state.formed().filter(|_| standing == Standing::InProgress) else {
        let what = match standing {
            Standing::Created => "has not begun to train yet".to_owned(),
            standing => format!("is not running: it is {}", standing.word()),
        };
        return Err(Error::new(Kind::Usage, format!("run {run_id} {what}"))
            .with_hint(format!("there is nothing to stop; `trainer status --run-id {run_id}` says more")));
    };
    match heartbeat::look(folder, &formed.node).await? {
        Liveness::Alive => Ok(formed.generation),
        Liveness::Gone(_) => Err(Error::new(
            Kind::Usage,
            format!("run {run_id} is not running: its node {} stopped without a final record", formed.node),
        )
        .with_hint(format!("there is nothing to stop; `trainer resume --run-id {run_id}` continues it"))),
    }
}

/// Waits until the journal says how the generation ended, or, if a worker or a node was lost, the one that continued
/// it.
async fn wait(folder: &Store, journal: &mut Journal, mut generation: Generation) -> Result<End> {
    let run_id = journal.state().run_id().clone();
    for look in 1_u32.. {
        history::read_on(journal).await?;
        let state = journal.state();
        match progress(state, generation) {
            Progress::Ended(end) => return Ok(end),
            Progress::Followed(by) if state.heeds(generation) => {
                // It listens for the earlier request a while longer, but may not have been able to read that one from
                // the store.
                drain::ask(folder, by).await?;
                generation = by;
            }
            Progress::Followed(by) => {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!("generation {generation} of run {run_id} was followed by {by} before it stopped"),
                )
                .with_hint("run the same command again: the request does not hold for later generations"));
            }
            Progress::AtWork => {}
        }
        if look.is_multiple_of(PULSE)
            && let Some(node) = state.formed().map(|formed| formed.node.clone())
            && let Liveness::Gone(_) = heartbeat::look(folder, &node).await?
        {
            // It may have written its last record meanwhile.
            history::read_on(journal).await?;
            if progress(journal.state(), generation) != Progress::AtWork {
                continue;
            }
            return Err(Error::new(
                Kind::Unavailable,
                format!("node {node} of run {run_id} stopped without a final record"),
            )
            .with_hint(format!(
                "the steps since its newest checkpoint are lost; see `trainer status --run-id {run_id}`"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
    Err(Error::new(Kind::Unavailable, format!("run {run_id} does not stop")))
}

impl Report<'_> {
    fn text(&self) -> String {
        let Some(end) = &self.end else { return String::new() };
        let reason = end.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
        let lost = match end.state {
            Standing::Completed => String::new(),
            _ => format!(", {} lost", human::plural(end.lost_steps, "step")),
        };
        let (run, state, step) = (self.run_id, end.state.word(), end.step);
        human::plain(&format!("run {run} is {state} after step {step}{lost}{reason}")) + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::tests::{state, story};

    #[test]
    fn the_journal_says_how_a_generation_ended() {
        let state = state(story());
        // The story: the second generation was interrupted after step 34, the third is at work, the first has died.
        let Progress::Ended(end) = progress(&state, Generation(2)) else {
            panic!("{:?}", progress(&state, Generation(2)))
        };
        assert_eq!((end.state, end.step, end.lost_steps), (Standing::Interrupted, Step(34), 4));
        assert_eq!(progress(&state, Generation(3)), Progress::AtWork);
        assert_eq!(progress(&state, Generation(1)), Progress::Followed(Generation(3)));
        let run_id = RunId::new("first").unwrap();
        let report = |end| Report { run_id: &run_id, generation: Generation(2), asked_before: false, end };
        assert_eq!(report(Some(end)).text(), "run first is interrupted after step 34, 4 steps lost: no time\n");
        assert_eq!(report(None).text(), "");
        let json = output::json_lines([report(None)]).unwrap();
        assert_eq!(json, "{\"run_id\":\"first\",\"generation\":2,\"asked_before\":false}\n");
    }
}
