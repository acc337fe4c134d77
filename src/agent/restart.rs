//! Whether a group whose worker died is started again, and how a stalled group is treated: pure decisions.

use std::time::Duration;

use crate::{
    config::RestartConfig,
    error::{Error, Kind},
    ids::{RunId, Step},
    shortage::{Shortage, is_out_of_memory},
};

/// A group of workers that died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    /// The last step that it had finished.
    pub step: Step,
    /// Memory ran out, on a GPU or on the host.
    pub out_of_memory: bool,
}

impl Death {
    /// After `step`, for this reason.
    pub fn of(step: Step, reason: &str) -> Self {
        Self { step, out_of_memory: is_out_of_memory(reason) }
    }
}

/// What to do after a death.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start again after this pause.
    Restart {
        /// The pause.
        after: Duration,
    },
    /// Starting again would not help.
    GiveUp {
        /// Why, for a person.
        reason: String,
        /// The model and its batch do not fit into memory.
        out_of_memory: bool,
    },
}

/// What to do about workers that finish no step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standstill {
    /// Nothing: it may be a long step.
    Wait,
    /// Report it.
    Tell,
    /// Something hangs: they are ended, and their group may be started again.
    End,
}

/// A standstill is not reported if it is shorter than this, or no longer than [`LONG_STEPS`] usual steps.
const LONG: Duration = Duration::from_secs(600);
const LONG_STEPS: u32 = 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Decides after the last of `deaths`. A group that dies at the same step again and again has a cause that a restart
/// does not cure; one that dies at various steps is restarted up to the bound. If memory ran out, another process may
/// have taken it: the group is tried once more, and given up if memory runs out again before it makes progress.
pub fn decide(deaths: &[Death], settings: &RestartConfig) -> Verdict {
    let Some((last, earlier)) = deaths.split_last() else { return Verdict::Restart { after: Duration::ZERO } };
    let step = last.step;
    if last.out_of_memory && earlier.iter().any(|death| death.out_of_memory && step <= death.step) {
        return Verdict::GiveUp { reason: format!("memory ran out again after step {step}"), out_of_memory: true };
    }
    let out_of_memory = false;
    let same = deaths.iter().rev().take_while(|death| death.step == step).count();
    let same_limit = usize::try_from(settings.same_step.max(1)).unwrap_or(usize::MAX);
    if same >= same_limit {
        return Verdict::GiveUp {
            reason: format!("workers died {same} times in a row after step {step}"),
            out_of_memory,
        };
    }
    let limit = usize::try_from(settings.max).unwrap_or(usize::MAX);
    if deaths.len() > limit {
        let reason = format!("workers died {} times; restart.max is {limit}", deaths.len());
        return Verdict::GiveUp { reason, out_of_memory };
    }
    let doubled = settings.backoff.saturating_mul(1 << (deaths.len() - 1).min(16));
    Verdict::Restart { after: doubled.min(LONGEST_PAUSE) }
}

/// The error that ends the run when the group is given up, and what to type next. `less_memory`: memory ran out, and
/// this is how to need less.
pub fn given_up(reason: String, less_memory: Option<String>, run_id: &RunId) -> Error {
    if let Some(hint) = less_memory {
        return Error::new(Kind::Config, reason).with_hint(hint);
    }
    if let Some(shortage) = Shortage::in_words(&reason) {
        return Error::new(Kind::Unavailable, reason).with_hint(shortage.hint());
    }
    let hint = format!("when the cause is cured: trainer resume --run-id {run_id}");
    Error::new(Kind::Bug, reason).with_hint(hint)
}

/// Decides when nothing has moved for `quiet`. `usual`: the duration of a step, if known; `told`: how often the
/// standstill was reported since something moved. It is reported again each time it has doubled.
pub fn standstill(quiet: Duration, usual: Option<Duration>, told: u32, settings: &RestartConfig) -> Standstill {
    if settings.hang.is_some_and(|limit| quiet >= limit) {
        return Standstill::End;
    }
    let long = usual.map_or(LONG, |step| step.saturating_mul(LONG_STEPS).max(LONG));
    if quiet >= long.saturating_mul(1 << told.min(16)) { Standstill::Tell } else { Standstill::Wait }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: RestartConfig =
        RestartConfig { max: 4, same_step: 3, backoff: Duration::from_secs(1), hang: None, fruitless_starts: None };

    fn died(step: u64) -> Death {
        Death { step: Step(step), out_of_memory: false }
    }

    fn decided(deaths: &[u64]) -> Verdict {
        decide(&deaths.iter().map(|&step| died(step)).collect::<Vec<_>>(), &SETTINGS)
    }

    #[test]
    fn deaths_here_and_there_are_restarted_with_longer_pauses_up_to_a_bound() {
        let after = |seconds| Verdict::Restart { after: Duration::from_secs(seconds) };
        assert_eq!(decided(&[5]), after(1));
        assert_eq!(decided(&[5, 9]), after(2));
        assert_eq!(decided(&[5, 9, 9, 12]), after(8));
        assert!(matches!(decided(&[1, 2, 3, 4, 5]), Verdict::GiveUp { .. }));
        let patient = RestartConfig { max: 100, ..SETTINGS };
        let many: Vec<_> = (0..50).map(died).collect();
        assert_eq!(decide(&many, &patient), Verdict::Restart { after: LONGEST_PAUSE });
    }

    #[test]
    fn a_death_at_the_same_step_again_and_again_is_given_up() {
        assert!(matches!(decided(&[7, 7]), Verdict::Restart { .. }));
        let Verdict::GiveUp { reason, out_of_memory: false } = decided(&[7, 7, 7]) else { panic!("started again") };
        assert!(reason.contains("after step 7"), "{reason}");
        assert!(matches!(decided(&[7, 7, 8, 7]), Verdict::Restart { .. }), "progress in between");
    }

    #[test]
    fn memory_that_ran_out_is_tried_once_more_and_given_up_unless_steps_were_finished_in_between() {
        let full = |step| Death { step: Step(step), out_of_memory: true };
        let given_up =
            |deaths: &[Death]| matches!(decide(deaths, &SETTINGS), Verdict::GiveUp { out_of_memory: true, .. });
        for (deaths, end) in [
            (vec![full(0)], false),
            (vec![full(0), full(0)], true),
            // From the checkpoint of step 5: not as far as the first time.
            (vec![full(9), full(7)], true),
            (vec![full(9), full(10)], false),
            (vec![full(9), full(10), full(10)], true),
            (vec![full(9), died(7), full(9)], true),
            (vec![died(9), full(9)], false),
            (vec![full(9), died(9)], false),
        ] {
            assert_eq!(given_up(&deaths), end, "{deaths:?}");
        }
    }

    #[test]
    fn who_is_given_up_hears_what_to_do_about_the_cause() {
        let run: RunId = "r1".parse().unwrap();
        let of = |why: &str, less_memory: Option<&str>| given_up(why.into(), less_memory.map(str::to_owned), &run);
        let error = of("memory ran out: Too many open files", Some("use less"));
        assert_eq!((error.kind(), error.hint()), (Kind::Config, Some("use less")));
        assert_eq!(of("why", None).kind(), Kind::Bug);
        let error = of("workers died: socket: Too many open files", None);
        assert_eq!(error.kind(), Kind::Unavailable);
        assert!(error.hint().unwrap().contains("ulimit"), "{error:?}");
    }

    #[test]
    fn an_oom_is_recognised_by_its_message() {
        let words = "worker 0: compute attention: CUDA out of memory. Tried to allocate 2.00 GiB";
        assert!(Death::of(Step(1), words).out_of_memory);
        let killed = "worker 0 killed by SIGKILL (possibly by the OOM killer)";
        assert!(!Death::of(Step(1), killed).out_of_memory);
    }

    #[test]
    fn a_hang_is_reported_less_and_less_often_and_ended_if_configured() {
        let (minutes, second) = (|n: u64| Duration::from_secs(60 * n), Some(Duration::from_secs(1)));
        let impatient = RestartConfig { hang: Some(minutes(15)), ..SETTINGS };
        for (quiet, usual, told, settings, expected) in [
            (9, second, 0, &SETTINGS, Standstill::Wait),
            (10, second, 0, &SETTINGS, Standstill::Tell),
            (10, None, 0, &SETTINGS, Standstill::Tell),
            (10, second, 1, &SETTINGS, Standstill::Wait),
            (20, second, 1, &SETTINGS, Standstill::Tell),
            // A step of two minutes.
            (39, Some(minutes(2)), 0, &SETTINGS, Standstill::Wait),
            (40, Some(minutes(2)), 0, &SETTINGS, Standstill::Tell),
            (1_000_000, second, u32::MAX, &SETTINGS, Standstill::Tell),
            (14, second, 0, &impatient, Standstill::Tell),
            (15, second, 1, &impatient, Standstill::End),
            (15, Some(minutes(60)), 0, &impatient, Standstill::End),
        ] {
            assert_eq!(standstill(minutes(quiet), usual, told, settings), expected, "{quiet} min, told {told} times");
        }
    }
}
