//! Verdicts on checkpoints, and the rules that spare one: one machine's doubt must not cost a run its good checkpoints.

use jiff::Timestamp;

use super::{
    record::ResumePoint,
    state::{CheckpointStatus, Formation, RunState},
};

/// A verdict that was withdrawn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clearance {
    /// Number of its record.
    pub number: u64,
    /// When, by its writer's clock.
    pub at: Timestamp,
    /// The checkpoint that was read as whole.
    pub point: ResumePoint,
}

impl RunState {
    /// The good checkpoint most recently read as whole, according to the records: one that was cleared, or one that a
    /// generation resumed from and then trained.
    pub fn last_verified(&self) -> Option<ResumePoint> {
        let is_good = |point: &ResumePoint| {
            self.checkpoint(point.step, point.generation).is_some_and(|c| c.status == CheckpointStatus::Good)
        };
        let cleared = self.clearances().iter().rev().find(|cleared| is_good(&cleared.point));
        let loaded = self.formations().iter().rev().find_map(|formed| {
            let point = formed.resume.as_ref().filter(|point| is_good(point))?;
            self.has_trained(formed, point).then(|| (formed.number, point.clone()))
        });
        let cleared = cleared.map(|cleared| (cleared.number, cleared.point.clone()));
        cleared.into_iter().chain(loaded).max_by_key(|(number, _)| *number).map(|(_, point)| point)
    }

    /// Whether a generation trained on from its resume point: so it had loaded that checkpoint.
    fn has_trained(&self, formed: &Formation, from: &ResumePoint) -> bool {
        let generation = formed.generation;
        self.checkpoints().of(generation).next().is_some()
            || self.interruptions().iter().rev().any(|end| end.generation == generation && end.step > from.step)
    }

    /// Why a good checkpoint must not be condemned, whatever one machine has found; `None`: it may be condemned.
    pub fn spared(&self, point: &ResumePoint) -> Option<&'static str> {
        let is_good = |c: &super::Checkpoint| c.status == CheckpointStatus::Good;
        if !self.checkpoint(point.step, point.generation).is_some_and(is_good) {
            return None;
        }
        let is_it = |c: &&super::Checkpoint| c.point() == *point;
        let line = self.candidates();
        if self.good().len() == 1 || (line.len() == 1 && line.iter().any(is_it)) {
            return Some("it is the last good checkpoint");
        }
        (self.last_verified().as_ref() == Some(point)).then_some("no other checkpoint was read whole after it")
    }
}
