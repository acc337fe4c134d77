//! How long the ranks of the next generation may wait for each other in its first step: a pure decision, from what this
//! node remembers of earlier generations.
//!
//! A worker that hangs while its agent lives is seen by nobody but the ranks that wait for it, and it holds up the
//! whole group. Within a generation each rank knows the usual step soon ([`crate::worker`]); of the first step only
//! earlier generations tell. It is slower than others: kernels are loaded, caches are cold.
//!
//! | known of earlier generations | the first step's limit |
//! |---|---|
//! | nothing | 5 minutes |
//! | the usual step, and the slowest first one | 20 usual or 4 first ones, at least 2 minutes |
//! | N generations in a row have ended in their first step | the same, doubled N times; at most 10 minutes |
//!
//! The last line makes a limit that was too short harmless: it costs a generation, and the next one has twice the time,
//! up to the limit that held before anything was learned. A world with fewer ranks has longer steps, in proportion;
//! what another kind of machine will need is not known, but those are not mixed unless `parallel.mixed` says so.
//!
//! The leader decides, and `Go` tells every rank. Followers remember the same, since one of them may lead next.
//!
//! *Crash:* it is forgotten, and the first line holds. *Retry:* the last line. *Cancel:* nothing waits here.

use std::time::Duration;

use super::drain::estimate::Estimator;
use crate::{
    faults::{self, At},
    ids::WorldSize,
};

/// The limit while nothing is known.
const UNKNOWN: Duration = Duration::from_secs(300);
/// The shortest limit of a first step.
pub const LEAST: Duration = Duration::from_secs(120);
/// The same under the crash point `pace.hasty`.
const HASTY: Duration = Duration::from_secs(10);
/// The longest limit, unless 20 usual steps are longer.
const MOST: Duration = Duration::from_secs(600);
/// The limit, as a multiple of the usual step.
const USUAL: f64 = 20.0;
/// The limit, as a multiple of the slowest first step.
const FIRST: f64 = 4.0;

/// [`LEAST`], unless a test does not wait for minutes.
pub fn least() -> Duration {
    if faults::check("pace.hasty", At::default()).is_err() { HASTY } else { LEAST }
}

/// What a node remembers of the steps of its generations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// A step that is not a generation's first.
    usual: Estimator,
    /// The ranks with which that was measured.
    usual_world: u32,
    /// Seconds of the slowest first step, for as many ranks as `first_world`.
    first: Option<f64>,
    first_world: u32,
    /// Ranks of the newest generation.
    world: u32,
    /// Generations that began since a step was finished.
    begun: u32,
}

impl Pace {
    /// All ranks of a generation are told to go; `least`: [`LEAST`]. The limit of its first step.
    pub fn begins(&mut self, world: WorldSize, least: Duration) -> Duration {
        let WorldSize(ranks) = world;
        let usual = self.usual.estimate().map(|step| USUAL * step.high * longer(self.usual_world, ranks));
        let first = self.first.map(|step| FIRST * step * longer(self.first_world, ranks));
        let [usual, first] = [usual, first].map(|limit| limit.and_then(|s| Duration::try_from_secs_f64(s).ok()));
        let known = match (usual, first) {
            (None, None) => UNKNOWN,
            (usual, first) => usual.unwrap_or_default().max(first.unwrap_or_default()).max(least),
        };
        let doubled = known.saturating_mul(1 << self.begun.min(8));
        self.world = ranks;
        self.begun = self.begun.saturating_add(1);
        doubled.min(MOST).max(usual.unwrap_or_default())
    }

    /// A step was finished, in this many seconds.
    pub fn step(&mut self, seconds: f64) {
        if !seconds.is_finite() || seconds < 0.0 {
            return;
        }
        if std::mem::take(&mut self.begun) == 0 {
            self.usual.push(seconds);
            self.usual_world = self.world;
        } else if self.first.is_none_or(|slowest| slowest * longer(self.first_world, self.world) < seconds) {
            (self.first, self.first_world) = (Some(seconds), self.world);
        }
    }
}

/// How much longer a step takes with `now` ranks than with `before`, at most: passes are whole.
fn longer(before: u32, now: u32) -> f64 {
    f64::from(before.div_ceil(now.max(1)).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a generation of `world` ranks whose first step took `first` seconds, and each of 20 more `usual`.
    fn after(world: u32, first: f64, usual: f64) -> Pace {
        let mut pace = Pace::default();
        pace.begins(WorldSize(world), LEAST);
        pace.step(first);
        (0..20).for_each(|_| pace.step(usual));
        pace
    }

    fn limit(mut pace: Pace, world: u32) -> u64 {
        pace.begins(WorldSize(world), LEAST).as_secs()
    }

    #[test]
    fn the_first_step_has_minutes_and_as_long_as_earlier_ones_say() {
        assert_eq!(limit(Pace::default(), 8), 300, "nothing is known");
        for (first, usual, expected) in [
            (0.5, 0.1, 120),
            (29.0, 0.1, 120),
            (40.0, 0.1, 160),
            (1.0, 10.0, 220),
            (200.0, 1.0, 600),
            (9.0, 60.0, 1320),
        ] {
            assert_eq!(limit(after(8, first, usual), 8), expected, "{first} {usual}");
        }
        // A generation that ended after its first step.
        let mut short = Pace::default();
        short.begins(WorldSize(2), LEAST);
        short.step(50.0);
        assert_eq!(limit(short, 2), 200);
        short.step(f64::NAN);
        assert_eq!(limit(short, 2), 200);
    }

    #[test]
    fn fewer_ranks_have_longer_steps() {
        let pace = after(8, 1.0, 10.0);
        assert_eq!([8, 16, 4, 3, 2].map(|world| limit(pace, world)), [220, 220, 440, 660, 880]);
        let pace = after(8, 40.0, 0.1);
        assert_eq!([8, 16, 4, 3, 1].map(|world| limit(pace, world)), [160, 160, 320, 480, 600]);
    }

    #[test]
    fn a_limit_that_was_too_short_is_doubled_until_a_step_is_finished() {
        let mut pace = after(4, 0.5, 0.1);
        let begins = |pace: &mut Pace| pace.begins(WorldSize(4), LEAST).as_secs();
        assert_eq!([(); 5].map(|()| begins(&mut pace)), [120, 240, 480, 600, 600]);
        pace.step(130.0);
        assert_eq!(begins(&mut pace), 520, "and the next one knows how long it takes");
        let mut new = Pace::default();
        assert_eq!([(); 3].map(|()| begins(&mut new)), [300, 600, 600]);
    }
}
