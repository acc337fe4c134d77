//! The totals of this process's part of the run, from its events.

use super::{Event, human};
use crate::ids::Step;

/// Totals over one command; repeated steps count twice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Summary {
    steps: u64,
    first: Option<(Step, f64)>,
    last: Option<(Step, f64)>,
    /// The step of the current weights; falls at a restart.
    position: Option<Step>,
    /// The step of the newest checkpoint, of this process or before it.
    saved: Step,
    tokens: f64,
    step_s: f64,
    checkpoints: u64,
    stall_s: f64,
    lost_steps: u64,
    ending: Option<&'static str>,
}

impl Summary {
    pub fn add(&mut self, event: &Event) {
        match event {
            Event::Step { step, loss, tokens_per_s, step_s, .. } => {
                self.steps += 1;
                self.first.get_or_insert((*step, *loss));
                self.last = Some((*step, *loss));
                self.position = Some(*step);
                self.tokens += tokens_per_s * step_s;
                self.step_s += step_s;
            }
            Event::Checkpoint { step, stall_s, .. } => {
                self.checkpoints += 1;
                self.saved = *step;
                self.stall_s += stall_s;
            }
            // A dead worker's group starts again from the newest checkpoint: the steps in between are repeated.
            Event::Formed { resume_step, .. } => {
                let resumed = resume_step.unwrap_or_default();
                if let Some(reached) = self.position {
                    self.lost_steps += reached.get().saturating_sub(resumed.get());
                }
                self.position = Some(resumed);
                self.saved = resumed;
            }
            Event::Interrupted { lost_steps, cap, .. } => {
                self.lost_steps += lost_steps;
                self.ending = Some(if cap.is_some() { "stopped at its cap" } else { "interrupted" });
            }
            Event::Completed { early: None, .. } => self.ending = Some("completed"),
            Event::Completed { early: Some(_), .. } => self.ending = Some("stopped early"),
            Event::Validation { .. }
            | Event::Upload { .. }
            | Event::FoundDead { .. }
            | Event::Standby { .. }
            | Event::Kept { .. }
            | Event::Restored { .. }
            | Event::FirstStep { .. }
            | Event::Notice { .. }
            | Event::Drain { .. }
            | Event::NoProgress { .. }
            | Event::WorkerDied { .. }
            | Event::Warning { .. }
            | Event::Dropped { .. }
            | Event::Phase { .. }
            | Event::Counted(_) => {}
        }
    }

    /// Whether the [line](Self::line) at the end will say the same as this event.
    pub const fn repeats(&self, event: &Event) -> bool {
        matches!(event, Event::Completed { early: None, .. }) && self.last.is_some()
    }

    /// One line; `None` if nothing was trained.
    #[expect(clippy::cast_precision_loss, reason = "a mean of a count of checkpoints")]
    pub fn line(&self, wall_s: f64) -> Option<String> {
        let ((first_step, first), (last_step, last)) = (self.first?, self.last?);
        let mut parts = vec![
            format!("{} ({first_step} to {last_step})", human::plural(self.steps, "step")),
            format!("loss {first:.4} -> {last:.4}"),
            human::plural(self.checkpoints, "checkpoint"),
        ];
        if self.checkpoints > 0 {
            parts.push(format!("mean stall {}", human::seconds(self.stall_s / self.checkpoints as f64)));
        }
        // An end of another kind, an error, doesn't say how many steps it costs: those that no checkpoint holds.
        let unsaved = match (self.ending, self.position) {
            (None, Some(reached)) => reached.get().saturating_sub(self.saved.get()),
            _ => 0,
        };
        parts.push(format!("{} lost", human::plural(self.lost_steps + unsaved, "step")));
        if self.step_s > 0.0 {
            parts.push(format!("{} tokens/s", human::count(self.tokens / self.step_s)));
        }
        parts.push(format!("wall {}", human::seconds(wall_s)));
        Some(format!("{}: {}", self.ending.unwrap_or("stopped"), parts.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::{Generation, WorldSize},
        report::tests::step,
    };

    /// The store has gone: an error ends the run, and no event says what it costs.
    #[test]
    fn an_end_by_an_error_costs_the_steps_that_no_checkpoint_holds() {
        let mut summary = Summary::default();
        let lost = |summary: &Summary| {
            let line = summary.line(1.0).unwrap();
            line.split(", ").find(|part| part.ends_with(" lost")).unwrap().to_owned()
        };
        summary.add(&Event::Formed {
            generation: Generation(1),
            world_size: WorldSize(2),
            resume_step: Some(Step(4)),
            total_steps: 10,
            shares: None,
            nodes: None,
            leader: None,
        });
        summary.add(&step(5, 5.0));
        summary.add(&step(6, 5.0));
        assert_eq!(lost(&summary), "2 steps lost", "since the checkpoint that it began from");
        summary.add(&Event::Checkpoint {
            step: Step(6),
            generation: Generation(1),
            bytes: 1,
            stall_s: 0.0,
            copy_s: 0.0,
            durable_s: 0.0,
        });
        assert_eq!(lost(&summary), "0 steps lost");
        for n in 7..10 {
            summary.add(&step(n, 5.0));
        }
        assert_eq!(lost(&summary), "3 steps lost");
        assert!(summary.line(1.0).unwrap().starts_with("stopped: "));
        // These ends say it themselves.
        summary.add(&Event::Interrupted { step: Step(9), lost_steps: 3, cap: None });
        assert_eq!(lost(&summary), "3 steps lost");
    }

    #[test]
    fn events_add_up() {
        let mut summary = Summary::default();
        assert_eq!(summary.line(1.0), None);
        let completed = Event::Completed { step: Step(3), loss: Some(3.0), early: None };
        assert!(!summary.repeats(&completed), "a run that was complete has no line at the end");
        let formed = |generation, resume_step: Option<u64>| Event::Formed {
            generation: Generation(generation),
            world_size: WorldSize(2),
            resume_step: resume_step.map(Step),
            total_steps: 10,
            shares: None,
            nodes: None,
            leader: None,
        };
        let checkpoint = |stall_s| Event::Checkpoint {
            step: Step(2),
            generation: Generation(1),
            bytes: 1,
            stall_s,
            copy_s: 0.0,
            durable_s: 0.0,
        };
        for event in [
            formed(1, None),
            step(1, 5.0),
            step(2, 4.0),
            checkpoint(0.010),
            step(3, 3.0),
            formed(2, Some(2)),
            formed(3, Some(2)),
            step(3, 3.0),
            checkpoint(0.020),
            completed.clone(),
        ] {
            summary.add(&event);
        }
        assert!(summary.repeats(&completed));
        let early = Event::Completed { step: Step(3), loss: Some(3.0), early: Some("why".into()) };
        assert!(!summary.repeats(&early), "the reason is nowhere else");
        assert!(!summary.repeats(&Event::Interrupted { step: Step(3), lost_steps: 2, cap: None }));
        assert_eq!(
            summary.line(61.0).unwrap(),
            "completed: 4 steps (1 to 3), loss 5.0000 -> 3.0000, 2 checkpoints, mean stall 15.0 ms, 1 step lost, \
             1.02k tokens/s, wall 61.0 s"
        );
        summary.add(&Event::Interrupted { step: Step(3), lost_steps: 2, cap: None });
        assert!(summary.line(1.0).unwrap().starts_with("interrupted: "));
        assert!(summary.line(1.0).unwrap().contains("3 steps lost"));
    }
}
