//! Whether a group whose worker died is started again: a pure decision.

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

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: RestartConfig = RestartConfig { max: 4, same_step: 3, backoff: Duration::from_secs(1) };

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
}
