//! Hints about what to type next, where they take more than a few words.

use crate::{
    error::{Error, Kind},
    ids::{NodeId, RunId},
    journal::RunState,
};

/// Only checkpoints that the run has turned away from are left.
pub fn abandoned(run_id: &RunId, steps: &[String]) -> String {
    let steps = steps.join(", ");
    format!(
        "checkpoints abandoned by an earlier --from can be selected: trainer resume --run-id {run_id} --from STEP, \
         one of {steps}"
    )
}

/// Bytes of a reason in a record, at most.
const MOST_OF_A_REASON: usize = 400;

/// Another node has the run.
pub fn taken(run_id: &RunId, other: &NodeId) -> Error {
    Error::new(Kind::Fenced, format!("run {run_id} is being trained by node {other}, which is alive")).with_hint(
        format!(
            "nothing is lost: `trainer status --run-id {run_id} --watch` shows its work, `trainer drain --run-id \
         {run_id}` ends it; then give this command again"
        ),
    )
}

/// Machines were started for nothing.
pub fn fruitless(state: &RunState, most: u32) -> Error {
    let run_id = state.run_id();
    let newest = state.newest().map_or_else(
        || "it has no checkpoint yet".to_owned(),
        |newest| format!("its newest checkpoint is that of step {}", newest.committed.step),
    );
    let what = format!("run {run_id} was started {most} times in a row without a new checkpoint; {newest}");
    Error::new(Kind::Fruitless, what).with_hint(format!(
        "nothing is lost: `trainer explain --run-id {run_id}` says how these starts ended; then `trainer resume \
         --run-id {run_id} --set restart.fruitless_starts={}`, or any other changed setting, starts the count anew",
        most.saturating_add(1)
    ))
}

/// A reason that a record can hold.
pub fn short(why: &str) -> String {
    let mut text = String::new();
    for c in why.chars().filter(|c| !c.is_control()) {
        if text.len() + c.len_utf8() > MOST_OF_A_REASON {
            break;
        }
        text.push(c);
    }
    if text.trim().is_empty() { "no reason was given".to_owned() } else { text }
}
