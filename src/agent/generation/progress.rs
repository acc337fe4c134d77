//! A run whose steps have stopped coming: a hung kernel, a collective that waits for a rank, data that does not arrive.
//!
//! What is done is decided in [`restart::standstill`]. Nothing is stored; a crash or a new life begins to count again. While workers are asked to
//! stop it is [`super::drain`]'s to wait for them.

use std::{num::NonZeroU64, time::Duration};

use tokio::time::Instant;

use super::{super::restart, Death, Life};
use crate::{
    config::{Cadence, RunConfig},
    ids::Step,
    report::Event,
};

/// Since when nothing has moved, and how often that was told.
pub struct Quiet {
    since: Instant,
    told: u32,
}

impl Quiet {
    /// Something has moved.
    pub fn begin(now: Instant) -> Self {
        Self { since: now, told: 0 }
    }
}

/// Steps after whose multiples a state is measured that `checkpoint.keep.best` ranks.
pub fn ranked(config: &RunConfig) -> Option<NonZeroU64> {
    let wanted = config.checkpoint.keep.best > 0 && !matches!(config.checkpoint.every, Cadence::Steps(_));
    NonZeroU64::new(config.data.validation_every).filter(|_| wanted)
}

impl Life<'_> {
    /// Says so, or ends workers that hang.
    pub fn look_at_the_standstill(&mut self) {
        let step = self.finished();
        // Once all ranks have stopped the store is waited for, which says so itself.
        let works = self.scheduler.as_ref().is_some_and(|scheduler| !scheduler.has_ended());
        if !works || self.draining || self.dead.is_some() {
            return;
        }
        let quiet = self.standstill.since.elapsed();
        let usual = self.estimates.step.estimate().and_then(|step| Duration::try_from_secs_f64(step.high).ok());
        match restart::standstill(quiet, usual, self.standstill.told, &self.start.config.restart) {
            restart::Standstill::Wait => {}
            // The last state may wait for a slot that a silent store keeps: who ended the workers then would lose it.
            restart::Standstill::End if step >= Step(self.start.config.train.steps) => {}
            restart::Standstill::Tell => {
                self.standstill.told += 1;
                self.reporter.event(&Event::NoProgress {
                    step,
                    quiet_s: quiet.as_secs_f64(),
                    lag_steps: step.get() - self.committed().get(),
                    lag_s: self.ledger.lag().as_secs_f64(),
                });
            }
            restart::Standstill::End => {
                let reason = format!("no step was finished for {} s after step {step}", quiet.as_secs());
                self.dead = Some(Death::Died(reason));
            }
        }
    }
}
