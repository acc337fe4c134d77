//! One rank's part of a task: parameters on its device, the samples of a step, their loss.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::{Fallible, Opened, Sample, Samples, Split, TaskError, Trainable, guard, parameters::Named};
use crate::{
    config::Precision,
    data::Sampler,
    error::{Context, Error, Kind as ErrorKind, Result},
    model::Leaves,
    random::mix,
    torch,
};

/// What a learner computes with.
#[derive(Clone, Copy, Debug)]
pub struct Arithmetic {
    /// The device of parameters and batches.
    pub device: Device,
    /// Arithmetic of forward and backward.
    pub precision: Precision,
    /// Whether the parameters get their initial values; otherwise they are about to be loaded.
    pub draw: bool,
}

/// A task that learns.
pub struct Learner {
    task: String,
    trainable: Box<dyn Trainable>,
    named: Named,
    samples: Samples,
    sampler: Sampler,
    seed: u64,
    /// The newest batch: what the task has made of these samples, and their targets.
    batch: Vec<Tensor>,
    listed: Vec<Sample>,
    targets: u64,
}

impl Learner {
    /// With fresh parameters, or arbitrary ones. `seed`: that of the run.
    pub fn new(opened: Opened, seed: u64, arithmetic: Arithmetic) -> Result<Self> {
        let Arithmetic { device, precision, draw } = arithmetic;
        let kind = match precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let named = opened.named(kind, device, draw.then_some(seed)).context("make the task's parameters")?;
        let Opened { task, samples, trainable, .. } = opened;
        let sampler = Sampler::new(seed, samples.train)
            .ok_or_else(|| Error::new(ErrorKind::Bug, "a task without samples was opened"))?;
        let (batch, listed) = (Vec::new(), Vec::new());
        Ok(Self { task: task.name, trainable, named, samples, sampler, seed, batch, listed, targets: 0 })
    }

    /// The parameters.
    pub fn leaves(&self) -> &dyn Leaves {
        &self.named
    }

    /// The parameters, to be laid out otherwise.
    pub fn leaves_mut(&mut self) -> &mut dyn Leaves {
        &mut self.named
    }

    /// Samples held out.
    pub fn held_out(&self) -> u64 {
        self.samples.held_out
    }

    /// Targets of the samples at these positions of the run's cursor, whichever ranks compute them.
    pub fn targets(&self, positions: Range<u64>) -> Result<u64, TaskError> {
        guard::call(&self.task, "count targets", || {
            let targets = positions.map(|at| self.trainable.targets(Split::Train, self.sampler.sample_at(at).1));
            Ok(targets.fold(0, u64::saturating_add))
        })
    }

    /// Makes the batch of these positions of the run's cursor.
    pub fn read(&mut self, positions: Range<u64>) -> Result<(), TaskError> {
        let (sampler, seed) = (self.sampler, mix(self.seed ^ TRAIN));
        let sample = |at: u64| Sample { index: sampler.sample_at(at).1, seed: mix(seed ^ mix(at)) };
        self.make(Split::Train, positions.map(sample))
    }

    /// Makes the batch of these held-out samples. What is drawn for it follows from the first of them.
    pub fn read_held_out(&mut self, samples: Range<u64>) -> Result<()> {
        let seed = mix(self.seed ^ HELD_OUT);
        torch::manual_seed(mix(seed ^ mix(samples.start)))?;
        Ok(self.make(Split::Validation, samples.map(|index| Sample { index, seed: mix(seed ^ mix(index)) }))?)
    }

    fn make(&mut self, split: Split, samples: impl Iterator<Item = Sample>) -> Result<(), TaskError> {
        let Self { task, trainable, named, batch, listed, targets, .. } = self;
        listed.clear();
        listed.extend(samples);
        // Its memory can be used again.
        batch.clear();
        let made = guard::call(task, "make a batch", || {
            let targets = listed.iter().map(|sample| trainable.targets(split, sample.index));
            Ok((targets.fold(0, u64::saturating_add), trainable.batch(split, listed, named.device())?))
        });
        (*targets, *batch) = made?;
        Ok(())
    }

    /// The mean loss over the newest batch's targets, and their number.
    pub fn loss(&self) -> Result<(Tensor, u64)> {
        let parameters = self.named.at_use()?;
        let sum = self.sum("compute its loss", || self.trainable.loss(&parameters, &self.batch))?;
        if !sum.requires_grad() {
            let what = format!("the loss of task {} has no gradient: it depends on no trained parameter", self.task);
            return Err(TaskError::Contents(what).into());
        }
        // Whoever reduces gradients waits for that of every parameter.
        let sum = torch::tch_result("sum losses", self.named.nothing(&parameters).and_then(|zero| sum.f_add(&zero)))?;
        self.mean(&sum)
    }

    /// The same for the metric of held-out samples.
    pub fn metric(&self) -> Result<(Tensor, u64)> {
        let parameters = self.named.at_use()?;
        self.mean(&self.sum("evaluate", || self.trainable.evaluate(&parameters, &self.batch))?)
    }

    /// What the task's code gives, as a tensor without extents.
    fn sum(&self, doing: &'static str, code: impl FnOnce() -> Fallible<Tensor>) -> Result<Tensor> {
        let sum = guard::call(&self.task, doing, code)?;
        if sum.numel() == 1 && sum.kind() == Kind::Float && sum.device() == self.named.device() {
            return Ok(torch::tch_result("take a sum", sum.f_view([0_i64; 0]))?);
        }
        let (task, shape, kind, device) = (&self.task, sum.size(), sum.kind(), sum.device());
        let what = format!(
            "task {task} gave a sum of shape {shape:?} and type {kind:?} on {device:?}, not one Float on {:?}",
            self.named.device()
        );
        Err(TaskError::Contents(what).into())
    }

    fn mean(&self, sum: &Tensor) -> Result<(Tensor, u64)> {
        let mean = sum.f_div_scalar(self.targets.max(1) as f64);
        Ok((torch::tch_result("scale loss", mean)?, self.targets))
    }
}

/// What tells the seeds of samples apart from all others that follow from the run's.
const TRAIN: u64 = 0x7461_736b_0000_0001;
const HELD_OUT: u64 = 0x7461_736b_0000_0002;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Parameter, Parameters, Task, registry::open_for_test};

    /// A sample is its index; the loss of each is w times the sum of what its batch has, once for each target.
    struct Counting;

    #[derive(serde::Serialize, serde::Deserialize)]
    struct Settings {
        wrong: String,
    }

    impl Task for Counting {
        type Settings = Settings;
        type Trainable = Settings;

        fn name(&self) -> &str {
            "counting"
        }
        fn version(&self) -> u32 {
            3
        }
        fn open(&self, settings: Settings) -> Fallible<Settings> {
            if settings.wrong == "open" { Err("no such folder".into()) } else { Ok(settings) }
        }
    }

    impl Trainable for Settings {
        fn parameters(&self) -> Vec<Parameter> {
            vec![Parameter::normal("w", &[1], 1.0)]
        }
        fn samples(&self) -> Samples {
            Samples { train: if self.wrong == "empty" { 0 } else { 10 }, held_out: 4 }
        }
        fn identity(&self) -> String {
            "ten".into()
        }
        fn targets(&self, split: Split, index: u64) -> u64 {
            if split == Split::Train { index } else { 1 }
        }
        fn batch(&mut self, _: Split, samples: &[Sample], device: Device) -> Fallible<Vec<Tensor>> {
            let numbers: Vec<f32> = samples.iter().map(|sample| sample.index as f32).collect();
            Ok(vec![Tensor::f_from_slice(&numbers)?.f_to_device(device)?])
        }
        fn loss(&self, parameters: &Parameters<'_>, batch: &[Tensor]) -> Fallible<Tensor> {
            let w = parameters.get("w")?.to_kind(Kind::Float);
            let square = batch[0].f_square()?;
            Ok(match self.wrong.as_str() {
                "shape" => (square * w).to_kind(Kind::Double),
                "constant" => square.sum(Kind::Float),
                "panic" => panic!("the third sample is odd"),
                _ => (square * w).sum(Kind::Float),
            })
        }
    }

    fn learner(wrong: &str) -> Result<Learner> {
        let opened = open_for_test(Counting, serde_json::json!({ "wrong": wrong }))?;
        let arithmetic = Arithmetic { device: Device::Cpu, precision: Precision::Bf16, draw: true };
        Learner::new(opened, 7, arithmetic)
    }

    #[test]
    fn a_mean_counts_the_targets_that_the_task_names() {
        let mut learner = learner("").unwrap();
        // One pass over the data visits each sample once: 0 + 1 + … + 9 targets.
        assert_eq!(learner.targets(0..10).unwrap(), 45);
        assert_eq!(learner.targets(0..4).unwrap() + learner.targets(4..10).unwrap(), 45);
        learner.read(3..6).unwrap();
        let order: Vec<u64> = learner.listed.iter().map(|sample| sample.index).collect();
        let (mean, targets) = learner.loss().unwrap();
        assert_eq!(targets, order.iter().sum::<u64>());
        let w = learner.named.at_use().unwrap().get("w").unwrap().to_kind(Kind::Float).double_value(&[0]);
        let squares: u64 = order.iter().map(|index| index * index).sum();
        let expected = squares as f64 * w / targets as f64;
        assert!((mean.double_value(&[]) - expected).abs() < 1e-5 * expected.abs(), "{mean:?} {expected}");
        mean.backward();
        learner.read_held_out(1..3).unwrap();
        let (mean, targets) = tch::no_grad(|| learner.metric()).unwrap();
        assert_eq!(targets, 2);
        assert!((mean.double_value(&[]) - 2.5 * w).abs() < 1e-5);
    }

    #[test]
    fn a_samples_seed_follows_from_its_place_in_the_run_alone() {
        let mut learner = learner("").unwrap();
        learner.read(0..10).unwrap();
        let first = learner.listed.clone();
        learner.read(4..6).unwrap();
        assert_eq!(learner.listed, first[4..6], "another batch");
        learner.read(10..20).unwrap();
        let mut seeds: Vec<u64> = first.iter().chain(&learner.listed).map(|sample| sample.seed).collect();
        learner.read_held_out(0..4).unwrap();
        let held_out = learner.listed.clone();
        seeds.extend(held_out.iter().map(|sample| sample.seed));
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 24, "another pass over the data draws other numbers");
        learner.read_held_out(2..3).unwrap();
        assert_eq!(learner.listed, held_out[2..3]);
    }

    #[test]
    fn what_a_task_does_wrong_is_told_by_name() {
        for (wrong, said, kind) in [
            ("open", "task counting failed to open its settings: no such folder", ErrorKind::Config),
            ("empty", "it has no samples to train on", ErrorKind::Config),
        ] {
            let error = learner(wrong).err().unwrap();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(said), "{error}");
        }
        for (wrong, said) in [
            ("shape", "a sum of shape [3] and type Double on Cpu, not one Float on Cpu"),
            ("constant", "has no gradient"),
            ("panic", "task counting panicked as it should compute its loss: the third sample is odd"),
        ] {
            let mut learner = learner(wrong).unwrap();
            learner.read(0..3).unwrap();
            let error = learner.loss().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert_eq!(open_for_test(Counting, serde_json::json!({ "wrong": "" })).unwrap().task.version, 3);
    }
}
