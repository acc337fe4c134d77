//! Whether a run stops early: what is decided of each measured state. Pure.
//!
//! Every rank waits with a measured state until the agent has said what becomes of the run ([`Outlook`]), and so does
//! the state that was loaded: all of them stop after the very state that decides, and a run that was killed after its
//! decision comes to the same one when it is resumed. How it ends is that of any other end: the ranks are asked where
//! they stand, save that step, and stop.

use crate::{
    config::{EarlyStopping, RunConfig},
    ids::Step,
    journal::{Committed, EarlyStop, Metrics, Stagnation},
};

/// What becomes of a run at a measured state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// It never stops early: nobody waits.
    Free,
    /// It goes on.
    Proceed,
    /// It ends here.
    Stop,
}

/// How early stopping stands in one generation.
#[derive(Clone, Copy, Debug)]
pub struct Stopping {
    rule: Option<EarlyStopping>,
    standing: Stagnation,
    /// The step after which the run is complete in any case.
    last: Step,
    /// The loaded state was to be measured, and was not.
    unmeasured: bool,
    /// The step at which the run stops, and why.
    decided: Option<(Step, EarlyStop)>,
}

impl Stopping {
    /// Of a generation that starts from the checkpoint of this record; `None`: from no checkpoint.
    pub fn of(config: &RunConfig, loaded: Option<&Committed>) -> Self {
        let (task, every) = (&config.workload, config.workload.data.validation_every);
        let rule = task.train.early_stopping;
        let standing = loaded.map(|committed| Stagnation::of(&committed.metrics)).unwrap_or_default();
        let due = |committed: &Committed| every > 0 && committed.step.get().is_multiple_of(every);
        let unmeasured =
            rule.is_some() && loaded.is_some_and(|committed| due(committed) && committed.validation_loss.is_none());
        Self { rule, standing, last: task.last_step(), unmeasured, decided: None }
    }

    /// Whether the ranks measure the loaded state before their first step: a drain did not wait for it.
    pub const fn measures_first(&self) -> bool {
        self.unmeasured
    }

    /// The state of `step` is there, and was measured now (`loss`) or earlier.
    pub fn judge(&mut self, step: Step, loss: Option<f64>) -> Outlook {
        let Some(rule) = self.rule else { return Outlook::Free };
        if let Some(loss) = loss {
            self.standing = self.standing.after(step, loss, &rule);
        }
        match self.standing.verdict(&rule) {
            Some(why) if step < self.last && step > Step(0) => {
                self.decided = Some((step, why));
                Outlook::Stop
            }
            _ => Outlook::Proceed,
        }
    }

    /// The figures that a checkpoint is recorded with from here on.
    pub fn figures(&self) -> Metrics {
        if self.rule.is_some() { self.standing.figures() } else { Metrics::new() }
    }

    /// Why the run is complete with `step`, if it stops there early.
    pub fn stops_after(&self, step: Step) -> Option<EarlyStop> {
        self.decided.filter(|(decided, _)| *decided == step).map(|(_, why)| why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::testing::config, ids::Generation, journal::SaveCost};

    fn run(patience: u32) -> RunConfig {
        let mut config = config();
        config.workload.train.steps = 100;
        config.workload.data.validation_every = 10;
        config.workload.train.early_stopping = (patience > 0).then_some(EarlyStopping { patience, min_delta: 0.0 });
        config
    }

    fn committed(step: u64, validation_loss: Option<f64>, metrics: Metrics) -> Committed {
        Committed {
            step: Step(step),
            generation: Generation(1),
            manifest: String::new(),
            manifest_crc64: String::new(),
            bytes: 0,
            loss: Some(1.0),
            validation_loss,
            metrics,
            cost: SaveCost::default(),
        }
    }

    #[test]
    fn a_run_stops_at_the_state_that_decides_and_at_no_other() {
        let mut stopping = Stopping::of(&run(2), None);
        assert_eq!(stopping.judge(Step(0), None), Outlook::Proceed);
        assert!(stopping.figures().is_empty());
        for (step, loss, verdict) in
            [(10, 3.0, Outlook::Proceed), (20, 3.0, Outlook::Proceed), (30, 4.0, Outlook::Stop)]
        {
            assert_eq!(stopping.stops_after(Step(step)), None);
            assert_eq!(stopping.judge(Step(step), Some(loss)), verdict, "{step}");
        }
        assert_eq!(stopping.stops_after(Step(30)).unwrap().best_step, Step(10));
        assert_eq!(stopping.stops_after(Step(20)), None);
        // The last step is the last one anyway.
        let mut stopping = Stopping::of(&run(1), None);
        assert_eq!(
            [(90, 1.0), (100, 1.0)].map(|(step, loss)| stopping.judge(Step(step), Some(loss))),
            [Outlook::Proceed; 2]
        );
        assert_eq!(stopping.stops_after(Step(100)), None);
        let mut free = Stopping::of(&run(0), None);
        assert_eq!([10, 20, 30].map(|step| free.judge(Step(step), Some(1.0))), [Outlook::Free; 3]);
        assert!(free.figures().is_empty());
    }

    #[test]
    fn a_loaded_state_knows_what_was_known_when_it_was_saved() {
        let mut before = Stopping::of(&run(2), None);
        for step in [10, 20, 30] {
            before.judge(Step(step), Some(1.0));
        }
        // Killed after the decision.
        let decided = committed(30, Some(1.0), before.figures());
        let mut again = Stopping::of(&run(2), Some(&decided));
        assert!(!again.measures_first());
        assert_eq!(again.judge(Step(30), None), Outlook::Stop);
        assert_eq!(again.stops_after(Step(30)), before.stops_after(Step(30)));
        // Resumed with more patience.
        let mut patient = Stopping::of(&run(3), Some(&decided));
        assert_eq!(patient.judge(Step(30), None), Outlook::Proceed);
        assert_eq!(patient.judge(Step(40), Some(1.0)), Outlook::Stop);
        // A drain did not wait for the measurement.
        for (step, loss, patience, measures) in
            [(30, None, 2, true), (30, None, 0, false), (30, Some(1.0), 2, false), (31, None, 2, false)]
        {
            let loaded = committed(step, loss, Metrics::new());
            assert_eq!(Stopping::of(&run(patience), Some(&loaded)).measures_first(), measures, "{step} {loss:?}");
        }
    }
}
