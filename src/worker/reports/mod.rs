//! The reports of a rank's steps: made when the numbers are there, sent before anything else is said of their state.
//!
//! A GPU has its numbers when it has computed them, while the host is ahead of it. So the report of one step is sent
//! when the next one has been launched, and before everything that would let somebody know of its state: a save, a
//! validation, an error, a loop that waits or has ended. At most one report is due at any time. On the CPU nothing is
//! late.
//!
//! *Crash:* the report is lost with its step, whose state nobody has.

pub(super) mod usage;

use std::time::Duration;

use tch::{Device, Tensor};

use self::usage::Gauge;
use super::patience::After;
use crate::{
    error::Result,
    faults::{self, At},
    ids::Step,
    protocol::{StepReport, Usage},
    torch::Readback,
    train::Timer,
};

/// What is known of a finished step before its device has finished it.
#[derive(Debug)]
struct Finished {
    step: Step,
    lr: f64,
    stalled: Duration,
    after: After,
    /// How long the validation before it took.
    validated: Duration,
    usage: Option<Usage>,
}

/// The reports of one rank.
#[derive(Debug)]
pub(super) struct Reports {
    /// Loss and norm of the step whose report is due.
    numbers: Readback<2>,
    gauge: Gauge,
    late: bool,
    due: Option<Finished>,
}

/// A report to be sent.
#[derive(Debug)]
pub(super) struct Due {
    pub report: StepReport,
    /// Seconds of the step, with the validation before it.
    pub took_s: f64,
    /// What the step followed.
    pub after: After,
}

impl Reports {
    /// Of a rank that computes on `device`.
    pub fn new(device: Device, gauge: Gauge) -> Result<Self> {
        // Tests have late reports without a GPU.
        let late = device != Device::Cpu || faults::check("worker.late", At::default()).is_err();
        Ok(Self { numbers: Readback::new(device)?, gauge, late, due: None })
    }

    /// Whether reports are late.
    pub const fn may_be_late(&self) -> bool {
        self.late
    }

    /// A step has been launched to its end; the report before it was sent. `numbers`: its loss and norm, on the device.
    /// Its time ends with the timer's next [`begin`](Timer::begin).
    pub fn finished(
        &mut self,
        step: Step,
        lr: f64,
        numbers: [&Tensor; 2],
        stalled: Duration,
        (after, validated): (After, Duration),
    ) -> Result<()> {
        self.numbers.start(numbers)?;
        let usage = self.gauge.read(step)?;
        self.due = Some(Finished { step, lr, stalled, after, validated, usage });
        Ok(())
    }

    /// The report that is due, if one is, after the timer has begun the step behind it. Waits for its numbers.
    pub fn due(&mut self, timer: &Timer) -> Result<Option<Due>> {
        let Some(Finished { step, lr, stalled, after, validated, usage }) = self.due.take() else { return Ok(None) };
        let [loss, grad_norm] = self.numbers.wait()?;
        let (step_s, split) = timer.split_before()?;
        let stall_s = stalled.as_secs_f64();
        let report = StepReport { step, loss, grad_norm, lr, step_s, stall_s, split, usage };
        Ok(Some(Due { took_s: step_s + validated.as_secs_f64(), report, after }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Precision, train::Part};

    #[test]
    fn a_report_has_the_numbers_of_its_own_step_however_late_it_is() {
        let gauge = Gauge::new(Device::Cpu, Precision::Fp32, None, Step(0)).unwrap();
        let mut reports = Reports::new(Device::Cpu, gauge).unwrap();
        assert!(!reports.may_be_late());
        let mut timer = Timer::new(Device::Cpu, 1, &[]).unwrap();
        assert!(reports.due(&timer).unwrap().is_none());
        timer.lap(Part::Forward).unwrap();
        let mut loss = Tensor::from(2.5_f32);
        let (stalled, followed) = (Duration::from_secs(1), (After::Save, Duration::from_secs(9)));
        reports.finished(Step(3), 0.1, [&loss, &Tensor::from(0.5_f32)], stalled, followed).unwrap();
        timer.begin().unwrap();
        // What the next step does is not in it.
        let _ = loss.fill_(7.0);
        timer.lap(Part::Data).unwrap();
        let Due { report, took_s, after } = reports.due(&timer).unwrap().unwrap();
        assert_eq!((report.step, report.loss, report.grad_norm, report.lr), (Step(3), 2.5, 0.5, 0.1));
        assert!(report.split.forward_s > 0.0 && report.split.data_s == 0.0, "{report:?}");
        assert_eq!((report.stall_s, took_s - report.step_s, after), (1.0, 9.0, After::Save));
        assert!(report.usage.is_some(), "the third step is measured");
        assert!(reports.due(&timer).unwrap().is_none(), "it is sent once");
    }
}
