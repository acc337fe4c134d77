//! The story of each interruption: the notices, the response, the cost.
//!
//! Times within one interruption are of one machine's monotonic clock; those between machines are differences of their
//! wall clocks.

use jiff::Timestamp;
use serde::Serialize;

use crate::{
    ids::{Generation, NodeId, RunId, Step},
    journal::{Drain, Formation, FormedReason, Interruption, Means, RunState},
};

/// How a generation ended before the run was complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It was asked to stop, and recorded the outcome.
    Stopped,
    /// It ended without a last record: killed, or cut off from the store.
    Vanished,
    /// One of its workers died; the same machine continued.
    WorkerDied,
    /// A node came or went; the others continued.
    Regrouped,
}

/// A notice, as recorded in the journal.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Heard<'a> {
    /// When, by the clock of the machine that received it.
    pub at: Timestamp,
    /// Its source.
    pub source: &'a str,
    /// Its meaning.
    pub means: Means,
    /// Seconds left.
    pub deadline_s: Option<f64>,
}

fn is_one(nodes: &usize) -> bool {
    *nodes == 1
}

/// The generation that continued.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Next<'a> {
    /// The generation.
    pub generation: Generation,
    /// Its leader.
    pub node: &'a NodeId,
    /// Its nodes, if there are several.
    #[serde(skip_serializing_if = "is_one")]
    pub nodes: usize,
    /// The checkpoint that it started from.
    pub resume_step: Option<Step>,
    /// Seconds from the end, or the last sign of life, until it was formed.
    pub away_s: f64,
}

/// One interruption.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Episode<'a> {
    /// The generation that ended.
    pub generation: Generation,
    /// Its leader.
    pub node: &'a NodeId,
    /// Its nodes, if there are several.
    #[serde(skip_serializing_if = "is_one")]
    pub nodes: usize,
    /// How it ended.
    pub how: How,
    /// When it ended; if it vanished, its last sign of life.
    pub at: Timestamp,
    /// The last finished step, if recorded.
    pub step: Option<Step>,
    /// The checkpoint from which the run continued, or can.
    pub checkpoint: Option<Step>,
    /// Finished steps that are done again, if known.
    pub lost_steps: Option<u64>,
    /// Why it ended, if recorded.
    pub verdict: Option<&'a str>,
    /// The notices that it received.
    pub notices: Vec<Heard<'a>>,
    /// How the drain went, if there was one.
    pub drain: Option<&'a Drain>,
    /// The error of the prediction, counted from when the plan was made: 0.1 is a tenth longer than expected.
    pub prediction_error: Option<f64>,
    /// The generation that continued.
    pub next: Option<Next<'a>>,
}

/// All interruptions of a run.
#[derive(Debug, Serialize)]
pub struct Total<'a> {
    /// The run.
    pub run_id: &'a RunId,
    /// Their number.
    pub interruptions: usize,
    /// Steps that are done again, of those whose loss is known.
    pub lost_steps: u64,
    /// Interruptions whose loss was not recorded.
    pub unknown: usize,
    /// Seconds in which no machine trained the run.
    pub away_s: f64,
}

/// Sums them up.
pub fn total<'a>(state: &'a RunState, episodes: &[Episode<'_>]) -> Total<'a> {
    Total {
        run_id: state.run_id(),
        interruptions: episodes.len(),
        lost_steps: episodes.iter().filter_map(|episode| episode.lost_steps).sum(),
        unknown: episodes.iter().filter(|episode| episode.lost_steps.is_none()).count(),
        away_s: episodes.iter().filter_map(|episode| Some(episode.next.as_ref()?.away_s)).sum(),
    }
}

/// Every generation that ended before the run was complete, the oldest first. The last one, if it has not recorded its
/// end, may still be at work: it is not included.
pub fn episodes(state: &RunState) -> Vec<Episode<'_>> {
    let formations = state.formations();
    let mut episodes = Vec::new();
    for (index, formed) in formations.iter().enumerate() {
        let said = state.interruptions().iter().find(|end| end.generation == formed.generation);
        let next = formations.get(index + 1);
        let how = match (said, next) {
            (Some(_), _) => How::Stopped,
            (None, _) if formed.ended.is_some() => continue,
            (None, None) => continue,
            (None, Some(next)) if next.reason == FormedReason::WorkerDied => How::WorkerDied,
            (None, Some(next)) if next.succession.continues == Some(formed.generation) => How::Regrouped,
            (None, Some(_)) => How::Vanished,
        };
        episodes.push(episode(state, formed, how, said, next));
    }
    episodes
}

fn episode<'a>(
    state: &'a RunState,
    formed: &'a Formation,
    how: How,
    said: Option<&'a Interruption>,
    next: Option<&'a Formation>,
) -> Episode<'a> {
    let generation = formed.generation;
    let notices: Vec<_> = state
        .notices()
        .iter()
        .filter(|notice| notice.generation == generation)
        .map(|n| Heard { at: n.at, source: &n.source, means: n.means, deadline_s: n.deadline_s })
        .collect();
    let commits = state.checkpoints().of(generation);
    let last_sign = commits.clone().map(|c| c.at).chain(notices.iter().map(|n| n.at)).chain([formed.at]).max();
    let at = said.map_or(last_sign.unwrap_or(formed.at), |said| said.at);
    let drain = said.and_then(|said| said.drain.as_ref());
    let newest = commits.map(|c| c.committed.step).chain(formed.resume.as_ref().map(|point| point.step)).max();
    Episode {
        generation,
        node: &formed.node,
        nodes: formed.roster.len(),
        how,
        at,
        step: said.map(|said| said.step),
        checkpoint: said.map_or(newest, |said| said.committed),
        lost_steps: said.map(|said| said.lost_steps),
        verdict: said.map(|said| said.verdict.as_str()).or(next.and_then(|next| next.succession.why.as_deref())),
        notices,
        drain,
        prediction_error: drain.and_then(carried_out).and_then(|(expected, took)| Some(took? / expected - 1.0)),
        next: next.map(|next| Next {
            generation: next.generation,
            node: &next.node,
            nodes: next.roster.len(),
            resume_step: next.resume.as_ref().map(|point| point.step),
            away_s: next.at.duration_since(at).as_secs_f64().max(0.0),
        }),
    }
}

/// How long the planned save was expected to take, and took, counted from the plan: the time before it, which may have
/// been used for training, does not belong to the save. `None`: no time was expected, or the journal does not say when.
pub fn carried_out(drain: &Drain) -> Option<(f64, Option<f64>)> {
    let planned = drain.planned_s?;
    let expected = drain.predicted_s.map(|at| at - planned).filter(|expected| *expected > 0.0)?;
    Some((expected, drain.actual_s.map(|at| (at - planned).max(0.0))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        history::tests::{committed, created, formed, state},
        journal::Record,
    };

    #[test]
    fn a_group_that_changed_is_no_machine_that_vanished() {
        let how = |continues| {
            let mut next = formed(3, Some((10, 1)), &[]);
            if let Record::Formed { continues: named, .. } = &mut next {
                *named = continues;
            }
            episodes(&state(vec![created(), formed(1, None, &[]), committed(10, 1), next]))[0].how
        };
        assert_eq!(how(Some(Generation(1))), How::Regrouped);
        assert_eq!(how(None), How::Vanished);
    }
}
