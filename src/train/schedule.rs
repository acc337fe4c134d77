//! The learning rate of a step: a pure function of the step, so that a resume needs no state for it.

use crate::{
    config::{ScheduleConfig, ScheduleKind},
    ids::Step,
};

/// The learning rate used in `step` (from 1) of a run of `total` steps with peak `peak`.
///
/// Linear warm-up reaches the peak at the last warm-up step; then the shape runs from the peak down to `min_lr_ratio ·
/// peak` at the last step of the run.
pub fn learning_rate(schedule: &ScheduleConfig, peak: f64, step: Step, total: u64) -> f64 {
    let (step, warmup) = (step.get(), schedule.warmup_steps);
    if step < warmup {
        return peak * step as f64 / warmup as f64;
    }
    let after = total.saturating_sub(warmup).max(1);
    let progress = (step.saturating_sub(warmup) as f64 / after as f64).min(1.0);
    let shape = match schedule.kind {
        ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        ScheduleKind::Linear => 1.0 - progress,
        ScheduleKind::Constant => 1.0,
    };
    peak * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(kind: ScheduleKind, step: u64) -> f64 {
        let schedule = ScheduleConfig { kind, warmup_steps: 10, min_lr_ratio: 0.1 };
        learning_rate(&schedule, 2.0, Step(step), 110)
    }

    #[test]
    fn warm_up_peak_shape_and_floor() {
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Constant] {
            assert!((rate(kind, 1) - 0.2).abs() < 1e-12);
            assert!((rate(kind, 5) - 1.0).abs() < 1e-12);
            assert!((rate(kind, 10) - 2.0).abs() < 1e-12);
        }
        assert!((rate(ScheduleKind::Cosine, 60) - (0.2 + 1.8 * 0.5)).abs() < 1e-12);
        assert!((rate(ScheduleKind::Linear, 85) - (0.2 + 1.8 * 0.25)).abs() < 1e-12);
        assert!((rate(ScheduleKind::Constant, 110) - 2.0).abs() < 1e-12);
        for kind in [ScheduleKind::Cosine, ScheduleKind::Linear] {
            assert!((rate(kind, 110) - 0.2).abs() < 1e-12, "floor at the end");
            assert!((rate(kind, 500) - 0.2).abs() < 1e-12, "and beyond");
        }
    }

    #[test]
    fn no_warm_up_begins_near_the_peak() {
        let schedule = ScheduleConfig { kind: ScheduleKind::Linear, warmup_steps: 0, min_lr_ratio: 0.0 };
        assert!((learning_rate(&schedule, 1.0, Step(1), 4) - 0.75).abs() < 1e-12);
    }
}
