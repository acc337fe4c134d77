//! What the reports of the ranks become: the progress of a step, and the result of a validation. Pure.
//!
//! Reports come from one rank after the other, in any order; a step counts once every rank has reported it. Sums do not
//! depend on the order in which reports come: their last bit would otherwise differ from run to run.

use std::{collections::BTreeMap, num::NonZeroU64};

use crate::{
    config::TrainTask,
    ids::{Step, WorldSize},
    journal::{HELD_OUT, Metrics, Speed},
    model::flops,
    protocol::{HeldOutSum, Split, StepReport, Usage},
    report,
};

/// The facts about the work that decisions depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// Workers of all nodes.
    pub workers: u32,
    /// The step after which the run is complete.
    pub last: Step,
    /// The interval of steps after whose multiples a state is validated; `None`: none ever is.
    pub validated_every: Option<NonZeroU64>,
    /// Tokens of one step, over all workers.
    pub tokens: u64,
    /// Floating-point operations that training needs for each of them; 0: not known.
    pub flops: u64,
}

impl Outline {
    /// Of a task with this many workers.
    pub fn of(task: &TrainTask, world: WorldSize) -> Self {
        let TrainTask { model, data, .. } = task;
        let flops = flops::per_token(model.kind, &model.config, model.lora.as_ref(), data.sequence_length);
        Self {
            workers: world.get(),
            last: task.last_step(),
            validated_every: NonZeroU64::new(task.data.validation_every),
            tokens: u64::from(task.train.global_batch) * u64::from(task.data.sequence_length),
            // Of a program's own task nothing is known.
            flops: flops.unwrap_or(0),
        }
    }
}

/// The figures of a step that its checkpoint is recorded with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Its loss, if it has one.
    pub loss: Option<f64>,
    /// Other figures, by name.
    pub metrics: Metrics,
    /// How fast it was: recorded now and then, since a checkpoint does not need it.
    pub speed: Option<Speed>,
}

/// A step that every rank has finished.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The step.
    pub step: Step,
    /// Mean loss over the global batch.
    loss: f64,
    /// Seconds from the end of the step before; the slowest rank's.
    pub step_s: f64,
    lr: f64,
    grad_norm: f64,
    stall_s: f64,
    tokens: u64,
    split: Split,
    mfu: Option<f64>,
    /// Measured after this very step.
    usage: Option<Usage>,
    /// Measured last.
    known: Option<Usage>,
}

impl Progress {
    /// What a checkpoint of it is recorded with.
    pub fn figures(&self) -> Figures {
        let Split { data_s, forward_s, backward_s, reduce_s, capture_s, optimizer_s } = self.split;
        let speed = Speed {
            tokens_per_s: self.tokens as f64 / self.step_s.max(1e-9),
            step_s: self.step_s,
            data_s,
            forward_s,
            backward_s,
            reduce_s,
            capture_s,
            optimizer_s,
            mfu: self.mfu,
            host_peak_bytes: self.known.map(|usage| usage.host_peak_bytes as f64),
            device_peak_bytes: self.known.and_then(|usage| usage.device).map(|device| device.reserved as f64),
        };
        Figures { loss: Some(self.loss), metrics: Metrics::new(), speed: Some(speed) }
    }

    /// For people: how many steps and seconds the newest checkpoint is behind.
    pub fn event(&self, lag_steps: u64, lag_s: f64) -> report::Event {
        let Self { step, loss, step_s, lr, grad_norm, stall_s, tokens, split, mfu, usage, .. } = *self;
        let (tokens_per_s, tokens) = (tokens as f64 / step_s.max(1e-9), tokens.saturating_mul(step.get()));
        let Split { data_s, forward_s, backward_s, reduce_s, capture_s, optimizer_s } = split;
        let memory = usage.map(|Usage { device, host_bytes, host_peak_bytes, .. }| report::Memory {
            device_peak_bytes: device.map(|device| device.allocated),
            device_reserved_bytes: device.map(|device| device.reserved),
            host_bytes,
            host_peak_bytes,
        });
        let spent = report::Spent { data_s, forward_s, backward_s, reduce_s, capture_s, optimizer_s, mfu, memory };
        let spent = Some(Box::new(spent));
        report::Event::Step {
            step,
            loss,
            lr,
            grad_norm,
            tokens,
            tokens_per_s,
            step_s,
            stall_s,
            lag_steps,
            lag_s,
            spent,
        }
    }
}

/// A step whose numbers are not finite: its work is lost, and doing it again gives the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diverged {
    /// The step.
    pub step: Step,
    /// Which number is not finite.
    pub reason: String,
}

/// The measurement of a state, as far as ranks have reported it.
#[derive(Debug, Default)]
struct Shares {
    ranks: u32,
    /// The sum over the targets of each source, and their number.
    sums: BTreeMap<String, (f64, u64)>,
}

/// Gathers the reports of all ranks.
#[derive(Debug)]
pub struct Reports {
    outline: Outline,
    /// Of steps that not every rank has finished.
    steps: BTreeMap<Step, Vec<StepReport>>,
    /// Of states that not every rank has measured.
    validations: BTreeMap<Step, Shares>,
    /// What ranks have and use, as last reported: the most of any of them, and all their speeds together.
    usage: Option<Usage>,
}

impl Reports {
    /// None yet.
    pub const fn new(outline: Outline) -> Self {
        Self { outline, steps: BTreeMap::new(), validations: BTreeMap::new(), usage: None }
    }

    /// A rank has finished a step. `None`: others have not.
    ///
    /// A rank's loss is weighted by its share of the targets already, so that the plain mean over ranks is right.
    pub fn step(&mut self, report: StepReport) -> Option<Result<Progress, Diverged>> {
        let StepReport { step, grad_norm, lr, .. } = report;
        let reports = self.steps.entry(step).or_default();
        reports.push(report);
        if reports.len() < self.outline.workers as usize {
            return None;
        }
        let reports = self.steps.remove(&step)?;
        // Summed in no particular order of arrival would differ in the last bit: sum sorted.
        let mut losses: Vec<f64> = reports.iter().map(|r| r.loss).collect();
        losses.sort_by(f64::total_cmp);
        let loss = losses.iter().sum::<f64>() / losses.len() as f64;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Some(Err(Diverged { step, reason: format!("loss {loss}, gradient norm {grad_norm}") }));
        }
        let slowest = |f: fn(&StepReport) -> f64| reports.iter().map(f).fold(0.0, f64::max);
        let (step_s, stall_s) = (slowest(|r| r.step_s), slowest(|r| r.stall_s));
        // The rank that waits least for others is the one that the others wait for.
        let waits = |report: &&StepReport| (report.split.reduce_s, report.split.forward_s);
        let split = reports.iter().min_by(|a, b| {
            let (a, b) = (waits(a), waits(b));
            a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let split = split.map(|report| report.split).unwrap_or_default();
        let usages: Option<Vec<Usage>> = reports.iter().map(|report| report.usage).collect();
        let usage = usages.as_deref().and_then(most);
        self.usage = usage.or(self.usage);
        let (known, peak_flops) = (self.usage, self.usage.and_then(|usage| usage.peak_flops));
        let Outline { tokens, flops, .. } = self.outline;
        let needed = Some(tokens as f64 * flops as f64).filter(|needed| *needed > 0.0);
        let mfu = needed.zip(peak_flops).map(|(needed, peak)| needed / (peak * step_s.max(1e-9)));
        Some(Ok(Progress { step, loss, step_s, lr, grad_norm, stall_s, tokens, split, mfu, usage, known }))
    }

    /// A rank has measured its share of a state. `None`: others have not.
    ///
    /// Sums are exact (see `train::step`), so they do not depend on the order in which ranks report.
    pub fn validated(&mut self, step: Step, sums: Vec<HeldOutSum>) -> Option<Measured> {
        let shares = self.validations.entry(step).or_default();
        shares.ranks += 1;
        for HeldOutSum { source, loss, targets } in sums {
            let sum = shares.sums.entry(source).or_default();
            *sum = (sum.0 + loss, sum.1 + targets);
        }
        if shares.ranks != self.outline.workers {
            return None;
        }
        let Shares { sums: all, .. } = self.validations.remove(&step)?;
        let mean = |(loss, targets): (f64, u64)| (targets > 0).then(|| loss / targets as f64);
        let whole = all.values().fold((0.0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        let named = all.into_iter().filter(|(source, _)| !source.is_empty());
        let sources = named.filter_map(|(source, sum)| Some((source, mean(sum)?))).collect();
        Some(Measured { step, loss: mean(whole), sources })
    }
}

/// Of what ranks have and use: the sum of their speeds, if all are known, and the most memory of any of them.
fn most(usages: &[Usage]) -> Option<Usage> {
    let peaks = usages.iter().map(|usage| usage.peak_flops);
    let more = |a: Usage, b: &Usage| Usage {
        peak_flops: None,
        device: a.device.zip(b.device).map(|(a, b)| crate::protocol::DeviceUsage {
            allocated: a.allocated.max(b.allocated),
            reserved: a.reserved.max(b.reserved),
            total: a.total.min(b.total),
        }),
        host_bytes: a.host_bytes.max(b.host_bytes),
        host_peak_bytes: a.host_peak_bytes.max(b.host_peak_bytes),
    };
    let (first, others) = usages.split_first()?;
    Some(Usage { peak_flops: peaks.sum(), ..others.iter().fold(*first, more) })
}

/// The held-out loss of a state.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// Its step.
    pub step: Step,
    /// The mean over all targets; `None`: there was none.
    pub loss: Option<f64>,
    /// The means over the targets of each source of the data that has any.
    pub sources: BTreeMap<String, f64>,
}

impl Measured {
    /// As figures of a checkpoint, beside the loss.
    pub fn figures(&self) -> Metrics {
        self.sources.iter().map(|(source, loss)| (format!("{HELD_OUT}{source}"), *loss)).collect()
    }

    /// For people; `None`: there is nothing to say.
    pub fn event(&self) -> Option<report::Event> {
        let sources = self.sources.clone();
        self.loss.map(|loss| report::Event::Validation { step: self.step, loss, sources })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTLINE: Outline = Outline { workers: 3, last: Step(9), validated_every: None, tokens: 100, flops: 30 };

    fn report(step: u64, loss: f64, step_s: f64) -> StepReport {
        let stall_s = step_s / 10.0;
        StepReport { step: Step(step), loss, grad_norm: 1.5, lr: 1e-3, step_s, stall_s, ..StepReport::default() }
    }

    #[test]
    fn a_step_counts_once_every_rank_has_reported_it_and_the_slowest_says_how_long_it_took() {
        let mut reports = Reports::new(OUTLINE);
        assert_eq!(reports.step(report(4, 3.0, 0.5)), None);
        assert_eq!(reports.step(report(4, 1.0, 2.0)), None);
        // A rank may be a step ahead.
        assert_eq!(reports.step(report(5, 9.0, 1.0)), None);
        let progress = reports.step(report(4, 2.0, 1.0)).unwrap().unwrap();
        assert_eq!((progress.step, progress.step_s), (Step(4), 2.0));
        let Figures { loss, metrics, .. } = progress.figures();
        assert_eq!((loss, metrics), (Some(2.0), Metrics::new()));
        let report::Event::Step { tokens, tokens_per_s, stall_s, lag_steps, lag_s, lr, grad_norm, .. } =
            progress.event(3, 7.5)
        else {
            panic!("another event")
        };
        assert_eq!((tokens, tokens_per_s, stall_s), (400, 50.0, 0.2));
        assert_eq!((lag_steps, lag_s, lr, grad_norm), (3, 7.5, 1e-3, 1.5));
    }

    #[test]
    fn the_share_of_the_peak_is_known_once_every_rank_has_said_its_devices() {
        let mut reports = Reports::new(OUTLINE);
        let mut step = |step: u64, peaks: [Option<f64>; 3], reduce: [f64; 3]| {
            let mut progress = None;
            for (number, (peak_flops, reduce_s)) in peaks.into_iter().zip(reduce).enumerate() {
                let usage = Usage { peak_flops, host_bytes: number as u64, ..Usage::default() };
                let split = Split { reduce_s, forward_s: number as f64, ..Split::default() };
                let usage = peak_flops.map(|_| usage);
                progress = reports.step(StepReport { split, usage, ..report(step, 1.0, 0.5) });
            }
            progress.unwrap().unwrap()
        };
        let unknown = step(1, [None; 3], [0.3, 0.1, 0.2]);
        assert_eq!((unknown.mfu, unknown.usage, unknown.split.forward_s), (None, None, 1.0), "rank 1 is waited for");
        let known = step(2, [Some(2e4), Some(3e4), Some(1e4)], [0.1, 0.2, 0.1]);
        // 100 tokens of 30 operations in half a second, of 60,000 a second.
        assert_eq!((known.mfu, known.split.forward_s), (Some(0.1), 0.0));
        assert_eq!(known.usage.unwrap().host_bytes, 2);
        let report::Event::Step { spent: Some(spent), .. } = known.event(0, 0.0) else { panic!("no split") };
        assert_eq!((spent.reduce_s, spent.memory.unwrap().host_bytes), (0.1, 2));
        // And from there on.
        let later = step(3, [None; 3], [0.0; 3]);
        assert_eq!((later.mfu, later.usage), (Some(0.1), None));
        let speed = later.figures().speed.unwrap();
        assert_eq!((speed.mfu, speed.tokens_per_s, speed.host_peak_bytes), (Some(0.1), 200.0, Some(0.0)));
    }

    #[test]
    fn the_mean_over_ranks_with_different_shares_is_the_mean_over_sequences() {
        // 8 sequences on 3 ranks, one a pass; a sequence's loss is its number.
        let spread = crate::config::Spread::new(8, crate::ids::WorldSize(3), 1).unwrap();
        let (mut reports, mut sequence, mut progress) = (Reports::new(OUTLINE), 0.0, None);
        for rank in 0..3 {
            let mut loss = 0.0;
            for pass in spread.passes(crate::ids::Rank(rank)).iter() {
                loss += sequence / crate::config::divisor(8, pass.sequences.into(), crate::ids::WorldSize(3));
                sequence += 1.0;
            }
            progress = reports.step(report(1, loss, 1.0));
        }
        let loss = progress.unwrap().unwrap().loss;
        assert!(((loss - 3.5) / 3.5).abs() < 1e-15, "{loss}");
    }

    #[test]
    fn a_loss_is_the_same_bits_in_whatever_order_the_ranks_report() {
        let losses = [0.1, 0.2, 0.3];
        let of = |order: [usize; 3]| {
            let mut reports = Reports::new(OUTLINE);
            let mut last = None;
            for rank in order {
                last = reports.step(report(1, losses[rank], 1.0));
            }
            last.unwrap().unwrap().loss.to_bits()
        };
        for order in [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            assert_eq!(of(order), of([0, 1, 2]), "{order:?}");
        }
    }

    #[test]
    fn a_number_that_is_not_finite_is_divergence() {
        for (loss, grad_norm, reason) in [
            (f64::NAN, 1.0, "loss NaN, gradient norm 1"),
            (f64::INFINITY, 1.0, "loss inf, gradient norm 1"),
            (1.0, f64::NAN, "loss 1, gradient norm NaN"),
        ] {
            let mut reports = Reports::new(Outline { workers: 1, ..OUTLINE });
            let diverged = reports.step(StepReport { grad_norm, ..report(2, loss, 1.0) }).unwrap().unwrap_err();
            assert_eq!(diverged, Diverged { step: Step(2), reason: reason.into() });
        }
    }

    #[test]
    fn a_validation_is_the_mean_over_all_targets_of_all_ranks() {
        let mut reports = Reports::new(OUTLINE);
        let sum = |source: &str, loss, targets| HeldOutSum { source: source.into(), loss, targets };
        let mut validated = |step, loss, targets| reports.validated(Step(step), vec![sum("", loss, targets)]);
        assert_eq!(validated(4, 6.0, 2), None);
        assert_eq!(validated(4, 1.0, 1), None);
        let measured = Measured { step: Step(4), loss: Some(2.5), sources: BTreeMap::new() };
        assert_eq!(validated(4, 3.0, 1), Some(measured));
        // Fewer targets than ranks, or none at all.
        assert_eq!(validated(8, 0.0, 0), None);
        assert_eq!(validated(8, 0.0, 0), None);
        let measured = validated(8, 0.0, 0).unwrap();
        assert_eq!((measured.loss, measured.event()), (None, None));
    }

    #[test]
    fn a_validation_has_the_mean_of_each_source_that_has_targets() {
        let mut reports = Reports::new(OUTLINE);
        let sums = |chat: (f64, u64), code: (f64, u64)| {
            [("chat", chat), ("code", code), ("none", (0.0, 0))]
                .map(|(source, (loss, targets))| HeldOutSum { source: source.into(), loss, targets })
                .to_vec()
        };
        assert_eq!(reports.validated(Step(4), sums((6.0, 2), (0.0, 0))), None);
        assert_eq!(reports.validated(Step(4), sums((3.0, 1), (1.0, 4))), None);
        let measured = reports.validated(Step(4), sums((0.0, 0), (2.0, 2))).unwrap();
        assert_eq!(measured.loss, Some(12.0 / 9.0));
        assert_eq!(measured.sources, [("chat".to_owned(), 3.0), ("code".to_owned(), 0.5)].into());
        let figures = [("held_out/chat".to_owned(), 3.0), ("held_out/code".to_owned(), 0.5)];
        assert_eq!(measured.figures(), figures.into());
    }
}
