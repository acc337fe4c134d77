//! How long a rank waits for the others in a collective: pure decisions.
//!
//! | ranks | a collective ends by itself after |
//! |---|---|
//! | of one node | 10 minutes, always |
//! | of several, while they meet ([`forming`]) | 2 minutes |
//! | of several, in a usual step | 20 usual steps, at least 1 minute |
//! | of several, before the usual step is known, and after a save or a validation | 10 minutes |
//!
//! One node may sleep, with all of its processes: a lid is closed, a virtual machine is paused. Then nobody is gone, so
//! it keeps the long limit; its agent sees a worker's death by itself. Of several nodes one that sleeps is lost, and
//! the agents' channel says so in seconds: the limit is for what the channel does not see. Ranks are not equally fast
//! after a pause (copies, validation shares, kernels that are loaded at their first use): they get the long one.
//!
//! A rank that an order holds at the gate stays there for milliseconds, while others may wait for it in a collective.

use std::{collections::VecDeque, time::Duration};

/// The limit where nothing shorter is known to be right.
const LONG: Duration = Duration::from_secs(600);
/// The limit in which the ranks of several nodes meet.
const FORMING: Duration = Duration::from_secs(120);
/// The shortest limit of a step.
const SHORTEST: Duration = Duration::from_secs(60);
/// The limit of a usual step, as a multiple of its time.
const STEPS: f64 = 20.0;
/// Steps by which the usual one is measured.
const MEASURED: usize = 20;
/// Fewer are no measurement.
const ENOUGH: usize = 10;
/// A limit is not changed for less than this share.
const WORTH_IT: f64 = 0.25;

/// The time that ranks have to meet; also the limit of their first collective. `several`: of several nodes.
pub const fn forming(several: bool) -> Duration {
    if several { FORMING } else { LONG }
}

/// A rank's patience in the steps of one generation.
#[derive(Debug)]
pub struct Patience {
    several: bool,
    /// Seconds of the last steps that followed no pause.
    steps: VecDeque<f64>,
    /// The limit in force.
    limit: Duration,
}

impl Patience {
    /// After the ranks have met; the first limit is [`Patience::FIRST`]. `several`: of several nodes.
    pub fn new(several: bool) -> Self {
        Self { several, steps: VecDeque::new(), limit: Self::FIRST }
    }

    /// The limit of the first steps.
    pub const FIRST: Duration = LONG;

    /// A step has taken so long; `paused`: it followed a save or a validation.
    pub fn step(&mut self, seconds: f64, paused: bool) {
        if paused || !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        if self.steps.len() == MEASURED {
            self.steps.pop_front();
        }
        self.steps.push_back(seconds);
    }

    /// The limit of the next step, if it is another than before; `paused`: the step follows a save or a validation.
    pub fn change(&mut self, paused: bool) -> Option<Duration> {
        let wanted = if paused || !self.several { LONG } else { self.usual() };
        let apart = (wanted.as_secs_f64() / self.limit.as_secs_f64() - 1.0).abs();
        if wanted == self.limit || wanted != LONG && apart < WORTH_IT {
            return None;
        }
        self.limit = wanted;
        Some(wanted)
    }

    fn usual(&self) -> Duration {
        if self.steps.len() < ENOUGH {
            return LONG;
        }
        let mut sorted: Vec<f64> = self.steps.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let usual = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        Duration::try_from_secs_f64(STEPS * usual).map_or(LONG, |limit| limit.max(SHORTEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(of: Option<Duration>) -> Option<u64> {
        of.map(|limit| limit.as_secs())
    }

    /// After `count` steps that took `step` seconds each.
    fn after(several: bool, count: usize, step: f64) -> Patience {
        let mut patience = Patience::new(several);
        (0..count).for_each(|_| patience.step(step, false));
        patience
    }

    #[test]
    fn ranks_of_one_node_are_as_patient_as_ever() {
        assert_eq!((forming(false).as_secs(), forming(true).as_secs()), (600, 120));
        let mut patience = after(false, 100, 0.1);
        assert_eq!((patience.change(false), patience.change(true)), (None, None));
    }

    #[test]
    fn the_limit_is_20_usual_steps_and_at_least_a_minute() {
        for (step, expected) in [(0.1, Some(60)), (3.0, Some(60)), (6.0, Some(120)), (100.0, Some(2000)), (30.0, None)]
        {
            let mut patience = after(true, ENOUGH - 1, step);
            assert_eq!(patience.change(false), None, "{step}: too little is known");
            patience.step(step, false);
            assert_eq!(seconds(patience.change(false)), expected, "{step}");
            assert_eq!(patience.change(false), None, "{step}: said once");
        }
        // One long step is not usual, nor is one after a pause.
        let mut patience = after(true, MEASURED, 6.0);
        patience.step(1e6, false);
        (0..2 * MEASURED).for_each(|_| patience.step(1e6, true));
        patience.step(f64::NAN, false);
        assert_eq!(seconds(patience.change(false)), Some(120));
    }

    #[test]
    fn a_step_after_a_pause_has_the_long_limit_and_the_next_one_the_usual_one() {
        let mut patience = after(true, MEASURED, 6.0);
        assert_eq!(seconds(patience.change(false)), Some(120));
        assert_eq!(seconds(patience.change(true)), Some(600));
        assert_eq!(patience.change(true), None);
        assert_eq!(seconds(patience.change(false)), Some(120));
        // Steps become slower: a little is not worth a change, more is.
        (0..MEASURED).for_each(|_| patience.step(7.0, false));
        assert_eq!(patience.change(false), None);
        (0..MEASURED).for_each(|_| patience.step(9.0, false));
        assert_eq!(seconds(patience.change(false)), Some(180));
    }
}
