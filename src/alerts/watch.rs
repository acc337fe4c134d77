//! Which events somebody must be told of: a pure function of a run's events.

use std::{collections::BTreeSet, time::Duration};

use serde::Serialize;

use crate::{
    ids::{RunId, Step},
    report::{Event, human},
};

/// Workers that die this often without a checkpoint in between are worth an alert.
const RESTARTS: u32 = 3;
/// Different warnings that are told; more of them say nothing new.
const WARNINGS: usize = 20;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// No step has finished for long.
    Silent,
    /// The newest checkpoint is older than the bound.
    Lag,
    /// Workers die again and again, and no checkpoint comes.
    Restarting,
    /// The run ended before its last step; another machine, or this one, continues it.
    Interrupted,
    /// The run has reached a cap, and waits for a person.
    Capped,
    /// The last step is committed.
    Completed,
    /// The run ended with an error.
    Failed,
    /// A checkpoint is damaged, or something else is not as it should be.
    Warning,
}

/// One alert.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alert {
    /// What has happened.
    pub alert: Cause,
    /// The run, once it is known.
    pub run_id: Option<RunId>,
    /// The last finished step.
    pub step: Option<Step>,
    /// For people.
    pub message: String,
}

/// Remembers what it has told.
#[derive(Debug, Default)]
pub struct Watch {
    /// The oldest that a checkpoint may become.
    lag: Option<Duration>,
    run_id: Option<RunId>,
    step: Option<Step>,
    silent: bool,
    late: bool,
    restarts: u32,
    warned: BTreeSet<String>,
}

impl Watch {
    /// Watches a run of this id, if it is known already.
    pub fn new(run_id: Option<RunId>, lag: Option<Duration>) -> Self {
        Self { lag, run_id, ..Self::default() }
    }

    /// What an event is an alert of, if of anything.
    pub fn hear(&mut self, event: &Event) -> Option<Alert> {
        match event {
            Event::Counted(counted) => {
                if let Some(run_id) = &counted.run_id {
                    self.run_id = Some(run_id.clone());
                }
                None
            }
            Event::Step { step, lag_s, .. } => {
                (self.step, self.silent) = (Some(*step), false);
                let bound = self.lag?.as_secs_f64();
                let was_late = std::mem::replace(&mut self.late, *lag_s > bound);
                (self.late && !was_late).then(|| {
                    let [lag, bound] = [*lag_s, bound].map(human::seconds);
                    self.alert(Cause::Lag, format!("no checkpoint has become durable for {lag}, more than {bound}"))
                })
            }
            Event::Checkpoint { .. } => {
                self.restarts = 0;
                None
            }
            Event::NoProgress { quiet_s, lag_s, .. } => {
                let again = std::mem::replace(&mut self.silent, true);
                let [quiet, lag] = [*quiet_s, *lag_s].map(human::seconds);
                let text = format!("no step has finished for {quiet}; a kill would cost {lag} of training");
                (!again).then(|| self.alert(Cause::Silent, text))
            }
            Event::WorkerDied { step, reason, .. } => {
                self.step = Some(*step);
                self.restarts += 1;
                let text = format!(
                    "workers have died {RESTARTS} times since the newest checkpoint; the last one: {}",
                    human::plain(reason)
                );
                (self.restarts == RESTARTS).then(|| self.alert(Cause::Restarting, text))
            }
            Event::Interrupted { step, lost_steps, cap } => {
                self.step = Some(*step);
                Some(match cap {
                    Some(cap) => self.alert(Cause::Capped, format!("the run is at its cap: {}", human::plain(cap))),
                    None if *lost_steps == 0 => {
                        self.alert(Cause::Interrupted, format!("interrupted after step {step}; nothing is lost"))
                    }
                    None => {
                        let text = format!("interrupted after step {step}; {lost_steps} steps are to be done again");
                        self.alert(Cause::Interrupted, text)
                    }
                })
            }
            Event::Completed { step, early, .. } => {
                self.step = Some(*step);
                let why = early.as_deref().map_or_else(String::new, |why| format!(": {}", human::plain(why)));
                Some(self.alert(Cause::Completed, format!("completed after step {step}{why}")))
            }
            Event::Warning { message } => {
                let text = human::plain(message).to_string();
                let new = self.warned.len() < WARNINGS && self.warned.insert(text.clone());
                new.then(|| self.alert(Cause::Warning, text))
            }
            _ => None,
        }
    }

    /// The run ended with this error.
    pub fn failed(&self, error: &str) -> Alert {
        self.alert(Cause::Failed, error.to_owned())
    }

    fn alert(&self, alert: Cause, message: String) -> Alert {
        Alert { alert, run_id: self.run_id.clone(), step: self.step, message }
    }
}

/// Whether an event shows that the run goes on.
pub fn moves(event: &Event) -> bool {
    !matches!(
        event,
        Event::NoProgress { .. } | Event::WorkerDied { .. } | Event::Warning { .. } | Event::Standby { .. }
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ids::Generation, report::Counted};

    fn step(step: u64, lag_s: f64) -> Event {
        Event::Step {
            step: Step(step),
            loss: 1.0,
            lr: 1e-3,
            grad_norm: 1.0,
            tokens: 1,
            tokens_per_s: 1.0,
            step_s: 1.0,
            stall_s: 0.0,
            lag_steps: 1,
            lag_s,
            spent: None,
        }
    }

    fn died() -> Event {
        Event::WorkerDied { step: Step(3), reason: "signal 9".into(), restarts: 1, backoff_s: 0.0 }
    }

    fn checkpoint() -> Event {
        let (step, generation) = (Step(3), Generation(1));
        Event::Checkpoint { step, generation, bytes: 1, stall_s: 0.0, copy_s: 0.0, durable_s: 0.0 }
    }

    fn told(watch: &mut Watch, events: &[Event]) -> Vec<Cause> {
        events.iter().filter_map(|event| watch.hear(event)).map(|alert| alert.alert).collect()
    }

    #[test]
    fn each_trouble_is_told_once_until_it_is_over() {
        let mut watch = Watch::new(None, Some(Duration::from_secs(60)));
        let quiet = || Event::NoProgress { step: Step(3), quiet_s: 600.0, lag_steps: 1, lag_s: 601.0 };
        assert_eq!(told(&mut watch, &[step(1, 10.0), quiet(), quiet()]), [Cause::Silent]);
        assert_eq!(told(&mut watch, &[step(2, 10.0), quiet()]), [Cause::Silent]);
        assert_eq!(told(&mut watch, &[step(3, 60.0), step(4, 61.0), step(5, 62.0)]), [Cause::Lag]);
        assert_eq!(told(&mut watch, &[checkpoint(), step(6, 1.0), step(7, 61.0)]), [Cause::Lag]);
        assert_eq!(told(&mut watch, &[died(), died(), checkpoint(), died(), died()]), []);
        assert_eq!(told(&mut watch, &[died(), died()]), [Cause::Restarting]);
        let warning = |text: &str| Event::Warning { message: text.into() };
        assert_eq!(told(&mut watch, &[warning("a"), warning("a"), warning("b")]), [Cause::Warning; 2]);
        // Without a bound no lag is too long.
        assert_eq!(told(&mut Watch::default(), &[step(1, 1e9)]), []);
    }

    #[test]
    fn an_end_is_told_with_what_it_cost() {
        let run_id = RunId::new("first").unwrap();
        let mut watch = Watch::default();
        assert_eq!(
            watch.hear(&Event::Counted(Box::new(Counted { run_id: Some(run_id.clone()), ..Counted::default() }))),
            None
        );
        let end = |lost_steps, cap: Option<&str>| Event::Interrupted {
            step: Step(9),
            lost_steps,
            cap: cap.map(str::to_owned),
        };
        let alert = watch.hear(&end(2, None)).unwrap();
        let expected = "interrupted after step 9; 2 steps are to be done again";
        assert_eq!((alert.alert, alert.message.as_str()), (Cause::Interrupted, expected));
        assert_eq!((alert.run_id.clone(), alert.step), (Some(run_id), Some(Step(9))));
        assert_eq!(
            serde_json::to_string(&alert).unwrap(),
            format!(r#"{{"alert":"interrupted","run_id":"first","step":9,"message":"{expected}"}}"#)
        );
        assert_eq!(watch.hear(&end(0, Some("2.0 of 1.0 hours"))).unwrap().alert, Cause::Capped);
        assert_eq!(watch.failed("no store").alert, Cause::Failed);
        let done = Event::Completed { step: Step(9), loss: None, early: None };
        assert_eq!(watch.hear(&done).unwrap().alert, Cause::Completed);
    }
}
