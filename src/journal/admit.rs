//! Which record may be appended to a run in a given state, and by whom: the rule book, without I/O.
//!
//! # Words
//! A *member* of a generation is a node that its roster names. Its *leader* is the node that formed it; that node
//! *holds* it. A writer *speaks for* a generation if its record names it: `committed`, `notice`, `interrupted`,
//! `completed`, `failed`. A generation *continues* another as [`RunState::continued`] says.
//!
//! # Rules
//! 1. *Fencing.* Nobody speaks for an older generation than the newest. A node that holds an older one, and that the
//!    newest does not name, is fenced: it writes nothing any more, whatever the record.
//! 2. *Who speaks.* `committed` is written by any member of the newest generation: if the leader dies between the last
//!    receipt and the record, a member writes it, and nothing is lost. `notice`, `interrupted`, `completed` and
//!    `failed` are the leader's alone: a follower that leaves does not end the generation of the others. Who is a
//!    member is read from the record, never remembered or believed.
//! 3. *Who else writes.* Any node may write `damaged`, `cleared`, `pruned` (of one or of many), and `formed`.
//! 4. A (step, generation) pair is committed once. Generations rise. `created` is the first record only.
//! 5. After `completed` or `failed`, only `damaged`, `cleared`, `pruned` and `formed` may follow.
//! 6. A generation resumes from a good checkpoint, or from the beginning if nothing was ever committed: no run starts
//!    over because its checkpoints are damaged. It has nodes and workers, and its writer is the first of its nodes.
//! 7. A generation that continues another accounts for each of its nodes ([`super::members`]). A node that was left out
//!    does not come back under its name.
//! 8. The newest good checkpoint is not pruned, nor the one that the newest generation resumed from while the run is
//!    open.
//! 9. A run completes at a step that is its newest good checkpoint.
//! 10. A good checkpoint is condemned (`damaged`) only while another one on the run's current line is good, and never
//!     the one most recently read as whole ([`RunState::spared`]). `cleared` withdraws a verdict; a pruned checkpoint
//!     can't be cleared.
//!
//! Rules 2 and 7 hold for writers. A record of an earlier version that breaks them stays readable: then any node wrote
//! `notice` and `interrupted`, and no record continued another.
//!
//! # Rules beside the journal
//! What the journal can't see, `tests/members_model.rs` checks together with these rules:
//! - *Attempts.* A save has one attempt, made by the leader; receipts name it, and a receipt of another attempt counts
//!   for nothing. Whoever has abandoned a save never commits it; a save whose record was begun is not abandoned.
//! - *Slots.* A slot is given out again when the save in it has ended on every node, not when it has failed on one:
//!   bytes that are still uploaded are not written over. A node enters a generation with no upload of its own left.
//! - *The finisher.* After its leader's loss a member finishes a save whose receipts are all there and name one
//!   attempt, then forms.
//! - *Invitations.* A node that was invited works in a generation once it has read the record that names it.
//! - *Burial.* A node removes another one's heartbeat after its own `formed` stands, never before: until then that
//!   other one may lead.
//! - *Frozen ranks.* A member that is frozen goes on at its leader's word alone, or ends its life.

use super::{
    error::JournalError,
    record::{Committed, Record, ResumePoint},
    state::{CheckpointStatus, Formation, Outcome, RunState},
};
use crate::ids::{Generation, NodeId};

/// The reason to refuse a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The writer's generation is not the newest any more, and another group has the run.
    Fenced {
        /// Who formed the newest.
        node: NodeId,
        /// The newest.
        generation: Generation,
    },
    /// The writer's own group goes on without it: it slept, or was cut off. It comes back under a new id, as any other
    /// newcomer does: its old name may still be on requests that are on their way.
    LeftOut {
        /// Who formed the newest.
        node: NodeId,
        /// The newest.
        generation: Generation,
        /// The reason in the record.
        why: String,
    },
    /// It would contradict the state; a clause that says how.
    Wrong(String),
}

impl Refusal {
    /// The error about a `record` of this kind.
    pub fn into_error(self, record: &'static str) -> JournalError {
        match self {
            Self::Fenced { node, generation } => JournalError::Fenced { node, generation },
            Self::LeftOut { node, generation, why } => JournalError::LeftOut { node, generation, why },
            Self::Wrong(reason) => JournalError::Refused { record, reason },
        }
    }
}

/// Whether node `me`, which works in `generation` as its leader or as a follower, has lost the run: a newer generation
/// exists and does not name it. `None`: it has not. A newer one that names it ends its work in the old one, but does
/// not shut it out: it reads the record and goes on there.
pub fn fenced(state: &RunState, me: &NodeId, generation: Generation) -> Option<Refusal> {
    let newest = state.formed().filter(|newest| newest.generation > generation)?;
    newest.member(me).is_none().then(|| superseded(state, newest, me, generation))
}

/// The refusal of what `me` does for `generation`, which is older than the `newest`.
fn superseded(state: &RunState, newest: &Formation, me: &NodeId, generation: Generation) -> Refusal {
    let (node, newest_generation) = (newest.node.clone(), newest.generation);
    match state.left_out(me, generation).filter(|_| newest.member(me).is_none()) {
        Some(why) => Refusal::LeftOut { node, generation: newest_generation, why: why.to_owned() },
        None => Refusal::Fenced { node, generation: newest_generation },
    }
}

/// Checks whether `record` may be the next one, written by node `writer`, which holds (has formed) generation `held`.
/// The rules are in the header of this file.
pub fn admit(state: &RunState, writer: &NodeId, held: Option<Generation>, record: &Record) -> Result<(), Refusal> {
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
        && let Some(older) = speaks_for.filter(|generation| *generation < newest.generation)
    {
        return Err(superseded(state, newest, writer, older));
    }
    if let Some(refusal) = held.and_then(|held| fenced(state, writer, held)) {
        return Err(refusal);
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
    if let Some(generation) = speaks_for.filter(|_| held != speaks_for) {
        match record {
            Record::Committed(_) if state.is_member(writer, generation) => {}
            Record::Committed(_) => return wrong("this node is no member of that generation".into()),
            _ => return wrong("this node has not formed that generation".into()),
        }
    }
    match record {
        Record::Formed { roster, world_size, resume, .. } => {
            if roster.is_empty() || world_size.get() == 0 {
                return wrong("a generation needs nodes and workers".into());
            }
            if roster.first().is_none_or(|leader| leader.node != *writer) {
                return wrong("the first node of a generation is the one that forms it".into());
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
            let of_many = record.format() >= 4;
            if let Some(old) = roster.iter().find(|member| of_many && state.is_used_up(&member.node)) {
                return wrong(format!("node {} was left out, and comes back under a new id only", old.node));
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

/// Rule 8.
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
