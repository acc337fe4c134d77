//! Which stamps of wall clocks count, and when generations began.

use jiff::Timestamp;

use super::lives::{Life, known};
use crate::{history::spent::PLAUSIBLE_S, journal::RunState, report::human};

/// A stamp may be ahead of the reader's clock by this much, seconds.
const AHEAD_S: i64 = 3600;
/// A correction of a clock by less is not worth a note, seconds.
pub(super) const NOTABLE_S: f64 = 60.0;

/// A stamp in seconds.
pub(super) fn second(at: Timestamp) -> f64 {
    at.as_second() as f64 + f64::from(at.subsec_nanosecond()) * 1e-9
}

/// Which stamps count.
pub(super) struct Stamps {
    from_s: f64,
    until_s: f64,
}

impl Stamps {
    pub(super) fn new(state: &RunState, now: Timestamp) -> Self {
        let (from, until) = (PLAUSIBLE_S as f64, (now.as_second() + AHEAD_S) as f64);
        let stamps = std::iter::once(state.created_at())
            .chain(state.formations().iter().map(|formed| formed.at))
            .chain(state.checkpoints().iter().map(|commit| commit.at));
        if stamps.map(second).any(|at| (from..=until).contains(&at)) {
            return Self { from_s: from, until_s: until };
        }
        // Nothing is better than what there is.
        Self { from_s: f64::MIN, until_s: f64::MAX }
    }

    fn plausible(&self, at: f64) -> Option<f64> {
        (self.from_s..=self.until_s).contains(&at).then_some(at)
    }

    /// When each generation was formed, seconds since the run was created; `None`: right behind what came before it.
    pub(super) fn starts(
        &self,
        state: &RunState,
        lives: &[Life<'_>],
        step_s: Option<f64>,
        notes: &mut Vec<String>,
    ) -> Vec<Option<f64>> {
        let mut stamps = vec![self.plausible(second(state.created_at()))];
        for life in lives {
            let formed = second(life.formed.at);
            let offsets = life.offsets(step_s);
            let measured = life.commits.iter().zip(&offsets).filter(|(c, _)| known(c.committed.cost.lived_s) > 0.0);
            let told = measured.filter_map(|(commit, offset)| Some(self.plausible(second(commit.at))? - offset));
            let mut began: Vec<f64> = self.plausible(formed).into_iter().chain(told).collect();
            began.sort_by(f64::total_cmp);
            let most = began.get(began.len() / 2).copied();
            if let Some(most) = most.filter(|most| (most - formed).abs() > NOTABLE_S) {
                let (generation, off) = (life.formed.generation, early_or_late(most - formed));
                notes.push(format!(
                    "The clock of generation {generation} was set while it ran: its first record is {off}, and its \
                     later records say when it began."
                ));
            }
            stamps.push(most);
        }
        let kept = in_order(&stamps);
        let mut starts = Vec::with_capacity(lives.len());
        // Where second 0 of the run lies. A run whose creation has no usable stamp begins with the first one that has.
        let mut origin = stamps[0].filter(|_| kept[0]);
        if origin.is_none() {
            notes.push(
                "The clock was wrong when the run was created: its time begins with its first generation.".into(),
            );
        }
        for (index, life) in lives.iter().enumerate() {
            let stamp = stamps[index + 1].filter(|_| kept[index + 1]);
            if stamp.is_none() {
                notes.push(format!(
                    "The clock of generation {} disagrees with the order of the journal: the time before it is not \
                     known and counts as none.",
                    life.formed.generation
                ));
            }
            if origin.is_none()
                && let Some(stamp) = stamp
            {
                // The generations before have lived as long as they have measured.
                let before: f64 = lives[..index].iter().map(|life| life.last_sign(&life.offsets(step_s), step_s)).sum();
                origin = Some(stamp - before);
            }
            starts.push(stamp.zip(origin).map(|(stamp, origin)| stamp - origin));
        }
        starts
    }
}

/// How wrong a clock was.
fn early_or_late(seconds: f64) -> String {
    format!("{} {}", human::seconds(seconds.abs()), if seconds > 0.0 { "early" } else { "late" })
}

/// Which of these belong to the largest set that never falls. Of several such sets, one that ends lowest.
pub(super) fn in_order(stamps: &[Option<f64>]) -> Vec<bool> {
    // The place of the lowest last member of each length.
    let mut tails: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = vec![None; stamps.len()];
    let value = |index: usize| stamps[index].unwrap_or(f64::MAX);
    for (index, stamp) in stamps.iter().enumerate() {
        let Some(stamp) = stamp else { continue };
        let length = tails.partition_point(|&tail| value(tail) <= *stamp);
        before[index] = length.checked_sub(1).map(|shorter| tails[shorter]);
        if length == tails.len() {
            tails.push(index);
        } else {
            tails[length] = index;
        }
    }
    let mut kept = vec![false; stamps.len()];
    let mut at = tails.last().copied();
    while let Some(index) = at {
        kept[index] = true;
        at = before[index];
    }
    kept
}
