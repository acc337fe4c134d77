//! How long a rank waits for the others in a collective: pure decisions.
//!
//! | ranks | a collective ends by itself after |
//! |---|---|
//! | of one node | 10 minutes, always |
//! | of several, while they meet ([`forming`]) | 2 minutes |
//! | of several, in the first step | what the leader says: it remembers earlier generations (`agent::pace`) |
//! | of several, in a usual step | 20 usual steps, at least 1 minute |
//! | of several, while fewer than 10 steps are known | 20 of the slowest of them, at least 1 minute |
//! | of several, after a save or a validation | 4 of the slowest such step, at least 2 minutes and the usual limit |
//! | of several, after the first save | the same as in the first step |
//! | of several, after the first validation | 10 minutes |
//!
//! One node may sleep, with all of its processes: a lid is closed, a virtual machine is paused. Then nobody is gone, so
//! it keeps the long limit; its agent sees a worker's death by itself. Of several nodes one that sleeps is lost, and
//! the agents' channel says so in seconds: the limit is for what the channel does not see, such as a worker that hangs
//! while its agent lives. It holds up all others, so the limit is as short as what is known allows. Ranks are not
//! equally fast when they do something for the first time (kernels are loaded, data is cold, memory is touched) or
//! something that is not shared out evenly (validation): such a step has a longer limit, until one was seen. A step
//! ends on all ranks when the slowest has done its part, so every rank sees the slowest one's time.
//!
//! A rank that an order holds at the gate stays there for milliseconds, while others may wait for it in a collective.
//!
//! *Crash:* nothing is stored; the next generation begins with what its leader remembers. *Retry:* a limit that ends a
//! generation in its first step is longer in the next one. *Cancel:* nothing waits here.

use std::{collections::VecDeque, time::Duration};

/// The limit where nothing shorter is known to be right.
const LONG: Duration = Duration::from_secs(600);
/// The limit in which the ranks of several nodes meet.
const FORMING: Duration = Duration::from_secs(120);
/// The shortest limit of a step.
const SHORTEST: Duration = Duration::from_secs(60);
/// The same where a test does not wait for minutes.
const HASTY: Duration = Duration::from_secs(5);
/// The shortest limit of a step that follows a save or a validation, as a multiple of a usual one's.
const PAUSED: u32 = 2;
/// The limit of a usual step, as a multiple of its time.
const STEPS: f64 = 20.0;
/// The limit of a step that follows a save or a validation, as a multiple of the longest of its kind.
const PAUSES: f64 = 4.0;
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

/// What a step follows: the later ones take longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum After {
    /// Another step.
    Step,
    /// A save.
    Save,
    /// A validation, perhaps with a save.
    Validation,
}

/// A rank's patience in the steps of one generation.
#[derive(Debug)]
pub struct Patience {
    several: bool,
    /// The limit of the first step.
    first: Duration,
    /// The shortest limit.
    shortest: Duration,
    /// Seconds of the last steps that followed a step.
    steps: VecDeque<f64>,
    /// Seconds of the longest step that followed a save, with that save.
    save: Option<f64>,
    /// Seconds of the longest step that followed a validation, with that validation.
    validation: Option<f64>,
    /// The limit in force.
    limit: Duration,
}

impl Patience {
    /// Before the first step, whose limit is `first`, for ranks of several nodes (`several`). [`Patience::limit`] is in
    /// force from here on. `hasty`: a test does not wait for minutes.
    pub fn new(several: bool, first: Duration, hasty: bool) -> Self {
        let first = if several { first } else { LONG };
        let shortest = if hasty { HASTY } else { SHORTEST };
        let (save, validation) = (None, None);
        Self { several, first, shortest, steps: VecDeque::new(), save, validation, limit: first }
    }

    /// The limit in force.
    pub const fn limit(&self) -> Duration {
        self.limit
    }

    /// A step has taken so long, together with what it followed.
    pub fn step(&mut self, seconds: f64, after: After) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        let longest = |before: Option<f64>| Some(before.map_or(seconds, |before| before.max(seconds)));
        match after {
            After::Save => self.save = longest(self.save),
            After::Validation => self.validation = longest(self.validation),
            After::Step => {
                if self.steps.len() == MEASURED {
                    self.steps.pop_front();
                }
                self.steps.push_back(seconds);
            }
        }
    }

    /// The limit of the next step, if it is another than before.
    pub fn change(&mut self, after: After) -> Option<Duration> {
        let wanted = if self.several { self.wanted(after) } else { LONG };
        let apart = (wanted.as_secs_f64() / self.limit.as_secs_f64() - 1.0).abs();
        if wanted == self.limit || wanted < LONG && apart < WORTH_IT {
            return None;
        }
        self.limit = wanted;
        Some(wanted)
    }

    fn wanted(&self, after: After) -> Duration {
        let usual = self.usual();
        let least = usual.max(self.shortest.saturating_mul(PAUSED));
        let of_its_kind = |longest: f64| times(PAUSES, longest).max(least);
        match after {
            After::Step => usual,
            After::Save => self.save.map_or(self.first.max(usual), of_its_kind),
            After::Validation => self.validation.map_or(LONG.max(usual), of_its_kind),
        }
    }

    /// The limit of a step that follows another one.
    fn usual(&self) -> Duration {
        let mut sorted: Vec<f64> = self.steps.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let known = if sorted.len() < ENOUGH { sorted.last() } else { sorted.get(sorted.len() / 2) };
        known.map_or(self.first, |seconds| times(STEPS, *seconds).max(self.shortest))
    }
}

fn times(factor: f64, seconds: f64) -> Duration {
    Duration::try_from_secs_f64(factor * seconds).unwrap_or(LONG)
}

#[cfg(test)]
mod tests {
    use super::{After::*, *};

    const FIRST: Duration = Duration::from_secs(200);

    fn seconds(of: Option<Duration>) -> Option<u64> {
        of.map(|limit| limit.as_secs())
    }

    /// After `count` steps that took `step` seconds each.
    fn after(several: bool, count: usize, step: f64) -> Patience {
        let mut patience = Patience::new(several, FIRST, false);
        (0..count).for_each(|_| patience.step(step, Step));
        patience
    }

    #[test]
    fn ranks_of_one_node_are_as_patient_as_ever() {
        assert_eq!((forming(false).as_secs(), forming(true).as_secs()), (600, 120));
        let mut patience = after(false, 100, 0.1);
        assert_eq!(patience.limit(), LONG);
        assert_eq!([Step, Save, Validation].map(|it| patience.change(it)), [None; 3]);
    }

    #[test]
    fn the_limit_is_20_usual_steps_and_at_least_a_minute() {
        for (step, expected) in [(0.1, 60), (3.0, 60), (6.0, 120), (100.0, 2000), (30.0, 600)] {
            let mut patience = after(true, ENOUGH, step);
            assert_eq!(seconds(patience.change(Step)), Some(expected), "{step}");
            assert_eq!(patience.change(Step), None, "{step}: said once");
        }
        // One long step is not usual, nor is one after a pause.
        let mut patience = after(true, MEASURED, 6.0);
        patience.step(1e6, Step);
        for pause in [Save, Validation] {
            (0..2 * MEASURED).for_each(|_| patience.step(1e6, pause));
        }
        patience.step(f64::NAN, Step);
        assert_eq!(seconds(patience.change(Step)), Some(120));
    }

    #[test]
    fn the_first_step_has_the_leaders_limit_and_the_next_ones_that_of_the_slowest_so_far() {
        let mut patience = Patience::new(true, FIRST, false);
        assert_eq!((patience.limit(), patience.change(Step)), (FIRST, None));
        patience.step(5.0, Step);
        assert_eq!(seconds(patience.change(Step)), Some(100));
        (0..ENOUGH - 2).for_each(|_| patience.step(0.1, Step));
        assert_eq!(patience.change(Step), None, "the first one still counts");
        patience.step(0.1, Step);
        assert_eq!(seconds(patience.change(Step)), Some(60));
        // A test does not wait for a minute.
        let mut hasty = Patience::new(true, FIRST, true);
        hasty.step(0.1, Step);
        assert_eq!(hasty.change(Step), Some(HASTY));
    }

    #[test]
    fn a_step_after_a_pause_has_a_longer_limit_and_the_next_one_the_usual_one() {
        let mut patience = after(true, MEASURED, 6.0);
        assert_eq!(seconds(patience.change(Step)), Some(120));
        assert_eq!(seconds(patience.change(Save)), Some(200), "the first save");
        assert_eq!(seconds(patience.change(Validation)), Some(600), "the first validation");
        assert_eq!(patience.change(Validation), None);
        patience.step(50.0, Save);
        patience.step(8.0, Save);
        patience.step(100.0, Validation);
        assert_eq!(seconds(patience.change(Step)), Some(120));
        assert_eq!(seconds(patience.change(Save)), Some(200));
        assert_eq!(seconds(patience.change(Validation)), Some(400));
        // Never shorter than two minutes, nor than the usual limit.
        for (step, limit) in [(0.1, 120), (30.0, 600)] {
            let mut patience = after(true, MEASURED, step);
            [Save, Validation].into_iter().for_each(|pause| patience.step(0.1, pause));
            assert_eq!([Save, Validation].map(|pause| patience.wanted(pause).as_secs()), [limit; 2], "{step}");
        }
        // Steps become slower: a little is not worth a change, more is.
        assert_eq!(seconds(patience.change(Step)), Some(120));
        (0..MEASURED).for_each(|_| patience.step(7.0, Step));
        assert_eq!(patience.change(Step), None);
        (0..MEASURED).for_each(|_| patience.step(9.0, Step));
        assert_eq!(seconds(patience.change(Step)), Some(180));
    }
}
