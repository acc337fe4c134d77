//! `trainer drain`

use std::{process::ExitCode, time::Duration};

use clap::Args;
use serde::Serialize;

use super::{
    args::{JsonArg, RunArg, StoreArg},
    output, store,
};
use crate::{
    error::{Error, Kind, Result},
    history::{self, Standing},
    ids::{Generation, NodeId, RunId, Step},
    journal::{Formation, Journal, Outcome, RunState},
    notice::drain,
    rendezvous::heartbeat,
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

The run exits with code 75 on all its nodes; `trainer resume` continues it.
A generation that goes on in place of this one is asked, too; one that a person starts later is not.")]
pub struct Drain {
    #[command(flatten)]
    pub(super) run: RunArg,
    /// Do not wait until the run has stopped
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    json: JsonArg,
    /// A run that has stopped already is as good.
    #[arg(skip)]
    or_stopped: bool,
}

/// What `--json` prints.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report<'a> {
    run_id: &'a RunId,
    generation: Generation,
    /// Its nodes, if it is a generation of several: all of them are asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    nodes: Option<usize>,
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
    /// A later one has been formed, and this one recorded no end, or its group goes on in the later one.
    Followed(Generation),
}

fn progress(state: &RunState, generation: Generation) -> Progress {
    // The others of a group may go on after it ended. What was asked of it holds for them.
    let goes_on = |newest: &&Formation| newest.generation > generation && newest.succession.continues.is_some();
    if let Some(newest) = state.formed().filter(goes_on).filter(|_| state.heeds(generation)) {
        return Progress::Followed(newest.generation);
    }
    if let Some(end) = state.interruptions().iter().rfind(|end| end.generation == generation) {
        return Progress::Ended(End {
            state: if end.cap.is_some() { Standing::Capped } else { Standing::Interrupted },
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
    /// The command for this run; it waits until the run has stopped, which it may have done already.
    pub(super) fn of(run_id: RunId, store: Option<String>, json: JsonArg) -> Self {
        Self { run: RunArg { run_id, store: StoreArg { store } }, no_wait: false, json, or_stopped: true }
    }

    pub(super) fn execute(self) -> Result<ExitCode> {
        store::block_on(async {
            let (root, run_id) = (self.run.store.open()?, &self.run.run_id);
            let folder = root.folder(run_id.as_str());
            let mut journal = history::open(&root, run_id).await?;
            let formed = match alive(&folder, journal.state()).await {
                Err(stopped) if self.or_stopped && stopped.kind() == Kind::Usage => {
                    report::say(format!("{stopped}\n"));
                    return Ok(ExitCode::SUCCESS);
                }
                formed => formed?,
            };
            let (generation, nodes) = (formed.generation, formed.is_of_several().then_some(formed.roster.len()));
            let first = drain::ask(&folder, generation).await?;
            report::say(asking(run_id, generation, nodes, first));
            let end = if self.no_wait { None } else { Some(wait(&folder, &mut journal, generation).await?) };
            let report = Report { run_id, generation, nodes, asked_before: !first, end };
            let text = if self.json.json { output::json_lines([&report])? } else { report.text() };
            output::emit(&text)?;
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// What is said when the request is stored. `nodes`: of a generation of several.
fn asking(run_id: &RunId, generation: Generation, nodes: Option<usize>, first: bool) -> String {
    let asked = if first { "is asked" } else { "had been asked before" };
    let all = nodes.map(|nodes| format!(" (the whole run: {})", human::plural(nodes as u64, "node")));
    format!("generation {generation} of run {run_id}{} {asked} to save and stop\n", all.unwrap_or_default())
}

/// Whether a node of the generation lives: in a group, others go on without the leader.
async fn lives(folder: &Store, formed: &Formation) -> Result<bool> {
    let nodes: Vec<&NodeId> = formed.roster.iter().map(|member| &member.node).collect();
    Ok(heartbeat::any_lives(folder, &nodes).await?)
}

/// A generation whose nodes are all gone.
fn gone(formed: &Formation) -> String {
    match formed.roster.len() {
        1 => format!("its node {} stopped without a final record", formed.node),
        nodes => format!("its {nodes} nodes stopped without a final record"),
    }
}

/// The generation that is now at work on the run.
async fn alive<'s>(folder: &Store, state: &'s RunState) -> Result<&'s Formation> {
    let run_id = state.run_id();
    let standing = Standing::of(state);
    let Some(formed) = state.formed().filter(|_| standing == Standing::InProgress) else {
        let what = match standing {
            Standing::Created => "has not begun to train yet".to_owned(),
            standing => format!("is not running: it is {}", standing.word()),
        };
        let hint = match state.formed().filter(|formed| formed.is_of_several()) {
            Some(_) if standing == Standing::Interrupted => format!(
                "there is nothing to stop, but nodes that wait go on when there are enough of them; `trainer status \
                 --run-id {run_id}` shows them"
            ),
            _ => format!("there is nothing to stop; `trainer status --run-id {run_id}` says more"),
        };
        return Err(Error::new(Kind::Usage, format!("run {run_id} {what}")).with_hint(hint));
    };
    if lives(folder, formed).await? {
        return Ok(formed);
    }
    Err(Error::new(Kind::Usage, format!("run {run_id} is not running: {}", gone(formed)))
        .with_hint(format!("there is nothing to stop; `trainer resume --run-id {run_id}` continues it")))
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
            && let Some(formed) = state.formed().cloned()
            && !lives(folder, &formed).await?
        {
            // It may have written its last record meanwhile.
            history::read_on(journal).await?;
            if progress(journal.state(), generation) != Progress::AtWork {
                continue;
            }
            let who = match formed.roster.len() {
                1 => format!("node {} of run {run_id}", formed.node),
                nodes => format!("all {nodes} nodes of run {run_id}"),
            };
            return Err(Error::new(Kind::Unavailable, format!("{who} stopped without a final record")).with_hint(
                format!("the steps since its newest checkpoint are lost; see `trainer status --run-id {run_id}`"),
            ));
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
    use crate::{
        history::tests::{changed, created, group, state, story},
        journal::Record,
    };

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
        let report = |end| Report { run_id: &run_id, generation: Generation(2), nodes: None, asked_before: false, end };
        assert_eq!(report(Some(end)).text(), "run first is interrupted after step 34, 4 steps lost: no time\n");
        assert_eq!(report(None).text(), "");
        let json = output::json_lines([report(None)]).unwrap();
        assert_eq!(json, "{\"run_id\":\"first\",\"generation\":2,\"asked_before\":false}\n");
    }
    #[test]
    fn a_request_follows_the_group_that_goes_on() {
        let interrupted = |generation| Record::Interrupted {
            generation: Generation(generation),
            step: Step(12),
            committed: None,
            lost_steps: 12,
            verdict: "too few nodes".into(),
            drain: None,
            cap: None,
        };
        let begin = || vec![created(), group(1, None, &[("a", 1), ("b", 1)])];
        let by_b = |before| changed(group(2, before, &[("b", 1)]), &[("a", "it does not answer")], &[]);
        let of = |more: Vec<Record>| progress(&state(begin().into_iter().chain(more).collect()), Generation(1));
        assert_eq!(of(vec![]), Progress::AtWork);
        assert_eq!(of(vec![by_b(Some(1))]), Progress::Followed(Generation(2)));
        assert_eq!(
            of(vec![interrupted(1), by_b(Some(1))]),
            Progress::Followed(Generation(2)),
            "it stepped down for want of nodes, and the others found more: the run is not stopped"
        );
        let Progress::Ended(end) = of(vec![interrupted(1)]) else { panic!("it said that it ended") };
        assert_eq!((end.state, end.step), (Standing::Interrupted, Step(12)));
        // A person resumed it.
        let resumed = group(2, None, &[("c", 1), ("d", 1)]);
        assert!(matches!(of(vec![interrupted(1), resumed.clone()]), Progress::Ended(_)));
        let after = state(begin().into_iter().chain([resumed]).collect());
        assert_eq!(progress(&after, Generation(1)), Progress::Followed(Generation(2)));
        assert!(!after.heeds(Generation(1)), "so the caller does not ask it");
        // The end of a chain is the end of all that was asked of it.
        let chain = state(begin().into_iter().chain([by_b(Some(1)), interrupted(2)]).collect());
        assert!(matches!(progress(&chain, Generation(2)), Progress::Ended(_)));
    }

    #[test]
    fn a_request_says_that_all_nodes_are_asked() {
        let run_id = RunId::new("first").unwrap();
        let said = |nodes, first| asking(&run_id, Generation(4), nodes, first);
        assert_eq!(said(None, true), "generation 4 of run first is asked to save and stop\n");
        assert_eq!(
            said(Some(3), false),
            "generation 4 of run first (the whole run: 3 nodes) had been asked before to save and stop\n"
        );
        let report =
            Report { run_id: &run_id, generation: Generation(4), nodes: Some(3), asked_before: false, end: None };
        let json = output::json_lines([report]).unwrap();
        assert_eq!(json, "{\"run_id\":\"first\",\"generation\":4,\"nodes\":3,\"asked_before\":false}\n");
    }
}
