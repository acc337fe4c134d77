//! Hints about what to type next, where they take more than a few words.

use crate::{
    error::{Error, Kind},
    ids::{NodeId, RunId},
};

/// Only checkpoints that the run has turned away from are left.
pub fn abandoned(run_id: &RunId, steps: &[String]) -> String {
    let steps = steps.join(", ");
    format!(
        "checkpoints abandoned by an earlier --from can be selected: trainer resume --run-id {run_id} --from STEP, \
         one of {steps}"
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
