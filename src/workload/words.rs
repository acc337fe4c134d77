//! Hints about what to type next that name settings of the work.

use crate::{
    config::{Spread, TrainConfig},
    error::{Error, Kind},
    ids::{RunId, Step, WorldSize},
    journal::EarlyStop,
};

/// Hint for a run that diverged at `step`; `good`: the last checkpoint before that.
pub fn lower_rate(run_id: &RunId, step: Step, good: Option<Step>) -> String {
    match good {
        // Its numbers are those of weights that no step has changed.
        None if step <= Step(1) => "the first step's numbers depend on no learning rate: check the weights of \
                                    model.init_from, the model's config.json, and train.precision"
            .to_owned(),
        Some(good) => format!(
            "the last good checkpoint is step {good}; lower the learning rate and carry on: trainer resume --run-id \
             {run_id} --from {good} --set train.optimizer.lr=…"
        ),
        None => "no checkpoint was made yet; start again with a lower learning rate: trainer run CONFIG --run-id NEW \
                 --set train.optimizer.lr=…"
            .to_owned(),
    }
}

/// The run is at `step`, beyond its last one.
pub fn beyond(run_id: &RunId, step: Step, last: Step) -> Error {
    Error::new(Kind::Config, format!("run {run_id} is at step {step} already, beyond train.steps = {last}")).with_hint(
        format!(
            "give more steps, --set train.steps=N, or an earlier checkpoint, --from STEP: `trainer checkpoints \
             --run-id {run_id}` lists them"
        ),
    )
}

/// Hint for a run whose workers have too little memory. `fitting`: the micro-batch that a worker says would fit.
pub fn less_memory(run_id: &RunId, train: &TrainConfig, workers: u32, fitting: Option<u32>) -> String {
    let spread = Spread::new(train.global_batch, WorldSize(workers), train.max_micro_batch);
    match spread.map_or(train.max_micro_batch, Spread::largest_pass) {
        0 | 1 => format!(
            "a micro-batch is one sequence already: carry on where each worker has more memory, or with more workers \
             (--nproc-per-node), which share the optimizer's state: trainer resume --run-id {run_id}"
        ),
        most if fitting.is_some_and(|fitting| (1..most).contains(&fitting)) => format!(
            "lower the micro-batch to the largest that would fit: trainer resume --run-id {run_id} --set \
             train.max_micro_batch={}; the global batch stays as it is",
            fitting.unwrap_or(1)
        ),
        most => format!(
            "halve the micro-batch: trainer resume --run-id {run_id} --set train.max_micro_batch={}; the global batch \
             stays as it is",
            most / 2
        ),
    }
}

/// What makes a run that stopped early go on.
pub fn stops_later(early: &EarlyStop) -> String {
    format!(
        "to go on: trainer resume with --set train.early_stopping.patience=N, above {}, or 0 for never",
        early.validations
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_too_little_memory_hears_the_command_that_needs_less() {
        let train = |global_batch, max_micro_batch| TrainConfig {
            global_batch,
            max_micro_batch,
            ..crate::checkpoint::testing::config().workload.train
        };
        let run: RunId = "r1".parse().unwrap();
        // 32 sequences by 2 workers: 16 each, in passes of 8.
        let hint = less_memory(&run, &train(32, 9), 2, None);
        assert!(hint.contains("trainer resume --run-id r1 --set train.max_micro_batch=4;"), "{hint}");
        // By 5 workers: 6 or 7 each, the latter in passes of 4 and 3 if they may have 6.
        for most in [9, 6] {
            let hint = less_memory(&run, &train(32, most), 5, Some(most + 1));
            assert!(hint.contains("--set train.max_micro_batch=3;"), "{hint}");
        }
        let hint = less_memory(&run, &train(32, 9), 2, Some(5));
        assert!(hint.contains("trainer resume --run-id r1 --set train.max_micro_batch=5;"), "{hint}");
        let hint = less_memory(&run, &train(4, 1), 2, None);
        assert!(hint.contains("--nproc-per-node"), "{hint}");
    }

    #[test]
    fn who_has_diverged_hears_where_to_carry_on_if_there_is_such_a_place() {
        let run: RunId = "r1".parse().unwrap();
        let hint = lower_rate(&run, Step(9), Some(Step(7)));
        assert!(hint.contains("is step 7;") && hint.contains("trainer resume --run-id r1 --from 7 --set"), "{hint}");
        assert!(lower_rate(&run, Step(2), None).contains("trainer run CONFIG --run-id NEW"));
        let hint = lower_rate(&run, Step(1), None);
        assert!(hint.contains("init_from") && !hint.contains("optimizer.lr"), "{hint}");
    }
}
