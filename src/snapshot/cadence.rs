//! How often to save: Young's and Daly's optimum from measurements.
//!
//! The restart time is not an input: it is paid once per interruption, however often state is saved, so the optimum
//! doesn't depend on it (Daly 2006, below). Nor do announced interruptions that lost nothing count: they cost no more
//! with rare saves.
//!
//! `trainer simulate` compares [`auto_interval`] itself, life by life, with the best fixed interval (a test in
//! `goodput` requires 99 % of that on spot lifetimes).

use std::time::Duration;

/// The measured cost of a save and lifetime of machines.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Time that a save takes from training, seconds: the stall, and the slowdown of steps by copying and uploading.
    pub save_cost_s: Option<f64>,
    /// From the end of a step to its `committed` record, seconds.
    pub durable_s: Option<f64>,
    /// Training time of the run so far, over all its machines, seconds.
    pub trained_s: f64,
    /// Interruptions of the run so far that lost steps.
    pub interruptions: u64,
}

impl Measured {
    /// No measurement yet.
    pub const NOTHING: Self = Self { save_cost_s: None, durable_s: None, trained_s: 0.0, interruptions: 0 };

    /// Expected time between interruptions, seconds: the observed one, with one interruption in [`PRIOR_MTBF_S`] added
    /// as the prior.
    pub fn mtbf_s(&self) -> f64 {
        (self.trained_s + PRIOR_MTBF_S) / (self.interruptions as f64 + 1.0)
    }
}

/// The assumed mean life of a spot machine before any was observed: two hours.
pub const PRIOR_MTBF_S: f64 = 7200.0;
/// When the first save is taken; before it, the cost of a save is unknown.
pub const FIRST_SAVE: Duration = Duration::from_secs(60);
const SHORTEST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(30 * 60);

/// Daly's higher-order estimate of the optimal time between checkpoints, seconds, for a save cost `delta` and a mean
/// time between interruptions `mtbf` (J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
/// restart dumps", Future Generation Computer Systems 22, 2006, equation 37): `sqrt(2 δ M) (1 + 1/3 sqrt(δ / 2M) + 1/9
/// (δ / 2M)) − δ` for δ < 2 M, else M.
pub fn daly(delta: f64, mtbf: f64) -> f64 {
    if delta >= 2.0 * mtbf {
        return mtbf;
    }
    let ratio = delta / (2.0 * mtbf);
    (2.0 * delta * mtbf).sqrt() * (1.0 + ratio.sqrt() / 3.0 + ratio / 9.0) - delta
}

/// The interval for `checkpoint.every = "auto"`: Daly's optimum, but at least 10 s and twice the time until a save is
/// durable (half of it for training alone), and at most 30 minutes.
pub fn auto_interval(measured: &Measured) -> Duration {
    let (Some(cost), Some(durable)) = (measured.save_cost_s, measured.durable_s) else { return FIRST_SAVE };
    let best = daly(cost.max(1e-3), measured.mtbf_s()).max(2.0 * durable);
    Duration::try_from_secs_f64(best).unwrap_or(LONGEST).clamp(SHORTEST, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Daly's published optima for a 5-minute dump: 117, 57 and 9.1 minutes at 24 h, 6 h and 15 min.
    #[test]
    fn dalys_published_optima_are_reproduced() {
        for (mtbf_min, optimum) in [(24.0 * 60.0, 117.0), (6.0 * 60.0, 57.0), (15.0, 9.1)] {
            let found = daly(5.0 * 60.0, mtbf_min * 60.0) / 60.0;
            assert!((found / optimum - 1.0).abs() < 0.02, "{found} instead of {optimum}");
        }
        assert_eq!(daly(100.0, 10.0), 10.0);
    }

    #[test]
    fn the_automatic_interval_follows_cost_and_interruptions_within_its_bounds() {
        assert_eq!(auto_interval(&Measured::NOTHING), FIRST_SAVE);
        let cheap = Measured { save_cost_s: Some(0.01), durable_s: Some(1.0), ..Measured::NOTHING };
        let dear = Measured { save_cost_s: Some(1.0), ..cheap };
        let often = Measured { interruptions: 20, ..dear };
        let slow = Measured { durable_s: Some(300.0), ..cheap };
        assert!(auto_interval(&cheap) < auto_interval(&dear));
        assert!(auto_interval(&often) < auto_interval(&dear));
        assert_eq!(auto_interval(&slow), Duration::from_secs(600));
        assert_eq!(auto_interval(&Measured { save_cost_s: Some(1e9), ..cheap }), LONGEST);
        assert!(auto_interval(&Measured { save_cost_s: Some(0.0), durable_s: Some(0.0), ..cheap }) >= SHORTEST);
    }
}
