//! Whether a group whose worker died is started again, and what is done about one that stands still: pure decisions.

use std::time::Duration;

use crate::{config::RestartConfig, ids::Step};

/// What to do after a death.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start again after this pause.
    Restart {
        /// The pause.
        after: Duration,
    },
    /// Starting again would not help.
    GiveUp {
        /// Why, for a person.
        reason: String,
    },
}

/// What to do about workers that finish no step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standstill {
    /// Nothing: it may be a long step.
    Wait,
    /// A person should know.
    Tell,
    /// Something hangs: they are ended, and their group may be started again.
    End,
}

/// Nothing is said of a standstill that is shorter, or no longer than [`LONG_STEPS`] usual steps.
const LONG: Duration = Duration::from_secs(600);
const LONG_STEPS: u32 = 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Decides after the last of `deaths`: for each, the last step that the group had finished. A group that dies at the same
/// step again and again has a cause that a restart does not cure; one that dies here and there is restarted up to the bound.
pub fn decide(deaths: &[Step], settings: &RestartConfig) -> Decision {
    let Some(last) = deaths.last() else { return Decision::Restart { after: Duration::ZERO } };
    let same = deaths.iter().rev().take_while(|step| *step == last).count();
    let same_limit = usize::try_from(settings.same_step.max(1)).unwrap_or(usize::MAX);
    if same >= same_limit {
        return Decision::GiveUp { reason: format!("workers died {same} times in a row after step {last}") };
    }
    let limit = usize::try_from(settings.max).unwrap_or(usize::MAX);
    if deaths.len() > limit {
        return Decision::GiveUp { reason: format!("workers died {} times; restart.max is {limit}", deaths.len()) };
    }
    let doubled = settings.backoff.saturating_mul(1 << (deaths.len() - 1).min(16));
    Decision::Restart { after: doubled.min(LONGEST_PAUSE) }
}

/// Decides when nothing has moved for `quiet`. `usual`: what a step takes, if that is known; `told`: how often it was said since something
/// moved. It is said again each time the standstill has doubled.
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

    const SETTINGS: RestartConfig = RestartConfig { max: 4, same_step: 3, backoff: Duration::from_secs(1), hang: None };

    fn decided(deaths: &[u64]) -> Decision {
        decide(&deaths.iter().map(|&step| Step(step)).collect::<Vec<_>>(), &SETTINGS)
    }

    #[test]
    fn deaths_here_and_there_are_restarted_with_longer_pauses_up_to_a_bound() {
        let after = |seconds| Decision::Restart { after: Duration::from_secs(seconds) };
        assert_eq!(decided(&[5]), after(1));
        assert_eq!(decided(&[5, 9]), after(2));
        assert_eq!(decided(&[5, 9, 9, 12]), after(8));
        assert!(matches!(decided(&[1, 2, 3, 4, 5]), Decision::GiveUp { .. }));
        let patient = RestartConfig { max: 100, ..SETTINGS };
        let many: Vec<_> = (0..50).map(Step).collect();
        assert_eq!(decide(&many, &patient), Decision::Restart { after: LONGEST_PAUSE });
    }

    #[test]
    fn a_death_at_the_same_step_again_and_again_is_given_up() {
        assert!(matches!(decided(&[7, 7]), Decision::Restart { .. }));
        let Decision::GiveUp { reason } = decided(&[7, 7, 7]) else { panic!("started again") };
        assert!(reason.contains("after step 7"), "{reason}");
        assert!(matches!(decided(&[7, 7, 8, 7]), Decision::Restart { .. }), "progress in between");
    }

    #[test]
    fn a_standstill_is_told_ever_less_often_and_ended_where_that_is_wanted() {
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
