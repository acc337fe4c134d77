//! How the ranks share the work of a step: gradients together, the update whole (`ddp`) or by parts (`zero1`).
//!
//! **ddp.** Every rank has everything; gradients are all-reduced behind the backward pass, and each rank makes the same
//! update.
//!
//! **zero1** (Rajbhandari et al., arXiv 1910.02054, stage 1). Every rank computes with all weights, but has the moments
//! and makes the update of its chunk of each bucket alone ([`super::partition`]):
//!
//! ```text
//! backward   bucket by bucket: exchange chunks ──► this rank's chunk of the averages      (torch::Reducer::sharded)
//! step       square of its norm, all-reduced: the norm of the whole gradient, the same number on every rank
//!            bucket by bucket: AdamW on the chunk, round to bf16 if so computed, start to gather the bucket
//! settle     wait for the gathers: before the weights are read again, by a forward pass, a validation or a capture
//! ```
//!
//! Buckets are updated and gathered from the first layers to the last. Between `step` and `settle` come the report,
//! zeroing the gradients and reading the next batch.
//!
//! With bf16 only the owner of a chunk has its fp32 weights; their bf16 rounding is gathered and used for computing; in
//! a `ddp` run every rank makes it for itself at each use. The casts are the same, so both strategies compute the same
//! function: on two ranks without clipping even to the last bit, else up to the order in which numbers are summed.
//! Bytes of one parameter on a rank, without its gradient's 4: ddp 12 (in either precision); zero1 fp32 4 + 8/N,
//! bf16 2 + 12/N.
//!
//! Invariants: the state changes in [`Parallel::step`] and, for the weights of other ranks' chunks, until
//! [`Parallel::settle`] returns; a capture runs between `settle` and `step`, so no gather writes what a capture reads.
//! All ranks call all of it in the same order. A world of one has nobody to share with and is `ddp`, regardless of the
//! setting. *Crash:* a peer that dies breaks the collective; the error ends this worker too, and the state is that of
//! the newest checkpoint. *Resume:* partition and buckets depend on the configuration and the world alone, and elements
//! are summed in the order of ranks, so a resume on the same world is exact.

use tch::{Kind, Tensor};

use super::{
    optim::{Slot, Update, clip_scale},
    partition::Partition,
    state::{Held, State},
};
use crate::{
    config::{OptimizerConfig, ParallelConfig, Strategy},
    error::{Error, Kind as ErrorKind, Result},
    ids::{Rank, Step, WorldSize},
    model::Model,
    torch::{self, Pending, ProcessGroup, Reducer, Reduction, TorchError},
};

/// Bytes of the first bucket, so that the first reduction starts early.
const FIRST_BUCKET: u64 = 1 << 20;

/// How the state of `model` is divided among `world` ranks; `None`: not at all.
pub fn split(config: &ParallelConfig, model: &dyn Model, rank: Rank, world: WorldSize) -> Option<(Partition, Rank)> {
    if config.strategy == Strategy::Ddp || world.get() <= 1 {
        return None;
    }
    let lens: Vec<u64> = model.parameters().iter().map(|(_, leaf)| leaf.numel() as u64).collect();
    let bucket = u64::from(config.bucket_mib) << 20;
    Some((Partition::new(&lens, world, bucket.min(FIRST_BUCKET), bucket), rank))
}

/// One rank's part in the work of a step.
#[derive(Debug)]
pub struct Parallel {
    config: OptimizerConfig,
    leaves: Vec<Tensor>,
    /// The gradients that the norm is taken over.
    gradients: Vec<Tensor>,
    units: Vec<Unit>,
    /// `None` in a world of one: there is nobody to reduce with.
    reducer: Option<Reducer>,
    /// Present if each rank has only a share.
    group: Option<ProcessGroup>,
    gathering: Vec<Pending>,
}

/// One unit of the update.
#[derive(Debug)]
struct Unit {
    update: Update,
    gather: Option<Gather>,
}

/// The data that the other ranks need after an update.
#[derive(Debug)]
struct Gather {
    bucket: Tensor,
    /// The bucket's own chunk and the fp32 weights that are rounded into it, if the two differ.
    rounded: Option<(Tensor, Tensor)>,
}

impl Parallel {
    /// For the state of `model`, which it was made with. Takes over the gradients, which are zero afterwards and stay
    /// where they are. `group`: of all ranks; none is needed in a world of one.
    pub fn new(
        config: &ParallelConfig,
        optimizer: OptimizerConfig,
        model: &dyn Model,
        state: &State,
        group: Option<ProcessGroup>,
    ) -> Result<Self> {
        let leaves: Vec<Tensor> = model.parameters().iter().map(|(_, leaf)| leaf.shallow_clone()).collect();
        let mut parallel = Self {
            config: optimizer,
            leaves,
            gradients: Vec::new(),
            units: Vec::new(),
            reducer: None,
            group: None,
            gathering: Vec::new(),
        };
        match (state.held(), group) {
            (Held::Replicated(_), group) => {
                if let Some(group) = group {
                    let bucket = u64::from(config.bucket_mib) << 20;
                    let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
                    let (first, bucket) = (bytes(bucket.min(FIRST_BUCKET)), bytes(bucket));
                    parallel.reducer = Some(Reducer::new(&parallel.leaves, &group, first, bucket)?);
                }
                parallel.replicated(state)?;
            }
            (Held::Partitioned { partition, .. }, Some(group)) => {
                parallel.reducer = Some(Reducer::sharded(&parallel.leaves, &group, &partition.for_reducer())?);
                parallel.group = Some(group);
                parallel.partitioned(state)?;
            }
            (Held::Partitioned { .. }, None) => return Err(Error::new(ErrorKind::Bug, "a shared state without peers")),
        }
        Ok(parallel)
    }

    fn replicated(&mut self, state: &State) -> Result<()> {
        let Held::Replicated(whole) = state.held() else { return Ok(()) };
        // After the reducer, which decides where gradients are in memory.
        torch::zero_gradients(&self.leaves)?;
        self.gradients = torch::gradients(&self.leaves)?;
        let slots = whole.iter().zip(&self.gradients).map(|(whole, gradient)| Slot {
            decays: whole.weight.dim() >= 2,
            weight: whole.weight.shallow_clone(),
            gradient: gradient.shallow_clone(),
            exp_avg: whole.exp_avg.shallow_clone(),
            exp_avg_sq: whole.exp_avg_sq.shallow_clone(),
        });
        self.units = vec![Unit { update: Update::new(slots.collect()), gather: None }];
        Ok(())
    }

    fn partitioned(&mut self, state: &State) -> Result<()> {
        let (Held::Partitioned { partition, rank, shares }, Some(reducer)) = (state.held(), &self.reducer) else {
            return Ok(());
        };
        let mut slots: Vec<Vec<Slot>> = shares.iter().map(|_| Vec::new()).collect();
        let mut owns = Vec::with_capacity(shares.len());
        let narrow = |tensor: &Tensor, begin: u64, len: u64| {
            let (begin, len) = (i64::try_from(begin).unwrap_or(i64::MAX), i64::try_from(len).unwrap_or(i64::MAX));
            torch::tch_result("share out", tensor.f_narrow(0, begin, len))
        };
        for bucket in 0..shares.len() {
            let (start, owned) = partition.chunk(bucket, *rank);
            owns.push(narrow(&reducer.bucket(bucket)?, start, owned)?);
        }
        for piece in partition.pieces(*rank) {
            let share = &shares[piece.bucket];
            let of = |tensor: &Tensor| narrow(tensor, piece.at, piece.end - piece.begin);
            slots[piece.bucket].push(Slot {
                decays: self.leaves[piece.param].dim() >= 2,
                weight: of(&share.weights)?,
                gradient: of(&owns[piece.bucket])?,
                exp_avg: of(&share.exp_avg)?,
                exp_avg_sq: of(&share.exp_avg_sq)?,
            });
        }
        // The last bucket has the first layers, which the next forward pass needs first.
        for (share, slots) in shares.iter().zip(slots).rev() {
            let rounded = share.weights.kind() != share.gathered.kind();
            let rounded = rounded.then(|| (share.own.shallow_clone(), share.weights.shallow_clone()));
            let gather = Gather { bucket: share.gathered.shallow_clone(), rounded };
            self.units.push(Unit { update: Update::new(slots), gather: Some(gather) });
        }
        self.gradients = owns.into_iter().filter(|own| own.numel() > 0).collect();
        Ok(())
    }

    /// Runs the backward pass of `loss`, adding to the gradients; reduces them if this is the step's `last` pass.
    pub fn backward(&self, loss: &Tensor, last: bool) -> Result<(), TorchError> {
        match &self.reducer {
            Some(reducer) => reducer.backward(loss, if last { Reduction::Average } else { Reduction::Accumulate }),
            None => torch::tch_result("backward pass", loss.f_backward()),
        }
    }

    /// The `step`-th update of the run, from the reduced gradients. Returns the 2-norm of the whole gradient before
    /// clipping, as a scalar on the device: the caller chooses when to read it. The weights may be read after
    /// [`Parallel::settle`].
    pub fn step(&mut self, step: Step, lr: f64) -> Result<Tensor, TorchError> {
        self.settle()?;
        tch::no_grad(|| {
            let norm = self.norm()?;
            let scale = clip_scale(&self.config, &norm)?;
            for unit in &self.units {
                unit.update.apply(&self.config, step, lr, scale.as_ref())?;
                let (Some(gather), Some(group)) = (&unit.gather, &self.group) else { continue };
                if let Some((own, weights)) = &gather.rounded {
                    torch::tch_result("round weights", own.shallow_clone().f_copy_(weights))?;
                }
                self.gathering.push(group.all_gather(&gather.bucket)?);
            }
            Ok(norm)
        })
    }

    fn norm(&self) -> Result<Tensor, TorchError> {
        let Some(group) = &self.group else { return torch::grad_norm(&self.gradients) };
        let square = || match self.gradients.as_slice() {
            [] => Tensor::f_zeros([], (Kind::Double, self.leaves.first().map_or(tch::Device::Cpu, Tensor::device))),
            // In double, so that squaring a norm and taking the root again costs nothing.
            gradients => torch::grad_norm(gradients)
                .map_err(|error| tch::TchError::Torch(error.to_string()))?
                .f_to_kind(Kind::Double)?
                .f_square(),
        };
        let mut sum = torch::tch_result("gradient norm", square())?;
        group.all_reduce_sum(&mut sum)?;
        torch::tch_result("gradient norm", sum.f_sqrt().and_then(|norm| norm.f_to_kind(Kind::Float)))
    }

    /// Waits until the last update has reached this rank's weights. Costs nothing if there is nothing to wait for.
    pub fn settle(&mut self) -> Result<(), TorchError> {
        self.gathering.drain(..).try_for_each(Pending::wait)
    }

    /// Sets every gradient to zero, in place: the reducer's buckets keep pointing at them.
    pub fn zero_grad(&mut self) -> Result<(), TorchError> {
        torch::zero_gradients(&self.leaves)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::{
        config::{ModelKind, Precision},
        model::{self, BuildSettings},
        torch::{LIMIT, byte_len, ranks, store_bytes, to_f64},
    };

    const STEPS: u64 = 6;
    const BATCH: i64 = 12;

    #[derive(Clone, Copy, Debug)]
    struct Case {
        strategy: Strategy,
        precision: Precision,
        world: u32,
        passes: i64,
        clip: f64,
        tied: bool,
    }

    struct Trained {
        losses: Vec<f64>,
        norms: Vec<f64>,
        /// Each parameter as it is computed with.
        weights: Vec<Vec<u8>>,
        /// Bytes of moments and of fp32 weights beside those that are computed with.
        optimizer_bytes: usize,
    }

    fn build(case: &Case) -> Box<dyn Model> {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "attention_bias": true, "tie_word_embeddings": case.tied,
        });
        let settings = BuildSettings { device: Device::Cpu, precision: case.precision, seed: Some(7) };
        model::build(ModelKind::Llama, &config, &settings).unwrap()
    }

    /// The same in every step, so that something is learnt.
    fn tokens(first: i64, count: i64) -> Tensor {
        let values: Vec<i64> = (first * 17..(first + count) * 17).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect();
        Tensor::from_slice(&values).view([count, 17])
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0; byte_len(tensor).unwrap()];
        store_bytes(tensor, &mut bytes).unwrap();
        bytes
    }

    fn train(case: &Case, group: Option<ProcessGroup>) -> Trained {
        tch::set_num_threads(1);
        let mut model = build(case);
        let (rank, world) = group.as_ref().map_or((Rank(0), WorldSize(1)), |group| (group.rank(), group.world()));
        let lens: Vec<u64> = model.parameters().iter().map(|(_, leaf)| leaf.numel() as u64).collect();
        // Small buckets, so that there are many.
        let split = (case.strategy == Strategy::Zero1).then(|| (Partition::new(&lens, world, 1000, 9000), rank));
        let state = State::new(model.as_mut(), case.precision, split).unwrap();
        let config = ParallelConfig {
            strategy: case.strategy,
            nproc_per_node: None,
            device: crate::config::Device::Auto,
            bucket_mib: 1,
        };
        let optimizer =
            OptimizerConfig { lr: 1e-2, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: case.clip };
        let all = group.filter(|_| world.get() > 1);
        let mut parallel = Parallel::new(&config, optimizer, model.as_ref(), &state, all).unwrap();
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        let own = BATCH / i64::from(world.get());
        let pass = own / case.passes;
        for step in 1..=STEPS {
            let mut sum = 0.0;
            for number in 0..case.passes {
                let tokens = tokens(own * i64::from(rank.get()) + pass * number, pass);
                parallel.settle().unwrap();
                let loss = model.loss(&tokens).unwrap() / case.passes as f64;
                parallel.backward(&loss, number + 1 == case.passes).unwrap();
                sum += to_f64(&loss).unwrap();
            }
            losses.push(sum);
            norms.push(to_f64(&parallel.step(Step(step), 1e-2).unwrap()).unwrap());
            parallel.zero_grad().unwrap();
        }
        parallel.settle().unwrap();
        let weights = state.specs().iter().zip(state.tensors()).filter(|(spec, _)| !spec.name.contains("exp_avg"));
        let weights = weights.filter(|(spec, _)| !spec.name.starts_with("master."));
        let optimizer_bytes = match state.held() {
            Held::Replicated(whole) => {
                whole.iter().map(|whole| byte_len(&whole.exp_avg).unwrap() + byte_len(&whole.exp_avg_sq).unwrap()).sum()
            }
            Held::Partitioned { shares, .. } => {
                let share = |share: &super::super::state::Share| {
                    let masters = if case.precision == Precision::Bf16 { byte_len(&share.weights).unwrap() } else { 0 };
                    byte_len(&share.exp_avg).unwrap() + byte_len(&share.exp_avg_sq).unwrap() + masters
                };
                shares.iter().map(share).sum()
            }
        };
        Trained { losses, norms, weights: weights.map(|(_, tensor)| bytes(tensor)).collect(), optimizer_bytes }
    }

    /// By rank.
    fn run(case: &Case) -> Vec<Trained> {
        if case.world == 1 {
            vec![train(case, None)]
        } else {
            ranks(case.world, LIMIT, |group| train(case, Some(group)))
        }
    }

    /// The mean over the ranks of each step's loss.
    fn losses(ranks: &[Trained]) -> Vec<f64> {
        let mean = |step: usize| ranks.iter().map(|rank| rank.losses[step]).sum::<f64>() / ranks.len() as f64;
        (0..STEPS as usize).map(mean).collect()
    }

    fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
        for (step, (got, want)) in got.iter().zip(want).enumerate() {
            let difference = (got - want).abs() / want.abs();
            assert!(difference <= tolerance, "{what} of step {}: {got} for {want} differs by {difference:e}", step + 1);
        }
    }

    fn compare(case: Case) {
        let ddp = run(&Case { strategy: Strategy::Ddp, ..case });
        let zero1 = run(&Case { strategy: Strategy::Zero1, ..case });
        assert!(losses(&ddp)[STEPS as usize - 1] < losses(&ddp)[0] * 0.99, "{case:?}: nothing was learnt");
        let clipped = ddp[0].norms.iter().filter(|&&norm| norm > case.clip).count();
        assert_eq!(clipped, if case.clip > 0.0 { STEPS as usize } else { clipped }, "{case:?}: {:?}", ddp[0].norms);
        for rank in &zero1 {
            assert!(rank.weights == zero1[0].weights, "{case:?}: ranks differ in their weights");
            assert_eq!(rank.norms, zero1[0].norms, "{case:?}: ranks differ in the norm");
        }
        if case.world == 2 && case.clip == 0.0 {
            // Two numbers have one sum, so that every cast and every product must be the same.
            assert_eq!(losses(&zero1), losses(&ddp), "{case:?}");
            assert_close(&zero1[0].norms, &ddp[0].norms, 1e-6, "norm");
        } else {
            let tolerance = if case.precision == Precision::Bf16 { 2e-3 } else { 2e-5 };
            assert_close(&losses(&zero1), &losses(&ddp), tolerance, &format!("{case:?}: loss"));
            assert_close(&zero1[0].norms, &ddp[0].norms, 20.0 * tolerance, &format!("{case:?}: norm"));
        }
    }

    const CASE: Case =
        Case { strategy: Strategy::Zero1, precision: Precision::Fp32, world: 2, passes: 1, clip: 0.0, tied: false };

    #[test]
    fn on_two_ranks_without_clipping_losses_are_those_of_ddp_to_the_last_bit() {
        for precision in [Precision::Fp32, Precision::Bf16] {
            for (passes, tied) in [(1, false), (3, true)] {
                compare(Case { precision, passes, tied, ..CASE });
            }
        }
    }

    #[test]
    fn on_more_ranks_and_with_clipping_losses_are_those_of_ddp_up_to_rounding() {
        for precision in [Precision::Fp32, Precision::Bf16] {
            for (world, passes, clip) in [(3, 1, 0.0), (3, 2, 0.05), (2, 2, 0.05), (4, 1, 0.05)] {
                compare(Case { precision, world, passes, clip, ..CASE });
            }
        }
    }

    #[test]
    fn the_same_run_gives_the_same_bits() {
        let case = Case { precision: Precision::Bf16, world: 3, passes: 2, clip: 0.05, ..CASE };
        let (once, again) = (run(&case), run(&case));
        assert_eq!(losses(&once), losses(&again));
        assert!(once[0].weights == again[0].weights);
    }

    #[test]
    fn each_rank_has_its_share_of_the_optimizer_state_and_no_more() {
        for (precision, element) in [(Precision::Fp32, 8), (Precision::Bf16, 12)] {
            for world in [2, 3, 4] {
                let case = Case { precision, world, ..CASE };
                let elements: i64 = build(&case).parameters().iter().map(|(_, leaf)| leaf.numel() as i64).sum();
                let per_rank: Vec<usize> = run(&case).iter().map(|rank| rank.optimizer_bytes).collect();
                let average = element * elements as usize / world as usize;
                assert_eq!(per_rank.iter().sum::<usize>(), element * elements as usize, "{case:?}");
                for bytes in per_rank {
                    assert!(bytes <= average + average / 20 + 4096, "{case:?}: {bytes} of {average} on average");
                }
            }
        }
    }

    #[test]
    fn a_world_of_one_has_nothing_to_share() {
        let model = build(&CASE);
        let config = |strategy| ParallelConfig {
            strategy,
            nproc_per_node: None,
            device: crate::config::Device::Auto,
            bucket_mib: 1,
        };
        let split = |strategy, world| split(&config(strategy), model.as_ref(), Rank(0), WorldSize(world)).is_some();
        assert_eq!(
            [split(Strategy::Zero1, 1), split(Strategy::Ddp, 2), split(Strategy::Zero1, 2)],
            [false, false, true]
        );
        let alone = run(&Case { strategy: Strategy::Ddp, world: 1, ..CASE });
        assert_close(&losses(&run(&CASE)), &losses(&alone), 2e-5, "loss");
    }
}
