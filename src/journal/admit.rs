//! Which record may be appended to a run in a given state, and by whom: the rule book, without I/O.

use super::{
    record::{Committed, Record, ResumePoint},
    state::{CheckpointStatus, Outcome, RunState},
};
use crate::ids::{Generation, NodeId};

/// The reason to refuse a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The writer's generation is not the newest any more.
    Fenced {
        /// Who formed the newest.
        node: NodeId,
        /// The newest.
        generation: Generation,
    },
    /// It would contradict the state; a clause that says how.
    Wrong(String),
}

/// Checks whether `record` may be the next one, written by a node that holds (has formed) generation `held`.
///
/// 1. A writer that holds an older generation than the newest is fenced, whatever it writes; so is a record on behalf
///    of an older generation.
/// 2. Only the holder of the newest generation may write `committed`, `completed` and `failed`. Any node may write
///    `notice` and `interrupted` for the newest generation, `damaged`, `cleared`, `pruned` (of one or of many), and
///    `formed`.
/// 3. A (step, generation) pair is committed once. Generations rise. `created` is the first record only.
/// 4. After `completed` or `failed`, only `damaged`, `cleared`, `pruned` and `formed` may follow.
/// 5. A generation resumes from a good checkpoint, or from the beginning if nothing was ever committed: no run starts
///    over because its checkpoints are damaged. It has nodes and workers.
/// 6. The newest good checkpoint is not pruned, nor the one that the newest generation resumed from while the run is
///    open.
/// 7. A run completes at a step that is its newest good checkpoint.
/// 8. A good checkpoint is condemned (`damaged`) only while another one on the run's current line is good, and never
///    the one most recently read as whole ([`RunState::spared`]). `cleared` withdraws a verdict; a pruned checkpoint
///    can't be cleared.
pub fn admit(state: &RunState, held: Option<Generation>, record: &Record) -> Result<(), Refusal> {
    let wrong = |reason: String| Err(Refusal::Wrong(reason));
    let speaks_for = match record {
        Record::Committed(Committed { generation, .. })
        | Record::Notice { generation, .. }
        | Record::Interrupted { generation, .. }
        | Record::Completed { generation, .. }
        | Record::Failed { generation, .. } => Some(*generation),
        Record::Created { .. }
        | Record::Formed { .. }
        | Record::Damaged { .. }
        | Record::Cleared { .. }
        | Record::Pruned { .. }
        | Record::PrunedMany { .. } => None,
    };
    if let Some(newest) = state.formed()
        && [held, speaks_for].into_iter().flatten().any(|generation| generation < newest.generation)
    {
        return Err(Refusal::Fenced { node: newest.node.clone(), generation: newest.generation });
    }
    state.consistent(record).map_err(|error| Refusal::Wrong(error.to_string()))?;
    let ended = match state.outcome() {
        Outcome::Open => None,
        Outcome::Completed { .. } => Some("completed"),
        Outcome::Failed { .. } => Some("failed"),
    };
    if let (Some(ended), Some(_)) = (ended, speaks_for) {
        return wrong(format!("the run has {ended}"));
    }
    let must_hold = matches!(record, Record::Committed(_) | Record::Completed { .. } | Record::Failed { .. });
    if must_hold && held != speaks_for {
        return wrong("this node has not formed that generation".into());
    }
    match record {
        Record::Formed { roster, world_size, resume, .. } => {
            if roster.is_empty() || world_size.get() == 0 {
                return wrong("a generation needs nodes and workers".into());
            }
            if resume.is_none() && !state.checkpoints().is_empty() {
                return wrong("the run has checkpoints and would start over from the beginning".into());
            }
            if let Some(point) = resume
                && state.checkpoint(point.step, point.generation).is_none_or(|c| c.status != CheckpointStatus::Good)
            {
                return wrong(format!(
                    "step {} of generation {} is not a good checkpoint",
                    point.step, point.generation
                ));
            }
        }
        Record::Pruned { step, generation } => {
            may_be_pruned(state, &ResumePoint { step: *step, generation: *generation })?;
        }
        Record::PrunedMany { checkpoints } => {
            checkpoints.iter().try_for_each(|point| may_be_pruned(state, point))?;
        }
        Record::Damaged { step, generation, .. } => {
            let point = super::ResumePoint { step: *step, generation: *generation };
            if let Some(why) = state.spared(&point) {
                return wrong(format!("step {step} of generation {generation} is not condemned: {why}"));
            }
        }
        Record::Cleared { step, generation }
            if state.checkpoint(*step, *generation).is_some_and(|c| c.status == CheckpointStatus::Pruned) =>
        {
            return wrong(format!("step {step} of generation {generation} is pruned"));
        }
        Record::Completed { step, .. } if state.newest().is_none_or(|newest| newest.committed.step != *step) => {
            return wrong(format!("step {step} is not the newest good checkpoint"));
        }
        _ => {}
    }
    Ok(())
}

/// Rule 6.
fn may_be_pruned(state: &RunState, point: &ResumePoint) -> Result<(), Refusal> {
    let ResumePoint { step, generation } = point;
    if state.newest().is_some_and(|newest| newest.point() == *point) {
        return Err(Refusal::Wrong(format!("step {step} of generation {generation} is the newest good checkpoint")));
    }
    let good = state.checkpoint(*step, *generation).is_some_and(|c| c.status == CheckpointStatus::Good);
    let resumed = state.formed().and_then(|formed| formed.resume.as_ref());
    if good && *state.outcome() == Outcome::Open && resumed == Some(point) {
        return Err(Refusal::Wrong(format!(
            "the newest generation resumed from step {step} of generation {generation}"
        )));
    }
    Ok(())
}
