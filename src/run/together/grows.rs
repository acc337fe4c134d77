//! What is to be expected of a group, for the decision whether it takes up nodes that wait
//! ([`crate::rendezvous::policy::growth`]).
//!
//! *Crash, retry, cancel:* nothing is stored; a node that leads for the first time has measured nothing yet.

use tokio::time::Instant;

use crate::{
    agent::group::Progressed,
    faults::{self, At},
    rendezvous::policy::growth::Prospects,
    run::Runner,
};

/// What the last planned change of the group has cost, as far as this node has led both generations.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change {
    /// The last step of the generation before this one, if that ended as planned.
    last: Option<Instant>,
    /// Seconds from such a step to the next one.
    measured_s: Option<f64>,
}

impl Change {
    /// A generation has ended. `stepped`: when its first and its last step were finished; `planned`: all ranks have
    /// stopped after the last one.
    pub(super) fn ends(&mut self, stepped: Option<(Instant, Instant)>, planned: bool) {
        self.measured_s = self.costs(stepped.map(|(first, _)| first));
        self.last = stepped.map(|(_, last)| last).filter(|_| planned);
    }

    /// Seconds, with the first step of the generation that runs.
    fn costs(&self, first: Option<Instant>) -> Option<f64> {
        let now = self.last.zip(first).map(|(last, first)| first.saturating_duration_since(last).as_secs_f64());
        now.or(self.measured_s)
    }
}

impl Runner {
    /// What is to be expected of a group that is formed now, at each of its saves.
    pub(super) fn prospects(&self, change: Change) -> impl Fn(Progressed) -> Prospects + Send + 'static {
        let (formed, last) = (Instant::now(), self.resolved.workload.last_step());
        let lasts_s = self.measured().mtbf_s();
        // A test changes its group as often as it likes.
        let at_once = faults::check("grow.at-once", At::default()).is_err();
        move |Progressed { step, step_s, first }| Prospects {
            since: formed.elapsed(),
            change_s: change.costs(first).filter(|_| !at_once),
            lasts_s,
            left_s: step_s.map(|step_s| step_s * last.get().saturating_sub(step.get()) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_change_costs_the_time_from_the_last_step_to_the_next_one() {
        let begin = Instant::now();
        let at = |s| begin + Duration::from_secs(s);
        let mut change = Change::default();
        assert_eq!(change.costs(Some(at(5))), None, "there was none");
        change.ends(Some((at(5), at(10))), true);
        assert_eq!((change.costs(None), change.costs(Some(at(13)))), (None, Some(3.0)));
        // A loss says nothing of what a planned change costs.
        change.ends(Some((at(13), at(20))), false);
        assert_eq!((change.costs(None), change.costs(Some(at(90)))), (Some(3.0), Some(3.0)));
    }
}
