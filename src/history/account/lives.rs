//! The generations of a run, with what is known of each.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::stamps::second;
use crate::{
    config,
    goodput::credible_s,
    ids::NodeId,
    journal::{Checkpoint, Formation, FormedReason, Interruption, Outcome, RunState},
    metrics::Series,
};

/// The longest monotonic time that is believed, seconds: a century.
const MOST_S: f64 = 100.0 * 365.25 * 86_400.0;
/// A step that took this many times the median was measured while a clock was being set.
const SET: f64 = 100.0;

/// A duration from a record: a number from 0 on.
pub(super) fn known(seconds: f64) -> f64 {
    if seconds.is_finite() { seconds.clamp(0.0, MOST_S) } else { 0.0 }
}

/// The figures of one step of one generation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figures {
    pub(super) step: u64,
    at_s: f64,
    step_s: Option<f64>,
}

/// The figures of steps by their generation, in order of steps.
pub(super) fn rows(series: &Series) -> BTreeMap<u64, Vec<Figures>> {
    let mut all: BTreeMap<u64, Vec<Figures>> = BTreeMap::new();
    let [loss, step_s] = ["loss", "step_s"].map(|name| series.column(name));
    for (row, (step, generation, at_ms)) in series.places().enumerate() {
        // A row without a loss says more of a state that another row has: it is no step of its generation.
        if loss.is_none_or(|loss| loss[row].is_nan()) {
            continue;
        }
        let step_s = step_s.map(|all| all[row]).filter(|seconds| (0.0..MOST_S).contains(seconds));
        all.entry(generation.get()).or_default().push(Figures { step: step.get(), at_s: at_ms as f64 / 1e3, step_s });
    }
    for rows in all.values_mut() {
        rows.sort_by(|a, b| (a.step, a.at_s).partial_cmp(&(b.step, b.at_s)).unwrap_or(std::cmp::Ordering::Equal));
        rows.dedup_by_key(|row| row.step);
    }
    all
}

/// How a generation ended, as far as its journal shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// It completed the run.
    Completed,
    /// It said that it stops.
    Said,
    /// Its machines went on in the next one, which they joined in order.
    Handed,
    /// Its machines went on in the next one, which a loss had made necessary.
    Broken,
    /// It said nothing.
    Vanished,
    /// It may still be at work.
    Open,
}

/// A generation, with what is known of it.
pub(super) struct Life<'a> {
    pub(super) formed: &'a Formation,
    pub(super) commits: Vec<&'a Checkpoint>,
    /// The step that it begins after.
    pub(super) begun: u64,
    /// Steps beyond this one are void.
    pub(super) limit: u64,
    pub(super) end: End,
    /// Its last record, and the last finished step that it names.
    pub(super) said: Option<(Timestamp, u64)>,
    /// The last notice.
    noticed: Option<Timestamp>,
    /// Its steps.
    pub(super) rows: Vec<Figures>,
    /// Whether it follows an interruption.
    pub(super) resumed: bool,
    /// Whether an interruption ended it.
    pub(super) cut: bool,
    /// Machines that are still alive when the next one is formed.
    pub(super) left: usize,
}

pub(super) fn lives<'a>(state: &'a RunState, rows: &mut BTreeMap<u64, Vec<Figures>>) -> Vec<Life<'a>> {
    let formations = state.formations();
    let mut lives: Vec<Life<'a>> = Vec::with_capacity(formations.len());
    for (index, formed) in formations.iter().enumerate() {
        let next = formations.get(index + 1);
        let generation = formed.generation;
        let interruption = state.interruptions().iter().find(|end| end.generation == generation);
        let commits: Vec<&Checkpoint> = state.checkpoints().of(generation).collect();
        let last_commit = commits.iter().map(|commit| commit.committed.step.get()).max();
        let finished = match state.outcome() {
            Outcome::Completed { generation: ended, step, .. } | Outcome::Failed { generation: ended, step, .. }
                if *ended == generation =>
            {
                Some(step.get())
            }
            // A run that was opened again has forgotten the step; its last checkpoint is that of the last step.
            _ => last_commit,
        };
        let end = end(state, formed, interruption, next);
        let said = match (interruption, formed.ended) {
            (Some(end), _) => Some((end.at, end.step.get())),
            (None, Some(at)) => Some((at, finished.unwrap_or_default())),
            (None, None) => None,
        };
        let capped = interruption.is_some_and(|end| end.cap.is_some());
        let resumed = lives.last().is_some_and(|before| before.cut);
        let left = next.map_or(0, |next| match end {
            End::Handed | End::Broken => {
                let stays = |node: &NodeId| next.roster.iter().any(|entry| entry.node == *node);
                formed.roster.iter().filter(|entry| stays(&entry.node)).count()
            }
            _ => 0,
        });
        lives.push(Life {
            formed,
            begun: formed.resume.as_ref().map_or(0, |point| point.step.get()),
            limit: u64::MAX,
            end,
            said,
            noticed: state.notices().iter().filter(|n| n.generation == generation).map(|n| n.at).max(),
            rows: rows.remove(&generation.get()).unwrap_or_default(),
            commits,
            resumed,
            cut: match end {
                End::Completed | End::Open => false,
                End::Said => !capped && formed.ended.is_none(),
                End::Handed | End::Broken | End::Vanished => true,
            },
            left,
        });
    }
    // What lies beyond the point that a later generation resumes from is void.
    let mut limit = match lives.last().map(|life| life.end) {
        Some(End::Said) => state.newest().map_or(0, |newest| newest.committed.step.get()),
        _ => u64::MAX,
    };
    for life in lives.iter_mut().rev() {
        life.limit = limit;
        limit = limit.min(life.begun);
    }
    lives
}

fn end(state: &RunState, formed: &Formation, said: Option<&Interruption>, next: Option<&Formation>) -> End {
    if let Some(next) = next {
        let goes_on = next.succession.continues == Some(formed.generation);
        match next.reason {
            _ if said.is_some() => {}
            _ if formed.ended.is_some() => {}
            FormedReason::WorkerDied | FormedReason::NodeLost => return End::Broken,
            FormedReason::NodeLeft | FormedReason::NodeJoined => return End::Handed,
            FormedReason::Started if goes_on => return End::Handed,
            FormedReason::Started => return End::Vanished,
        }
    }
    match state.outcome() {
        _ if said.is_some() => End::Said,
        Outcome::Failed { generation, .. } if *generation == formed.generation => End::Said,
        _ if formed.ended.is_some() && was_complete(state, formed) => End::Completed,
        _ if formed.ended.is_some() => End::Said,
        _ => End::Open,
    }
}

/// Whether a generation that ended completed the run, and did not fail. A run that was opened again has forgotten it:
/// it was complete if the last step of that time is saved, or may have been left out by the rule to stop early.
fn was_complete(state: &RunState, formed: &Formation) -> bool {
    if matches!(state.outcome(), Outcome::Completed { generation, .. } if *generation == formed.generation) {
        return true;
    }
    let until = state.formations().iter().take_while(|earlier| earlier.number <= formed.number);
    let overrides: Vec<(String, String)> = until.flat_map(|earlier| earlier.overrides.iter().cloned()).collect();
    let Ok(config) = config::apply_overrides(state.config(), &overrides) else { return false };
    let saved = state.checkpoints().of(formed.generation).map(|commit| commit.committed.step).max();
    let saved = saved.max(formed.resume.as_ref().map(|point| point.step));
    config.workload.train.early_stopping.is_some() || saved >= Some(config.workload.last_step())
}

impl Life<'_> {
    /// When the state of each save was complete in the store, seconds since the generation was formed; never falling.
    pub(super) fn offsets(&self, step_s: Option<f64>) -> Vec<f64> {
        let (mut offset, mut at, mut step) = (0.0_f64, self.formed.at, self.begun);
        let mut offsets = Vec::with_capacity(self.commits.len());
        for commit in &self.commits {
            let to = commit.committed.step.get();
            offset = match known(commit.committed.cost.lived_s) {
                0.0 => offset + clocked(at, commit.at, step_s, to.saturating_sub(step)),
                lived => lived.max(offset),
            };
            offsets.push(offset);
            (at, step) = (commit.at, step.max(to));
        }
        offsets
    }

    /// Its last sign of life, seconds since it was formed.
    pub(super) fn last_sign(&self, offsets: &[f64], step_s: Option<f64>) -> f64 {
        let (offset, at) = match (offsets.last(), self.commits.last()) {
            (Some(offset), Some(commit)) => (*offset, commit.at),
            _ => (0.0, self.formed.at),
        };
        let saved = self.saved();
        let done = |step: u64| step.saturating_sub(saved);
        if let Some((ended, step)) = self.said {
            return offset + clocked(at, ended, step_s, done(step));
        }
        let noticed = self.noticed.map_or(0.0, |heard| clocked(at, heard, step_s, 0));
        let row = self.rows.last().filter(|row| row.step > saved);
        let seen = row.map_or(0.0, |row| known(row.at_s - second(at)).min(credible_s(step_s, done(row.step))));
        offset + noticed.max(seen)
    }

    /// The highest step that it has saved, or that it began after.
    fn saved(&self) -> u64 {
        self.commits.iter().map(|commit| commit.committed.step.get()).max().unwrap_or(0).max(self.begun)
    }

    /// The last step that it is known to have finished.
    pub(super) fn reached(&self) -> u64 {
        let said = self.said.map_or(0, |(_, step)| step);
        let row = self.rows.last().map_or(0, |row| row.step);
        self.saved().max(said).max(row)
    }

    /// How long the steps after `from` up to `to` took, seconds: as their figures say, or by the run's mean.
    pub(super) fn training(&self, from: u64, to: u64, step_s: Option<f64>) -> Option<f64> {
        let count = to.saturating_sub(from);
        let first = self.rows.partition_point(|row| row.step <= from);
        let end = self.rows.partition_point(|row| row.step <= to);
        let told: Vec<f64> = self.rows[first..end].iter().filter_map(|row| row.step_s).collect();
        if told.len() as u64 == count {
            return Some(told.iter().sum());
        }
        // Without its figures a step took as long as the others.
        let own = (!told.is_empty()).then(|| told.iter().sum::<f64>() / told.len() as f64);
        Some(own.or(step_s)? * count as f64)
    }
}

/// Seconds between two stamps of one machine, as far as the steps between them account for that.
fn clocked(from: Timestamp, to: Timestamp, step_s: Option<f64>, steps: u64) -> f64 {
    known(second(to) - second(from)).min(credible_s(step_s, steps))
}

/// The mean time of a step between two saves of one generation, without the stalls.
pub(super) fn step_s(lives: &[Life<'_>]) -> Option<f64> {
    let mut stretches = Vec::new();
    for life in lives {
        for pair in life.commits.windows(2) {
            let [a, b] = [&pair[0], &pair[1]].map(|commit| (&commit.committed, commit.at));
            let steps = b.0.step.get().saturating_sub(a.0.step.get());
            let [lived, before] = [b.0.cost.lived_s, a.0.cost.lived_s].map(known);
            let between =
                if before > 0.0 && lived > before { lived - before } else { known(second(b.1) - second(a.1)) };
            let time = between - known(b.0.cost.durable_s) + known(a.0.cost.durable_s) - known(a.0.cost.stall_s);
            if steps > 0 && time > 0.0 {
                stretches.push((time, steps as f64));
            }
        }
    }
    let mut means: Vec<f64> = stretches.iter().map(|(time, steps)| time / steps).collect();
    means.sort_by(f64::total_cmp);
    let middle = *means.get(means.len() / 2)?;
    stretches.retain(|(time, steps)| time / steps <= SET * middle);
    let (time, steps) = stretches.iter().fold((0.0, 0.0), |sum, more| (sum.0 + more.0, sum.1 + more.1));
    (steps > 0.0).then(|| time / steps)
}
