//! How long steps and saves take on this machine, as measured, and with what certainty.
//!
//! Times are seconds. An [`Estimator`] is an exponentially weighted mean and variance: the newest value has the weight
//! [`WEIGHT`]. Uploads are kept as seconds per byte, so that times can be added. A value far outside the expected range
//! resets the estimate: throughput has changed, and averaging old and new would describe neither. Measurements that an
//! earlier machine left in the journal count as one value with a wide spread: better than nothing, and soon outweighed.
//!
//! Nothing is stored; the next generation of the same agent keeps this one's measurements.

use crate::{agent::pace::Pace, journal::Committed};

/// The weight of a new value against all before it.
const WEIGHT: f64 = 0.3;
/// A value beyond the expected range by this factor resets the estimate.
const CHANGED: f64 = 1.5;
/// The least spread of a mean, as a share of it: it is never taken to be more certain than this.
const LEAST_SPREAD: f64 = 0.1;
/// The spread while there is only one value, as a share of it.
const ONE_VALUE_SPREAD: f64 = 0.2;
/// The spread of a value from another machine, as a share of it.
const FOREIGN_SPREAD: f64 = 0.5;

/// A time with its uncertainty, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// The lower bound.
    pub low: f64,
    /// Expected.
    pub mean: f64,
    /// The upper bound.
    pub high: f64,
}

impl Estimate {
    /// A time that is known exactly.
    pub const fn exactly(seconds: f64) -> Self {
        Self { low: seconds, mean: seconds, high: seconds }
    }

    /// The sum: one after the other.
    pub fn then(self, next: Self) -> Self {
        Self { low: self.low + next.low, mean: self.mean + next.mean, high: self.high + next.high }
    }

    /// The longer of the two: side by side, until both have ended.
    pub fn beside(self, other: Self) -> Self {
        Self { low: self.low.max(other.low), mean: self.mean.max(other.mean), high: self.high.max(other.high) }
    }

    /// `factor` times as long.
    pub fn times(self, factor: f64) -> Self {
        Self { low: self.low * factor, mean: self.mean * factor, high: self.high * factor }
    }

    /// The rest after `seconds` have passed.
    pub fn after(self, seconds: f64) -> Self {
        let left = |value: f64| (value - seconds).max(0.0);
        Self { low: left(self.low), mean: left(self.mean), high: left(self.high) }
    }
}

/// A running mean and its spread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimator {
    mean: f64,
    variance: f64,
    values: u32,
    foreign: bool,
}

impl Estimator {
    /// Adds a value; anything that is not a time is ignored.
    pub fn push(&mut self, value: f64) {
        if !value.is_finite() || value < 0.0 {
            return;
        }
        let changed =
            self.estimate().is_some_and(|estimate| value > CHANGED * estimate.high || value * CHANGED < estimate.low);
        if self.values == 0 || self.foreign || changed {
            *self = Self { mean: value, variance: 0.0, values: 1, foreign: false };
            return;
        }
        let away = value - self.mean;
        self.mean += WEIGHT * away;
        self.variance = (1.0 - WEIGHT) * (self.variance + WEIGHT * away * away);
        self.values = self.values.saturating_add(1);
    }

    fn seed(&mut self, value: f64) {
        if self.values == 0 {
            self.push(value);
            self.foreign = self.values > 0;
        }
    }

    /// The mean, and two standard deviations to either side; `None` before the first value.
    pub fn estimate(&self) -> Option<Estimate> {
        let least = match (self.foreign, self.values) {
            (_, 0) => return None,
            (true, _) => FOREIGN_SPREAD,
            (false, 1) => ONE_VALUE_SPREAD,
            (false, _) => LEAST_SPREAD,
        };
        let away = (2.0 * self.variance.sqrt()).max(least * self.mean);
        Some(Estimate { low: (self.mean - away).max(0.0), mean: self.mean, high: self.mean + away })
    }
}

/// All estimates for this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Estimates {
    /// One step.
    pub step: Estimator,
    /// Copying one snapshot.
    pub copy: Estimator,
    /// Uploading one byte.
    pub byte: Estimator,
    /// From the last byte to the `committed` record.
    pub commit: Estimator,
    /// The steps of earlier generations.
    pub pace: Pace,
}

impl Estimates {
    /// Adds how long a save took in another generation, perhaps on another machine.
    pub fn seed(&mut self, committed: &Committed) {
        if committed.bytes > 0 && committed.cost.durable_s > 0.0 {
            #[expect(clippy::cast_precision_loss, reason = "an estimate")]
            self.byte.seed(committed.cost.durable_s / committed.bytes as f64);
            self.copy.seed(committed.cost.copy_s);
        }
    }

    /// A save has ended: its upload took `upload_s` for `bytes`, and `commit_s` passed from the last byte to the
    /// record.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn saved(&mut self, bytes: u64, upload_s: f64, commit_s: f64) {
        if bytes > 0 {
            self.byte.push(upload_s / bytes as f64);
            self.commit.push(commit_s);
        }
    }

    /// The time to upload and commit this many bytes.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn upload(&self, bytes: u64) -> Option<Estimate> {
        let commit = self.commit.estimate().unwrap_or(Estimate { low: 0.0, mean: 0.2, high: 1.0 });
        Some(self.byte.estimate()?.times(bytes as f64).then(commit))
    }

    /// The time left for an upload of `total` bytes that has been under way for `elapsed_s`, with `sent` of them
    /// arrived and up to `parts` bytes in flight. While `elapsed_s` is within the usual time of such an upload, that
    /// time tells more than the bytes do: parts arrive together. Later, and where nothing is known, its own pace so far
    /// decides; until a first wave has arrived, bytes in flight count as half done. Without that, a save of one wave
    /// would seem to need minutes after one second in which only its smallest file has arrived.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn rest(&self, total: u64, sent: u64, parts: u64, elapsed_s: f64) -> Option<Estimate> {
        if let Some(whole) = self.upload(total)
            && elapsed_s < whole.mean
        {
            return Some(whole.after(elapsed_s));
        }
        let under_way = if sent < parts { total.saturating_sub(sent).min(parts) as f64 / 2.0 } else { 0.0 };
        let share = ((sent as f64 + under_way) / total.max(1) as f64).min(1.0);
        let mean = if share > 0.0 { elapsed_s * (1.0 - share) / share } else { elapsed_s };
        (elapsed_s > 0.0).then_some(Estimate { low: mean * 0.5, mean, high: mean * 2.0 + 1.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn an_estimator_follows_its_values_and_knows_its_spread() {
        let mut estimator = Estimator::default();
        assert_eq!(estimator.estimate(), None);
        estimator.push(10.0);
        let one = estimator.estimate().unwrap();
        assert!(near(one.low, 8.0) && near(one.mean, 10.0) && near(one.high, 12.0), "{one:?}");
        for _ in 0..50 {
            estimator.push(10.0);
        }
        let sure = estimator.estimate().unwrap();
        assert!(near(sure.low, 9.0) && near(sure.high, 11.0), "{sure:?}");
        for value in [9.0, 12.0, 7.0, 15.0].into_iter().chain([6.0, 15.0].repeat(20)) {
            estimator.push(value);
        }
        let wide = estimator.estimate().unwrap();
        assert!(wide.low < 4.0 && wide.high > 17.0 && wide.mean > 8.0 && wide.mean < 13.0, "{wide:?}");
        for bad in [f64::NAN, -1.0, f64::INFINITY] {
            estimator.push(bad);
        }
        assert_eq!(estimator.estimate().unwrap(), wide);
        estimator.push(100.0);
        let new = estimator.estimate().unwrap();
        assert!(near(new.mean, 100.0) && near(new.high, 120.0), "the line has changed: {new:?}");
        estimator.push(0.1);
        assert!(near(estimator.estimate().unwrap().mean, 0.1), "and again: {estimator:?}");
    }

    #[test]
    fn another_machines_word_counts_until_there_is_one_of_our_own() {
        let mut estimator = Estimator::default();
        estimator.seed(100.0);
        assert!(near(estimator.estimate().unwrap().high, 150.0));
        estimator.push(10.0);
        assert!(near(estimator.estimate().unwrap().mean, 10.0), "{estimator:?}");
        estimator.seed(100.0);
        assert!(near(estimator.estimate().unwrap().mean, 10.0), "{estimator:?}");
    }

    #[test]
    fn the_rest_of_an_upload_is_told_by_time_and_then_by_its_own_pace() {
        let mut estimates = Estimates::default();
        assert_eq!(estimates.rest(100, 0, 10, 0.0), None, "nothing is known");
        assert!(near(estimates.rest(100, 25, 10, 10.0).unwrap().mean, 30.0), "a quarter in 10 s");
        assert!(near(estimates.rest(100, 0, 0, 10.0).unwrap().mean, 10.0));
        // One wave.
        assert!(near(estimates.rest(100, 0, 1000, 10.0).unwrap().mean, 10.0));
        assert!(
            estimates.rest(1_000_000, 100, 1 << 28, 1.0).unwrap().mean < 1.0,
            "a small file is no sign of the pace"
        );
        for _ in 0..20 {
            estimates.saved(100, 10.0, 1.0);
        }
        // All parts are under way, none has arrived.
        assert!(near(estimates.rest(100, 0, 10, 8.0).unwrap().mean, 3.0), "{estimates:?}");
        assert!(near(estimates.rest(100, 50, 10, 20.0).unwrap().mean, 20.0), "later than ever before");
        assert!(near(estimates.upload(200).unwrap().mean, 21.0));
    }
}
