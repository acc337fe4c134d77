//! One step: batch → passes → clip → optimizer. And what comes before the first, and between two.

use std::time::Duration;

use tch::{Device, Tensor};

use super::{
    activations::Keeper,
    lesson::Lesson,
    optim::Brake,
    schedule,
    state::State,
    strategy::{self, Layout, Peers, Strategy, stages},
    timing::{Part, Timer},
};
use crate::{
    config::{self, DataConfig, ParallelConfig, Spread, TrainConfig, share},
    data::sampler::batch as positions,
    error::{Error, Kind, Result},
    ids::{Rank, Step, WorldSize},
    model::{Batch, Model, Parameter},
    protocol::HeldOutSum,
    torch,
};

/// Where one rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its rank.
    pub rank: Rank,
    /// How many there are.
    pub world: WorldSize,
    /// The device that it computes on.
    pub device: Device,
}

/// A lesson and its state, before peers are there.
pub struct Built {
    /// To be listed, loaded and captured.
    pub state: State,
    /// The weights that adapters are trained beside; empty if there are no adapters.
    pub base: State,
    lesson: Box<dyn Lesson>,
    layout: Box<dyn Layout>,
    train: TrainConfig,
    place: Place,
}

impl Built {
    /// Lays out the parameters of `lesson`, which the strategy may replace.
    pub fn new(
        mut lesson: Box<dyn Lesson>,
        train: TrainConfig,
        parallel: &ParallelConfig,
        place: Place,
    ) -> Result<Self> {
        let Place { rank, world, .. } = place;
        let base = State::of_base(lesson.leaves())?;
        let (state, layout) = strategy::lay_out(parallel, train.precision, lesson.leaves_mut(), rank, world)?;
        Ok(Self { state, base, lesson, layout, train, place })
    }

    /// Of a rank that leaves its peers between two steps, for another place on the same device: it keeps its state.
    /// Call [`Training::rest`] before. An error if its ranks have parts of a state, under the strategy before or the
    /// one in `parallel`.
    pub fn again(before: Training, parallel: &ParallelConfig, place: Place) -> Result<Self> {
        let Training { train, mut lesson, strategy, timer, .. } = before;
        // It watches the old leaves.
        drop(timer);
        let values = strategy.release();
        let values = values.ok_or_else(|| Error::new(Kind::Bug, "other ranks have parts of this state"))?;
        let (state, layout) = strategy::lay_out_again(parallel, lesson.leaves_mut(), values, place.world)?;
        let base = State::of_base(lesson.leaves())?;
        lesson.moves(&train, place)?;
        Ok(Self { state, base, lesson, layout, train, place })
    }

    /// Ready for the first step. The state must be loaded by then.
    pub fn start(self, data: &DataConfig, peers: Peers) -> Result<Training> {
        let Self { lesson, layout, train, place, .. } = self;
        let strategy = layout.connect(peers)?;
        let blocks = lesson.model().map_or(0, Model::blocks);
        // Alone, nothing is reduced.
        let leaves = lesson.leaves().parameters().iter().filter_map(Parameter::leaf);
        let leaves = leaves.filter(|_| place.world.get() > 1).map(Tensor::shallow_clone);
        let timer = Timer::new(place.device, lesson.passes().iter().count(), &leaves.collect::<Vec<_>>())?;
        Ok(Training {
            keeper: Keeper::new(train.activations, strategy.is_staged(), place.device.is_cuda(), blocks),
            strategy,
            timer,
            brake: Brake::new(),
            validation_every: data.validation_every,
            validation_sequences: data.validation_sequences,
            train,
            place,
            lesson,
        })
    }
}

/// One rank that trains.
pub struct Training {
    train: TrainConfig,
    validation_every: u64,
    validation_sequences: u32,
    place: Place,
    lesson: Box<dyn Lesson>,
    strategy: Box<dyn Strategy>,
    keeper: Keeper,
    timer: Timer,
    brake: Brake,
}

/// The result of a step's passes. The numbers are on the device: the caller chooses when to read them.
#[derive(Debug)]
pub struct Pass {
    /// This rank's part of the step's loss: the mean of it over all ranks is the mean over all targets of the step.
    pub loss: Tensor,
}

/// The result of an update.
#[derive(Debug)]
pub struct Update {
    /// 2-norm of the whole gradient before clipping, the same on every rank; on the device.
    pub grad_norm: Tensor,
    /// The learning rate used.
    pub lr: f64,
}

/// The held-out loss of one rank's share, by source of the data.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldOut(pub Vec<HeldOutSum>);

impl Training {
    /// Gradients of `step`, reduced under the last backward pass.
    pub fn forward_backward(&mut self, step: Step) -> Result<Pass> {
        let Place { rank, world, .. } = self.place;
        self.timer.lap(Part::Between)?;
        let step_targets = self.targets(step)?;
        let mut cursor = positions(step, self.train.global_batch, rank, world).start;
        let mut total: Option<Tensor> = None;
        for config::Pass { sequences, last } in self.lesson.passes().iter() {
            // Whatever is drawn for these sequences depends on their place in the run, not on who computes them.
            torch::manual_seed(pass_seed(self.train.seed, cursor))?;
            let end = cursor + u64::from(sequences);
            self.lesson.read(cursor..end)?;
            cursor = end;
            self.timer.lap(Part::Data)?;

            // The weights are read from here on.
            self.strategy.settle()?;
            self.timer.lap(Part::Optimizer)?;
            let divisor = |targets| config::divisor(step_targets, targets, world);
            let (newest, graph) = (self.lesson.newest()?, self.keeper.graph());
            let loss = stages::pass(self.strategy.as_mut(), &newest, graph, &divisor, last, &mut self.timer)?;
            total = Some(match total {
                None => loss,
                Some(sum) => torch::tch_result("sum losses", sum.f_add(&loss))?,
            });
        }
        if self.strategy.is_staged() {
            self.join_passes_of_others()?;
            self.strategy.reduce()?;
            self.timer.lap(Part::Reduce)?;
        }
        let loss = total.ok_or_else(|| Error::new(Kind::Bug, "a step without a micro-batch"))?;
        Ok(Pass { loss })
    }

    /// All ranks do each pass together: this one takes part in those for which it has no samples left.
    fn join_passes_of_others(&mut self) -> Result<()> {
        let Some(model) = self.lesson.model() else { return Ok(()) };
        let spread = Spread::new(self.train.global_batch, self.place.world, self.train.max_micro_batch)?;
        for _ in self.lesson.passes().iter().count()..spread.most_passes() {
            stages::idle_pass(self.strategy.as_mut(), model)?;
        }
        Ok(())
    }

    /// The targets of `step` on all ranks: the same number on each of them, without asking the others. A step without
    /// any has no loss, and an update would only let weights decay: it is refused by all ranks alike.
    fn targets(&mut self, step: Step) -> Result<u64> {
        let global_batch = self.train.global_batch;
        let targets = self.lesson.targets(positions(step, global_batch, Rank(0), WorldSize(1)))?;
        if targets > 0 { Ok(targets) } else { Err(self.lesson.nothing_to_learn(step, global_batch)) }
    }

    /// The update of `step` from its gradients, which are zero afterwards. The state changes here alone; not at all,
    /// from the first loss or gradient on that is not finite on any rank.
    pub fn update(&mut self, step: Step) -> Result<Update> {
        let TrainConfig { schedule, optimizer, steps, .. } = &self.train;
        let lr = schedule::learning_rate(schedule, optimizer.lr, step, *steps);
        let grad_norm = self.strategy.step(optimizer, step, lr, &mut self.brake)?;
        self.strategy.zero_grad()?;
        if self.keeper.is_searching()
            && let Some(memory) = torch::device_memory(self.place.device)?
        {
            self.keeper.learn(memory);
        }
        self.timer.lap(Part::Optimizer)?;
        Ok(Update { grad_norm, lr })
    }

    /// Measures the time of its steps.
    pub fn timer(&mut self) -> &mut Timer {
        &mut self.timer
    }

    /// Waits until the last update has reached this rank's weights: before they are copied, and before peers may leave.
    pub fn settle(&mut self) -> Result<()> {
        Ok(self.strategy.settle()?)
    }

    /// Between two steps: nothing of this rank's is in flight afterwards, on its device or among its peers.
    pub fn rest(&mut self) -> Result<()> {
        self.strategy.settle()?;
        if self.place.device.is_cuda() {
            // A communicator is not destroyed while a kernel may still use it: this number is behind all of them.
            let last = Tensor::f_zeros([], (tch::Kind::Float, self.place.device));
            torch::to_f64(&torch::tch_result("wait for the device", last)?)?;
        }
        Ok(())
    }

    /// The limit of every collective that is begun from now on. The last update has then reached this rank's weights.
    pub fn set_patience(&mut self, limit: Duration) -> Result<()> {
        self.strategy.settle()?;
        Ok(self.strategy.set_patience(limit)?)
    }

    /// Whether the held-out loss is measured after the step `done`.
    pub fn evaluation_is_due(&self, done: Step) -> bool {
        let (every, done) = (self.validation_every, done.get());
        self.lesson.held_out() > 0 && every > 0 && (done.is_multiple_of(every) || done == self.train.steps)
    }

    /// The held-out loss over this rank's share; `None`: abandoned, since `is_over` said before a pass that nobody
    /// waits for it. Where all ranks do each pass together, they abandon it together.
    pub fn evaluate(&mut self, is_over: impl Fn() -> bool) -> Result<Option<HeldOut>> {
        let Place { rank, world, .. } = self.place;
        let count = self.lesson.held_out().min(u64::from(self.validation_sequences));
        let mut samples = share(count, rank, world);
        let strategy = self.strategy.as_mut();
        strategy.settle()?;
        let mut sums = self.lesson.sums();
        let largest =
            if strategy.is_staged() { count.div_ceil(world.get().into()) } else { samples.end - samples.start };
        for _ in 0..largest.div_ceil(u64::from(self.train.max_micro_batch)) {
            if strategy.any(is_over())? {
                return Ok(None);
            }
            if samples.is_empty() {
                self.lesson.model().map_or(Ok(()), |model| stages::idle_losses(strategy, model))?;
                continue;
            }
            let end = (samples.start + u64::from(self.train.max_micro_batch)).min(samples.end);
            let mut losses = |model: &dyn Model, batch: &Batch| stages::target_losses(strategy, model, batch);
            self.lesson.measure(samples.start..end, count, &mut sums, &mut losses)?;
            samples.start = end;
        }
        Ok(Some(HeldOut(sums)))
    }
}

/// The seed of the generators for a pass that begins at this position of the run's cursor. A position belongs to one
/// step, so no two passes of a run have the same.
fn pass_seed(seed: u64, first: u64) -> u64 {
    // SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): neighbouring passes get unrelated seeds.
    let mut z = seed ^ first.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    mod again;
    mod ahead;
    mod device_tests;
    mod marked;
    mod saves;
    mod sound;

    use std::ops::RangeInclusive;

    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::{
        config::{self, ModelConfig, ModelKind, OptimizerConfig, Precision, ScheduleConfig, ScheduleKind},
        data::Dataset,
        torch::{LIMIT, ProcessGroup, ranks},
        train::{
            Batches, Language,
            state::testing::{Held, files, held, together},
        },
    };

    /// What a run says, and a folder with its data.
    struct Run {
        folder: tempfile::TempDir,
        model: ModelConfig,
        data: DataConfig,
        train: TrainConfig,
        parallel: ParallelConfig,
    }

    const SEQUENCE: usize = 16;
    const HELD_OUT: u64 = 5;

    fn run(strategy: config::Strategy, precision: Precision, max_micro_batch: u32) -> Run {
        let folder = tempfile::tempdir().unwrap();
        let shard = |split: &str, sequences: usize| {
            let count = sequences * SEQUENCE + 1;
            let tokens: Vec<u8> = (0..count).flat_map(|i| ((i * i * 7 + i * 3) as u16 % 96).to_le_bytes()).collect();
            let file = format!("{split}-00000.bin");
            std::fs::write(folder.path().join(&file), &tokens).unwrap();
            json!([{ "file": file, "bytes": tokens.len(), "crc64": "0000000000000000", "tokens": count }])
        };
        let index = json!({
            "format": 1, "dtype": "u16", "vocab_size": 96, "eos_id": 0, "recipe": "",
            "tokenizer": { "file": "tokenizer.json", "bytes": 2, "crc64": "0000000000000000" },
            "train": shard("train", 40), "validation": shard("validation", HELD_OUT as usize),
        });
        std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
        std::fs::write(folder.path().join("index.json"), index.to_string()).unwrap();
        Run {
            folder,
            model: ModelConfig {
                kind: ModelKind::Decoder,
                config: json!({
                    "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32,
                    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "max_position_embeddings": 64,
                }),
                init_from: None,
                lora: None,
            },
            data: DataConfig {
                train: String::new(),
                tokenizer: config::TokenizerRule::Same,
                sequence_length: SEQUENCE as u32,
                validation_every: 4,
                validation_sequences: 100,
            },
            train: TrainConfig {
                steps: 10,
                epochs: 0,
                global_batch: 8,
                max_micro_batch,
                seed: 7,
                precision,
                activations: config::Activations::Keep,
                threads: 1,
                fused: true,
                deterministic: true,
                optimizer: OptimizerConfig {
                    lr: 1e-2,
                    betas: [0.9, 0.95],
                    eps: 1e-8,
                    weight_decay: 0.1,
                    grad_clip: 0.5,
                },
                schedule: ScheduleConfig { kind: ScheduleKind::Linear, warmup_steps: 2, min_lr_ratio: 0.1 },
                early_stopping: None,
            },
            parallel: ParallelConfig {
                strategy,
                nproc_per_node: None,
                device: config::Device::Auto,
                bucket_mib: 1,
                mixed: false,
                share_device: false,
                peak_tflops: None,
            },
        }
    }

    /// A rank before its first step: fresh, or with the state that `from` has.
    fn rank(run: &Run, group: Option<ProcessGroup>, from: Option<&[Bytes]>) -> (Training, State) {
        rank_on(run, group, from, Device::Cpu)
    }

    fn rank_on(run: &Run, group: Option<ProcessGroup>, from: Option<&[Bytes]>, device: Device) -> (Training, State) {
        rank_of(run, group, from, device, |model| model)
    }

    fn rank_of(
        run: &Run,
        group: Option<ProcessGroup>,
        from: Option<&[Bytes]>,
        device: Device,
        wrap: impl FnOnce(Box<dyn Model>) -> Box<dyn Model>,
    ) -> (Training, State) {
        tch::set_num_threads(1);
        let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
        let place = Place { rank, world, device };
        let mut train = run.train.clone();
        if from.is_some() {
            // Values that are not loaded show.
            train.seed += 1;
        }
        let dataset = Dataset::open(run.folder.path()).unwrap();
        let batches = Batches::new(dataset, run.data.sequence_length, &run.train, place).unwrap();
        let lesson = Language::new(&run.model, &train, &run.parallel, place, true, batches).unwrap().with_model(wrap);
        let mut built = Built::new(Box::new(lesson), train, &run.parallel, place).unwrap();
        if let Some(files) = from {
            built.state.load(files, false).unwrap();
        }
        built.train.seed = run.train.seed;
        let Built { state, base, lesson, layout, train, place } = built;
        let built = Built { state: State::new(lesson.leaves(), &[]).unwrap(), base, lesson, layout, train, place };
        (built.start(&run.data, Peers::new(group)).unwrap(), state)
    }

    /// The bits of each step's loss and norm.
    fn train(training: &mut Training, steps: RangeInclusive<u64>) -> Vec<[u64; 2]> {
        let mut seen = Vec::new();
        for step in steps.map(Step) {
            training.timer().begin().unwrap();
            let Pass { loss, .. } = training.forward_backward(step).unwrap();
            let Update { grad_norm, .. } = training.update(step).unwrap();
            seen.push([loss, grad_norm].map(|tensor| torch::to_f64(&tensor).unwrap().to_bits()));
        }
        training.settle().unwrap();
        seen
    }

    /// Every rank from its start to its end; `None` as a group: there is one.
    fn everywhere<T: Send>(world: u32, body: impl Fn(Option<ProcessGroup>) -> T + Sync) -> Vec<T> {
        if world == 1 { vec![body(None)] } else { ranks(world, LIMIT, |group| body(Some(group))) }
    }

    #[test]
    fn a_run_that_is_resumed_gives_the_bits_of_one_that_nobody_disturbed() {
        use config::Strategy::{Ddp, Shard, Zero1};
        for (strategy, world, precision) in [
            (Ddp, 1, Precision::Fp32),
            (Ddp, 2, Precision::Bf16),
            (Zero1, 2, Precision::Fp32),
            (Zero1, 2, Precision::Bf16),
            (Shard, 2, Precision::Fp32),
            (Shard, 2, Precision::Bf16),
            // 8 sequences on 3: 2, 3, 3.
            (Shard, 3, Precision::Bf16),
            (Ddp, 3, Precision::Bf16),
            (Zero1, 3, Precision::Fp32),
        ] {
            assert_resumes(&run(strategy, precision, 2), world);
        }
    }

    /// Six steps in one go have the bits of three, a save, and three.
    fn assert_resumes(run: &Run, world: u32) {
        let case = format!("{:?} {world} {:?}", run.parallel.strategy, run.train.precision);
        let whole = everywhere(world, |group| {
            let (mut training, state) = rank(run, group, None);
            (train(&mut training, 1..=6), held(&state))
        });
        let half = everywhere(world, |group| {
            let (mut training, state) = rank(run, group, None);
            (train(&mut training, 1..=3), held(&state))
        });
        let (_, saved): (Vec<_>, Vec<Held>) = half.iter().cloned().unzip();
        let saved = files(&saved);
        let rest = everywhere(world, |group| {
            let (mut training, state) = rank(run, group, Some(&saved));
            (train(&mut training, 4..=6), held(&state))
        });
        for ((whole, half), rest) in whole.iter().zip(&half).zip(&rest) {
            assert_eq!(whole.0, [half.0.as_slice(), &rest.0].concat(), "{case}");
            assert!(whole.1 == rest.1, "{case}: other bytes");
        }
        let loss = |step: usize| whole.iter().map(|rank| f64::from_bits(rank.0[step][0])).sum::<f64>();
        assert!(loss(5) < loss(0), "{case}: nothing was learnt");
    }

    #[test]
    fn the_number_of_passes_changes_a_step_by_rounding_only() {
        let of = |max_micro_batch| {
            let run = run(config::Strategy::Ddp, Precision::Fp32, max_micro_batch);
            let (mut training, _) = rank(&run, None, None);
            assert_eq!(training.lesson.passes().iter().count() as u32, 8 / max_micro_batch);
            train(&mut training, 1..=4).into_iter().flatten().map(f64::from_bits).collect::<Vec<_>>()
        };
        let one = of(8);
        for passes in [of(4), of(1)] {
            for (a, b) in one.iter().zip(&passes) {
                assert!((a - b).abs() < 2e-4 * a.abs(), "{one:?} {passes:?}");
            }
        }
    }

    /// The loop as it was when a world had to divide the batch: equal passes, each loss divided by their number.
    fn train_in_equal_passes(training: &mut Training, steps: RangeInclusive<u64>, count: u64) -> Vec<[u64; 2]> {
        let mut seen = Vec::new();
        for step in steps.map(Step) {
            let all = positions(step, training.train.global_batch, training.place.rank, training.place.world);
            let size = (all.end - all.start) / count;
            let mut total: Option<Tensor> = None;
            for number in 0..count {
                let begin = all.start + number * size;
                training.lesson.read(begin..begin + size).unwrap();
                training.strategy.settle().unwrap();
                let loss = training.lesson.newest().unwrap().loss().unwrap().mean.f_div_scalar(count as f64).unwrap();
                training.strategy.begin(number + 1 == count).unwrap();
                loss.f_backward().unwrap();
                training.strategy.end(number + 1 == count).unwrap();
                let loss = loss.detach();
                total = Some(total.map_or_else(|| loss.shallow_clone(), |sum| sum.f_add(&loss).unwrap()));
            }
            let Update { grad_norm, .. } = training.update(step).unwrap();
            seen.push([total.unwrap(), grad_norm].map(|tensor| torch::to_f64(&tensor).unwrap().to_bits()));
        }
        training.settle().unwrap();
        seen
    }

    #[test]
    fn a_world_that_divides_the_batch_has_the_bits_of_equal_passes() {
        use config::Strategy::{Ddp, Zero1};
        for (strategy, world, precision, most, count) in [
            (Ddp, 1, Precision::Fp32, 3, 4),
            (Ddp, 2, Precision::Fp32, 3, 2),
            (Zero1, 2, Precision::Bf16, 1, 4),
            (Zero1, 4, Precision::Fp32, 8, 1),
        ] {
            let run = run(strategy, precision, most);
            let [ours, theirs] = [None, Some(count)].map(|count| {
                everywhere(world, |group| {
                    let (mut training, state) = rank(&run, group, None);
                    let seen = match count {
                        None => train(&mut training, 1..=4),
                        Some(count) => train_in_equal_passes(&mut training, 1..=4, count),
                    };
                    (seen, held(&state))
                })
            });
            assert!(ours == theirs, "{strategy:?} {world} {precision:?}: other bits");
        }
    }

    #[test]
    fn on_any_world_a_run_learns_what_one_rank_learns() {
        let losses = |strategy, world| -> Vec<f64> {
            let run = run(strategy, Precision::Fp32, 2);
            let ranks = everywhere(world, |group| train(&mut rank(&run, group, None).0, 1..=4));
            let loss = |step: usize| ranks.iter().map(|seen| f64::from_bits(seen[step][0])).sum::<f64>();
            (0..4).map(|step| loss(step) / f64::from(world)).collect()
        };
        let alone = losses(config::Strategy::Ddp, 1);
        for strategy in [config::Strategy::Ddp, config::Strategy::Zero1, config::Strategy::Shard] {
            for world in [3, 5, 7, 8] {
                let ours = losses(strategy, world);
                for (a, b) in ours.iter().zip(&alone) {
                    assert!(((a - b) / b).abs() < 1e-5, "{strategy:?} on {world}: {ours:?} for {alone:?}");
                }
            }
        }
    }

    #[test]
    fn a_step_uses_the_learning_rate_of_its_number_and_reports_the_norm_before_clipping() {
        let mut run = run(config::Strategy::Ddp, Precision::Fp32, 8);
        run.train.optimizer.grad_clip = 1e-3;
        let (mut training, _) = rank(&run, None, None);
        for (step, lr) in [(1, 0.5e-2), (2, 1e-2), (10, 1e-3)] {
            training.timer().begin().unwrap();
            training.forward_backward(Step(step)).unwrap();
            let update = training.update(Step(step)).unwrap();
            assert!((update.lr - lr).abs() < 1e-12, "{step}: {}", update.lr);
            assert!(torch::to_f64(&update.grad_norm).unwrap() > 1e-2, "{step}");
        }
    }

    #[test]
    fn the_held_out_loss_is_that_of_all_shares_together_and_changes_nothing() {
        for strategy in [config::Strategy::Zero1, config::Strategy::Shard] {
            held_out_loss_of(&run(strategy, Precision::Fp32, 2));
        }
    }

    fn held_out_loss_of(run: &Run) {
        let [one, two, four] = [1, 2, 4].map(|world| {
            let shares = everywhere(world, |group| {
                let (mut training, state) = rank(run, group, None);
                let before = held(&state);
                let share = training.evaluate(|| false).unwrap().unwrap();
                assert!(before == held(&state));
                share
            });
            let targets = HELD_OUT * SEQUENCE as u64;
            assert!(shares.iter().all(|share| share.0.len() == 1 && share.0[0].source.is_empty()));
            assert_eq!(shares.iter().map(|share| share.0[0].targets).sum::<u64>(), targets, "{world} ranks");
            shares.iter().map(|share| share.0[0].loss).sum::<f64>() / targets as f64
        });
        // An untrained model guesses.
        assert!((one - 96_f64.ln()).abs() < 0.1, "{one}");
        assert!((one - two).abs() < 1e-5 && (one - four).abs() < 1e-5, "{one} {two} {four}");
    }

    /// Ranks with no sample left take part in the others' passes.
    #[test]
    fn ranks_that_share_their_weights_measure_and_give_up_together() {
        let mut run = run(config::Strategy::Shard, Precision::Bf16, 1);
        let of = |run: &Run, world| {
            let shares = everywhere(world, |group| {
                let (mut training, state) = rank(run, group, None);
                train(&mut training, 1..=2);
                let before = held(&state);
                let share = training.evaluate(|| false).unwrap().unwrap();
                assert!(before == held(&state));
                // One rank hears of the end before the others, and not before the first pass.
                let asked = std::cell::Cell::new(0);
                let hears = training.place.rank == Rank(1) || world == 1;
                let over = training.evaluate(|| asked.replace(asked.get() + 1) == 1 && hears).unwrap();
                let together = run.parallel.strategy == config::Strategy::Shard;
                // Alone, a rank with one sample is never asked a second time.
                let own = crate::config::share(HELD_OUT, training.place.rank, training.place.world);
                let alone = hears && own.end - own.start > 1;
                assert_eq!(over.is_none(), together || alone);
                (train(&mut training, 3..=3), share.0[0].loss, share.0[0].targets)
            });
            let loss: f64 = shares.iter().map(|share| share.1).sum();
            let targets: u64 = shares.iter().map(|share| share.2).sum();
            loss / targets as f64
        };
        let shard = [2, 3, 4].map(|world| of(&run, world));
        run.parallel.strategy = config::Strategy::Ddp;
        let ddp = [2, 3, 4].map(|world| of(&run, world));
        for (shard, ddp) in shard.iter().zip(&ddp) {
            assert!((shard - ddp).abs() < 2e-3 * ddp, "{shard} for {ddp}");
        }
    }

    /// A run may go from one to another with any resume, so nothing may differ.
    #[test]
    fn what_is_kept_of_a_pass_changes_no_bit_of_a_run() {
        use config::{
            Activations::{Auto, Block, Keep},
            Strategy::{Ddp, Zero1},
        };
        for (strategy, world, precision) in
            [(Ddp, 1, Precision::Bf16), (Ddp, 2, Precision::Fp32), (Zero1, 3, Precision::Bf16)]
        {
            let mut run = run(strategy, precision, 2);
            let [keep, block, auto] = [Keep, Block, Auto].map(|activations| {
                run.train.activations = activations;
                everywhere(world, |group| {
                    let (mut training, state) = rank(&run, group, None);
                    let seen = train(&mut training, 1..=4);
                    (seen, training.evaluate(|| false).unwrap(), held(&state))
                })
            });
            assert!(keep == block && keep == auto, "{strategy:?} {world} {precision:?}");
        }
    }

    #[test]
    fn an_evaluation_comes_when_it_is_due_and_ends_when_nobody_waits_for_it() {
        let run = run(config::Strategy::Ddp, Precision::Fp32, 2);
        let (mut training, _) = rank(&run, None, None);
        let due: Vec<u64> = (1..=10).filter(|&step| training.evaluation_is_due(Step(step))).collect();
        assert_eq!(due, [4, 8, 10]);
        let asked = std::cell::Cell::new(0);
        let mut over_at = |pass| {
            asked.set(0);
            training.evaluate(|| asked.replace(asked.get() + 1) == pass).unwrap()
        };
        let passes = HELD_OUT.div_ceil(2);
        assert_eq!(over_at(passes - 1), None);
        assert_eq!(asked.get(), passes);
        assert!(over_at(passes).is_some());
    }

    /// In a process of its own, because the generators belong to the whole process.
    #[test]
    fn what_a_pass_draws_depends_on_its_first_position() {
        const NAME: &str = "train::step::tests::what_a_pass_draws_depends_on_its_first_position";
        const VARIABLE: &str = "TRAINER_TEST_SEEDS";
        if std::env::var_os(VARIABLE).is_none() {
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            let output = again.args(["--exact", NAME]).env(VARIABLE, "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
            return;
        }
        let run = run(config::Strategy::Ddp, Precision::Fp32, 2);
        let (mut training, _) = rank(&run, None, None);
        training.forward_backward(Step(3)).unwrap();
        // This model draws nothing: the generator stands where the last pass began, with the last 2 of 8 sequences.
        let left = torch::rng_state(Device::Cpu).unwrap();
        torch::manual_seed(pass_seed(run.train.seed, 2 * 8 + 6)).unwrap();
        assert!(left == torch::rng_state(Device::Cpu).unwrap(), "seeded otherwise");
    }

    #[test]
    fn seeds_of_passes_are_unrelated() {
        let seeds = [(7, 0), (7, 1), (7, 8), (7, 1 << 40), (6, 0), (6, 1)].map(|(seed, at)| pass_seed(seed, at));
        for (i, a) in seeds.iter().enumerate() {
            for b in &seeds[i + 1..] {
                assert!((a ^ b).count_ones() > 10, "{seeds:x?}");
            }
        }
    }
}
