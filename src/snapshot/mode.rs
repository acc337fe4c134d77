//! Whether a capture runs beside the next step or blocks it: pure decisions from the measured costs of saves.
//!
//! Overlapping hides the copy behind forward and backward, but takes cores and memory bandwidth from them; blocking
//! stops the loop for the time of the memory copy. The cost of a save is the time that the loop lost by it: the time of
//! all steps from its capture to its commit, less the time of as many undisturbed steps. Both ways are tried and the
//! cheaper one is kept; blocking is not tried if overlapping costs no more than the bare copy, which blocking can't
//! undercut.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// How a capture is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CaptureMode {
    /// Beside the next forward and backward, on cores that would be idle.
    #[default]
    Overlap,
    /// The same, on cores for which it competes with them.
    Hasty,
    /// While the loop waits.
    Blocking,
}

/// The number of undisturbed steps whose median is the baseline.
const BASELINE: usize = 15;
/// Fewer than this do not count as a measurement.
const ENOUGH: usize = 3;
/// Saves of each mode that are compared.
const TRIALS: usize = 3;
/// The share by which a mode must be cheaper to be switched to.
const MARGIN: f64 = 0.1;

/// A save under way.
#[derive(Clone, Copy, Debug)]
struct Window {
    mode: CaptureMode,
    lost_s: f64,
}

/// A choice, for the log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The mode from now on.
    pub mode: CaptureMode,
    /// Median cost of a save that overlaps, seconds.
    pub overlap_s: f64,
    /// Median cost of one that blocks, seconds; `None`: not tried, since it can't be less than the copy.
    pub blocking_s: Option<f64>,
    /// Median time of a copy, seconds.
    pub copy_s: f64,
}

/// The costs of saves so far, and the resulting choice.
#[derive(Clone, Debug, Default)]
pub struct Chooser {
    baseline: VecDeque<f64>,
    window: Option<Window>,
    /// More than one save fell into the window, or the baseline was unknown: the window proves nothing.
    spoilt: bool,
    overlap: VecDeque<f64>,
    blocking: VecDeque<f64>,
    copies: VecDeque<f64>,
    choice: Option<Choice>,
}

fn remember(values: &mut VecDeque<f64>, value: f64, most: usize) {
    if value.is_finite() && value >= 0.0 {
        values.push_back(value);
        if values.len() > most {
            values.pop_front();
        }
    }
}

fn median(values: &VecDeque<f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

impl Chooser {
    /// How the next save is to be captured.
    pub fn mode(&self) -> CaptureMode {
        match &self.choice {
            Some(choice) => choice.mode,
            None if self.overlap.len() >= TRIALS => CaptureMode::Blocking,
            None => CaptureMode::Overlap,
        }
    }

    /// Median cost of a save in the current mode, seconds, once it is known.
    pub fn cost_s(&self) -> Option<f64> {
        match self.choice.map(|choice| choice.mode).unwrap_or_default() {
            CaptureMode::Overlap | CaptureMode::Hasty => median(&self.overlap),
            CaptureMode::Blocking => median(&self.blocking),
        }
    }

    /// A capture in `mode` has begun.
    pub fn begun(&mut self, mode: CaptureMode) {
        match &mut self.window {
            None => {
                self.window = Some(Window { mode, lost_s: 0.0 });
                self.spoilt = self.baseline.len() < ENOUGH;
            }
            Some(_) => self.spoilt = true,
        }
    }

    /// The time to copy a snapshot, seconds; the slowest rank's.
    pub fn copied(&mut self, copy_s: f64) {
        remember(&mut self.copies, copy_s, 2 * TRIALS);
    }

    /// A step of `step_s` seconds has ended; `saving`: a save was under way at some time of it. Returns the choice if
    /// it is made now.
    pub fn step(&mut self, step_s: f64, saving: bool) -> Option<Choice> {
        if saving {
            if let (Some(window), Some(usual)) = (&mut self.window, median(&self.baseline)) {
                window.lost_s += step_s - usual;
            }
            return None;
        }
        remember(&mut self.baseline, step_s, BASELINE);
        let window = self.window.take()?;
        if std::mem::take(&mut self.spoilt) {
            return None;
        }
        let costs = match window.mode {
            CaptureMode::Overlap | CaptureMode::Hasty => &mut self.overlap,
            CaptureMode::Blocking => &mut self.blocking,
        };
        remember(costs, window.lost_s.max(0.0), TRIALS);
        self.choose()
    }

    /// Decides once, when there is enough data.
    fn choose(&mut self) -> Option<Choice> {
        if self.choice.is_some() || self.overlap.len() < TRIALS {
            return None;
        }
        let (overlap_s, copy_s) = (median(&self.overlap)?, median(&self.copies)?);
        let blocking_s = median(&self.blocking).filter(|_| self.blocking.len() >= TRIALS);
        let mode = match blocking_s {
            _ if overlap_s <= copy_s => CaptureMode::Overlap,
            None => return None,
            Some(blocking_s) if blocking_s < overlap_s * (1.0 - MARGIN) => CaptureMode::Blocking,
            Some(_) => CaptureMode::Overlap,
        };
        self.choice = Some(Choice { mode, overlap_s, blocking_s, copy_s });
        self.choice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trains with a save every ten steps, each over two steps; gives the choice and the save after which it was made.
    fn train(step_s: f64, lost: impl Fn(CaptureMode) -> f64, copy_s: f64) -> (Option<Choice>, usize, Chooser) {
        let mut chooser = Chooser::default();
        for save in 0..20 {
            for _ in 0..8 {
                if let Some(choice) = chooser.step(step_s, false) {
                    return (Some(choice), save, chooser);
                }
            }
            let mode = chooser.mode();
            chooser.begun(mode);
            chooser.copied(copy_s);
            assert_eq!(chooser.step(step_s + lost(mode) * 0.75, true), None);
            assert_eq!(chooser.step(step_s + lost(mode) * 0.25, true), None);
        }
        (None, 20, chooser)
    }

    #[test]
    fn the_cheaper_mode_is_found_by_trying_both() {
        for (overlap, blocking, expected) in
            [(0.5, 0.2, CaptureMode::Blocking), (0.2, 0.5, CaptureMode::Overlap), (0.5, 0.48, CaptureMode::Overlap)]
        {
            let cost = |mode| if mode == CaptureMode::Overlap { overlap } else { blocking };
            let (choice, saves, chooser) = train(1.0, cost, 0.05);
            let choice = choice.unwrap();
            assert_eq!((choice.mode, saves), (expected, 6));
            assert!((choice.overlap_s - overlap).abs() < 1e-9);
            assert!((choice.blocking_s.unwrap() - blocking).abs() < 1e-9);
            assert_eq!(chooser.mode(), expected);
            assert!((chooser.cost_s().unwrap() - cost(expected)).abs() < 1e-9);
        }
    }

    #[test]
    fn blocking_is_not_tried_if_overlapping_costs_no_more_than_the_copy() {
        let never = |mode| {
            assert_eq!(mode, CaptureMode::Overlap);
            0.04
        };
        let (choice, saves, _) = train(1.0, never, 0.05);
        assert_eq!((choice.unwrap().mode, choice.unwrap().blocking_s, saves), (CaptureMode::Overlap, None, 3));
    }

    #[test]
    fn without_a_measurement_nothing_is_decided() {
        // A save is always under way: there is no undisturbed step.
        let mut chooser = Chooser::default();
        for _ in 0..50 {
            chooser.begun(chooser.mode());
            chooser.copied(0.1);
            assert_eq!(chooser.step(1.0, true), None);
        }
        assert_eq!((chooser.mode(), chooser.cost_s()), (CaptureMode::Overlap, None));
        // Two saves in one window.
        let mut chooser = Chooser::default();
        for _ in 0..10 {
            for _ in 0..5 {
                assert_eq!(chooser.step(1.0, false), None);
            }
            chooser.begun(CaptureMode::Overlap);
            chooser.copied(0.1);
            chooser.step(9.0, true);
            chooser.begun(CaptureMode::Overlap);
            chooser.step(9.0, true);
        }
        assert_eq!(chooser.cost_s(), None);
    }
}
