//! Hints about what to type next, where they take more than a few words.

use crate::{
    error::{Error, Kind},
    ids::{NodeId, RunId, Step},
};

/// The run diverged; `good` is the last checkpoint before that.
pub fn diverged(run_id: &RunId, good: Option<Step>) -> String {
    match good {
        Some(good) => format!(
            "the last good checkpoint is step {good}; lower the learning rate and carry on: trainer resume --run-id \
             {run_id} --from {good} --set train.optimizer.lr=…"
        ),
        None => "no checkpoint was made yet; start again with a lower learning rate: trainer run CONFIG --run-id NEW \
                 --set train.optimizer.lr=…"
            .to_owned(),
    }
}

/// Only checkpoints that the run has turned away from are left.
pub fn abandoned(run_id: &RunId, steps: &[String]) -> String {
    let steps = steps.join(", ");
    format!(
        "checkpoints abandoned by an earlier --from can be selected: trainer resume --run-id {run_id} --from STEP, \
         one of {steps}"
    )
}

/// The run is beyond its last step.
pub fn more_steps(run_id: &RunId) -> String {
    format!(
        "give more steps, --set train.steps=N, or an earlier checkpoint, --from STEP: `trainer checkpoints --run-id \
         {run_id}` lists them"
    )
}

/// Another node has the run.
pub fn taken(run_id: &RunId, other: &NodeId) -> Error {
    Error::new(Kind::Fenced, format!("run {run_id} is being trained by node {other}, which is alive")).with_hint(
        format!(
            "nothing is lost: `trainer status --run-id {run_id} --watch` shows its work, `trainer drain --run-id \
         {run_id}` ends it; then give this command again"
        ),
    )
}
