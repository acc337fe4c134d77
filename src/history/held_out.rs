//! Held-out losses as people ask for them: how they stand, which checkpoint has the lowest, and whether the run stopped
//! because of them.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::Serialize;

use crate::{
    checkpoint::prune,
    error::{Error, Kind, Result},
    ids::Step,
    journal::{Committed, EarlyStop, HELD_OUT, Outcome, RunState, Stagnation},
};

/// Which checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// That of this step.
    Step(Step),
    /// The one with the lowest held-out loss on the run's current line.
    Best,
}

impl FromStr for Which {
    type Err = String;
    /// A number, or `best`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "best" => Ok(Self::Best),
            _ => text.parse().map(Self::Step).map_err(|_| "expected a step's number, or \"best\"".to_owned()),
        }
    }
}

impl Which {
    /// Its step.
    ///
    /// # Errors
    /// [`Kind::Usage`] for the best one of a run none of whose checkpoints was measured.
    pub fn step(self, state: &RunState) -> Result<Step> {
        match self {
            Self::Step(step) => Ok(step),
            Self::Best => match prune::best_of(state) {
                Some(best) => Ok(best.committed.step),
                None => {
                    let run_id = state.run_id();
                    let what = format!("the held-out loss of no checkpoint of run {run_id} was measured");
                    let hint = format!(
                        "name a step of `trainer checkpoints --run-id {run_id}`; data.validation_every has it measured"
                    );
                    Err(Error::new(Kind::Usage, what).with_hint(hint))
                }
            },
        }
    }
}

/// Why a run is complete before its last step, if it is.
pub fn early(state: &RunState) -> Option<EarlyStop> {
    match state.outcome() {
        Outcome::Completed { early, .. } => *early,
        _ => None,
    }
}

/// A measured checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Its step.
    pub step: Step,
    /// Its held-out loss.
    pub loss: f64,
    /// That of each source of the data, if its inputs have names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sources: BTreeMap<String, f64>,
}

impl Point {
    fn of(committed: &Committed, loss: f64) -> Self {
        let named = committed.metrics.iter().filter_map(|(name, loss)| Some((name.strip_prefix(HELD_OUT)?, *loss)));
        let sources = named.map(|(name, loss)| (name.to_owned(), loss)).collect();
        Self { step: committed.step, loss, sources }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.4} at step {}", self.loss, self.step)?;
        for (number, (source, loss)) in self.sources.iter().enumerate() {
            write!(f, "{}{source} {loss:.4}", if number == 0 { " (" } else { ", " })?;
        }
        f.write_str(if self.sources.is_empty() { "" } else { ")" })
    }
}

/// How the held-out loss of a run stands, by its checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeldOut {
    /// The newest measured one.
    pub newest: Point,
    /// The one with the lowest loss.
    pub best: Point,
    /// Validations since the lowest loss, of a run that may stop early.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validations_since_best: Option<u32>,
}

impl HeldOut {
    /// Of the run's current line; `None`: none of its checkpoints was measured.
    pub fn of(state: &RunState) -> Option<Self> {
        let line = state.candidates();
        let point = |committed: &Committed| Some(Point::of(committed, committed.validation_loss?));
        let newest = line.iter().find_map(|checkpoint| point(&checkpoint.committed))?;
        // One that was measured after it was saved has its loss in later records.
        let best = prune::best_of(state).and_then(|best| point(&best.committed)).unwrap_or_else(|| newest.clone());
        let standing = line.first().map(|newest| Stagnation::of(&newest.committed.metrics)).unwrap_or_default();
        let validations_since_best = standing.loss.is_finite().then_some(standing.since);
        Some(Self { newest, best, validations_since_best })
    }
}

impl fmt::Display for HeldOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loss {}; best {}", self.newest, self.best)?;
        match self.validations_since_best {
            Some(since) => write!(f, ", {since} validations ago"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        history::tests::{committed, created, formed, state},
        journal::{Metrics, Record},
    };

    /// A run with these checkpoints: steps, losses and figures.
    fn run(checkpoints: &[(u64, Option<f64>, Metrics)]) -> RunState {
        let measured = |(step, loss, metrics): &(u64, Option<f64>, Metrics)| match committed(*step, 1) {
            Record::Committed(committed) => {
                Record::Committed(Committed { validation_loss: *loss, metrics: metrics.clone(), ..committed })
            }
            other => other,
        };
        state([created(), formed(1, None, &[])].into_iter().chain(checkpoints.iter().map(measured)).collect())
    }

    #[test]
    fn the_best_checkpoint_has_the_lowest_held_out_loss() {
        let sources = [("held_out/chat".to_owned(), 1.9), ("held_out/code".to_owned(), 1.2)];
        let measured = run(&[
            (10, Some(2.0), Metrics::new()),
            (20, Some(1.5), Metrics::new()),
            (30, Some(1.75), sources.into()),
            (40, None, Metrics::new()),
        ]);
        assert_eq!("best".parse::<Which>().unwrap().step(&measured).unwrap(), Step(20));
        assert_eq!("40".parse::<Which>().unwrap().step(&measured).unwrap(), Step(40));
        assert!("worst".parse::<Which>().is_err());
        let text = HeldOut::of(&measured).unwrap().to_string();
        assert_eq!(text, "loss 1.7500 at step 30 (chat 1.9000, code 1.2000); best 1.5000 at step 20");
        let unmeasured = run(&[(10, None, Metrics::new())]);
        assert_eq!(HeldOut::of(&unmeasured), None);
        assert_eq!(Which::Best.step(&unmeasured).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn a_state_that_was_measured_after_it_was_saved_may_be_the_best() {
        let later = Stagnation { loss: 1.25, step: Step(20), since: 1 };
        let state =
            run(&[(10, Some(2.0), Metrics::new()), (20, None, Metrics::new()), (30, Some(1.5), later.figures())]);
        assert_eq!(Which::Best.step(&state).unwrap(), Step(20));
    }
}
