//! Where the time of a step goes: marks between its parts, read when the device has passed them.
//!
//! On a CPU the numbers are there when the step is; on a GPU the host runs ahead, so the numbers of one step are read
//! while the next is computed. Two rows of marks serve for that, in turns. Marks are made in memory that was there
//! before the first step: the loop allocates nothing for them and takes no lock.
//!
//! Invariant: the parts of a step add up to its time, which begins with [`Timer::begin`]. *Crash, error:* nothing
//! lasts.

use tch::{Device, Tensor};

use super::strategy::stages::Watch;
use crate::{
    protocol::Split,
    torch::{Clock, TorchError},
};

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Between two steps: orders of the agent, reports.
    Between,
    /// Waiting for the batch, and moving it to the device.
    Data,
    /// The forward passes.
    Forward,
    /// The backward passes, with the reduction of gradients beside them.
    Backward,
    /// What is left of the reduction when the last gradient has been computed.
    Reduce,
    /// Waiting for a copy of the state, before it changes.
    Capture,
    /// The gradient's norm, the update, and the exchange of weights as far as somebody waits for it.
    Optimizer,
}

/// One step's marks.
#[derive(Debug)]
struct Laps {
    clock: Clock,
    /// What lies before each mark but the first.
    parts: Vec<Part>,
}

/// Measures steps.
#[derive(Debug)]
pub struct Timer {
    rows: [Laps; 2],
    now: usize,
}

/// Marks of a step that are not those of a pass.
const OTHERS: usize = 8;
/// Marks of a pass: after its data, when the weights are there, after its forward and backward passes, and at its last
/// gradient.
const OF_A_PASS: usize = 5;

impl Timer {
    /// For steps of at most `passes` passes. The end of the gradients is noted for `leaves`, if there are any: it
    /// separates the reduction from the backward pass.
    pub fn new(device: Device, passes: usize, leaves: &[Tensor]) -> Result<Self, TorchError> {
        let marks = passes * OF_A_PASS + OTHERS;
        let row = || -> Result<Laps, TorchError> {
            let mut clock = Clock::new(device, marks)?;
            // A mark on a GPU costs the host a microsecond. The first parameter's gradient is one of the last, since
            // gradients come in the order opposite to that of the parameters.
            clock.follow(if device == Device::Cpu { leaves } else { leaves.get(..1).unwrap_or_default() })?;
            Ok(Laps { clock, parts: Vec::with_capacity(marks) })
        };
        let mut timer = Self { rows: [row()?, row()?], now: 0 };
        timer.begin()?;
        Ok(timer)
    }

    fn row(&mut self) -> &mut Laps {
        &mut self.rows[self.now]
    }

    /// A step begins here. The numbers of the one before can be read until the next one begins.
    pub fn begin(&mut self) -> Result<(), TorchError> {
        self.now = 1 - self.now;
        let row = self.row();
        row.parts.clear();
        row.clock.watch(None)?;
        row.clock.mark(0)
    }

    /// What was done since the last mark is `part`; if there is no room for it, it belongs to the part before.
    pub fn lap(&mut self, part: Part) -> Result<(), TorchError> {
        let row = self.row();
        if row.parts.len() + 1 < row.clock.count() {
            row.parts.push(part);
        }
        row.clock.mark(row.parts.len())
    }

    /// The step's last backward pass begins here. It ends with [`Timer::lap_backward`].
    pub fn watch_backward(&mut self) -> Result<(), TorchError> {
        let row = self.row();
        // The reduction needs one more.
        let index = Some(row.parts.len() + 1).filter(|index| index + 1 < row.clock.count());
        row.clock.watch(index)
    }

    /// A backward pass ends here. What came after the last gradient, if [`Timer::watch_backward`] has seen it, is the
    /// reduction.
    pub fn lap_backward(&mut self) -> Result<(), TorchError> {
        let row = self.row();
        if !row.clock.has_noted()? {
            return self.lap(Part::Backward);
        }
        row.clock.watch(None)?;
        row.parts.push(Part::Backward);
        self.lap(Part::Reduce)
    }

    /// The numbers of the step under way, as far as it has come: its seconds, and what they were spent on. Waits until
    /// the device has come so far.
    pub fn split(&self) -> Result<(f64, Split), TorchError> {
        self.read(self.now)
    }

    /// The same of the step before, which was over when [`Timer::begin`] was called.
    pub fn split_before(&self) -> Result<(f64, Split), TorchError> {
        self.read(1 - self.now)
    }

    fn read(&self, row: usize) -> Result<(f64, Split), TorchError> {
        let Laps { clock, parts } = &self.rows[row];
        let mut split = Split::default();
        for (index, part) in parts.iter().enumerate() {
            let seconds = clock.seconds(index, index + 1)?;
            match part {
                Part::Between => {}
                Part::Data => split.data_s += seconds,
                Part::Forward => split.forward_s += seconds,
                Part::Backward => split.backward_s += seconds,
                Part::Reduce => split.reduce_s += seconds,
                Part::Capture => split.capture_s += seconds,
                Part::Optimizer => split.optimizer_s += seconds,
            }
        }
        Ok((clock.seconds(0, parts.len())?, split))
    }
}

impl Watch for Timer {
    fn backward_begins(&mut self, last: bool) -> Result<(), TorchError> {
        self.lap(Part::Forward)?;
        if last { self.watch_backward() } else { Ok(()) }
    }

    fn backward_ends(&mut self) -> Result<(), TorchError> {
        self.lap_backward()
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn sum(split: Split) -> f64 {
        let Split { data_s, forward_s, backward_s, reduce_s, capture_s, optimizer_s } = split;
        data_s + forward_s + backward_s + reduce_s + capture_s + optimizer_s
    }

    #[test]
    fn the_parts_of_a_step_add_up_to_its_time_and_outlive_the_begin_of_the_next() {
        let mut timer = Timer::new(Device::Cpu, 2, &[]).unwrap();
        for part in [Part::Between, Part::Data, Part::Forward, Part::Backward, Part::Data, Part::Forward] {
            timer.lap(part).unwrap();
        }
        timer.lap_backward().unwrap();
        for part in [Part::Capture, Part::Optimizer] {
            timer.lap(part).unwrap();
        }
        let (step_s, split) = timer.split().unwrap();
        assert!(split.reduce_s == 0.0 && split.backward_s > 0.0, "no reduction was seen: {split:?}");
        assert!(sum(split) < step_s, "what lies between two steps is in the step's time alone");
        timer.begin().unwrap();
        assert_eq!(timer.split_before().unwrap(), (step_s, split));
        timer.lap(Part::Optimizer).unwrap();
        let (step_s, split) = timer.split().unwrap();
        assert_eq!((split.data_s, split.optimizer_s), (0.0, step_s));
        // A step of more passes than were said.
        (0..40).for_each(|_| timer.lap(Part::Data).unwrap());
        timer.watch_backward().unwrap();
        timer.lap_backward().unwrap();
        let (step_s, split) = timer.split().unwrap();
        assert!((sum(split) - step_s).abs() < 1e-9 && split.backward_s == 0.0, "{split:?}");
    }

    #[test]
    fn what_follows_the_last_gradient_is_the_reduction() {
        let leaf = Tensor::ones([4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let mut timer = Timer::new(Device::Cpu, 2, &[leaf.shallow_clone()]).unwrap();
        let backward = || leaf.square().sum(Kind::Float).backward();
        backward();
        timer.lap_backward().unwrap();
        let (_, first) = timer.split().unwrap();
        assert!(first.reduce_s == 0.0, "only the last pass reduces");
        timer.watch_backward().unwrap();
        backward();
        timer.lap_backward().unwrap();
        let (step_s, split) = timer.split().unwrap();
        assert!(split.reduce_s > 0.0 && split.backward_s > first.backward_s, "{split:?}");
        assert!((sum(split) - step_s).abs() < 1e-9);
    }
}
