//! Whether saves take cores from training: a pure decision from what their lag is worth.
//!
//! Copies and uploads that yield run on cores which would otherwise be idle, and cost the loop nearly nothing; where
//! training leaves no core idle, their checkpoint becomes durable late. A kill loses half of the time between two
//! checkpoints on average, and the whole lag of the newest one beside it: lag / (interval / 2) is the share that the
//! lag adds to every loss. Up to a half that is the price of an undisturbed loop; beyond it, saves compete with the
//! loop like any thread, which then pays for the processor time that they need. A lag of a minute ends the yielding
//! whatever the interval: other programs may want all cores for ever.
//!
//! The lag of saves that yield is remembered when they stop yielding, because it can't be measured any more. They yield
//! again once the interval has grown to twice the one at which that lag would be too long.

use std::time::Duration;

/// The largest share that the lag may add to what a kill loses on average.
const SHARE: f64 = 0.5;

/// The longest lag of saves that yield.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether saves yield, and what that follows from.
#[derive(Clone, Copy, Debug, Default)]
pub struct Haste {
    /// The lag of the last save that yielded, seconds, while saves don't.
    lag_s: Option<f64>,
}

/// A decision that has changed, for the log.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Change {
    /// Whether saves compete with training from now on.
    pub hasty: bool,
    /// From the end of a step until its checkpoint was durable, seconds, when saves yielded.
    pub lag_s: f64,
    /// From that checkpoint's step to the one of the checkpoint before, seconds.
    pub interval_s: f64,
}

impl Haste {
    /// Whether saves compete with training instead of yielding to it.
    pub const fn is_hasty(&self) -> bool {
        self.lag_s.is_some()
    }

    /// A save was durable `durable_s` seconds after its step, which ended `interval_s` seconds after that of the save
    /// before it.
    pub fn saved(&mut self, durable_s: f64, interval_s: f64) -> Option<Change> {
        if interval_s <= 0.0 {
            return None;
        }
        let (was, lag_s) = (self.is_hasty(), self.lag_s.unwrap_or(durable_s));
        let margin = if was { 2.0 } else { 1.0 };
        let hasty = lag_s > PATIENCE.as_secs_f64() || lag_s * margin > SHARE * interval_s / 2.0;
        self.lag_s = hasty.then_some(lag_s);
        (hasty != was).then_some(Change { hasty, lag_s, interval_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saves_yield_while_their_lag_adds_at_most_half_to_what_a_kill_loses() {
        for (lag, interval, hasty) in
            [(2.0, 8.0, false), (2.1, 8.0, true), (4.0, 85.0, false), (59.0, 1e4, false), (61.0, 1e4, true)]
        {
            let mut haste = Haste::default();
            let change = haste.saved(lag, interval);
            assert_eq!((haste.is_hasty(), change.is_some()), (hasty, hasty), "{lag} {interval}");
        }
    }

    #[test]
    fn they_yield_again_once_the_interval_is_twice_as_long_and_not_because_haste_works() {
        let mut haste = Haste::default();
        assert_eq!(haste.saved(4.0, 8.0), Some(Change { hasty: true, lag_s: 4.0, interval_s: 8.0 }));
        // Short lags are the success of haste.
        assert_eq!((haste.saved(0.5, 8.0), haste.saved(0.5, 31.0)), (None, None));
        assert!(haste.is_hasty());
        assert_eq!(haste.saved(0.5, 32.0), Some(Change { hasty: false, lag_s: 4.0, interval_s: 32.0 }));
        // What yielding costs by now is measured anew.
        assert_eq!((haste.saved(3.0, 32.0), haste.is_hasty()), (None, false));
    }
}
