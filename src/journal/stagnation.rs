//! Whether a run's held-out loss still falls: what early stopping decides by.
//!
//! The answer after a validation follows from the answer before it and the new loss alone. It travels with the figures
//! of each checkpoint ([`Committed::metrics`](super::Committed)), so a run that resumes from a checkpoint knows what it
//! knew there: validations of steps that are done again count once, whoever died in between.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Metrics, record::float};
use crate::{config::EarlyStopping, ids::Step};

/// Before the name of a source of the data, among the figures of a checkpoint: the held-out loss of the source.
pub const HELD_OUT: &str = "held_out/";

/// The names of its figures.
const BEST_LOSS: &str = "early_stopping/best_loss";
const BEST_STEP: &str = "early_stopping/best_step";
const SINCE: &str = "early_stopping/validations_since";

/// The best held-out loss so far, and how many validations ago it was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stagnation {
    /// The lowest loss that was lower than the one before by more than `min_delta`; infinite: none was finite.
    pub loss: f64,
    /// The step whose state had it.
    pub step: Step,
    /// Validations since then.
    pub since: u32,
}

impl Default for Stagnation {
    /// Nothing was measured.
    fn default() -> Self {
        Self { loss: f64::INFINITY, step: Step(0), since: 0 }
    }
}

impl Stagnation {
    /// After one more validation: `loss` was measured at `step`.
    #[must_use]
    pub fn after(self, step: Step, loss: f64, rule: &EarlyStopping) -> Self {
        if loss < self.loss - rule.min_delta {
            return Self { loss, step, since: 0 };
        }
        // A loss that is not a number is no progress.
        Self { since: self.since.saturating_add(1), ..self }
    }

    /// Why the run stops here; `None`: it goes on.
    pub fn verdict(&self, rule: &EarlyStopping) -> Option<EarlyStop> {
        let EarlyStopping { patience, min_delta } = *rule;
        let Self { loss, step, since } = *self;
        (since >= patience).then_some(EarlyStop { validations: since, min_delta, best_loss: loss, best_step: step })
    }

    /// As figures of a checkpoint; none if nothing was measured.
    pub fn figures(&self) -> Metrics {
        if *self == Self::default() {
            return Metrics::new();
        }
        // Steps are below 2^53.
        let step = self.step.get() as f64;
        [(BEST_LOSS, self.loss), (BEST_STEP, step), (SINCE, f64::from(self.since))]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    /// From the figures of a checkpoint.
    pub fn of(figures: &Metrics) -> Self {
        let get = |name| figures.get(name).copied();
        match (get(BEST_LOSS), get(BEST_STEP), get(SINCE)) {
            (Some(loss), Some(step), Some(since)) => Self { loss, step: Step(step as u64), since: since as u32 },
            _ => Self::default(),
        }
    }
}

/// Why a run has ended before its last step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlyStop {
    /// The number of validations in a row that have not lowered the loss.
    pub validations: u32,
    /// By more than this.
    #[serde(with = "float")]
    pub min_delta: f64,
    /// The best loss.
    #[serde(with = "float")]
    pub best_loss: f64,
    /// The step whose state has it.
    pub best_step: Step,
}

impl EarlyStop {
    /// Whether a run that stopped for this reason is complete under `rule`, which may have changed since.
    pub fn holds(&self, rule: Option<&EarlyStopping>) -> bool {
        rule.is_some_and(|rule| self.validations >= rule.patience)
    }
}

impl fmt::Display for EarlyStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { validations, min_delta, best_loss, best_step } = self;
        f.write_str("held-out loss has not fallen")?;
        if *min_delta > 0.0 {
            write!(f, " by more than {min_delta}")?;
        }
        write!(f, " in {validations} {}", if *validations == 1 { "validation" } else { "validations" })?;
        if best_loss.is_finite() {
            write!(f, "; best {best_loss:.4} at step {best_step}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULE: EarlyStopping = EarlyStopping { patience: 3, min_delta: 0.0 };

    /// The index of the loss at which a run stops that is never disturbed.
    fn stop(losses: &[f64], rule: &EarlyStopping) -> Option<usize> {
        let mut standing = Stagnation::default();
        losses.iter().enumerate().position(|(at, loss)| {
            standing = standing.after(Step(at as u64 + 1), *loss, rule);
            standing.verdict(rule).is_some()
        })
    }

    #[test]
    fn a_run_stops_after_so_many_validations_without_a_lower_loss() {
        assert_eq!(stop(&[3.0, 2.0, 2.5, 2.0, 2.1, 1.0], &RULE), Some(4));
        assert_eq!(stop(&[3.0, 2.0, 2.5, 2.0, 1.9, 2.0, 2.0], &RULE), None);
        // Slow progress is none with a `min_delta`, and adds up.
        let slow = [3.0, 2.95, 2.9, 2.85, 2.8];
        assert_eq!(stop(&slow, &RULE), None);
        assert_eq!(stop(&slow, &EarlyStopping { min_delta: 0.2, ..RULE }), Some(3));
        assert_eq!(stop(&slow, &EarlyStopping { min_delta: 0.12, ..RULE }), None);
        assert_eq!(stop(&[f64::NAN; 5], &RULE), Some(2));
        assert_eq!(stop(&[f64::NAN, f64::NAN, 4.0, 5.0], &RULE), None);
    }

    #[test]
    fn the_reason_says_what_did_not_fall_and_what_is_best() {
        let told = |losses: &[f64], rule: &EarlyStopping| {
            let steps = losses.iter().zip(1..);
            let standing =
                steps.fold(Stagnation::default(), |standing, (loss, at)| standing.after(Step(at), *loss, rule));
            standing.verdict(rule).unwrap().to_string()
        };
        assert_eq!(
            told(&[2.0, 3.0, 3.0, 3.0], &RULE),
            "held-out loss has not fallen in 3 validations; best 2.0000 at step 1"
        );
        let one = EarlyStopping { patience: 1, min_delta: 0.5 };
        assert_eq!(told(&[f64::NAN], &one), "held-out loss has not fallen by more than 0.5 in 1 validation");
    }

    #[test]
    fn a_run_that_stopped_is_complete_unless_it_is_given_more_patience() {
        let standing = Stagnation { loss: 1.0, step: Step(1), since: 3 };
        let stop = standing.verdict(&RULE).unwrap();
        for (rule, holds) in [
            (Some(RULE), true),
            (Some(EarlyStopping { patience: 2, ..RULE }), true),
            (Some(EarlyStopping { patience: 4, ..RULE }), false),
            (None, false),
        ] {
            assert_eq!(stop.holds(rule.as_ref()), holds, "{rule:?}");
        }
    }

    fn loss() -> impl Strategy<Value = f64> {
        prop_oneof![9 => (0..40_u8).prop_map(f64::from), 1 => Just(f64::NAN)]
    }

    proptest! {
        /// Whatever is killed and resumed in any order: a run stops at the step at which it would have stopped.
        #[test]
        fn any_kill_and_resume_gives_the_same_stop(
            losses in prop::collection::vec(loss(), 1..60),
            patience in 1..5_u32,
            min_delta in prop_oneof![Just(0.0), Just(1.5)],
            // After how many validations each life ends, and whether its last state is saved before it is measured.
            lives in prop::collection::vec((0..9_usize, prop::bool::ANY, prop::bool::ANY), 0..12),
        ) {
            let rule = EarlyStopping { patience, min_delta };
            // A checkpoint: how many states it comes after, whether the last of them was measured, and its figures.
            let mut stored = (0_usize, true, Metrics::new());
            let mut stopped = None;
            let undisturbed = lives.len();
            for life in 0..=undisturbed {
                let (mut at, measured, mut standing) = (stored.0, stored.1, Stagnation::of(&stored.2));
                let (left, unmeasured, saves) = lives.get(life).copied().unwrap_or((usize::MAX, false, false));
                let measure = |standing: Stagnation, at: usize| standing.after(Step(at as u64), losses[at - 1], &rule);
                if !measured {
                    standing = measure(standing, at);
                }
                for done in 0.. {
                    if standing.verdict(&rule).is_some() && at > 0 {
                        stopped = Some(at - 1);
                        break;
                    }
                    if at == losses.len() || done == left {
                        break;
                    }
                    at += 1;
                    if done + 1 == left && unmeasured {
                        // A drain saves the state and does not wait for its measurement.
                        stored = (at, false, standing.figures());
                        break;
                    }
                    standing = measure(standing, at);
                    if saves || at.is_multiple_of(3) {
                        stored = (at, true, standing.figures());
                    }
                }
                if stopped.is_some() {
                    break;
                }
            }
            prop_assert_eq!(stopped, stop(&losses, &rule));
        }
    }
}
